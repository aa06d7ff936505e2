"""--config FILE, shorter warm-ups, and what importing the configuration costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TRAIN_PY

from upperson.config import PRESETS, Config, preset
from upperson.config.command_line import parse_arguments
from upperson.config.files import read_changes, read_configuration


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# ------------------------------------------------------------------------------------ --config FILE


def test_a_runs_own_configuration_gives_the_same_run(tmp_path):
    for name, method in (("rstpreid", None), ("embedded", "cskt"), ("cuhk-pedes", "prompt-decoupling")):
        config = preset(name, method).replace(seed=7, learning_rate=0.5, workers=1)
        assert parse_arguments(["--config", write(tmp_path / "config.json", config.to_json())]) == config


def test_some_values_in_json_and_in_toml(tmp_path):
    expected = PRESETS["rstpreid"].replace(lora_rank=4, image_size=(192, 64), epochs=9, data_root=Path("x"))
    changes = {
        "model": {"image_size": [192, 64], "method": {"name": "up-person", "lora_rank": 4}},
        "data": {"data_root": "x"},
        "train": {"epochs": 9},
    }
    toml = """
        [model]
        image_size = [192, 64]
        method = { name = "up-person", lora_rank = 4 }
        [data]
        data_root = "x"
        [train]
        epochs = 9
    """
    for path in (write(tmp_path / "some.json", changes), write(tmp_path / "some.toml", toml)):
        assert parse_arguments(["--preset", "rstpreid", "--config", path]) == expected
        assert parse_arguments(["--config", path, "--preset", "rstpreid", "--epochs", "12", "--lora-rank", "2"]) == (
            expected.replace(epochs=12, lora_rank=2)
        )


def test_a_method_in_the_file_brings_its_recipe(tmp_path):
    path = write(tmp_path / "some.toml", '[model]\nmethod = "cskt"')
    assert parse_arguments(["--preset", "cuhk-pedes", "--config", path]) == preset("cuhk-pedes", "cskt")


def test_a_method_on_the_command_line_takes_the_place_of_the_files(tmp_path):
    config = preset("embedded", "cskt").replace(epochs=9, prompt_length=2)
    path = write(tmp_path / "config.json", config.to_json())
    found = parse_arguments(["--config", path, "--method", "up-person"])
    assert found.model.method == preset("embedded").replace(adapter_reduction=4).model.method
    assert found.train.epochs == 9


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json: invalid or truncated JSON at column 2"),
        ("a.toml", "[train", "a.toml: not TOML"),
        ("a.yaml", "train: 1", "a.yaml: expected a file whose name ends in .json or .toml"),
        ("a.json", '{"train": {"seed": 1, "seed": 2}}', "a.json: the key 'seed' stands twice in one object"),
        ("a.json", '{"train": {"learning_rate": NaN}}', "a.json: field 'learning_rate': NaN is not a number"),
        ("a.json", '{"train": {"learning_rate": 1' + 380 * "0" + "}}", "is not allowed; expected a finite number"),
        ("a.toml", "[train]\nlearning_rate = nan", "learning_rate: nan is not allowed; expected a finite number"),
        ("a.json", "[" * 100_000, "a.json: the JSON is nested too deeply"),
        ("a.toml", "a = " + "[" * 100_000, "a.toml: the TOML is nested too deeply"),
        ("a.json", '{"data": {"data_root": "a\\u0000"}}', "is not allowed; expected Unicode text without NUL"),
        ("a.toml", '[model]\nmodel = "a\\u0000"', "model: 'a\\x00' is not allowed; expected Unicode text without NUL"),
        ("a.json", '{"train": {"run_dir": "\\udcff"}}', "a.json: the string at field 'train'.run_dir holds half of a"),
        (
            "a.toml",
            "[train]\nepochs = 0x" + 5000 * "f",
            "epochs: a number of thousands of digits is not allowed; expected a",
        ),
        (
            "a.json",
            {"train": {"epochs": 2**63}},
            "epochs: 9223372036854775808 is not allowed; expected a whole number of",
        ),
        (
            "a.json",
            {"train": {"a\nb" + 5000 * "a": 3}},
            "a.json: train: unknown keys: 'a\\nbaaaaaaaa...aaaaaaaaaaaaa'\n",
        ),
        (
            "a.json",
            {"train": {"seed": 5000 * "a"}},
            "aaa… is not allowed; expected a whole number of at most 64 bits\n",
        ),
        ("a.json", [1], "a.json: configuration: expected an object"),
        ("a.json", {"training": {}}, "a.json: configuration: unknown keys: training"),
        ("a.json", {"train": {"epoch": 3}}, "a.json: train: unknown keys: epoch"),
        ("a.json", {"train": 3}, "a.json: train: expected an object"),
        ("a.toml", "[train]\nepochs = 2.5", "epochs: 2.5 is not allowed; expected a whole number"),
        ("a.toml", "[train]\nseed = -1", "seed: -1 is not allowed; it must be at least 0"),
        ("a.json", {"model": {"method": "lora"}}, "a.json: method: 'lora' is not allowed; expected one of up-person"),
        ("a.json", {"model": {"method": {"lora_rank": 3}}}, "a.json: method: None is not allowed"),
        ("a.json", {"model": {"method": None}}, "a.json: method: None is not allowed"),
        ("a.json", {"model": {"method": []}}, "a.json: method: [] is not allowed"),
        ("a.json", {"model": {"method": {"name": "cskt", "lora_rank": 3}}}, "method cskt: unknown keys: lora_rank"),
    ],
)
def test_files_that_are_refused(tmp_path, capsys, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--config", path])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and "Traceback" not in shown


@pytest.mark.parametrize("field", ["data_root", "image_cache"])
def test_files_of_synthetic_data_are_refused(tmp_path, capsys, field):
    """As a flag and in a file, but for a flag that chooses other data than the file."""
    flag, path = f"--{field.replace('_', '-')}", write(tmp_path / "a.json", {"data": {field: "somewhere"}})
    synthetic = "is synthetic and has no files; choose a data set with --dataset or --preset"
    for arguments, option, dataset in (
        ([flag, "somewhere"], flag, "embedded"),
        ([flag, "somewhere", "--dataset", "embedded-night"], flag, "embedded-night"),
        (["--config", path], f"--config {path}: {field}", "embedded"),
        (["--config", path, flag, "elsewhere"], flag, "embedded"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(arguments)
        assert capsys.readouterr().err.endswith(f"error: {option}: {dataset} {synthetic}\n")
    parse_arguments(["--config", path, "--dataset", "embedded"])
    parse_arguments(["--config", path, "--preset", "cuhk-pedes"])


def test_what_is_not_a_regular_file_does_not_hang(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.json")
    os.mkfifo(tmp_path / "config.json")
    for arguments in (["--config", str(tmp_path / "a.json")], ["--resume", str(tmp_path)]):
        with pytest.raises(SystemExit):
            parse_arguments(arguments)
        assert "cannot be read (expected a regular file, found a FIFO)" in capsys.readouterr().err


def test_a_path_that_is_not_utf_8(capsys):
    """On Linux a byte that is not UTF-8 arrives as half of a surrogate pair, which no file of a run could hold."""
    with pytest.raises(SystemExit):
        parse_arguments(["--run-dir", "runs/\udcff"])
    assert "run_dir: " in (shown := capsys.readouterr().err) and "expected Unicode text without NUL" in shown


def test_a_missing_file_and_a_resumed_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text(Config().to_json())
    some = write(tmp_path / "some.json", {})
    for arguments, message in (
        (["--config", str(tmp_path / "none.json")], "none.json: cannot be read (No such file or directory)"),
        (["--config", some, "--resume", str(tmp_path)], "--config and --resume RUN_DIR exclude each other"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(arguments)
        assert message in capsys.readouterr().err


def test_reading_from_python(tmp_path):
    config = preset("embedded", "cskt").replace(seed=3)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert read_configuration(path) == config == preset("embedded").replace(**read_changes(path))


# ------------------------------------------------------------------------------------ shorter warm-ups


@pytest.mark.parametrize(
    ("arguments", "warmups", "lines"),
    [
        (["--epochs", "1"], {"warmup_epochs": 0}, ["warmup_epochs: 1 is not below epochs, 1; shortened to 0"]),
        (
            ["--preset", "cuhk-pedes", "--epochs", "5"],
            {"warmup_epochs": 1},
            ["warmup_epochs: 5 is not below epochs, 5; shortened to 1"],
        ),
        (["--preset", "cuhk-pedes", "--epochs", "6"], {"warmup_epochs": 5}, []),
        (
            ["--preset", "cuhk-pedes", "--method", "prompt-decoupling", "--epochs", "2", "--encoder-epochs", "3"],
            {"warmup_epochs": 0, "encoder_warmup_epochs": 0},
            [
                "encoder_warmup_epochs: 5 is not below encoder_epochs, 3; shortened to 0",
                "warmup_epochs: 5 is not below epochs, 2; shortened to 0",
            ],
        ),
    ],
)
def test_a_warmup_that_does_not_fit_is_shortened(arguments, warmups, lines, capsys):
    values = parse_arguments(arguments).values()
    assert {name: values[name] for name in warmups} == warmups
    assert capsys.readouterr().err.splitlines() == lines


def test_a_warmup_that_is_asked_for_is_not_shortened(tmp_path, capsys):
    path = write(tmp_path / "some.json", {"train": {"epochs": 2}})
    assert parse_arguments(["--preset", "cuhk-pedes", "--config", path]).train.warmup_epochs == 0
    for arguments in (["--epochs", "2", "--warmup-epochs", "2"], ["--epochs", "0"]):
        with pytest.raises(SystemExit):
            parse_arguments(arguments)
    assert "must be below epochs, which is 2" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ options without effect

ENCODERS = "stage encoders freezes the prompts and reads the encoder_ options"


@pytest.mark.parametrize(
    ("arguments", "unread"),
    [
        ("--prefix none", {}),
        ("--prefix none --prefix-length 4 --lora-rank 3", {"prefix_length": "no block has a prefix"}),
        ("--prefix vanilla --prefix-length 3 --prefix-scale 5", {"prefix_scale": "a vanilla prefix has no λ"}),
        ("--lora none --depth-lora 1", {"depth_lora": "lora is none"}),
        ("--depth-lora 0 --lora-rank 3", {"lora_rank": "no block has a low-rank update"}),
        ("--depth-prefix 0 --prefix-scale 3", {"prefix_scale": "no block has a prefix"}),
        ("--lora wora --no-low-rank-gradients", {"low_rank_gradients": "WoRA needs the gradient of the whole weight"}),
        (
            "--adapter-attn ln-tuning --adapter-mlp none --adapter-reduction 8 --depth-adapter 1",
            {"adapter_reduction": "no adapter has a bottleneck"},
        ),
        ("--method cskt --no-prompts --prompt-length 3", {"prompt_length": "there are no prompts"}),
        ("--method cskt --no-adapters --adapter-reduction 3", {"adapter_reduction": "there are no adapters"}),
        (
            "--method zero-shot --batch-size 8 --device cpu --seed 3 --mask-captions",
            {"mask_captions": "nothing is trained", "batch_size": "nothing is trained"},
        ),
        ("--method prompt-decoupling --temperature 0.1 --learning-rate 1e-3 --encoder-losses itc", {}),
        ("--method prompt-decoupling --stage prompts --encoder-losses itc", {"encoder_losses": "stage is prompts"}),
        (
            "--method prompt-decoupling --stage encoders --epochs 3 --encoder-epochs 5 --freeze clip",
            {"epochs": ENCODERS, "freeze": ENCODERS},
        ),
        ("--losses cmpm+id --temperature 0.1", {"temperature": "the losses have neither sdm nor itc"}),
        ("--losses mlm+itc --temperature 0.1 --no-mask-captions", {}),
        ("--losses mlm --no-mask-captions", {"mask_captions": "the mlm loss always reads masked captions"}),
        ("--no-check-images --workers 0", {"check_images": "the images are synthetic"}),
        (
            "--preset cuhk-pedes --image-cache x --no-check-images --embedded-seed 3",
            {
                "embedded_seed": "cuhk-pedes is not an embedded data set",
                "check_images": "the images come from the image cache",
            },
        ),
        ("--dataset embedded-scenes --embedded-views 2", {"embedded_views": "a scene has one image"}),
        ("--epochs 2 --warmup-epochs 0 --warmup-factor 0.5", {"warmup_factor": "there is no warm-up"}),
    ],
)
def test_an_option_without_effect_is_reported(arguments, unread, capsys):
    parse_arguments(arguments.split())
    lines = [f"{name}: has no effect here, since {reason}" for name, reason in unread.items()]
    assert capsys.readouterr().err.splitlines() == lines


def test_an_option_of_a_file_without_effect_is_reported(tmp_path, capsys):
    """Where the file changes the option: the whole configuration of a run is no news."""
    base = preset("embedded").replace(prefix="none")
    (tmp_path / "whole.json").write_text(base.to_json())
    parse_arguments(["--config", str(tmp_path / "whole.json")])
    assert capsys.readouterr().err == ""
    (tmp_path / "whole.json").write_text(base.replace(prefix_length=7).to_json())
    parse_arguments(["--config", str(tmp_path / "whole.json")])
    assert capsys.readouterr().err == "prefix_length: has no effect here, since no block has a prefix\n"


def test_of_several_processes_the_first_one_speaks(monkeypatch, capsys):
    arguments = ["--prefix", "none", "--prefix-length", "3", "--epochs", "1"]
    for rank, lines in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        parse_arguments(arguments)
        assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("up-person", {}),
        ("up-person", {"prefix": "none"}),
        ("up-person", {"prefix": "vanilla", "lora": "none"}),
        ("up-person", {"adapter_attn": "ln-tuning", "adapter_mlp": "none"}),
        ("up-person", {"depth_prefix": 0, "depth_lora": 0}),
        ("up-person", {"adapter_attn": "none", "adapter_mlp": "none"}),
        ("cskt", {"prompts": False}),
        ("cskt", {"adapters": False}),
    ],
)
def test_modules_do_not_depend_on_options_without_effect(method, options):
    """And their number, sizes or values depend on all other options: none is left out."""
    import torch  # with open_clip, which other tests here do without

    from upperson.model import AdaptedCLIP

    def parameters(config):
        torch.manual_seed(0)
        model = AdaptedCLIP(config.model)
        return {name: parameter.detach().clone() for name, parameter in model.adaptation().items()}

    def same(one, other):
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    base = preset("embedded", method).replace(**options)
    changes = {
        "prefix_length": 3, "prefix_scale": 5.0, "depth_prefix": 1, "lora_rank": 2, "depth_lora": 1,
        "adapter_reduction": 16, "depth_adapter": 1, "prompt_length": 3, "depth_prompt": 1,
    }  # fmt: skip
    expected, unread = parameters(base), base.unread()
    for name in changes.keys() & base.values().keys():
        assert same(parameters(base.replace(**{name: changes[name]})), expected) == (name in unread), name


# ------------------------------------------------------------------------------------ start-up


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import upperson; print(upperson.__version__)"],
        ["-c", "import upperson.config.command_line"],
        [str(TRAIN_PY), "--help"],
        ["-m", "upperson", "evaluate", "--help"],
    ],
    ids=["import", "configuration", "train --help", "evaluate --help"],
)
def test_nothing_heavy_is_imported(command, tmp_path):
    """torch alone takes seconds."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
