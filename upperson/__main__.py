"""The command `upperson`, with one subcommand for each task."""

import importlib
import sys
from collections.abc import Sequence
from reprlib import repr as short

from upperson.errors import exit_status

COMMANDS = {
    "train": ("upperson.train.__main__", "train, select and test a method; the same as python train.py"),
    "evaluate": ("upperson.evaluate.__main__", "evaluate a checkpoint on any data set, in both directions"),
    "search": ("upperson.search.__main__", "find a person in your own images: index, query, serve, forget"),
    "merge": ("upperson.deploy.merge", "fold a checkpoint into the weights of a plain CLIP"),
    "export": ("upperson.deploy.export", "write both towers as ONNX, for programs without PyTorch"),
    "import": (
        "upperson.deploy.importing",
        "make a checkpoint from one of a method's released code, or from a CLIP",
    ),
    "tables": ("upperson.tables.__main__", "train and print the tables of the paper"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of the command that the first argument names, or 2 for an unknown command."""
    return exit_status(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else "--help"
    if first in COMMANDS:
        return importlib.import_module(COMMANDS[first][0]).main(arguments[1:])
    if first == "--version":
        import upperson

        print(f"upperson {upperson.__version__}")
        return 0
    if first in ("-h", "--help"):
        print(usage())
        return 0
    print(f"upperson: error: unknown command {short(first)}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def usage() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: upperson COMMAND ...", "", *lines, "", "upperson COMMAND --help shows its options; upperson --version"]
    )


if __name__ == "__main__":
    sys.exit(main())
