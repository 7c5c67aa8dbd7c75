"""Who may import whom: every import in the library is read from the source and held against one table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"mmfast": "mmfast", "mmfast.adapters": "adapters", "mmfast.eval": "eval"}

# Room -> the modules in it (with everything below them). A new top-level module needs a room here.
ROOMS = {
    "public": ("mmfast",),
    "core": ("mmfast.budget", "mmfast.decoding", "mmfast.registry", "mmfast.report", "mmfast.tokens"),
    "media": ("mmfast.media",),
    "kernels": ("mmfast.kernels",),
    "token_pruning": ("mmfast.token_pruning",),
    "kv": ("mmfast.kv",),
    "speculative": ("mmfast.speculative",),
    "plan": ("mmfast.plan",),
    "accelerate": (
        "mmfast.accelerated",
        "mmfast.compare",
        "mmfast.draw",
        "mmfast.measure",
        "mmfast.shared",
        "mmfast.stream",
    ),
    "calibration": ("mmfast.calibration",),
    "zoo": ("mmfast.zoo",),
    "training": ("mmfast.training",),
    "bench": ("mmfast.bench",),
    # What people see: the command line and the page in a browser.
    "cli": ("mmfast.cli", "mmfast.ui", "mmfast.__main__"),
    "page": ("mmfast.page",),
    "adapters": ("mmfast.adapters",),
    "eval": ("mmfast.eval", "mmfast.eval.datasets.shapes.task"),
    "world": ("mmfast.eval.datasets.shapes",),
}

# Room -> rooms it may import. "public" is the names in mmfast.__all__, and mmfast itself.
ALLOWED: dict[str, set[str]] = {
    "public": {"core", "plan", "accelerate", "calibration", "zoo"},
    "core": set(),
    "media": {"core"},
    "kernels": {"core"},
    "token_pruning": {"core", "kernels"},
    # Both read attention through the same view, and share the base of all methods.
    "kv": {"core", "kernels", "token_pruning"},
    # A drafter is a method like all others.
    "speculative": {"core", "kernels", "token_pruning"},
    "plan": {"core", "token_pruning", "kv", "speculative"},
    "accelerate": {"core", "plan", "token_pruning", "kv", "zoo"},
    "calibration": {"core", "token_pruning", "plan", "accelerate"},
    "zoo": {"core"},
    # The rendered world is what the embedded model, and heads for it, are trained on.
    "training": {"public", "media", "token_pruning", "speculative", "world"},
    "eval": {"public", "media", "world", "page"},
    "world": {"core"},
    "bench": {"public", "core", "kernels", "accelerate"},
    "adapters": {"core", "kernels", "token_pruning", "kv", "speculative", "plan"},
    "cli": {"public", "core", "plan", "accelerate", "media", "zoo", "eval", "world", "training", "bench", "page"},
    "page": set(),
}

# (room, room) -> the only names that pass. Written as `from mmfast.adapters import for_model`.
DOORS = {
    # A stream reads the next clips while the model works on the last.
    ("accelerate", "media"): {"prefetched"},
    ("accelerate", "adapters"): {"for_model"},
    ("zoo", "adapters"): {"load_clip", "load_pretrained"},
    # One name for the embedded model, in recipes and in results.
    ("training", "zoo"): {"EMBEDDED", "is_embedded"},
    ("eval", "zoo"): {"EMBEDDED", "embedded_name", "is_embedded"},
    ("training", "adapters"): {"add_compression_tokens", "load_pretrained", "prepare"},
    ("bench", "adapters"): {"attention_backends", "random_model", "random_model_budgets"},
    # The loop prepares and times as every other measurement does; lmms-eval names models by their id.
    ("eval", "accelerate"): {"timed_generate"},
    ("eval", "adapters"): {"load_pretrained", "prepare"},
    ("cli", "kernels"): {"available"},
    ("cli", "adapters"): {"attention_backends", "families", "importable", "load_pretrained", "prepare"},
}

# Package -> the rooms it may be seen in.
HOMES = {
    "transformers": {"adapters"},
    "huggingface_hub": {"adapters"},
    "open_clip": {"adapters"},
    "triton": {"kernels"},
    "av": {"media"},
    "decord": {"media"},
    "torchcodec": {"media"},
    "rich": {"cli"},
    "ray": {"eval"},
    "lmms_eval": {"eval"},
    "gradio": {"cli"},
}


class Import(NamedTuple):
    line: int
    module: str
    name: str | None  # None: the module itself


def source_files() -> dict[str, Path]:
    """Dotted name -> file, for the three folders of the library."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = source_files()


def public_names() -> set[str]:
    tree = ast.parse(MODULES["mmfast"].read_text())
    lists = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    return set(ast.literal_eval(lists[0]))


PUBLIC = public_names()


def split(dotted: str) -> tuple[str, str | None]:
    """The longest module in a dotted name, and the name taken from it."""
    parts = dotted.split(".")
    if parts[0] == "mmfast" and len(parts) > 1 and parts[1] in PUBLIC:
        return "mmfast", parts[1]
    known = {*MODULES, *(module for modules in ROOMS.values() for module in modules)}
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in known:
            return ".".join(parts[:end]), parts[end] if end < len(parts) else None
    return dotted, None


def imports(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import in the source: statements at any depth, literal import_module(), and mmfast.x.y chains."""
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    bound_to_mmfast: set[str] = set()
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, None)
                if alias.name == "mmfast":
                    bound_to_mmfast.add(alias.asname or "mmfast")
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            start = above[: len(above) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, *split(f"{base}.{alias.name}"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield Import(node.lineno, str(node.args[0].value), None)
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            # ast.walk meets the outermost link of a chain first.
            inner.update(id(link) for link in ast.walk(node.value) if isinstance(link, ast.Attribute))
            head, _, rest = ast.unparse(node).partition(".")
            if head in bound_to_mmfast:
                yield Import(node.lineno, *split(f"mmfast.{rest}"))


def room_of(module: str) -> str | None:
    """The room of a module: the longest prefix wins, and the package itself is not a prefix of its rooms."""
    rooms = {prefix: room for room, prefixes in ROOMS.items() for prefix in prefixes}
    if module in rooms:
        return rooms[module]
    parts = module.split(".")
    return next((rooms[p] for n in range(len(parts), 1, -1) if (p := ".".join(parts[:n])) in rooms), None)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, one line each."""
    here = room_of(module)
    if here is None:
        return [f"{module} is in no room: give it one in ROOMS"]
    wrong = []
    for line, target, name in imports(source, module, is_package=is_package):
        top = target.split(".")[0]
        what = f"{module}:{line} imports {target}{'.' + name if name else ''}"
        if top in ("adapters", "eval"):
            wrong.append(f"{what}: write mmfast.{target}")
        elif top != "mmfast":
            if here not in HOMES.get(top, {here}):
                wrong.append(f"{what}: {top} belongs to {', '.join(sorted(HOMES[top]))}")
        else:
            there = room_of(target)
            if there is None:
                wrong.append(f"{what}: no such module, or one in no room")
            elif there != here and there not in ALLOWED[here]:
                door = DOORS.get((here, there), set())
                if target not in ROOMS[there] or name not in door:
                    may = f"only {', '.join(sorted(door))}" if door else "nothing"
                    wrong.append(f"{what}: {here} may take {may} from {there}")
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module: str) -> None:
    path = MODULES[module]
    assert violations(path.read_text(), module, is_package=path.name == "__init__.py") == []


def test_table_has_no_cycle() -> None:
    graph = {room: set(others) for room, others in ALLOWED.items()}
    for here, there in DOORS:
        graph[here].add(there)
    assert len(list(TopologicalSorter(graph).static_order())) == len(ROOMS)


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_nobody_imports_the_bare_folders(folder: str) -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{found.line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for found in imports(path.read_text(), "outside", is_package=False)
        if found.module.split(".")[0] in ("adapters", "eval")
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmfast.plan", "import transformers"),
        ("mmfast.cli.run", "from transformers import AutoProcessor"),
        ("mmfast.eval.runner", "def f():\n    import transformers.models"),
        ("mmfast.tokens", "from mmfast.plan import Plan"),
        ("mmfast.tokens", "from .plan import Plan"),
        ("mmfast.tokens", "if True:\n    from mmfast import Plan"),
        ("mmfast.kernels", "from mmfast.kv.base import Press"),
        ("mmfast.token_pruning.base", "import mmfast.adapters"),
        ("mmfast.accelerated", "from mmfast.adapters.base import Adapter"),
        ("mmfast.accelerated", "from mmfast.adapters import for_model, load_pretrained"),
        ("mmfast.accelerated", "from importlib import import_module\nimport_module('mmfast.adapters')"),
        ("mmfast.zoo", "from mmfast.adapters import for_model"),
        ("mmfast.eval.runner", "import mmfast\nmmfast.adapters.for_model(1)"),
        ("mmfast.eval.runner", "import mmfast as m\nm.registry.get('fastv')"),
        ("mmfast.eval.runner", "from mmfast.tokens import Keep"),
        ("mmfast.training.gates", "from mmfast.eval import runner"),
        ("mmfast.adapters.llava", "from mmfast import accelerate"),
        ("mmfast.adapters.llava", "from adapters.base import Adapter"),
        ("mmfast.cli.eval", "import eval"),
        ("mmfast.somewhere", "import torch"),
    ],
)
def test_forbidden_arrows_are_seen(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "mmfast.adapters.llava",
            "import transformers\nfrom .base import Adapter\nfrom mmfast.tokens import Keep",
        ),
        ("mmfast.accelerated", "def f():\n    from mmfast.adapters import for_model"),
        ("mmfast.zoo", "from mmfast.adapters import load_pretrained"),
        ("mmfast.cli.run", "import rich\nfrom mmfast.adapters import load_pretrained"),
        ("mmfast.eval.runner", "import mmfast\nmmfast.accelerate(1, 2)\nfrom mmfast.media import read"),
        ("mmfast.eval.runner", "import mmfast\nx = 1\nx.mmfast.registry"),
        ("mmfast.token_pruning.before_llm.divprune", "from ..base import Selector\nimport torch"),
    ],
)
def test_allowed_arrows_pass(module: str, source: str) -> None:
    assert violations(source, module) == []
