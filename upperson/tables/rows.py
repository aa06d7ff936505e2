"""Which runs each table of the paper is made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from upperson.config import PRESETS, Config

NO_MODULES: dict[str, Any] = {"prefix": "none", "lora": "none", "adapter_attn": "none", "adapter_mlp": "none"}
L_ADAPTER = {"adapter_attn": "l-parallel", "adapter_mlp": "l-parallel"}
LAMBDA_ALONE = 150.0  # where λ of a prefix without other modules starts
FULL_LEARNING_RATE = 1e-5  # of full fine-tuning on real data, as IRRA's


@dataclass(frozen=True)
class Row:
    """One run of a table, and what it is tested on where that is not the data set it was trained on."""

    name: str
    config: Config
    tested_on: Config | None = None


@dataclass(frozen=True)
class Table:
    """A table or figure; `both_directions` adds image → text to text → image."""

    title: str
    rows: tuple[Row, ...]
    both_directions: bool = False


@dataclass(frozen=True)
class Setting:
    """Where the tables are run: the configuration of UP-Person on each data set, of people and of everything else."""

    people: dict[str, Config]
    general: dict[str, Config]
    full: dict[str, Any]  # what full fine-tuning changes
    sweeps: dict[str, tuple[int, ...]]  # Figure 6

    def __getitem__(self, dataset: str) -> Config:
        return (self.people | self.general)[dataset]


def embedded_setting() -> Setting:
    """Small runs on the drawn data sets: about a minute each on two cores."""
    small = PRESETS["embedded"].replace(embedded_identities=(300, 40, 200), epochs=5)
    scenes = small.replace(embedded_identities=(2400, 100, 400), image_size=(128, 128))
    return Setting(
        {name: small.replace(dataset=name) for name in ("embedded", "embedded-night")},
        {name: scenes.replace(dataset=name) for name in ("embedded-scenes", "embedded-scenes-night")},
        {"method": "full", "learning_rate": 3e-4},
        {"lora_rank": (2, 4, 8, 16), "prefix_length": (1, 2, 4, 8), "adapter_reduction": (2, 4, 8, 16)},
    )


def real_setting(root: Path) -> Setting:
    """The presets; every data set is in a folder of its own below `root`."""
    people, general = (
        {name: PRESETS[name].replace(data_root=root) for name in names}
        for names in (("cuhk-pedes", "icfg-pedes", "rstpreid"), ("flickr30k", "mscoco"))
    )
    return Setting(
        people,
        general,
        {"method": "full", "learning_rate": FULL_LEARNING_RATE},
        {"lora_rank": (8, 16, 32, 64), "prefix_length": (2, 6, 10, 14, 18), "adapter_reduction": (4, 8, 16, 32)},
    )


def build_tables(setting: Setting, dataset: str) -> dict[str, Table]:
    """All tables but IV, by number. Those of one data set are of `dataset`, one of the setting's."""
    base = setting[dataset]

    def table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
        return Table(f"{title}, {dataset}", tuple(Row(name, base.replace(**changes)) for name, changes in rows.items()))

    return {
        "V": table(
            "The parts of UP-Person, alone and together",
            {
                "zero-shot CLIP": {"method": "zero-shot"},
                "full fine-tuning": setting.full,
                "S-Prefix": NO_MODULES | {"prefix": "salable", "prefix_scale": LAMBDA_ALONE},
                "LoRA": NO_MODULES | {"lora": "lora"},
                "L-Adapter": NO_MODULES | L_ADAPTER,
                "S-Prefix + LoRA": {"adapter_attn": "none", "adapter_mlp": "none"},
                "S-Prefix + L-Adapter": {"lora": "none"},
                "LoRA + L-Adapter": {"prefix": "none"},
                "UP-Person": {},
            },
        ),
        "VI": table(
            "UP-Person with other low-rank updates", {name: {"lora": name.lower()} for name in ("LoRA", "DoRA", "WoRA")}
        ),
        "VII": table(
            "Vanilla prefix against S-Prefix with λ from several starts, alone and within UP-Person",
            {"vanilla prefix": NO_MODULES | {"prefix": "vanilla"}}
            | {
                f"S-Prefix, λ = {scale:g}": NO_MODULES | {"prefix": "salable", "prefix_scale": scale}
                for scale in (10.0, 50.0, 100.0, LAMBDA_ALONE, 300.0, 500.0)
            }
            | {f"UP-Person, λ = {scale:g}": {"prefix_scale": scale} for scale in (10.0, 30.0, 50.0)},
        ),
        "VIII": table(
            "UP-Person with other adapters",
            {
                name: {"adapter_attn": kind, "adapter_mlp": kind}
                for name, kind in (
                    ("LN-tuning", "ln-tuning"),
                    ("sequential adapter", "sequential"),
                    ("sequential L-Adapter", "l-sequential"),
                    ("parallel adapter", "parallel"),
                    ("parallel L-Adapter", "l-parallel"),
                )
            },
        ),
        "IX": table(
            "UP-Person with an L-Adapter or a plain parallel adapter at the attention, at the MLP",
            {
                f"{names[at_attention]}, {names[at_mlp]}": {"adapter_attn": at_attention, "adapter_mlp": at_mlp}
                for names in ({"parallel": "adapter", "l-parallel": "L-Adapter"},)
                for at_attention in names
                for at_mlp in names
            },
        ),
        "X": table(
            "UP-Person with other losses",
            {losses.upper().replace("+", " + "): {"losses": losses}
             for losses in ("sdm", "itc", "sdm+itc", "sdm+id", "sdm+id+mlm")},
        ),
        "XI": Table("Trained on one data set of people, tested on another", tuple(crossings(setting, setting.people))),
        "XII": Table(
            "Retrieval of other images",
            tuple(
                Row(f"{name}, {dataset}", config.replace(**changes))
                for dataset, config in setting.general.items()
                for name, changes in methods(setting)
            ),
            both_directions=True,
        ),
        "XIII": Table(
            "Trained on one data set of other images, tested on another",
            tuple(crossings(setting, setting.general)),
            both_directions=True,
        ),
        "figure6": table(
            "LoRA's rank, prefix length and adapter reduction",
            {f"{field} {value}": {field: value} for field, values in setting.sweeps.items() for value in values},
        ),
        "figure7": table("What captions find", {"UP-Person": {}}),
    }  # fmt: skip


def methods(setting: Setting) -> tuple[tuple[str, dict[str, Any]], ...]:
    return ("zero-shot CLIP", {"method": "zero-shot"}), ("full fine-tuning", setting.full), ("UP-Person", {})


def crossings(setting: Setting, datasets: dict[str, Config]) -> Iterator[Row]:
    """Each method on each ordered pair of data sets; zero-shot, which is not trained, once a test set."""
    for name, changes in methods(setting):
        if name == "zero-shot CLIP":
            yield from (Row(f"{name}, → {target}", datasets[target].replace(**changes)) for target in datasets)
            continue
        for source, target in permutations(datasets, 2):
            yield Row(f"{name}, {source} → {target}", datasets[source].replace(**changes), datasets[target])
