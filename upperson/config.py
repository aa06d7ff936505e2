"""The configuration of a run: three dataclasses, presets, and JSON.

Every field's type, bounds and help stand here and nowhere else; command_line.py makes flags of them.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from upperson.losses import parse_losses
from upperson.options import Checked, fields_of, option

SELECTIONS = {
    "val": "best R@1 on the validation split",
    "last": "last epoch, which is reported where a data set has no validation split",
    "best-on-test": "best R@1 on the TEST split, as the released code does; optimistic",
    "none": "nothing was trained, so there was no epoch to select",
}


AdapterKind = Literal["l-parallel", "l-sequential", "parallel", "sequential", "ln-tuning", "none"]
ADAPTERS = (
    "beside LayerNorm (L-Adapter), after LayerNorm, beside the attention, after the attention, LayerNorm's own gain "
    "and bias, or none"
)


PARTS = {
    "salable": "S-Prefix", "vanilla": "prefix", "lora": "LoRA", "dora": "DoRA", "wora": "WoRA",
    "l-parallel": "L-Adapter", "l-sequential": "sequential L-Adapter", "parallel": "parallel adapter",
    "sequential": "sequential adapter", "ln-tuning": "LN-tuning",
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The backbone and what is added to it. Depths count blocks from the input."""

    model: str = option(
        "embedded",
        "open_clip model name, path of an open_clip JSON model configuration, or "
        "'embedded' (the small CLIP that comes with the package)",
    )
    pretrained: str = option(
        "embedded", "open_clip tag, path of a local checkpoint, 'none' (random weights), or 'embedded'"
    )
    image_size: tuple[int, int] = option(
        (192, 64), "height and width in pixels", at_least=1, metavar=("HEIGHT", "WIDTH")
    )
    method: Literal["up-person", "full", "zero-shot"] = option(
        "up-person", "what is trained: UP-Person's modules in the frozen CLIP, all of CLIP, or nothing", added=True
    )
    prefix: Literal["salable", "vanilla", "none"] = option(
        "salable",
        "prefix in the attention: with a learnable λ (S-Prefix), without (prefix tuning), or none",
        added=True,
    )
    prefix_length: int = option(10, "prefix tokens P in a block, each tower its own", at_least=1)
    prefix_scale: float = option(10.0, "initial value of the learnable λ on the salable prefix")
    scale_target: Literal["weights", "logits"] = option(
        "weights", "what λ multiplies: the prefix's attention weights (the paper's Eq. 15) or its logits"
    )
    lora: Literal["lora", "dora", "wora", "none"] = option(
        "lora", "low-rank update of the key and value projections: LoRA, DoRA, WoRA, or none", added=True
    )
    lora_rank: int = option(32, "rank of that update", at_least=1)
    adapter_attn: AdapterKind = option("l-parallel", f"adapter at the attention: {ADAPTERS}", added=True)
    adapter_mlp: AdapterKind = option("l-parallel", "adapter at the MLP, of the same kinds", added=True)
    adapter_reduction: int = option(8, "adapter width is tower width / this", at_least=1)
    depth_prefix: int | None = option(None, "prefix in the first so many blocks; none: in all", at_least=0)
    depth_lora: int | None = option(None, "LoRA in the first so many blocks; none: in all", at_least=0)
    depth_adapter: int = option(0, "adapters in all but the first so many blocks", at_least=0)
    backend: Literal["auto", "triton", "torch"] = option(
        "auto", "fused kernels or plain PyTorch; auto: kernels on a GPU, PyTorch elsewhere", changes_results=False
    )
    skip_unread: bool = option(
        True, "in the last block compute only the token that becomes the embedding", changes_results=False, added=True
    )
    pack_captions: bool = option(
        True, "run captions one behind the other, without padding", changes_results=False, added=True
    )
    low_rank_gradients: bool = option(
        True, "gradients of LoRA's factors without that of the whole weight", changes_results=False, added=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained == "embedded" and self.model != "embedded":
            raise ValueError(
                f"pretrained: 'embedded' belongs to model 'embedded' alone, not to {self.model!r}; "
                "expected an open_clip tag, the path of a checkpoint, or 'none'"
            )

    @property
    def title(self) -> str:
        """What is trained, in the field's words: "UP-Person", "S-Prefix + LoRA", "full fine-tuning", …"""
        if self.method != "up-person":
            return {"full": "full fine-tuning", "zero-shot": "zero-shot CLIP"}[self.method]
        parts = [PARTS[kind] for kind in (self.prefix, self.lora) if kind != "none"]
        adapters = [self.adapter_attn, self.adapter_mlp]
        if adapters[0] == adapters[1]:
            parts += [PARTS[kind] for kind in adapters[:1] if kind != "none"]
        else:
            places = zip(adapters, ("attention", "MLP"), strict=True)
            parts += [f"{PARTS[kind]} at the {place}" for kind, place in places if kind != "none"]
        return "UP-Person" if parts == ["S-Prefix", "LoRA", "L-Adapter"] else " + ".join(parts)


EmbeddedDataset = Literal["embedded", "embedded-night", "embedded-scenes", "embedded-scenes-night"]
Dataset = Literal[EmbeddedDataset, "cuhk-pedes", "icfg-pedes", "rstpreid", "flickr30k", "mscoco", "folder"]


@dataclass(frozen=True)
class DataConfig(Checked):
    """What is read, and how a training pair is made of it."""

    dataset: Dataset = option(
        "embedded", "which data set; the embedded ones are drawn at run time; 'folder' is one of your own"
    )
    data_root: Path | None = option(
        None,
        "folder of the data set, or the CSV or JSON-lines file of 'folder' (not needed for the embedded ones)",
        changes_results=False,
    )
    embedded_identities: tuple[int, int, int] = option(
        (600, 100, 200), "people, or scenes, in each split of an embedded set", at_least=1,
        metavar=("TRAIN", "VAL", "TEST"),
    )  # fmt: skip
    embedded_views: int = option(4, "images of each of these people, with two captions each", at_least=1)
    embedded_seed: int = option(0, "seed that an embedded set is drawn from", at_least=0)
    mask_captions: bool = option(True, "mask 15 % of the caption tokens in training")
    check_images: bool = option(True, "open every image once before training", changes_results=False)
    image_cache: Path | None = option(
        None,
        "folder for decoded and resized images, as uint8; made once, read by every later run; none: decode each time",
        changes_results=False,
        added=True,
    )
    workers: int = option(
        4, "processes that load images; 0: none besides the main one", at_least=0, changes_results=False
    )

    @property
    def is_drawn(self) -> bool:
        """Whether the images are drawn at run time, not read from files."""
        return self.dataset in typing.get_args(EmbeddedDataset)


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Optimisation, evaluation, and where the results go."""

    epochs: int = option(60, "passes over the training split", at_least=1)
    batch_size: int = option(128, "pairs in a batch; the loss needs at least two", at_least=2)
    learning_rate: float = option(1e-3, "Adam's learning rate after the warm-up", above=0)
    prefix_learning_rate: float | None = option(
        None, "another learning rate for the prefix parameters; none: the same", above=0
    )
    weight_decay: float = option(4e-5, "coupled L2 decay; biases have none", at_least=0)
    adam_epsilon: float = option(1e-3, "Adam's epsilon", above=0)
    warmup_epochs: int = option(5, "epochs of linear warm-up before the cosine; fewer than epochs", at_least=0)
    warmup_factor: float = option(0.1, "the warm-up starts at this share of the learning rate", above=0, at_most=1)
    losses: str = option("sdm", "sdm, itc, cmpm, id, mlm, or a weighted sum of them such as sdm+0.5*itc", added=True)
    temperature: float = option(0.02, "temperature of the SDM and ITC losses", above=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "autocast; parameters stay float32; auto: bf16 on a GPU, fp32 on a CPU"
    )
    compile: bool = option(False, "torch.compile the blocks of both towers", changes_results=False, added=True)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", changes_results=False)
    seed: int = option(1, "seed of initial values, data order, augmentation", at_least=0, below=2**63)
    selection: Literal["val", "best-on-test"] = option(
        "val",
        "which epoch is reported: best on the validation split (last epoch where there is none), or best "
        "on the test split",
    )
    evaluate_batch_size: int = option(
        256, "images or captions embedded at once in evaluation", at_least=1, changes_results=False
    )
    run_dir: Path | None = option(
        None, "folder for everything the run writes; none: the next free runs/DATASET-NUMBER", changes_results=False
    )
    save_every: int = option(
        500,
        "steps between two resume states within an epoch; 0: at epoch ends alone",
        at_least=0,
        changes_results=False,
    )
    log_every: int = option(10, "steps between two loss lines in metrics.jsonl", at_least=1)
    tensorboard: bool = option(False, "also log to TensorBoard (needs the extra 'tensorboard')", changes_results=False)
    resume: bool = option(
        False, "continue the run in RUN_DIR, or in --run-dir where none is given", changes_results=False
    )

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
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device: {self.device!r} is not allowed; expected auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class Config:
    """All of a run. `to_json` and `from_json` are exact inverses."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def replace(self, **changes: Any) -> "Config":
        """A copy with single fields changed, wherever they stand: `config.replace(epochs=3, prefix_length=4)`."""
        unknown = set(changes) - set(FIELDS)
        if unknown:
            raise ValueError(f"unknown configuration fields: {', '.join(sorted(unknown))}")
        parts = {}
        for part in SECTIONS:
            section = getattr(self, part)
            own = {name: value for name, value in changes.items() if FIELDS[name] == part}
            parts[part] = dataclasses.replace(section, **own) if own else section
        return Config(**parts)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Config":
        """ValueError names what is no JSON, unknown, missing or out of range."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from None
        _same_keys(content, SECTIONS, "configuration")
        parts = {}
        for part, section in SECTIONS.items():
            hints = {spec.name: hint for spec, hint in fields_of(section)}
            added = {spec.name for spec, _ in fields_of(section) if spec.metadata["added"]}
            _same_keys(content[part], hints, part, added)
            parts[part] = section(**{name: _from_plain(value, hints[name]) for name, value in content[part].items()})
        return Config(**parts)

    def differences(self, other: "Config") -> list[str]:
        """The fields that change results and differ, each as "field: mine, not theirs"."""
        found = []
        for part, section in SECTIONS.items():
            for spec in dataclasses.fields(section):
                mine, theirs = (getattr(getattr(config, part), spec.name) for config in (self, other))
                if mine != theirs and spec.metadata["changes_results"]:
                    found.append(f"{spec.name}: {mine}, not {theirs}")
        return found


SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
FIELDS = {spec.name: part for part, section in SECTIONS.items() for spec in dataclasses.fields(section)}

_BACKBONE = {"model": "ViT-B-16-quickgelu", "pretrained": "openai", "image_size": (384, 128)}
_GENERAL = _BACKBONE | {"image_size": (224, 224)}
_PAPER: dict[str, Config] = {
    "cuhk-pedes": Config(ModelConfig(**_BACKBONE), DataConfig(dataset="cuhk-pedes")),
    "icfg-pedes": Config(ModelConfig(**_BACKBONE, prefix_length=14), DataConfig(dataset="icfg-pedes")),
    "rstpreid": Config(
        ModelConfig(**_BACKBONE, prefix_length=2, lora_rank=16),
        DataConfig(dataset="rstpreid"),
        TrainConfig(learning_rate=1e-4),
    ),
}
PRESETS: dict[str, Config] = {
    "embedded": Config(
        ModelConfig(prefix_length=4, lora_rank=8, adapter_reduction=4),
        DataConfig(workers=0, mask_captions=False, embedded_identities=(1200, 100, 200)),
        TrainConfig(epochs=8, batch_size=64, warmup_epochs=1, learning_rate=3e-3, adam_epsilon=1e-8),
    ),
    **_PAPER,
    # Where the released code differs from the paper: λ starts at 100, the reported epoch is the best on the test split.
    **{f"{name}-released": config.replace(prefix_scale=100.0, selection="best-on-test")
       for name, config in _PAPER.items()},
    "flickr30k": Config(ModelConfig(**_GENERAL), DataConfig(dataset="flickr30k")),
    "mscoco": Config(ModelConfig(**_GENERAL), DataConfig(dataset="mscoco")),
}  # fmt: skip


def _from_plain(value: Any, hint: Any) -> Any:
    """A JSON value as the field holds it: lists become tuples, strings paths."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in typing.get_args(hint):
        return Path(value)
    return value


def _same_keys(content: Any, expected: dict, where: str, optional: Container[str] = ()) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object with the keys {', '.join(expected)}")
    missing = [key for key in expected if key not in content and key not in optional]
    unknown = [key for key in content if key not in expected]
    if missing or unknown:
        raise ValueError(
            f"{where}: "
            + "; ".join(
                f"{kind} keys: {', '.join(map(str, keys))}"
                for kind, keys in (("missing", missing), ("unknown", unknown))
                if keys
            )
        )
