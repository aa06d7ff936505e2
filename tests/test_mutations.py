"""Seeded mutations of every kind of input: each ends in a right result, or in one line that names the file.

COUNTS says how many inputs of each kind are tried in the short run, and in the long one.
"""

import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import zipfile
from datetime import datetime
from pathlib import Path

import open_clip
import pytest
import torch
from foreign import released_state, save_released
from mutators import (
    mutated_arguments,
    mutated_bytes,
    mutated_json,
    mutated_safetensors,
    mutated_tensors,
    mutated_text,
    signed,
)
from PIL import Image
from safetensors.torch import save
from test_tiles import ENTRY
from tiny import TINY_CLIP, build, cuhk_pedes, fail_at, interrupt, stirred, tiny_config, tiny_training, write_image
from torch import nn
from upperson_kernels import tiles

import upperson.train.fit
from upperson import Config, ModelConfig, preset
from upperson.__main__ import main
from upperson.config.files import read_changes, read_configuration
from upperson.data import ImageCache, gallery, load_image, queries, read_dataset
from upperson.data.images import load_pixels, readable_formats
from upperson.deploy.importing import read_foreign
from upperson.errors import BackboneError, CheckpointError, DataError, MethodError, RunError, SearchError, one_line
from upperson.evaluate.results import Results
from upperson.methods.zero_shot import ZeroShot
from upperson.model.backbone import build_clip, random_clip
from upperson.model.checkpoint import build_model, copy_parameters, load_checkpoint, save_checkpoint
from upperson.search import Gallery
from upperson.search.boxes import read_boxes
from upperson.search.store import Filter, Row, open_store
from upperson.train.fit import fit
from upperson.train.resume import load_state

pytestmark = pytest.mark.filterwarnings("ignore")

MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "P", "LA", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "RGBA", "P", "CMYK", "L", "1", "I;16", "F", "YCbCr"),
    "GIF": ("P",),
    "BMP": ("RGB", "L"),
    "JPEG2000": ("RGB", "LA"),
    "PPM": ("RGB", "L"),
}
TEXTS = {
    ("folder", "own.jsonl"): "\n".join(
        json.dumps({"image": f"{i}.jpg", "caption": "a man", "identity": i, "split": "test"}) for i in range(3)
    ),
    ("folder", "own.csv"): 'image,caption,identity,split\na.jpg,"a man, old",1,train\nb.jpg,a boy,2,test\n',
    ("cuhk-pedes", "reid_raw.json"): json.dumps(
        [{"split": "test", "id": i, "file_path": "a.jpg", "captions": ["a man", "he"]} for i in range(2)]
    ),
    ("flickr30k", "dataset_flickr30k.json"): json.dumps(
        {"images": [{"split": "test", "filename": "a.jpg", "sentences": [{"raw": "a man"}]}]}
    ),
    ("mscoco", "coco_karpathy_test.json"): json.dumps([{"image": "val2014/a.jpg", "caption": ["a man"]}]),
}
TOML = (
    '[train]\nepochs = 3\nlearning_rate = 0.1\nlearning_rates = "a=1, b=2e-5"\nlosses = "sdm"\n'
    '[model]\nmethod = "cskt"\nimage_size = [48, 16]\n'
)


def ends(use, where, errors, *hits):
    """Whether `use` ends with a result. Otherwise it ends in one line that names the file, and what was changed."""
    try:
        use()
    except errors as refusal:
        text = str(refusal)
        assert len(text.splitlines()) == 1 and len(text) <= 2000 and str(where) in text, text
        assert not any(hits) or any(hit in text for hit in hits if hit), (hits, text)
        return False
    return True


def all_finite(tensors):
    return all(tensor.float().isfinite().all() for tensor in tensors.values())


# ------------------------------------------------------------------------------------ the kinds of input

# Each function makes right input in a folder. It returns a function of a random generator, which tries a mutated one,
# and says whether the result was right.


def images(folder):
    noise = Image.open(write_image(folder / "noise.png", 0, (30, 40)))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    formats = MODES | ({"HEIF": ("RGB", "RGBA", "L")} if "HEIF" in readable_formats() else {})
    for suffix, modes in formats.items():
        for mode in modes:
            buffer = io.BytesIO()
            image = Image.new(mode, noise.size, 7) if mode in ("I;16", "F") else noise.convert(mode)
            image.save(buffer, suffix, **({"exif": exif} if suffix in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
            found.append(buffer.getvalue())
    path = folder / "image"

    def use():
        assert load_image(path).mode == "RGB"

    def trial(generator):
        path.write_bytes(mutated_bytes(generator.choice(found), generator))
        return ends(use, path, DataError)

    return trial


def annotations(folder):
    for name in {name for name, _ in TEXTS}:
        for inner in ("imgs", "flickr30k-images", "val2014"):
            (folder / name / inner).mkdir(parents=True)

    def use(name, path):
        for samples in read_dataset(name, path if name == "folder" else path.parent, need=()).values():
            assert len(gallery(samples)[0]) <= len(queries(samples)[0])

    def trial(generator):
        (name, file), text = generator.choice(list(TEXTS.items()))
        path = folder / name / file
        path.write_bytes(mutated_text(text, generator))
        return ends(lambda: use(name, path), path.parent, DataError)

    return trial


def checkpoints(folder):
    config = Config(tiny_config(folder))
    model = stirred(build(config.model, seed=config.train.seed))
    path = folder / "mutated.safetensors"
    save_checkpoint(path, model.trained_parameters(), config, {"epoch": 1, "selection": "last"}, model.fingerprint)
    right, unchanged = path.read_bytes(), load_checkpoint(path)

    def use(trusted):
        found = load_checkpoint(path)
        if not trusted:  # the checksums tell every change
            assert (found.config, found.results, found.fingerprint) == (config, unchanged.results, model.fingerprint)
            assert found.parameters.keys() == unchanged.parameters.keys()
            assert all(torch.equal(found.parameters[name], value) for name, value in unchanged.parameters.items())
        if found.config.model == config.model:  # another model is built; this one need not be, again and again
            copy_parameters(found.parameters, model.adaptation(), str(path))
        else:
            build_model(found)
        assert all_finite(found.parameters)
        assert (found.epoch is None or found.epoch >= 0) and isinstance(found.results, dict)

    def trial(generator):
        content, hit = mutated_safetensors(right, generator)
        trusted = generator.random() < 0.5  # with checksums as if the mutated content had been written
        path.write_bytes(signed(content) if trusted else content)
        return ends(lambda: use(trusted), folder, (CheckpointError, BackboneError, MethodError), one_line(hit))

    return trial


class AsPublished(nn.Module):
    """Parameters under the names of a state dict."""

    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            place = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(leaf, nn.Parameter(tensor))


def weights(folder):
    (folder / "tiny.json").write_text(json.dumps(TINY_CLIP))
    config = ModelConfig(str(folder / "tiny.json"), "none", (48, 16), ZeroShot(), backend="torch")
    torch.manual_seed(3)
    state = {name: tensor.half() for name, tensor in open_clip.CLIP(**TINY_CLIP).state_dict().items()}
    script, right = folder / "script.pt", save(state)
    torch.jit.save(torch.jit.script(AsPublished(state)), script)

    def written(generator):
        """The path of a mutated file of weights, and the name of the tensor that was changed, or ""."""
        kind = generator.randrange(4)
        path = folder / ("mutated.safetensors" if kind == 0 else "mutated.pt")
        if kind == 0:
            content, hit = mutated_safetensors(right, generator)
            path.write_bytes(content)
            return path, hit
        if kind == 1:
            tensors, hit = mutated_tensors(state, generator)
            torch.save(generator.choice([tensors, {"state_dict": tensors, "epoch": 3}]), path)
            return path, hit
        if kind == 2:
            torch.save(state, path)
            path.write_bytes(mutated_bytes(path.read_bytes(), generator))
            return path, ""
        with zipfile.ZipFile(script) as old, zipfile.ZipFile(path, "w") as new:
            texts = [name for name in old.namelist() if name.endswith(("data.pkl", ".py"))]
            changed = generator.choice(generator.choice([texts, old.namelist()]))
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, mutated_bytes(content, generator) if name == changed and content else content)
        return path, ""

    def use(path):
        loaded = build_clip(config.replace(pretrained=str(path))).state_dict()
        assert loaded.keys() == state.keys() and all_finite(loaded)
        assert all(tensor.dtype == torch.float32 for tensor in loaded.values())

    def trial(generator):
        path, hit = written(generator)
        return ends(lambda: use(path), path, BackboneError, one_line(hit))

    return trial


def foreign(folder):
    """Checkpoints of released trainings."""
    methods = {"up-person": {}, "cskt": dict(method="cskt", prompt_length=2)}
    states = {}
    for form, changes in methods.items():
        model = stirred(build(tiny_config(folder).replace(**changes)))
        own = {name: parameter.detach() for name, parameter in model.adaptation().items()}
        clip = {name: tensor for name, tensor in open_clip.CLIP(**TINY_CLIP).state_dict().items()}
        clip["visual.positional_embedding"] = model.clip.visual.positional_embedding.detach()
        states[form] = released_state(form, clip, own)

    def trial(generator):
        form, path, hit = generator.choice(sorted(states)), folder / "best.pth", ""
        tensors = states[form]
        if by_tensor := generator.randrange(2):
            tensors, hit = mutated_tensors(tensors, generator)
        save_released(path, tensors)
        if not by_tensor:
            path.write_bytes(mutated_bytes(path.read_bytes(), generator))

        def use():
            found = read_foreign(path, form, model=str(folder / "tiny.json"), image_size=(48, 16))
            assert found.read == len(states[form]) and all_finite(found.model.state_dict())

        return ends(use, path, CheckpointError, one_line(hit))

    return trial


def model_configurations(folder):
    path = folder / "model.json"

    def trial(generator):
        content, hit = mutated_json(TINY_CLIP, generator)
        path.write_bytes(content)

        def use():
            with torch.device("meta"):  # of all that is built, only the names and shapes
                clip = random_clip(str(path))
            assert all(tensor.numel() for tensor in clip.state_dict().values())

        return ends(use, path, BackboneError)

    return trial


def run_configurations(folder):
    right = json.loads(preset("embedded").to_json())

    def trial(generator):
        kind = generator.randrange(3)
        path, hit = folder / ("run.toml" if kind == 0 else "run.json"), ()
        if kind == 0:
            content = generator.choice([mutated_bytes(TOML.encode(), generator), mutated_text(TOML, generator)])
        else:
            content, hit = mutated_json(right, generator)
        path.write_bytes(content)

        def use():
            if kind == 2:
                config = read_configuration(path)
            else:
                changes = read_changes(path)
                try:
                    config = preset("embedded", changes.pop("method", None)).replace(**changes)
                except ValueError as error:  # as the command line, which adds the name of the file
                    raise ValueError(f"{path}: {error}") from None
            assert Config.from_json(config.to_json()) == config

        return ends(use, path, (ValueError, OSError), *(key for key in hit[-2:] if isinstance(key, str)))

    return trial


def tiles_of_kernels(folder):
    path = folder / "tiles.json"
    right = {"tiles": [ENTRY, ENTRY | {"kernel": "adapter_rows", "maxnreg": 128}]}
    del right["tiles"][1]["BLOCK_M"], right["tiles"][1]["BLOCK_N"]
    right["tiles"][1] |= {"BLOCK_T": 32, "BLOCK_C": 32}

    def trial(generator):
        content, _ = mutated_json(right, generator)
        path.write_bytes(content)

        def use():
            tiles.loaded.clear()
            tiles.load(path)
            for key, chosen in tiles.loaded.items():
                assert all(type(number) is int for number in (*key[1:], *chosen.values()))
                tiles.choose(*key)

        try:
            return ends(use, path, tiles.TilesError)
        finally:
            tiles.loaded.clear()

    return trial


def caches(folder):
    files = [write_image(folder / "images" / f"{number}.jpg", number, (30, 40)) for number in range(3)]
    cache = folder / "cache"
    made = ImageCache.open(files, (48, 16), cache, progress=False).file
    right = {path: path.read_bytes() for path in (made, made.with_suffix(".json"))}
    pixels = [load_pixels(file, (48, 16)) for file in files]

    def use():
        found = ImageCache.open(files, (48, 16), cache, progress=False)
        assert all(torch.equal(found[file], right) for file, right in zip(files, pixels, strict=True))

    def trial(generator):
        shutil.rmtree(cache)
        cache.mkdir()
        for path, content in right.items():
            path.write_bytes(content)
        path = generator.choice(list(right))
        if path.suffix == ".npy":
            path.write_bytes(mutated_bytes(right[path], generator))
        else:
            path.write_bytes(mutated_json(json.loads(right[path]), generator)[0])
        return ends(use, cache, DataError)

    return trial


def stopped(folder):
    """The configuration of a run that was stopped after its third step."""
    config = tiny_training(folder, embedded_identities=(5, 2, 2), batch_size=5, run_dir=folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    return config


def resume_states(folder):
    config = stopped(folder)
    run_dir, copy = config.train.run_dir, folder / "copy"
    right = (run_dir / "resume.safetensors").read_bytes()

    def use():
        results = fit(read_configuration(copy / "config.json").replace(resume=True, run_dir=copy)).results
        assert all(0 <= value <= 100 for value in results.text_to_image.values())
        assert all(0 <= value <= 100 for value in results.zero_shot.values())
        assert results.epochs == 2 and results.epoch in (1, 2)
        assert all_finite(load_checkpoint(copy / "best.safetensors").parameters)
        assert Results.read(copy / "results.json") == results
        log = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log if line["kind"] == "step"] == list(range(1, 9))

    def trial(generator):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run_dir, copy)
        content, _ = mutated_safetensors(right, generator)
        (copy / "resume.safetensors").write_bytes(content)
        return ends(use, copy / "resume.safetensors", (CheckpointError, RunError))

    return trial


def indexes(folder):
    """The rows or the vectors of an index; a change that SQLite does not see may change an entry."""
    path = folder / "people.db"
    settings = dict(format=1, dimensions=8, dtype="float32", checkpoint="none", identity={})
    store = open_store(str(path), settings)
    vectors = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0))).numpy()
    store.add([Row(f"/photos/{i}.jpg", str(i % 3), datetime(2026, 1, 1 + i % 30), box=(i, 1, 2, 3)) for i in range(40)],
              vectors)  # fmt: skip
    store.close()
    files = {each: each.read_bytes() for each in (path, folder / "people.db.1.vectors")}

    def use():
        with contextlib.closing(open_store(str(path))) as opened:
            rows = dict(opened.all_rows())
            found = opened.search(vectors[:2], 5, Filter(("1",), datetime(2026, 1, 2), path="*.jpg"))
            assert len(opened.search(vectors[:1], 100, Filter())) == len(rows) and {id for id, _ in found} <= set(rows)
            assert opened.cameras() and opened.times()

    def trial(generator):
        for each, content in files.items():
            each.write_bytes(content)
        damaged = generator.choice(list(files))
        damaged.write_bytes(mutated_bytes(files[damaged], generator))
        return ends(use, path, SearchError)

    return trial


def boxes(folder):
    for number in range(3):
        write_image(folder / f"{number}.jpg", number)
    path = folder / "boxes.csv"
    text = "path,x,y,width,height,frame\n0.jpg,1,2,10,20,\n1.jpg,0,0,5,5,\n1.jpg,2,0,5,5,\n2.jpg,3,3,3,3,\n"

    def use():
        for image, found in read_boxes(path).items():
            assert image.is_file() and all(box.width > 0 and box.frame is None for box in found)

    def trial(generator):
        path.write_bytes(mutated_text(text, generator))
        return ends(use, path, DataError)

    return trial


def command_lines(folder):
    config = tiny_training(folder, embedded_identities=(3, 2, 2), run_dir=folder / "run")
    (folder / "run.json").write_text(config.to_json())
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(config.to_json())
    model = stirred(build(config.model, seed=config.train.seed))
    checkpoint = folder / "best.safetensors"
    save_checkpoint(checkpoint, model.trained_parameters(), config, {"epoch": 1}, model.fingerprint)
    cuhk_pedes(folder / "cuhk", train=2, test=2)
    index = folder / "people.db"
    with Gallery.open(index, checkpoint) as searched:
        searched.add([folder / "cuhk"], progress=False)
    bases = [
        "train --preset embedded --epochs 3 --warmup-epochs 1 --learning-rate 0.01 --image-size 48 16 --losses sdm "
        "--device cpu --no-mask-captions --embedded-identities 3 2 2 --freeze none --run-dir new",
        f"train --config {folder / 'run.json'} --seed 3 --method up-person --prefix-length 4",
        f"train --resume {folder / 'run'} --workers 0",
        f"train --preset cuhk-pedes --data-root {folder / 'cuhk'} --check-data --embedded-identities 2 1 1",
        f"evaluate {checkpoint} --split test --output out --batch-size 4 --device cpu --precision fp32 --workers 0",
        f"merge {checkpoint} merged.safetensors --rest rest.safetensors",
        f"search query red --index {index} --top 3 --not hat --weight 0.3 --camera 1 --since 2026-01-01 --json",
        f"search query red coat --all --index {index} --until 2026-01-01T12:00 --path */a*.jpg --rerank --device cpu",
        f"search index {folder / 'cuhk'} --index new.db --checkpoint {checkpoint} --every 2 --batch-size 4 --workers 0",
        f"search forget {folder / 'cuhk'} --index {index}",
        "tables V --seeds 2 --jobs 1 --output tables --device cpu --list",
    ]

    def checked(config):
        """Stands for a training, of which only the configuration is looked at."""
        assert Config.from_json(config.to_json()) == config and config.stages()

    def trial(generator):
        arguments = mutated_arguments(generator.choice(bases).split(), generator)
        if arguments[:1] == ["tables"] and "--list" not in arguments:
            arguments.append("--list")  # nothing is to be trained
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.chdir(folder)
            patch.setattr(upperson.train.fit, "fit", checked)
            try:
                status = main(arguments)
            except SystemExit as stop:
                status = stop.code
        if status in (0, 3):
            return True
        last = (err.getvalue().splitlines() or [""])[-1]
        assert status in (1, 2), (arguments, status)
        assert re.match(r"(upperson( \w+)*: )?error: \S", last) and "Traceback" not in err.getvalue(), (
            arguments,
            err.getvalue(),
        )
        return False

    return trial


COUNTS = {
    images: (30, 2000),
    annotations: (60, 5000),
    checkpoints: (15, 400),
    weights: (5, 200),
    foreign: (5, 200),
    model_configurations: (20, 500),
    run_configurations: (30, 1000),
    tiles_of_kernels: (30, 1000),
    caches: (15, 400),
    indexes: (30, 500),
    boxes: (30, 1000),
    resume_states: (3, 100),
    command_lines: (15, 400),
}


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "long"])
@pytest.mark.parametrize("inputs", COUNTS, ids=lambda inputs: inputs.__name__)
def test_each_is_right_or_refused(tmp_path, inputs, long):
    trial, right = inputs(tmp_path), 0
    count = COUNTS[inputs][long]
    for number in range(count):
        try:
            right += trial(random.Random(f"{inputs.__name__} {long} {number}"))
        except Exception as error:
            raise AssertionError(f"{inputs.__name__} {number}: {error!r}") from error
    assert right < count and (right or not long)


def test_the_readme_states_the_counts():
    short, long = map(sum, zip(*COUNTS.values(), strict=True))
    assert f"{long:,} inputs ({short:,} in the short run)" in (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def alarm():
    """Ends a test that waits, such as for a FIFO."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for a file"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def link_to_a_device(path):
    path.symlink_to("/dev/zero")


def remove_permission(path):
    path.write_bytes(b"x")
    path.chmod(0)


@pytest.mark.parametrize("kind", [Path.mkdir, os.mkfifo, Path.touch, link_to_a_device, remove_permission, None])
@pytest.mark.parametrize(
    ("name", "use", "errors"),
    [
        ("image.jpg", load_image, DataError),
        ("own.csv", functools.partial(read_dataset, "folder"), DataError),
        ("best.safetensors", load_checkpoint, CheckpointError),
        ("weights.safetensors", lambda path: build_clip(weights_from(path)), BackboneError),
        ("weights.pt", lambda path: build_clip(weights_from(path)), BackboneError),
        ("model.json", lambda path: random_clip(str(path)), BackboneError),
        ("config.json", read_configuration, (ValueError, OSError)),
        ("my.toml", read_changes, (ValueError, OSError)),
        ("my.json", read_changes, (ValueError, OSError)),
        ("results.json", Results.read, (RunError, OSError)),
        ("tiles.json", tiles.load, tiles.TilesError),
        ("resume.safetensors", lambda path: load_state(path.parent), CheckpointError),
    ],
)
def test_paths_without_a_usable_file(tmp_path, alarm, name, use, errors, kind):
    path = tmp_path / name
    if kind == remove_permission and os.getuid() == 0:
        pytest.skip("the superuser may read every file")
    if kind is not None:
        kind(path)
    if kind is None and name == "resume.safetensors":
        assert use(path) is None  # a run that has saved nothing
    elif kind == Path.touch and name == "my.toml":
        assert use(path) == {}  # an empty file is right TOML
    else:
        assert not ends(lambda: use(path), path, errors)


def weights_from(path):
    return tiny_config(path.parent, pretrained=str(path))
