"""Rules for the length of a draft."""

from __future__ import annotations

from typing import Any

import pytest

from mmfast.speculative.goodput import best, goodput_table, heuristic_length, stop_length


def check(case: dict[str, Any]) -> None:
    """Compare three rules."""
    for one in case["specdec_pp"]:
        length = stop_length(one["accept_probs"], one["stop_threshold"], tuple(one["bound"]))
        assert length == one["expected"]["draft_length"], one

    for one in case["goodput"]:
        table, expected = (
            goodput_table(one["alpha"], one["draft_cost_ratio"], one["verify_cost_ratio"]),
            one["expected"],
        )
        for entry, wanted in zip(table, expected["table"], strict=True):
            found = {
                "k": entry.length,
                "expected_tokens": entry.tokens,
                "cost": entry.cost,
                "speedup": entry.speedup,
            }
            assert found == pytest.approx(wanted, abs=1e-12), one
        assert best(table).length == expected["best_k"], one
        assert best(table).speedup == pytest.approx(expected["best_speedup"], abs=1e-12), one

    heuristic = case["heuristic_plus2_minus1"]
    length = heuristic["start"]
    for step in heuristic["steps"]:
        length = heuristic_length(length, step["n_accepted"], step["draft_len"])
        assert length == step["next_num"], step
