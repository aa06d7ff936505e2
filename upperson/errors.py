"""The errors that a user can mend: a command shows them in one line and ends with status 1."""

from kernels.tiles import TilesError
from upperson.checkpoint import CheckpointError
from upperson.data import DataError
from upperson.methods import MethodError
from upperson.metrics import RetrievalError
from upperson.model import BackboneError
from upperson.run_folder import RunError

USER_ERRORS = (BackboneError, CheckpointError, DataError, MethodError, RetrievalError, RunError, TilesError, OSError)
