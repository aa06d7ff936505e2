"""The benchmarks of exports, of several adaptations and of the search: what they compare, and that they run."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_run

from upperson.deploy.export import NEEDED

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # the scripts find each other like this too
export, search, switching = map(importlib.import_module, ("export", "search", "switching"))


def test_a_swap_is_measured_by_the_similarity_of_pytorch():
    similarity = torch.tensor([[0.5, 0.9, 0.7], [0.1, 0.2, 0.3]])
    same = similarity.argsort(dim=1, descending=True)
    assert export.largest_swap(similarity, same) == 0 and export.percent_equal(same, same) == 100
    swapped = torch.tensor([[1, 0, 2], [2, 1, 0]])
    assert export.largest_swap(similarity, swapped) == pytest.approx(0.2)
    assert export.percent_equal(swapped, same) == 50


def test_parts_of_a_batch_have_the_adaptation_of_their_name(tmp_path):
    config = switching.preset("embedded").replace(backend="torch")
    adaptations = switching.adaptations_of(config, tmp_path)
    images = torch.randn(4, 3, *config.model.image_size)
    whole = switching.in_parts(adaptations, images, 1)
    for parts in (2, 4):
        torch.testing.assert_close(switching.in_parts(adaptations, images, parts), whole)
        assert adaptations.active == switching.NAMES[parts - 1]


@pytest.mark.slow
def test_switching_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["switching.py", "--times", "3"])
    assert switching.main() == 0
    assert "16 images with 4 adaptations" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason="needs the extra 'onnx'")
def test_export_runs(tmp_path, monkeypatch, capsys):
    path = tiny_run(tmp_path)
    (tmp_path / "results").mkdir()
    arguments = ["export.py", path, "--identities", 3, "--seconds", 1, "--output", tmp_path / "results"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    assert export.main() == 0
    page = (tmp_path / "results" / "export-cpu.md").read_text()
    assert page.removeprefix("# Exports on a CPU\n\n") in capsys.readouterr().out
    rows = json.loads((tmp_path / "results" / "export-cpu.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == [
        "open_clip, without the adaptation", "this project, PyTorch", "ONNX, float32", "ONNX, float16", "ONNX, int8",
    ]  # fmt: skip
    assert rows[2]["R@1"] == rows[1]["R@1"] and rows[2]["swapped"] < 1e-5 and rows[2]["same in float64"] == 100
    assert all(row["image"] > 0 and row["text"] > 0 and row["megabytes"] > 0 for row in rows)


@pytest.mark.slow
def test_search_runs(tmp_path, monkeypatch, capsys):
    arguments = ["search.py", "--sizes", 100, "--stores", "sqlite", "sqlite-half", "--output", tmp_path / "results"]
    arguments += ["--checkpoint", tiny_run(tmp_path, embedded_identities=(4, 2, 6))]
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    assert search.main() == 0
    page = (tmp_path / "results" / "search-cpu.md").read_text()
    assert page.removeprefix("# Stores of the search\n\n") in capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "search-cpu.json").read_text())
    assert [(row["store"], row["size"]) for row in found["rows"]] == [("sqlite", 100), ("sqlite-half", 100)]
    assert set(found["accuracy"]) == {"evaluation", "sqlite", "sqlite-half"}
    assert len(set(found["accuracy"].values())) == 1
