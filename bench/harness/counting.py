"""The cost of a training step, counted without a clock: operations, bytes touched, bytes that live at once.

All counts follow the operators that PyTorch dispatches. They hold for eager code, and for tensors without memory
(`without_memory`) as for real ones: a step of any size is counted on any machine, in seconds.

    flops       multiplications and additions of matrix products, attention and convolutions, by torch's own counter
    touched     bytes that the operators read and write, each operator on its own; views move nothing and are free.
                Operators that run in one kernel with their neighbours, as under torch.compile, touch less
    peak        bytes that live at once, of those that the call itself has allocated: neither parameters nor inputs.
                Memory that an operator allocates and frees within itself, and the gaps of an allocator, are not seen
    saved       tensors that autograd keeps from the forward pass for the backward pass, without parameters and inputs
    calls       operators that PyTorch's dispatcher calls, without views and allocations
    launches    on a GPU: one for each call that is not of this project, and what this project's operators launch
                themselves, which is recorded on a GPU that is not there (absent_gpu.py)
"""

import copy
import gc
import importlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness import paths
from harness.output import table
from upperson.config import Config
from upperson.model import AdaptedCLIP
from upperson.tables.costs import flop_counter

MIB = 2**20
ADAM_TENSORS = 36  # that a launch of fused Adam takes
FOLDERS = {"prefix_attention": "attention", "layernorm_adapter": "adapter", "quick_gelu": "quick_gelu"}


@dataclass(frozen=True)
class Group:
    """Allocations of one size and kind; `shape` is that of the tensor for which each was made."""

    shape: tuple[int, ...]
    dtype: str
    number: int
    bytes: int  # of all of them

    def __str__(self) -> str:
        return f"{self.bytes / MIB:>9,.1f} MiB  {self.number:>4} × {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Cost:
    """The cost of a call."""

    flops: int
    touched: int
    peak: int
    at_peak: tuple[Group, ...]  # largest first
    calls: int
    other_launches: int  # of the calls that are not of this project
    own_calls: "Counter[OwnCall]"


class Allocation(NamedTuple):
    """A storage, and the tensor for which it was made."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Allocation":
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(tuple(tensor.shape), dtype, tensor.untyped_storage().nbytes())


class OwnCall(NamedTuple):
    """A call of one of this project's operators: its arguments, shape, strides and dtype in the place of a tensor."""

    operator: Any
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, operator: Any, arguments: Sequence[Any]) -> "OwnCall":
        def described(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                return tuple(argument.shape), argument.stride(), argument.dtype
            return tuple(argument) if isinstance(argument, list) else argument

        return cls(operator, tuple(map(described, arguments)))

    def launches(self) -> int:
        """How many launches the call takes: its kernels, and PyTorch's operators beside them."""

        def remade(description: Any) -> Any:
            if isinstance(description, tuple) and len(description) == 3 and isinstance(description[2], torch.dtype):
                return torch.empty_strided(*description[:2], dtype=description[2])
            return list(description) if isinstance(description, tuple) else description

        from harness import absent_gpu

        name = self.operator.overloadpacket.__name__
        direction = "backward" if name.endswith("_backward") else "forward"
        folder = FOLDERS[name.removesuffix("_backward")]
        module = importlib.import_module(f"upperson_kernels.{folder}.launch")
        real, operators = getattr(module, direction), Operators()

        def watched(*arguments: Any, **options: Any) -> Any:
            with operators:
                return real(*arguments, **options)

        absent_gpu.launches.clear()
        with patch.object(module, direction, watched):
            self.operator(*map(remade, self.arguments))
        return operators.launches + len(absent_gpu.launches)


class Operators(TorchDispatchMode):
    """Follows the operators within. The module's docstring explains `touched` and `peak`; `live` are the bytes that
    live now, `at_peak` the allocations that lived when `peak` was reached."""

    def __init__(self) -> None:
        super().__init__()
        self.touched = self.live = self.peak = 0
        self.allocations: dict[int, Allocation] = {}
        self.at_peak: list[Allocation] = []
        self.calls = self.launches = self.flops = 0
        self.own: Counter[OwnCall] = Counter()  # of this project's operators
        self.formulas = flop_counter().flop_registry

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if formula := self.formulas.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        given, made = tensors((args, kwargs)), tensors(result)
        storages = {id(t.untyped_storage()) for t in given}
        fresh = [t for t in made if id(t.untyped_storage()) not in storages]
        for tensor in fresh:
            self.watch(tensor)
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, list(self.allocations.values())
        writes_nothing = func.namespace == "aten" and func.__name__.startswith(("empty", "new_empty"))
        if (fresh or func._schema.is_mutable) and not writes_nothing:  # else a view
            self.touched += sum(map(extent, [*given, *made]))
            self.calls += 1
            if func.namespace == "upperson":
                self.own[OwnCall.of(func, args)] += 1
            elif func.__name__.startswith("_fused_adam"):
                self.launches += math.ceil(len(args[0]) / ADAM_TENSORS)
            else:
                self.launches += 1
        return result

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # PyTorch keeps this object as long as the storage
        if key not in self.allocations:
            self.allocations[key] = Allocation.of(tensor)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.live -= self.allocations.pop(key).bytes


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def extent(tensor: Tensor) -> int:
    """Bytes of the elements; of an expanded tensor only the elements in memory."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def groups(allocations: Iterable[Allocation]) -> tuple[Group, ...]:
    """Allocations of one shape and kind together, largest first."""
    found = [Group(*kind[:2], number, number * kind.bytes) for kind, number in Counter(allocations).items()]
    return tuple(sorted(found, key=lambda group: -group.bytes))


def cost(call: Callable[[], Any]) -> Cost:
    """The cost of a call."""
    gc.collect()
    with Operators() as operators:
        call()
    return Cost(
        flops=operators.flops,
        touched=operators.touched,
        peak=operators.peak,
        at_peak=groups(operators.at_peak),
        calls=operators.calls,
        other_launches=operators.launches,
        own_calls=operators.own,
    )


def saved(call: Callable[[], Any], others: Iterable[Tensor]) -> tuple[tuple[Group, ...], int]:
    """The tensors that autograd keeps of a forward pass, each storage once, without the storages of `others`; and the
    FLOPs of the pass."""
    own = {id(t.untyped_storage()) for t in others}
    kept: dict[int, tuple[Tensor, Allocation]] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = id(tensor.untyped_storage())
        if key not in own:
            kept.setdefault(key, (tensor, Allocation.of(tensor)))  # the tensor is held so that its id stays taken
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), Operators() as operators:
        call()
    return groups(allocation for _, allocation in kept.values()), operators.flops


def without_memory(*things: nn.Module | Tensor, shared: Iterable[Any] = ()) -> tuple[FakeTensorMode, list[Any]]:
    """The mode in which operators compute shapes alone, and copies of models and tensors for it.

    Real tensors may still be used within it where their values count, such as the lengths of packed sequences. Objects
    in `shared` are not copied, such as a tokenizer, whose vocabulary takes longer to copy than a model.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    kept = {id(thing): thing for thing in shared}
    with FakeCopyMode(mode):
        return mode, [copy.deepcopy(thing, dict(kept)) for thing in things]


def count(name: str, path: paths.Path, config: Config, batch: int) -> dict[str, Any]:
    """The cost of a step of a path whose optimizer has its state.

    FLOPs of a tower are those of its forward pass. `image_row` and `text_row` are the bytes of one row of the tower's
    width for every token and block.
    """
    config = config.replace(backend="triton")
    real = paths.build(path, config)
    batches = paths.random_batches(config, real.tokenizer, real.context_length, batch, 1)
    prepared = paths.prepare(real, batches, torch.device("cpu"))  # the captions' lengths are real
    mode, (model,) = without_memory(real, shared=[real.tokenizer])
    with mode:
        step = paths.Step(model, prepared, "bf16", path.configuration(config).train)
        step.take_gradients_of_zero()
        own = [*model.parameters(), *model.buffers()]
        towers = {"image": step.image_features, "text": step.text_features}
        found = cost(step)
        row = dict(path=name, **figures(found)) | rows_of_width(model, prepared[0])
        row |= dict(trained_parameters=sum(parameter.numel() for parameter in model.trained_parameters().values()))
        for tower, forward in towers.items():
            kept, flops = saved(forward, own)
            row |= {f"{tower}_flops": flops, f"{tower}_saved": list(map(asdict, kept))}
    own_launches = sum(number * call.launches() for call, number in found.own_calls.items())
    return row | dict(launches=found.other_launches + own_launches)


def figures(found: Cost) -> dict[str, Any]:
    """The cost as JSON, without the calls of this project's operators."""
    row = asdict(found)
    del row["other_launches"], row["own_calls"]
    return row


def rows_of_width(model: AdaptedCLIP, prepared: tuple[Any, ...]) -> dict[str, int]:
    """Bytes in 16 bits of a row of the tower's width for every token of a batch and every block."""
    images, captions, _ = prepared
    height, width = model.config.image_size
    patch_height, patch_width = model.clip.visual.patch_size
    image_tokens = len(images) * (1 + height // patch_height * (width // patch_width))
    text_tokens = captions.numel() if isinstance(captions, Tensor) else len(captions.token_ids)
    towers = {"image_row": (image_tokens, model.image_blocks), "text_row": (text_tokens, model.text_blocks)}
    return {name: 2 * tokens * len(blocks) * blocks[0].attn.embed_dim for name, (tokens, blocks) in towers.items()}


def counts_table(counts: list[dict[str, Any]]) -> str:
    """Markdown, a line for each path; ratios are those to the first."""
    first = counts[0]
    return table(
        [
            {
                "": row["path"],
                "GFLOP": f"{row['flops'] / 1e9:,.0f}",
                f"{first['path']} ÷ path": f"{first['flops'] / row['flops']:.2f}×",
                "image forward": f"{row['image_flops'] / 1e9:,.0f}",
                "text forward": f"{row['text_flops'] / 1e9:,.0f}",
                "GB touched": f"{row['touched'] / 1e9:,.1f}",
                "peak MiB": f"{row['peak'] / MIB:,.0f}",
                f"of {first['path']}": f"{row['peak'] / first['peak']:.0%}",
                "saved MiB": f"{(total(row['image_saved']) + total(row['text_saved'])) / MIB:,.0f}",
                "calls": f"{row['calls']:,}",
                "launches": f"{row['launches']:,}",
                "trained": f"{row['trained_parameters']:,}",
            }
            for row in counts
        ],
        "pipe",
    )


def total(saved_groups: list[dict[str, Any]]) -> int:
    return sum(group["bytes"] for group in saved_groups)


def activations(row: dict[str, Any], shown: int = 16) -> list[str]:
    """The allocations at the peak of a path, and the tensors that its towers keep for the backward pass: in MiB and,
    per token and block, in rows of the tower's width C."""
    path = row["path"]
    lines = ["", f"{path}: {row['peak'] / MIB:,.0f} MiB live at the peak"]
    lines += [f"  {Group(**group)}" for group in row["at_peak"][:shown]]
    for tower in ("image", "text"):
        kept, unit = row[f"{tower}_saved"], row[f"{tower}_row"]
        found = total(kept)
        lines.append(f"{path}: the {tower} tower keeps {found / MIB:,.0f} MiB, {found / unit:.1f} C a token and block")
        lines += [f"  {group['bytes'] / unit:6.2f} C  {Group(**group)}" for group in kept[:shown]]
    return lines
