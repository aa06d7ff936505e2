"""bench/step.py: what is counted agrees with sums by hand, what is timed computes the same, ours needs less."""

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.slow

pytest.importorskip("open_clip")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # the scripts find each other like this too
report, step = map(importlib.import_module, ("report", "step"))
counting, device, paths, profiling, targets = (
    importlib.import_module(f"harness.{name}") for name in ("counting", "device", "paths", "profiling", "targets")
)

CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")
ROWS = 1000


@pytest.fixture(params=["with memory", "without memory"])
def network(request):
    """The mode to work in, linear 64 → 128, ReLU, linear 128 → 32, and its input."""
    model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)), torch.randn(ROWS, 64)
    if request.param == "with memory":
        return torch.enable_grad(), model, x
    mode, (model, x) = counting.without_memory(model, x)
    return mode, model, x


def train(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    model(x).sum().backward()


def test_operations_of_a_network(network):
    mode, model, x = network
    with mode:
        found = counting.cost(lambda: train(model, x))
    first, second = 2 * ROWS * 64 * 128, 2 * ROWS * 128 * 32
    assert found.flops == 2 * first + 3 * second  # the input needs no gradient


def test_peak_of_a_network(network):
    """Most lives where ReLU is differentiated: its output, the gradient of that, and the one that is just made."""
    mode, model, x = network
    with mode:
        found = counting.cost(lambda: train(model, x))
    hidden = ROWS * 128 * 4
    weights = 32 * 128 * 4 + 32 * 4  # gradients of the second layer
    sums = 2 * 4  # the sum, and its gradient, 1
    assert found.peak == 3 * hidden + weights + sums
    assert found.at_peak[0] == counting.Group((ROWS, 128), "float32", 3, 3 * hidden)
    assert sum(group.bytes for group in found.at_peak) == found.peak


def test_what_a_network_keeps(network):
    mode, model, x = network
    with mode:
        (group,), flops = counting.saved(lambda: model(x), [*model.parameters(), x])
    assert flops == 2 * ROWS * (64 * 128 + 128 * 32)
    assert group == counting.Group((ROWS, 128), "float32", 1, ROWS * 128 * 4)  # ReLU's output, once


def test_bytes_that_operators_touch():
    x = torch.ones(100, 10)

    def call():
        empty = torch.empty(100, 10)  # touches nothing
        view = x.t()[:5]  # nor does this
        total = view + x[0, :5, None].expand(5, 100)  # 500 read, 5 read, 500 written
        total.mul_(2.0)  # 500 read, 500 written
        return empty, total

    found = counting.cost(call)
    assert found.touched == 4 * (500 + 5 + 500 + 500 + 500)
    assert found.peak == 4 * (1000 + 500)


def test_storages_are_forgotten_when_they_are_freed():
    with counting.Operators() as operators:
        kept = [torch.zeros(250) for _ in range(3)]
        view = kept[0][:10]
        assert operators.live == 3000
        del kept
        assert operators.live == 1000  # the view holds one
        del view
        assert operators.live == 0
    assert operators.peak == 3000 and len(operators.at_peak) == 3


# ---------------------------------------------------------------------------------------- paths


@pytest.fixture
def plain_operators(monkeypatch):
    """The embedded model on PyTorch alone, not in Triton's interpreter."""
    config = paths.small().replace(backend="torch")
    monkeypatch.setattr(paths, "small", lambda: config)
    return config


def take_steps(path, config, number: int) -> list[float]:
    model = paths.build(path, config)
    batches = paths.random_batches(config, model.tokenizer, model.context_length, 4, 2)
    step = paths.Step(model, paths.prepare(model, batches, CPU), "fp32", path.configuration(config).train)
    return [step().item() for _ in range(number)]


@pytest.mark.parametrize("name", [name for name in paths.COUNTED if paths.COUNTED[name].method == paths.DEFAULT])
def test_paths_agree_before_and_after_steps(name, plain_operators):
    losses = take_steps(paths.COUNTED[name], plain_operators, 4)
    assert losses == pytest.approx(take_steps(paths.TIMED["plain"], plain_operators, 4), rel=1e-4)
    assert len(set(losses)) == 4


def test_full_fine_tuning_trains_all_of_clip(plain_operators):
    model = paths.build(paths.TIMED["full fine-tuning"], plain_operators)
    assert set(model.trained_parameters()) == set(model.clip_parameters())
    first, _, third = take_steps(paths.TIMED["full fine-tuning"], plain_operators, 3)
    assert third < first  # on the same batch


def test_every_method_is_timed(plain_operators):
    """Each stage of one in stages trains its own; what is timed learns the batch that it sees."""
    timed = {(path.method, path.stage) for path in paths.TIMED.values()}
    assert {method for method, _ in timed} == {name for name, method in paths.METHODS.items() if method().trains}
    for name, path in dict(paths.further_methods()).items():
        model = paths.build(path, plain_operators)
        trained = set(model.trained_parameters())
        if model.config.method.trains_clip:
            assert trained == set(model.clip_parameters())
        else:
            assert trained and not trained & set(model.clip_parameters())
        first, _, third = take_steps(path, plain_operators, 3)
        assert third < first, name


def test_what_is_plain(plain_operators):
    model = paths.build(paths.TIMED["plain"], plain_operators)
    (batch,) = paths.random_batches(plain_operators, model.tokenizer, 77, 4, 1)
    ((_, captions, _),) = paths.prepare(model, [batch], CPU)
    assert captions.shape == (4, 77)
    found, _ = counting.saved(lambda: model.encode_image(batch.images), model.parameters())
    heads, tokens, prefix = 4, 49, plain_operators.model.method.prefix_length
    weights = [group for group in found if group.shape == (4, heads, tokens, tokens + prefix)]
    assert [group.number for group in weights] == [4]  # one of each block


def test_captions_are_as_long_as_those_of_cuhk_pedes():
    model = paths.build(paths.TIMED["ours"], paths.small())
    batches = paths.random_batches(paths.small(), model.tokenizer, 77, 64, 4)
    tokens = torch.cat([(batch.tokens != 0).sum(1) for batch in batches])
    assert len({len(batch.tokens) for batch in batches}) == 1 and len(set(tokens.tolist())) > 20
    assert tokens.float().mean() == pytest.approx(paths.TOKENS, abs=0.1)
    assert paths.fill(batches) == pytest.approx(28.7 / 77, abs=0.005)


# ---------------------------------------------------------------------------------------- full size


@pytest.fixture(scope="module")
def full_size() -> dict[str, dict]:
    return {count["path"]: count for count in step.count_apart(128)}


def test_fewer_operations_and_half_the_memory(full_size):
    plain, ours = full_size["plain"], full_size["ours"]
    assert plain["flops"] >= 1.25 * ours["flops"]
    assert 2 * ours["peak"] <= plain["peak"]
    assert 2 * ours["touched"] <= plain["touched"]
    assert ours["trained_parameters"] == plain["trained_parameters"] == 7_419_816
    assert full_size["CSKT"]["trained_parameters"] == 12_117_888
    assert full_size["DM-Adapter"]["trained_parameters"] == 15_669_528


def test_calls_and_launches_of_a_step(full_size):
    """Python and the launches are what a GPU would wait for."""
    assert 500 < full_size["ours"]["calls"] <= 900
    assert 500 < full_size["ours"]["launches"] <= 1000
    assert full_size["plain"]["launches"] > 3 * full_size["ours"]["launches"]


def test_every_switch_brings_something(full_size):
    for name in paths.WITHOUT:
        assert full_size[name]["flops"] > full_size["ours"]["flops"]
        if "gradients" not in name:  # low-rank gradients spare operations and launches, not memory
            assert full_size[name]["peak"] > full_size["ours"]["peak"]
        else:
            assert full_size[name]["launches"] > full_size["ours"]["launches"]


def test_operations_of_the_plain_path(full_size):
    """Forward, by hand: twelve blocks, the first layer, the projection of the features."""

    def tower(tokens: int, length: int, width: int, hidden: int, first: int) -> int:
        adapters, attention, merging = 4 * hidden * width, 2 * (length + 10) * width, 2 * 32 * width**2
        block = tokens * (12 * width**2 + adapters + attention) + merging
        return 2 * (12 * block + first + 128 * width * 512)

    image, text = tower(128 * 193, 193, 768, 96, 128 * 192 * 768 * 768), tower(128 * 77, 77, 512, 64, 0)
    assert full_size["plain"]["image_flops"] == pytest.approx(image, rel=1e-3)
    assert full_size["plain"]["text_flops"] == pytest.approx(text, rel=1e-3)


def test_activations_list_what_lives(full_size):
    lines = counting.activations(full_size["ours"])
    assert any("(24704, 3072)" in line for line in lines)  # the MLP's input of QuickGELU
    (kept,) = [line for line in lines if "the image tower keeps" in line]
    assert float(kept.split(" MiB, ")[1].split(" C")[0]) < 12


# ---------------------------------------------------------------------------------------- the command


@pytest.fixture
def quick(monkeypatch, plain_operators, full_size):
    """Small images, few steps, rates that need no measuring, and the full size counted once for all tests."""
    config = plain_operators.replace(image_size=(64, 32))
    monkeypatch.setattr(paths, "small", lambda: config)
    monkeypatch.setattr(step, "BATCHES", step.COMPARED)
    monkeypatch.setattr(profiling, "STEPS", 1)
    monkeypatch.setattr(step, "measure_rates", lambda *_: device.Rates("a device", 1e9, 1e9))
    monkeypatch.setattr(step, "count_apart", lambda batch: list(full_size.values()))


def time_only(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(paths, "TIMED", {name: paths.TIMED[name] for name in names})


def run_main(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["step.py", *map(str, arguments)])
    return step.main()


@needs_no_gpu
def test_one_table_of_all_paths(quick, tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, "--batch", "2", "--seconds", "0.01", "--output", tmp_path, "--profile", tmp_path) == 0
    result = json.loads((tmp_path / "step-cpu.json").read_text())
    assert [row["path"] for row in result["rows"]] == [name for name, path in paths.TIMED.items() if not path.compiled]
    for row in result["rows"]:
        assert row["images_per_second"] == pytest.approx(2e3 / row["milliseconds"])
        assert row["share_of_matrix_rate"] == pytest.approx(row["flops"] / row["milliseconds"] / 1e6)
        assert row["peak_memory"] > 0 and row["touched"] > 0 and row["p20"] <= row["milliseconds"] <= row["p80"]
    assert set(result["left_out"]) == {"plain, compiled", "ours, compiled"}
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "step-cpu.md").read_text().strip()
    assert "| ours, captions padded " in printed and "## Where the time goes: ours" in printed
    assert "Left out: ours, compiled, compiles for minutes" in printed
    with gzip.open(tmp_path / "step-ours.json.gz") as trace:
        assert any(event["name"] == "aten::addmm" for event in json.load(trace)["traceEvents"])


@needs_no_gpu
def test_each_path_is_written_before_the_next_is_timed(quick, tmp_path, monkeypatch):
    row_of, timed = step.row_of, []

    def stops_at_the_third(name, *rest):
        if len(timed) == 2:
            raise KeyboardInterrupt
        timed.append(name)
        return row_of(name, *rest)

    time_only(monkeypatch, "plain", "full fine-tuning", "ours")
    monkeypatch.setattr(step, "row_of", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, "--batch", "2", "--seconds", "0.01", "--json", tmp_path / "step.json")
    result = json.loads((tmp_path / "step.json").read_text())
    assert [row["path"] for row in result["rows"]] == timed == ["plain", "full fine-tuning"]
    assert result["pending"][0] == "ours" and "Not timed yet: ours." in result["text"]


@needs_no_gpu
def test_paths_that_disagree_are_not_timed(quick, monkeypatch, capsys):
    explicit = paths.explicit_attention
    time_only(monkeypatch, "plain", "ours")
    monkeypatch.setattr(paths, "explicit_attention", lambda qkv, *rest, **others: explicit(1.5 * qkv, *rest, **others))
    assert run_main(monkeypatch, "--batch", "2", "--seconds", "0.01") == 1
    printed = capsys.readouterr()
    assert "error: ours: wrong: first losses " in printed.err and "so nothing is timed" in printed.err
    assert "images/s" not in printed.out


@needs_no_gpu
def test_a_compiled_path_that_is_wrong_is_left_out(quick, monkeypatch, capsys):
    time_only(monkeypatch, "plain", "ours", "ours, compiled")
    monkeypatch.setattr(
        paths.AdaptedCLIP, "compile_blocks", lambda model: model.image_blocks[0].prefix.value.data.add_(1)
    )
    assert run_main(monkeypatch, "--batch", "2", "--seconds", "0.01", "--compiled") == 1
    printed = capsys.readouterr().out
    assert "Left out: ours, compiled, wrong: first losses " in printed and "| ours  " in printed
    assert "| ours, compiled" not in printed


def test_a_wrong_gradient_shows_in_the_next_loss():
    losses = {"plain": [25.0, 24.0, 23.0, 9.0], "ours": [25.0, 24.1, 23.0, 9.0], "full fine-tuning": [1.0, 1.0, 1.0]}
    assert step.disagreements(losses, 1e-2) == {}
    assert step.disagreements(losses, 1e-3) == {
        "ours": "wrong: first losses 25.0000, 24.1000, 23.0000, not 25.0000, 24.0000, 23.0000"
    }
    assert step.disagreements({"plain": [1.0] * 3, "ours": [float("nan")] * 3}, 1e-3)


def test_one_pair_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--batch", "1")
    assert "--batch: '1' is not allowed; expected a whole number from 2" in capsys.readouterr().err


def test_kinds_of_operations():
    def event(name: str, parent=None):
        return type("Event", (), dict(name=name, cpu_parent=parent))()

    optimizer = event("Optimizer.step#Adam.step")
    assert profiling.kind_of(event("aten::mul_", event("aten::mul", optimizer))) == "optimizer"
    for name, kind in {
        "aten::addmm": "matrix products",
        "upperson::prefix_attention_backward": "attention",
        "aten::mul": "elementwise",
        "aten::native_layer_norm": "LayerNorm and adapter",
        "upperson::layernorm_adapter": "LayerNorm and adapter",
        "aten::_softmax": "softmax",
        "upperson::quick_gelu": "activation",
        "aten::copy_": "copies and layout",
        "aten::sum": "sums",
        "aten::mkldnn_convolution": "convolution",
        "aten::view": "rest",
    }.items():
        assert profiling.kind_of(event(name)) == kind, name


# ---------------------------------------------------------------------------------------- the report


def row(path: str, milliseconds: float, share: float, peak: int) -> dict:
    return dict(path=path, milliseconds=milliseconds, share_of_matrix_rate=share, peak_memory=peak)


def test_targets_are_held_against_the_plain_path():
    found = targets.step_targets(
        [row("plain", 90.0, 0.2, 100), row("ours", 25.0, 0.5, 49), row("ours, compiled", 18.0, 0.6, 51)]
    )
    assert [(round(target["measured"], 2), target["met"]) for target in found] == [
        (1.11, True),
        (0.6, True),
        (5.0, True),
        (1.96, False),
    ]
    assert {target["note"] for target in found} == {"ours, compiled"}
    assert targets.step_targets([]) == []


def test_the_report_holds_the_step_as_it_is(tmp_path):
    text = "# A training step\n\nOne.\n\n## Counted\n"
    assert report.nested(text) == "One.\n\n### Counted"
    part = report.Record("training step", "passed", result=dict(rows=[], text=text))
    page = report.markdown(report.Report(dict(device="a device"), False, [part]), {})
    assert "\n\n## Training step\n\nOne.\n\n### Counted\n" in page
