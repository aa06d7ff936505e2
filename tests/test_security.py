"""SECURITY.md: what each command opens, writes, starts and sends, by Python's audit events.

The commands run in a process of their own, since an audit hook stays for the life of a process. Compiled code raises no
audit events; so the folders to which it could write are empty before, and are compared afterwards.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_clip, write_clip, write_image

EXPORTS = all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript")))
OUTPUTS = (
    "random",
    "embedded",
    "evaluation",
    "merged.safetensors",
    "imported.safetensors",
    "imported-clip.safetensors",
    *(["exported"] if EXPORTS else []),
)
INDEX = ("people.db", "people.db.1.vectors", "people.db.lock", "people.db.thumbnails")
WATCHED = """
import json, os, sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
CHANGING = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
STARTING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
NAMELESS = getattr(os, "O_TMPFILE", 0)  # filelock tries a folder with a file without a name, which leaves nothing
found = {"written": [], "started": [], "network": []}

def watch(event, arguments):
    nameless = event == "open" and NAMELESS and arguments[2] & NAMELESS == NAMELESS
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & WRITING and not nameless:
        found["written"].append(os.path.abspath(os.fsdecode(arguments[0])))
    elif event in CHANGING and isinstance(arguments[0], (str, bytes, os.PathLike)):
        # os.makedirs(exist_ok=True) also asks for folders that exist
        if event != "os.mkdir" or not os.path.isdir(arguments[0]):
            found["written"] += [os.path.abspath(os.fsdecode(path)) for path in arguments[: 1 + (event == "os.rename")]]
    elif event.startswith(STARTING):
        found["started"].append([str(argument) for argument in arguments[:2]])
    elif event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
        found["network"].append([event, repr(arguments)])

sys.addaudithook(watch)
from upperson.__main__ import main

for command in json.loads(sys.argv[1]):
    assert main(command) == 0, command
print("FOUND" + json.dumps(found))
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The events of all commands, and the folder with their working, home and temporary folders."""
    place = tmp_path_factory.mktemp("security")
    work, home, temporary = (place / name for name in ("work", "home", "temporary"))
    for folder in (work, home, temporary):
        folder.mkdir()
    photos = place / "photos"
    for number in range(3):
        write_image(photos / f"{number}.png", number)
    model = write_clip(place, tiny_clip(layers=2, context_length=24))
    data = ["--embedded-identities", 4, 2, 2, "--embedded-views", 1, "--workers", 0, "--device", "cpu"]
    short = [*data, "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 4, "--backend", "torch"]
    own = ["--model", model, "--pretrained", "none", "--image-size", 48, 16]
    mergeable = ["--prefix", "none", "--adapter-attn", "none", "--adapter-mlp", "none"]
    commands = [
        ["train", *data, "--check-data"],
        ["train", *short, *own, *mergeable, "--run-dir", "random"],
        ["train", *short, "--run-dir", "embedded"],
        ["evaluate", "embedded/best.safetensors", "--output", "evaluation"],
        ["merge", "random/best.safetensors", "merged.safetensors"],
        *([["export", "random/best.safetensors", "exported"]] if EXPORTS else []),
        ["import", "merged.safetensors", "--as", "clip", *own[:2], "-o", "imported.safetensors", *own[4:]],
        ["search", "index", photos, "--checkpoint", "embedded/best.safetensors", "--device", "cpu"],
        ["search", "query", "a man", "--not", "a hat", "--rerank", "--json", "--device", "cpu"],
        ["search", "forget", photos / "1.png"],
    ]
    commands = [list(map(str, command)) for command in commands]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XDG_", "MPL", "TORCHINDUCTOR", "ORT_"))
    }
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)],
        cwd=work, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.rpartition("FOUND")[2]), place


def test_nothing_is_sent(watched):
    found, _ = watched
    assert found["network"] == []


def test_no_program_is_started(watched):
    """Two libraries ask the system: PyTorch's CUDA builds for a library, and matplotlib for fonts, once."""
    found, _ = watched
    assert {Path(program).name for program, _ in found["started"]} <= {"ldconfig", "fc-list"}


def test_files_are_written_only_where_the_user_asks(watched):
    found, place = watched
    outputs = [place / "work" / name for name in (*OUTPUTS, *INDEX[1:])]  # SQLite writes its file itself
    written = [Path(path) for path in found["written"]]
    assert {path for path in outputs if path in written} == set(outputs)  # the hook has seen these at least
    allowed = [*outputs, place / "work" / INDEX[0], place / "home", place / "temporary", Path(os.devnull)]
    staged = str(place / "work" / ".upperson-")  # outputs are collected beside their places
    elsewhere = [
        path for path in written if not {path, *path.parents} & set(allowed) and not str(path).startswith(staged)
    ]
    assert elsewhere == []


def test_nothing_is_left_elsewhere(watched):
    """Matplotlib keeps a list of fonts in the home folder; PyTorch makes an empty folder for its compiler."""
    _, place = watched
    assert {path.name for path in (place / "work").iterdir()} == {*OUTPUTS, *INDEX}
    for folder in (place / "home").iterdir():
        assert {path.name for path in folder.iterdir()} == {"matplotlib"}, folder
    for folder in (place / "temporary").iterdir():
        assert folder.name.startswith("torchinductor_") and not any(folder.iterdir())
