"""The benchmark on real photographs: the right pixels, and one line for each error. The video here is a small one."""

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upperson.errors import DataError, RunError

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
street = importlib.import_module("street")
COLOURS = {"A": (220, 30, 30), "B": (30, 30, 220)}


@pytest.fixture
def video(tmp_path, monkeypatch) -> Path:
    """Five frames of 64 x 48 pixels: person A is red at the left, person B blue at the right. B comes in frame 2."""
    av = pytest.importorskip("av")
    path = tmp_path / "small.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for number in range(5):
            pixels = np.full((48, 64, 3), 128, dtype=np.uint8)
            pixels[:, :32] = COLOURS["A"]
            if number >= 2:
                pixels[:, 32:] = COLOURS["B"]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    rows = [(0, 4, 4, 20, 40, "A", "Red."), (4, 4, 4, 20, 40, "A", "A red one."), (3, 40, 4, 20, 40, "B", "Blue.")]
    monkeypatch.setattr(street, "CROPS", tmp_path / "crops.csv")
    with street.CROPS.open("w", newline="") as file:
        csv.writer(file).writerows([street.Place._fields, *rows])
    monkeypatch.setattr(street, "FRAME_SIZE", (64, 48))
    return path


def test_crops_are_those_of_their_frame_and_person(video):
    samples = street.samples_of(video)
    assert [(sample.person, sample.caption) for sample in samples] == [
        ("A", "Red."), ("A", "A red one."), ("B", "Blue."),
    ]  # fmt: skip
    assert len({sample.person_id for sample in samples}) == 2 and len({sample.image_id for sample in samples}) == 3
    for sample in samples:
        pixels = np.asarray(sample.image.draw(), int)
        assert pixels.shape == (40, 20, 3)
        assert np.abs(pixels.mean(axis=(0, 1)) - COLOURS[sample.person]).max() < 30
    assert street.chance(samples) == pytest.approx(100 * (2 * 2 + 1) / 9)


def test_another_video_is_refused(video, monkeypatch, tmp_path):
    monkeypatch.setattr(street, "FRAME_SIZE", (768, 576))
    with pytest.raises(DataError, match="expected vtest.avi, with frames of 768×576 up to number 4"):
        street.samples_of(video)
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(DataError, match=r"text\.avi is not a video"):
        street.samples_of(tmp_path / "text.avi")
    Image.new("RGB", (768, 576)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match=r"one\.png: expected vtest\.avi"):
        street.samples_of(tmp_path / "one.png")


def test_a_missing_file_a_missing_program_and_a_missing_package(video, monkeypatch, tmp_path):
    with pytest.raises((DataError, OSError), match=r"none\.avi"):
        street.samples_of(tmp_path / "none.avi")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="apt-get is missing.*--video"), street.video_of_debian():
        pass
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    with pytest.raises(RunError, match="Unable to locate package; use --video"), street.video_of_debian():
        pass
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RunError, match="PyAV is missing"):
        street.samples_of(video)


def test_the_list_of_crops_is_whole():
    places = street.read_places()
    assert len(places) == 63 and len({place.identity for place in places}) == 8
    width, height = street.FRAME_SIZE
    for place in places:
        assert 0 <= place.x < place.x + place.width <= width and 0 <= place.y < place.y + place.height <= height
        assert 0 <= place.frame < 795 and place.caption.endswith(".")
