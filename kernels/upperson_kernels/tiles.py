"""Block sizes and launch options of every kernel, by GPU generation and shape.

The values of this file were chosen by compiling ahead of time for compute capabilities 80, 89, 90 and 100 (A100, RTX
40, H100 and H200, B200). Registers do not spill at the shapes of CLIP, and every product of 64 rows runs on the large
matrix units of Hopper and Blackwell; `python bench/resources.py` prints both. Nothing is tuned at run time:
`python bench/tune.py` measures alternatives on a GPU and saves the fastest ones to a file. The entries of a file
that `load` read, or that the environment variable UPPERSON_TILES names, take precedence over the values of this file.
"""

import functools
import json
import os
from pathlib import Path
from reprlib import repr as short
from typing import Any

Tiles = dict[str, int]


class TilesError(ValueError):
    """A file of tiles that cannot be used; the message names file, entry and field."""


FIELDS = {
    "attention_forward": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "attention_backward": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "adapter_rows": ("BLOCK_T", "BLOCK_C", "num_warps", "num_stages"),
    "adapter_few_rows": ("BLOCK_T", "BLOCK_C", "num_warps", "num_stages"),
    "adapter_parameters": ("BLOCK_T", "BLOCK_C", "num_warps", "num_stages"),
}
LIMITS = {"width": 65_536, "element_size": 16, "capability": 1_000}  # of the fields that say where an entry applies
loaded: dict[tuple[str, int, int, int], Tiles] = {}  # by kernel, width, element size, capability


def choose(kernel: str, width: int, element_size: int, capability: int) -> Tiles:
    """The tiles of a kernel: those of a loaded file, else those that ship.

    Args:
        kernel: attention_forward, attention_backward, adapter_rows (the kernels that own rows), adapter_few_rows (the
            same where there are too few rows for every multiprocessor) or adapter_parameters.
        width: head width of attention, hidden width of the adapter.
        element_size: bytes of an element of the activations.
        capability: compute capability as a number, from 80 on.

    Raises TilesError if the file that UPPERSON_TILES names cannot be used.
    """
    load_named_in_environment()
    key = (kernel, width, element_size, capability)
    chosen = loaded[key] if key in loaded else SHIPPED[kernel](width, element_size, capability)
    # Multiply and add in one instruction: asked for, since Triton 3.10 no longer does so by itself.
    return dict(chosen, **covering(kernel, width), enable_fp_fusion=True)


def covering(kernel: str, width: int) -> dict[str, int]:
    """The blocks that span the whole head, or the whole hidden width: never tuned.

    A hidden width is cut into two powers of two where that pads nothing, such as 96 = 64 + 32.
    """
    padded = max(16, 1 << (width - 1).bit_length())
    if kernel.startswith("attention"):
        return dict(BLOCK_D=padded)
    first = 1 << (width.bit_length() - 1)
    second = width - first
    if second >= 16 and second.bit_count() == 1:
        return dict(FIRST=first, SECOND=second)
    return dict(FIRST=padded, SECOND=0)


# ---------------------------------------------------------------------------------------- what ships

# Before Hopper (80, 86, 89), and on desktop Blackwell (120), matrix units take operands from registers, where a tile
# of 64 × 64 is often too much. Hopper's (90) and data-centre Blackwell's (100) take them from shared memory, and 64
# rows at once. Types wider than 16 bit take smaller tiles everywhere, or they would not fit the registers.
#
# maxnreg: left alone, ptxas now and then spills a few bytes to make room for one more program; it is told not to.


def operands_in_registers(capability: int) -> bool:
    return capability < 90 or capability >= 120


def attention_forward(head_width: int, element_size: int, capability: int) -> Tiles:
    if element_size > 2:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2)
    if operands_in_registers(capability):
        return dict(BLOCK_M=64, BLOCK_N=32, num_warps=4 if head_width <= 64 else 8, num_stages=2)
    if capability >= 100:
        return dict(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2, maxnreg=255)
    return dict(BLOCK_M=64, BLOCK_N=64, num_warps=4 if head_width <= 64 else 8, num_stages=2)


def attention_backward(head_width: int, element_size: int, capability: int) -> Tiles:
    if element_size > 2:
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2)
    if operands_in_registers(capability):
        return dict(BLOCK_M=64 if head_width <= 64 else 32, BLOCK_N=32, num_warps=4, num_stages=2, maxnreg=224)
    return dict(BLOCK_M=64, BLOCK_N=64, num_warps=4 if head_width <= 64 else 8, num_stages=2, maxnreg=255)


def adapter_rows(hidden: int, element_size: int, capability: int) -> Tiles:
    if element_size > 2:
        return dict(BLOCK_T=32, BLOCK_C=32, num_warps=4, num_stages=2)
    return dict(BLOCK_T=64, BLOCK_C=32, num_warps=4, num_stages=2)


def adapter_few_rows(hidden: int, element_size: int, capability: int) -> Tiles:
    return dict(BLOCK_T=16, BLOCK_C=32 if element_size > 2 else 64, num_warps=4, num_stages=2)


def adapter_parameters(hidden: int, element_size: int, capability: int) -> Tiles:
    if element_size > 2:
        return dict(BLOCK_T=32, BLOCK_C=32, num_warps=8, num_stages=2)
    if operands_in_registers(capability):
        return dict(BLOCK_T=16, BLOCK_C=64, num_warps=8, num_stages=2)
    return dict(BLOCK_T=32 if capability >= 100 else 64, BLOCK_C=128, num_warps=8, num_stages=2)


SHIPPED = dict(
    attention_forward=attention_forward,
    attention_backward=attention_backward,
    adapter_rows=adapter_rows,
    adapter_few_rows=adapter_few_rows,
    adapter_parameters=adapter_parameters,
)


# ---------------------------------------------------------------------------------------- what a user measured


def load(path: str | Path) -> None:
    """Reads the tiles that bench/tune.py saved; they take precedence from the next launch on.

    Raises TilesError for a file that is not there or not of that kind, naming it and what was expected.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise TilesError(f"{path}: expected a regular file")  # a FIFO would be waited for
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_repeated_keys)
    except TilesError:
        raise
    except OSError as error:
        raise TilesError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also of text that is not UTF-8, and of numbers of 5,000 digits
        raise TilesError(
            f"{path}: expected the JSON that bench/tune.py writes, with a list 'tiles' ({error})"
        ) from error
    entries = content.get("tiles") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise TilesError(f"{path}: expected the JSON that bench/tune.py writes, with a list 'tiles'")
    found = {}
    for position, entry in enumerate(entries):
        key, chosen = _checked(entry, f"{path}: tiles[{position}]")
        if key in found:
            raise TilesError(f"{path}: tiles[{position}]: an entry before it is for the same kernel, width, …")
        found[key] = chosen
    loaded.update(found)


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a field stands twice in one entry")
    return content


def _checked(entry: Any, where: str) -> tuple[tuple[str, int, int, int], Tiles]:
    """The key and the tiles of an entry. Raises TilesError, which begins with `where`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kernel"), str) or entry["kernel"] not in FIELDS:
        raise TilesError(f"{where}: 'kernel' must be one of {', '.join(FIELDS)}")
    kernel = entry["kernel"]
    fields = FIELDS[kernel]
    if unknown := set(entry) - {"kernel", *LIMITS, "maxnreg", *fields}:
        raise TilesError(f"{where}: unknown fields: {', '.join(map(short, sorted(unknown)))}")
    for name in (*LIMITS, *fields):
        if type(entry.get(name)) is not int or entry[name] < 1:  # True is an int too
            raise TilesError(f"{where}: {name!r} must be a positive integer, not {short(entry.get(name))}")
    for name, most in LIMITS.items():
        if entry[name] > most:
            raise TilesError(f"{where}: {name!r} must be at most {most}, not {short(entry[name])}")
    for name in fields:
        least = 16 if name.startswith("BLOCK") else 1
        number = short(entry[name])
        if name == "num_stages" and entry[name] > 8:
            raise TilesError(f"{where}: 'num_stages' must be at most 8, not {number}")
        if name != "num_stages" and (not least <= entry[name] <= 128 or entry[name] & (entry[name] - 1)):
            raise TilesError(f"{where}: {name!r} must be a power of two from {least} to 128, not {number}")
    if kernel == "attention_backward" and entry["BLOCK_M"] < 32:
        raise TilesError(f"{where}: 'BLOCK_M' must be at least 32 here, as half of it is a tile too")
    maxnreg = entry.get("maxnreg")
    if maxnreg is not None and not (type(maxnreg) is int and 24 <= maxnreg <= 255):
        raise TilesError(f"{where}: 'maxnreg' must be a number of registers from 24 to 255, not {short(maxnreg)}")
    key = (kernel, entry["width"], entry["element_size"], entry["capability"])
    return key, {name: entry[name] for name in (*fields, "maxnreg") if entry.get(name) is not None}


@functools.cache
def load_named_in_environment() -> None:
    """Loads what UPPERSON_TILES names, if it names something, once."""
    if path := os.environ.get("UPPERSON_TILES"):
        try:
            load(path)
        except TilesError as error:
            raise TilesError(f"UPPERSON_TILES: {error}") from None
