"""A shared folder gives the same model elsewhere, says what it is, and holds nothing of this computer."""

import errno
import os
import shutil
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from tiny import TINY_CLIP, build, inputs, stirred, tiny_config, tiny_run

from upperson.config import Config
from upperson.deploy import share
from upperson.deploy.share import from_pretrained, save_pretrained
from upperson.errors import CheckpointError
from upperson.model.checkpoint import load_checkpoint, load_model, save_checkpoint

METRICS = {"R@1": 41.25, "R@5": 70.0, "R@10": 80.5, "mAP": 39.125, "mINP": 20.0}
RESULTS = {
    "method": "UP-Person", "model": "tiny.json", "trained_on": "folder /home/me/people", "split": "test",
    "evaluated_on": "folder /home/me/people", "captions": 12, "images": 6, "text_to_image": METRICS, "epoch": 7,
    "epochs": 60, "selection": "val", "trained": {"lora": 1000, "prefix": 24}, "all_parameters": 5000,
    "zero_shot": METRICS | {"R@1": 12.5}, "checkpoint": "/home/me/runs/best.safetensors",
    "stages": [{"evaluated_on": "folder /home/me/people", "checkpoint": "/home/me/x"}],
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint whose backbone, model configuration and data are files of this computer."""
    own = tmp_path / "home"
    own.mkdir()
    torch.manual_seed(3)
    save_file(open_clip.CLIP(**TINY_CLIP).state_dict(), own / "weights.safetensors")
    config = tiny_config(own, pretrained=str(own / "weights.safetensors"))
    model = stirred(build(config))
    whole = Config(config).replace(dataset="folder", data_root=own, run_dir=own / "run", image_cache=own / "cache")
    save_checkpoint(own / "best.safetensors", model.adaptation(), whole, RESULTS, model.fingerprint)
    return own / "best.safetensors"


@torch.no_grad()
def features(model):
    images, tokens = inputs()
    return torch.stack([model.encode_image(images), model.encode_text(tokens)])


def test_the_same_model_elsewhere(checkpoint, tmp_path):
    expected = features(load_model(checkpoint))
    assert save_pretrained(checkpoint, tmp_path / "shared" / "mine", license="mit") == tmp_path / "shared" / "mine"
    shutil.rmtree(checkpoint.parent)
    (tmp_path / "shared").rename(tmp_path / "moved")
    assert torch.equal(features(from_pretrained(tmp_path / "moved" / "mine")), expected)
    names = ["README.md", "clip.json", "clip.safetensors", "config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "moved" / "mine")) == names
    for name in ("README.md", "config.json", "model.safetensors"):
        content = (tmp_path / "moved" / "mine" / name).read_bytes()
        assert str(tmp_path).encode() not in content and b"/home/me" not in content


def test_the_card_says_what_the_checkpoint_records(checkpoint, tmp_path):
    save_pretrained(checkpoint, tmp_path / "mine", license="mit")
    card = (tmp_path / "mine" / "README.md").read_text()
    for words in (
        'license: "mit"\n', "- up-person\n", "# mine\n", "from_pretrained('mine')", "* **Data:** folder.",
        "best R@1 on the validation split; epoch 7 of 60", "1,024 of 5,000", "split of folder: 12 captions, 6 images",
        "## Limits", "Do not use it to identify, track or monitor people",
    ):  # fmt: skip
        assert words in card, words
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    assert table[2] == ["text → image", "41.25", "70.00", "80.50", "39.12", "20.00"]
    assert table[3][:2] == ["text → image, zero-shot CLIP", "12.50"]


def test_a_card_without_results(tmp_path):
    path = tiny_run(tmp_path)
    save_pretrained(path, tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "The checkpoint records no results." in card and card.count("not recorded") == 2 and "license" not in card
    assert "synthetic pedestrians" in card and "never seen a photograph" in card
    assert torch.equal(features(from_pretrained(tmp_path / "mine")), features(load_model(path)))


@pytest.mark.parametrize("results", [{"text_to_image": 3}, {"text_to_image": {"R@1": "x"}}, {"trained": {"lora": "x"}}])
def test_a_card_of_results_that_nobody_wrote(results, tmp_path):
    path = tiny_run(tmp_path)
    found = load_checkpoint(path)
    save_checkpoint(path, found.parameters, found.config, results, found.fingerprint)
    save_pretrained(path, tmp_path / "mine")
    assert "The checkpoint records no results." in (tmp_path / "mine" / "README.md").read_text()


def test_refused_folders(checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name, words in (("full", "full: expected a new or .*, found mine in it$"), ("file", "file is a regular")):
        with pytest.raises(OSError, match=words):
            save_pretrained(checkpoint, tmp_path / name)
    (checkpoint.parent / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the backbone is .*weights.safetensors, no such file; expected a file"):
        save_pretrained(checkpoint, tmp_path / "mine")
    with pytest.raises(CheckpointError, match="no such file"):
        save_pretrained(tmp_path / "no.safetensors", tmp_path / "mine")
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "home"]


@pytest.mark.parametrize("how", ["the working folder", "a link", "a folder", "a mounted disk"])
def test_an_empty_folder_stays_and_gets_the_content(how, checkpoint, tmp_path, monkeypatch):
    own = tmp_path / "ein Ordner"
    own.mkdir()
    folder, number = own, own.stat().st_ino
    if how == "the working folder":
        monkeypatch.chdir(own)
        folder = Path(".")
    elif how == "a link":
        folder = tmp_path / "link"
        folder.symlink_to(own)
    elif how == "a mounted disk":
        monkeypatch.setattr(Path, "rmdir", lambda self: pytest.fail(f"{self} cannot be removed"))
    save_pretrained(checkpoint, folder)
    names = ["README.md", "clip.json", "clip.safetensors", "config.json", "model.safetensors"]
    assert sorted(os.listdir(folder)) == sorted(os.listdir(own)) == names and own.stat().st_ino == number
    assert torch.equal(features(from_pretrained(folder)), features(load_model(checkpoint)))


def test_an_empty_folder_stays_empty_after_an_error(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    real = os.replace

    def fail_at(last):
        def replace(source, target):
            if Path(target) == tmp_path / "mine" / last:
                raise OSError(errno.EIO, "Input/output error", str(target))
            real(source, target)

        return replace

    for last in ("README.md", "config.json", "model.safetensors"):
        monkeypatch.setattr(os, "replace", fail_at(last))
        with pytest.raises(OSError, match="Input/output error"):
            save_pretrained(checkpoint, tmp_path / "mine")
        assert not list((tmp_path / "mine").iterdir())


def test_what_came_into_the_folder_meanwhile_is_kept(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()

    def model_card(*_):
        (tmp_path / "mine" / "README.md").write_text("kept")
        return "a card"

    monkeypatch.setattr(share, "model_card", model_card)
    with pytest.raises(OSError, match="found README.md in it"):
        save_pretrained(checkpoint, tmp_path / "mine")
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["kept"]


def test_damaged_folders(checkpoint, tmp_path):
    folder = save_pretrained(checkpoint, tmp_path / "mine")
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = kept["config.json"].replace(b'"prefix_length": 3', b'"prefix_length": 4')
    assert config != kept["config.json"]
    for name, content, words in (
        ("config.json", None, "config.json: expected the configuration of model.safetensors, found no such file"),
        ("config.json", config, "config.json: expected the configuration of model.safetensors, found another content"),
        ("model.safetensors", None, "model.safetensors: there is no such file"),
        ("model.safetensors", kept["model.safetensors"][:-5], "model.safetensors"),
        ("model.safetensors", kept["clip.safetensors"], "model.safetensors"),
    ):
        (folder / name).write_bytes(content) if content else (folder / name).unlink()
        with pytest.raises(CheckpointError, match=words):
            from_pretrained(folder)
        (folder / name).write_bytes(kept[name])
    from_pretrained(folder)


# ------------------------------------------------------------------------------------ the hub, by a fake of its library


def test_only_known_files_of_a_repository_are_asked_for(checkpoint, tmp_path, monkeypatch):
    folder, asked = save_pretrained(checkpoint, tmp_path / "mine"), []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    model = from_pretrained("someone/people", revision="v1", backend="torch")
    assert torch.equal(features(model), features(load_model(checkpoint)))
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("someone/people", "v1") and set(patterns) >= set(os.listdir(folder)) - {"README.md"}
    assert not any("*" in pattern or pattern.endswith(".py") for pattern in patterns)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (HFValidationError("Repo id must be …"), "someone/people: expected a folder, or a repository of the hub"),
        (LocalEntryNotFoundError("offline\nand more"), "cannot be downloaded from the hub: offline$"),
        (OSError("no disk"), "someone/people is no folder, and cannot be downloaded from the hub: no disk$"),
    ],
)
def test_a_repository_that_cannot_be_had(error, words, tmp_path, monkeypatch):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        from_pretrained("someone/people")


def test_a_name_that_is_none_asks_nobody(tmp_path, monkeypatch):
    """The library itself refuses it before it connects."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    for name in (tmp_path / "nowhere" / "deep", "a b", "x/y/z", ""):
        with pytest.raises(CheckpointError, match="expected a folder, or a repository of the hub"):
            from_pretrained(name)
    assert share.PATTERNS[0] == "model.safetensors"
