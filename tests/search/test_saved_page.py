"""The page of results that `query --html` writes."""

import base64
import io
import re
from dataclasses import replace

import pytest
from gallery_in_memory import START, GalleryInMemory
from PIL import Image

from upperson.search import Entry, Query
from upperson.search.html import details, file_name, folder, position, results_page, shape

QUERY = Query(
    ("<script>alert(1)</script> red", "a bag"), avoid=("a 'hat'",), top=4, cameras=("entrance 1",), since=START
)


@pytest.fixture(scope="module")
def gallery():
    return GalleryInMemory()


@pytest.fixture(scope="module")
def page(gallery):
    return results_page(QUERY, gallery.search(QUERY), gallery)


def test_it_needs_no_other_file_and_runs_nothing(page):
    assert "<script" not in page and "javascript:" not in page and not re.search(r"\son\w+=", page)
    assert "default-src 'none'; img-src data:" in page
    addresses = re.findall(r'(?:src|href|action)="([^"]*)"', page)
    assert len(addresses) == 4 and all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert "@import" not in page and "url(" not in page


def test_its_images_are_the_thumbnails_in_their_order(page, gallery):
    shown = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]*)", page)]
    assert shown == [gallery.thumbnail(hit.entry.id) for hit in gallery.search(QUERY)]
    assert re.findall(r'class="rank">(\d)<', page) == ["1", "2", "3", "4"]


def test_it_says_what_was_asked(page):
    for text in (
        "&lt;script&gt;alert(1)&lt;/script&gt; red; a bag",
        "a &#39;hat&#39;",
        "entrance 1",
        str(START),
        "50%",
    ):
        assert text in page
    assert "Use it responsibly" in page and "runs/embedded-1/best.safetensors" in page


def test_its_order_is_named(page, gallery):
    assert "4 images, the most similar first" in page
    query = replace(QUERY, rerank=True)
    assert "4 images, re-ranked" in results_page(query, gallery.search(query), gallery)


def test_nothing_found(gallery):
    page = results_page(Query(("red",), path="nowhere"), [], gallery)
    assert "The filters leave no image of 32 images" in page and "<img" not in page


def test_an_image_whose_file_has_gone():
    gallery = GalleryInMemory(people=2)
    hits = gallery.search(Query(("red",)))
    del gallery.images[hits[1].entry.id]
    page = results_page(Query(("red",)), hits, gallery)
    assert page.count("<img") == 7 and page.count("The file has gone or changed.") == 1
    assert re.findall(r'class="rank">(\d)<', page) == list("12345678")


def test_details():
    entry = Entry(1, "a.mp4", "3", START, 3723.46, (1, 2, 30, 40))
    assert list(details(entry)) == ["camera 3", "2026-01-31 08:30:00", "video at 1:02:03.5", "box 1, 2, 30 × 40"]
    assert list(details(replace(entry, camera=None, time=None, seconds=None, box=None))) == []


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (0.04, "0:00"), (59.96, "1:00"), (61.5, "1:01.5"), (3599.99, "1:00:00")]
)
def test_positions(seconds, text):
    assert position(seconds) == text


@pytest.mark.parametrize(
    "path, name, above",
    [
        ("a.jpg", "a.jpg", ""),
        ("/a.jpg", "a.jpg", ""),
        ("b/a.jpg", "a.jpg", "b"),
        ("/c/b/a.jpg", "a.jpg", "/c/b"),
        ("/e/d/c/b/a.jpg", "a.jpg", "…/c/b"),
        (r"C:\photos\b\a.jpg", "a.jpg", "…/photos/b"),
        ("synthetic/test/0012", "0012", "synthetic/test"),
    ],
)
def test_paths(path, name, above):
    assert (file_name(path), folder(path)) == (name, above)


@pytest.mark.parametrize(
    "size, name", [((64, 192), "slim"), ((40, 80), "half"), ((90, 80), "square"), ((160, 90), "wide")]
)
def test_shapes(size, name):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "JPEG")
    assert shape([file.getvalue()]) == name
