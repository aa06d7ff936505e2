"""The folder that a run writes to: its files, claiming and finding it, and the log of metrics."""

import errno
import itertools
import json
import math
import os
from pathlib import Path
from typing import IO, Any

from upperson.errors import CheckpointError, RunError
from upperson.files import write_atomically
from upperson.model.checkpoint import load_resume_state
from upperson.config import Config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, METRICS, RESUME = "config.json", "metrics.jsonl", "resume.safetensors"
BEST, LAST = "best.safetensors", "last.safetensors"
RESULTS, TABLE, CURVE, TOP_TEN = "results.json", "results.md", "curve.png", "top10.png"
SHOWN = (TABLE, CURVE, TOP_TEN, BEST, METRICS)  # what a finished run points to
FILES = (CONFIG, METRICS, RESUME, BEST, LAST, RESULTS, TABLE, CURVE, TOP_TEN)


def require_same_run(config: Config) -> None:
    """RunError if the run folder of `config` holds no run, or one of another configuration."""
    run_dir = config.train.run_dir
    if run_dir is None:
        raise RunError("run_dir: a run can only be resumed by name")
    if not (run_dir / CONFIG).is_file():
        raise RunError(f"{run_dir}: there is no run to continue ({CONFIG} is not there)")
    require_same(config, run_dir)


def require_same_stage(config: Config, place: Path) -> None:
    """RunError if the folder of a stage holds a run of another configuration; the whole may have been moved since."""
    if (place / CONFIG).is_file():
        require_same(config.replace(start_from=saved_configuration(place).train.start_from), place)


def require_same(config: Config, run_dir: Path) -> None:
    differences = config.differences(saved_configuration(run_dir))
    if differences:
        raise RunError(f"{run_dir}: the run was started with another configuration: {'; '.join(differences)} as there")


def saved_configuration(run_dir: Path) -> Config:
    path = run_dir / CONFIG
    try:
        return Config.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def saved_state(run_dir: Path) -> dict[str, Any] | None:
    """The state to resume from; None for a run that ended before it saved one."""
    path = run_dir / RESUME
    return load_resume_state(path)[0] if path.exists() else None


def read_results(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); delete it, and the same command makes it again") from error


def history_of(run_dir: Path) -> list[dict[str, Any]]:
    """What each epoch of a run brought, read from its metrics: epoch, loss and metrics; 0, without loss: the start."""
    with open(run_dir / METRICS, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    losses = {line["epoch"]: line["loss"] for line in lines if line["kind"] == "epoch"}
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    before = [
        line for line in lines if line["kind"] in ("zero_shot", "start") and line["split"] == evaluations[0]["split"]
    ]
    return [before[-1] | {"epoch": 0}, *(line | {"loss": losses[line["epoch"]]} for line in evaluations)]


def refuse_used_folder(run_dir: Path) -> None:
    for name in FILES:
        if (run_dir / name).exists():
            raise RunError(
                f"{run_dir} already holds a run ({name}); continue it with --resume {run_dir}, or name "
                "another --run-dir"
            )


def claim_folder(config: Config) -> Path:
    """Makes the run folder, with the configuration in it."""
    run_dir = config.train.run_dir
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        refuse_used_folder(run_dir)
    else:
        Path("runs").mkdir(exist_ok=True)
        for number in itertools.count(1):
            run_dir = Path("runs", f"{config.data.dataset}-{number}")
            try:
                run_dir.mkdir()
                break
            except FileExistsError:
                continue
    write_atomically(run_dir / CONFIG, config.to_json().encode())
    return run_dir


def lock(file: IO[bytes], run_dir: Path) -> None:
    """Keeps other processes from training in `run_dir` until `file`, its log, is closed or this process ends, even by
    SIGKILL. RunError if one does already.
    """
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, it does not outlive us in a child process
    except (BlockingIOError, PermissionError):
        raise RunError(f"{run_dir} is being trained by another process; wait for it, or stop it") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            raise


class MetricsLog:
    """metrics.jsonl, one object a line, and TensorBoard where that is wanted. Open, it locks the run folder.

    With `writes=False`, in the processes that train along with the one that writes, nothing is opened or written.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, writes: bool = True):
        self.path = run_dir / METRICS
        self.file = None
        if writes:
            self.file = open(self.path, "ab")  # noqa: SIM115 (open as long as the run)
            lock(self.file, run_dir)
        self.tensorboard_dir = run_dir / "tensorboard" if tensorboard else None
        self.writer = None

    def start(self, after: int, step: int = 0) -> None:
        """Goes on `after` so many bytes: drops what was written, or half written, after the state was saved."""
        if self.file is None:
            return
        if os.path.getsize(self.path) < after:
            raise RunError(f"{self.path} is shorter than when the run was saved ({after} bytes); it was changed since")
        self.file.truncate(after)
        if self.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # an optional dependency

            self.writer = SummaryWriter(str(self.tensorboard_dir), purge_step=step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        if self.file is None:
            return
        record = {"kind": kind, "step": step, **values}
        finite = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in record.items()
        }  # an fp16 gradient may overflow, and JSON has no infinity
        try:
            self.file.write((json.dumps(finite) + "\n").encode())
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, f"{self.path} could not be written ({error.strerror})") from error
        if self.writer is not None:
            group = "/".join([kind, values["split"]] if "split" in values else [kind])
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{group}/{name}", value, step)

    def sync(self) -> int:
        """Makes all lines durable; the length of the file."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()
