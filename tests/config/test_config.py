"""The configuration: presets, flags, JSON there and back, and errors that name the field."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from upperson.config import Config, DataConfig, ModelConfig, TrainConfig
from upperson.config.command_line import parse_arguments
from upperson.config.presets import PRESETS, preset
from upperson.fields import fields_of
from upperson.methods import METHODS
from upperson.methods.up_person import UPPerson


@pytest.mark.parametrize("method", METHODS)
def test_field_names_are_unique_across_the_sections(method):
    config = Config().replace(method=method)
    sections = config.sections().values()
    assert len(config.values()) == sum(len(dataclasses.fields(section)) for section in sections)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("embedded", dict(model="embedded", dataset="embedded", image_size=(192, 64))),
        ("cuhk-pedes", dict(prefix_length=10, lora_rank=32, learning_rate=1e-3)),
        ("icfg-pedes", dict(prefix_length=14, lora_rank=32, learning_rate=1e-3)),
        ("rstpreid", dict(prefix_length=2, lora_rank=16, learning_rate=1e-4)),
        ("cuhk-pedes-released", dict(prefix_length=10, lora_rank=32, prefix_scale=100, selection="best-on-test")),
        ("rstpreid-released", dict(prefix_length=2, learning_rate=1e-4, prefix_scale=100, selection="best-on-test")),
        ("flickr30k", dict(prefix_length=10, lora_rank=32, learning_rate=1e-3, image_size=(224, 224))),
        ("mscoco", dict(prefix_length=10, lora_rank=32, learning_rate=1e-3, image_size=(224, 224))),
    ],
)
def test_presets(preset, expected):
    values = PRESETS[preset].values()
    assert values | expected == values
    assert values["dataset"] == preset.removesuffix("-released")
    if preset != "embedded":
        recipe = dict(
            model="ViT-B-16-quickgelu", pretrained="openai", image_size=(384, 128), prefix_scale=10,
            scale_target="weights", adapter_reduction=8, epochs=60, batch_size=128, warmup_epochs=5, warmup_factor=0.1,
            weight_decay=4e-5, adam_epsilon=1e-3, temperature=0.02, mask_captions=True, selection="val",
        )  # fmt: skip
        assert values | recipe | expected == values


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        (dict(), "UP-Person"),
        (dict(lora="none", adapter_attn="none", adapter_mlp="none"), "S-Prefix"),
        (dict(prefix="vanilla", lora="dora", adapter_mlp="none"), "prefix + DoRA + L-Adapter at the attention"),
        (dict(prefix="none", lora="none", adapter_attn="ln-tuning", adapter_mlp="ln-tuning"), "LN-tuning"),
        (dict(depth_prefix=0), "LoRA + L-Adapter"),
        (dict(depth_lora=0, adapter_mlp="none", depth_prefix=1), "S-Prefix + L-Adapter at the attention"),
        (dict(method="full"), "full fine-tuning"),
        (dict(method="zero-shot"), "zero-shot CLIP"),
    ],
)
def test_titles_name_what_is_trained(changes, title):
    assert ModelConfig().replace(**changes).method.title == title


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cuhk",), "preset: 'cuhk' is not allowed; expected one of embedded, cuhk-pedes, "),
        ((None,), "preset: None is not allowed"),
        (("embedded", "uperson"), "method: 'uperson' is not allowed; expected one of up-person, "),
    ],
)
def test_unknown_names(names, message):
    with pytest.raises(ValueError, match=message):
        preset(*names)


def test_no_argument_is_the_embedded_preset():
    assert parse_arguments([]) == PRESETS["embedded"]


def test_flags_override_the_preset_in_any_order():
    arguments = [
        "--epochs", "7", "--preset", "icfg-pedes", "--image-size", "256", "64", "--no-mask-captions", "--tensorboard",
        "--data-root", "some/folder", "--depth-lora", "3", "--depth-prefix", "none", "--scale-target", "logits",
        "--prefix-learning-rate", "5e-5",
    ]  # fmt: skip
    assert parse_arguments(arguments) == PRESETS["icfg-pedes"].replace(
        epochs=7, image_size=(256, 64), mask_captions=False, tensorboard=True, data_root=Path("some/folder"),
        depth_lora=3, depth_prefix=None, scale_target="logits", prefix_learning_rate=5e-5,
    )  # fmt: skip


def test_every_field_is_a_flag_and_in_the_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--preset", "rstpreid", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in PRESETS["rstpreid"].values():
        assert f"--{name.replace('_', '-')}" in text, name
    assert "(default: 0.0001)" in text  # the preset's own learning rate
    assert "15 % of" in text


@pytest.mark.parametrize("preset", PRESETS)
def test_json_there_and_back(preset):
    config = PRESETS[preset].replace(
        learning_rate=0.1 + 0.2, data_root=Path("a b/ü"), depth_lora=0, seed=2**62, run_dir=Path("r"), resume=True
    )
    again = Config.from_json(config.to_json())
    assert again == config
    assert {name: type(value) for name, value in again.values().items()} == {
        name: type(value) for name, value in config.values().items()
    }
    assert again.to_json() == config.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["train"].pop("epochs"), "train: missing keys: epochs"),
        (lambda c: c["model"].update(colour=1, taste=2), "model: unknown keys: colour, taste"),
        (lambda c: c.pop("data"), "configuration: missing keys: data"),
        (lambda c: c.update(data=[1]), "data: expected an object with the keys dataset"),
        (lambda c: c["train"].update(epochs="ten"), "epochs: 'ten' is not allowed; expected a whole number"),
        (lambda c: c["train"].update(seed=True), "seed: True is not allowed; expected a whole number"),
        (lambda c: c["model"].update(image_size=[192]), r"image_size: \(192,\) is not allowed; expected 2 values"),
        (
            lambda c: c["model"]["method"].update(depth_lora=1.5),
            "depth_lora: 1.5 .* a whole number of at most 64 bits or none",
        ),
        (lambda c: c["model"]["method"].update(prompts=True), "method up-person: unknown keys: prompts"),
        (lambda c: c["model"]["method"].update(name="lora"), "method: 'lora' is not allowed; expected one of up-"),
        (lambda c: c["model"]["method"].pop("name"), "method: None is not allowed; expected one of up-person,"),
        (lambda c: c["model"].update(method=["up-person"]), "method: .*'up-person'.* is not allowed; expected one of"),
    ],
)
def test_json_errors_name_the_key(change, message):
    content = json.loads(Config().to_json())
    change(content)
    with pytest.raises(ValueError, match=message):
        Config.from_json(json.dumps(content))


def test_files_from_before_a_field_mean_its_default():
    content = json.loads(Config().replace(losses="itc").to_json())
    del content["train"]["losses"]
    assert Config.from_json(json.dumps(content)) == Config()


def test_files_from_before_methods_had_options_of_their_own():
    """In those files UP-Person's options are among the model's, whatever the method."""
    content = json.loads(Config().replace(prefix_length=3, lora="dora").to_json())
    options = content["model"].pop("method")
    content["model"].update(options)
    del content["model"]["name"]
    assert Config.from_json(json.dumps(content)) == Config().replace(prefix_length=3, lora="dora")
    for method in ("up-person", "full", "zero-shot"):
        content["model"]["method"] = method
        changes = dict(prefix_length=3, lora="dora") if method == "up-person" else {}
        assert Config.from_json(json.dumps(content)) == Config().replace(method=method, **changes)
    content["model"]["colour"] = 1
    with pytest.raises(ValueError, match="model: unknown keys: colour"):
        Config.from_json(json.dumps(content))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_method_on_every_preset(name, method):
    """By one word: data and backbone are the preset's, the recipe is the method's, and JSON keeps all of it."""
    config = preset(name, method)
    assert config.model.method.name == method and parse_arguments(["--preset", name, "--method", method]) == config
    assert dataclasses.replace(config.model, method=PRESETS[name].model.method) == PRESETS[name].model
    assert Config.from_json(config.to_json()) == config
    recipe = METHODS[method].recipe(config.data.is_synthetic)
    assert config.values() | recipe == config.values()


def test_presets_of_the_released_cskt():
    for name in ("cuhk-pedes", "icfg-pedes", "rstpreid"):
        recipe = dict(
            learning_rate=3e-4, bias_learning_rate=6e-4, weight_decay=4e-5, adam_epsilon=1e-3, epochs=60,
            batch_size=128, warmup_epochs=5, warmup_factor=0.1, temperature=0.02, losses="sdm", mask_captions=False,
            prompt_length=4, depth_prompt=None, adapter_reduction=8, adapter_scale_image=0.1, adapter_scale_text=4.0,
            prompts=True, adapters=True, prompt_positions=True, prefix_learning_rate=None, image_size=(384, 128),
        )  # fmt: skip
        values = preset(name, "cskt").values()
        assert values | recipe == values


def test_another_method_starts_from_its_own_options():
    config = Config().replace(method="cskt", prompt_length=2)
    assert config.replace(method="cskt", epochs=7).model == config.model
    assert config.replace(method="prompt-decoupling").model.method.prompt_length == 4
    assert config.differences(Config()) == ["method: cskt, not up-person"]
    assert config.differences(config.replace(prompt_length=3)) == ["prompt_length: 2, not 3"]
    with pytest.raises(ValueError, match="unknown configuration fields with method cskt: lora_rank"):
        config.replace(lora_rank=3)
    with pytest.raises(ValueError, match="method: 'lora' is not allowed; expected one of up-person, cskt"):
        config.replace(method="lora")


def test_cut_off_json():
    with pytest.raises(ValueError, match="invalid or truncated JSON at line 70, column 5"):
        Config.from_json(Config().to_json()[:-20])


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (TrainConfig, dict(epochs=0), "epochs: 0 is not allowed; it must be at least 1"),
        (TrainConfig, dict(batch_size=1), "batch_size: 1 is not allowed; it must be at least 2"),
        (TrainConfig, dict(learning_rate=0.0), "learning_rate: 0.0 .* above 0"),
        (TrainConfig, dict(learning_rate=float("nan")), "learning_rate: nan .* finite"),
        (TrainConfig, dict(warmup_factor=1.5), "warmup_factor: 1.5 .* at most 1"),
        (TrainConfig, dict(epochs=5), "warmup_epochs: 5 .* below epochs, which is 5"),
        (TrainConfig, dict(device="gpu"), "device: 'gpu' .* auto, cpu, cuda"),
        (TrainConfig, dict(precision="int8"), "precision: 'int8' .* one of auto, fp32, bf16, fp16"),
        (TrainConfig, dict(seed=2**63), "seed: .* at most 64 bits"),
        (TrainConfig, dict(losses="sdm+tdm"), "losses: 'sdm\\+tdm' is not allowed; expected a sum of sdm, itc,"),
        (TrainConfig, dict(learning_rates=""), "learning_rates: '' is not allowed; expected parts of names, each with"),
        (TrainConfig, dict(learning_rates="bias"), "learning_rates: 'bias' is not allowed; expected parts of names"),
        (TrainConfig, dict(learning_rates="=1"), "learning_rates: '=1' is not allowed"),
        (
            TrainConfig,
            dict(learning_rates="bias=fast"),
            "learning_rates: 'bias=fast' .* with a rate above 0",
        ),
        (TrainConfig, dict(learning_rates="bias=0"), "learning_rates: 'bias=0' is not allowed; .* a rate above 0"),
        (TrainConfig, dict(learning_rates="bias=nan"), "learning_rates: 'bias=nan' is not allowed"),
        (TrainConfig, dict(learning_rates="a=1, b=1e3"), "learning_rates: .* at most 100, such as bias=2e-5"),
        (TrainConfig, dict(learning_rates="a=1,b=2,a=3"), "learning_rates: 'a=1,b=2,a=3' .* contains a twice"),
        (DataConfig, dict(dataset="imagenet"), "dataset: 'imagenet' .* one of embedded, .*cuhk-pedes"),
        (DataConfig, dict(workers=-1), "workers: -1 .* at least 0"),
        (DataConfig, dict(embedded_identities=(5, 0, 5)), r"embedded_identities: \(5, 0, 5\) .* at least 1"),
        (ModelConfig, dict(image_size=(0, 64)), r"image_size: \(0, 64\)"),
        (UPPerson, dict(lora_rank=0), "lora_rank: 0"),
        (UPPerson, dict(adapter_mlp="l-adapter"), "adapter_mlp: 'l-adapter' .* one of l-parallel, l-sequential"),
        (ModelConfig, dict(model="ViT-B-16"), "pretrained: 'embedded' belongs to model 'embedded' only"),
    ],
)
def test_values_out_of_range(section, values, message):
    with pytest.raises(ValueError, match=message):
        section(**values)


SECTIONS_AND_METHODS = (ModelConfig, DataConfig, TrainConfig, *METHODS.values())


@pytest.mark.parametrize("number", [10**30, 10**400, -(10**30), 1e300, -1e300, float("inf")])
def test_no_field_takes_a_number_beyond_reason(number):
    """Such a number would end a run much later: for lack of memory, in an overflow, or never."""
    checked = set()
    for section in SECTIONS_AND_METHODS:
        for spec, hint in fields_of(section):
            kinds = {hint, *typing.get_args(hint)}
            if kinds & {int, float}:
                value = (number,) * len(spec.default) if isinstance(spec.default, tuple) else number
                with pytest.raises(ValueError, match=rf"^{spec.name}: .* is not allowed; "):
                    section(**{spec.name: value})
                checked.add(spec.name)
    assert {"epochs", "learning_rate", "workers", "image_size", "lora_rank", "prompt_length"} < checked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "market"], "argument --preset: invalid choice: 'market' (choose from 'embedded', 'cuhk-pedes'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--epochs", "-3"], "epochs: -3 is not allowed; it must be at least 1"),
        (["--learning-rate", "1e300"], "learning_rate: 1e+300 is not allowed; it must be at most 100"),
        (["--learning-rate", "1e999"], "learning_rate: inf is not allowed; expected a finite number"),
        (["--workers", "100000"], "workers: 100000 is not allowed; it must be at most 256"),
        (["--embedded-identities", "1000000000", "1", "1"], "is not allowed; it must be at most 20000"),
        (["--seed", "9" * 5000], "argument --seed: invalid int value"),
        (["--losses", f"{'9' * 400}*itc"], "the weight of itc must be above 0 and at most 1e+06"),
        (["--image-size", "192"], "argument --image-size: expected 2 arguments"),
        (["--scale-target", "keys"], "argument --scale-target: invalid choice: 'keys'"),
        (["--depth-lora", "deep"], "argument --depth-lora: invalid int or none value: 'deep'"),
        (["--method", "lora"], "argument --method: invalid choice: 'lora'"),
        (["--method", "cskt", "--lora-rank", "8"], "--lora-rank: an option of --method up-person, not of cskt"),
        (["--no-adapters"], "--no-adapters: an option of --method cskt, not of up-person"),
        (["--prompt-length=3"], "--prompt-length: an option of --method cskt and prompt-decoupling, not of up-person"),
        (["--resume"], "--resume: expected the folder of a run"),
        (["--resume", "nowhere"], "--resume nowhere: no run to resume"),
        (["--resume", "nowhere", "--preset", "rstpreid"], "--preset and --resume RUN_DIR exclude each other"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown.replace("choose from embedded, cuhk-pedes", "choose from 'embedded', 'cuhk-pedes'")
    assert "Traceback" not in shown


def test_resume_takes_the_configuration_of_the_run(tmp_path, capsys):
    started = PRESETS["rstpreid"].replace(epochs=9, run_dir=Path("elsewhere"), data_root=Path("x"))
    (tmp_path / "config.json").write_text(started.to_json())
    assert parse_arguments(["--resume", str(tmp_path), "--workers", "1"]) == started.replace(
        resume=True, run_dir=tmp_path, workers=1
    )
    same_command = ["--preset", "rstpreid", "--epochs", "9", "--run-dir", str(tmp_path), "--resume"]
    assert parse_arguments(same_command) == PRESETS["rstpreid"].replace(epochs=9, run_dir=tmp_path, resume=True)
    with pytest.raises(SystemExit):
        parse_arguments(["--resume", str(tmp_path), "--run-dir", "other"])
    assert "is not the run of --resume" in capsys.readouterr().err

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        parse_arguments(["--resume", str(tmp_path)])
    assert "config.json: configuration: missing keys: model, data, train" in capsys.readouterr().err


def test_differences_name_what_changes_results():
    first = Config()
    second = first.replace(epochs=61, lora_rank=4, workers=0, run_dir=Path("x"), backend="torch")
    assert first.differences(second) == ["lora_rank: 32, not 4", "epochs: 60, not 61"]
    with pytest.raises(ValueError, match="unknown configuration fields with method up-person: epoch"):
        first.replace(epoch=3)
