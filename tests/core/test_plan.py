"""Plans: text, objects, files and their errors."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmfast
from mmfast.plan import Plan
from mmfast.registry import get


def test_every_form_gives_the_same_plan(tmp_path: Path) -> None:
    text = "divprune(keep=64) + pyramiddrop(keep=0.25)"
    plan = Plan.parse(text)
    toml, as_json = tmp_path / "plan.toml", tmp_path / "plan.json"
    toml.write_text('[[method]]\nname = "divprune"\nkeep = 64\n[[method]]\nname = "pyramiddrop"\nkeep = 0.25\n')
    as_json.write_text(json.dumps(plan.to_dict()))
    forms = [plan, text, list(plan.methods), plan.to_dict(), toml, str(toml), as_json]
    assert all(Plan.of(form) == plan for form in forms)
    assert plan.to_text() == text


def test_methods_are_ordered_by_stage() -> None:
    assert Plan.parse("fastv() + uniform()").to_text() == "uniform() + fastv()"


@pytest.mark.parametrize("text", ["", "full", "  full "])
def test_the_empty_plan_has_a_name(text: str) -> None:
    assert Plan.parse(text).to_text() == "full"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("divprun()", "unknown method 'divprun'; did you mean divprune"),
        ("divprune(kepe=3)", "no option 'kepe'; did you mean 'keep'"),
        ("divprune(64)", "need names, for example divprune(keep=64)"),
        ("divprune(keep=0)", "method 'divprune': keep=0 must be at least 1"),
        ("divprune(keep=1.5)", "method 'divprune': keep=1.5 must lie in (0, 1]"),
        ("divprune(keep=n)", "must be a literal"),
        ("divprune(**x)", "need names"),
        ("divprune(keep=1", "cannot be read"),
        ("divprune() - fastv()", "is no method"),
        ("os.system('x')", "is no method"),
        ("divprune() + random()", "both act at stage 'before_llm'"),
        ("pyramiddrop(layers=())", "must name the same number of steps"),
        ("pyramiddrop(fractions=(0.5, 0.6, 0.1))", "must fall and lie in"),
        ("divprune(positions='new')", "must be one of None, 'keep', 'compact'"),
        ("(" * 3000, "cannot be read"),
    ],
)
def test_bad_text_gives_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Plan.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "method = 3", "holds a list named 'method'"),
        ("a.toml", "[[method", "not valid TOML"),
        ("a.json", "[1, 2]", "must hold a table"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"method": [{"keep": 3}]}', "needs a 'name'"),
        ("a.json", '{"method": [{"name": "uniform", "kep": 3}]}', "no option 'kep'"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        Plan.of(path)
    assert message in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        Plan.of("nowhere.toml")


@pytest.mark.parametrize("plan", [3, None, [object()], ["divprune"]])
def test_wrong_types_are_refused(plan: object) -> None:
    with pytest.raises(TypeError, match="divprune"):
        Plan.of(plan)  # type: ignore[arg-type]


@given(st.text(max_size=60))
def test_no_text_crashes_the_parser(text: str) -> None:
    with contextlib.suppress(ValueError, TypeError):
        assert isinstance(Plan.parse(text), Plan)


@pytest.mark.parametrize("info", mmfast.methods(), ids=lambda info: info.name)
def test_every_method_survives_the_round_trip(info: mmfast.MethodInfo) -> None:
    plan = Plan((info.method(),))
    assert Plan.parse(plan.to_text()) == plan
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("info", mmfast.methods(), ids=lambda info: info.name)
def test_every_entry_is_documented(info: mmfast.MethodInfo) -> None:
    assert info.summary.endswith(".")
    assert get(info.name) is not None
    assert info.method.__module__.endswith(f".{info.name}")
    assert info.paper or not info.source
