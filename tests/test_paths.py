"""Every command and option that takes a path, with each kind of path that does not fit: each is refused in one line."""

import importlib.util
import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import build, cuhk_pedes, flags_of, stirred, tiny_training

from upperson.__main__ import main
from upperson.deploy import export as exporting
from upperson.model.checkpoint import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

PATH = "PATH"  # stands for the path in a command line
TRAIN = "train FLAGS --device cpu"
OF_TINY = "--model FOLDER/tiny.json --image-size 48 16"
IMPORT = "import FOLDER/clip.pt --as clip"
READ = {
    "model": f"{TRAIN} --model PATH.json",
    "weights": f"{TRAIN} --pretrained PATH",
    "start": f"{TRAIN} --start-from PATH",
    "data": f"{TRAIN} --dataset cuhk-pedes --data-root PATH",
    "own data": f"{TRAIN} --dataset folder --data-root PATH",
    "checked data": "train --check-data --dataset flickr30k --data-root PATH",
    "resumed run": "train --resume PATH",
    "configuration": "train --config PATH.json",
    "evaluated": "evaluate PATH",
    "evaluated data": "evaluate CHECKPOINT --data rstpreid --data-root PATH",
    "evaluated weights": "evaluate CHECKPOINT --pretrained PATH",
    "merged": "merge PATH FOLDER/out.safetensors",
    "merged weights": "merge CHECKPOINT FOLDER/out.safetensors --pretrained PATH",
    "exported": "export PATH FOLDER/out",
    "exported weights": "export CHECKPOINT FOLDER/out --pretrained PATH",
    "imported": "import PATH --as irra -o FOLDER/out.safetensors",
    "imported model": f"{IMPORT} -o FOLDER/out.safetensors --model PATH.json",
    "imported weights": f"{IMPORT} -o FOLDER/out.safetensors {OF_TINY} --pretrained PATH",
}
WRITTEN = {
    "run": f"{TRAIN} --run-dir PATH",
    "cache": f"{TRAIN} --dataset cuhk-pedes --data-root FOLDER/cuhk --image-cache PATH",
    "results": "evaluate CHECKPOINT --output PATH",
    "tables": "tables V --list --output PATH",
    "weights": "merge CHECKPOINT PATH.safetensors",
    "export": "export CHECKPOINT PATH",
    "import": f"{IMPORT} -o PATH.safetensors",
    "rest": "merge CHECKPOINT FOLDER/out.safetensors --rest PATH.safetensors",
}


def a_file(path):
    path.write_bytes(b"x")


def a_folder(path):
    path.mkdir()


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.getcwd()
        os.chdir(path.parent)  # the address of a socket has at most 108 bytes
        opened.bind(path.name)
        os.chdir(here)


def a_loop(path):
    path.symlink_to(path)


def a_device(path):
    path.symlink_to("/dev/zero")


def under_a_file(path):
    path.parent.write_bytes(b"x")


def nothing(_):
    pass


# Each kind makes something at a path, whose name below the folder is given.
KINDS = [
    (a_file, "some"),
    (a_folder, "some"),
    (a_socket, "some"),
    (os.mkfifo, "some"),
    (a_loop, "some"),
    (a_device, "some"),
    (under_a_file, "file/some"),
    (nothing, "no/some"),
    (nothing, "n" * 300),
    (nothing, "/".join(["p" * 200] * 30)),
    (nothing, ""),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint, a data set, and the flags of a training."""
    folder = tmp_path_factory.mktemp("paths")
    config = tiny_training(folder, embedded_identities=(3, 2, 2))
    model = stirred(build(config.model, seed=config.train.seed))
    save_checkpoint(folder / "best.safetensors", model.trained_parameters(), config, {"epoch": 1}, model.fingerprint)
    torch.save(build(config.model.replace(method="zero-shot")).clip.state_dict(), folder / "clip.pt")
    cuhk_pedes(folder / "cuhk", train=2, test=2)
    return folder, [str(flag) for flag in flags_of(config)]


def refused(command, path, folder, flags, capsys):
    """Whether a command refuses a path, in one line."""
    if command.startswith("export") and not all(map(importlib.util.find_spec, exporting.NEEDED)):
        pytest.skip("needs the extra 'onnx'")
    ending = re.search(r"PATH(\S*)", command)[1]
    arguments = []
    for word in command.replace("CHECKPOINT", str(folder / "best.safetensors")).replace("FOLDER", str(folder)).split():
        arguments += flags if word == "FLAGS" else [path + ending if word == PATH + ending else word]
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "has no effect here" not in line]
    if status == 0:
        return False
    assert status in (1, 2) and re.match(r"(upperson \w+: )?error: \S", lines[-1]), lines
    assert "Errno" not in lines[-1] and "Traceback" not in "".join(lines), lines
    words = "expected|nor 'none'|no run to resume|does not exist|cannot be read|not found|invalid or truncated JSON"
    assert re.search(words, lines[-1]) and path[:40] in lines[-1], lines
    assert len(lines) < 3 or lines[0].startswith("usage:"), lines
    return True


@pytest.mark.parametrize("what", READ)
def test_a_path_that_cannot_be_read(tmp_path, folder, what, capsys):
    for number, (kind, name) in enumerate(KINDS):
        ending = re.search(r"PATH(\S*)", READ[what])[1]
        if ending and not name:
            continue
        path = tmp_path / str(number) / f"{name}{ending}"
        (tmp_path / str(number)).mkdir()
        kind(path)
        text = str(path).removesuffix(ending) if name else ""
        assert refused(READ[what], text, *folder, capsys), (what, kind, name)
    assert not (folder[0] / "out.safetensors").exists()


@pytest.mark.parametrize("what", WRITTEN)
def test_a_path_that_cannot_be_written(tmp_path, folder, what, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ending = re.search(r"PATH(\S*)", WRITTEN[what])[1]
    for number, (kind, name) in enumerate(KINDS):
        path = tmp_path / str(number) / f"{name}{ending}"
        if kind == (a_file if ending else a_folder) or name == ("" if ending else "no/some"):  # these fit
            continue
        (tmp_path / str(number)).mkdir()
        kind(path)
        before = sorted((tmp_path / str(number)).rglob("*"))
        text = str(path).removesuffix(ending) if name else ""
        assert refused(WRITTEN[what], text, *folder, capsys), (what, kind, name)
        assert before == sorted((tmp_path / str(number)).rglob("*"))
    assert not (folder[0] / "out.safetensors").exists() and not (tmp_path / "runs").exists()


@pytest.fixture
def closed():
    """A folder without permissions, for a user who is not the superuser."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0)
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    yield folder
    if superuser:
        os.seteuid(0)
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
@pytest.mark.parametrize("what", [*READ, *WRITTEN])
def test_a_path_without_permission(closed, folder, what, capsys):
    command = READ.get(what, WRITTEN.get(what))
    if os.geteuid() == 65534:  # the rest of the folder must be open to this user
        os.seteuid(0)
        for parent in (folder[0], *folder[0].parents):
            parent.chmod(parent.stat().st_mode | 0o055)
        os.seteuid(65534)
    for command in filter(None, (READ.get(what), WRITTEN.get(what))):
        assert refused(command, str(closed / "some"), *folder, capsys) or "--list" in command
