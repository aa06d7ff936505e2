"""The configuration of a run: three dataclasses, which include the method's options, and their JSON form.

Every field has its type, bounds and help text here, or in the file of its method. command_line.py makes a flag of each
field.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

from upperson.config.rates import parse_rates
from upperson.fields import MOST_EPOCHS, MOST_RATE, Checked, fields_of, option
from upperson.files import parse_json
from upperson.losses.names import parse_losses
from upperson.methods import DEFAULT, METHODS, SAVINGS, Method, Stage

SELECTIONS = {
    "val": "best R@1 on the validation split",
    "last": "last epoch, which is reported if a data set has no validation split",
    "best-on-test": "best R@1 on the TEST split, as in the released code; optimistic",
    "none": "nothing was trained, so no epoch was selected",
}

# Limits that nobody needs to exceed. Beyond them a run would end much later, for lack of memory or by divergence.
MOST_AT_ONCE = 2**17  # images or captions
MOST_STEPS = 10**9


# The fields of TrainConfig that a run without training reads.
READ_WITHOUT_TRAINING = {
    "freeze", "start_from", "precision", "device", "seed", "evaluate_batch_size", "run_dir", "resume"
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The backbone, the method that adapts it, and how both are computed."""

    model: str = option(
        "embedded",
        "open_clip model name, path of an open_clip JSON model configuration, or "
        "'embedded' (the small CLIP of this package)",
    )
    pretrained: str = option(
        "embedded", "open_clip tag, path of a local checkpoint, 'none' (random weights), or 'embedded'"
    )
    image_size: tuple[int, int] = option(
        (192, 64), "height and width in pixels", at_least=1, at_most=2048, metavar=("HEIGHT", "WIDTH")
    )
    method: Method = option(METHODS[DEFAULT](), "the method, with its own options", added=True)
    backend: Literal["auto", "triton", "torch"] = option(
        "auto", "fused kernels or plain PyTorch; auto: kernels on a GPU, PyTorch elsewhere", changes_results=False
    )
    skip_unread: bool | None = option(
        None, "compute only the token of the embedding in the last block; none: where this does not change the "
        "training of the method", changes_results=False, added=True,
    )  # fmt: skip
    pack_captions: bool | None = option(
        None, "pack captions one after the other, without padding; none: where this does not change the training of "
        "the method", changes_results=False, added=True,
    )  # fmt: skip
    low_rank_gradients: bool = option(
        True, "compute the gradients of LoRA's factors without that of the whole weight", changes_results=False,
        added=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained == "embedded" and self.model != "embedded":
            raise ValueError(
                f"pretrained: 'embedded' belongs to model 'embedded' only, not to {self.model[:200]!r}; "
                "expected an open_clip tag, the path of a checkpoint, or 'none'"
            )

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields of the model or its method changed. Another `method`, by name, has its defaults."""
        own = {spec.name for spec in dataclasses.fields(self)}
        method = changes.pop("method", self.method)
        if isinstance(method, str):
            method = method_named(method) if method != self.method.name else self.method
        of_method = {name: changes.pop(name) for name in list(changes) if name not in own}
        unknown = set(of_method) - {spec.name for spec in dataclasses.fields(method)}
        if unknown:
            raise ValueError(f"unknown configuration fields with method {method.name}: {', '.join(sorted(unknown))}")
        return dataclasses.replace(self, method=dataclasses.replace(method, **of_method), **changes)


def method_named(name: Any) -> Method:
    """The method with its default options. Raises ValueError with the known names for an unknown method."""
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(
            f"method: {short(name)} is not allowed; expected one of {', '.join(METHODS)}, or a method of your own, "
            "whose module must be imported first (upperson/methods/README.md shows the command)"
        )
    return METHODS[name]()


EmbeddedDataset = Literal["embedded", "embedded-night", "embedded-scenes", "embedded-scenes-night"]
Dataset = Literal[EmbeddedDataset, "cuhk-pedes", "icfg-pedes", "rstpreid", "flickr30k", "mscoco", "folder"]


@dataclass(frozen=True)
class DataConfig(Checked):
    """The data set and its preparation for training."""

    dataset: Dataset = option("embedded", "data set; the embedded ones are synthetic; 'folder' is your own data")
    data_root: Path | None = option(
        None,
        "folder of the data set, or the CSV or JSON-lines file of 'folder' (not needed for embedded data sets)",
        changes_results=False,
    )
    embedded_identities: tuple[int, int, int] = option(
        (600, 100, 200), "number of people, or scenes, in each split of an embedded data set", at_least=1,
        at_most=20_000,
        metavar=("TRAIN", "VAL", "TEST"),
    )  # fmt: skip
    embedded_views: int = option(4, "images of each synthetic person, each with two captions", at_least=1, at_most=100)
    embedded_seed: int = option(0, "seed of an embedded data set", at_least=0)
    mask_captions: bool = option(True, "mask 15 % of the caption tokens during training")
    check_images: bool = option(True, "open every image once before training", changes_results=False)
    image_cache: Path | None = option(
        None,
        "folder for decoded and resized images (uint8), which later runs read; none: decode images in every epoch",
        changes_results=False,
        added=True,
    )
    workers: int = option(
        4, "processes that load images; 0: the main process loads them", at_least=0, at_most=256, changes_results=False
    )

    @property
    def is_synthetic(self) -> bool:
        """Whether the images are synthetic: drawn at run time instead of read from files."""
        return self.dataset in typing.get_args(EmbeddedDataset)


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Optimisation, evaluation, and the run folder."""

    epochs: int = option(60, "passes over the training split", at_least=1, at_most=MOST_EPOCHS)
    batch_size: int = option(128, "pairs in a batch, at least two", at_least=2, at_most=MOST_AT_ONCE)
    learning_rate: float = option(1e-3, "Adam's learning rate after the warm-up", above=0, at_most=MOST_RATE)
    bias_learning_rate: float | None = option(
        None, "learning rate of biases; none: learning_rate", above=0, at_most=MOST_RATE, added=True
    )
    prefix_learning_rate: float | None = option(
        None, "learning rate of the prefix parameters; none: learning_rate", above=0, at_most=MOST_RATE
    )
    learning_rates: str | None = option(
        None, "learning rates of parameters by a part of their names, such as mlm.head=5e-5, bias=2e-5; the last part "
        "that a name contains decides; none, and other names: the rates above", added=True,
    )  # fmt: skip
    weight_decay: float = option(4e-5, "coupled L2 decay, without biases", at_least=0, at_most=1000)
    adam_epsilon: float = option(1e-3, "Adam's epsilon", above=0, at_most=1000)
    warmup_epochs: int = option(5, "epochs of linear warm-up before the cosine; must be below epochs", at_least=0)
    warmup_factor: float = option(
        0.1, "learning rate at the start of the warm-up, as a share of learning_rate", above=0, at_most=1
    )
    losses: str = option(
        "sdm",
        "sdm, itc, cmpm, id, mlm, balance (of experts), or a weighted sum of them such as sdm+0.5*itc",
        added=True,
    )
    temperature: float = option(0.02, "temperature of the SDM and ITC losses", above=0, at_most=1000)
    freeze: str | None = option(
        None, "kinds of parameters that are not trained, joined by +: prefix, lora, adapter_attn, adapter_mlp, prompt, "
        "clip, as far as the method has them; none: train all", added=True
    )  # fmt: skip
    start_from: Path | None = option(
        None, "checkpoint whose parameters training starts from; none: initial values", added=True
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "autocast dtype; parameters stay float32; auto: bf16 on a GPU, fp32 on a CPU"
    )
    frozen_weights: Literal["auto", "cast", "kept"] = option(
        "auto",
        "frozen weights are cast to the autocast dtype in every step, or kept in it; auto: kept on a CUDA GPU",
        added=True,
    )
    compile: bool = option(False, "torch.compile the blocks of both towers", changes_results=False, added=True)
    device: str = option(
        "auto",
        "auto, cpu, cuda, cuda:N or mps; auto: a CUDA GPU if available, else the CPU",
        changes_results=False,
    )
    seed: int = option(1, "seed of initial values, data order, augmentation", at_least=0)
    selection: Literal["val", "best-on-test"] = option(
        "val",
        "the reported epoch: the best on the validation split (the last epoch if there is no such split), or the best "
        "on the test split",
    )
    evaluate_batch_size: int = option(
        256,
        "images or captions embedded at once in evaluation",
        at_least=1,
        at_most=MOST_AT_ONCE,
        changes_results=False,
    )
    run_dir: Path | None = option(
        None, "folder for everything the run writes; none: the next free runs/DATASET-NUMBER", changes_results=False
    )
    save_every: int = option(
        500,
        "steps between two saved states within an epoch; 0: the state is saved only at the end of an epoch",
        at_least=0,
        at_most=MOST_STEPS,
        changes_results=False,
    )
    log_every: int = option(10, "steps between two lines of the loss in metrics.jsonl", at_least=1, at_most=MOST_STEPS)
    tensorboard: bool = option(False, "also log to TensorBoard (needs the extra 'tensorboard')", changes_results=False)
    resume: bool = option(False, "resume the run in RUN_DIR, or in --run-dir", changes_results=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs} is not allowed; it must be below epochs, which is {self.epochs}"
            )
        try:
            parse_losses(self.losses)
        except ValueError as error:
            raise ValueError(f"losses: {error}") from None
        if self.learning_rates is not None:
            try:
                parse_rates(self.learning_rates)
            except ValueError as error:
                raise ValueError(f"learning_rates: {error}") from None
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise ValueError(f"device: {self.device!r} is not allowed; expected auto, cpu, cuda, cuda:N or mps")


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run. `to_json` and `from_json` are exact inverses."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        others = {
            spec.name
            for name, section in self.sections().items()
            if name != "method"
            for spec in dataclasses.fields(section)
        }
        taken = others & {spec.name for spec in dataclasses.fields(self.model.method)}
        if taken:
            raise ValueError(f"method {self.model.method.name}: the option {taken.pop()} has the name of another field")
        for switch in SAVINGS:
            if getattr(self.model, switch) and switch not in self.model.method.savings:
                raise ValueError(
                    f"{switch}: true is not allowed, since it would change the training of method "
                    f"{self.model.method.name}; expected none (then it is on in evaluation alone) or false"
                )

    def sections(self) -> dict[str, Any]:
        """The sections that hold fields, by name. The method's section is nested in the model's."""
        return {"model": self.model, "method": self.model.method, "data": self.data, "train": self.train}

    def values(self) -> dict[str, Any]:
        """All fields by name. The value of "method" is the method's name."""
        found = {
            spec.name: getattr(section, spec.name)
            for section in self.sections().values()
            for spec in dataclasses.fields(section)
        }
        return found | {"method": self.model.method.name}

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields of any section changed: `config.replace(epochs=3, prefix_length=4)`.

        Another `method`, by name, has its default options, and the other fields keep their values.
        `upperson.config.preset` also applies the recipe of a method.
        """
        parts = {}
        for name in ("data", "train"):
            section = getattr(self, name)
            own = {spec.name: changes.pop(spec.name) for spec in dataclasses.fields(section) if spec.name in changes}
            parts[name] = dataclasses.replace(section, **own) if own else section
        return Config(self.model.replace(**changes) if changes else self.model, **parts)

    def settled(self) -> "Config":
        """This configuration, with the fields that its method overrides (Method.decided)."""
        return self.replace(**self.model.method.decided())

    def stages(self) -> list[tuple[Stage, "Config"]]:
        """The stages of a training, each with its configuration. A method without stages has one unnamed stage."""
        stages = self.model.method.stages() or (Stage("", self.model.method.title, {}),)
        return [(stage, self.replace(**stage.changes).settled()) for stage in stages]

    def unread(self) -> dict[str, str]:
        """The fields that no stage of a run reads beside the other fields, by name, each with the reason."""
        first, *others = (own._unread_by_itself() for _, own in self.stages())
        return {name: reason for name, reason in first.items() if all(name in other for other in others)}

    def _unread_by_itself(self) -> dict[str, str]:
        data, train, method = self.data, self.train, self.model.method
        losses = parse_losses(train.losses)
        found: dict[str, str] = {}
        if data.is_synthetic:
            found["check_images"] = "the images are synthetic"
        else:
            names = ("embedded_identities", "embedded_views", "embedded_seed")
            found |= dict.fromkeys(names, f"{data.dataset} is not an embedded data set")
        if data.dataset.startswith("embedded-scenes"):
            found["embedded_views"] = "a scene has one image"
        if data.image_cache is not None:
            found["check_images"] = "the images come from the image cache"
        if train.warmup_epochs == 0:
            found["warmup_factor"] = "there is no warm-up"
        if not losses.keys() & {"sdm", "itc"}:
            found["temperature"] = "the losses have neither sdm nor itc"
        if losses.keys() == {"mlm"}:
            found["mask_captions"] = "the mlm loss always reads masked captions"
        if not method.trains:
            of_training = {spec.name for spec in dataclasses.fields(train)} - READ_WITHOUT_TRAINING
            found |= dict.fromkeys((*of_training, "mask_captions", "low_rank_gradients"), "nothing is trained")
        return found | method.unread()

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        content["model"]["method"] = {"name": self.model.method.name, **content["model"]["method"]}
        return json.dumps(content, indent=2, default=str, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Config":
        """The inverse of to_json. Raises ValueError for invalid JSON and unknown, missing or out-of-range fields."""
        content = parse_json(text)
        _same_keys(content, SECTIONS, "configuration")
        model = _with_method(content["model"])
        parts = {name: _section(section, content[name], name) for name, section in SECTIONS.items() if name != "model"}
        return Config(_section(ModelConfig, model, "model"), **parts)

    def differences(self, other: "Config") -> list[str]:
        """The differing fields that change results, each as "field: own value, not the other value"."""
        if self.model.method.name != other.model.method.name:
            return [f"method: {self.model.method.name}, not {other.model.method.name}"]
        theirs = other.values()
        matter = [
            spec.name
            for section in self.sections().values()
            for spec in dataclasses.fields(section)
            if spec.metadata["changes_results"]
        ]
        mine = self.values()
        return [f"{name}: {mine[name]}, not {theirs[name]}" for name in matter if mine[name] != theirs[name]]


def fields_in(content: Any) -> dict[str, Any]:
    """The fields of a partial configuration by name, as Config.replace takes them.

    `content` has some or all sections of to_json, each with some or all fields. The method is a name, or an object with
    its name and options. Raises ValueError for unknown sections and fields.
    """
    _known_keys(content, SECTIONS, "configuration")
    found: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values = content.get(name, {})
        hints = {spec.name: hint for spec, hint in fields_of(section)}
        _known_keys(values, hints, name)
        if isinstance(method := values.get("method"), dict):
            own = {spec.name: hint for spec, hint in fields_of(type(method_named(method.get("name"))))}
            _known_keys(method, own | {"name": str}, f"method {method['name']}")
            found |= {key: _from_plain(value, own[key]) for key, value in method.items() if key != "name"}
            values = values | {"method": method["name"]}
        elif "method" in values:
            method_named(method)
        found |= {key: _from_plain(value, hints[key]) for key, value in values.items()}
    return found


SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


def _section(section: type, content: Any, where: str) -> Any:
    """Builds a section of the configuration from its JSON object."""
    hints = {spec.name: hint for spec, hint in fields_of(section)}
    added = {spec.name for spec, _ in fields_of(section) if spec.metadata["added"]}
    _same_keys(content, hints, where, added)
    return section(**{name: _from_plain(value, hints[name]) for name, value in content.items()})


def _with_method(model: Any) -> Any:
    """A model's JSON object, in which the method's object is replaced by the method.

    Older files have no object for the method: the options of the default method are among the model's fields.
    """
    if not isinstance(model, dict):
        return model
    content = model.get("method", DEFAULT)
    if isinstance(content, dict):
        content = dict(content)
        method = type(method_named(content.pop("name", None)))
    else:
        method, older = type(method_named(content)), {spec.name for spec in dataclasses.fields(METHODS[DEFAULT])}
        own = {spec.name for spec in dataclasses.fields(method)}
        content = {name: value for name, value in model.items() if name in older & own}
        model = {name: value for name, value in model.items() if name not in older}
    return model | {"method": _section(method, content, f"method {method.name}")}


def _from_plain(value: Any, hint: Any) -> Any:
    """Converts a JSON value to the field's type: lists become tuples, strings become paths."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and value.strip() and Path in typing.get_args(hint):
        return Path(value)
    return value


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(key if key.isidentifier() and len(key) < 40 else short(key) for key in keys)


def _known_keys(content: Any, known: Container[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, or a table in TOML")
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{where}: unknown keys: {_listed(unknown)}")


def _same_keys(content: Any, expected: dict, where: str, optional: Container[str] = ()) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object with the keys {', '.join(expected)}")
    missing = [key for key in expected if key not in content and key not in optional]
    unknown = [key for key in content if key not in expected]
    if missing or unknown:
        raise ValueError(
            f"{where}: "
            + "; ".join(
                f"{kind} keys: {_listed(keys)}" for kind, keys in (("missing", missing), ("unknown", unknown)) if keys
            )
        )
