"""UP-Person (arXiv 2504.10084): parameter-efficient text-based person retrieval on fused kernels."""

from upperson.config import Config, DataConfig, ModelConfig, TrainConfig
from upperson.model import AdaptedCLIP
from upperson.config.presets import PRESETS, preset
from upperson.train.fit import fit

__all__ = ["PRESETS", "Config", "DataConfig", "ModelConfig", "TrainConfig", "AdaptedCLIP", "fit", "preset"]
