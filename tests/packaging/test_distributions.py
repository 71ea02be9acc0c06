"""The sdist and the wheel hold the whole package, and an installed wheel works without the source tree."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
IGNORE = shutil.ignore_patterns("__pycache__", "*.egg-info")


def sources():
    """Path inside the wheel -> path in the source tree, of every file that has to be installed."""
    found = {f"sphkv_compile/{p.relative_to(ROOT / 'sphkv_compile')}": p for p in (ROOT / "sphkv_compile").rglob("*")}
    found |= {f"sphkv_compile/patterns/{p.relative_to(ROOT / 'patterns')}": p for p in (ROOT / "patterns").rglob("*")}
    return {name: path for name, path in found.items() if path.is_file() and "__pycache__" not in path.parts}


def modules():
    """Dotted name of every module."""
    return sorted(n[:-3].replace("/", ".").removesuffix(".__init__") for n in sources() if n.endswith(".py"))


def run(command, cwd=None):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder with the sdist of a copy of the tree, and the wheel that was built from that sdist."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("sphkv_compile", "patterns"):
        shutil.copytree(ROOT / name, tree / name, ignore=IGNORE)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree])
    return out


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """What pip installs from the wheel."""
    target = tmp_path_factory.mktemp("site")
    (wheel,) = dist.glob("*.whl")
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel])
    return target


def test_wheel_holds_every_file(dist):
    """Fails when a new subpackage is missing from pyproject.toml, or a file from package-data."""
    (wheel,) = dist.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == set(sources())


def test_sdist_holds_what_the_wheel_is_built_from(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in sources().values()} <= inside
    assert {"pyproject.toml", "README.md", "LICENSE"} <= inside


def test_wheel_carries_licence_and_entry_points(dist):
    (wheel,) = dist.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (licence,) = (n for n in archive.namelist() if n.endswith(".dist-info/licenses/LICENSE"))
    assert "Apache License" in archive.read(licence).decode() and "END OF TERMS" in archive.read(licence).decode()
    (points,) = (n for n in archive.namelist() if n.endswith("/entry_points.txt"))
    text = archive.read(points).decode()
    assert "[torch_dynamo_backends]\nsphkv = sphkv_compile.backend:backend" in text
    assert "[console_scripts]\nsphkv = sphkv_compile.cli:main" in text


def test_installed_package_imports_without_the_source_tree(installed, tmp_path):
    """Every module, patterns under their installed name too, in a process that cannot see the checkout."""
    code = (
        "import importlib, sys\n"
        "site, *names = sys.argv[1:]\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
        "sys.path.insert(0, site)\n"
        "for name in names:\n"
        "    assert importlib.import_module(name).__file__.startswith(site), name\n"
    )
    run([sys.executable, "-c", code, installed, *modules()], cwd=tmp_path)


def test_only_integrations_need_the_extras():
    """No other module may import what a plain install does not bring: neither transformers nor a test library."""
    code = (
        "import importlib, sys\n"
        "extras = ['transformers', 'gguf', 'accelerate', 'matplotlib', 'hypothesis', 'pytest', 'expecttest']\n"
        "sys.modules.update(dict.fromkeys(extras))  # None there makes an import fail\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
    )
    run([sys.executable, "-c", code, *(name for name in modules() if ".integrations" not in name)], cwd=ROOT)


def test_torch_finds_the_backend_by_its_entry_point():
    """Of the environment that runs the tests; one registration, since Dynamo refuses a second."""
    names = [point.name for point in entry_points(group="torch_dynamo_backends")]
    assert names.count("sphkv") == 1
    assert "sphkv" in torch._dynamo.list_backends(exclude_tags=())


def test_constraints_pin_every_requirement():
    """Each requirement that pyproject.toml names, extras included, has one exact version in constraints.txt."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\d[\w.]*)$", (ROOT / "constraints.txt").read_text(), re.M))
    lists = re.findall(
        r"^(?:dependencies|models|plot|test|dev) = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M
    )
    needed = {re.match(r"[\w.-]+", requirement)[0] for text in lists for requirement in ast.literal_eval(text)}
    assert len(lists) == 5 and {plain(name) for name in needed} <= {plain(name) for name in pinned}


def plain(name):
    """A distribution's name as PyPI compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
