"""One training step of UP-Person: both towers, the SDM loss, backward, Adam. Fused kernels against PyTorch.

    python bench/step.py                       CLIP ViT-B/16 at 384×128, batch 128, bf16; without a GPU the embedded
                                               model, batch 8, float32, PyTorch alone
    python bench/step.py --batch 64 --json step.json

Weights, images and captions are random. Both models start alike and must agree on the first loss. A step is timed
from its call to the end of all its work on the device, Python included: that is what a training waits for.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from comparison import above_zero, at_least_one, json_path
from measure import Call, environment, peak_memory, summary
from torch import Tensor

from upperson.config import PRESETS, ModelConfig
from upperson.losses import sdm_loss
from upperson.model import UPPerson
from upperson.optimization import build_optimizer
from upperson.retrieval import autocast

# Largest relative difference of the first losses. The two backends round bf16 differently in every block.
AGREEMENT = {"bf16": 3e-2, "fp32": 1e-4}


def configuration(gpu: bool) -> ModelConfig:
    """The model of the CUHK-PEDES preset with random weights; without a GPU the embedded one."""
    if not gpu:
        return PRESETS["embedded"].model
    return replace(PRESETS["cuhk-pedes"].model, pretrained="none")


def random_batch(model: UPPerson, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, H, W), token ids (B, L) of captions of 8 to 45 words, and person ids (B,), two images a person."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *model.config.image_size, generator=generator)
    lengths = torch.randint(8, 46, (batch,), generator=generator).tolist()
    captions = model.tokenizer([" ".join(["coat"] * length) for length in lengths])
    return images.to(device), captions.to(device), (torch.arange(batch) // 2).to(device)


def training_step(backend: str, batch: int, device: torch.device, precision: str) -> Callable[[], float]:
    """A function that takes one optimizer step, as upperson.training does, and returns the loss before it."""
    torch.manual_seed(0)
    model = UPPerson(replace(configuration(device.type == "cuda"), backend=backend)).to(device)
    parameters = model.trained_parameters()
    settings = PRESETS["cuhk-pedes"].train
    optimizer = build_optimizer(parameters, settings)
    images, captions, person_ids = random_batch(model, batch, device)

    def step() -> float:
        with autocast(device, precision):
            image_features, text_features = model.encode_image(images), model.encode_text(captions)
        loss = sdm_loss(image_features, text_features, person_ids, temperature=settings.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return value
    return step


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=at_least_one, default=128 if gpu else 8, metavar="N",
                        help="pairs of image and caption (default: 128, on a CPU 8)")
    parser.add_argument("--seconds", type=above_zero, default=10.0, metavar="S", help="time for all (default: 10)")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    if arguments.batch < 2:
        parser.error("--batch: expected at least 2, as the loss compares pairs")

    device = torch.device("cuda" if gpu else "cpu")
    precision = "bf16" if gpu else "fp32"
    model = configuration(gpu)
    height, width = model.image_size
    print(f"{model.model} at {height}×{width}, batch {arguments.batch}, {precision}, {device}")
    if not gpu:
        print("No GPU: left out are the fused kernels, ViT-B/16 and peak memory.")
    steps = {backend: training_step(backend, arguments.batch, device, precision)
             for backend in (("triton", "torch") if gpu else ("torch",))}
    losses = {backend: step() for backend, step in steps.items()}       # compiles the kernels too
    if not all(abs(loss - losses["torch"]) <= AGREEMENT[precision] * losses["torch"] for loss in losses.values()):
        print(f"error: the backends disagree on the first loss, so neither is timed: {losses}", file=sys.stderr)
        return 1

    times: dict[str, list[float]] = {backend: [] for backend in steps}
    end = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end or len(times["torch"]) < 5:
        for backend, step in steps.items():
            began = time.perf_counter()
            step()
            times[backend].append(1e6 * (time.perf_counter() - began))
    rows = []
    for backend, values in times.items():
        timing = summary(values, [])
        memory = peak_memory(Call(lambda _, step=steps[backend]: step()), device)
        rows.append(dict(backend=backend, model=model.model, image_size=model.image_size, batch=arguments.batch,
                         precision=precision, loss=losses[backend], milliseconds=timing.median / 1e3,
                         p20=timing.p20 / 1e3, p80=timing.p80 / 1e3,
                         images_per_second=1e6 * arguments.batch / timing.median, peak_memory=memory))
        print(f"  {backend:<8}{timing.median / 1e3:>9,.1f} ms  ({timing.p20 / 1e3:,.1f} to {timing.p80 / 1e3:,.1f})"
              f"{rows[-1]['images_per_second']:>9,.0f} images/s"
              + (f"{memory / 2**20:>9,.0f} MiB above weights and optimizer" if memory is not None else ""))
    if arguments.json:
        arguments.json.write_text(json.dumps(dict(environment=environment(device), rows=rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
