"""UP-Person (arXiv 2504.10084): parameter-efficient text-based person retrieval on fused kernels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upperson.config import PRESETS, Config, DataConfig, ModelConfig, TrainConfig, preset
    from upperson.model import AdaptedCLIP, load_model
    from upperson.train.fit import fit

# The module of each public name. A module is imported at the first use of a name, since importing torch takes seconds.
_MODULES = {
    "upperson.config": ("PRESETS", "Config", "DataConfig", "ModelConfig", "TrainConfig", "preset"),
    "upperson.model": ("AdaptedCLIP", "load_model"),
    "upperson.train.fit": ("fit",),
}

__all__ = [
    "PRESETS",
    "AdaptedCLIP",
    "Config",
    "DataConfig",
    "ModelConfig",
    "TrainConfig",
    "fit",
    "load_model",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("upperson")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'upperson' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
