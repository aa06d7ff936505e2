"""The runs of each table: the paper's tables, and tables that compare and vary the methods."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from upperson.config import Config
from upperson.config.presets import PRESETS, with_method
from upperson.methods import BASELINES, DEFAULT, METHODS

NO_MODULES: dict[str, Any] = {"prefix": "none", "lora": "none", "adapter_attn": "none", "adapter_mlp": "none"}
L_ADAPTER = {"adapter_attn": "l-parallel", "adapter_mlp": "l-parallel"}
LAMBDA_OF_SINGLE = 150.0  # initial λ of a prefix without other modules
LARGE = "ViT-L-14-quickgelu"  # the paper's second backbone
COMPARED = {"I": "cuhk-pedes", "II": "icfg-pedes", "III": "rstpreid"}  # tables of published methods, a data set each
Configs = dict[str, Config]  # by the name of the row, or of the data set


@dataclass(frozen=True)
class Row:
    """One run of a table.

    `tested_on`: the data set of the test, if different from that of the training. `point`: title of the axis and label
    on this axis, for a run of a sweep.
    """

    name: str
    config: Config
    tested_on: Config | None = None
    point: tuple[str, str] | None = None


@dataclass(frozen=True)
class Table:
    """A table or figure. `both_directions` adds image → text to text → image."""

    title: str
    rows: tuple[Row, ...]
    both_directions: bool = False


@dataclass(frozen=True)
class Setting:
    """The data sets of the tables: UP-Person's configuration on each data set, of people and of other images."""

    people: Configs
    general: Configs

    def __getitem__(self, dataset: str) -> Config:
        return (self.people | self.general)[dataset]


def embedded_setting() -> Setting:
    """Small runs on the synthetic data sets: about a minute each on two cores."""
    small = PRESETS["embedded"].replace(embedded_identities=(300, 40, 200), epochs=5)
    scenes = small.replace(embedded_identities=(2400, 100, 400), image_size=(128, 128))
    return Setting(
        {name: small.replace(dataset=name) for name in ("embedded", "embedded-night")},
        {name: scenes.replace(dataset=name) for name in ("embedded-scenes", "embedded-scenes-night")},
    )


def real_setting(root: Path) -> Setting:
    """The presets of the real data sets, each with its own folder in `root`."""
    people, general = (
        {name: PRESETS[name].replace(data_root=root) for name in names}
        for names in (("cuhk-pedes", "icfg-pedes", "rstpreid"), ("flickr30k", "mscoco"))
    )
    return Setting(people, general)


# ------------------------------------------------------------------------------------ configurations


def trainings(config: Config) -> list[Config]:
    """The configurations of the stages, which are trained one after the other."""
    return [of_stage for _, of_stage in config.stages()]


def by_method(base: Config, methods: Iterable[str]) -> Configs:
    """The configurations of methods, each with its recipe, by the methods' titles."""
    configs = (with_method(base, method) for method in methods)
    return {config.model.method.title: config for config in configs}


def every_method(base: Config) -> Configs:
    """All methods, baselines first."""
    return by_method(base, dict.fromkeys((*BASELINES, *METHODS)))


def rows_of_costs(base: Config) -> Configs:
    """The rows of Table IV: the baselines, each kind of module without the others, and the methods."""
    kinds = {"S-Prefix": {"prefix": "salable"}, "LoRA": {"lora": "lora"}, "L-Adapter": L_ADAPTER}
    return (
        by_method(base, BASELINES)
        | {name: base.replace(**NO_MODULES | changes) for name, changes in kinds.items()}
        | every_method(base)
    )


# ------------------------------------------------------------------------------------ tables


def build_tables(setting: Setting, dataset: str) -> dict[str, Table]:
    """All tables of the paper but IV by number, and `methods`. Tables with a single data set use `dataset`.

    Tables I to III have the paper's own data sets, or `dataset` if the setting has others.
    """
    base = setting[dataset]

    def table(title: str, rows: dict[str, dict[str, Any]], before: Configs | None = None) -> Table:
        """A table of the configurations `before`, and of the base with the changes in `rows`."""
        configs = (before or {}) | {name: base.replace(**changes) for name, changes in rows.items()}
        return Table(f"{title}, {dataset}", tuple(Row(name, config) for name, config in configs.items()))

    return {
        **{number: backbones(setting, COMPARED[number], dataset) for number in COMPARED},
        "V": table(
            "The parts of UP-Person, alone and together",
            {
                "S-Prefix": NO_MODULES | {"prefix": "salable", "prefix_scale": LAMBDA_OF_SINGLE},
                "LoRA": NO_MODULES | {"lora": "lora"},
                "L-Adapter": NO_MODULES | L_ADAPTER,
                "S-Prefix + LoRA": {"adapter_attn": "none", "adapter_mlp": "none"},
                "S-Prefix + L-Adapter": {"lora": "none"},
                "LoRA + L-Adapter": {"prefix": "none"},
                "UP-Person": {},
            },
            before=by_method(base, BASELINES),
        ),
        "VI": table(
            "UP-Person with other low-rank updates", {name: {"lora": name.lower()} for name in ("LoRA", "DoRA", "WoRA")}
        ),
        "VII": table(
            "Vanilla prefix against S-Prefix with λ from several starts, alone and within UP-Person",
            {"vanilla prefix": NO_MODULES | {"prefix": "vanilla"}}
            | {
                f"S-Prefix, λ = {scale:g}": NO_MODULES | {"prefix": "salable", "prefix_scale": scale}
                for scale in (10.0, 50.0, 100.0, LAMBDA_OF_SINGLE, 300.0, 500.0)
            }
            | {"UP-Person, vanilla prefix": {"prefix": "vanilla"}}
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
        "XI": Table(
            "Trained on one data set of people, tested on another", tuple(crossings(setting.people, setting.people))
        ),
        "XII": Table(
            "Retrieval of other images",
            tuple(
                Row(f"{name}, {dataset}", config)
                for dataset, base in setting.general.items()
                for name, config in by_method(base, (*BASELINES, DEFAULT)).items()
            ),
            both_directions=True,
        ),
        "XIII": Table(
            "Trained on other images, tested on people",
            tuple(crossings(dict([next(iter(setting.general.items()))]), setting.people)),
        ),
        "figure5": table("Accuracy by trained parameters", {}, before=every_method(base)),
        "figure6": Table(f"LoRA's rank, prefix length and adapter reduction, {dataset}", tuple(swept(base))),
        "figure7": table("What captions find", {"UP-Person": {}}),
        "methods": table("Every method with its recipe", {}, before=every_method(base)),
    }  # fmt: skip


def backbones(setting: Setting, home: str, dataset: str) -> Table:
    """UP-Person with both backbones of the paper on `home`; without this data set, as it is on `dataset`."""
    here = home if home in setting.people else dataset
    base = setting[here]
    rows = (Row("UP-Person", base),)
    if here == home:
        rows = (
            Row("UP-Person, ViT-B/16", base),
            Row("UP-Person, ViT-L/14", base.replace(model=LARGE)),
        )
    return Table(f"UP-Person among the published methods, {here}", rows)


def sweep_table(setting: Setting, dataset: str, method: str) -> Table:
    """The table of all sweeps of a method."""
    base = with_method(setting[dataset], method)
    return Table(f"{base.model.method.title} with other options, {dataset}", tuple(swept(base)))


def swept(base: Config) -> Iterator[Row]:
    method = base.model.method
    for axis, points in method.sweeps(base.data.is_synthetic).items():
        for label, changes in points.items():
            yield Row(f"{axis} {label}", base.replace(**changes), point=(axis, label))


def crossings(sources: Configs, targets: Configs) -> Iterator[Row]:
    """The paper's methods from each source to each other target, and zero-shot CLIP once for each target."""
    for method in (*BASELINES, DEFAULT):
        configs = {name: with_method(config, method) for name, config in (sources | targets).items()}
        title = METHODS[method]().title
        if not METHODS[method]().trains:
            yield from (Row(f"{title}, → {target}", configs[target]) for target in targets)
            continue
        for source, target in product(sources, targets):
            if source != target:
                yield Row(f"{title}, {source} → {target}", configs[source], targets[target])
