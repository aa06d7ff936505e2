"""UP-Person (arXiv 2504.10084): parameter-efficient text-based person retrieval on fused kernels."""

from upperson.config import PRESETS, Config, DataConfig, ModelConfig, TrainConfig
from upperson.model import UPPerson
from upperson.training import fit

__all__ = ["PRESETS", "Config", "DataConfig", "ModelConfig", "TrainConfig", "UPPerson", "fit"]
