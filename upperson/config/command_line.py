"""The flags of training. Every field of the configuration is a flag: `prefix_length` is `--prefix-length`."""

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from upperson.config.configuration import Config, TrainConfig
from upperson.config.files import CONFIG, read_changes, read_configuration
from upperson.config.presets import PRESETS, preset
from upperson.errors import Parser, path_argument
from upperson.fields import fields_of
from upperson.methods import METHODS

CHOOSERS = ("method", "resume")  # fields that decide which other flags exist


def parse_arguments(argv: Sequence[str] | None = None, parents: Sequence[argparse.ArgumentParser] = ()) -> Config:
    """The configuration of a command line; `argv=None` means the command line of this process.

    The preset, or the configuration of the run of `--resume RUN_DIR`, gives every value. The fields of `--config FILE`
    override these values, and single flags override both. Flags of `parents` (parsers with add_help=False) are accepted
    and shown in the help, but are not part of the configuration. Bad input ends the program with status 2 and one line,
    as in argparse.
    """
    chooser = _parser(add_help=False)
    _add_choosers(chooser)
    choice, _ = chooser.parse_known_args(argv)
    changes = {} if choice.config is None else _changes_of_file(choice, chooser)
    base = preset(choice.preset or "embedded", choice.method or changes.pop("method", None))
    resume: dict[str, Any] = {}
    if choice.resume is not None:
        resume = {"resume": True}
        if choice.resume:
            if choice.preset or choice.config:
                other = "--preset" if choice.preset else "--config"
                chooser.error(f"{other} and --resume RUN_DIR exclude each other: the run has its own configuration")
            base = _configuration_of_run(Path(choice.resume), chooser)
            if choice.method not in (None, base.model.method.name):
                chooser.error(
                    f"--method {choice.method}: the run in {choice.resume} was started with method "
                    f"{base.model.method.name}"
                )
            resume["run_dir"] = Path(choice.resume)

    source = "the run" if resume.get("run_dir") else f"preset {choice.preset or 'embedded'}"
    parser = _parser(
        description="Train a CLIP for text-based person retrieval. Without arguments, the embedded data set and the "
        f"embedded CLIP are used, without a network. The defaults shown are those of {source} with method "
        f"{base.model.method.name}; '--preset NAME --method NAME --help' shows the defaults of another one.",
        parents=parents,
    )
    _add_choosers(parser)
    titles = {"method": f"method {base.model.method.name}", "train": "training"}
    for name, section in base.sections().items():
        flags = parser.add_argument_group(titles.get(name, name))
        for spec, hint in fields_of(type(section)):
            if spec.name not in CHOOSERS:
                _add_flag(flags, spec, hint, getattr(section, spec.name))
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(unknown, base.model.method.name))
    given = {name: value for name, value in vars(parsed).items() if name in base.values() and name not in CHOOSERS}
    if resume.get("run_dir") and given.get("run_dir", resume["run_dir"]) != resume["run_dir"]:
        parser.error(f"--run-dir {given['run_dir']} is not the run of --resume {resume['run_dir']}")
    if resume and not (resume.get("run_dir") or given.get("run_dir")):
        parser.error("--resume: expected the folder of a run, --resume RUN_DIR")
    requested = changes | given
    try:
        config = base.replace(**requested | shorter_warmups(base, requested) | resume)
    except ValueError as error:
        parser.error(str(error))
    of_files = given if "dataset" in given else requested  # a flag may choose other data than the file
    for name in ("data_root", "image_cache"):
        if of_files.get(name) is not None and config.data.is_synthetic:
            option = f"--{name.replace('_', '-')}" if name in given else f"--config {choice.config}: {name}"
            parser.error(
                f"{option}: {config.data.dataset} is synthetic and has no files; choose a data set with --dataset or "
                "--preset"
            )
    unread = config.unread()
    for name, usual in base.values().items():
        if name in unread and (name in given or requested.get(name, usual) != usual):
            _say(f"{name}: has no effect here, since {unread[name]}")
    return config


def _say(line: str) -> None:
    """Prints to standard error; of the processes of torchrun, only the first one does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def shorter_warmups(base: Config, requested: dict[str, Any]) -> dict[str, int]:
    """Shortens each warm-up of `base` that is not below the requested epochs to a fifth of them, and prints a line."""
    changes = {}
    for warmup, usual in base.values().items():
        if not warmup.endswith("warmup_epochs") or warmup in requested:
            continue
        epochs = warmup.replace("warmup_", "")
        number = requested.get(epochs)
        if isinstance(number, int) and usual >= number >= 1:
            changes[warmup] = number // 5
            _say(f"{warmup}: {usual} is not below {epochs}, {number}; shortened to {number // 5}")
    return changes


def _changes_of_file(choice: argparse.Namespace, chooser: argparse.ArgumentParser) -> dict[str, Any]:
    """The fields of --config FILE, without the options of its method if --method names another method."""
    try:
        changes = read_changes(choice.config)
    except OSError as error:
        chooser.error(f"--config {choice.config}: cannot be read ({error.strerror})")
    except ValueError as error:
        chooser.error(f"--config {error}")
    if choice.method is not None and changes.pop("method", choice.method) != choice.method:
        own = {spec.name for spec in dataclasses.fields(METHODS[choice.method])}
        others = {spec.name for method in METHODS.values() for spec in dataclasses.fields(method)} - own
        changes = {name: value for name, value in changes.items() if name not in others}
    return changes


def _unknown(arguments: Sequence[str], method: str) -> str:
    """The error for unknown arguments. A flag of another method is the most likely mistake."""
    for argument in arguments:
        field = argument.split("=")[0].removeprefix("--").replace("-", "_")
        owners = [
            other.name
            for other in METHODS.values()
            if other.name != method
            and {field, field.removeprefix("no_")} & {spec.name for spec in dataclasses.fields(other)}
        ]
        if argument.startswith("--") and owners:
            return f"{argument.split('=')[0]}: an option of --method {' and '.join(owners)}, not of {method}"
    return f"unrecognized arguments: {' '.join(arguments)}"


def _parser(**settings: Any) -> argparse.ArgumentParser:
    return Parser(
        prog="upperson train",
        usage="upperson train (or: python train.py) [--preset NAME] [--config FILE] [--FLAG VALUE ...]",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        **settings,
    )


def _add_choosers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="the configuration of a data set; it sets all other values (default: embedded)",
    )
    parser.add_argument(
        "--method",
        choices=list(METHODS),
        help="the method, with its own options (below) and its recipe (default: the preset's method)",
    )
    parser.add_argument(
        "--config",
        type=path_argument,
        metavar="FILE",
        help="JSON or TOML file with some of the values, such as a run's config.json; flags override them",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_DIR",
        help=TrainConfig.__dataclass_fields__["resume"].metadata["help"],
    )


def _add_flag(group: argparse._ArgumentGroup, spec: dataclasses.Field, hint: Any, default: Any) -> None:
    shown = (
        " ".join(map(str, default))
        if isinstance(default, tuple)
        else str(default).lower()
        if default is None or isinstance(default, bool)
        else default
    )
    settings: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": f"{spec.metadata['help']} (default: {shown})".replace("%", "%%"),
    }
    if hint in (bool, bool | None):
        settings["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is Literal:
        settings["choices"] = typing.get_args(hint)
    elif typing.get_origin(hint) is tuple:
        settings |= {
            "nargs": len(spec.metadata["metavar"]),
            "type": int,
            "metavar": spec.metadata["metavar"],
            "action": _StoreTuple,
        }
    else:
        options = [kind for kind in typing.get_args(hint) or (hint,) if kind is not types.NoneType]
        settings |= {
            "type": _optional(options[0]) if typing.get_args(hint) else hint,
            "metavar": {int: "N", float: "X"}.get(options[0], options[0].__name__.upper()),
        }
    group.add_argument("--" + spec.name.replace("_", "-"), **settings)


class _StoreTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _optional(kind: type) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else path_argument(text) if kind is Path else kind(text)

    convert.__name__ = f"{kind.__name__} or none"
    return convert


def _configuration_of_run(run_dir: Path, parser: argparse.ArgumentParser) -> Config:
    path = run_dir / CONFIG
    try:
        return read_configuration(path)
    except OSError as error:
        parser.error(f"--resume {run_dir}: no run to resume, {path} cannot be read ({error.strerror})")
    except ValueError as error:
        parser.error(f"--resume {run_dir}: {error}")
