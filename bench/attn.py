"""Throughput of prefix attention: the fused kernels against what PyTorch offers for the same function.

    python bench/attn.py                       every shape, on the GPU if there is one
    python bench/attn.py --shape text --batch 32 --json attention.json

Every candidate is first compared with the definition in float64; one that differs is not timed. On a machine
without a GPU the PyTorch candidates are timed and the floors of two GPUs are printed; the kernels themselves
need a GPU to be timed (Triton's interpreter says nothing about speed).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import (
    KNOWN_RATES,
    Rates,
    copies_beyond_cache,
    environment,
    measure_rates,
    peak_memory,
    time_in_turns,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import prefix_attention
from kernels.attention import reference

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MODES = ("forward", "backward", "both")
SCALE = 10.0                                                            # λ at the start of training


@dataclass(frozen=True)
class Shape:
    """One attention call of CLIP with a prefix."""

    length: int
    heads: int
    causal: bool
    prefix: int = 10
    width: int = 64

    def flops(self, batch: int, mode: str) -> float:
        """Useful operations: two products forward, five backward, over the visible columns alone."""
        visible = self.length * (self.length + 1) / 2 if self.causal else self.length**2
        forward = 4 * batch * self.heads * self.width * (visible + self.length * self.prefix)
        return forward * {"forward": 1.0, "backward": 2.5, "both": 3.5}[mode]

    def bytes(self, batch: int, mode: str, element: int) -> float:
        """Each input read once, each output written once: qkv, out; then qkv, out, dout, dqkv."""
        tensor = batch * self.length * self.heads * self.width * element
        return tensor * {"forward": 4, "backward": 8, "both": 12}[mode]


SHAPES = {
    "image": Shape(length=193, heads=12, causal=False),                 # ViT-B/16 at 384×128
    "text": Shape(length=77, heads=8, causal=True),
    "image-L/14": Shape(length=244, heads=16, causal=False),
}


# ---------------------------------------------------------------------------------------- candidates


def without_prefix(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, causal: bool, target: str) -> Tensor:
    """Plain attention over the tokens alone: the bound of a prefix that costs nothing. Another function."""
    query, key, value = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


def with_backend(backend: SDPBackend) -> Callable[..., Tensor]:
    def folded(*arguments) -> Tensor:
        with sdpa_kernel(backend):
            return reference.folded(*arguments)
    return folded


def flex(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, causal: bool, target: str) -> Tensor:
    """FlexAttention on the folded concatenation; the mask as a score modification."""
    from torch.nn.attention.flex_attention import flex_attention

    query, token_key, token_value = qkv.transpose(1, 3).unbind(2)
    key, value = (key, scale * value) if target == "weights" else (scale * key, value)
    keys, values = (torch.cat([p.to(qkv.dtype).transpose(0, 1).expand(len(qkv), -1, -1, -1), t], dim=2)
                    for p, t in ((key, token_key), (value, token_value)))
    prefix = key.shape[0]

    def visible(score, batch, head, i, j):
        return torch.where(j - prefix <= i, score, -float("inf"))

    return flex_attention(query, keys, values, score_mod=visible if causal else None).transpose(1, 2)


def candidates(gpu: bool) -> dict[str, Callable[..., Tensor]]:
    plain = {
        "explicit softmax": reference.explicit,
        "folded SDPA": reference.folded,
        "SDPA, no prefix": without_prefix,
    }
    if not gpu:
        return plain
    fused = {"fused (this project)": lambda qkv, key, value, scale, causal, target: prefix_attention(
        qkv, key, value, scale, causal=causal, scale_target=target, backend="triton")}
    forced = {f"folded SDPA, {name}": with_backend(backend) for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION), ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION))}
    compiled = {"explicit, compiled": torch.compile(reference.explicit, dynamic=False),
                "FlexAttention": torch.compile(flex, dynamic=False)}
    return fused | plain | forced | compiled


# ---------------------------------------------------------------------------------------- measuring


def inputs(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """qkv, prefix key, prefix value and λ, and a gradient of the output. All inputs need gradients."""
    qkv = torch.randn(batch, shape.length, 3, shape.heads, shape.width, device=device, dtype=dtype)
    key, value = torch.randn(2, shape.prefix, shape.heads, shape.width, device=device, dtype=dtype)
    tensors = [qkv, key, value, torch.tensor(SCALE, device=device, dtype=dtype)]
    return [t.requires_grad_() for t in tensors], torch.randn_like(qkv[:, :, 0]).detach()


def relative_errors(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, causal: bool,
                    target: str) -> list[float]:
    """‖value − exact‖ / ‖exact‖ of the output and of every gradient, against the definition in float64.

    dλ is a sum that may cancel to almost nothing: its error is taken relative to what was summed, whose size is that
    of the prefix values (λ on the weights) or keys (on the logits) times their gradients, over λ.
    """
    def run(function, tensors, grad):
        out = function(*tensors, causal, target)
        return [out.detach(), *torch.autograd.grad(out, tensors, grad)]

    exact = run(reference.explicit, [t.detach().double().requires_grad_() for t in tensors], grad.double())
    values = run(function, tensors, grad)
    sizes = [e.norm() for e in exact]
    prefix = 2 if target == "weights" else 1
    sizes[4] = tensors[prefix].detach().double().norm() * sizes[prefix + 1] / SCALE
    return [float((v.double() - e).norm() / size) for v, e, size in zip(values, exact, sizes, strict=True)]


def reason_to_skip(name: str, function: Callable[..., Tensor], shape: Shape, dtype: torch.dtype,
                   device: torch.device, target: str) -> str | None:
    """Why a candidate is not timed: it cannot run, or is wrong. None if it is right, or another function."""
    tensors, grad = inputs(shape, 2, dtype, device)
    if name == "SDPA, no prefix":
        return None
    try:
        errors = relative_errors(function, tensors, grad, shape.causal, target)
    except Exception as error:
        return f"cannot run: {str(error).strip().splitlines()[0][:90]}"
    budget = relative_errors(reference.explicit, tensors, grad, shape.causal, target)
    if all(e <= 2 * b + 4 * torch.finfo(dtype).eps for e, b in zip(errors, budget, strict=True)):
        return None
    return "wrong: errors " + ", ".join(f"{e:.1e}" for e in errors)


def call(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, causal: bool, target: str,
         mode: str) -> Callable[[], object]:
    forward = partial(function, *tensors, causal, target)
    if mode == "forward":
        return torch.no_grad()(forward)
    if mode == "both":
        return lambda: torch.autograd.grad(forward(), tensors, grad, allow_unused=True)
    out = forward()
    return lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True, allow_unused=True)


def bench(name: str, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, target: str, seconds: float,
          rates: Rates) -> list[dict]:
    """Times every candidate on one shape; returns the rows of its table, and prints it."""
    causal = "causal, " if shape.causal else ""
    print(f"\n{name}: {batch} × {shape.length} tokens, {causal}{shape.heads} heads of {shape.width}, prefix "
          f"{shape.prefix}, {str(dtype).removeprefix('torch.')}, λ on the {target}")
    able = {}
    for candidate, function in candidates(device.type == "cuda").items():
        reason = reason_to_skip(candidate, function, shape, dtype, device, target)
        if reason is None:
            able[candidate] = function
        else:
            print(f"  {candidate}: {reason}")

    one = shape.bytes(batch, "forward", dtype.itemsize)
    sets = [inputs(shape, batch, dtype, device) for _ in range(copies_beyond_cache(int(one), device))]
    rows = []
    for mode in MODES:
        calls = {candidate: [call(function, *each, shape.causal, target, mode) for each in sets]
                 for candidate, function in able.items()}
        timings = time_in_turns(calls, device, seconds)
        flops, moved = shape.flops(batch, mode), shape.bytes(batch, mode, dtype.itemsize)
        floor = rates.floor(moved, flops)
        print(f"  {mode:<24}{'median':>10}{'p20':>10}{'p80':>10}   {'GFLOP/s':>9}   of the floor ({floor:,.0f} µs)"
              + ("   peak memory" if device.type == "cuda" else ""))
        for candidate, timing in timings.items():
            memory = peak_memory(calls[candidate][0], device)
            print(f"    {candidate:<22}{timing.median:>8,.0f}µs{timing.p20:>8,.0f}µs{timing.p80:>8,.0f}µs   "
                  f"{flops / timing.median / 1e3:>9,.0f}   {floor / timing.median:>6.0%}"
                  + (f"{memory / 2**20:>25,.0f} MiB" if memory is not None else ""))
            rows.append(dict(shape=name, **asdict(shape), batch=batch, dtype=str(dtype).removeprefix("torch."),
                             scale_target=target, mode=mode, candidate=candidate, **asdict(timing),
                             floor=floor, peak_memory=memory))
        del calls
    return rows


def print_floors() -> None:
    """What the calls of training at batch 128 in 16 bits need at least, on GPUs whose rates are known."""
    print("\nFloors at batch 128, 16-bit (least bytes over memory bandwidth, useful FLOPs over matrix rate):")
    print(f"  {'':<24}{'MB':>8}{'GFLOP':>8}" + "".join(f"{r.name:>12}" for r in KNOWN_RATES))
    for name, shape in SHAPES.items():
        for mode in MODES[:2]:
            moved, flops = shape.bytes(128, mode, 2), shape.flops(128, mode)
            print(f"  {name + ', ' + mode:<24}{moved / 1e6:>8.0f}{flops / 1e9:>8.1f}"
                  + "".join(f"{r.floor(moved, flops):>9.0f} µs" for r in KNOWN_RATES))


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="one shape instead of all")
    parser.add_argument("--batch", type=int, default=128 if gpu else 4, help="samples (default: 128, on a CPU 4)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32",
                        help="default: bf16, on a CPU fp32")
    parser.add_argument("--scale-target", choices=("weights", "logits"), default="weights", help="where λ acts")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each mode of each shape (default: 2)")
    parser.add_argument("--json", type=Path, help="write the figures and the environment to this file")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        parser.error(f"--batch must be at least 1, not {arguments.batch}")

    torch.manual_seed(0)
    device = torch.device("cuda" if gpu else "cpu")
    dtype = DTYPES[arguments.dtype]
    rates = measure_rates(device, dtype)
    print(f"{rates.name}: copy {rates.bytes_per_second / 1e9:,.0f} GB/s, {arguments.dtype} product "
          f"{rates.flops_per_second / 1e9:,.0f} GFLOP/s (measured now)")
    if not gpu:
        print("No GPU: the PyTorch candidates run on the CPU. These need a GPU and are left out: the fused kernels,\n"
              "SDPA's flash, efficient and cuDNN backends, FlexAttention and the compiled softmax, peak memory.")
    rows = []
    for name in [arguments.shape] if arguments.shape else SHAPES:
        rows += bench(name, SHAPES[name], arguments.batch, dtype, device, arguments.scale_target, arguments.seconds,
                      rates)
    print_floors()
    if arguments.json:
        result = dict(environment=environment(device), rates=asdict(rates), rows=rows)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten to {arguments.json}")


if __name__ == "__main__":
    main()
