"""The log of a run: metrics.jsonl with one object per line, and optionally TensorBoard."""

import io
import json
import math
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from upperson.errors import RunError
from upperson.files import parse_json, require_regular

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """The log of a run.

    `writes` is False in all processes but the first. These open and write nothing.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, writes: bool = True):
        self.path = run_dir / METRICS_FILE
        self.file: IO[bytes] | None = None
        if writes:
            if self.path.exists():
                require_regular(self.path)
            self.file = open(self.path, "ab")  # noqa: SIM115 (open as long as the run)
        self.tensorboard_dir = run_dir / "tensorboard" if tensorboard else None
        self.writer = None

    def start(self, after: int, step: int = 0) -> None:
        """Continues after the first `after` bytes. Lines that were written after the state was saved are removed."""
        if self.file is None:
            return
        if os.path.getsize(self.path) < after:
            raise RunError(f"{self.path} has been changed: it is shorter than when the run was saved ({after} bytes)")
        self.file.truncate(after)
        if self.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # an optional dependency

            self.writer = SummaryWriter(str(self.tensorboard_dir), purge_step=step + 1 if after else None)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds a line. TensorBoard shows zero-shot CLIP in the charts of the evaluations, at step 0."""
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
            chart = "evaluation" if kind == "zero_shot" else kind
            chart = f"{chart}/{values['split']}" if "split" in values else chart
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{chart}/{name}", value, step)

    def conclude(self, step: int, settings: dict[str, Any], metrics: dict[str, float], picture: bytes) -> None:
        """Writes the hyper-parameters, the test metrics and the picture of the top ten (PNG) to TensorBoard."""
        if self.writer is None:
            return
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }
        tagged = {f"test/{name}": value for name, value in metrics.items()}
        self.writer.add_hparams(plain, tagged, run_name=".")
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        self.writer.add_image("top ten", pixels, step, dataformats="HWC")

    def sync(self) -> int:
        """Makes all lines durable, and returns the length of the file in bytes."""
        if self.file is None:
            return 0
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()


def history_of(run_dir: Path) -> list[dict[str, Any]]:
    """The results of all epochs, read from the log of a run: epoch, loss and metrics. Epoch 0 has no loss.

    Raises RunError, which names the file, for a log that MetricsLog did not write.
    """
    path = run_dir / METRICS_FILE
    require_regular(path)
    lines = [_parsed(text, f"{path}, line {number}") for number, text in enumerate(path.read_bytes().splitlines(), 1)]
    try:
        losses = {line["epoch"]: line["loss"] for line in lines if line["kind"] == "epoch"}
        evaluations = [line for line in lines if line["kind"] == "evaluation"]
        split = evaluations[0]["split"]
        before = [line for line in lines if line["kind"] in ("zero_shot", "start") and line["split"] == split]
        return [before[-1] | {"epoch": 0}, *(line | {"loss": losses[line["epoch"]]} for line in evaluations)]
    except (LookupError, TypeError) as error:
        raise RunError(f"{path} has been changed: expected the lines of a finished training ({error!r})") from error


def _parsed(text: bytes, where: str) -> dict[str, Any]:
    try:
        line = parse_json(text)
    except ValueError as error:
        raise RunError(f"{where}: {error}") from error
    if not isinstance(line, dict) or "kind" not in line:
        raise RunError(f"{where}: expected an object with the key 'kind'")
    return line
