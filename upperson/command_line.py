"""The command line of train.py: every field of the configuration is a flag (`prefix_length` is `--prefix-length`)."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from upperson.config import FIELDS, PRESETS, SECTIONS, Config, TrainConfig
from upperson.options import fields_of


def parse_arguments(argv: Sequence[str] | None = None, parents: Sequence[argparse.ArgumentParser] = ()) -> Config:
    """The configuration of a command line (None: of this process).

    The preset, or the configuration of the run named by `--resume RUN_DIR`, gives every value; single flags
    override it. Flags of `parents` (parsers with add_help=False) are accepted and stand in the help, but are no
    part of the configuration. Bad input ends the program with status 2 and one line, as argparse does.
    """
    chooser = _parser(add_help=False)
    _add_choosers(chooser)
    choice, _ = chooser.parse_known_args(argv)
    base, resume = PRESETS[choice.preset or "embedded"], {}
    if choice.resume is not None:
        resume = {"resume": True}
        if choice.resume:
            if choice.preset:
                chooser.error("--preset and --resume RUN_DIR exclude each other: the run has its own configuration")
            base = _configuration_of_run(Path(choice.resume), chooser)
            resume["run_dir"] = Path(choice.resume)

    parser = _parser(
        description="Train UP-Person for text-based person retrieval. Without arguments: the embedded data set and "
        "the embedded CLIP, no network needed. The defaults shown are those of "
        f"{'the run' if resume.get('run_dir') else 'preset ' + (choice.preset or 'embedded')}; "
        "'--preset NAME --help' shows another's.",
        parents=parents,
    )
    _add_choosers(parser)
    for part, section in SECTIONS.items():
        group = parser.add_argument_group({"train": "training"}.get(part, part))
        for spec, hint in fields_of(section):
            if spec.name != "resume":
                _add_flag(group, spec, hint, getattr(getattr(base, part), spec.name))
    given = {
        name: value for name, value in vars(parser.parse_args(argv)).items() if name in FIELDS and name != "resume"
    }
    if resume.get("run_dir") and given.get("run_dir", resume["run_dir"]) != resume["run_dir"]:
        parser.error(f"--run-dir {given['run_dir']} is not the run of --resume {resume['run_dir']}")
    if resume and not (resume.get("run_dir") or given.get("run_dir")):
        parser.error("--resume: name the run, --resume RUN_DIR")
    try:
        config = base.replace(**given | resume)
    except ValueError as error:
        parser.error(str(error))
    if given.get("data_root") is not None and config.data.is_drawn:
        parser.error(f"--data-root: {config.data.dataset} is drawn, not read; name a data set by --dataset or --preset")
    return config


def _parser(**settings: Any) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="train.py",
        usage="python train.py [--preset NAME] [--FLAG VALUE ...]",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        **settings,
    )


def _add_choosers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), help="where all other values come from (default: embedded)")
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
    if hint is bool:
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
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _optional(kind: type) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = f"{kind.__name__} or none"
    return convert


def _configuration_of_run(run_dir: Path, parser: argparse.ArgumentParser) -> Config:
    path = run_dir / "config.json"
    try:
        return Config.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"--resume {run_dir}: there is no run to continue, {path} cannot be read ({error.strerror})")
    except ValueError as error:
        parser.error(f"--resume {run_dir}: {path}: {error}")
