"""A whole small training, step by step, against the figures that it gave when they were written down.

tests/golden/replay.json has the loss of every step and the metrics of every epoch, on the small CLIP with its weights.
The released code cannot run here; that this training follows it is held by tests/model/test_golden_model.py, and said
in bench/results/reproduction.md. `python tests/train/test_replay.py` writes the file again.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import log_of

from upperson import preset
from upperson.train.fit import fit

REPLAY = Path(__file__).parents[1] / "golden" / "replay.json"
IDENTITIES, EPOCHS, BATCH = (24, 4, 6), 3, 8
TOLERANCE = 1e-4  # relative, of a loss: versions of PyTorch may round differently, and each step adds to it


def replay(folder: Path) -> dict:
    """The losses of all steps and the metrics of all evaluations, of a training in `folder`."""
    model = dict(prefix_length=4, lora_rank=8, adapter_reduction=4)
    data = dict(embedded_identities=IDENTITIES, embedded_views=2, mask_captions=True)
    config = preset("embedded").replace(**model, **data, epochs=EPOCHS, batch_size=BATCH)
    config = config.replace(device="cpu", backend="torch", log_every=1, run_dir=folder / "run")
    fit(config)
    log = log_of(folder / "run")
    evaluations = [{name: line[name] for name in ("R@1", "mAP")} for line in log if line["kind"] == "evaluation"]
    return {"losses": [line["loss"] for line in log if line["kind"] == "step"], "evaluations": evaluations}


@pytest.mark.slow
def test_a_training_is_the_one_that_was_written_down(tmp_path):
    expected, found = json.loads(REPLAY.read_text()), replay(tmp_path)
    steps = len(expected["losses"]) // EPOCHS
    assert steps == 24 * 2 * 2 // BATCH and len(expected["evaluations"]) == EPOCHS
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    for one, other in zip(found["evaluations"], expected["evaluations"], strict=True):
        # One of the 16 queries may change its rank with the rounding.
        assert one == pytest.approx(other, abs=100 / 16 + 0.01)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        REPLAY.write_text(json.dumps(replay(Path(folder)), indent=1) + "\n")
