"""The folder of a run: its files, its creation, and its checks."""

from collections.abc import Iterable
from pathlib import Path

from upperson.config import Config
from upperson.config.files import CONFIG, read_configuration
from upperson.errors import CheckpointError, RunError
from upperson.evaluate.results import RESULTS, TABLE
from upperson.files import write_atomically
from upperson.train.log import METRICS_FILE
from upperson.train.resume import RESUME

BEST, LAST = "best.safetensors", "last.safetensors"
CURVE, TOP_TEN = "curve.png", "top10.png"
SHOWN = (TABLE, CURVE, TOP_TEN, BEST, METRICS_FILE)  # the files that a finished run lists
FILES = (CONFIG, METRICS_FILE, RESUME, BEST, LAST, RESULTS, TABLE, CURVE, TOP_TEN)


def claim_folder(config: Config) -> Path:
    """Creates the run folder: run_dir, or the next free runs/DATASET-NUMBER. Raises RunError for a used folder."""
    named = config.train.run_dir
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        refuse_used([named])
        return named
    Path("runs").mkdir(exist_ok=True)
    number = 1
    while True:
        run_dir = Path("runs", f"{config.data.dataset}-{number}")
        try:
            run_dir.mkdir()
            return run_dir
        except FileExistsError:
            number += 1


def refuse_used(folders: Iterable[Path]) -> None:
    """Raises RunError for a folder that contains a file of a run."""
    for folder in folders:
        for name in FILES:
            if (folder / name).exists():
                raise RunError(
                    f"{folder} already contains a run ({name}); resume this run with --resume {folder}, or choose "
                    "another --run-dir"
                )


def write_configuration(run_dir: Path, config: Config) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / CONFIG, config.to_json())


def require_same_run(config: Config, run_dir: Path) -> None:
    """Raises RunError if `run_dir` contains no run, or a run of another configuration."""
    if not (run_dir / CONFIG).is_file():
        raise RunError(f"{run_dir}: no run to resume ({CONFIG} is missing)")
    differences = config.differences(_saved(run_dir))
    if differences:
        raise RunError(f"{run_dir}: the run was started with another configuration: {'; '.join(differences)} as before")


def require_same_stage(config: Config, folder: Path) -> None:
    """Raises RunError if the folder of a stage contains a run of another configuration.

    The path of the starting checkpoint is not compared, since the run folder may have been moved.
    """
    if (folder / CONFIG).is_file():
        require_same_run(config.replace(start_from=_saved(folder).train.start_from), folder)


def _saved(run_dir: Path) -> Config:
    try:
        return read_configuration(run_dir / CONFIG)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
