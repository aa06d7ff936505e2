"""The command `upperson`."""

import io
import json
import pickle
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import flags_of, tiny_training

import upperson
from upperson.__main__ import COMMANDS, main
from upperson.errors import CheckpointError, DataError, RunError, RunInterrupted, exit_status
from upperson.evaluate.__main__ import main as evaluate
from upperson.train.__main__ import main as train


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"upperson {upperson.__version__}\n"


def test_without_a_command_all_are_listed(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: upperson {name}" in capsys.readouterr().out


def test_an_unknown_command(capsys):
    assert main(["find", "x"]) == 2
    assert capsys.readouterr().err.startswith(
        "upperson: error: unknown command 'find'; expected one of train, evaluate"
    )


# Arguments with which a command is complete; others take two paths.
WORDS = {"tables": ["V"], "search": ["serve"], "import": ["x", "--as", "irra", "-o", "y"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_argument_with_a_line_feed_gives_one_line(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, *WORDS.get(command, ["x"] * 2), "a\nb"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith(f"upperson {command}: error: ") and r"a\nb" in last


def test_an_error_is_one_line_whatever_it_quotes():
    for kind in (RunError, DataError, CheckpointError):
        assert str(kind("a\nb\x1b[0m\u2028é")) == r"a\nb\x1b[0m\u2028é"
        assert 1500 < len(str(kind("x" * 10**6))) <= 2000
    assert str(pickle.loads(pickle.dumps(RunError("a\nb")))) == r"a\nb"


def test_names_of_the_package():
    assert set(upperson.__all__) <= set(dir(upperson))
    assert all(getattr(upperson, name) is not None for name in upperson.__all__)
    with pytest.raises(AttributeError, match="module 'upperson' has no attribute 'find'"):
        _ = upperson.find


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory (no memory is left); a smaller batch"),
        (
            MemoryError("Unable to allocate 4.00 TiB for an array with shape (1, 2)"),
            "out of memory (Unable to allocate",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: you …"
            ),
            "out of memory ([enforce fail",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
            "out of memory (CUDA out of memory);",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "a loader process has ended, perhaps by the system for lack of memory (DataLoader worker (pid 7) is killed",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
            "a loader process has ended, perhaps by the system for lack of memory (DataLoader worker (pid(s) 7, 8)",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            "out of shared memory, which loader processes need (DataLoader worker",
        ),
        (RuntimeError("can't start new thread"), "the system allows no more processes, threads or open files (can't"),
    ],
)
def test_missing_memory_and_processes_are_one_line(error, message, capsys):
    def command():
        raise error

    assert exit_status(command) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}") and shown.count("\n") == 1 and " may help" in shown


def test_the_status_names_the_signal(capsys):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):

        def command(number=number):
            raise pickle.loads(pickle.dumps(RunInterrupted("stopped in epoch 1", number)))

        assert exit_status(command) == 128 + number
        assert capsys.readouterr().err == "stopped in epoch 1\n"


def test_errors_that_a_user_can_mend_are_one_line(capsys, monkeypatch):
    def raises(error):
        def command():
            raise error

        return command

    assert exit_status(lambda: 0) == 0
    assert exit_status(raises(RunError("epochs: too many"))) == 1
    assert capsys.readouterr().err == "error: epochs: too many\n"
    assert exit_status(raises(KeyboardInterrupt())) == 130 and capsys.readouterr().err == "stopped\n"
    with pytest.raises(ZeroDivisionError):
        exit_status(raises(ZeroDivisionError()))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        exit_status(raises(RuntimeError("shapes do not match")))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_status(raises(RunError("x"))) == 1
    assert capsys.readouterr().err == "error: process 1 of 2: x\n"
    assert exit_status(raises(KeyboardInterrupt())) == 130 and capsys.readouterr().err == ""


def command(arguments, redirection, tmp_path):
    """The status of `upperson` in a shell, and its standard error."""
    line = f"{shlex.join([sys.executable, '-m', 'upperson', *map(str, arguments)])} {redirection}"
    ended = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stderr


posix = pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")


@posix
@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"]], ids=" ".join)
@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", "| true"])
def test_streams_that_are_closed(arguments, redirection, tmp_path):
    status, error = command(arguments, redirection, tmp_path)
    assert (status, error) == (0, "") or (redirection == "| true" and error.count("\n") == 1 and "Broken pipe" in error)


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_on_a_full_disk_is_one_line(tmp_path):
    assert command(["--version"], "> /dev/full", tmp_path) == (
        1,
        "error: the standard output, or a file that has no name, could not be written (No space left on device)\n",
    )


@posix
@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&- 2>&-", "| head -1"])
def test_a_training_goes_on_without_its_output(redirection, tmp_path):
    """A file that is opened does not take the place of an output that was closed."""
    config = tiny_training(tmp_path, embedded_identities=(4, 2, 2), run_dir=tmp_path / "run")
    status, error = command(["train", *flags_of(config)], f"{redirection}; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (status, error) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kind"] == "result" and (tmp_path / "run" / "results.json").exists()


class Console(io.TextIOWrapper):
    """A standard output in another encoding than UTF-8, as on Windows or in the C locale."""

    def __init__(self, monkeypatch, encoding, errors="strict"):
        super().__init__(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)
        monkeypatch.setattr(sys, "stdout", self)

    def shown(self):
        return self.buffer.getvalue().decode(self.encoding).replace("\r", "")


consoles = pytest.mark.parametrize("settings", [("cp1252",), ("ascii",), ("ascii", "surrogateescape"), ("utf-8",)])


class TestConsole:
    @consoles
    def test_characters_that_it_lacks_are_replaced(self, monkeypatch, settings):
        console = Console(monkeypatch, *settings)
        assert exit_status(lambda: print("λ → \udcff ü") or 0) == 0
        expected = {"cp1252": "? ? ? ü\n", "ascii": "? ? ? ?\n", "utf-8": "λ → ? ü\n"}
        assert console.shown() == expected[console.encoding]

    def test_a_choice_of_the_user_stays(self, monkeypatch):
        console = Console(monkeypatch, "ascii", "backslashreplace")
        assert exit_status(lambda: print("→") or 0) == 0
        assert console.shown() == "\\u2192\n"

    @consoles
    @pytest.mark.parametrize("name", COMMANDS)
    def test_help(self, monkeypatch, settings, name):
        console = Console(monkeypatch, *settings)
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0 and f"usage: upperson {name}" in console.shown()

    @consoles
    def test_check_data(self, monkeypatch, settings, tmp_path):
        Image.new("RGB", (4, 8)).save(tmp_path / "→.png")
        text = "image,caption,identity\n→.png,a man 👍,Zoë\nno→.png,a man 👍,Ω\n"
        (tmp_path / "captions.csv").write_text(text, encoding="utf-8")
        console = Console(monkeypatch, *settings)
        assert train(["--check-data", "--dataset", "folder", "--data-root", str(tmp_path)]) == 1
        assert "1 of 2 images missing" in console.shown()

    def test_train_evaluate_and_merge(self, monkeypatch, tmp_path):
        folder = tmp_path / "→"
        changes = dict(epochs=1, warmup_epochs=0, embedded_identities=(4, 2, 2), prefix="none", adapter_mlp="none")
        config = tiny_training(tmp_path, run_dir=folder, adapter_attn="none", **changes)
        console = Console(monkeypatch, "ascii")
        assert train(list(map(str, flags_of(config)))) == 0
        assert evaluate([str(folder / "best.safetensors")]) == 0
        assert main(["merge", str(folder / "best.safetensors"), str(tmp_path / "→.safetensors")]) == 0
        assert all(words in console.shown() for words in ("Text ? image", "image ? text", "features differ by"))
        assert "text → image" in (folder / "best-embedded-test" / "results.md").read_text(encoding="utf-8")
