"""The tables: their rows, that nothing is trained twice, what is printed and written, and what methods cost."""

import csv
import io
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from operators import DEVICE, slow_case
from PIL import Image
from tiny import tiny_training

from upperson.config.presets import preset, with_method
from upperson.data.splits import read_splits
from upperson.evaluate.embed import embed
from upperson.evaluate.results import METRICS, Results
from upperson.methods import CSKT, METHODS, FullFineTuning, UPPerson
from upperson.model import AdaptedCLIP
from upperson.model.checkpoint import load_model
from upperson.tables import __main__ as command
from upperson.tables import costs as measurement
from upperson.tables.costs import Peak, measure
from upperson.tables.orderings import orderings, student, summary, welch
from upperson.tables.paper import number_of, published
from upperson.tables.paper_flops import paper_flops
from upperson.tables.render import Measured, cost_cell, markdown, parameters_plot
from upperson.tables.rows import (
    COMPARED,
    LARGE,
    Setting,
    build_tables,
    embedded_setting,
    real_setting,
    rows_of_costs,
    sweep_table,
    trainings,
)
from upperson.tables.runs import Runs, distinct
from upperson.train.loop import build_objective

SETTINGS = {"embedded": (embedded_setting(), "embedded"), "real": (real_setting(Path("/data")), "cuhk-pedes")}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """One epoch of a tiny random CLIP on a few drawings."""
    folder = tmp_path_factory.mktemp("model")
    tiny = tiny_training(folder, embedded_identities=(6, 2, 3), epochs=1, warmup_epochs=0, learning_rate=3e-3)
    tiny = tiny.replace(log_every=10, save_every=500)
    scenes = tiny.replace(embedded_identities=(8, 4, 6))
    return Setting(
        {name: tiny.replace(dataset=name) for name in ("embedded", "embedded-night")},
        {name: scenes.replace(dataset=name) for name in ("embedded-scenes", "embedded-scenes-night")},
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.fixture
def run(setting, output, monkeypatch):
    """run("V", …) is the command on that setting, its status; all tests share the runs, which are a CPU's."""
    monkeypatch.setattr(command, "embedded_setting", lambda: setting)
    return lambda *arguments: command.main(["--output", str(output), "--device", "cpu", *arguments])


# ------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("where", SETTINGS)
def test_the_tables_are_those_of_the_paper(where):
    tables = build_tables(*SETTINGS[where])
    assert {"IV", *tables} == set(command.ALL)
    titles = {number: [row.config.model.method.title for row in table.rows] for number, table in tables.items()}
    assert titles["V"] == [
        "zero-shot CLIP",
        "full fine-tuning",
        "S-Prefix",
        "LoRA",
        "L-Adapter",
        "S-Prefix + LoRA",
        "S-Prefix + L-Adapter",
        "LoRA + L-Adapter",
        "UP-Person",
    ]
    assert titles["VI"] == ["UP-Person", "S-Prefix + DoRA + L-Adapter", "S-Prefix + WoRA + L-Adapter"]
    assert [
        (row.config.model.method.prefix_scale, title)
        for row, title in zip(tables["VII"].rows, titles["VII"], strict=True)
    ][1:] == [
        *((scale, "S-Prefix") for scale in (10, 50, 100, 150, 300, 500)),
        (10, "prefix + LoRA + L-Adapter"),
        (10, "UP-Person"),
        (30, "UP-Person"),
        (50, "UP-Person"),
    ]
    assert titles["VII"][0] == "prefix"
    assert [row.config.model.method.adapter_attn for row in tables["VIII"].rows] == [
        "ln-tuning",
        "sequential",
        "l-sequential",
        "parallel",
        "l-parallel",
    ]
    placed = [row.config.model.method for row in tables["IX"].rows]
    assert {(method.adapter_attn, method.adapter_mlp) for method in placed} == {
        (a, b) for a in ("parallel", "l-parallel") for b in ("parallel", "l-parallel")
    }
    assert [row.config.train.losses for row in tables["X"].rows] == ["sdm", "itc", "sdm+itc", "sdm+id", "sdm+id+mlm"]
    for number in ("XI", "XIII"):
        assert all(
            row.config.data.dataset != row.tested_on.data.dataset
            for row in tables[number].rows
            if row.tested_on is not None
        )
    assert tables["XII"].both_directions and not tables["V"].both_directions


@pytest.mark.parametrize("where", SETTINGS)
def test_every_method_has_a_row_with_its_recipe(where):
    setting, dataset = SETTINGS[where]
    rows = {row.config.model.method.name: row for row in build_tables(setting, dataset)["methods"].rows}
    assert list(rows)[:2] == ["zero-shot", "full"] and set(rows) == set(METHODS)
    for name, row in rows.items():
        assert row.name == row.config.model.method.title
        assert row.config == with_method(setting[dataset], name)
    assert rows["full"].config.train.learning_rate == {"embedded": 3e-4, "real": 1e-5}[where]


@pytest.mark.parametrize("where", SETTINGS)
def test_sweeps_go_through_all_their_values(where):
    setting, dataset = SETTINGS[where]
    rows = sweep_table(setting, dataset, "cskt").rows
    lengths = {row.config.model.method.prompt_length for row in rows}
    ratios = {1 / row.config.model.method.adapter_reduction for row in rows}
    assert min(lengths) <= 2 and max(lengths) == 64 and min(ratios) == 0.01 and max(ratios) == 0.5
    assert [row.name for row in rows] == [f"{axis} {point}" for axis, point in (row.point for row in rows)]
    paper = sweep_table(setting, dataset, "up-person").rows
    assert paper == build_tables(setting, dataset)["figure6"].rows
    assert all(str(getattr(row.config.model.method, row.point[0])) == row.point[1] for row in paper)


@pytest.mark.parametrize("where", SETTINGS)
def test_rows_of_a_table_are_different_runs_and_tables_share_theirs(where):
    # A GPU would have another precision, and so another folder.
    tables, runs = build_tables(*SETTINGS[where]), Runs(Path("x"), {"device": "cpu"})
    for number, table in tables.items():
        places = [(runs.folder_of(row.config), row.tested_on and row.tested_on.data.dataset) for row in table.rows]
        assert len(set(places)) == len(table.rows) - 2 * (number == "figure6")  # its sweeps meet in one run
        assert len({row.name for row in table.rows}) == len(table.rows)
    shared = [
        runs.folder_of(table.rows[index].config)
        for table, index in (
            (tables["V"], 8),
            (tables["VI"], 0),
            (tables["VIII"], 4),
            (tables["IX"], 3),
            (tables["X"], 0),
        )
    ]
    assert len(set(shared)) == 1
    config = tables["V"].rows[8].config
    assert runs.folder_of(config) == runs.folder_of(config.replace(workers=3, device="cuda"))
    assert runs.folder_of(config.replace(prefix_scale=10)) == runs.folder_of(config.replace(prefix_scale=10.0))
    assert runs.folder_of(config.replace(seed=2)).parent == runs.folder_of(config).parent
    others = (dict(precision="bf16"), dict(embedded_seed=4), dict(lora_rank=3))
    others += () if config.data.is_synthetic else (dict(data_root=Path("/elsewhere")),)
    assert len({runs.folder_of(config.replace(**change)) for change in ({}, *others)}) == 1 + len(others)


# ------------------------------------------------------------------------------------ the paper's figures


def test_the_papers_figures_belong_to_rows_of_the_real_data():
    """Each line of paper.csv names a row that is there, and each row of a table of the paper has its figures."""
    tables = build_tables(*SETTINGS["real"])
    for number in ("I", "II", "III", "V", "VII", "VIII", "IX", "X", "XI", "XII", "XIII"):
        here = {row.name for row in tables[number].rows}
        paper = {row.ours for row in published(number) if row.ours}
        assert {name for name in paper if not name.startswith("IRRA, ")} <= here, number
        without = {name for name in here - paper if "zero-shot" not in name and number not in ("X", "XII")}
        assert without <= {"S-Prefix, λ = 500", "full fine-tuning"}, (number, without)
    assert not published("VI") and published("methods") == published("IV")


@pytest.mark.parametrize(
    ("number", "row", "figures"),
    [
        ("I", "UP-Person, ViT-L/14", {"R@1": "76.04"}),
        ("III", "UP-Person, ViT-B/16", {"R@1": "63.15", "R@5": "83.45", "R@10": "89.75", "mAP": "48.15"}),
        ("IV", "CSKT", {"trained parameters": "12M", "FLOPs": "13886.23M", "R@1 RSTPReid": "57.75"}),
        ("V", "LoRA + L-Adapter", {"R@1": "73.54", "mAP": "65.89"}),
        ("VII", "UP-Person, vanilla prefix", {"R@1": "73.64"}),
        ("IX", "adapter, L-Adapter", {"R@1": "73.67"}),
        ("XI", "full fine-tuning, rstpreid → icfg-pedes", {"R@1": "29.03", "mAP": "18.26"}),
        ("XII", "UP-Person, mscoco", {"R@1": "56.51", "trained parameters": "7.4M"}),
        ("XIII", "UP-Person, flickr30k → rstpreid", {"R@1": "24.55"}),
    ],
)
def test_some_figures_of_the_paper(number, row, figures):
    (found,) = [line.figures for line in published(number) if line.ours == row]
    assert figures.items() <= found.items()


def test_numbers_as_printed():
    assert [number_of(text) for text in ("13783.40M", "1.9B", "7.4M", "74.17", "16")] == [
        13783.4e6,
        1.9e9,
        7.4e6,
        74.17,
        16,
    ]


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(0.0, 3, 1.0), (12.706, 1, 0.05), (4.303, 2, 0.05), (2.776, 4, 0.05), (2.132, 4, 0.1), (1.96, 1e5, 0.05)],
)
def test_students_distribution(t, freedom, p):
    """Against its printed tables."""
    assert student(t, freedom) == pytest.approx(p, rel=2e-3)


def test_welchs_test():
    assert welch([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(1)
    assert welch([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]) == pytest.approx(student(2 / (2 / 3) ** 0.5, 4))
    assert welch([2.0], [1.0, 2.0, 6.0]) == pytest.approx(student(1 / (7 / 3) ** 0.5, 2))  # zero-shot CLIP is one run
    assert welch([1.0, 1.0], [2.0, 2.0]) == 0 and welch([1.0, 1.0], [1.0, 1.0]) == 1


def test_orderings_are_decided_by_the_seeds():
    paper = {"best": 80.0, "middle": 70.0, "worst": 60.0, "like the worst": 60.0, "not run": 90.0}
    here = {
        "best": [50.0, 51.0, 52.0],
        "middle": [70.0, 70.5, 71.0],
        "worst": [48.0, 51.0, 52.0],
        "like the worst": [10.0],
        "not in the paper": [1.0],
    }
    found = {(pair.better, pair.worse): pair.verdict for pair in orderings(paper, here)}
    assert found == {
        ("best", "middle"): "reversed",
        ("best", "worst"): "undecided",
        ("best", "like the worst"): "reappears",
        ("middle", "worst"): "reappears",
        ("middle", "like the worst"): "reappears",
    }
    text = summary(orderings(paper, here), "R@1")
    assert text[0].startswith("Of the paper's 5 orderings by R@1, 3 reappear, 1 are reversed, and 1 are undecided")
    assert any(line.startswith("* reversed: best > middle (-19.50, p ") for line in text)
    assert orderings(paper, {"best": [1.0], "worst": [2.0]}) == []  # one seed decides nothing
    assert summary([], "R@1") == []


def measured(name: str, *percents: float) -> Measured:
    runs = [
        Results(name, "tiny", "a", "a", "test", 4, 4, dict.fromkeys(METRICS, percent), trained={"lora": 9})
        for percent in percents
    ]
    return Measured(name, runs)


def test_all_figures_of_the_paper_stand_in_the_table():
    text = markdown("V", "t", [measured("LoRA", 20.0, 22.0), measured("new", 1.0, 2.0)], ["text_to_image"], "c")
    lines = {line.strip("| ").split("|")[0].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "72.56" in lines["LoRA"] and "21.00 ± 1.41" in lines["LoRA"]
    assert lines["UP-Person (Ours)"].replace("|", " ").split()[-4:] == ["74.17", "89.70", "93.88", "65.91"]
    assert len(lines) == 2 + 2 + 7  # head, rule, both rows, what the paper alone has
    assert "arXiv 2504.10084, Table V, on CUHK-PEDES" in text
    cross = markdown("XI", "t", [measured("UP-Person, embedded → embedded-night", 3.0)], ["text_to_image"], "c")
    assert "| IRRA-CLIP, RSTPReid → ICFG-PEDES " in cross and cross.count(" → ") >= 18


def test_orderings_of_methods_are_those_on_cuhk_pedes():
    rows = [measured("CSKT", 10.0, 10.5), measured("UP-Person", 30.0, 30.5), measured("IRRA", 50.0, 50.5)]
    text = markdown("methods", "t", rows, ["text_to_image"], "c")
    assert "Of the paper's 3 orderings by R@1, 2 reappear, 1 are reversed, and 0 are undecided" in text
    assert "* reversed: UP-Person > IRRA (-20.00, p " in text and "orderings by mAP" not in text


def test_accuracy_by_parameters_is_drawn_from_both():
    rows = [measured("UP-Person", 50.0, 52.0), measured("zero-shot CLIP", 1.0), Measured("full fine-tuning", [None])]
    with Image.open(io.BytesIO(parameters_plot(rows, "t"))) as picture:
        assert picture.width > 2 * picture.height


# ------------------------------------------------------------------------------------ running


@pytest.mark.slow
def test_a_table_from_its_command(run, setting, output, capsys):
    assert run("V", "--seeds", "2", "--jobs", "2") == 0
    shown = capsys.readouterr().out
    assert "17 to run, about" in shown and "[17/17]" in shown
    rows = build_tables(setting, "embedded")["V"].rows
    text = (output / "V-embedded.md").read_text()
    assert (
        text in shown
        and "74.17" in text
        and "orderings by R@1" in text
        and "2 seeds, mean ± standard deviation" in text
    )
    with open(output / "V-embedded.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    runs = Runs(output / "runs", {})
    for row in rows:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row.name} "))
        seeds = (1,) if row.name == "zero-shot CLIP" else (1, 2)
        results = [
            json.loads((runs.folder_of(row.config.replace(seed=seed)) / "results.json").read_text()) for seed in seeds
        ]
        values = [found["text_to_image"]["mAP"] for found in results]
        assert [
            float(entry["percent"]) for entry in lines if entry["row"] == row.name and entry["metric"] == "mAP"
        ] == values
        expected = f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
        assert f" {expected} " in line and f"{results[0]['trained_parameters']:,}" in line
    Image.open(output / "V-embedded.png").verify()


@pytest.mark.parametrize(("jobs", "at_once", "seconds"), [("1", 1, 300), ("2", 2, 150), ("8", 3, 100)])
def test_the_estimate_counts_the_runs_that_run_at_once(run, tmp_path, monkeypatch, capsys, jobs, at_once, seconds):
    """Three runs on eight processes take as long as one: five processes wait."""
    calls = []

    class Pool:
        __enter__ = __exit__ = lambda self, *_: self

        def submit(self, *_):
            calls.append(_)
            return type("Future", (), {"result": lambda self: 100.0})()

    monkeypatch.setattr(Runs, "processes", lambda self: Pool())
    monkeypatch.setattr(Runs, "train_all", lambda *_: iter(()))
    monkeypatch.setattr(command, "write", lambda *_: None)
    assert run("VI", "--jobs", jobs, "--output", str(tmp_path)) == 0 and calls
    shown = f"3 to run, about 100 s each on this machine, {at_once} at once: {command.duration(seconds)}\n"
    assert shown in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_is_trained_twice(run, setting, output, capsys):
    run("V")
    capsys.readouterr()
    runs = Runs(output / "runs", {})
    places = [runs.folder_of(row.config) for row in build_tables(setting, "embedded")["V"].rows]
    before = [(place / "results.json").stat().st_mtime_ns for place in places]
    assert run("V") == 0
    assert "9 runs, 9 of them already done" in (shown := capsys.readouterr().out) and "to run" not in shown
    assert [(place / "results.json").stat().st_mtime_ns for place in places] == before

    # A run that was stopped goes on: the finished one again writes the same results, from its saved state.
    whole = (places[-1] / "results.json").read_bytes()
    (places[-1] / "results.json").unlink()
    assert run("V") == 0
    assert "9 runs, 8 of them" in capsys.readouterr().out
    assert (places[-1] / "results.json").read_bytes() == whole
    assert "resuming in epoch 2" in places[-1].with_suffix(".log").read_text()


def test_listing_trains_nothing(run, tmp_path, capsys):
    assert run("VI", "--list", "--output", str(tmp_path / "new")) == 0
    assert capsys.readouterr().out.count("missing  ") == 3
    assert not (tmp_path / "new").exists()
    assert run("IV", "--list") == 0
    assert capsys.readouterr().out == "no runs: table IV trains nothing\n"


def test_a_list_tells_backbones_apart(tmp_path, capsys):
    folders = ["--data-root", str(tmp_path), "--output", str(tmp_path / "new")]
    for number, dataset in COMPARED.items():
        assert command.main([number, "--list", *folders]) == 0
        _, *lines = capsys.readouterr().out.splitlines()
        assert [line.split(": ")[0] for line in lines] == [
            f"  missing  UP-Person on {model}, {dataset}, seed 1" for model in ("ViT-B-16-quickgelu", LARGE)
        ]


@pytest.mark.slow
def test_tested_on_another_data_set(run, setting, output, capsys):
    assert run("XI") == 0
    text = (output / "XI-embedded.md").read_text()
    row = next(
        row
        for row in build_tables(setting, "embedded")["XI"].rows
        if row.name == "UP-Person, embedded-night → embedded"
    )
    model = load_model(Runs(output / "runs", {}).folder_of(row.config) / "best.safetensors")
    expected = embed(model, read_splits(row.tested_on.data)["test"]).text_to_image().metrics
    line = next(line for line in text.splitlines() if line.startswith(f"| {row.name} "))
    assert [f"{expected[name]:.2f}" for name in METRICS] == line.replace("|", " ").split()[-5:]


@pytest.mark.slow
def test_a_figure_of_another_data_set(run, setting, output):
    assert run("figure7", "--dataset", "embedded-night") == 0
    Image.open(output / "figure7-embedded-night.png").verify()
    place = Runs(output / "runs", {}).folder_of(setting["embedded-night"])
    assert (place / "results.json").exists()


@pytest.mark.slow
def test_both_directions(run, setting, output):
    assert run("XII") == 0
    header, _, *lines = [
        line for line in (output / "XII-embedded-scenes.md").read_text().splitlines() if line.startswith("|")
    ]
    assert "R@1, text → image" in header and "mINP, image → text" in header
    assert sum("embedded-scenes" in line for line in lines) == 6 and any("BEIT-3, MSCOCO" in line for line in lines)
    row = build_tables(setting, "embedded")["XII"].rows[2]
    model = load_model(Runs(output / "runs", {}).folder_of(row.config) / "best.safetensors")
    found = embed(model, read_splits(row.config.data)["test"])
    cells = next(line for line in lines if line.startswith(f"| {row.name} ")).replace("|", " ").split()
    assert cells[-10] == f"{found.text_to_image().metrics['R@1']:.2f}"
    assert cells[-5] == f"{found.image_to_text().metrics['R@1']:.2f}"


@pytest.mark.slow
def test_figures(run, output, monkeypatch):
    points = {"lora_rank": {"1": {"lora_rank": 1}, "2": {"lora_rank": 2}}, "prefix_length": {"1": {"prefix_length": 1}}}
    monkeypatch.setattr(UPPerson, "sweeps", staticmethod(lambda synthetic: points))
    assert run("figure6", "figure7") == 0
    for name in ("figure6-embedded.png", "figure7-embedded.png"):
        Image.open(output / name).verify()
    assert "lora_rank 1" in (output / "figure6-embedded.csv").read_text()


@pytest.mark.slow
def test_a_sweep_of_several_fields(run, output, monkeypatch, capsys):
    points = {
        "prompts": {"4": {"prompt_length": 2}, "8, without positions": {"prompt_length": 4, "prompt_positions": False}}
    }
    monkeypatch.setattr(CSKT, "sweeps", staticmethod(lambda synthetic: points))
    assert run("sweeps", "--method", "cskt") == 0
    text = (output / "sweeps-cskt-embedded.md").read_text()
    assert text.startswith("# CSKT with other options, embedded\n") and text in capsys.readouterr().out
    assert "| prompts 4 " in text and "| prompts 8, without positions " in text
    Image.open(output / "sweeps-cskt-embedded.png").verify()


@pytest.mark.slow
def test_every_method_in_one_table(run, setting, output, monkeypatch, capsys):
    monkeypatch.setitem(measurement.PRESETS, measurement.FULL_SIZE, setting["embedded"])
    monkeypatch.setattr(measurement, "SYNTHETIC_BATCH", 4)
    monkeypatch.setattr(measurement, "measure_apart", measure_parts)
    assert run("methods", "figure5") == 0
    text = (output / "methods-embedded.md").read_text()
    assert text.startswith("# Every method with its recipe, embedded\n") and text in capsys.readouterr().out
    assert "1 epochs (Prompt Decoupling 1 + 4)" in text
    runs = Runs(output / "runs", {})
    first, second = (part.splitlines() for part in text.split("The costs are those of "))
    with open(output / "methods-embedded-costs.csv", encoding="utf-8") as file:
        costs = list(csv.DictReader(file))
    for row in build_tables(setting, "embedded")["methods"].rows:
        results = json.loads((runs.folder_of(row.config) / "results.json").read_text())
        (line,) = [line for line in first if line.startswith(f"| {row.name} ")]
        trained, *cells = (cell.strip() for cell in line.strip("| ").split("|")[1:])
        assert trained == f"{results['trained_parameters']:,}"
        assert cells[: len(METRICS)] == [f"{results['text_to_image'][name]:.2f}" for name in METRICS]
        stages = len(trainings(row.config))
        assert sum(cost["method"] == row.name for cost in costs) == 2 * stages
        assert line.count(" / ") == 3 * (stages - 1)
        assert sum(line.startswith(f"| {row.name} ") for line in second) == 1
    for name in ("methods-embedded.png", "figure5-embedded.png"):  # of the same runs
        Image.open(output / name).verify()


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result(run, setting, output, capsys, monkeypatch):
    diverging = {"learning_rate": 3e-4, "temperature": 1e-39}
    monkeypatch.setattr(FullFineTuning, "recipe", staticmethod(lambda synthetic: diverging))
    assert run("V") == 0
    line = next(line for line in (output / "V-embedded.md").read_text().splitlines() if "full fine-tuning" in line)
    assert line.count("diverged") == 5
    capsys.readouterr()
    assert run("V") == 0 and "9 runs, 9 of them already done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_command_leaves_no_process_behind(tmp_path):
    """SIGKILL, after which no code of the command runs."""
    script = tmp_path / "command.py"
    script.write_text(
        "import os, time\nfrom pathlib import Path\nfrom upperson.tables.runs import Runs\n"
        "if __name__ == '__main__':\n"
        "    with Runs(Path('.'), {}).processes() as processes:\n"
        "        print(processes.submit(os.getpid).result(), flush=True)\n"
        "        processes.submit(time.sleep, 600).result()\n"
    )
    command = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert int(command.stdout.readline()) != command.pid
    command.kill()
    command.communicate(timeout=60)  # until nobody holds its output any more


def test_distinct_keeps_the_order():
    tables, runs = build_tables(*SETTINGS["embedded"]), Runs(Path("x"), {})
    configs = [row.config for number in ("VI", "V") for row in tables[number].rows]
    found = distinct(configs, runs)
    assert len(found) == len(configs) - 1 and found[0] == configs[0] and found[1] == configs[1]


def test_an_output_that_is_a_file_is_found_before_any_work(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("V", "--output", str(tmp_path / "file")) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and re.fullmatch(
        "error: --output: .*file is a regular file; expected a folder that can be written to\n", shown.err
    )


@pytest.mark.parametrize("name", [slow_case("config.json"), slow_case("resume.safetensors"), "results.json"])
def test_a_damaged_file_of_a_run_is_one_line(run, setting, tmp_path, capsys, name):
    """Each is what a run of the table finds in its folder."""
    runs = Runs(tmp_path / "runs", {"device": "cpu", "workers": 0})
    tables = build_tables(setting, "embedded")
    for row in tables["V"].rows:
        folder = runs.folder_of(row.config)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(row.config.replace(run_dir=folder).to_json())
        (folder / name).write_text("[")
    assert run("V", "--output", str(tmp_path)) == 1
    shown = capsys.readouterr().err
    assert re.search(rf"error: .*{name}: .*\n\Z", shown) and "Traceback" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["XIV"], "invalid choice: 'XIV'"),
        (["V", "--seeds", "0"], "--seeds: expected 1 to 1000, found 0"),
        (["V", "--device", "tpu"], "device: 'tpu' is not allowed"),
        (["V", "--workers", "-1"], "workers: -1 is not allowed"),
        (["V", "--seeds", "1000000000"], "--seeds: expected 1 to 1000, found 1000000000"),
        (["V", "--jobs", "0"], "--jobs: expected 1 to 256, found 0"),
        (["V", "--dataset", "cuhk-pedes"], "found cuhk-pedes; real data sets need --data-root"),
        (
            ["sweeps"],
            "--method: the table sweeps needs a method with sweeps, up-person or cskt or dm-adapter; found none",
        ),
        (
            ["sweeps", "--method", "full"],
            "--method: the table sweeps needs a method with sweeps, up-person or cskt or dm-adapter; found",
        ),
        (["V", "--method", "cskt"], "--method: only for the table sweeps"),
        (["XI", "XIII", "--dataset", "embedded"], "--dataset: the data sets of XI and XIII are fixed; expected none"),
        (["I", "--data-root", "d", "--dataset", "rstpreid"], "--dataset: the data sets of I are fixed"),
        (["IV", "--seeds", "2"], "--seeds: table IV trains nothing"),
        (["IV", "--jobs", "2"], "--jobs: table IV trains nothing"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_missing_data_set_is_one_line(tmp_path, capsys):
    assert command.main(["V", "--data-root", str(tmp_path / "none"), "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "does not exist" in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------ costs


def measure_parts(config, batch_size):
    """measure_apart without processes."""
    return [measure(part, batch_size) for part in trainings(config)]


@pytest.mark.slow
def test_flops_as_the_paper_counts_them():
    """To the digit, of all five methods of its Table IV."""
    printed = {row.ours: number_of(row.figures["FLOPs"]) for row in published("IV") if row.ours}
    expected = {
        "full": 12_979_273_728,
        "up-person": 13_783_400_448,
        "cskt": 13_886_226_432,
        "dm-adapter": 13_796_911_104,
        "irra": 17_542_278_144,
    }
    for method, multiply_adds in expected.items():
        config = preset("cuhk-pedes", method).replace(pretrained="none", device="cpu", backend="torch")
        model = AdaptedCLIP(config.model)
        objective = build_objective(config, model, range(measurement.PEOPLE))
        assert paper_flops(model, objective) == multiply_adds
        assert printed[config.model.method.title] == pytest.approx(multiply_adds, abs=5e3)


@pytest.mark.slow
def test_costs(setting, monkeypatch):
    monkeypatch.setattr(measurement, "QUERIES", 4)  # the interpreter takes minutes for a thousand
    monkeypatch.setattr(measurement, "REPETITIONS", 1)
    found = {name: measure(config, 4) for name, config in rows_of_costs(setting["embedded"]).items()}
    fused = measure(setting["embedded"].replace(backend="triton", device=DEVICE), 4)
    assert (fused.inference_gflops, fused.step_gflops) == (
        found["UP-Person"].inference_gflops,
        found["UP-Person"].step_gflops,
    )
    trained = {name: cost.trained_parameters for name, cost in found.items()}
    assert trained["zero-shot CLIP"] == 0 and found["zero-shot CLIP"].step_gflops == 0
    assert trained["UP-Person"] == trained["S-Prefix"] + trained["LoRA"] + trained["L-Adapter"]
    assert found["UP-Person"].all_parameters == found["zero-shot CLIP"].all_parameters + trained["UP-Person"]

    # Zero-shot inference by hand: 13 tokens of the image, 24 of the text, width 32, two blocks each. In the last block
    # all tokens give keys and values, but one asks, and goes through the output projection and the MLP.
    tokens, width = (13, 24), 32
    linear = sum(2 * (12 * n + 2 * n + 1 + 9) * width**2 for n in tokens)
    attention = sum(2 * 2 * (n * n + n) * width for n in tokens)
    patches, projections = 2 * 12 * (3 * 64) * width, 2 * 2 * width * 16
    by_hand = linear + attention + patches + projections
    assert 1e9 * found["zero-shot CLIP"].inference_gflops == pytest.approx(by_hand, rel=0.01)
    assert found["UP-Person"].inference_gflops > found["LoRA"].inference_gflops > 0
    assert found["full fine-tuning"].step_gflops > found["S-Prefix"].step_gflops > 0
    assert all(cost.query_seconds > 0 for cost in found.values())


@pytest.mark.slow
def test_costs_of_stages(setting):
    """Each trains its own parameters, all of them are those of one model."""
    config = with_method(setting["embedded"], "prompt-decoupling")
    prompts, encoders = costs = measure_parts(config, 4)
    clip = measure(with_method(setting["embedded"], "full"), 4)
    assert prompts.trained_parameters == 2 * 2 * 4 * 32  # towers, layers, prompts, width
    assert encoders.trained_parameters == clip.trained_parameters
    assert prompts.all_parameters == encoders.all_parameters == clip.all_parameters + prompts.trained_parameters
    assert 0 < prompts.step_gflops < encoders.step_gflops
    assert cost_cell(costs, "trained_parameters") == f"512 / {clip.trained_parameters:,}"
    assert cost_cell(costs, "all_parameters") == f"{encoders.all_parameters:,}"


@pytest.mark.slow
@pytest.mark.skipif(not Peak.CLEAR.exists(), reason="only Linux tells the peak of a process's memory")
def test_peak_memory():
    """In a process of its own, as the command measures: one that has freed much gives it away again unseen."""
    script = """if True:
        import torch
        from upperson.tables.costs import Peak
        peak = Peak(torch.device("cpu"))
        block = torch.ones(50_000_000)
        del block
        print(peak.megabytes(), Peak(torch.device("cpu")).megabytes())
    """
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    of_block, of_nothing = map(float, shown.split())
    assert 190 < of_block < 260 and of_nothing < 20


@pytest.mark.slow
def test_costs_from_the_command(run, setting, output, monkeypatch, capsys):
    monkeypatch.setattr(measurement, "SYNTHETIC_BATCH", 4)
    monkeypatch.setattr(measurement, "measure_apart", measure_parts)
    monkeypatch.setitem(measurement.PRESETS, measurement.FULL_SIZE, setting["embedded"])
    assert run("IV") == 0
    text = (output / "IV-embedded.md").read_text()
    assert text in capsys.readouterr().out and "GFLOPs" in text and text.count("| UP-Person") == 3
