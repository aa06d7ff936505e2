"""The configuration of a run, the presets and the command line. This package does not import torch.

configuration.py   the dataclasses, to and from JSON
presets.py         a configuration for every data set, and for every method on it
command_line.py    the flags of training
files.py           configurations in JSON and TOML files
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
