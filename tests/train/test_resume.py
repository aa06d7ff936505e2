"""What a resumed run compares with the run before it: the configuration, the data, the format of the state."""

import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from operators import slow_case
from safetensors.torch import load, save_file
from tiny import fail_at, interrupt, tiny_training, write_image

from upperson.config import Config
from upperson.config.configuration import SECTIONS
from upperson.data.fingerprint import data_differences, fingerprint
from upperson.data.samples import Sample
from upperson.errors import CheckpointError, RunError, RunInterrupted
from upperson.fields import fields_of
from upperson.model.tensor_files import RESUME_STATE, read_metadata, read_tensors, write_tensors
from upperson.train.fit import fit
from upperson.train.interruption import Interruption
from upperson.train.log import history_of
from upperson.train.resume import load_state, save_state
from upperson.train.run_folder import locked

EDITS = dict(
    image_size=[32, 16], embedded_identities=[10, 3, 5], embedded_views=3, embedded_seed=1, mask_captions=True,
    epochs=3, batch_size=9, learning_rate=0.02, bias_learning_rate=0.02, prefix_learning_rate=0.02,
    learning_rates="bias=0.02", weight_decay=0.1,
    adam_epsilon=1e-4, warmup_epochs=0, warmup_factor=0.2, losses="itc", temperature=0.05, freeze="prefix",
    start_from="other.safetensors", precision="bf16", frozen_weights="cast", seed=2, selection="best-on-test",
    log_every=3, dataset="embedded-night", pretrained="other", model="other.json",
)  # fmt: skip
ALLOWED = dict(workers=1, device="auto", evaluate_batch_size=7, save_every=1, check_images=False, skip_unread=False)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped after its third step."""
    folder = tmp_path_factory.mktemp("stopped")
    config = tiny_training(folder, embedded_identities=(5, 2, 2), batch_size=5, run_dir=folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    return config.train.run_dir


@pytest.fixture
def run_dir(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "copy")


def resumed(run_dir):
    """Resumes a run as `--resume RUN_DIR` does: with the configuration of the folder."""
    config = Config.from_json((run_dir / "config.json").read_text())
    return fit(config.replace(resume=True, run_dir=run_dir))


def edit(run_dir, name, value):
    content = json.loads((run_dir / "config.json").read_text())
    section = next(part for part in (*content.values(), content["model"]["method"]) if name in part)
    assert section[name] != value
    section[name] = value
    (run_dir / "config.json").write_text(json.dumps(content))


def test_every_field_that_changes_results_is_edited():
    fields = {spec.name for section in SECTIONS.values() for spec, _ in fields_of(section)
              if spec.metadata["changes_results"]}  # fmt: skip
    assert fields == {*EDITS, "method"}


@pytest.mark.parametrize(("name", "value"), [*EDITS.items(), ("lora_rank", 3), ("prefix_scale", 2.0)])
def test_an_edit_of_the_configuration_is_named(run_dir, name, value):
    edit(run_dir, name, value)
    with pytest.raises(RunError, match="resume.safetensors: the run was saved with another config") as raised:
        resumed(run_dir)
    assert f" {name}: " in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("link", [False, True])
def test_a_lost_state_does_not_start_the_training_again(run_dir, link):
    """Which would overwrite the checkpoints. A run that was killed before its first state has no checkpoints."""
    (run_dir / "resume.safetensors").unlink()
    if link:
        (run_dir / "resume.safetensors").symlink_to("nowhere")
    (run_dir / "last.safetensors").write_bytes(before := b"of an epoch")
    with pytest.raises(RunError, match="resume.safetensors is missing, but last.safetensors of this run is there"):
        resumed(run_dir)
    assert (run_dir / "last.safetensors").read_bytes() == before


def test_another_method_is_named(run_dir):
    config = Config.from_json((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(config.replace(method="cskt").to_json())
    with pytest.raises(RunError, match="another configuration: method: cskt, not up-person as before"):
        resumed(run_dir)


@pytest.mark.slow
def test_what_does_not_change_results_may_change(run_dir):
    for name, value in ALLOWED.items():
        edit(run_dir, name, value)
    assert (resumed(run_dir).run_dir / "results.json").exists()


# ------------------------------------------------------------------------------------ the data


ROWS = [
    (f"{number}.png", f"a man in coat {number}", f"person {number // 2}", split)
    for split, numbers in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, 14)))
    for number in numbers
]


def write_rows(file, rows):
    with open(file, "w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([("image", "caption", "identity", "split"), *rows])


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A user's own data, and the folder of a run on it that was stopped."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "data").mkdir()
    for name, *_ in ROWS:
        write_image(folder / "data" / name, int(name.split(".")[0]))
    write_rows(folder / "data" / "captions.csv", ROWS)
    config = tiny_training(folder, dataset="folder", data_root=folder / "data", batch_size=4, run_dir=folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    return folder


def changed_caption(rows):
    return [(rows[0][0], "a man in coat 100", *rows[0][2:]), *rows[1:]]


def changed_identity(rows):
    return [(*rows[0][:2], "person 3", rows[0][3]), *rows[1:]]


CHANGES = {
    "train has another order": lambda rows: [*rows[7::-1], *rows[8:]],
    "train has other captions": changed_caption,
    "train has other identities": changed_identity,
    "train has other images": lambda rows: [("3.png", *rows[0][1:]), *rows[1:]],
    "train has 7 captions, not 8": lambda rows: rows[1:],
    "split val is missing": lambda rows: [*rows[:8], *rows[10:]],
    "test has 5 captions, not 4": lambda rows: [*rows, ("10.png", "one more caption", *rows[10][2:])],
}


@pytest.mark.parametrize("words", [slow_case(words) if number > 2 else words for number, words in enumerate(CHANGES)])
@pytest.mark.filterwarnings("ignore:Own data")
def test_changed_data_is_named(own_data, tmp_path, words):
    folder = shutil.copytree(own_data, tmp_path / "copy")
    write_rows(folder / "data" / "captions.csv", CHANGES[words](ROWS))
    edit(folder / "run", "data_root", str(folder / "data"))
    with pytest.raises(RunError, match=f"resume.safetensors: the run was saved with other data: .*{words}"):
        resumed(folder / "run")


def test_moved_data_is_the_same_and_an_image_of_another_size_is_not(own_data, tmp_path):
    folder = shutil.copytree(own_data, tmp_path / "copy")
    edit(folder / "run", "data_root", str(folder / "data"))
    image = folder / "data" / "10.png"
    content = image.read_bytes()
    image.write_bytes(content + b" ")
    with pytest.raises(RunError, match="other data: test has other image sizes; restore the data"):
        resumed(folder / "run")
    image.write_bytes(content)
    assert (resumed(folder / "run").run_dir / "results.json").exists()
    image.write_bytes(content + b" ")
    with pytest.raises(RunError, match="test has other image sizes"):  # also when the run is finished
        resumed(folder / "run")


def test_a_fingerprint_has_the_order_and_every_part(tmp_path):
    samples = [Sample(tmp_path / f"{n}.png", f"caption {n}\udc80 \n", n // 2, n, f"name {n // 2}") for n in range(4)]
    before = fingerprint({"train": samples, "test": samples[:2]})
    assert json.loads(json.dumps(before)) == before == fingerprint({"test": samples[:2], "train": list(samples)})
    for changes, words in (
        ({"caption": "caption 1"}, "captions"),
        ({"person_id": 5, "person_name": None}, "identities"),
        ({"person_name": None}, "identities"),
        ({"image": tmp_path / "other.png"}, "images"),
    ):
        after = fingerprint({"train": [*samples[:3], replace(samples[3], **changes)], "test": samples[:2]})
        assert data_differences(before, after) == [f"train has other {words}"]
        assert data_differences(after, before) == [f"train has other {words}"]
    assert data_differences(before, fingerprint({"train": samples[::-1], "test": samples[:2]})) == [
        "train has another order"
    ]


# ------------------------------------------------------------------------------------ the files


def test_a_damaged_structure_or_fingerprint_is_named(run_dir):
    path = run_dir / "resume.safetensors"
    tensors, config, metadata = read_tensors(path, RESUME_STATE)
    for name, value, message in (
        ("structure", '{"dict": [["a", NaN]]}', "structure of the state is damaged .*NaN is not a number"),
        ("structure", '{"tensor": "none"}', "structure of the state is damaged"),
        ("structure", '{"tensor": "0", "dict": []}', "structure of the state is damaged"),
        ("structure", '{"dict": 3}', "structure of the state is damaged"),
        ("structure", '{"dict": []}', "expected the state of a training"),
        ("data", "[]", "fingerprint of the data is damaged"),
        ("data", '{"train": 3}', "fingerprint of the data is damaged"),
        ("data", '{"train": {}, "train": {}}', "fingerprint of the data is damaged .the key 'train' stands twice"),
    ):
        write_tensors(path, RESUME_STATE, tensors, config, metadata | {name: value})
        with pytest.raises(CheckpointError, match=f"resume.safetensors: .*{message}"):
            resumed(run_dir)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("progress", "epoch"), 4, "field 'epoch' of its progress is 4"),
        (("progress", "epoch"), "1", "field 'epoch' of its progress is '1'"),
        (("progress", "batch"), 40, "field 'batch' of its progress is 40"),
        (("progress", "step"), 2, "field 'step' of its progress is 2"),
        (("progress", "loss_sum"), None, "field 'loss_sum' of its progress is None"),
        (("progress", "best_epoch"), 1, "field 'best_epoch' of its progress is 1"),
        (("progress", "history"), [{"epoch": 0}], "field 'history' of its progress is"),
        (("progress", "zero_shot"), {"R@1": 101.0}, "field 'zero_shot' of its progress is"),
        (("progress", "zero_shot_top"), [["x"]], "field 'zero_shot_top' of its progress is"),
        (("progress", "log_bytes"), -1, "field 'log_bytes' of its progress is -1"),
        (("progress", "colour"), 1, "unexpected keyword argument 'colour'"),
        (
            ("parameters", "image.0.prefix.keys"),
            torch.tensor([math.nan]),
            "parameters: the tensor 'image.0.prefix.keys' has 1",
        ),
        (("best",), {"x": torch.zeros(1)}, "best: 1 unexpected: x"),
        (("best",), {"x": 1}, "best: the entry 'x' is not a tensor"),
    ],
)
def test_a_state_that_no_training_has_is_refused(run_dir, place, value, message):
    state = load_state(run_dir)
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    config, metadata = read_metadata(run_dir / "resume.safetensors", RESUME_STATE)
    save_state(run_dir, state, config, json.loads(metadata["data"]))
    with pytest.raises(CheckpointError, match=f"resume.safetensors: .*{re.escape(message)}"):
        resumed(run_dir)


def test_a_changed_byte_of_a_state_is_noticed(run_dir):
    """Each tensor and each entry of the metadata has a checksum."""
    path = run_dir / "resume.safetensors"
    right = path.read_bytes()
    tensors, (_, metadata) = load(right), read_metadata(path, RESUME_STATE)
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="resume.safetensors: the file is damaged: its tensor [0-9]+ is not what"):
        load_state(run_dir)
    for changed, name in (
        ({"0": tensors["0"] + 1}, "tensor 0"),
        ({"0": tensors["0"].reshape(1, -1)}, "tensor 0"),
        ({"x": tensors["0"].clone()}, "tensor x"),
    ):
        save_file(tensors | changed, path, metadata)
        with pytest.raises(CheckpointError, match=f"the file is damaged: its {name} is not what was saved"):
            load_state(run_dir)
    for name in ("structure", "data"):
        save_file(tensors, path, metadata | {name: metadata[name].replace("1", "2", 1)})
        with pytest.raises(CheckpointError, match=f"the file is damaged: its metadata {name} is not what was saved"):
            load_state(run_dir)
    del metadata["checksums"]
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="the file is damaged: its checksums cannot be read"):
        load_state(run_dir)
    save_file(tensors, path, metadata | {"version": "2"})  # an earlier version has none
    assert load_state(run_dir)["progress"]["step"] == 3


LINE = b'{"kind": "evaluation", "step": 1, "epoch": 1, "split": "val", "R@1": 5.0}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE + LINE[:30], "line 2: invalid or truncated JSON at column 31"),
        (LINE + b'{"kind": "epoch", "loss": NaN}', "line 2: field .loss.: NaN is not a number"),
        (LINE + b"[1]", "line 2: expected an object with the key 'kind'"),
        (LINE + b"\xff", "line 2: expected UTF-8"),
        (LINE, "has been changed: expected the lines of a finished training"),
        (b"", "has been changed: expected the lines of a finished training"),
    ],
)
def test_a_broken_log_names_the_line(tmp_path, content, message):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=f"metrics.jsonl.*{message}"):
        history_of(tmp_path)


def test_a_lock_without_fcntl(tmp_path, monkeypatch):
    """On Windows, whose own lock removes its file."""
    monkeypatch.setattr("upperson.train.run_folder.fcntl", None)
    for _ in range(2):  # the file of a killed process does not block
        with locked(tmp_path), pytest.raises(RunError, match="is in use by another training process"), locked(tmp_path):
            pass
        (tmp_path / ".lock").touch()


def test_a_lock_is_of_one_process_and_leaves_nothing(tmp_path, monkeypatch):
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").write_bytes(b"")  # of a killed process
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGHUP, slow_case(signal.SIGTERM)])
def test_a_signal_saves_and_is_named(run_dir, monkeypatch, number):
    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with monkeypatch.context() as patch:
            fail_at(patch, 1, lambda value: os.kill(os.getpid(), number) or value)
            with pytest.raises(RunInterrupted, match="after step 4, the state is saved") as raised:
                resumed(run_dir)
        assert raised.value.signal == number and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert load_state(run_dir)["progress"]["step"] == 4


def test_under_nohup_a_hangup_has_no_effect():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_killed_loader_process_is_one_line(run_dir, monkeypatch):
    edit(run_dir, "workers", 1)

    def kill(value):
        for worker in multiprocessing.active_children():  # that of an earlier test may still be ending
            os.kill(worker.pid, signal.SIGKILL)
        return value

    with monkeypatch.context() as patch:
        fail_at(patch, 1, kill)
        with pytest.raises(
            RunError, match="a loader process has ended, .* in epoch [12], after step .* 1 loader processes"
        ) as raised:
            resumed(run_dir)
    assert "\n" not in str(raised.value) and f"resume with --resume {run_dir}" in str(raised.value)


def test_leftovers_of_a_killed_run_are_removed(run_dir):
    (run_dir / ".curve.png.tmp").write_bytes(b"half")
    (run_dir / ".mine.tmp").write_bytes(b"a user's own file")
    resumed(run_dir)
    assert [path.name for path in run_dir.glob(".*")] == [".mine.tmp"]


def test_other_weights_of_the_same_shapes_are_named(tmp_path, monkeypatch):
    """A file of weights that was replaced in its place: nothing else tells."""
    config = tiny_training(tmp_path, embedded_identities=(5, 2, 2), batch_size=5, run_dir=tmp_path / "run")
    fail_at(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(config)
    monkeypatch.undo()
    monkeypatch.setattr("upperson.model.adapted_clip.fingerprint", lambda state: "other weights")
    with pytest.raises(RunError, match="resume.safetensors: the run was saved with a backbone of other weights"):
        resumed(config.train.run_dir)
