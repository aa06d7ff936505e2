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
from comparison import DTYPES, MODES, Candidate, Case, bench, parser
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from upperson_kernels import prefix_attention
from upperson_kernels.attention import reference

SCALE = 10.0  # λ at the start of training
SCALE_POSITION, KEY_POSITION, VALUE_POSITION = 3, 1, 2  # among the inputs of a call
FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
IN_SWEEP = ("fused (this project)", "explicit softmax", "folded SDPA", "folded SDPA, flash")


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
        return {
            "forward": 4 * tensor + statistics,
            "backward": 8 * tensor + statistics,
            "both": 12 * tensor + 2 * statistics,
        }[mode]


SHAPES = {
    "image": Shape(length=193, heads=12, causal=False),  # ViT-B/16 at 384×128
    "text": Shape(length=77, heads=8, causal=True),
    "image-L/14": Shape(length=244, heads=16, causal=False),
}
PACKED = "text, packed"


# ---------------------------------------------------------------------------------------- candidates


def without_prefix(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, causal: bool, target: str) -> Tensor:
    """Plain attention over the tokens alone: the bound of a prefix that costs nothing. Another function."""
    query, key, value = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


def concatenated(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, target: str) -> list[Tensor]:
    """Queries (B, H, N, D), and keys and values (B, H, P + N, D) with λ folded into the prefix."""
    query, token_key, token_value = qkv.transpose(1, 3).unbind(2)
    key, value = (key, scale * value) if target == "weights" else (scale * key, value)
    return [
        query,
        *(
            torch.cat([p.to(qkv.dtype).transpose(0, 1).expand(len(qkv), -1, -1, -1), t], dim=2)
            for p, t in ((key, token_key), (value, token_value))
        ),
    ]


def lower_right(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, causal: bool, target: str) -> Tensor:
    """Folded attention whose causal mask is a name and no tensor: that is all that flash attention takes. Aligned
    to the lower right, it shows every query the prefix."""
    length, prefix = qkv.shape[1], key.shape[0]
    return F.scaled_dot_product_attention(
        *concatenated(qkv, key, value, scale, target), attn_mask=causal_lower_right(length, prefix + length)
    ).transpose(1, 2)


def flex(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, causal: bool, target: str, mask: object) -> Tensor:
    """FlexAttention on the folded concatenation; `mask` is its block mask, made once."""
    return flex_attention(*concatenated(qkv, key, value, scale, target), block_mask=mask).transpose(1, 2)


def flex_mask(shape: Shape, device: torch.device) -> object:
    """The block mask of a causal shape: the prefix and what came before; None where all is visible."""
    if not shape.causal:
        return None
    return create_block_mask(
        lambda batch, head, i, j: j - shape.prefix <= i,
        None,
        None,
        shape.length,
        shape.prefix + shape.length,
        device=device,
    )


def forced(function: Callable[..., Tensor], backend: SDPBackend) -> Callable[..., Tensor]:
    def with_backend(*arguments) -> Tensor:
        with sdpa_kernel(backend):
            return function(*arguments)

    return with_backend


def public(qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, causal: bool, target: str, **options) -> Tensor:
    """The public function; of `options`, backend says which implementation."""
    return prefix_attention(qkv, key, value, scale, causal=causal, scale_target=target, **options)


def candidates(shape: Shape, target: str, device: torch.device) -> dict[str, Candidate]:
    """All that can run on the device. "folded SDPA" is this project's PyTorch backend."""
    functions = {"explicit softmax": reference.explicit, "folded SDPA": partial(public, backend="torch")}
    if shape.causal:
        functions["folded SDPA, lower right"] = lower_right
    if device.type == "cuda":
        functions |= {
            f"folded SDPA, {name}": forced(
                lower_right if shape.causal and name == "flash" else reference.folded, backend
            )
            for name, backend in FORCED.items()
        }
        functions["explicit, compiled"] = torch.compile(reference.explicit, dynamic=False)
        functions["FlexAttention"] = partial(torch.compile(flex, dynamic=False), mask=flex_mask(shape, device))
    found = {name: Candidate(at(function, shape, target)) for name, function in functions.items()}
    if device.type == "cuda":
        ours = Candidate(at(partial(public, backend="triton"), shape, target), "fused")
        found = {"fused (this project)": ours} | found
    return found | {"SDPA, no prefix": Candidate(at(without_prefix, shape, target), "bound")}


def at(function: Callable[..., Tensor], shape: Shape, target: str) -> Callable[..., Tensor]:
    """The function of the four tensors alone."""

    def with_options(*tensors: Tensor) -> Tensor:
        return function(*tensors, shape.causal, target)

    return with_options


# ---------------------------------------------------------------------------------------- cases


def inputs(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
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
    """Captions of unequal length, about 26 tokens on average. Packed they lie one behind the other; the padded
    candidates get a batch as long as its longest caption, with rows behind each end that nobody asks for: under
    the causal mask no token sees them. The floor counts the tokens of the captions alone."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.normal(26.0, 10.0, (batch,), generator=generator).round().clamp(8, shape.length).int()
    ends = lengths.cumsum(0)
    cu_seqlens = F.pad(ends, (1, 0)).to(device, torch.int32)
    padded = replace(shape, length=int(lengths.max()))
    real = (torch.arange(padded.length) < lengths[:, None]).to(device)  # (B, N)
    rows = real.flatten().nonzero().flatten()  # an index; a mask would wait for the GPU

    def setup() -> tuple[list[Tensor], list[Tensor]]:
        tensors, (grad,) = inputs(padded, batch, dtype, device)
        return tensors, [grad * real[:, :, None, None]]

    plain = case(PACKED, padded, batch, dtype, device, target)
    options = dict(cu_seqlens=cu_seqlens, max_seqlen=padded.length)
    pack = dict(layout=lambda t: t.flatten(0, 1)[rows])
    packed = {
        "packed, PyTorch backend": Candidate(at(partial(public, backend="torch", **options), shape, target), **pack)
    }
    compared = plain.candidates
    if device.type == "cuda":
        packed = {
            "fused, packed": Candidate(at(partial(public, backend="triton", **options), shape, target), "fused", **pack)
        } | packed
        on_padded = compared.pop("fused (this project)")
        packed["fused, padded"] = replace(on_padded, kind="baseline")
    lengths = lengths.tolist()
    return replace(
        plain,
        title=f"{PACKED}: {batch} captions of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all, causal, "
        f"{shape.heads} heads of {shape.width}, prefix {shape.prefix}, {plain.labels['dtype']}, λ on the "
        f"{target}",
        labels=plain.labels | dict(tokens=sum(lengths)),
        setup=setup,
        candidates=packed | compared,
        bytes={mode: shape.bytes(lengths, mode, dtype.itemsize) for mode in MODES},
        flops={mode: shape.flops(lengths, mode) for mode in MODES},
    )


def sweep_cases(dtype: torch.dtype, device: torch.device, target: str) -> Iterator[tuple[str, int, Case]]:
    """(axis, value, case): the image's call over batch, then over length."""
    gpu = device.type == "cuda"
    image = SHAPES["image"]
    batch = 128 if gpu else 2
    points = [
        (f"batch (of {image.length} tokens)", n, image, n) for n in ((8, 16, 32, 64, 128, 256) if gpu else (1, 2, 4, 8))
    ]
    points += [
        (f"tokens (batch {batch})", n, replace(image, length=n), batch)
        for n in ((50, 77, 128, 193, 257, 512) if gpu else (50, 77, 128, 193))
    ]
    for axis, value, shape, batch in points:
        each = case(f"sweep, {axis}", shape, batch, dtype, device, target)
        yield (
            axis,
            value,
            replace(
                each, candidates={name: candidate for name, candidate in each.candidates.items() if name in IN_SWEEP}
            ),
        )


def floors() -> Iterator[tuple[str, float, float]]:
    """Name, bytes and FLOPs of the calls of training at batch 128 in 16 bits."""
    for name, shape in SHAPES.items():
        for mode in MODES[:2]:
            yield f"{name}, {mode}", shape.bytes([shape.length] * 128, mode, 2), shape.flops([shape.length] * 128, mode)


def main() -> int:
    options = parser(__doc__.splitlines()[0], [*SHAPES, PACKED])
    options.add_argument("--scale-target", choices=("weights", "logits"), default="weights", help="where λ acts")
    arguments = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, target = DTYPES[arguments.dtype], arguments.scale_target

    def cases() -> Iterator[Case]:
        for name in [arguments.shape] if arguments.shape else [*SHAPES, PACKED]:
            if name == PACKED:
                yield packed_case(SHAPES["text"], arguments.batch, dtype, device, target)
            else:
                yield case(name, SHAPES[name], arguments.batch, dtype, device, target)

    return bench(
        "attention",
        options,
        arguments,
        device,
        cases(),
        sweep_cases(dtype, device, target),
        "the fused kernels,\nSDPA's flash, efficient and cuDNN backends, FlexAttention and the compiled "
        "softmax, launch time and peak memory",
        floors(),
    )


if __name__ == "__main__":
    sys.exit(main())
