"""What tests share: a tiny CLIP, models and data sets of it, and trainings that are watched, stopped and compared."""

import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from upperson import AdaptedCLIP, Config, ModelConfig, preset
from upperson.losses.objective import Objective
from upperson.machine import SINGLE_PROCESS
from upperson.model.checkpoint import load_checkpoint, save_checkpoint
from upperson.petl import ADAPTERS, LOW_RANK, PREFIXES
from upperson.train.interruption import Interruption
from upperson.train.loop import Job, Training

TRAIN_PY = Path(__file__).parents[1] / "train.py"


def tiny_clip(layers=3, context_length=12):
    """The description of a tiny CLIP for open_clip."""
    return dict(
        embed_dim=16,
        quick_gelu=True,
        vision_cfg=dict(image_size=32, layers=layers, width=32, head_width=16, patch_size=8),
        text_cfg=dict(context_length=context_length, vocab_size=49408, width=32, heads=2, layers=layers),
    )


TINY_CLIP = tiny_clip()
NOTHING = dict(prefix="none", lora="none", adapter_attn="none", adapter_mlp="none")
# Every kind of trained module of UP-Person, alone or with others.
VARIANTS = (
    [dict(prefix=kind) for kind in PREFIXES]
    + [dict(prefix="salable", scale_target="logits", prefix_scale=2.0)]
    + [dict(lora=kind) for kind in LOW_RANK]
    + [{f"adapter_{place}": kind} for kind in ADAPTERS for place in ("attn", "mlp")]
    + [
        dict(prefix="salable", lora="wora", adapter_attn="sequential", adapter_mlp="l-sequential"),
        dict(prefix="vanilla", lora="dora", adapter_attn="parallel", adapter_mlp="ln-tuning"),
    ]
)


# ---------------------------------------------------------------------------------------- models


def write_clip(folder, description=TINY_CLIP):
    """The path of a description that is written to a folder."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(description))
    return str(path)


def tiny_config(folder, description=TINY_CLIP, **changes):
    """UP-Person on a tiny random CLIP, whose description is written to `folder`."""
    config = ModelConfig(write_clip(folder, description), "none", (48, 16), backend="torch")
    return config.replace(**dict(prefix_length=3, lora_rank=2, adapter_reduction=4) | changes)


def stirred(model, seed=0, scale=0.3):
    """`model` with random trained parameters: their initial values hide half of what they do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale if parameter.dim() else 0.1) * noise.to(parameter.dtype))
    return model


def inputs(dtype=torch.float32, batch=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 48, 16, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.zeros(batch, 12, dtype=torch.int64)
    for row, length in zip(tokens, itertools.cycle((3, 5, 9, 10)), strict=False):
        row[0], row[length] = 49406, 49407
        row[1:length] = torch.randint(1, 40000, (length - 1,), generator=generator)
    return images, tokens


def build(config, seed=0):
    torch.manual_seed(seed)
    return AdaptedCLIP(config)


# ---------------------------------------------------------------------------------------- trainings


def tiny_training(folder, method=None, **changes):
    """Two epochs of five steps on the embedded data, with a tiny random CLIP whose description is in `folder`."""
    settings = dict(
        model=write_clip(folder, tiny_clip(layers=2, context_length=24)), pretrained="none", image_size=(48, 16),
        backend="torch", device="cpu", embedded_identities=(10, 3, 4), embedded_views=2, epochs=2, warmup_epochs=1,
        batch_size=8, learning_rate=0.01, log_every=1, save_every=2, workers=0,
    )  # fmt: skip
    if method is None:
        settings["adapter_reduction"] = 4  # whatever the preset has
    return preset("embedded", method).replace(**settings | changes)


def training_of(config: Config, model, splits):
    """A Training on the CPU, in the run folder of its configuration, which is made."""
    folder = config.train.run_dir
    folder.mkdir()
    job = Job(folder, SINGLE_PROCESS, torch.device("cpu"), "fp32", splits, None, Interruption())
    return Training(config, model, job, folder)


def log_of(run_dir):
    """The lines of metrics.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def assert_same_run(first, second):
    """Bitwise equal in every file of a run."""
    assert log_of(first) == log_of(second)
    assert json.loads((first / "results.json").read_text()) == json.loads((second / "results.json").read_text())
    for name in ("best.safetensors", "last.safetensors", "resume.safetensors"):
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), (name, key)
    assert load_checkpoint(first / "best.safetensors").results == load_checkpoint(second / "best.safetensors").results
    for name in ("curve.png", "top10.png", "results.md"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def fail_at(monkeypatch, step, action):
    """Replaces the loss of that step by `action` of it."""
    real, calls = Objective.forward, []

    def loss(*arguments):
        calls.append(None)
        value, parts = real(*arguments)
        return action(value) if len(calls) == step else value, parts

    monkeypatch.setattr(Objective, "forward", loss)


def interrupt(value):
    os.kill(os.getpid(), signal.SIGINT)
    return value


class Scripted:
    """Evaluations with given R@1, in the order in which they are asked for."""

    def __init__(self, monkeypatch, scores):
        self.scores, self.splits, real = list(scores), [], Training.evaluate

        def evaluate(run, split):
            retrieval = real(run, split)
            self.splits.append(split)
            score = self.scores.pop(0) if self.scores else 0.0
            return SimpleNamespace(metrics=retrieval.metrics | {"R@1": score}, top=retrieval.top)

        monkeypatch.setattr(Training, "evaluate", evaluate)


def start(*flags):
    """train.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, TRAIN_PY, *map(str, flags)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # the order of sums depends on it
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for(processes, run_dir, kind, step):
    """Returns as soon as that line is in metrics.jsonl."""
    wanted = f'{{"kind": "{kind}", "step": {step},'
    log, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and wanted in log.read_text()):
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_when(process, run_dir, kind, step):
    """SIGKILL as soon as that line is in metrics.jsonl."""
    wait_for([process], run_dir, kind, step)
    process.kill()
    process.communicate()


def flags_of(config):
    """The command line of a configuration, without defaults that have no effect, which the command would report."""
    flags, default, unread = [], preset("embedded", config.model.method.name).values(), config.unread()
    for name, value in config.values().items():
        if name in unread and value == default[name]:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag if value else "--no-" + flag[2:]] if name != "resume" else []
        elif value is not None:
            flags += [flag, *(value if isinstance(value, tuple) else [value])]
    return flags


def tiny_run(folder, **changes):
    """The checkpoint in the run folder of a tiny model with random trained parameters, as if training had ended."""
    config = tiny_training(folder, **changes)
    model = stirred(build(config.model, config.train.seed))
    path = folder / "runs" / "embedded-1" / "best.safetensors"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, model.adaptation(), config, {}, model.fingerprint)
    return path


def run_command(monkeypatch, *flags):
    """The exit status of train.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TRAIN_PY), run_name="__main__")
    return stopped.value.code


# ---------------------------------------------------------------------------------------- a data set in files


def write_image(path, seed=0, size=(20, 60)):
    """The path of a file with noise, which the seed decides; `size` is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    return path


def cuhk_pedes(folder, *, train, test):
    """A folder in the format of CUHK-PEDES, with JPEG files, one a person, and one caption each."""
    colours = ["red", "green", "blue", "black", "white", "yellow"]
    entries = []
    for index in range(train + test):
        path = Path("CUHK01") / f"{index}.jpg"
        write_image(folder / "imgs" / path, index, (25, 60))
        caption = f"A person in a {colours[index % 6]} coat and {colours[index // 6]} shoes."
        split = "train" if index < train else "test"
        entries.append({"split": split, "captions": [caption], "file_path": str(path), "id": index + 1})
    (folder / "reid_raw.json").write_text(json.dumps(entries))
    return folder
