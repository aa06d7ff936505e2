"""The wheel installs beside Hugging Face's package `kernels` in either order, and does all that the checkout does."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.network]

IMPORT_BOTH = """
import kernels, upperson, upperson_kernels
from kernels import get_kernel
from upperson_kernels import prefix_attention
from upperson import AdaptedCLIP
print(kernels.__file__, upperson.__file__, upperson_kernels.__file__, sep="\\n")
"""


def run(*command, **options):
    """The standard output of a command, which must succeed, without what finds or changes this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    unneeded = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests", "bench")
    shutil.copytree(ROOT, folder / "sources", ignore=unneeded)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, folder / "sources")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def python(tmp_path):
    """The interpreter of a new environment, which also finds the packages of this one, but not this project."""
    run(sys.executable, "-m", "venv", tmp_path / "environment")
    python = tmp_path / "environment" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A path in a .pth file is searched last, and its own .pth files, such as an editable install's, are not read.
    (Path(site) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.parametrize("order", [("kernels", "upperson"), ("upperson", "kernels")], ids=" then ".join)
def test_beside_the_package_kernels(wheel, python, tmp_path, order):
    for name in order:
        run(python, "-m", "pip", "install", "-q", "--no-deps", wheel if name == "upperson" else name)
    places = run(python, "-c", IMPORT_BOTH, cwd=tmp_path).split()
    assert [Path(place).parent.name for place in places] == ["kernels", "upperson", "upperson_kernels"]
    assert all(Path(place).is_relative_to(tmp_path / "environment") for place in places)


def test_the_command_and_the_kernels_alone(wheel, python, tmp_path):
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    command = python.with_name("upperson")
    version = run(command, "--version", cwd=tmp_path).strip()
    assert version == f"upperson {wheel.name.split('-')[1]}"
    run(
        command, "train", "--embedded-identities", "6", "2", "2", "--epochs", "1", "--run-dir", "run", cwd=tmp_path
    )  # fmt: skip
    assert "text → image" in run(command, "evaluate", "run/best.safetensors", cwd=tmp_path)
    blocked = "import sys; sys.modules.update(dict.fromkeys(['upperson', 'open_clip', 'torchvision', 'PIL', 'numpy']))"
    run(python, "-c", f"{blocked}; import upperson_kernels; print(upperson_kernels.__all__)", cwd=tmp_path)


def test_data_files_are_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for file in (
        "upperson/py.typed",
        "upperson_kernels/py.typed",
        "upperson/embedded/clip.json",
        "upperson/embedded/clip.safetensors",
        "upperson/tables/paper.csv",
        "upperson/search/page/static/script.js",
        "upperson/search/page/templates/page.html",
    ):
        assert file in names, file
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/"))]
