"""Merging: a plain open_clip model computes what the adapted one does; what does not fold is kept or refused."""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors import safe_open
from tiny import NOTHING, TINY_CLIP, build, inputs, stirred, tiny_config

from upperson.config import Config
from upperson.config.presets import PRESETS
from upperson.data import Preprocess
from upperson.deploy import merge as command
from upperson.deploy.merge import merge
from upperson.errors import BackboneError, MergeError
from upperson.model import AdaptedCLIP
from upperson.model.backbone import build_clip
from upperson.model.checkpoint import load_checkpoint, load_model, save_checkpoint
from upperson.model.weights import read_weights, weights_as_bytes
from upperson.petl import ADAPTERS, LOW_RANK, PREFIXES

FOLDING = (
    [dict(lora=kind) for kind in LOW_RANK]
    + [dict(adapter_attn="ln-tuning"), dict(adapter_mlp="ln-tuning"), dict(method="full"), dict(method="zero-shot")]
    + [dict(lora="wora", adapter_attn="ln-tuning", adapter_mlp="ln-tuning", depth_lora=2, depth_adapter=1)]
)
REMAINING = [dict(prefix=kind) for kind in ("salable", "vanilla")] + [
    {place: kind}
    for place in ("adapter_attn", "adapter_mlp")
    for kind in ("l-parallel", "l-sequential", "parallel", "sequential")
]


NAMES = {name: kind.__name__ for name, kind in (PREFIXES | ADAPTERS).items()}


def words(variant):
    return "-".join(map(str, variant.values()))


@pytest.fixture
def tiny(tmp_path):
    """A tiny CLIP, nothing trained: the tests add what they are about."""
    return tiny_config(tmp_path, **NOTHING)


def plain(image_size=(48, 16), **description):
    towers = TINY_CLIP | dict(vision_cfg=TINY_CLIP["vision_cfg"] | dict(image_size=image_size))
    return open_clip.CLIP(**towers | description).eval()


@torch.no_grad()
def features(model, dtype=torch.float32):
    images, tokens = inputs(dtype)
    return torch.stack([model.encode_image(images), model.encode_text(tokens)])


def written(tmp_path, config, name="best.safetensors"):
    """A checkpoint of a model that was stirred, its random backbone the one that load_model builds."""
    path = tmp_path / name
    model = stirred(build(config, Config().train.seed))
    save_checkpoint(path, model.trained_parameters(), Config(config), {"epoch": 3})
    return path


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------ the function


@pytest.mark.parametrize("variant", FOLDING, ids=words)
def test_open_clip_computes_the_same(tiny, variant):
    """In float64, to its precision; the model itself stays as it is."""
    model = stirred(build(tiny.replace(**variant)).double())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clip = plain().double()
    clip.load_state_dict(merge(model))
    torch.testing.assert_close(features(clip, torch.float64), features(model, torch.float64), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with model.zero_shot():
        changed = (features(clip, torch.float64) - features(model, torch.float64)).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == ["method" not in variant] * 2


@pytest.mark.slow
def test_a_text_tower_of_its_own(tiny, tmp_path):
    Path(tiny.model).write_text(json.dumps(TINY_CLIP | dict(custom_text=True)))
    model = stirred(build(tiny.replace(lora="lora")).double())
    towers = TINY_CLIP | dict(vision_cfg=TINY_CLIP["vision_cfg"] | dict(image_size=(48, 16)))
    clip = open_clip.CustomTextCLIP(**towers).eval().double()
    clip.load_state_dict(merge(model))
    torch.testing.assert_close(features(clip, torch.float64), features(model, torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", REMAINING, ids=words)
def test_what_does_not_fold_is_named(tiny, variant):
    model = build(tiny.replace(**{"lora": "lora", "adapter_attn": "ln-tuning"} | variant))
    ((field, kind),) = variant.items()
    with pytest.raises(MergeError, match=f"cannot be merged into open_clip's weights: {field} {NAMES[kind]}$"):
        merge(model)


def test_kinds_of_modules_that_no_block_has_are_no_obstacle(tiny):
    model = build(tiny.replace(prefix="salable", depth_prefix=0, adapter_mlp="l-parallel", depth_adapter=3))
    plain().load_state_dict(merge(model))


# ------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("variant", [dict(lora="dora", adapter_mlp="ln-tuning"), dict(method="full")], ids=words)
def test_the_file_loads_in_open_clip_with_the_printed_lines(tiny, tmp_path, capsys, variant):
    config = tiny.replace(**variant)
    path, output = written(tmp_path, config), tmp_path / "merged.safetensors"
    assert run(path, output) == 0
    difference, *lines = capsys.readouterr().out.splitlines()
    assert 0 < float(difference.split()[3]) < 1e-5
    *setup, create = lines
    for line in setup:
        exec(line)
    clip = eval(create).eval()
    assert clip.visual.positional_embedding.shape == (1 + 6 * 2, 32)
    torch.testing.assert_close(features(clip), features(load_model(path)), rtol=1e-4, atol=1e-5)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best.safetensors", "merged.safetensors", "tiny.json"]
    zero_shot = AdaptedCLIP(tiny.replace(pretrained=str(output), method="zero-shot"))  # a backbone here as well
    assert torch.equal(zero_shot.clip.visual.positional_embedding, clip.visual.positional_embedding)


@pytest.mark.parametrize(
    "variant",
    [
        dict(prefix="salable", lora="wora", adapter_attn="ln-tuning", adapter_mlp="l-parallel"),
        dict(prefix="vanilla", lora="lora", adapter_attn="sequential", adapter_mlp="parallel", depth_lora=1),
        dict(adapter_mlp="l-sequential", depth_adapter=2),
    ],
    ids=words,
)
@pytest.mark.parametrize("image_size", [(48, 16), (64, 16)])
def test_what_remains_is_a_checkpoint_on_the_merged_weights(tiny, tmp_path, monkeypatch, variant, image_size):
    """Bit for bit. 64×16 has as many patches as the published 32×32."""
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, tiny.replace(image_size=image_size, **variant))
    assert run(path, "merged.safetensors", "--rest", "rest.safetensors") == 0
    rest, original = load_checkpoint("rest.safetensors"), load_checkpoint(path)
    assert rest.results == {"epoch": 3} and rest.config.model.pretrained == "merged.safetensors"
    method = rest.config.model.method
    assert (method.lora, method.prefix) == ("none", variant.get("prefix", "none"))
    assert method.adapter_attn == variant.get("adapter_attn", "none").replace("ln-tuning", "none")
    assert rest.config.replace(**variant, pretrained="none") == original.config
    assert not any(".lora." in name for name in rest.parameters) and rest.parameters
    ours, theirs = load_model("rest.safetensors"), load_model(path)
    images, tokens = torch.randn(2, 3, *image_size), inputs()[1]
    with torch.no_grad():
        assert torch.equal(ours.encode_image(images), theirs.encode_image(images))
        assert torch.equal(ours.encode_text(tokens), theirs.encode_text(tokens))


@pytest.mark.slow
def test_the_embedded_clip(tmp_path, capsys):
    """Its weights are of 128×128 images; 256×64 has as many patches."""
    for number, (image_size, changes) in enumerate(
        itertools.product([(192, 64), (256, 64)], [dict(prefix="none", adapter_attn="none", adapter_mlp="none"), {}])
    ):
        config = PRESETS["embedded"].model.replace(image_size=image_size, backend="torch", **changes)
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, stirred(build(config), scale=0.05).trained_parameters(), Config(config), {})
        output, rest = tmp_path / f"merged-{number}.safetensors", tmp_path / f"rest-{number}.safetensors"
        if changes:
            capsys.readouterr()
            assert run(path, output) == 0
            setup, create = capsys.readouterr().out.splitlines()[1:]
            exec(setup)
            ours = eval(create).eval()
        else:
            assert run(path, output, "--rest", rest) == 0
            ours = load_model(rest)
        images = torch.randn(2, 3, *image_size)
        with torch.no_grad():
            torch.testing.assert_close(
                ours.encode_image(images), load_model(path).encode_image(images), rtol=1e-4, atol=1e-5
            )


@pytest.mark.slow
def test_a_model_by_name_and_its_normalisation(tiny, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-for-merge.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "configs")
    backbone = tmp_path / "backbone.safetensors"
    preprocess = Preprocess((32, 32), (0.5,) * 3, (0.2,) * 3)
    backbone.write_bytes(command.weights_as_bytes(plain(32).state_dict(), preprocess, True))
    path = written(
        tmp_path, tiny.replace(model="tiny-for-merge", pretrained=str(backbone), prefix="salable", lora="lora")
    )
    moved = backbone.rename(tmp_path / "moved.safetensors")
    output, rest = tmp_path / "merged.safetensors", tmp_path / "rest.safetensors"
    assert run(path, output, "--rest", rest) == 1
    assert run(path, output, "--rest", rest, "--pretrained", moved) == 0
    ours, theirs = load_model(rest), load_model(path, pretrained=str(moved))
    assert torch.equal(features(ours), features(theirs))
    assert ours.preprocess == theirs.preprocess
    assert (ours.preprocess.mean, ours.preprocess.std) == ((0.5,) * 3, (0.2,) * 3)
    assert run(rest, tmp_path / "more.safetensors", "--rest", tmp_path / "rest-of-rest.safetensors") == 0
    assert torch.equal(features(load_model(tmp_path / "rest-of-rest.safetensors")), features(theirs))


@pytest.mark.parametrize("also_rest", [False, True])
def test_a_checkpoint_is_read_once(tiny, tmp_path, monkeypatch, also_rest):
    path = written(tmp_path, tiny.replace(lora="lora", prefix="salable" if also_rest else "none"))
    opened = []

    def counting(file, *arguments, **options):
        opened.append(file)
        return safe_open(file, *arguments, **options)

    monkeypatch.setattr("upperson.model.tensor_files.safe_open", counting)
    assert run(path, tmp_path / "merged.safetensors", *(["--rest", tmp_path / "rest.safetensors"] * also_rest)) == 0
    assert opened.count(path) == 1 and len(opened) == 1 + also_rest  # what was written is read to be compared


def spoiled(state, wrong):
    """A merged state with an error in one tower, in one caption alone (the longest, which has the last position), or
    without meaning."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    if wrong == "image":
        state["visual.transformer.resblocks.1.attn.in_proj_weight"] *= 1.001
    elif wrong == "text":
        state["transformer.resblocks.1.attn.in_proj_weight"] *= 1.001
    elif wrong == "one caption":
        state["positional_embedding"][-1] *= 1.01
    else:
        state["transformer.resblocks.1.attn.in_proj_weight"][0, 0] = torch.nan
    return state


@pytest.mark.parametrize(
    ("wrong", "also_rest"),
    [("image", False), ("image", True), ("text", False), ("one caption", True), ("nan", False), ("nan", True)],
)
def test_a_wrong_result_is_not_written(tiny, tmp_path, monkeypatch, capsys, also_rest, wrong):
    """The earlier files are kept, and no other file is left."""
    path = written(tmp_path, tiny.replace(lora="lora", prefix="salable" if also_rest else "none"))
    output, rest = tmp_path / "merged.safetensors", tmp_path / "rest.safetensors"
    output.write_bytes(b"earlier")
    rest.write_bytes(b"earlier too")
    fold = command.merged_state
    monkeypatch.setattr(command, "merged_state", lambda model: spoiled(fold(model), wrong))
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert run(path, output, *(["--rest", rest] if also_rest else [])) == 1
    error = capsys.readouterr().err
    if wrong == "nan":
        message = "after merging, the tensor 'transformer.resblocks.1.attn.in_proj_weight' has 1 of 3072 elements that"
    else:
        message = "the merged features have a relative difference of "
        assert "expected at most 1e-05" in error
    assert error.startswith(f"error: {path}: {message}") and error.count("\n") == 1
    assert "; no file was written" in error
    assert output.read_bytes() == b"earlier" and rest.read_bytes() == b"earlier too"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names


def test_one_wrong_sample_of_one_tower_is_found(tiny):
    model = build(tiny)

    def encode(kind, tower, sample, wrong, x):
        features = getattr(model, f"encode_{kind}")(x)
        if kind == tower:
            features[sample] += wrong * features[sample].norm() / features[sample].numel() ** 0.5
        return features

    for error in itertools.product(("image", "text"), range(4), (1e-3, torch.nan)):
        wrong = {f"encode_{kind}": functools.partial(encode, kind, *error) for kind in ("image", "text")}
        found = command.largest_difference(model, SimpleNamespace(**wrong))
        assert 0.9e-3 < found < 1.1e-3 if error[-1] == 1e-3 else math.isnan(found), error
    assert command.largest_difference(model, model) == 0


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_an_interruption_leaves_nothing(tiny, tmp_path, monkeypatch, capsys, failure):
    path = written(tmp_path, tiny.replace(lora="lora"))

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    assert run(path, tmp_path / "merged.safetensors") == (1 if isinstance(failure, OSError) else 130)
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best.safetensors", "tiny.json"]


@pytest.mark.parametrize(
    ("variant", "arguments", "message"),
    [
        (
            dict(prefix="salable", lora="lora", adapter_mlp="parallel"),
            [],
            "best.safetensors: cannot be merged into open_clip's weights: prefix SalablePrefix, adapter_mlp "
            "ParallelAdapter; --rest FILE writes these modules to a second checkpoint",
        ),
        (
            dict(lora="lora"),
            ["--rest", "rest.safetensors"],
            "best.safetensors: all modules merge into merged.safetensors; none remains for rest.safetensors",
        ),
        (
            dict(lora="lora"),
            ["--pretrained", "missing.pt"],
            "best.safetensors: pretrained 'missing.pt' of tiny.json is neither a file nor",
        ),
        (
            dict(lora="lora"),
            ["--pretrained", "tiny.json"],
            "best.safetensors: tiny.json does not contain weights of this model",
        ),
    ],
    ids=["remains", "nothing-remains", "missing", "no-weights"],
)
def test_refused_in_one_line(tiny, tmp_path, monkeypatch, capsys, variant, arguments, message):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, tiny.replace(model="tiny.json", **variant))
    names = sorted(os.listdir())
    assert run("best.safetensors", "merged.safetensors", *arguments) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {message}") and shown.err.count("\n") == 1 and not shown.out
    assert sorted(os.listdir()) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merged.pt"], "merged.pt: expected a name that ends in .safetensors"),
        (["\udcff.safetensors"], "'\\udcff.safetensors': expected a path in UTF-8"),
        (["merged.safetensors", "--rest", "\udcff/a.safetensors"], "'\\udcff/a.safetensors': expected a path in UTF-8"),
        (["./best.safetensors"], "best.safetensors is an input; expected another file to write"),
        (["clip.safetensors"], "clip.safetensors is an input; expected another file to write"),
        (
            ["merged.safetensors", "--rest", "best.safetensors"],
            "best.safetensors is an input; expected another file to write",
        ),
        (["a.safetensors", "--rest", "./a.safetensors"], "OUTPUT and --rest are the same file, a.safetensors"),
        (["nowhere/merged.safetensors"], "nowhere/merged.safetensors: expected a file in an existing folder"),
        (["folder.safetensors"], "folder.safetensors: expected a file in an existing folder"),
        (
            ["merged.safetensors", "--pretrained", "embedded"],
            "pretrained: 'embedded' belongs to model 'embedded' only",
        ),
        ([], "the following arguments are required: OUTPUT"),
    ],
)
def test_wrong_arguments(tiny, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, tiny.replace(lora="lora"))
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, checkpoint.parameters, checkpoint.config.replace(pretrained="clip.safetensors"), {})
    os.mkdir("folder.safetensors")
    with pytest.raises(SystemExit) as exit:
        run("best.safetensors", *arguments)
    assert exit.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_a_changed_byte_of_the_merged_weights_is_noticed(tiny, tmp_path):
    model = build(tiny.replace(lora="lora"))
    right = weights_as_bytes(merge(model), model.preprocess, True)
    path = tmp_path / "merged.safetensors"
    path.write_bytes(right)
    assert read_weights(path).quick_gelu is True
    for place in (len(right) - 1, len(right) // 2, 9 * len(right) // 10):
        path.write_bytes(right[:place] + bytes([right[place] ^ 1]) + right[place + 1 :])
        with pytest.raises(BackboneError, match=r"merged.safetensors .*the file is damaged: its tensor .* is not what"):
            build_clip(model.config.replace(pretrained=str(path)))


def test_as_a_module(tmp_path):
    """An error without a traceback."""
    missing = subprocess.run(
        [sys.executable, "-m", "upperson.deploy.merge", "missing.safetensors", "merged.safetensors"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (missing.returncode, missing.stderr) == (
        1,
        "error: missing.safetensors: there is no such file; expected an upperson checkpoint\n",
    )


def test_the_merged_file_holds_float32_and_no_trained_modules(tiny, tmp_path):
    output = tmp_path / "merged.safetensors"
    assert run(written(tmp_path, tiny.replace(lora="lora")), output) == 0
    with safe_open(output, framework="pt") as file:
        assert set(file.keys()) == set(plain().state_dict())
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118 (no mapping)
