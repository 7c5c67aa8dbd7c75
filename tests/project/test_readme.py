"""The code in the pages runs as printed, and their generated parts are up to date.

Each ``python`` and ``console`` block carries a mark on the line before it: ``<!-- runnable -->``, or
``<!-- not run: reason -->``. Figures are not compared, success is.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
)
BLOCK = re.compile(r"(?:^ *<!-- ([^\n]*) -->\n)?^ *```(python|console)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SECONDS = 60


class Block(NamedTuple):
    page: str
    line: int
    mark: str
    language: str
    code: str


def blocks(page: str, text: str) -> list[Block]:
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, mark or "", language, textwrap.dedent(code))
        for found in BLOCK.finditer(text)
        for mark, language, code in [found.groups()]
    ]


def commands(code: str) -> list[str]:
    """The commands of a console block: lines after ``$ ``, joined over trailing backslashes."""
    joined = code.replace("\\\n", " ")
    return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


def ids(block: Block) -> str:
    return f"{block.page}:{block.line}"


README = (ROOT / "README.md").read_text()
BLOCKS = [block for page in PAGES for block in blocks(page, (ROOT / page).read_text())]
RUNNABLE = [block for block in BLOCKS if block.mark == "runnable"]


def run(arguments: list[str], folder: Path) -> str:
    # The console script lies beside the interpreter, whether or not the environment is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def test_every_block_says_whether_it_runs() -> None:
    assert {block.language for block in RUNNABLE if block.page == "README.md"} == {"python", "console"}
    unmarked = [
        ids(block) for block in BLOCKS if block.mark != "runnable" and not re.fullmatch(r"not run: .+", block.mark)
    ]
    assert unmarked == []


@pytest.mark.parametrize("block", [b for b in RUNNABLE if b.language == "python"], ids=ids)
def test_python_runs(block: Block, tmp_path: Path) -> None:
    run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block.code], tmp_path)


@pytest.mark.parametrize("block", [b for b in RUNNABLE if b.language == "console"], ids=ids)
def test_commands_run_and_print(block: Block, tmp_path: Path) -> None:
    assert commands(block.code)
    for command in commands(block.code):
        assert run(["bash", "-euo", "pipefail", "-c", command], tmp_path)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=ids)
def test_python_is_python(block: Block) -> None:
    compile(block.code, ids(block), "exec")


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


sys.path.append(str(ROOT / "docs"))
GENERATED = runpy.run_path(str(ROOT / "docs" / "update_tables.py"))


@pytest.mark.parametrize("page", GENERATED["GENERATED"])
def test_generated_parts_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in GENERATED["GENERATED"][page]:
        assert text.count(f"<!-- {name}:begin -->") == text.count(f"<!-- {name}:end -->") == 1
    assert GENERATED["updated"](page) == text, "run `make tables`"


def test_block_reader_on_a_small_page() -> None:
    page = textwrap.dedent(
        r"""
        <!-- runnable -->
        ```console
        $ one \
          two
        output
        $ three
        ```

        ```sh
        no
        ```
        1. item

           ```python
           x
           ```
        """
    )
    first, second = blocks("page", page)
    assert (first.line, first.mark, first.language) == (2, "runnable", "console")
    assert commands(first.code) == ["one    two", "three"]
    assert (second.mark, second.language, second.code) == ("", "python", "x\n")
