"""What pyproject.toml declares is what the folders hold, and a wheel carries all of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import mmfast

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]


def library_files() -> dict[str, Path]:
    """Path inside a wheel -> file, for everything in the library's folders."""
    return {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}": path
        for package, folder in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


FILES = library_files()


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in FILES if name.endswith(".py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)


def test_every_package_has_an_init() -> None:
    missing = [name for name in SETUPTOOLS["packages"] if f"{name.replace('.', '/')}/__init__.py" not in FILES]
    assert missing == []


@pytest.mark.parametrize(
    ("package", "pattern"),
    [(package, pattern) for package, patterns in SETUPTOOLS["package-data"].items() for pattern in patterns],
)
def test_package_data_pattern_matches_a_file(package: str, pattern: str) -> None:
    assert any(path.is_file() for path in (ROOT / FOLDERS[package]).glob(pattern))


def test_every_data_file_is_matched_by_a_pattern() -> None:
    declared = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / FOLDERS[package]).glob(pattern)
        if path.is_file()
    }
    data = {path for path in FILES.values() if path.suffix != ".py"}
    assert sorted(data - declared) == []


def test_wheel_holds_every_file(tmp_path: Path) -> None:
    # Built from a copy: setuptools leaves build/ and *.egg-info in the tree it builds.
    tree, out = tmp_path / "tree", tmp_path / "out"
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == set(FILES)


def test_console_script_resolves() -> None:
    (script,) = entry_points(group="console_scripts", name="mmfast")
    assert script.value == PROJECT["project"]["scripts"]["mmfast"]
    assert callable(script.load())


def test_version_is_one() -> None:
    assert mmfast.__version__ == PROJECT["project"]["version"] == version("mmfast")
