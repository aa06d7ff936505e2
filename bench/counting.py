"""What a call costs, counted without a clock: operations, bytes touched, bytes that live at once.

All follow the operators that PyTorch dispatches, so they hold for eager code, and for tensors without memory
(`without_memory`) as for real ones: a step of any size is counted on any machine, in seconds.

    flops       multiplications and additions of matrix products, attention and convolutions, by torch's own counter
    touched     bytes that the operators read and write, each on its own; views, which move nothing, are free. What
                runs in one kernel with its neighbours, as under torch.compile, touches less
    peak        bytes that live at once, of those that the call itself has allocated: neither parameters nor inputs.
                What an operator allocates and frees within itself, and the gaps of an allocator, are not seen
    saved       what autograd keeps from the forward pass for the backward pass, without parameters and inputs
"""

import copy
import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upperson.tables.costs import flop_counter


@dataclass(frozen=True)
class Group:
    """Allocations of one size and kind; `shape` is that of the tensor which each was made for."""

    shape: tuple[int, ...]
    dtype: str
    number: int
    bytes: int  # of all of them

    def __str__(self) -> str:
        return f"{self.bytes / 2**20:>9,.1f} MiB  {self.number:>4} × {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Cost:
    """Of one call, or of several in a row."""

    flops: int
    touched: int
    peak: int
    at_peak: tuple[Group, ...]  # what lives at the peak, largest first

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Allocation:
    """What a storage was made for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


class Operators(TorchDispatchMode):
    """Follows the operators within: `touched`, `live` and `peak` are the bytes that counting.py's first lines explain.

    `at_peak` holds the allocations that lived when `peak` was reached.
    """

    def __init__(self) -> None:
        super().__init__()
        self.touched = self.live = self.peak = 0
        self.allocations: dict[int, Allocation] = {}
        self.at_peak: list[Allocation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
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
        return result

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # PyTorch keeps the object as long as it
        if key not in self.allocations:
            self.allocations[key] = Allocation(tuple(tensor.shape), tensor.dtype, storage.nbytes())
            self.live += storage.nbytes()
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.live -= self.allocations.pop(key).bytes


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def extent(tensor: Tensor) -> int:
    """Bytes of the elements; of an expanded tensor those that are in memory."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def groups(allocations: Iterable[Allocation]) -> tuple[Group, ...]:
    """Allocations of one shape and kind together, largest first."""
    counts = Counter(allocations)
    found = [
        Group(kind.shape, str(kind.dtype).removeprefix("torch."), number, number * kind.bytes)
        for kind, number in counts.items()
    ]
    return tuple(sorted(found, key=lambda group: -group.bytes))


# ---------------------------------------------------------------------------------------- what is counted


def cost(call: Callable[[], Any]) -> Cost:
    """The cost of a call. It runs twice: torch's counter of operations holds on to tensors."""
    gc.collect()
    with Operators() as operators:
        result = call()
    del result
    gc.collect()
    return Cost(flops(call), operators.touched, operators.peak, groups(operators.at_peak))


def flops(call: Callable[[], Any]) -> int:
    with flop_counter() as counter:
        call()
    return counter.get_total_flops()


def saved(call: Callable[[], Any], others: Iterable[Tensor]) -> tuple[Group, ...]:
    """What autograd keeps of a forward pass, each storage once; without the storages of `others`."""
    own = {id(t.untyped_storage()) for t in others}
    kept: dict[int, tuple[Tensor, Allocation]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            # The tensor is held, so that no other storage gets the id.
            kept.setdefault(id(storage), (tensor, Allocation(tuple(tensor.shape), tensor.dtype, storage.nbytes())))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return groups(allocation for _, allocation in kept.values())


# ---------------------------------------------------------------------------------------- without memory


def without_memory(*things: nn.Module | Tensor) -> tuple[FakeTensorMode, list[Any]]:
    """The mode in which operators compute shapes alone, and copies of models and tensors for it.

    Tensors from outside may still meet them there: those whose values count, such as the lengths of packed sequences.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        return mode, [copy.deepcopy(thing) for thing in things]
