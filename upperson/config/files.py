"""Configurations in files: the config.json of a run, and a user's own JSON or TOML file."""

import sys
from pathlib import Path
from typing import Any

from upperson.config.configuration import Config, fields_in
from upperson.files import parse_json, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG = "config.json"  # in a run folder


def read_configuration(path: Path) -> Config:
    """The whole configuration of a run. Raises OSError, and ValueError with the file and the problem."""
    try:
        return Config.from_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_changes(path: Path) -> dict[str, Any]:
    """The fields of a JSON or TOML file by name. The file has some or all fields of a config.json, in its sections.

    The value of "method" is the method's name. Raises OSError, and ValueError with the file and the problem.
    """
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"{path}: expected a file whose name ends in .json or .toml")
    try:
        text = read_text(path)
        content = tomllib.loads(text) if path.suffix == ".toml" else parse_json(text)
        return fields_in(content)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: the TOML is nested too deeply") from error
