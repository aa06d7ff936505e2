"""Trainings in stages: each starts from the one before and leaves the rest as it is, and nothing is lost on the way."""

import os
import shutil

import pytest
import torch
from tiny import (
    Scripted,
    assert_same_run,
    fail_at,
    flags_of,
    interrupt,
    kill_when,
    log_of,
    run_command,
    start,
    tiny_training,
)

from upperson.data import read_splits
from upperson.errors import CheckpointError, MethodError, RunError, RunInterrupted
from upperson.evaluate.embed import evaluate
from upperson.evaluate.results import Results
from upperson.model import AdaptedCLIP, load_model
from upperson.model.checkpoint import load_checkpoint
from upperson.tables.runs import Runs
from upperson.train.fit import fit
from upperson.train.loop import Training
from upperson.train.resume import load_state

pytestmark = pytest.mark.slow
STAGES = ("prompts", "encoders")
WHOLE = ("best.safetensors", "config.json", "curve.png", "metrics.jsonl", "results.json", "results.md", "top10.png")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Two stages of two epochs of five steps on the embedded set, with a tiny random CLIP."""
    folder = tmp_path_factory.mktemp("shared")
    return tiny_training(
        folder, "prompt-decoupling", prompt_length=2, encoder_epochs=2, encoder_warmup_epochs=0,
        encoder_learning_rate=1e-3, learning_rate=0.1, run_dir=folder / "whole",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(shared):
    """The folder of that run, never stopped: to compare with, not to change."""
    return fit(shared).run_dir


@pytest.fixture
def config(shared, tmp_path):
    """The same run in a folder of its own."""
    return shared.replace(run_dir=tmp_path / "run")


@pytest.fixture
def one_stage(config):
    """A run without stages, of the default method, on the same data and backbone."""
    return config.replace(method="up-person", learning_rate=0.01, prefix_length=2, lora_rank=2)


def results_of(folder):
    return Results.read(folder / "results.json")


def assert_same_stages(first, second):
    """Bitwise equal in every file of the run and of its stages."""
    for name in STAGES:
        assert_same_run(first / name, second / name)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted([*WHOLE, *STAGES]) == sorted(path.name for path in second.iterdir())
    for name in sorted(set(WHOLE) - {"best.safetensors", "config.json"}):  # these name their folder
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for folder in (first, second):
        assert (folder / "best.safetensors").read_bytes() == (folder / STAGES[-1] / "best.safetensors").read_bytes()


# ------------------------------------------------------------------------------------ what the stages leave


def test_the_whole_leaves_what_a_run_leaves_with_a_row_for_each_stage(config, whole, capsys):
    result = fit(config)
    run_dir = config.train.run_dir
    assert_same_stages(whole, run_dir)
    assert result.run_dir == run_dir and result.results == results_of(run_dir)
    assert (run_dir / "config.json").read_text() == config.to_json()

    results, (first, second) = result.results, [results_of(run_dir / name) for name in STAGES]
    titles = [stage.title for stage, _ in config.stages()]
    assert results.stages == tuple(
        found.replace(stage=name, title=title)
        for name, title, found in zip(STAGES, titles, (first, second), strict=True)
    )
    assert (results.method, results.text_to_image) == ("Prompt Decoupling", second.text_to_image)
    assert results.zero_shot == first.zero_shot == second.zero_shot and results.start is None

    model = load_model(run_dir / "best.safetensors")
    assert load_checkpoint(run_dir / "best.safetensors").config.model.method.stage == "encoders"
    assert evaluate(model, read_splits(config.data)["test"]).metrics == results.text_to_image
    count = sum(parameter.numel() for parameter in model.adaptation().values())
    assert results.trained_parameters == count == first.trained_parameters + second.trained_parameters

    rows = [line.split("|")[1].strip() for line in (run_dir / "results.md").read_text().splitlines() if "|" in line]
    assert rows[2:] == ["zero-shot CLIP", *titles]
    assert [(line["name"], line["mAP"]) for line in log_of(run_dir)] == [
        (name, found.text_to_image["mAP"]) for name, found in zip(STAGES, (first, second), strict=True)
    ]
    shown = capsys.readouterr().out
    for number, title in enumerate(titles, 1):
        assert shown.count(f"stage {number} of 2: {title}\n") == 1
    best = run_dir / "prompts" / "best.safetensors"
    assert f"start   {best}, 4 parameter tensors; the other 61 have their usual initial values\n" in shown


def test_a_stage_changes_what_is_its_own_and_nothing_else(config, monkeypatch):
    """Stage two starts from the best epoch of stage one, which is not its last."""
    Scripted(monkeypatch, [0, 0, 50, 40])  # zero-shot on test and val, two epochs
    left, real = [], Training.finish

    def finish(training):
        left.append({name: parameter.detach().clone() for name, parameter in training.model.named_parameters()})
        return real(training)

    monkeypatch.setattr(Training, "finish", finish)
    fit(config)
    run_dir = config.train.run_dir
    best, last = (load_checkpoint(run_dir / "prompts" / f"{name}.safetensors").parameters for name in ("best", "last"))
    assert results_of(run_dir / "prompts").epoch == 1
    assert not any(torch.equal(best[name], last[name]) for name in best)
    for name in ("best", "last"):  # of stage two: the frozen are in it, too
        parameters = load_checkpoint(run_dir / "encoders" / f"{name}.safetensors").parameters
        assert len(parameters) == 65 and all(torch.equal(parameters[prompt], best[prompt]) for prompt in best)

    torch.manual_seed(config.train.seed)
    before = dict(AdaptedCLIP(config.stages()[0][1].model).named_parameters())
    for name, values in before.items():
        prompts, encoders = (torch.equal(values, parameters[name]) for parameters in left)
        is_prompt = ".prompt." in name
        assert prompts != is_prompt, name  # CLIP is bitwise what it was
        assert encoders == (name == "clip.logit_scale"), name


def test_stage_two_is_measured_before_it_changes_anything(whole):
    first, second = (log_of(whole / name) for name in STAGES)
    zero_shot = [[line for line in log if line["kind"] == "zero_shot"] for log in (first, second)]
    assert zero_shot[0] == zero_shot[1] and len(zero_shot[0]) == 2
    begun = {line["split"]: line for line in second if line["kind"] == "start"}
    selected = next(
        line for line in first if line["kind"] == "evaluation" and line["epoch"] == results_of(whole / "prompts").epoch
    )
    assert begun["val"] | {"kind": "evaluation", "epoch": selected["epoch"], "step": selected["step"]} == selected
    results = results_of(whole / "encoders")
    assert results.start == results_of(whole / "prompts").text_to_image != results.zero_shot
    assert begun["test"] == {"kind": "start", "step": 0, "split": "test", **results.start}
    history = load_state(whole / "encoders")["progress"]["history"]
    assert history[0] == {"epoch": 0, **{name: begun["val"][name] for name in results.start}}


def test_the_stages_one_by_one_are_the_whole(config, whole, tmp_path):
    method = config.model.method
    first = fit(config.replace(stage="prompts", run_dir=tmp_path / "prompts")).run_dir
    second = fit(config.replace(
        stage="encoders", freeze="prompt", start_from=first / "best.safetensors", epochs=method.encoder_epochs,
        warmup_epochs=method.encoder_warmup_epochs, learning_rate=method.encoder_learning_rate,
        losses=method.encoder_losses, run_dir=tmp_path / "encoders",
    )).run_dir  # fmt: skip
    assert_same_run(first, whole / "prompts")
    assert_same_run(second, whole / "encoders")


def test_tables_take_it_as_one_run(config, whole, tmp_path):
    runs = Runs(tmp_path, {"device": "cpu"})
    config = config.replace(run_dir=None)
    assert not runs.is_done(config)
    runs.train(config)
    assert runs.is_done(config)
    assert_same_stages(whole, runs.folder_of(config))


# ------------------------------------------------------------------------------------ stopped and resumed


def test_killed_in_each_stage_and_resumed_ends_the_same(config, whole):
    run_dir = config.train.run_dir
    kill_when(start(*flags_of(config)), run_dir / "prompts", "step", 3)
    kill_when(start("--resume", run_dir), run_dir / "encoders", "step", 8)
    assert not (run_dir / "results.json").exists()
    fit(config.replace(resume=True))
    assert_same_stages(whole, run_dir)


class Killed(BaseException):
    """In the place of SIGKILL."""


@pytest.mark.parametrize("file", [
    "prompts/resume.safetensors", "prompts/results.json", "encoders/config.json", "encoders/resume.safetensors",
    "encoders/results.json", "best.safetensors", "results.json",
])  # fmt: skip
def test_ended_while_a_file_is_written_and_resumed_ends_the_same(config, whole, monkeypatch, file):
    run_dir, real = config.train.run_dir, os.replace

    def replace(source, target):
        if target == run_dir / file:
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            fit(config)
    assert not (run_dir / "results.json").exists()
    fit(config.replace(resume=True))
    assert_same_stages(whole, run_dir)


@pytest.mark.parametrize(("step", "message"), [
    (3, "after step 3, the state is saved"),
    (10, "stopped before stage 2 of 2: task adaptation, encoders"),                         # the last one of stage one
    (13, "after step 3, the state is saved"),
])  # fmt: skip
def test_ctrl_c_names_the_whole_and_the_rest_follows(config, whole, monkeypatch, step, message):
    run_dir = config.train.run_dir
    with monkeypatch.context() as patch:
        fail_at(patch, step, interrupt)
        with pytest.raises(RunInterrupted, match=f"{message}; resume with --resume {run_dir}$"):
            fit(config)
    assert (run_dir / "encoders").exists() == (step > 10)
    fit(config.replace(resume=True))
    assert_same_stages(whole, run_dir)


def test_resuming_trains_no_finished_stage_again_and_needs_its_place_no_more(config, whole, monkeypatch, capsys):
    """The folder may move; a stage under way does not read the checkpoint again that it started from."""
    with monkeypatch.context() as patch:
        fail_at(patch, 16, interrupt)
        with pytest.raises(RunInterrupted):
            fit(config)
    moved = config.train.run_dir.rename(config.train.run_dir.with_name("moved"))
    checkpoint = moved / "prompts" / "best.safetensors"
    kept = checkpoint.read_bytes()
    checkpoint.write_bytes(b"damaged")
    capsys.readouterr()
    fail_at(monkeypatch, 6, lambda loss: pytest.fail("there were five steps to do"))
    fit(config.replace(resume=True, run_dir=moved))
    first = results_of(whole / "prompts").text_to_image
    assert (
        f"stage 1 of 2: domain adaptation, prompts, is finished; test R@1 {first['R@1']:5.2f}"
        in capsys.readouterr().out
    )
    checkpoint.write_bytes(kept)
    assert_same_stages(whole, moved)


def test_resuming_what_is_finished_repeats_its_result(config, whole):
    run_dir = config.train.run_dir
    shutil.copytree(whole, run_dir)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    fit(config.replace(resume=True))
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_another_configuration_or_a_used_folder_is_refused(shared, whole):
    with pytest.raises(RunError, match="another configuration: encoder_epochs: 3, not 2; epochs: 4, not 2 as before"):
        fit(shared.replace(resume=True, encoder_epochs=3, epochs=4, workers=1))
    with pytest.raises(RunError, match="another configuration: stage: encoders, not both; "):
        fit(shared.replace(resume=True, stage="encoders"))
    with pytest.raises(RunError, match="already contains a run .*--resume"):
        fit(shared)


# ------------------------------------------------------------------------------------ any method: start from, freeze


def test_any_method_trains_in_stages(one_stage, tmp_path, monkeypatch):
    """First the prefixes, then all the rest; stopped and resumed, with a head that is trained along."""
    config = one_stage.replace(losses="sdm+id")
    first = fit(config.replace(freeze="lora+adapter_attn+adapter_mlp", run_dir=tmp_path / "first")).run_dir
    second = config.replace(freeze="prefix", start_from=first / "best.safetensors", run_dir=tmp_path / "second")
    fit(second)
    assert_no_difference_when_stopped(second, tmp_path / "stopped", monkeypatch)

    torch.manual_seed(config.train.seed)
    initial = AdaptedCLIP(config.model).adaptation()
    start, end = (load_checkpoint(tmp_path / name / "best.safetensors").parameters for name in ("first", "second"))
    assert set(initial) == set(start) == set(end)
    for name, values in initial.items():
        assert torch.equal(values, start[name]) == (".prefix." not in name), name
        assert torch.equal(start[name], end[name]) == (".prefix." in name), name
    prefixes = sum(values.numel() for name, values in initial.items() if ".prefix." in name)
    everything, head = sum(values.numel() for values in initial.values()), 10 * 16 + 10
    found = [results_of(tmp_path / name).trained_parameters for name in ("first", "second")]
    assert found == [prefixes + head, everything - prefixes + head]


def assert_no_difference_when_stopped(config, run_dir, monkeypatch):
    stopped = config.replace(run_dir=run_dir)
    with monkeypatch.context() as patch:
        fail_at(patch, 8, interrupt)
        with pytest.raises(RunInterrupted, match=f"--resume {run_dir}$"):
            fit(stopped)
    fit(stopped.replace(resume=True))
    assert_same_run(config.train.run_dir, run_dir)


def test_what_a_checkpoint_lacks_keeps_its_initial_values(one_stage, tmp_path, capsys):
    short = one_stage.replace(epochs=1, warmup_epochs=0)
    prefixes = short.replace(lora="none", adapter_attn="none", adapter_mlp="none", run_dir=tmp_path / "prefixes")
    path = fit(prefixes).run_dir / "best.safetensors"
    taken = load_checkpoint(path).parameters
    results = fit(short.replace(start_from=path, learning_rate=1e-12, run_dir=tmp_path / "all")).results
    end = load_checkpoint(tmp_path / "all" / "best.safetensors").parameters
    torch.manual_seed(short.train.seed)
    initial = AdaptedCLIP(short.model).adaptation()
    assert set(taken) < set(end) == set(initial)
    for name, values in end.items():
        torch.testing.assert_close(values, taken.get(name, initial[name]), rtol=0, atol=1e-6, check_device=False)
    others = len(end) - len(taken)
    assert f"start   {path}, {len(taken)} parameter tensors; the other {others} have" in capsys.readouterr().out
    assert results.start == results_of(tmp_path / "prefixes").text_to_image
    assert "| start " in (tmp_path / "all" / "results.md").read_text()


def test_zero_shot_is_clip_even_where_a_fine_tuned_one_is_started_from(one_stage, tmp_path):
    full = one_stage.replace(method="full", epochs=1, warmup_epochs=0, learning_rate=1e-3)
    path = fit(full).run_dir / "best.safetensors"
    before, after = (
        results_of(fit(full.replace(run_dir=tmp_path / name, **changes)).run_dir)
        for name, changes in (("first", {}), ("second", {"start_from": path}))
    )
    assert after.zero_shot == before.zero_shot != before.text_to_image == after.start


# ------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"freeze": "prefix+lore"}, MethodError, "does not train 'lore'; expected kinds of prefix, lora, adapter_attn, "
                                             "adapter_mlp, joined by [+]"),
    ({"freeze": "prefix+lora+adapter_attn+adapter_mlp"}, RunError, "nothing to train: .* --freeze leave no parameter"),
    ({"freeze": "clip"}, MethodError, "freeze: method up-person .* does not train 'clip'"),
    ({"freeze": "prefix+"}, MethodError, "freeze: method up-person .* does not train ''"),
    ({"freeze": " "}, MethodError, "freeze: method up-person .* does not train ''"),
    ({"start_from": "nowhere.safetensors"}, CheckpointError, "nowhere.safetensors: there is no such file"),
    ({"start_from": "prompts/resume.safetensors"}, CheckpointError, "expected an upperson checkpoint, found an upp"),
    ({"start_from": "prompts/best.safetensors"}, CheckpointError, "a checkpoint of Prompt Decoupling's prompts, which "
                                                                  "does not fit UP-Person: 4 unexpected: image"),
    ({"start_from": "prompts/best.safetensors", "image_size": (32, 16)}, CheckpointError,
     r"start_from is a checkpoint of another backbone, image_size: \(48, 16\), not \(32, 16\) as in this training"),
    ({"start_from": "prompts/best.safetensors", "model": "embedded", "pretrained": "embedded"}, CheckpointError,
     "another backbone, model: .*tiny.json, not embedded; pretrained: none, not embedded as in this training"),
    ({"start_from": "prompts/best.safetensors", "seed": 2}, CheckpointError, "another backbone, seed: 1, not 2"),
])  # fmt: skip
def test_what_cannot_be_frozen_or_started_from(one_stage, whole, changes, error, message):
    if "start_from" in changes:
        changes = changes | {"start_from": whole / changes["start_from"]}
    with pytest.raises(error, match=message):
        fit(one_stage.replace(**changes))
    assert not one_stage.train.run_dir.exists()


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"prompt_length": 3}, CheckpointError, r"4 of another shape: .* \(2, 32\), expected \(3, 32\)"),
    ({"start_from": "best.safetensors"}, CheckpointError, "does not fit .* 61 unexpected: ln_final"),
    ({"freeze": "prompt"}, RunError, "nothing to train"),
    ({"depth_prompt": 3}, MethodError, "depth_prompt: 3 is more than the number of blocks"),
])  # fmt: skip
def test_stages_that_cannot_be_trained(config, whole, changes, error, message):
    checkpoint = whole / changes.pop("start_from", "prompts/best.safetensors")
    with pytest.raises(error, match=message):
        fit(config.replace(start_from=checkpoint, **changes))
    assert not config.train.run_dir.exists()


def test_the_command_line_shows_them_in_a_line(one_stage, tmp_path, monkeypatch, capsys):
    flags = flags_of(one_stage.replace(start_from=tmp_path / "nowhere.safetensors", freeze="prefix"))
    assert run_command(monkeypatch, *flags) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'nowhere.safetensors'}: there is no such file; expected an upperson checkpoint\n"
    )


def test_the_folder_of_a_stage_that_holds_another_run_is_not_touched(config, whole, tmp_path):
    """Neither by a new training, nor by a resumed one in whose folder somebody has put it."""
    place = tmp_path / "run" / "prompts"
    shutil.copytree(whole / "prompts", place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(RunError, match=r"prompts already contains a run \(config.json\)"):
        fit(config.replace(losses="itc"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["prompts"]

    (tmp_path / "run" / "config.json").write_text(config.replace(losses="itc").to_json())
    with pytest.raises(RunError, match="prompts: the run was started with another configuration: losses: itc, not sdm"):
        fit(config.replace(losses="itc", resume=True))
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_biases_of_stage_two_have_its_learning_rate(config):
    (_, first), (_, second) = config.replace(bias_learning_rate=0.5).stages()
    assert (first.train.bias_learning_rate, second.train.bias_learning_rate) == (0.5, None)


def test_a_checkpoint_without_parameters_is_no_start(one_stage, tmp_path):
    fit(one_stage.replace(method="zero-shot", run_dir=tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="start_from is a checkpoint without parameters"):
        fit(one_stage.replace(start_from=tmp_path / "nothing" / "best.safetensors"))


def test_a_learning_rate_for_prefixes_needs_some(config):
    with pytest.raises(MethodError, match="prefix_learning_rate: no prefix is trained"):
        fit(config.replace(prefix_learning_rate=0.1))


def test_stage_two_by_hand_is_trained_as_its_options_say(config, whole, tmp_path):
    with pytest.raises(RunError, match="start_from: with these options .* continues an earlier training"):
        fit(config.replace(stage="encoders"))
    by_hand = config.replace(
        stage="encoders", start_from=whole / "prompts" / "best.safetensors", run_dir=tmp_path / "by-hand"
    )
    assert fit(by_hand).results.text_to_image == results_of(whole).text_to_image
    assert fit(by_hand.replace(resume=True)).results.text_to_image == results_of(whole).text_to_image
