"""The README's Python examples run."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_kernels_alone(capsys):
    examples = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from kernels" in code]
    assert len(examples) == 1
    code = examples[0].replace("8, 193, 3", "1, 17, 3")  # the interpreter is slow
    exec(code, {})
    assert "torch.Size([1, 17, 3, 12, 64])" in capsys.readouterr().out


def test_named_files_exist():
    root = Path(__file__).parents[1]
    quoted = re.findall(r"`((?:kernels|upperson|bench|tests)/[\w/.-]+)`", README)
    linked = re.findall(r"\]\(([\w/.-]+)\)", README)
    assert quoted and linked
    for name in quoted + linked:
        assert (root / name).exists(), name
