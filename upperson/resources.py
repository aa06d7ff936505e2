"""What a run computes on, and where the random numbers of its process stand."""

import importlib.util
import random
from typing import Any

import numpy as np
import torch

from upperson.config import TrainConfig
from upperson.distributed import ALONE, Group
from upperson.run_folder import RunError


def resources(settings: TrainConfig, group: Group = ALONE) -> tuple[torch.device, str]:
    """The device and the precision that "auto" stands for; RunError for what this machine does not have.

    Each process of a group has a GPU of its own, the one of its local rank.
    """
    available = torch.cuda.is_available()
    device = torch.device(settings.device if settings.device != "auto" else "cuda" if available else "cpu")
    if group.world_size > 1 and device.type == "cuda":
        if device.index is not None:
            raise RunError(f"device: {settings.device} is one GPU for {group.world_size} processes; --device cuda "
                           "gives each its own, and CUDA_VISIBLE_DEVICES says which there are")
        device = torch.device("cuda", group.local_rank)
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise RunError(f"device: {device} is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise RunError("precision: fp16 needs a GPU; use fp32 or bf16 on a CPU")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RunError("tensorboard: the package is not installed; pip install 'upperson[tensorboard]'")
    return device, precision


def random_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
    }


def set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
