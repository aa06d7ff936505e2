"""A run that is killed at any point around an atomic write, and resumed, leaves the bytes of an undisturbed run."""

import builtins
import functools
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from operators import slow_case
from tiny import tiny_training

from upperson.train.fit import fit

POINTS = 53  # of the run below: four or five around each of eleven files, and one before each of three syncs of the log
PARTS = 8  # tests that share them


class Killed(BaseException):
    """In the place of SIGKILL."""


class Moment:
    """What a clock shows whose pace is 0, so that the images per second are the same in all runs."""

    def __sub__(self, _):
        return math.inf


class Disk:
    """Counts the points around writes, and ends the run at one of them: nothing reaches the disk from there on."""

    def __init__(self, monkeypatch, last=None):
        self.points, self.last, self.dead = [], last, False
        monkeypatch.setattr("upperson.files.open", self.open, raising=False)
        for module, name in ((os, "fsync"), (os, "replace")):
            monkeypatch.setattr(module, name, functools.partial(self.before, name, getattr(module, name)))
        unlink = Path.unlink
        monkeypatch.setattr(Path, "unlink", lambda path, **options: self.check() or unlink(path, **options))

    def check(self):
        if self.dead:
            raise Killed

    def point(self, name):
        self.check()
        self.points.append(name)
        self.dead = len(self.points) - 1 == self.last
        self.check()

    def before(self, name, real, *arguments):
        """The disk is the same after a call as before the next one."""
        self.point(name)
        real(*arguments)

    def open(self, path, mode):
        self.check()
        file = builtins.open(path, mode)  # noqa: SIM115 (closed by Halves)
        write = file.write

        class Halves:
            def __enter__(_):
                return _

            def __exit__(_, *error):
                file.close()

            def write(_, content):
                half = len(content) // 2
                write(content[:half])
                file.flush()
                self.point(f"half of {path.name}")
                write(content[half:])

            flush, fileno = file.flush, file.fileno

        return Halves()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The configuration of a run of two steps, what it leaves, and the points around its writes.

    The state is saved before, between and after the steps. The pictures are their own description, which is faster.
    """
    folder = tmp_path_factory.mktemp("killed")
    config = tiny_training(
        folder, embedded_identities=(5, 2, 2), epochs=1, warmup_epochs=0, batch_size=10, save_every=1,
        run_dir=folder / "run",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for picture in ("curve", "top_ten"):
            patch.setattr(f"upperson.train.loop.{picture}", lambda *given: repr(given).encode())
        patch.setattr("upperson.train.loop.time", SimpleNamespace(monotonic=Moment))
        with pytest.MonkeyPatch.context() as watched:
            disk = Disk(watched)
            fit(config)
        whole = folder / "whole"
        shutil.copytree(config.train.run_dir, whole)
        yield config, whole, disk.points


def is_the_same_after_a_kill_at(point, undisturbed):
    config, whole, points = undisturbed
    run_dir = config.train.run_dir
    shutil.rmtree(run_dir)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, last=point)
        with pytest.raises(Killed):
            fit(config)
    assert disk.points == points[: point + 1]
    fit(config.replace(resume=(run_dir / "config.json").exists()))
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(path.name for path in whole.iterdir())
    for file in whole.iterdir():
        assert (run_dir / file.name).read_bytes() == file.read_bytes(), (point, file.name)


def test_all_points_are_known(undisturbed):
    _, whole, points = undisturbed
    assert len(points) == POINTS, "\n".join(points)
    assert len(list(whole.iterdir())) == 9 and not list(whole.glob(".*"))


@pytest.mark.parametrize("part", [slow_case(part) for part in range(PARTS)])
def test_killed_at_every_point(undisturbed, part):
    for point in range(part, POINTS, PARTS):
        is_the_same_after_a_kill_at(point, undisturbed)


@pytest.mark.parametrize(
    "write", ["half of .config.json.tmp", "half of .last.safetensors.tmp", "half of .curve.png.tmp"]
)
def test_killed_at_some_points(undisturbed, write):
    """Before there is a configuration; between the state of the last epoch and its checkpoint; at the end."""
    is_the_same_after_a_kill_at(undisturbed[2].index(write), undisturbed)
