"""Rules that hold for every file of the repository."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ("mmfast", "adapters", "eval")
CODE = (*LIBRARY, "tests", "benchmarks", "examples", "docs")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cfg", ".html", ""}
LONGEST_FILE = 500

# The interpreter of triton can only be chosen by its own variable, and launchers such as torchrun tell a process its
# number in these two; the library reads no other.
ENVIRONMENT = {"TRITON_INTERPRET", "RANK", "LOCAL_RANK", "WORLD_SIZE"}


def python_files(folders: tuple[str, ...]) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def text_files() -> Iterator[Path]:
    top = [path for path in ROOT.iterdir() if path.is_file()]
    below = [path for folder in (*CODE, ".ci") for path in (ROOT / folder).rglob("*")]
    for path in (*top, *below):
        if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts:
            yield path


def prints(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "print"


def trusts_remote_code(node: ast.AST) -> bool:
    """``f(trust_remote_code=x)`` or ``{"trust_remote_code": x}``, unless x is a literal False."""
    if isinstance(node, ast.keyword):
        pairs = [(node.arg, node.value)]
    elif isinstance(node, ast.Dict):
        pairs = [
            (key.value, value)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant)
        ]
    else:
        return False
    return any(
        name == "trust_remote_code" and not (isinstance(value, ast.Constant) and value.value is False)
        for name, value in pairs
    )


def loads_pickles(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "torch" and any(alias.name == "load" for alias in node.names)
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"


def reads_environment(node: ast.AST) -> bool:
    """Any use of os.environ or os.getenv but one that names an allowed variable."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in ("environ", "getenv") for alias in node.names)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.getenv", "os.environ.get"):
        return not (isinstance(node.args[0], ast.Constant) and node.args[0].value in ENVIRONMENT)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
        return not (isinstance(node.slice, ast.Constant) and node.slice.value in ENVIRONMENT)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os.environ":
        return node.attr != "get"
    return False


def found(rule: Callable[[ast.AST], bool], source: str) -> list[int]:
    return [getattr(node, "lineno", 0) for node in ast.walk(ast.parse(source)) if rule(node)]


RULES: dict[str, tuple[Callable[[ast.AST], bool], tuple[str, ...], str]] = {
    # name: (rule, folders, prefix of paths that are free of it)
    "no print in the library": (prints, LIBRARY, "mmfast/cli/"),
    "no remote code": (trusts_remote_code, CODE, "-"),
    "no torch.load": (loads_pickles, CODE, "-"),
    "no environment variables": (reads_environment, LIBRARY, "-"),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_holds_everywhere(name: str) -> None:
    rule, folders, free = RULES[name]
    files = [path for path in python_files(folders) if not path.relative_to(ROOT).as_posix().startswith(free)]
    assert files
    wrong = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in found(rule, path.read_text())]
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("no print in the library", "def f():\n    print(1)"),
        ("no remote code", "load(x, trust_remote_code=True)"),
        ("no remote code", "load(x, trust_remote_code=flag)"),
        ("no remote code", "load(x, **{'trust_remote_code': True})"),
        ("no torch.load", "import torch\ntorch.load('x')"),
        ("no torch.load", "from torch import load"),
        ("no environment variables", "import os\nos.environ['KEEP']"),
        ("no environment variables", "import os\nos.environ.get('KEEP')"),
        ("no environment variables", "import os\nos.getenv('KEEP')"),
        ("no environment variables", "import os\nos.environ.setdefault('KEEP', '1')"),
        ("no environment variables", "from os import environ"),
    ],
)
def test_rule_sees_what_it_forbids(name: str, source: str) -> None:
    assert found(RULES[name][0], source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("no print in the library", "console.print(1)"),
        ("no remote code", "load(x, trust_remote_code=False)"),
        ("no torch.load", "safetensors.torch.load_file('x')"),
        ("no environment variables", "import os\nos.environ.get('TRITON_INTERPRET')"),
        ("no environment variables", "import os\nos.environ['TRITON_INTERPRET']"),
    ],
)
def test_rule_lets_the_rest_pass(name: str, source: str) -> None:
    assert found(RULES[name][0], source) == []


def test_no_path_of_somebodys_machine() -> None:
    # The brackets keep this line from matching itself.
    home = re.compile(r"/(?:[h]ome|[U]sers)/\w|(?<![\w.])/[r]oot/|[A-Z]:\\[U]sers")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if home.search(line)
    ]
    assert wrong == []


def test_no_file_is_too_long_to_read() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in python_files(CODE)}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
