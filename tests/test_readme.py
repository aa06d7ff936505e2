"""The Python examples of the pages run, and what the pages name exists."""

import re
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_run

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
