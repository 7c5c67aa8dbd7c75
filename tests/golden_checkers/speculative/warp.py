"""Processors that read the tokens so far, among them the drafted ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmfast.speculative.verify import Accepted, reject, try_chain
from support.acceptance import chain, doubles


def check(cases: list[dict[str, Any]]) -> None:
    """Compare the laws along the draft and what is accepted under them."""
    for case in cases:
        processors, logits, name = _processors(case), doubles(case["logits"]), case["name"]

        def law(
            node: int, tokens: tuple[int, ...], case: Any = case, logits: Any = logits, run: Any = processors
        ) -> Any:
            ids = torch.tensor([[*case["history"], *tokens]])
            return run(ids, logits[node][None]).softmax(dim=-1)[0]

        close = {"atol": 1e-12, "rtol": 0.0}
        drafted, expected, test = tuple(case["draft_tokens"]), doubles(case["expected"]["target_probs"]), case["accept"]
        found = torch.stack([law(node, drafted[:node]) for node in range(len(expected))])
        torch.testing.assert_close(found, expected, **close)

        draft = chain(drafted, test["q"])
        stopped = try_chain(draft, law, iter(test["u"]).__next__)
        count = len(stopped.path) - 1
        assert count == test["n_accepted"], name
        torch.testing.assert_close(stopped.weights, doubles(test["residual_distribution"]), **close)
        tested = test["u"][: min(count + 1, len(drafted))]
        accepted = reject(draft, law, iter([*tested, test["u_bonus"]]).__next__)
        assert accepted == Accepted(stopped.path, test["next_token"]), name


def _processors(case: dict[str, Any]) -> LogitsProcessorList:
    """What ``generate`` makes of the options, in its order."""
    found = LogitsProcessorList()
    if case["repetition_penalty"] != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]))
    if case["temperature"] != 1.0:
        found.append(TemperatureLogitsWarper(case["temperature"]))
    if case["top_k"]:
        found.append(TopKLogitsWarper(case["top_k"]))
    if case["top_p"] < 1.0:
        found.append(TopPLogitsWarper(case["top_p"]))
    return found
