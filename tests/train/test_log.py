"""The log of a run, read again for the curve of a training in stages."""

import os

import pytest

from upperson.errors import RunError
from upperson.train.log import MetricsLog, history_of

LINES = """{"kind": "zero_shot", "step": 0, "split": "test", "R@1": 1.0}
{"kind": "zero_shot", "step": 0, "split": "val", "R@1": 2.0}
{"kind": "epoch", "step": 5, "epoch": 1, "loss": 3.0}
{"kind": "evaluation", "step": 5, "epoch": 1, "split": "val", "R@1": 4.0}
"""


def test_the_epochs_of_a_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(LINES)
    before, first = history_of(tmp_path)
    assert (before["epoch"], before["R@1"]) == (0, 2.0) and "loss" not in before
    assert (first["epoch"], first["R@1"], first["loss"]) == (1, 4.0, 3.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        LINES[:-9],
        LINES.replace('"kind": "epoch"', '"kind": "step"'),
        LINES.replace("4.0", "NaN"),
        LINES.replace("zero_shot", "start").replace("val", "train", 1),
        "[]\n",
        '"text"\n',
        "[" * 100_000,
        LINES + "\udcff",
    ],
)
def test_a_damaged_log_is_refused_by_name(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text, errors="surrogateescape")
    with pytest.raises(RunError, match="metrics.jsonl"):
        history_of(tmp_path)


def test_a_log_that_is_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    for opened in (history_of, lambda folder: MetricsLog(folder, tensorboard=False)):
        with pytest.raises(OSError, match="expected a regular file, found a FIFO"):
            opened(tmp_path)
