"""Plan files written and read back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmfast
from mmfast.plan import Plan, _toml_value
from mmfast.registry import get

values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=8,
)


def as_lists(value: object) -> object:
    return [as_lists(item) for item in value] if isinstance(value, tuple) else value


@given(value=values)
def test_every_value_survives_toml(value: object) -> None:
    read = tomllib.loads(f"x = {_toml_value(value)}")["x"]
    assert read == as_lists(value)
    assert type(read) is type(as_lists(value))


@pytest.mark.parametrize("ending", ["toml", "json"])
@pytest.mark.parametrize("info", mmfast.methods(), ids=lambda info: info.name)
def test_every_method_survives_a_file(info: mmfast.MethodInfo, ending: str, tmp_path: Path) -> None:
    plan = Plan((info.method(),))
    path = tmp_path / f"plan.{ending}"
    plan.save(path)
    assert Plan.load(path) == plan


@pytest.mark.parametrize(
    "text", ["full", "divprune(keep=64) + pyramiddrop(keep=0.5, positions='compact')", "vtw(layer=3)"]
)
@pytest.mark.parametrize("ending", ["toml", "json"])
def test_plans_survive_a_file(text: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"plan.{ending}"
    Plan.parse(text).save(path)
    assert Plan.load(path) == Plan.parse(text)


def test_none_against_the_default_needs_json(tmp_path: Path) -> None:
    plan = Plan((get("mustdrop").method(keep=None),))
    with pytest.raises(ValueError, match=r"method 'mustdrop': TOML cannot write keep=None; save the plan as \.json"):
        plan.save(tmp_path / "plan.toml")
    assert not (tmp_path / "plan.toml").exists()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.toml or \.json"):
        Plan().save(tmp_path / "plan.yaml")
