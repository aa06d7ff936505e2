"""upperson export: the towers in onnxruntime are those of PyTorch, and what does not fit is refused."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VARIANTS, build, inputs, stirred, tiny_clip, tiny_config, tiny_run, write_image

from upperson.__main__ import main
from upperson.config import Config
from upperson.data import gallery, queries, read_splits
from upperson.deploy import export as exporting
from upperson.deploy.export import export
from upperson.deploy.merge import fold
from upperson.errors import ExportError
from upperson.evaluate.metrics import retrieval_metrics
from upperson.methods import METHODS
from upperson.model.checkpoint import build_model, load_checkpoint, load_model, save_checkpoint

try:
    import onnx  # noqa: F401
    import onnxscript  # noqa: F401

    from upperson.deploy import towers as runtime
except ImportError:
    runtime = None

needs_extra = pytest.mark.skipif(runtime is None, reason="needs the extra 'onnx'")
OF_METHODS = [
    dict(lora="dora", adapter_attn="ln-tuning", prefix="vanilla"),
    dict(method="cskt", prompt_length=2, adapter_reduction=4),
    dict(method="prompt-decoupling"),
    dict(method="dm-adapter", adapter_reduction=4),
    dict(method="irra"),
    dict(method="full"),
]


def checkpoint_of(folder, changes):
    config = tiny_config(folder, tiny_clip(layers=2))
    config = config.replace(**changes)
    model = stirred(build(config, seed=1), scale=0.1 if config.method.trains_clip else 0.3)
    path = folder / "best.safetensors"
    save_checkpoint(path, model.adaptation(), Config(config).replace(seed=1), {"epoch": 2}, model.fingerprint)
    return path


# ------------------------------------------------------------------------------------ without onnx


@pytest.mark.parametrize("changes", [*VARIANTS, dict(method="cskt", prompt_length=2), dict(method="full")], ids=str)
@torch.no_grad()
def test_folding_keeps_the_features(changes, tmp_path):
    config = tiny_config(tmp_path)
    none = dict(prefix="none", lora="none", adapter_attn="none", adapter_mlp="none") if "method" not in changes else {}
    model, folded = (stirred(build(config.replace(**none | changes))) for _ in range(2))
    fold(folded)
    images, tokens = inputs()
    for method, given in (("encode_image", images), ("encode_text", tokens)):
        assert torch.allclose(getattr(folded, method)(given), getattr(model, method)(given), atol=1e-5)
    kinds = {place.kind for place in folded.trained_modules()}
    assert "lora" not in kinds and ("prefix" in kinds) == (changes.get("prefix", "none") != "none")


def test_without_the_extra(monkeypatch, tmp_path, capsys):
    real = exporting.importlib.util.find_spec
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None if "onnx" in name else real(name))
    assert main(["export", str(tmp_path / "best.safetensors"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        "error: upperson export needs onnx, onnxruntime, onnxscript; expected the extra: pip install 'upperson[onnx]'\n"
    )


@needs_extra
def test_an_output_with_content(tmp_path, capsys):
    path = tiny_run(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    for names, found in ((["mine"], "mine"), (["mine", "own", "a"], "a and 2 more")):
        for name in names:
            (folder / name).write_text("kept")
        assert main(["export", str(path), str(folder)]) == 1
        expected = f"error: {folder}: expected a new or an empty folder, found {found} in it\n"
        assert capsys.readouterr().err == expected
    assert (folder / "mine").read_text() == "kept"


@needs_extra
def test_a_method_that_cannot_be_exported(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("Failed to export\n\n(Refer to the full stack trace)") from ValueError(
            "the operator aten::histc has no translation\nmore lines"
        )

    path = checkpoint_of(tmp_path, dict(method="cskt", prompt_length=2))
    monkeypatch.setattr(torch.onnx, "export", refuse)
    before = sorted(os.listdir(tmp_path))
    assert main(["export", str(path), str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in (str(path), "image tower of method cskt (CSKT)", "aten::histc")), line
    assert sorted(os.listdir(tmp_path)) == before


# ------------------------------------------------------------------------------------ the tokenizer and the images


@pytest.fixture(scope="module")
def tokenize(tokenizer):
    """The tokenizer of an export."""
    pytest.importorskip("onnxruntime")
    words = exporting.vocabulary_of(SimpleNamespace(tokenizer=tokenizer))
    words = json.loads(json.dumps(words))  # as the file has them
    return runtime.Tokenizer(words["tokens"], words["merges"])


TEXTS = [
    "", " ", "A man.", "She's carrying THE man's bag, isn't she? I'll say they've 23 bags & 4½ hats...",
    "A young boy in a blue-and-white striped T-shirt, khaki shorts (knee-length)", "“curly” ‘quotes’ and it’s",
    "ünïcödé straße ÉCOLE 東京 person  \t\n 👍🏽 naïve", "&amp;lt; &quot;html&quot;", "<start_of_text> x <end_of_text>",
    "a_b__c", "1234 ² ⅷ ٣", "don''t 's 'S'll", "x" * 300, "e\u0301", "jekyll and hyde", "!?!?''re", "\x00\x7f\xa0\xad",
]  # fmt: skip


@needs_extra
def test_token_ids_are_those_of_clip(tokenize, tokenizer):
    captions = read_splits(Config().replace(embedded_identities=(20, 1, 1)).data, need=["train"])["train"]
    texts = [*TEXTS, *(sample.caption for sample in captions)]
    for text in texts:
        assert tokenize.encode(text) == tokenizer.encode(text), text
    rng = np.random.default_rng(0)
    alphabet = list("abcdefghij  '’.,-&;0189éß\u0301東👍ſ_<>")
    for _ in range(300):
        text = "".join(rng.choice(alphabet, rng.integers(1, 30)))
        assert tokenize.encode(text) == tokenizer.encode(text), text


@needs_extra
@pytest.mark.parametrize("open_length", [True, False])
def test_padding_is_that_of_clip(tokenize, tokenizer, open_length):
    text = dict(start=49406, end=49407, padding=0, length=12, open_length=open_length)
    padded = runtime.Towers.padded(SimpleNamespace(text=text), [tokenize.encode(text) for text in TEXTS[:5]])
    assert padded.dtype == np.int64 and np.array_equal(padded, tokenizer(TEXTS[:5], context_length=12).numpy())
    short = runtime.Towers.padded(SimpleNamespace(text=text), [tokenize.encode("A man.")])
    assert short.shape == (1, 5 if open_length else 12)


@needs_extra
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_images_are_preprocessed_as_in_pytorch(mode, tmp_path, tiny):
    model = build(tiny)
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image = Image.open(write_image(tmp_path / "noise.png", size=(37, 91))).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(path)
    settings = dict(height=48, width=16, mean=model.preprocess.mean, std=model.preprocess.std, background=(255,) * 3)
    found = runtime.Towers.preprocess(SimpleNamespace(image=settings), path)
    assert found.dtype == np.float32 and np.allclose(found, model.preprocess(path).numpy(), atol=1e-6)


@needs_extra
def test_an_image_that_the_camera_turned(tmp_path, tiny):
    model, exif = build(tiny), Image.Exif()
    exif[0x0112] = 6
    Image.open(write_image(tmp_path / "noise.png")).save(tmp_path / "turned.jpg", exif=exif)
    settings = dict(height=48, width=16, mean=model.preprocess.mean, std=model.preprocess.std, background=(255,) * 3)
    found = runtime.Towers.preprocess(SimpleNamespace(image=settings), str(tmp_path / "turned.jpg"))
    assert np.allclose(found, model.preprocess(tmp_path / "turned.jpg").numpy(), atol=1e-6)


@needs_extra
@pytest.mark.parametrize("mode", ["I;16", "I", "F", "LAB", "HSV", "CMYK"])
def test_images_that_would_look_different(mode):
    image = Image.new(mode, (4, 4))
    if mode == "CMYK":
        image.info["icc_profile"] = b"a profile"
    with pytest.raises(ValueError, match=f"expected an image of 8 bits a channel .*, found mode {mode}$"):
        runtime.Towers.preprocess(SimpleNamespace(image={}), image)


@needs_extra
def test_an_image_that_is_too_large(monkeypatch):
    monkeypatch.setattr(runtime, "LARGEST", 100)
    with pytest.raises(ValueError, match="at most 100 pixels, found 11 x 10"):
        runtime.Towers.preprocess(SimpleNamespace(image={}), Image.new("RGB", (11, 10)))


@needs_extra
@pytest.mark.parametrize("name", ["embed_texts", "embed_images"])
def test_one_string_and_a_batch_of_nothing_are_refused(name):
    towers = runtime.Towers.__new__(runtime.Towers)  # refused before a tower is needed
    towers.tokenizer = SimpleNamespace(encode=None)
    for one in ("a woman in a red coat", "photos/1.jpg", ""):
        with pytest.raises(TypeError, match=r"expected a list, such as \['.*'\], found a string"):
            getattr(towers, name)(one)
    for batch in (0, -1):
        with pytest.raises(ValueError, match=f"batch is {batch}; expected at least 1"):
            getattr(towers, name)(["a"], batch=batch)


# ------------------------------------------------------------------------------------ whole exports


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint of UP-Person on embedded data, and the folder of its export."""
    if runtime is None:
        pytest.skip("needs the extra 'onnx'")
    folder = tmp_path_factory.mktemp("export")
    path = tiny_run(folder)
    assert main(["export", str(path), str(folder / "out")]) == 0
    return path, folder / "out"


@pytest.mark.slow
def test_the_folder_describes_itself(exported):
    path, folder = exported
    names = ["export.json", "image.onnx", "text.onnx", "towers.py", "vocabulary.json"]
    assert sorted(os.listdir(folder)) == names
    assert not list(folder.parent.glob(".upperson-*"))
    about = json.loads((folder / "export.json").read_text())
    assert about["method"] == "UP-Person" and about["trained_on"] == "embedded" and about["width"] == 16
    assert (about["image"]["height"], about["image"]["width"]) == load_model(path).config.image_size
    assert 0 < about["largest_difference"] < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_features_for_every_batch_and_length(exported):
    path, folder = exported
    model, towers = load_model(path, backend="torch"), runtime.Towers(folder)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 48, 16)
        tokens = torch.as_tensor(model.tokenizer(["a man in a red coat", "a woman", "hat"] * 2)[:batch])
        tokens = torch.as_tensor(tokens)
        for found, expected in (
            (towers.run("image", images.numpy()), model.encode_image(images)),
            (towers.run("text", tokens.numpy()), model.encode_text(tokens)),
            (towers.run("text", tokens[:, :9].numpy()), model.encode_text(tokens[:, :9])),
        ):
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert towers.embed_texts([]).shape == (0, 16) and towers.embed_images([]).shape == (0, 16)


@pytest.mark.slow
@torch.no_grad()
def test_the_ranking_is_that_of_pytorch(exported):
    """Image for image, but for images whose similarities float32 does not tell apart."""
    path, folder = exported
    config, model = load_checkpoint(path).config, load_model(path, backend="torch")
    samples = read_splits(config.data, need=["test"])["test"]
    (drawings, image_ids), (captions, caption_ids) = gallery(samples), queries(samples)
    images = [image.draw() for image in drawings]
    towers = runtime.Towers(folder)
    ours = [towers.embed_texts(captions), towers.embed_images(images)]
    theirs = [
        torch.nn.functional.normalize(model.encode_text(torch.as_tensor(model.tokenizer(list(captions))))),
        torch.nn.functional.normalize(model.encode_image(torch.stack([model.preprocess(image) for image in images]))),
    ]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other.numpy(), atol=1e-5)
    similarity = theirs[0].double() @ theirs[1].double().t()
    ranked = similarity.gather(1, torch.from_numpy(np.argsort(-(ours[0] @ ours[1].T), axis=1, kind="stable")))
    assert (ranked - ranked.cummin(dim=1).values).max() < 1e-5
    found, expected = (
        retrieval_metrics(*map(torch.as_tensor, sides), caption_ids, image_ids).metrics for sides in (ours, theirs)
    )
    assert found["R@1"] == expected["R@1"]


ALONE = """
import sys

class Refused:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "torchvision", "open_clip", "upperson", "safetensors"):
            raise ImportError(name)

sys.meta_path.insert(0, Refused())
"""


@pytest.mark.slow
def test_the_lines_of_the_readme_need_neither_pytorch_nor_this_package(exported, tmp_path):
    from test_readme import example

    path, folder = exported
    (tmp_path / "OUT").symlink_to(folder)
    for number in range(3):
        write_image(tmp_path / "photos" / f"{number}.jpg", number)
    code = ALONE + textwrap.dedent(example("upperson/deploy/README.md", "from towers import Towers"))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", TELEMETRY)}
    (tmp_path / "home").mkdir()
    environment["HOME"] = str(tmp_path / "home")
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert not any((tmp_path / "home").iterdir())  # onnxruntime's telemetry would keep an identifier there
    lines = [line.split() for line in ended.stdout.splitlines()]
    model = load_model(path, backend="torch")
    with torch.no_grad():
        text = torch.nn.functional.normalize(model.encode_text(torch.as_tensor(model.tokenizer([README_QUERY]))))
        images = {f"photos/{n}.jpg": model.preprocess(tmp_path / "photos" / f"{n}.jpg") for n in range(3)}
        found = torch.nn.functional.normalize(model.encode_image(torch.stack(list(images.values()))))
    expected = dict(zip(images, (found @ text[0]).tolist(), strict=True))
    assert [name for _, name in lines] == sorted(expected, key=expected.get, reverse=True)
    assert all(abs(float(value) - expected[name]) < 2e-3 for value, name in lines)


TELEMETRY = "ORT_DISABLE_TELEMETRY"
README_QUERY = "a woman in a red coat"


@needs_extra
@pytest.mark.slow
@pytest.mark.parametrize("changes", OF_METHODS, ids=lambda changes: changes.get("method", "up-person"))
def test_methods(changes, tmp_path):
    path = checkpoint_of(tmp_path, changes)
    about = export(load_checkpoint(path), tmp_path / "out")
    assert about["largest_difference"] < 1e-5
    assert about["text"]["open_length"] == (changes.get("method") not in ("cskt", "prompt-decoupling"))
    assert about["results"] == {"epoch": 2}
    towers, model = runtime.Towers(tmp_path / "out"), load_model(path, backend="torch")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encode_text(torch.as_tensor(model.tokenizer(TEXTS[2:6]))))
    np.testing.assert_allclose(towers.embed_texts(TEXTS[2:6], batch=3), expected.numpy(), atol=1e-5)


@needs_extra
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_precisions(precision, exported, tmp_path):
    path, whole = exported
    about = export(load_checkpoint(path), tmp_path / "out", precision)
    assert about["precision"] == precision and 1e-5 < about["largest_difference"] < exporting.BOUNDS[precision]
    size = sum((tmp_path / "out" / f"{tower}.onnx").stat().st_size for tower in ("image", "text"))
    assert size < 0.6 * sum((whole / f"{tower}.onnx").stat().st_size for tower in ("image", "text"))


@needs_extra
@pytest.mark.slow
def test_nothing_is_kept_if_the_features_differ(tmp_path, monkeypatch):
    path = tiny_run(tmp_path)
    monkeypatch.setattr(exporting, "largest_distance", lambda *_: 2e-4)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ExportError, match="relative difference of 2.0e-04 .* at most 1e-04 in float32; nothing was"):
        export(load_checkpoint(path), Path(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == before


@needs_extra
@pytest.mark.slow
@pytest.mark.parametrize("tower", ["visual.transformer", "transformer"])
def test_what_folding_changes_is_found(tower, tmp_path, monkeypatch):
    """The model is built once; the features that count are those of the model before it was folded."""
    path, built = tiny_run(tmp_path), []

    def building(*arguments, **changes):
        built.append(build_model(*arguments, **changes))
        return built[-1]

    def spoiling(model):
        fold(model)
        model.clip.get_parameter(f"{tower}.resblocks.1.attn.in_proj_weight").data *= 1.01

    monkeypatch.setattr(exporting, "build_model", building)
    monkeypatch.setattr(exporting, "fold", spoiling)
    with pytest.raises(ExportError, match="relative difference of .* nothing was written"):
        export(load_checkpoint(path), tmp_path / "out")
    assert len(built) == 1 and not (tmp_path / "out").exists()


def test_every_method_is_tried():
    assert {changes.get("method", "up-person") for changes in OF_METHODS} == METHODS.keys() - {"zero-shot"}
