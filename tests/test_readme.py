"""The Python examples of the pages run, and what the pages name exists."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_run, write_image

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "kernels/README.md",
    "bench/README.md",
    "upperson/data/README.md",
    "upperson/deploy/README.md",
    "upperson/methods/README.md",
    "upperson/search/README.md",
    "upperson/tables/README.md",
]


def example(page: str, word: str) -> str:
    """The one Python example of a page that contains `word`."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (found,) = [code for code in examples if word in code]
    return found


def test_the_kernels_alone(capsys):
    code = example("kernels/README.md", "prefix_attention").replace("8, 193, 3", "1, 17, 3")  # the interpreter is slow
    exec(code, {})
    assert "torch.Size([1, 17, 3, 12, 64])" in capsys.readouterr().out


def test_search_of_a_folder(tmp_path, monkeypatch, capsys):
    """The example prints the images of a folder, the most similar first."""
    tiny_run(tmp_path)
    images = tmp_path / "my" / "images"
    images.mkdir(parents=True)
    paths = [images / f"{colour}.jpg" for colour in ("red", "green", "blue")]
    for path in paths:
        Image.new("RGB", (30, 80), path.stem).save(path)
    monkeypatch.chdir(tmp_path)
    exec(example("README.md", "Gallery"), {})
    report, *lines = capsys.readouterr().out.splitlines()
    assert report == "3 added"
    printed = [line.split() for line in lines]
    similarities = [float(similarity) for similarity, _ in printed]
    assert similarities == sorted(similarities, reverse=True)
    assert all(abs(similarity) <= 1 for similarity in similarities)
    assert {name for _, name in printed} == set(map(str, paths))


def test_share_and_serve(tmp_path, monkeypatch):
    """The examples of a shared model, and of two adaptations of one backbone."""
    best = tiny_run(tmp_path, model="embedded", pretrained="embedded")
    monkeypatch.chdir(tmp_path)
    share = example("upperson/deploy/README.md", "save_pretrained(")
    exec(share.replace("runs/cuhk-pedes-1/best.safetensors", str(best)), {})
    for name in ("day", "night"):
        shutil.copy(best, f"{name}.safetensors")
        write_image(tmp_path / "photos" / f"{name}.jpg")
    serve, found = example("upperson/deploy/README.md", "Adaptations(").replace("/1.jpg", "/day.jpg"), {}
    exec(serve.replace("/2.jpg", "/night.jpg"), found)
    assert found["adaptations"].active == "night" and len(found["features"]) == 2


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    text = (ROOT / page).read_text()
    quoted = re.findall(r"`((?:kernels|upperson|bench|tests)/[\w/.-]+)`", text)
    linked = [link.split("#")[0] for link in re.findall(r"\]\(([\w/.#-]+)\)", text)]
    assert quoted or linked
    for name in quoted:
        assert (ROOT / name).exists(), name
    for name in linked:
        assert ((ROOT / page).parent / name).exists(), name


def test_named_functions_exist():
    rows = re.findall(r"`(\w+)` in `([\w/.]+)`", (ROOT / "README.md").read_text())
    assert len(rows) >= 6
    for name, path in rows:
        assert re.search(rf"^ *(?:def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), (name, path)
