"""The registry: names, near matches, duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import mmfast
from mmfast.registry import get, register, unregister
from mmfast.token_pruning.base import Scorer
from mmfast.tokens import VisualTokens


def test_third_parties_can_add_a_method() -> None:
    @register("test_energy", stage="before_llm", paper="none", source="none")
    @dataclass(frozen=True)
    class Energy(Scorer):
        """Keep the largest tokens."""

        def score(self, tokens: VisualTokens) -> torch.Tensor:
            """Return the norm."""
            return tokens.features.norm(dim=-1)

    try:
        decision = mmfast.Plan.parse("test_energy(keep=1)").methods[0](  # type: ignore[operator]
            VisualTokens.from_features(torch.tensor([[1.0], [3.0], [2.0]]))
        )
        assert decision.indices.tolist() == [1]
        assert get("test_energy").kind == "Scorer"
        with pytest.raises(ValueError, match="already registered"):
            register("test_energy", stage="before_llm")(type("Other", (Scorer,), {"kind": "Scorer"}))
    finally:
        unregister("test_energy")


@pytest.mark.parametrize(("name", "stage"), [("Big", "before_llm"), ("a-b", "before_llm"), ("fine", "nowhere")])
def test_bad_names_and_stages_are_refused(name: str, stage: str) -> None:
    with pytest.raises(ValueError):
        register(name, stage=stage)


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(ValueError, match="known methods: actqkv, adakv, aim_merge"):
        get("zzzzzz")


def test_methods_can_be_listed_by_stage() -> None:
    assert {info.stage for info in mmfast.methods("in_llm")} == {"in_llm"}
    with pytest.raises(ValueError, match="must be one of"):
        mmfast.methods("late")
