"""A GPU that is not there: kernels are specialised, compiled for it by Triton's own launch path, and not run.

Tensors stay on the CPU and say that they are on a GPU. What would be launched is recorded. `install` changes PyTorch
and Triton for good, so this is for a process of its own.
"""

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from upperson_kernels.backend import interpreting

MULTIPROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148}
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}  # KB that one program may have
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # on each axis of a grid


@dataclass(frozen=True)
class Launch:
    """A kernel, as it was compiled for its arguments, and its grid."""

    name: str  # such as attention.resident.forward_kernel
    grid: tuple[int, int, int]
    warps: int
    shared: int  # bytes a program
    cubin: bytes
    unaligned: tuple[str, ...]  # arguments that were not specialised as multiples of 16, but for counts
    key: str  # the same for the same compiled code


launches: list[Launch] = []


class Utils:
    """What Triton asks of a GPU. A function's handle is the position of its code in `loaded`."""

    def __init__(self, capability: int):
        self.capability = capability
        self.loaded: list[bytes] = []

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(
            max_shared_mem=SHARED_MEMORY[self.capability] * 1024,
            max_num_regs=65536,
            multiprocessor_count=MULTIPROCESSORS[self.capability],
            warpSize=32,
            sm_clock_rate=1_980_000,
            mem_clock_rate=2_619_000,
            mem_bus_width=5120,
        )

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int, *others: Any) -> tuple[int, ...]:
        self.loaded.append(cubin)
        return 1, len(self.loaded) - 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


class Launcher:
    """Stands in the place of the compiled launcher."""

    def __init__(self, source: Any, metadata: Any, *others: Any):
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
        grid = (x, y, z)
        if not all(1 <= programs <= most for programs, most in zip(grid, MOST_PROGRAMS, strict=True)):
            raise ValueError(f"{self.metadata.name}: a grid of {grid} programs cannot be launched")
        names = self.source.fn.arg_names
        specialised = {
            path[0] for path, attributes in self.source.attrs.items() if ["tt.divisibility", 16] in attributes
        }
        unaligned = [
            name
            for position, name in enumerate(names)
            if name.startswith(("p_", "stride_")) and self.source.signature[name] != "constexpr"
            if position not in specialised
        ]
        module = self.source.fn.__module__.removeprefix("upperson_kernels.")
        metadata = self.metadata
        launches.append(
            Launch(
                name=f"{module}.{metadata.name}",
                grid=grid,
                warps=metadata.num_warps,
                shared=metadata.shared,
                cubin=driver.active.utils.loaded[function],
                unaligned=tuple(unaligned),
                key=metadata.hash,
            )
        )


class Driver(DriverBase):
    def __init__(self, capability: int):
        self.capability, self.utils, self.launcher_cls = capability, Utils(capability), Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


def install(capability: int) -> None:
    """From now on, Triton compiles for `capability` and records the launches in `launches`.

    Raises RuntimeError under TRITON_INTERPRET, which replaces the compiler.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set; kernels are compiled here, so unset it")
    driver.set_active(Driver(capability))
    torch.Tensor.is_cuda = torch.nn.Parameter.is_cuda = property(lambda self: True)
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    torch.cuda.get_device_capability = lambda *device: divmod(capability, 10)
    torch.cuda.get_device_name = lambda *device: f"a GPU of capability {capability} that is not there"
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS[capability])
    torch.cuda.get_device_properties = lambda *device: properties
