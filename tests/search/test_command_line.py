"""The command line of the search: what is refused before anything is loaded."""

import pytest

from upperson.search.__main__ import main


@pytest.mark.parametrize("path", ["", " ", "\t"])
@pytest.mark.parametrize(
    "command",
    ["index PATH", "index --boxes PATH", "index photos --index PATH", "index photos --checkpoint PATH", "forget PATH"]
    + ["query man --index PATH", "query --image PATH", "query man --html PATH", "serve --checkpoint PATH"],
)
def test_an_empty_path_is_refused(command, path, capsys):
    """As of a variable of the shell that is not set; it would be the current folder."""
    with pytest.raises(SystemExit) as stop:
        main([path if word == "PATH" else word for word in command.split()])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("expected a path, found an empty text\n")
