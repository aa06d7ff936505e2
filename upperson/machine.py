"""The device, the precision, and the processes that share a batch.

torchrun starts several processes. Each computes its share of a batch, and all take the same optimizer step. A loss
compares all pairs of the batch, so every process gathers the features of all processes and computes the same loss from
them. DistributedDataParallel then averages the gradients of the W processes. With one process, the usual case, nothing
is initialised, and every method of Group is the identity.
"""

import errno
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from reprlib import repr as short
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from upperson.errors import RunError, discard_output, missing_resource

# Long, since one process may decode a data set for the others. A dead process is detected much earlier, by gloo or by
# torchrun, which then ends all processes.
TIMEOUT = timedelta(minutes=30)
# Matches PyTorch's errors after another process has ended or does not respond.
LOST_CONTACT = re.compile(r"gloo|NCCL|TCPStore|Connection (closed|reset) by peer|Broken pipe")
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
TORCHRUN = (*NUMBERS, "MASTER_ADDR")
NUMBER = re.compile("[0-9]{1,9}")

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Value = TypeVar("Value")


def share_of(total: int, rank: int, world_size: int) -> range:
    """The consecutive share of process `rank` in `total` items, split as torch.tensor_split does.

    The lengths of the shares differ by at most one, and the longer shares come first. Raises ValueError for a rank
    outside 0 to `world_size` - 1.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, as world_size is {world_size}, found {rank}")
    each, longer = divmod(total, world_size)
    start = rank * each + min(rank, longer)
    return range(start, start + each + (rank < longer))


@dataclass(frozen=True)
class Group:
    """The processes that train together, and the rank of this process among them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # rank on this machine, which is also the index of the GPU

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Group":
        """The group that torchrun describes in the environment; without torchrun, a group of this process only.

        Raises RunError if torchrun's variables are incomplete or contradict each other.
        """
        if environment.get("WORLD_SIZE", "1") == "1":
            return cls()
        wrong = [name for name in TORCHRUN if not environment.get(name)]
        wrong += [name for name in NUMBERS if name not in wrong and not NUMBER.fullmatch(environment[name])]
        advice = "start with torchrun --nproc-per-node N train.py, or unset WORLD_SIZE"
        if wrong:
            raise RunError(
                f"the environment sets WORLD_SIZE to {short(environment['WORLD_SIZE'])}, but these variables are "
                f"missing or not a number: {', '.join(wrong)}; {advice}"
            )
        world_size, rank, local_rank, port = (int(environment[name]) for name in NUMBERS)
        # A process outside of the group would wait for the others, which never come.
        for name, value, bound in (("RANK", rank, world_size), ("LOCAL_RANK", local_rank, world_size)):
            if not value < bound:
                raise RunError(f"the environment sets {name} to {value}, not below WORLD_SIZE, {bound}; {advice}")
        if not 1 <= port < 2**16:
            raise RunError(f"the environment sets MASTER_PORT to {port}; expected 1 to 65535; {advice}")
        return cls(rank, world_size, local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def share_of(self, total: int) -> range:
        """This process's share of `total` items; see share_of."""
        return share_of(total, self.rank, self.world_size)

    def own(self, items: Sequence[Value]) -> Sequence[Value]:
        """This process's share of a list."""
        share = self.share_of(len(items))
        return items[share.start : share.stop]

    def gather(self, x: Tensor, total: int) -> Tensor:
        """The rows of all processes, (total, …), in the order of the ranks; every process gets the same tensor.

        `x` begins with this process's share of `total` rows; further rows are ignored. Every process must compute the
        same loss from the result. The gradient is then the same on all processes, and each process takes its own rows.
        These are multiplied by W, since DistributedDataParallel averages the gradients of W processes, and their sum is
        needed.
        """
        return x if self.world_size == 1 else _Gather.apply(x[: len(self.share_of(total))], total, self)

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes, on every process. The gradient is multiplied by W, see `gather`."""
        return x if self.world_size == 1 else _Total.apply(x, self)

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum of `x` over all processes, on every process, without gradient or GPU sync."""
        if self.world_size > 1:
            x = x.detach().clone()
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def print(self, text: str) -> None:
        """Prints `text` in the main process only. A run goes on without the terminal or pipe where it was started."""
        if self.is_main:
            try:
                print(text, flush=True)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EPIPE):
                    raise
                discard_output()

    def broadcast(self, value: Value) -> Value:
        """Sends the main process's value, which must be picklable, to all processes."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Waits until all processes have called this method."""
        if self.world_size > 1:
            dist.barrier()


SINGLE_PROCESS = Group()


def device_and_precision(device: str, precision: str, group: Group = SINGLE_PROCESS) -> tuple[torch.device, str]:
    """Resolves "auto": a CUDA GPU in bf16 if one is available, else the CPU in fp32.

    Each process of a group uses the GPU of its local rank. Raises RunError for a device or precision that this machine
    does not have.
    """
    available = torch.cuda.is_available()
    found = torch.device(device if device != "auto" else "cuda" if available else "cpu")
    if group.world_size > 1 and found.type == "cuda":
        if found.index is not None:
            raise RunError(
                f"device: {device} is a single GPU for {group.world_size} processes; use --device cuda for one GPU per "
                "process, and CUDA_VISIBLE_DEVICES to choose the GPUs"
            )
        found = torch.device("cuda", group.local_rank)
    if found.type == "cuda" and (not available or (found.index or 0) >= torch.cuda.device_count()):
        raise RunError(f"device: {found} is not available; PyTorch finds {torch.cuda.device_count()} CUDA devices")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise RunError("device: mps is not available; PyTorch finds no Apple GPU on this machine")
    if precision == "auto":
        precision = "bf16" if found.type == "cuda" else "fp32"
    if precision == "fp16" and found.type != "cuda":
        raise RunError(f"precision: fp16 needs a CUDA GPU; expected fp32 or bf16 on {found.type}")
    return found, precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of forward passes in "fp32", "bf16" or "fp16"."""
    return torch.autocast(device.type, AUTOCAST_DTYPES.get(precision), enabled=precision in AUTOCAST_DTYPES)


def frozen_dtype(setting: str, device: torch.device, precision: str) -> torch.dtype | None:
    """The dtype in which frozen weights are kept; None: float32, from which autocast casts them in every step.

    `setting` is frozen_weights of TrainConfig.
    """
    kept = setting == "kept" or (setting == "auto" and device.type == "cuda")
    return AUTOCAST_DTYPES.get(precision, torch.float32) if kept else None


@contextmanager
def process_group(group: Group, device: torch.device) -> Iterator[None]:
    """A context in which the processes of `group` communicate, with NCCL on a CUDA GPU and with gloo elsewhere."""
    if group.world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def data_parallel(module: nn.Module, group: Group) -> nn.Module:
    """The module, wrapped so that backward averages the gradients of all processes."""
    if group.world_size == 1:
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.15 renames broadcast_buffers; 2.11 has the old name
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def contact(where: Callable[[], str]) -> Iterator[None]:
    """A context that turns a lost connection to another process into a RunError. `where` returns the run's position."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or LOST_CONTACT.search(str(error))
        if not lost or isinstance(error, RunError):
            raise
        message = str(error).split("\n")[0].split(". ")[0]
        reason = re.sub(r"^\[.*?\] ", "", message)  # without the source line of gloo
        raise RunError(f"lost contact with another process ({reason}) {where()}") from error


@contextmanager
def enough_memory(where: Callable[[], str]) -> Iterator[None]:
    """A context that turns missing memory, on a GPU or not, and ended loader processes into a RunError.

    `where` says where and what helps in a training.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        missing = None if isinstance(error, RunError) else missing_resource(error)
        if missing is None:
            raise
        what, own, _ = missing
        raise RunError(f"{what} {where()} ({own})") from error


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: int, group: Group) -> Tensor:
        ctx.group, ctx.total = group, total
        shares = [share_of(total, rank, group.world_size) for rank in range(group.world_size)]
        longest = len(shares[0])
        padded = x.new_zeros(longest, *x.shape[1:])  # all processes must send the same number of rows
        padded[: len(x)] = x
        gathered = x.new_empty(group.world_size * longest, *x.shape[1:])
        dist.all_gather_into_tensor(gathered, padded)
        if longest * group.world_size == total:
            return gathered
        parts = zip(gathered.split(longest), shares, strict=True)
        return torch.cat([part[: len(share)] for part, share in parts])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = ctx.group.share_of(ctx.total)
        return gradient[own.start : own.stop] * ctx.group.world_size, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.group.world_size, None
