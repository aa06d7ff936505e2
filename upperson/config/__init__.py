"""The configuration of a run, the presets, the command line. Importing it does not import torch.

configuration.py   the dataclasses, and JSON
presets.py         a configuration for every data set, and for every method on it
command_line.py    the flags of training
"""

from upperson.config.configuration import (
    SELECTIONS,
    Config,
    DataConfig,
    Dataset,
    EmbeddedDataset,
    ModelConfig,
    TrainConfig,
    method_named,
)
from upperson.config.presets import PRESETS, preset, with_method

__all__ = [
    "PRESETS",
    "SELECTIONS",
    "Config",
    "DataConfig",
    "Dataset",
    "EmbeddedDataset",
    "ModelConfig",
    "TrainConfig",
    "method_named",
    "preset",
    "with_method",
]
