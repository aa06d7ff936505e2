"""Commands on a full disk: one line that names the output, and nothing is left. The limit is that of a file's size."""

import importlib.util
import signal
from contextlib import contextmanager

import pytest
from tiny import tiny_run

from upperson.__main__ import main
from upperson.deploy.share import save_pretrained
from upperson.errors import exit_status

resource = pytest.importorskip("resource", reason="limits of POSIX")
needs_extra = pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="needs the extra 'onnx'")


@contextmanager
def files_of_at_most(size):
    """Writing more bytes than `size` to a file raises OSError, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def share(path, output):
    return exit_status(lambda: save_pretrained(path, output) and 0)


COMMANDS = {
    "merge": lambda path, output: main(
        ["merge", str(path), str(output), "--rest", f"{output.with_suffix('')}-2.safetensors"]
    ),
    "share": share,
    "export": lambda path, output: main(["export", str(path), str(output)]),
    "float16": lambda path, output: main(["export", str(path), str(output), "--precision", "float16"]),
    "int8": lambda path, output: main(["export", str(path), str(output), "--precision", "int8"]),
}
MARKS = {name: [needs_extra, pytest.mark.slow] for name in ("export", "float16", "int8")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("size", [0, 1000, 20_000])
@pytest.mark.parametrize("command", [pytest.param(name, marks=MARKS.get(name, [])) for name in COMMANDS])
def test_the_output_is_named_and_nothing_is_left(command, size, checkpoint, tmp_path, capsys):
    output = tmp_path / ("out.safetensors" if command == "merge" else "out")
    with files_of_at_most(size):
        status = COMMANDS[command](checkpoint, output)
    error = capsys.readouterr().err
    assert status == 1 and error.count("\n") == 1 and not list(tmp_path.iterdir())
    assert f"error: {output}" in error and "could not be written (File too large); nothing was changed\n" in error
