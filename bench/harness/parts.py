"""The parts of a report: programs with a time limit, whose results are kept and not measured again."""

import importlib.util
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.output import save_json

ROOT = Path(__file__).resolve().parents[2]
TAIL = 25  # lines of a failed part's output


@dataclass(frozen=True)
class Part:
    """One program, its time limit in seconds, the modules that it needs, and how to read its result."""

    name: str
    command: Sequence[str | Path]
    seconds: float
    needs: tuple[str, ...] = ()
    collect: Callable[[], Any] = lambda: None  # called after the program has ended; None: no result


@dataclass
class Record:
    """The outcome of a part: passed, failed, over time or left out. Only a part that passed is not run again."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    tail: str = ""
    result: Any = None


def run(parts: Sequence[Part], work: Path, seconds: float, finished: Callable[[Record], None]) -> None:
    """Runs the parts that have not passed yet, within `seconds` in all, and calls `finished` for each."""
    end = time.monotonic() + seconds
    for number, part in enumerate(parts, 1):
        kept = work / f"part-{file_name(part.name)}.json"
        missing = [module for module in part.needs if importlib.util.find_spec(module) is None]
        allowed = min(part.seconds, end - time.monotonic())
        print(f"[{number}/{len(parts)}] {part.name}: ", end="")
        if kept.exists():
            record = Record(**json.loads(kept.read_text()))
            print(f"passed before, in {record.seconds:.0f} s", flush=True)
        elif missing:
            record = Record(part.name, "left out", reason=f"not installed: {', '.join(missing)}")
            print(f"left out, {record.reason}", flush=True)
        elif allowed < 1:
            record = Record(part.name, "over time", reason="the time for the whole report was used up before it")
            print(f"not begun, {record.reason}", flush=True)
        else:
            print(f"at most {allowed:.0f} s", flush=True)
            record = execute(part, work / f"{file_name(part.name)}.log", allowed)
            print(f"      {record.status} after {record.seconds:.0f} s", flush=True)
            if record.status == "passed":
                save_json(kept, asdict(record))
        finished(record)


def execute(part: Part, log: Path, seconds: float) -> Record:
    """Runs one part with its output in `log`. The processes that the part started end with it."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    options = dict(cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
    record = Record(part.name, "passed")
    began = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(list(map(str, part.command)), stdout=output, **options)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            record.status, record.reason = "over time", f"stopped after {seconds:.0f} s"
        finally:
            stop(process)
    record.seconds = time.monotonic() - began
    if record.status == "passed" and process.returncode:
        record.status, record.reason = "failed", f"exit status {process.returncode}"
    lines = log.read_text(errors="replace").replace(f"{ROOT}{os.sep}", "").splitlines()
    record.tail = "\n".join(lines[-1:] if record.status == "passed" else lines[-TAIL:])
    try:
        record.result = part.collect()
    except (OSError, ValueError, KeyError) as error:
        record.status, record.reason = "failed", f"its result cannot be read: {error!r}"
    return record


def stop(process: subprocess.Popen) -> None:
    """Ends the process group if the process still runs: by a request first, then by force."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue


def file_name(name: str) -> str:
    return name.replace(" ", "-")
