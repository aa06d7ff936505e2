"""A training of tiny models: its files, the selected epoch, and no loss when it is stopped and resumed."""

import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from operators import slow_case
from PIL import Image
from tiny import (
    Scripted,
    assert_same_run,
    cuhk_pedes,
    fail_at,
    flags_of,
    interrupt,
    kill_when,
    log_of,
    run_command,
    start,
    tiny_training,
    training_of,
)

from upperson.config import PRESETS, TrainConfig
from upperson.data import read_splits
from upperson.errors import CheckpointError, DataError, Diverged, MethodError, RunError
from upperson.evaluate.embed import evaluate
from upperson.evaluate.pictures import top_ten
from upperson.evaluate.results import Results
from upperson.model import AdaptedCLIP, load_model
from upperson.model.checkpoint import load_checkpoint
from upperson.model.tensor_files import RESUME_STATE, VERSIONS
from upperson.train.fit import build_first, build_model, fit
from upperson.train.loop import SHOWN_QUERIES, Training
from upperson.train.optimizer import build_optimizer, build_schedule, require_names
from upperson.train.resume import load_state, random_states, save_state, set_random_states


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return tiny_training(folder, run_dir=folder / "whole")


@pytest.fixture(scope="module")
def whole(shared):
    """The folder of that run, never stopped: to compare with, not to change."""
    return fit(shared).run_dir


@pytest.fixture
def config(shared, tmp_path):
    """The same run in a folder of its own."""
    return shared.replace(run_dir=tmp_path / "run")


# ------------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_everything_it_promises(config, capsys):
    result = fit(config)
    run_dir = config.train.run_dir
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "best.safetensors", "config.json", "curve.png", "last.safetensors", "metrics.jsonl", "results.json",
        "results.md", "resume.safetensors", "top10.png",
    ]  # fmt: skip
    assert (run_dir / "config.json").read_text() == config.to_json()
    assert Results.read(run_dir / "results.json") == result.results
    for name in ("curve.png", "top10.png"):
        Image.open(run_dir / name).verify()

    log = log_of(run_dir)
    assert [(line["kind"], line["step"]) for line in log] == [
        ("zero_shot", 0), ("zero_shot", 0),
        *(("step", step) for step in range(1, 6)), ("epoch", 5), ("evaluation", 5),
        *(("step", step) for step in range(6, 11)), ("epoch", 10), ("evaluation", 10), ("result", 10),
    ]  # fmt: skip
    steps = [line for line in log if line["kind"] == "step"]
    assert [line["learning_rate"] for line in steps] == pytest.approx([0.001] * 5 + [0.01] * 5)
    for epoch, line in enumerate((line for line in log if line["kind"] == "epoch"), 1):
        assert line["loss"] == pytest.approx(np.mean([step["loss"] for step in steps if step["epoch"] == epoch]))

    shown = capsys.readouterr().out
    assert (run_dir / "results.md").read_text().splitlines()[0] in shown
    assert "10 identities" in shown and "top10.png" in shown


@pytest.mark.slow
def test_the_picture_shows_zero_shot_above_the_trained_model(config, monkeypatch):
    """Also in a run that was resumed."""
    shown = []
    monkeypatch.setattr("upperson.train.loop.top_ten", lambda *given: shown.append(given) or top_ten(*given))
    with monkeypatch.context() as patch:
        fail_at(patch, 8, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    fit(config.replace(resume=True))
    ((samples, queries, tops),) = shown
    assert list(tops) == ["zero-shot CLIP", "UP-Person"] and len(queries) == SHOWN_QUERIES
    model = load_model(config.train.run_dir / "best.safetensors")
    assert tops["UP-Person"] == evaluate(model, samples).top[queries].tolist()
    with model.zero_shot():
        assert tops["zero-shot CLIP"] == evaluate(model, samples).top[queries].tolist()


def test_only_the_adaptation_is_trained_and_the_checkpoint_reproduces_the_result(config):
    result = fit(config)
    torch.manual_seed(config.train.seed)
    untrained = AdaptedCLIP(config.model)
    trained = load_model(config.train.run_dir / "best.safetensors")
    test = read_splits(config.data)["test"]
    assert evaluate(trained, test).metrics == result.results.text_to_image
    with trained.zero_shot():
        assert evaluate(trained, test).metrics == result.results.zero_shot
    for name, before in untrained.trained_parameters().items():
        assert not torch.equal(before, trained.trained_parameters()[name]), name
    assert result.results.trained_parameters == sum(p.numel() for p in trained.trained_parameters().values())
    assert result.results.all_parameters == sum(p.numel() for p in trained.parameters())


def test_steps_on_one_batch_bring_its_loss_down(config):
    torch.manual_seed(0)
    splits = read_splits(config.data)
    run = training_of(config, AdaptedCLIP(config.model), splits)
    batch = next(iter(run.batches))
    losses = [run.step(batch)["loss"] for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_every_epoch_shows_every_pair_in_another_order(config, monkeypatch):
    real, seen = Training.launch, []

    def step(run, batch, pairs):
        assert pairs == len(batch["person_ids"])
        seen.append(batch["person_ids"].tolist())
        return real(run, batch, pairs)

    monkeypatch.setattr(Training, "launch", step)
    fit(config)
    first, second = sum(seen[:5], []), sum(seen[5:], [])
    assert first != second
    assert sorted(first) == sorted(second) == sorted(sample.person_id for sample in read_splits(config.data)["train"])


@pytest.mark.slow
def test_compiled_blocks_take_the_same_step(config):
    """On the CPU as on a GPU. Evaluations are not compiled: they are the same to the bit."""
    taken = []
    for compiled in (False, True):
        config = config.replace(compile=compiled, run_dir=config.train.run_dir.with_name(str(compiled)))
        config = config.replace(skip_unread=False)  # one kind of block in each tower; test_model.py compiles all kinds
        torch.manual_seed(0)
        model = AdaptedCLIP(config.model)
        splits = read_splits(config.data)
        run = training_of(config, model, splits)
        before = run.evaluate("val").average_precision
        measured = run.step(next(iter(run.batches)))
        assert sum(block._compiled_call_impl is not None for block in model.blocks()) == 4 * compiled
        taken.append((measured, model.trained_parameters(), before))
    (eager, expected, before), (measured, parameters, again) = taken
    assert measured == pytest.approx(eager, rel=1e-4) and torch.equal(before, again)
    assert parameters.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(parameters[name], values, rtol=1e-5, atol=1e-5)


def test_the_scale_of_fp16_gradients_is_resumed(config):
    """The scale, and the number of steps since it last changed."""
    job = replace(training_of(config, AdaptedCLIP(config.model), read_splits(config.data)).job, precision="fp16")
    first, second = (Training(config, build_model(config), job, config.train.run_dir) for _ in range(2))
    first.begin({})
    first.scaler.scale(torch.ones(()))  # it makes its tensors at the first use
    first.scaler.update(new_scale=64.0)
    batches = iter(first.batches)
    for _ in range(2):
        first.step(next(batches))
    expected = first.scaler.state_dict()
    assert expected["scale"] == 64.0 and expected["_growth_tracker"] == 2
    first.save_state()
    second.load_state(load_state(config.train.run_dir))
    assert second.scaler.state_dict() == expected
    second.scaler.scale(torch.ones(()))
    assert second.scaler.get_scale() == 64.0


def test_a_state_from_another_device_continues_with_this_ones_optimizer(config):
    """On a GPU Adam is fused; what a GPU saved must not fuse it here, nor the other way round."""
    splits = read_splits(config.data)
    run = training_of(config, AdaptedCLIP(config.model), splits)
    run.begin({})
    run.step(next(iter(run.batches)))
    run.save_state()
    state = load_state(config.train.run_dir)
    for group in state["optimizer"]["param_groups"]:
        assert group["fused"] is None
        group["fused"] = True
    run.load_state(state)
    assert [group["fused"] for group in run.optimizer.param_groups] == [None] * len(run.optimizer.param_groups)
    run.step(next(iter(run.batches)))


@pytest.fixture
def fused_adam(monkeypatch):
    """Adam as on a GPU, which also skips a step by itself."""
    monkeypatch.setattr(
        "upperson.train.optimizer.Adam", lambda groups, **options: torch.optim.Adam(groups, **options | {"fused": True})
    )


def test_a_step_is_read_after_the_next_one_is_launched(config, whole, monkeypatch, fused_adam):
    """As on a GPU: the run is the same, and all that is saved was checked before."""
    real, order = Training.read, []
    monkeypatch.setattr(
        Training, "read", lambda run, measured: order.append((run.progress.step, measured.step)) or real(run, measured)
    )
    fit(config)
    assert order == [(2, 1), (2, 2), (4, 3), (4, 4), (5, 5), (6, 6), (8, 7), (8, 8), (10, 9), (10, 10)]
    losses, expected = (
        [line["loss"] for line in log_of(run) if line["kind"] == "step"] for run in (config.train.run_dir, whole)
    )
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("step", [1, slow_case(3), 4, slow_case(5), slow_case(10)])
def test_a_step_that_is_not_finite_is_found_before_anything_is_saved(config, monkeypatch, step, fused_adam):
    fail_at(monkeypatch, step, lambda loss: loss * math.nan)
    with pytest.raises(Diverged, match=rf"step {step}: the loss is nan, and the step was skipped"):
        fit(config)
    state = load_state(config.train.run_dir)
    assert all(tensor.isfinite().all() for tensor in state["parameters"].values())
    assert state["progress"]["step"] < step


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"), 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you …"), 7),
        (MemoryError(), 4),
    ],
    ids=["on a GPU", "on a CPU", "of Python"],
)
def test_without_memory_a_run_ends_in_one_line(config, monkeypatch, error, step):
    real = Training.launch

    def launch(run, batch, pairs):
        if run.progress.step + 1 == step:
            raise error
        return real(run, batch, pairs)

    monkeypatch.setattr(Training, "launch", launch)
    with pytest.raises(RunError) as raised:
        fit(config)
    message = str(raised.value)
    assert f"out of memory in epoch {1 + (step > 5)}, after step {step - 1}, with batches of 8 pairs" in message
    assert "--batch-size" in message and "\n" not in message
    assert load_state(config.train.run_dir)["progress"]["step"] < step


def test_another_runtime_error_is_not_taken_for_lack_of_memory(config, monkeypatch):
    monkeypatch.setattr(Training, "launch", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="^shapes do not match"):
        fit(config)


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(config, whole):
    fit(config.replace(workers=2))
    assert_same_run(whole, config.train.run_dir)


@pytest.mark.slow
def test_other_losses_are_another_run(config, whole):
    """The first loss of a sum is the sum of the first losses; the second differs, as other parameters were learnt."""
    alone, run_dir = config.replace(losses="itc"), config.train.run_dir
    fit(alone)
    fit(alone.replace(losses="sdm+0.5*itc", run_dir=run_dir.with_name("sum")))
    first = [
        [line["loss"] for line in log_of(folder) if line["kind"] == "step"][0]
        for folder in (whole, run_dir, run_dir.with_name("sum"))
    ]
    assert first[2] == pytest.approx(first[0] + 0.5 * first[1], rel=1e-5) and first[1] > 0


def test_zero_shot_is_a_run_without_training(config, whole, capsys):
    results = fit(config.replace(method="zero-shot")).results
    run_dir = config.train.run_dir
    trained = Results.read(whole / "results.json")
    assert results.text_to_image == results.zero_shot == trained.zero_shot
    assert (results.method, results.selection, results.trained_parameters) == ("zero-shot CLIP", "none", 0)
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "best.safetensors",
        "config.json",
        "results.json",
        "results.md",
        "top10.png",
    ]
    assert "curve.png" not in capsys.readouterr().out
    assert (
        evaluate(load_model(run_dir / "best.safetensors"), read_splits(config.data)["test"]).metrics
        == results.text_to_image
    )


@pytest.mark.slow
def test_full_fine_tuning_is_a_run(config, whole):
    results = fit(config.replace(method="full", learning_rate=1e-4)).results
    model = load_model(config.train.run_dir / "best.safetensors")
    assert results.method == "full fine-tuning"
    assert results.trained_parameters == sum(p.numel() for p in model.parameters()) - 1
    assert evaluate(model, read_splits(config.data)["test"]).metrics == results.text_to_image
    assert results.text_to_image != Results.read(whole / "results.json").text_to_image


@pytest.mark.slow
def test_heads_are_trained_and_resumed_but_not_in_checkpoints(config, tmp_path, monkeypatch):
    config = config.replace(losses="sdm+0.5*id+mlm")
    whole = config.replace(run_dir=tmp_path / "whole")
    results = fit(whole).results
    with monkeypatch.context() as patch:
        fail_at(patch, 8, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    fit(config.replace(resume=True))
    assert_same_run(whole.train.run_dir, config.train.run_dir)

    steps = [line for line in log_of(whole.train.run_dir) if line["kind"] == "step"]
    for line in steps:
        assert line["loss"] == pytest.approx(line["loss_sdm"] + 0.5 * line["loss_id"] + line["loss_mlm"], rel=1e-5)
    parameters = load_state(whole.train.run_dir)["parameters"]
    assert parameters["objective.id.bias"].abs().min() > 0 and parameters["objective.mlm.head.0.bias"].abs().min() > 0
    best = load_checkpoint(whole.train.run_dir / "best.safetensors").parameters
    model = load_model(whole.train.run_dir / "best.safetensors")
    assert set(best) == set(model.trained_parameters())
    assert results.trained_parameters > sum(p.numel() for p in best.values())
    assert results.all_parameters > sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_another_seed_is_another_run(config, whole):
    fit(config.replace(seed=2))
    assert log_of(whole)[2] != log_of(config.train.run_dir)[2]


@pytest.mark.slow
def test_run_folders_are_numbered_where_none_is_named(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unnamed = config.replace(run_dir=None, epochs=1, warmup_epochs=0)
    assert [fit(unnamed).run_dir for _ in range(2)] == [Path("runs/embedded-1"), Path("runs/embedded-2")]


@pytest.mark.slow
def test_bfloat16_keeps_float32_parameters(config, whole):
    fit(config.replace(precision="bf16"))
    state = load_state(config.train.run_dir)
    assert {tensor.dtype for tensor in state["parameters"].values()} == {torch.float32}
    rounded, full = (log_of(run_dir)[2]["loss"] for run_dir in (config.train.run_dir, whole))
    assert rounded != full and rounded == pytest.approx(full, rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_on_a_gpu(config, tmp_path, precision, backend, monkeypatch):
    config = config.replace(device="cuda", precision=precision, backend=backend)
    fit(config)
    assert all(math.isfinite(line["loss"]) for line in log_of(config.train.run_dir) if line["kind"] == "step")
    stopped = config.replace(run_dir=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        fail_at(patch, 8, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(stopped)
    fit(stopped.replace(resume=True))
    losses, again = ([line["loss"] for line in log_of(run) if line["kind"] == "step"]
                     for run in (config.train.run_dir, stopped.train.run_dir))  # fmt: skip
    assert again == pytest.approx(losses, rel=1e-3)


@pytest.mark.slow
def test_tensorboard(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(config.replace(tensorboard=True))
    events = EventAccumulator(str(config.train.run_dir / "tensorboard")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("step/loss")]
    written = [(line["step"], line["loss"]) for line in log_of(config.train.run_dir) if line["kind"] == "step"]
    assert logged == [(step, pytest.approx(loss)) for step, loss in written]
    shown = [(event.step, event.value) for event in events.Scalars("evaluation/val/R@1")]
    log = [line for line in log_of(config.train.run_dir) if line["kind"] in ("zero_shot", "evaluation")]
    assert shown == [(line["step"], pytest.approx(line["R@1"])) for line in log if line["split"] == "val"]
    assert shown[0][0] == 0 and len(shown) == 3
    assert events.Images("top ten")[0].step == 10
    settings = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"prefix_length" in settings and b"learning_rate" in settings
    assert [event.value for event in events.Scalars("test/R@1")]


# ------------------------------------------------------------------------------------ optimizer, schedule, selection


def test_learning_rates_by_parts_of_names():
    """The last part that a name contains decides, whatever the kind of the parameter; decay is as before."""
    names = ["text.blocks.0.lora.key_up", "objective.mlm.head.0.weight", "objective.mlm.head.0.bias", "image.bias"]
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    settings = TrainConfig(
        learning_rate=1.0, bias_learning_rate=2.0, weight_decay=0.5, learning_rates="mlm=3, bias = 4,head.0.bias=5"
    )
    require_names(parameters, settings)
    groups = build_optimizer(parameters, settings).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert [found[id(p)] for p in parameters.values()] == [(1, 0.5), (3, 0.5), (5, 0), (4, 0)]
    with pytest.raises(MethodError, match="learning_rates: no trained parameter has 'mlm' in its name; names are such"):
        require_names(names[:1], settings)


def test_schedule_is_the_golden_one(golden):
    data = golden("schedule")
    settings = TrainConfig(
        epochs=int(data["epochs"]),
        warmup_epochs=int(data["warmup_epochs"]),
        warmup_factor=float(data["warmup_factor"]),
        learning_rate=float(data["base_lr"]),
        prefix_learning_rate=5e-5,
    )
    names = ("image.blocks.0.prefix.key", "image.blocks.0.lora.key_up")
    optimizer = build_optimizer({name: torch.nn.Parameter(torch.zeros(1)) for name in names}, settings, names[:1])
    schedule = build_schedule(optimizer, settings)
    rates = []
    for _ in range(settings.epochs + 1):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    prefix, others = np.array(rates).T
    np.testing.assert_allclose(others, data["lr"], rtol=0, atol=1e-15)
    np.testing.assert_allclose(prefix, data["lr"] * 0.05, rtol=0, atol=1e-15)


def test_schedule_without_warmup():
    settings = TrainConfig(epochs=4, warmup_epochs=0, learning_rate=1.0)
    optimizer = build_optimizer({"x": torch.nn.Parameter(torch.zeros(1))}, settings)
    schedule = build_schedule(optimizer, settings)
    for epoch in range(5):
        assert schedule.get_last_lr() == pytest.approx([0.5 * (1 + math.cos(math.pi * epoch / 4))])
        optimizer.step()
        schedule.step()


def test_optimizer_is_the_golden_one(config, golden):
    data = golden("cuhk")
    decay_of = dict(zip(data["optim/names"].tolist(), data["optim/weight_decay"].tolist(), strict=True))
    parameters = AdaptedCLIP(config.model).trained_parameters()
    optimizer = build_optimizer(parameters, PRESETS["cuhk-pedes"].train)
    names = {parameter: name for name, parameter in parameters.items()}
    found = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(optimizer.param_groups) == 2
    for name, decay in found.items():
        assert decay == decay_of[name.replace(".prefix.", ".prefix_").replace(".lora.", ".lora_")], name
    assert optimizer.defaults["eps"] == data["optim/eps"] and optimizer.defaults["betas"] == tuple(data["optim/betas"])
    assert not optimizer.defaults["decoupled_weight_decay"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "scores", "splits", "epoch"),
    [
        ("val", [50, 60, 10, 30, 30, 20], ["test", *["val"] * 5, "test"], 2),
        ("val", [0, 0, 0, 0, 0, 0], ["test", *["val"] * 5, "test"], 1),
        ("best-on-test", [60, 10, 30, 20, 40], ["test"] * 6, 4),
    ],
)
def test_selection(config, monkeypatch, selection, scores, splits, epoch):
    script = Scripted(monkeypatch, scores)
    results = fit(config.replace(epochs=4, selection=selection)).results
    assert script.splits == splits
    assert (results.selection, results.epoch, results.split) == (selection, epoch, "test")
    best = load_checkpoint(config.train.run_dir / "best.safetensors")
    last = load_checkpoint(config.train.run_dir / "last.safetensors")
    same = [torch.equal(best.parameters[name], last.parameters[name]) for name in last.parameters]
    assert all(same) if epoch == 4 else not any(same)


# ------------------------------------------------------------------------------------ stopped and resumed


@pytest.mark.parametrize("step", [slow_case(1), 5, slow_case(8)])
def test_ctrl_c_saves_and_resumes(config, whole, monkeypatch, step):
    config, run_dir = config.replace(save_every=0), config.train.run_dir
    before = signal.getsignal(signal.SIGINT)  # ignored in the background of a shell
    with monkeypatch.context() as patch:
        fail_at(patch, step, interrupt)
        with pytest.raises(KeyboardInterrupt, match=f"after step {step}, .* --resume {run_dir}"):
            fit(config)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (run_dir / "results.json").exists()
    fit(config.replace(resume=True))
    assert_same_run(whole, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cskt", "dm-adapter", "irra"])
def test_every_kind_of_method_is_resumed(method, tmp_path, monkeypatch):
    """In the middle of an epoch, with losses and learning rates of the method's own recipe."""
    whole = tiny_training(tmp_path, method, run_dir=tmp_path / "whole")
    stopped = whole.replace(run_dir=tmp_path / "stopped")
    fit(whole)
    with monkeypatch.context() as patch:
        fail_at(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(stopped)
    fit(stopped.replace(resume=True))
    assert_same_run(whole.train.run_dir, stopped.train.run_dir)


@pytest.mark.slow
def test_killed_with_sigkill_and_resumed_ends_the_same(shared, tmp_path):
    whole = shared.replace(epochs=3, embedded_identities=(20, 3, 4), run_dir=tmp_path / "whole")
    killed = whole.replace(run_dir=tmp_path / "killed")
    run_dir = killed.train.run_dir
    kill_when(start(*flags_of(killed)), run_dir, "step", 5)  # within the first epoch
    with open(run_dir / "metrics.jsonl", "ab") as log:
        log.write(b'{"kind": "step", "st')  # a half-written line
    position = load_state(run_dir)["progress"]
    assert position["epoch"] == 1 and 0 < position["batch"] <= 6

    kill_when(start("--resume", run_dir), run_dir, "evaluation", 20)  # while it saves the second epoch
    assert not (run_dir / "results.json").exists()

    fit(whole)
    fit(killed.replace(resume=True))
    assert_same_run(whole.train.run_dir, run_dir)


@pytest.mark.slow
def test_a_run_killed_before_its_first_state_starts_anew(config, whole):
    run_dir = config.train.run_dir
    run_dir.mkdir()
    (run_dir / "config.json").write_text(config.to_json())
    (run_dir / "metrics.jsonl").write_text('{"kind": "zero_shot", "step": 0, "spl')
    fit(config.replace(resume=True))
    assert_same_run(whole, run_dir)


def test_resuming_a_finished_run_repeats_its_result(config, whole):
    shutil.copytree(whole, config.train.run_dir)
    fit(config.replace(resume=True))
    assert_same_run(whole, config.train.run_dir)


@pytest.mark.slow
def test_a_state_of_an_earlier_version_is_continued(config, whole, monkeypatch, capsys):
    """From before a training could start from a checkpoint, and before a state had a fingerprint of the data."""
    with monkeypatch.context() as patch:
        fail_at(patch, 8, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    state = load_state(config.train.run_dir)
    assert state["progress"].pop("start") is None
    with monkeypatch.context() as patch:
        patch.setitem(VERSIONS, RESUME_STATE, ("1",))
        save_state(config.train.run_dir, state, config, {})
    fit(config.replace(resume=True))
    assert "resume.safetensors is of an earlier version; whether the data has changed" in capsys.readouterr().out
    assert_same_run(whole, config.train.run_dir)


@pytest.mark.slow
def test_resume_does_not_need_the_other_files(config, whole, monkeypatch):
    """Checkpoints that are missing, or of another moment, do not change what a resumed run ends with."""
    run_dir = config.train.run_dir
    with monkeypatch.context() as patch:
        fail_at(patch, 8, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    (run_dir / "best.safetensors").unlink()
    (run_dir / "last.safetensors").write_bytes(b"damaged")
    fit(config.replace(resume=True))
    assert_same_run(whole, run_dir)


def test_random_states_come_back():
    import random

    states = random_states()

    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand(2).tolist()

    first = draw()
    assert draw() != first
    set_random_states(states)
    assert draw() == first


TRAINS = """
import os, pathlib, sys, time
from upperson.train.run_folder import locked
with locked(pathlib.Path(sys.argv[1])):
    if os.fork():
        print(flush=True)
    time.sleep(30)
"""


@pytest.mark.slow
def test_one_process_at_a_time_trains_in_a_folder(config, whole):
    """A child of the one that does, as data loaders are, does not keep the lock when that is killed."""
    run_dir = config.train.run_dir
    shutil.copytree(whole, run_dir)
    (run_dir / "results.json").unlink()  # it is not finished
    other = subprocess.Popen([sys.executable, "-c", TRAINS, run_dir], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"\n"
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(RunError, match=f"{run_dir} is in use by another training process"):
        fit(config.replace(resume=True))
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    other.kill()
    other.wait()
    fit(config.replace(resume=True))
    assert_same_run(whole, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_of_processes_that_start_at_once_one_trains(config, whole, resume):
    """The others end with one line, and change no file of the one that trains."""
    run_dir = config.train.run_dir
    if resume:
        shutil.copytree(whole, run_dir)
        (run_dir / "results.json").unlink()
    flags = ["--resume", run_dir] if resume else flags_of(config)
    processes = [start(*flags) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    ended = sorted(process.returncode for process in processes)
    assert ended[0] == 0 and set(ended) <= {0, 1} and (resume or ended == [0, 1]), errors
    for process, error in zip(processes, errors, strict=True):
        lines = error.strip().splitlines()
        refused = f"error: {run_dir} (is in use by another|was in use by another|already contains a run)"
        assert not process.returncode or (len(lines) == 1 and re.match(refused, lines[0])), error
    assert_same_run(whole, run_dir)


# ------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("value", [math.nan, slow_case(math.inf)])
def test_a_loss_that_is_not_finite_stops_before_the_step(config, whole, monkeypatch, value):
    run_dir = config.train.run_dir
    with monkeypatch.context() as patch:
        fail_at(patch, 8, lambda loss: loss * value)
        with pytest.raises(RunError, match=f"epoch 2, step 8: the loss is {value}"):
            fit(config)
    checkpoint = load_checkpoint(run_dir / "last.safetensors")
    assert checkpoint.epoch == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint.parameters.values())
    assert log_of(run_dir)[-1]["step"] == 7
    fit(config.replace(resume=True))
    assert_same_run(whole, run_dir)


def test_a_gradient_that_is_not_finite_stops_before_the_step(config, monkeypatch):
    def poison(loss):
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    fail_at(monkeypatch, 3, poison)
    with pytest.raises(RunError, match="epoch 1, step 3: the gradient's norm is nan"):
        fit(config)
    state = load_state(config.train.run_dir)
    assert state["progress"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["parameters"].values())


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_loses_nothing(config, whole, monkeypatch):
    run_dir = config.train.run_dir
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(loss):  # the state of step 4 needs more than there is
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        return loss

    try:
        with monkeypatch.context() as patch:
            fail_at(patch, 4, fill)
            with pytest.raises(OSError, match="resume.safetensors could not be written .File too large"):
                fit(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_state(run_dir)["progress"]["step"] == 2
    assert not list(run_dir.glob(".*"))
    fit(config.replace(resume=True))
    assert_same_run(whole, run_dir)


def test_a_used_folder_is_refused(shared, whole):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(RunError, match="already contains a run .*--resume"):
        fit(shared)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_resuming_with_another_configuration_names_the_fields(shared, whole):
    with pytest.raises(RunError, match="another configuration: lora_rank: 2, not 8; epochs: 3, not 2 as before"):
        fit(shared.replace(resume=True, epochs=3, lora_rank=2, workers=1))


def test_resume_refuses_what_it_cannot_continue(config, whole):
    resumed = config.replace(resume=True)
    with pytest.raises(RunError, match="no run to resume"):
        fit(resumed)
    shutil.copytree(whole, config.train.run_dir)
    (config.train.run_dir / "results.json").unlink()  # it is not finished
    log = config.train.run_dir / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:100])
    with pytest.raises(RunError, match="metrics.jsonl has been changed: it is shorter than"):
        fit(resumed)
    state = config.train.run_dir / "resume.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="resume.safetensors: truncated"):
        fit(resumed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(precision="fp16"), "precision: fp16 needs a CUDA GPU"),
        (dict(device="cuda:99"), "device: cuda:99 is not available"),
        (dict(depth_prefix=0, depth_lora=0, depth_adapter=2), "nothing to train"),
    ],
)
def test_settings_that_cannot_run(config, changes, message):
    with pytest.raises(RunError, match=message):
        fit(config.replace(**changes))
    assert not config.train.run_dir.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rates="mlm=0.1"), "learning_rates: no trained parameter has 'mlm' in its name"),
        (dict(losses="sdm+id", learning_rates="bias=0.1, objective.mlm=1"), "no trained parameter has 'objective.mlm'"),
        (dict(prefix="none", prefix_learning_rate=0.1), "prefix_learning_rate: no prefix is trained"),
        (dict(freeze="prefix", learning_rates="prefix=0.1"), "no trained parameter has 'prefix'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_learning_rates_of_nothing(config, changes, message):
    """They are refused before there is a folder, which would count as the newest run."""
    with pytest.raises(MethodError, match=message):
        fit(config.replace(**changes))
    assert not config.train.run_dir.exists()


def test_the_losses_that_are_checked_are_not_those_of_the_training(config):
    """The heads are found, and the random numbers of the training are untouched."""
    splits = read_splits(config.data)
    config = config.replace(losses="sdm+id+mlm", learning_rates="objective.id=0.1, mlm.head=0.2")
    model, state = build_model(config), torch.get_rng_state()
    first = build_first(config.stages(), splits["train"], torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.trained_parameters().values(), model.trained_parameters().values()))


def test_tensorboard_that_is_not_installed(config, monkeypatch):
    monkeypatch.setattr("upperson.train.fit.find_spec", lambda name: None)
    with pytest.raises(RunError, match="tensorboard: the package is not installed"):
        fit(config.replace(tensorboard=True))
    assert not config.train.run_dir.exists()


def test_command_line_shows_errors_in_a_line(config, tmp_path, monkeypatch, capsys):
    flags = flags_of(config.replace(dataset="cuhk-pedes", data_root=tmp_path / "nowhere"))
    assert run_command(monkeypatch, *flags) == 1
    *before, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: CUHK-PEDES: folder {tmp_path / 'nowhere'} does not exist")
    assert before and all("has no effect here" in line for line in before)  # the flags are all fields
    assert run_command(monkeypatch, *flags, "--epochs", "none") == 2
    assert not config.train.run_dir.exists()


def test_a_device_that_is_not_there_is_one_line(config, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert run_command(monkeypatch, *flags_of(config.replace(device="mps"))) == 1
    message = "error: device: mps is not available; PyTorch finds no Apple GPU on this machine\n"
    assert capsys.readouterr() == ("", message)


def test_command_line_prints_how_to_resume(config, monkeypatch, capsys):
    fail_at(monkeypatch, 3, interrupt)
    assert run_command(monkeypatch, *flags_of(config)) == 130
    assert f"resume with --resume {config.train.run_dir}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ a data set in files


@pytest.mark.filterwarnings("ignore:CUHK-PEDES")  # of its size, which is not the published one
def test_without_a_validation_split_the_last_epoch_is_selected(config, tmp_path):
    root = cuhk_pedes(tmp_path / "data", train=6, test=3)
    result = fit(config.replace(dataset="cuhk-pedes", data_root=root, batch_size=3))
    assert (result.results.selection, result.results.epoch, result.results.captions) == ("last", 2, 3)
    assert "no validation split" in (result.run_dir / "results.md").read_text()
    splits = {line["split"] for line in log_of(result.run_dir) if line["kind"] == "evaluation"}
    assert splits == {"test"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUHK-PEDES")
def test_an_image_cache_changes_nothing(config, tmp_path):
    """A run that finds it does not read the files any more, but for those in the picture of the top ten."""
    root = cuhk_pedes(tmp_path / "data", train=6, test=3)
    config = config.replace(dataset="cuhk-pedes", data_root=root, batch_size=3)
    plain = fit(config).run_dir
    cached = config.replace(image_cache=tmp_path / "cache", run_dir=tmp_path / "cached")
    assert_same_run(plain, fit(cached).run_dir)
    for image in (root / "imgs" / "CUHK01" / f"{index}.jpg" for index in range(6)):
        stamp = image.stat()
        image.write_bytes(bytes(stamp.st_size))
        os.utime(image, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert_same_run(plain, fit(cached.replace(run_dir=tmp_path / "again")).run_dir)


@pytest.mark.filterwarnings("ignore:CUHK-PEDES")
def test_a_broken_image_stops_before_the_first_epoch(config, tmp_path):
    root = cuhk_pedes(tmp_path / "data", train=6, test=3)
    config = config.replace(dataset="cuhk-pedes", data_root=root, batch_size=3)
    broken = root / "imgs" / "CUHK01" / "4.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match="4.jpg"):
        fit(config)
    assert not config.train.run_dir.exists()
    with pytest.raises(DataError, match="1 of [0-9]+ images cannot be read"):
        fit(config.replace(image_cache=tmp_path / "cache"))
    with pytest.raises(DataError) as found:
        fit(config.replace(check_images=False, workers=1))
    assert str(found.value).startswith(f"{broken}: image is broken")  # from a loader's process, without its traceback
    assert (config.train.run_dir / "resume.safetensors").exists()


def test_a_data_set_needs_its_folder(config):
    with pytest.raises(DataError, match="rstpreid is read from a folder; set it with --data-root"):
        fit(config.replace(dataset="rstpreid"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUHK-PEDES")
def test_an_epoch_of_cuhk_pedes_at_full_size(tmp_path):
    """The preset as it is, but for the weights (there is no network), the batch and the number of epochs."""
    root = cuhk_pedes(tmp_path / "data", train=4, test=2)
    result = fit(
        PRESETS["cuhk-pedes"].replace(
            pretrained="none",
            device="cpu",
            backend="torch",
            data_root=root,
            batch_size=2,
            epochs=1,
            warmup_epochs=0,
            workers=0,
            run_dir=tmp_path / "run",
        )  # fmt: skip
    )
    assert result.results.trained_parameters == 7_419_816
    assert len(load_checkpoint(result.run_dir / "last.safetensors").parameters) == 504
    assert 29e6 < (result.run_dir / "last.safetensors").stat().st_size < 30e6
    assert [line["step"] for line in log_of(result.run_dir) if line["kind"] == "epoch"] == [2]
