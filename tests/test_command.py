"""The command `upperson`."""

import pytest

import upperson
from upperson.__main__ import COMMANDS, main
from upperson.errors import RunError, exit_status


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
    assert main(["search", "x"]) == 2
    assert capsys.readouterr().err.startswith("upperson: unknown command 'search'; expected one of train, evaluate")


def test_names_of_the_package():
    assert set(upperson.__all__) <= set(dir(upperson))
    assert all(getattr(upperson, name) is not None for name in upperson.__all__)
    with pytest.raises(AttributeError, match="module 'upperson' has no attribute 'search'"):
        _ = upperson.search


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
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_status(raises(RunError("x"))) == 1
    assert capsys.readouterr().err == "error: process 1 of 2: x\n"
    assert exit_status(raises(KeyboardInterrupt())) == 130 and capsys.readouterr().err == ""
