"""The costs of methods on this machine: parameters, FLOPs, memory, time.

The costs are measured with random images and captions of full length. Each row and stage is measured in its own
process, so that memory and caches of other measurements have no influence.
"""

import importlib
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from upperson_kernels.backend import HAS_TRITON

from upperson.config import PRESETS, Config
from upperson.data.masking import mask_caption, masked_positions
from upperson.evaluate.embed import autocast
from upperson.machine import device_and_precision
from upperson.model import AdaptedCLIP
from upperson.tables.paper_flops import paper_flops
from upperson.tables.rows import Configs, trainings
from upperson.train.loop import build_objective
from upperson.train.optimizer import build_optimizer

BATCH, SYNTHETIC_BATCH = 128, 64
FULL_SIZE, FULL_SIZE_BATCH = "cuhk-pedes", 2  # the preset whose model is measured beside the embedded model
QUERIES, GALLERY = 50, 3000  # sizes of a search, whose time is given for 1,000 queries
REPETITIONS = 5
PEOPLE = 11_003  # in the training split of CUHK-PEDES


@dataclass(frozen=True)
class Cost:
    """The costs of a training, or of one stage. FLOPs count a multiplication and an addition as two."""

    trained_parameters: int
    all_parameters: int
    inference_gflops: float  # for one image and one caption
    step_gflops: float  # for a training step, per pair
    paper_mflops: float  # what the paper's Table IV counts, 10⁶ for one pair; see upperson.tables.paper_flops
    step_megabytes: float | None  # memory allocated by forward and backward pass, with gradients; None: unknown
    step_milliseconds: float  # for a training step of the whole batch
    query_seconds: float  # for embedding 1,000 captions, 50 at once, and ranking 3,000 embedded images


Costs = dict[str, dict[str, list[Cost]]]  # by model, then by row; one cost for each stage of the method


def measure_costs(rows: Callable[[Config], Configs], base: Config, device: str) -> Costs:
    """The costs of the rows of a preset; for a synthetic data set, also those of ViT-B/16."""
    parts = [(base, SYNTHETIC_BATCH if base.data.is_synthetic else BATCH)]
    if base.data.is_synthetic:
        parts.append((PRESETS[FULL_SIZE], FULL_SIZE_BATCH))
    costs: Costs = {}
    for preset, batch in parts:
        model = preset.model
        title = f"{model.model}, {model.image_size[0]}×{model.image_size[1]}, batch {batch}"
        for name, config in rows(preset).items():
            print(f"measuring {name}, {title}", file=sys.stderr, flush=True)
            # The values of weights do not change the costs, and random weights need no download.
            config = config.replace(device=device, pretrained="none")
            costs.setdefault(title, {})[name] = measure_apart(config, batch)
    return costs


def how_measured(config: Config, device: str) -> str:
    found, precision = device_and_precision(device, config.train.precision)
    return (
        f"Measured on {found.type} in {precision}, with random images and captions of full length; memory is what "
        "forward and backward pass allocate, gradients included; FLOPs of inference at batch 1, low-rank updates "
        "merged in them."
    )


def measure_apart(config: Config, batch_size: int) -> list[Cost]:
    """Runs measure() in a fresh process for each stage of the method."""
    costs = []
    for part in trainings(config):
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
            costs.append(process.submit(measure, part, batch_size).result())
    return costs


def measure(config: Config, batch_size: int) -> Cost:
    """The costs of one training with batches of `batch_size` pairs, on the device and in the precision of `config`.

    The losses are those of the training, with the people of a data set as classes. The peak memory on a CPU is that of
    the process, so this function should be the first work of its process.
    """
    device, precision = device_and_precision(config.train.device, config.train.precision)
    torch.manual_seed(0)
    model = AdaptedCLIP(config.model).to(device)
    model.freeze(config.train.freeze)
    people = config.data.embedded_identities[0] if config.data.is_synthetic else PEOPLE
    objective = build_objective(config, model, range(people)).to(device)
    parameters = model.trained_parameters() | objective.trained_parameters()
    batch = random_batch(model, batch_size, device)
    gallery = torch.randn(GALLERY, model.embedding_width, device=device)
    costs: dict[str, Any] = {"step_gflops": 0.0, "step_megabytes": 0.0, "step_milliseconds": 0.0}
    costs["paper_mflops"] = paper_flops(model, objective) / 1e6

    if parameters:
        optimizer = build_optimizer(parameters, config.train)

        def find_gradients() -> None:
            optimizer.zero_grad()
            with autocast(device, precision):
                loss, _ = objective(model, batch)
            loss.backward()

        def step() -> None:
            find_gradients()
            optimizer.step()

        peak = Peak(device)
        find_gradients()
        costs["step_megabytes"] = peak.megabytes()
        costs["step_milliseconds"] = 1e3 * shortest(step, device)

    seconds = shortest(lambda: rank(model, batch["captions"][:1], gallery, precision), device)
    costs["query_seconds"] = 1000 / QUERIES * seconds
    if parameters:
        costs["step_gflops"] = flops(step) / batch_size
    with autocast(device, precision), torch.no_grad():  # with gradients, a method may need all tokens
        costs["inference_gflops"] = flops(
            lambda: (model.encode_image(batch["images"][:1]), model.encode_text(batch["captions"][:1]))
        )
    trained, everything = (sum(map(torch.numel, tensors)) for tensors in (parameters.values(), model.parameters()))
    return Cost(trained, everything, **costs)


def random_batch(model: AdaptedCLIP, size: int, device: torch.device) -> dict[str, Tensor]:
    """A random batch like those of upperson.data.train_loader, with captions of full length, masked ones as well."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, *model.config.image_size, generator=generator)
    captions = model.tokenizer(["coat " * model.context_length] * size)
    batch = {"images": images, "captions": captions, "person_ids": torch.arange(size)}
    masked, labels = zip(*(mask_caption(caption, generator) for caption in captions), strict=True)
    batch |= {"masked_captions": torch.stack(masked), "mask_labels": torch.stack(labels)}
    batch["mask_positions"] = masked_positions(batch["mask_labels"])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def rank(model: AdaptedCLIP, caption: Tensor, gallery: Tensor, precision: str) -> Tensor:
    """The ten best entries of the gallery (G, E) for QUERIES copies of `caption` (1, L)."""
    with torch.inference_mode(), autocast(caption.device, precision):
        features = model.encode_text(caption.expand(QUERIES, -1)).float()
        return (features @ gallery.t()).topk(10).indices


def flops(call: Callable[[], Any]) -> float:
    """The floating-point operations of matrix products and convolutions in a call, also in backward, in 10⁹."""
    with flop_counter() as counter:
        call()
    return counter.get_total_flops() / 1e9


def flop_counter() -> FlopCounterMode:
    """PyTorch's FLOP counter, with formulas for grouped products and, before PyTorch 2.15, for the CPU attention.

    A counter reads the registered formulas when it is made, so the formulas of the fused operators are registered here,
    before an operator is called.
    """
    if HAS_TRITON:
        for operator in ("attention", "adapter", "quick_gelu"):
            importlib.import_module(f"upperson_kernels.{operator}.op")
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grouped = torch.ops.aten._grouped_mm  # of rows with the matrix of their group, or of two operands' rows by group
    formulas = {
        grouped: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    missing = {operator: formula for operator, formula in formulas.items() if operator not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=missing)


def shortest(call: Callable[[], Any], device: torch.device) -> float:
    """The time of the fastest of several calls in seconds, after a warm-up call."""
    times = []
    for _ in range(1 + REPETITIONS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


class Peak:
    """The peak memory since creation of the object: PyTorch's own count on a GPU, the process's size on Linux."""

    STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif self.CLEAR.exists():
            self.CLEAR.write_text("5")  # resets the high-water mark
            self.before = self.resident("VmRSS")

    def megabytes(self) -> float | None:
        """The peak above the memory at creation in 10⁶ bytes; None if the machine does not report the memory."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 1e6
        return (self.resident("VmHWM") - self.before) / 1e6 if self.CLEAR.exists() else None

    def resident(self, name: str) -> int:
        line = next(line for line in self.STATUS.read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])
