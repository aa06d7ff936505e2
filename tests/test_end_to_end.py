"""train.py as a user runs it on real data: ViT-B/16 at full size, a folder in CUHK-PEDES format, JPEG files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upperson.checkpoint import load_checkpoint

TRAIN = Path(__file__).parents[1] / "train.py"
CAPTIONS = ["A woman in a red coat and black trousers walks with a small white handbag.",
            "The man wears a blue striped shirt, grey shorts and white sneakers, and has short black hair."]


@pytest.fixture
def cuhk_pedes(tmp_path):
    """Six people of two images each, in CUHK-PEDES's own layout."""
    rng = np.random.default_rng(0)
    entries = []
    for person in range(1, 7):
        for view in range(2):
            name = f"cam{view}/{person:04}.jpg"
            path = tmp_path / "imgs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (160, 60, 3), dtype=np.uint8)).save(path, quality=90)
            split = "train" if person < 3 else "val" if person < 5 else "test"
            entries.append(dict(split=split, id=person, file_path=name, captions=CAPTIONS))
    (tmp_path / "reid_raw.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_full_size_training_on_a_folder(cuhk_pedes, tmp_path):
    run_dir = tmp_path / "run"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, TRAIN, "--preset", "cuhk-pedes", "--data-root", cuhk_pedes, "--run-dir", run_dir,
               "--pretrained", "none", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "2", "--workers", "0"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "7,419,816" in run.stdout and "R@1" in run.stdout

    checkpoint = load_checkpoint(run_dir / "best.safetensors")
    assert sum(tensor.numel() for tensor in checkpoint.parameters.values()) == 7_419_816
    assert checkpoint.config.model.image_size == (384, 128)
    assert (run_dir / "best.safetensors").stat().st_size < 31e6        # the trained parameters alone
    assert torch.isfinite(torch.cat([tensor.flatten() for tensor in checkpoint.parameters.values()])).all()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines if line["kind"] == "epoch"] == ["epoch"]
    assert next(line["step"] for line in lines if line["kind"] == "epoch") == 4        # 8 captions, batches of 2
    for name in ("config.json", "results.json", "curve.png", "top10.png", "last.safetensors"):
        assert (run_dir / name).stat().st_size > 0
