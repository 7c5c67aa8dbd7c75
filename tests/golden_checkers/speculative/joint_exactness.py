"""Laws that depend on what came before: two tokens of drafted decoding, against two of plain decoding."""

from __future__ import annotations

from typing import Any

import torch

from support.acceptance import Tables, doubles, enumerate_rounds, sequences


def check(case: dict[str, Any]) -> None:
    """Go through all drafts and ends of a round."""
    for item in case["cases"]:
        target, drafter = _tables(item["target"]), _tables(item["draft"])
        found = enumerate_rounds(target, drafter, item["gamma"], 2)
        expected = item["expected"]
        close = {"atol": 1e-12, "rtol": 0.0}
        torch.testing.assert_close(found.joint, doubles(expected["joint_first_two_tokens"]), **close)
        torch.testing.assert_close(found.joint, sequences(target, 2), **close)
        torch.testing.assert_close(found.accepted, doubles(expected["prob_n_accepted"]), **close)
        mean = float((found.accepted * (torch.arange(item["gamma"] + 1) + 1)).sum())
        assert abs(mean - expected["mean_tokens_per_round"]) <= 1e-12, item["name"]


def _tables(rows: dict[str, list[float]]) -> Tables:
    laws = {tuple(int(token) for token in key.split(",") if token): doubles(row) for key, row in rows.items()}
    return laws.__getitem__
