"""Throughput of prefix attention: the fused kernels against what PyTorch offers for the same function.

    python bench/attn.py                       every shape, on the GPU if there is one; prints tables, writes nothing
    python bench/attn.py --json --sweep        also bench/results/attention-<device>.json and .png
    python bench/attn.py --shape text --batch 32 --json attention.json

Every candidate is first compared with the definition in float64; one that differs is not timed. On a machine
without a GPU the PyTorch candidates are timed and the floors of two GPUs are printed; the kernels themselves
need a GPU to be timed (Triton's interpreter says nothing about speed).
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from harness import operators
from harness.comparison import MODES, Candidate, Case, Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from upperson_kernels import prefix_attention
from upperson_kernels.attention import reference

from upperson.errors import exit_status

SCALE = 10.0  # λ at the start of training
SCALE_POSITION, KEY_POSITION, VALUE_POSITION = 3, 1, 2  # among the inputs of a call
FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
FUSED = "fused (this project)"
IN_SWEEP = (FUSED, "explicit softmax", "folded SDPA", "folded SDPA, flash")


@dataclass(frozen=True)
class Shape:
    """One attention call of CLIP with a prefix."""

    length: int
    heads: int
    causal: bool
    prefix: int = 10
    width: int = 64

    def flops(self, lengths: list[int], mode: str) -> float:
        """Useful operations: two products forward, five backward, over the visible columns alone."""
        visible = sum((n * (n + 1) / 2 if self.causal else n**2) + n * self.prefix for n in lengths)
        return 4 * self.heads * self.width * visible * {"forward": 1.0, "backward": 2.5, "both": 3.5}[mode]

    def bytes(self, lengths: list[int], mode: str, element: int) -> float:
        """Each input read once, each output written once: qkv, out; then qkv, out, dout, dqkv. A log-sum-exp in
        float32 for each row is written and read."""
        rows = sum(lengths) * self.heads
        tensor, statistics = rows * self.width * element, 4 * rows
        forward, backward = 4 * tensor + statistics, 8 * tensor + statistics
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


SHAPES = {
    "image": Shape(length=193, heads=12, causal=False),  # ViT-B/16 at 384×128
    "text": Shape(length=77, heads=8, causal=True),
    "image-L/14": Shape(length=244, heads=16, causal=False),
}
PACKED = "text, packed"
NEEDS_GPU = "the fused kernels, FlexAttention, torch.compile, SDPA's GPU backends, launch time and peak memory"


def without_prefix(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, causal: bool, target: str) -> Tensor:
    """Plain attention over the tokens alone: the bound of a prefix that costs nothing. Another function."""
    query, key, value = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


def concatenated(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, target: str) -> list[Tensor]:
    """Queries (B, H, N, D), and keys and values (B, H, P + N, D) with λ folded into the prefix."""
    query, token_key, token_value = qkv.transpose(1, 3).unbind(2)
    key, value = (key, scale * value) if target == "weights" else (scale * key, value)
    keys, values = (
        torch.cat([p.to(qkv.dtype).transpose(0, 1).expand(len(qkv), -1, -1, -1), t], dim=2)
        for p, t in ((key, token_key), (value, token_value))
    )
    return [query, keys, values]


def lower_right(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, causal: bool, target: str) -> Tensor:
    """Folded attention with PyTorch's symbolic causal mask; flash attention takes no mask as a tensor. Aligned to the
    lower right, the mask shows the prefix to every query."""
    mask = causal_lower_right(qkv.shape[1], key.shape[0] + qkv.shape[1])
    folded = concatenated(qkv, key, value, scale, target)
    return F.scaled_dot_product_attention(*folded, attn_mask=mask).transpose(1, 2)


def flex(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, causal: bool, target: str, mask: object) -> Tensor:
    """FlexAttention on the folded concatenation; `mask` is its block mask, made once."""
    return flex_attention(*concatenated(qkv, key, value, scale, target), block_mask=mask).transpose(1, 2)


def flex_mask(shape: Shape, device: torch.device) -> object:
    """The block mask of a causal shape: the prefix and what came before; None where all is visible."""
    if not shape.causal:
        return None
    prefix, length = shape.prefix, shape.length

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j - prefix <= i

    return create_block_mask(visible, None, None, length, prefix + length, device=device)


def public(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, causal: bool, target: str, **options) -> Tensor:
    """The public function; `options` choose the implementation and describe packed captions."""
    return prefix_attention(qkv, key, value, scale, causal=causal, scale_target=target, **options)


def candidates(shape: Shape, target: str, device: torch.device) -> dict[str, Candidate]:
    """All that can run on the device. "folded SDPA" is this project's PyTorch backend."""
    functions = {"explicit softmax": reference.explicit, "folded SDPA": partial(public, backend="torch")}
    if shape.causal:
        functions["folded SDPA, lower right"] = lower_right
    found = {}
    if device.type == "cuda":
        for name, backend in FORCED.items():
            function = lower_right if shape.causal and name == "flash" else reference.folded
            functions[f"folded SDPA, {name}"] = sdpa_kernel(backend)(function)
        functions["explicit, compiled"] = torch.compile(reference.explicit, dynamic=False)
        functions["FlexAttention"] = partial(torch.compile(flex, dynamic=False), mask=flex_mask(shape, device))
        found[FUSED] = Candidate(at(partial(public, backend="triton"), shape, target), "fused")
    found |= {name: Candidate(at(function, shape, target)) for name, function in functions.items()}
    return found | {"SDPA, no prefix": Candidate(at(without_prefix, shape, target), "bound")}


def at(function: Callable[..., Tensor], shape: Shape, target: str) -> Callable[..., Tensor]:
    """The function of the four tensors alone."""
    return lambda *tensors: function(*tensors, shape.causal, target)


def inputs(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """qkv, prefix key, prefix value and λ, and a gradient of the output. All inputs need gradients; the parameters
    are float32, as they are under autocast."""
    qkv = torch.randn(batch, shape.length, 3, shape.heads, shape.width, device=device, dtype=dtype)
    key, value = torch.randn(2, shape.prefix, shape.heads, shape.width, device=device)
    tensors = [qkv, key, value, torch.tensor(SCALE, device=device)]
    return [t.requires_grad_() for t in tensors], [torch.randn_like(qkv[:, :, 0]).detach()]


def case(name: str, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, target: str) -> Case:
    """A batch of equal length."""
    lengths = [shape.length] * batch
    dtype_name = str(dtype).removeprefix("torch.")
    causal = "causal, " if shape.causal else ""
    return Case(
        shape=name,
        title=f"{name}: {batch} × {shape.length} tokens, {causal}{shape.heads} heads of {shape.width}, prefix "
        f"{shape.prefix}, {dtype_name}, λ on the {target}",
        labels=dict(**asdict(shape), batch=batch, tokens=sum(lengths), dtype=dtype_name, scale_target=target),
        setup=lambda: inputs(shape, batch, dtype, device),
        definition=at(reference.explicit, shape, target),
        scaled=(SCALE_POSITION, VALUE_POSITION if target == "weights" else KEY_POSITION),
        candidates=candidates(shape, target, device),
        bytes={mode: shape.bytes(lengths, mode, dtype.itemsize) for mode in MODES},
        flops={mode: shape.flops(lengths, mode) for mode in MODES},
    )


def packed_case(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, target: str) -> Case:
    """Captions of unequal length, about 26 tokens on average.

    Packed captions lie one behind the other. The padded candidates get a batch as long as its longest caption; under
    the causal mask no token sees the rows behind its end. The floor counts the tokens of the captions alone.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.normal(26.0, 10.0, (batch,), generator=generator).round().clamp(8, shape.length).int()
    lengths = drawn.tolist()
    cu_seqlens = F.pad(drawn.cumsum(0), (1, 0)).to(device, torch.int32)
    padded = replace(shape, length=max(lengths))
    real = (torch.arange(padded.length) < drawn[:, None]).to(device)  # (B, N)
    rows = real.flatten().nonzero().flatten()  # an index; a mask would wait for the GPU

    def setup() -> Inputs:
        tensors, (grad,) = inputs(padded, batch, dtype, device)
        return tensors, [grad * real[:, :, None, None]]

    def packed(backend: str, kind: str = "baseline") -> Candidate:
        function = partial(public, backend=backend, cu_seqlens=cu_seqlens, max_seqlen=padded.length)
        return Candidate(at(function, shape, target), kind, layout=lambda t: t.flatten(0, 1)[rows])

    plain = case(PACKED, padded, batch, dtype, device, target)
    on_padded = dict(plain.candidates)
    compared = {"packed, PyTorch backend": packed("torch")}
    if device.type == "cuda":
        compared = {"fused, packed": packed("triton", "fused")} | compared
        compared["fused, padded"] = replace(on_padded.pop(FUSED), kind="baseline")
    each = f"{batch} captions of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all"
    return replace(
        plain,
        title=plain.title.replace(f"{batch} × {padded.length} tokens", each),
        labels=plain.labels | dict(tokens=sum(lengths)),
        setup=setup,
        candidates=compared | on_padded,
        bytes={mode: shape.bytes(lengths, mode, dtype.itemsize) for mode in MODES},
        flops={mode: shape.flops(lengths, mode) for mode in MODES},
    )


def floors() -> Iterator[tuple[str, float, float]]:
    """Name, bytes and FLOPs of the calls of training at batch 128 in 16 bits."""
    for name, shape in SHAPES.items():
        lengths = [shape.length] * 128
        for mode in MODES[:2]:
            yield f"{name}, {mode}", shape.bytes(lengths, mode, 2), shape.flops(lengths, mode)


def main() -> int:
    parser = operators.parser(__doc__.splitlines()[0], [*SHAPES, PACKED])
    parser.add_argument("--scale-target", choices=("weights", "logits"), default="weights", help="where λ acts")
    arguments, dtype, device = operators.parse(parser)

    def make_case(name: str, shape: Shape, batch: int) -> Case:
        return case(name, shape, batch, dtype, device, arguments.scale_target)

    def cases() -> Iterator[Case]:
        for name in [arguments.shape] if arguments.shape else [*SHAPES, PACKED]:
            if name == PACKED:
                yield packed_case(SHAPES["text"], arguments.batch, dtype, device, arguments.scale_target)
            else:
                yield make_case(name, SHAPES[name], arguments.batch)

    batches, lengths = (8, 16, 32, 64, 128, 256), (50, 77, 128, 193, 257, 512)
    sweep = operators.sweep(SHAPES["image"], make_case, IN_SWEEP, batches, lengths)
    return operators.bench("attention", arguments, cases(), sweep, NEEDS_GPU, floors())


if __name__ == "__main__":
    sys.exit(exit_status(main))
