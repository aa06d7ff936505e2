"""Camera and time of an image, by its path or its EXIF data."""

from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from upperson.errors import DataError, SearchError
from upperson.search.origin import compiled, origin

NOON = datetime(2026, 1, 31, 12, 30, 59)


@pytest.mark.parametrize(
    ("path", "camera"),
    [
        ("bounding_box_test/0002_c1s1_000451_03.jpg", "1"),  # Market-1501
        ("gallery/0005_c2_f0046985.jpg", "2"),  # DukeMTMC
        ("cam_a/000_45.bmp", "a"),  # VIPeR
        ("x/cam3/y.jpg", "3"),
        ("x/Camera_03/y.jpg", "3"),
        ("x/camera-12/cam4.jpg", "4"),
        ("cam1/cam2/y.jpg", "2"),
        ("CAM 7.jpg", "7"),
        ("c12.jpg", "12"),
        ("campus/camera.jpg", None),
        ("abc1/doc3x.jpg", None),
        ("cameraman.jpg", None),
        ("c.jpg", None),
    ],
)
def test_cameras(path, camera):
    assert origin(Path(path), None)[0] == camera


@pytest.mark.parametrize(
    ("path", "time"),
    [
        ("2026-01-31_12-30-59.jpg", NOON),
        ("20260131_123059.jpg", NOON),
        ("IMG_20260131_123059123.jpg", NOON),
        ("cam 2026-01-31T12.30.59 x.jpg", NOON),
        ("2026.01.31 12:30:59.jpg", NOON),
        ("20260131T123059.jpg", NOON),
        ("2026-01-31 at 7.jpg", datetime(2026, 1, 31)),
        ("2026-01-31/7.jpg", datetime(2026, 1, 31)),
        ("2025-01-01/2026-01-31_12-30-59.jpg", NOON),
        ("2026-02-31_12-30-59.jpg", None),
        ("2026-01-31_25-30-59.jpg", datetime(2026, 1, 31)),
        ("20260131.jpg", None),  # any number could be such a date
        ("0002_c1s1_000451_03.jpg", None),
        ("99990131_123059.jpg", None),
        ("1234567890123456789.jpg", None),
    ],
)
def test_times(path, time):
    assert origin(Path(path), None)[1] == time


def test_exif_comes_before_the_path(tmp_path):
    path = tmp_path / "2020-01-01_00-00-00.jpg"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2026:01:31 12:30:59"
    Image.new("RGB", (4, 4)).save(path, exif=exif)
    assert origin(path, None)[1] == NOON
    for text in ("", "yesterday", "0000:00:00 00:00:00", "2026:13:31 12:30:59"):
        exif.get_ifd(0x8769)[0x9003] = text
        Image.new("RGB", (4, 4)).save(path, exif=exif)
        assert origin(path, None)[1] == datetime(2020, 1, 1)


def test_a_pattern_comes_before_all():
    pattern = compiled(r"(?P<camera>gate [A-Z])/(?P<time>[^/]+)\.jpg")
    assert origin(Path("cam1/gate B/2026-01-31 12:30:59.jpg"), pattern) == ("gate B", NOON)
    assert origin(Path("cam1/gate B/20260131_123059.jpg"), pattern) == ("gate B", NOON)
    assert origin(Path("cam1/2026-01-31_12-30-59.jpg"), pattern) == ("1", NOON)
    with pytest.raises(DataError, match="the pattern found the time 'x'; expected one such as"):
        origin(Path("gate B/x.jpg"), pattern)
    assert origin(Path("gate B/1926-01-31.jpg"), pattern) == ("gate B", datetime(1926, 1, 31))
    for late in ("9999-12-31T23:59:59", "9999-12-31", "2101-01-01"):  # a video would end after the last year
        with pytest.raises(DataError, match=f"the pattern found the time '{late}'; expected .*, until 2100"):
            origin(Path(f"gate B/{late}.jpg"), pattern)
    with pytest.raises(SearchError, match="not a regular expression"):
        compiled("(")


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-31_23-59",
        "2026.01.31 23h59",
        "2026-01-31T25:00:00",
        "2026-01-31_12-60-00",
        "2026-01-31_23-59-59+02:00",
        "20260131_235959+0200",
        "2026-01-31_23-59-59-05:00",
        "20260131_235959Z",
        "2026-01-31T23:59:59Z",
    ],
)
def test_a_pattern_whose_clock_or_zone_is_lost_is_refused(text):
    with pytest.raises(DataError, match="the pattern found the time '.*; expected one such as"):
        origin(Path(f"gate B/{text}.jpg"), compiled(r"/(?P<time>[^/]+)\.jpg"))


@pytest.mark.parametrize("text", ["2026_01_31", "2026.01.31", "2026-01-31 gate", "on 2026-01-31"])
def test_a_pattern_finds_a_date_alone(text):
    assert origin(Path(f"gate B/{text}.jpg"), compiled(r"/(?P<time>[^/]+)\.jpg"))[1] == datetime(2026, 1, 31)
