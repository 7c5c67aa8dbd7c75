"""Calls of ``generate`` without a model: whatever is drafted is checked against a rule that gives the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmfast.speculative.base import Draft, Drafter, Request, Verified
from mmfast.speculative.tree import path_to
from support.drafting import check_draft

VOCABULARY = 64
IMAGE = 60
END = 1

Rule = Callable[[Sequence[int]], int]
"""All tokens so far -> the next."""


def request(*prompts: Sequence[int], first: Sequence[int] = (), **changes: Any) -> Request:
    """Make a request; 60 stands for images, 1 ends an answer."""
    given: dict[str, Any] = {
        "prompts": tuple(map(tuple, prompts)),
        "first": tuple(first) or (2,) * len(prompts),
        "excluded": frozenset({IMAGE}),
        "stop": frozenset({END}),
        "vocabulary": VOCABULARY,
        "max_new_tokens": 200,
        "sampling": False,
        "law": lambda row, ids, logits: logits.float().softmax(dim=-1),
        "generator": [torch.Generator() for _ in prompts],
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    return Request(**{**given, **changes})


def silent(root: int, emitted: Sequence[int]) -> Verified:
    """Return a round without a draft."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, emitted[0]] = 1.0
    return Verified((root,), (-1,), (0,), tuple(emitted), logits)


def verify(rule: Rule, before: Sequence[int], root: int, draft: Draft) -> Verified:
    """Run a draft as a greedy model that follows a rule would.

    Args:
        rule: the model.
        before: all tokens before the root.
        root: last token of the answer.
        draft: the draft.
    """
    tokens, parents = (root, *draft.tokens), draft.tree()
    logits = torch.zeros(len(tokens), VOCABULARY)
    choice = []
    for node in range(len(tokens)):
        choice.append(rule([*before, *(tokens[i] for i in path_to(parents, node))]))
        # The others follow in the order of the vocabulary, so that each place has a rank of its own.
        logits[node] = -0.01 * torch.arange(VOCABULARY)
        logits[node, choice[-1]] = 1.0
    path = [0]
    while True:
        below = [i for i in range(1, len(tokens)) if parents[i] == path[-1] and tokens[i] == choice[path[-1]]]
        if not below:
            break
        path += below
    emitted = [*(tokens[node] for node in path[1:]), choice[path[-1]]]
    if END in emitted:
        emitted = emitted[: emitted.index(END) + 1]
        path = path[: len(emitted)]
    return Verified(tokens, parents, tuple(path), tuple(emitted), logits)


def play(
    drafter: Drafter,
    rule: Rule,
    prompt: Sequence[int],
    steps: int,
    memory: dict[str, Any] | None = None,
    budget: Callable[[int], int] = lambda turn: 1000,
    **changes: Any,
) -> tuple[list[int], int]:
    """Play a call, check every draft, and check that the answer is the rule's.

    Returns:
        The answer and the number of rounds.
    """
    call = request(prompt, first=[rule(prompt)], memory={} if memory is None else memory, **changes)
    session, answer, rounds = drafter.start(call), list(call.first), 0
    while len(answer) < steps and answer[-1] != END:
        most, draft = min(budget(rounds), drafter.most, steps - len(answer)), Draft()
        if most > 0:
            draft = session.propose({0: answer[-1]}, {0: most})[0]
        check_draft(draft, call, most)
        seen = verify(rule, [*prompt, *answer[:-1]], answer[-1], draft)
        session.observe({0: seen})
        answer += seen.emitted
        rounds += 1
    session.close()
    plain: list[int] = [call.first[0]]
    while len(plain) < len(answer):
        plain.append(rule([*prompt, *plain]))
    assert answer == plain
    return answer, rounds


def reciting(text: Sequence[int]) -> Rule:
    """Return a rule that says a text again and again: what follows the longest end of what was said."""

    def rule(tokens: Sequence[int]) -> int:
        for length in range(min(len(tokens), 8), 0, -1):
            end = tuple(tokens[len(tokens) - length :])
            for place in range(len(text) - length):
                if tuple(text[place : place + length]) == end:
                    return text[place + length]
        return text[0]

    return rule


def scattered(tokens: Sequence[int]) -> int:
    """Be a rule that never says anything twice in the same order for long."""
    state = 17
    for token in tokens:
        state = (state * 6364136223846793005 + token + 1442695040888963407) % 2**64
    return 2 + (state >> 33) % 50
