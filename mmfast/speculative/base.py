"""The kinds of drafter: what each receives, and what it proposes.

A drafter (stage ``decode``) proposes tokens; the model verifies them in one forward. Its options are a
frozen dataclass, what it knows of one call of ``generate`` lives in a session.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmfast.token_pruning.base import Method


@dataclass(frozen=True)
class Draft:
    """Tokens proposed to follow the root, which is the last token of the answer so far.

    Attributes:
        tokens: proposed tokens, the root not counted; empty for none.
        parents: per proposed token the node it hangs from: 0 is the root, ``i`` the ``i``-th proposed token
            counted from 1; a parent comes before its children, children of one node in the order of preference
            and with tokens that differ. Empty for a chain, in which each hangs from the one before.
        laws: float32 ``[len(tokens), V]``, the law each token was drawn from; None where tokens were chosen
            and not drawn. Only for chains.

    Raises:
        ValueError: if the fields contradict each other.

    Example:
        >>> Draft((5, 6, 7)).tree()
        (-1, 0, 1, 2)
        >>> Draft((5, 6, 7), parents=(0, 0, 2)).depth
        2
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    laws: Tensor | None = None

    def __post_init__(self) -> None:
        if self.parents and len(self.parents) != len(self.tokens):
            raise ValueError(f"parents has {len(self.parents)} entries for {len(self.tokens)} tokens; give one each")
        if any(not 0 <= parent <= place for place, parent in enumerate(self.parents)):
            raise ValueError(f"parents={self.parents} must name earlier nodes: 0 is the root, i the i-th token")
        if self.laws is not None and (not self.chain or self.laws.shape[0] != len(self.tokens)):
            raise ValueError("laws belong to the tokens of a chain, one row each")

    @property
    def chain(self) -> bool:
        """Whether each token hangs from the one before."""
        return not self.parents or self.parents == tuple(range(len(self.tokens)))

    def tree(self) -> tuple[int, ...]:
        """Return the parent of every node, the root (-1) included."""
        return (-1, *(self.parents or range(len(self.tokens))))

    @property
    def depth(self) -> int:
        """Tokens on the longest path, the root not counted."""
        if self.chain:
            return len(self.tokens)
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return max(depths)


@dataclass(frozen=True)
class Prefill:
    """What the model made of the prompt of one row, without padding and without tokens that were pruned.

    Attributes:
        ids: ``[n]`` int64 token ids; placeholders where an image or video stands.
        visual: ``[n]`` bool, which are visual.
        media: ``[n]`` int64, number of the image or video (frames of one video alike); -1 for text.
        embeds: ``[n, D]`` what entered the decoder, projected visual features included.
        hidden: ``[n, D]`` last hidden states, after the final norm.
        positions: ``[n]`` int64 position ids, or ``[3, n]`` where positions have several dimensions.
    """

    ids: Tensor
    visual: Tensor
    media: Tensor
    embeds: Tensor
    hidden: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Verified:
    """What the model said of one row's draft.

    Attributes:
        tokens: tokens of all nodes, the root first.
        parents: parent of each node, -1 for the root.
        path: accepted nodes in order, beginning with 0, the root.
        emitted: tokens the round gave: the accepted ones and one of the model's own; cut where the answer ended.
        logits: ``[nodes, V]`` of the model, in its dtype, before processors.
        hidden: ``[nodes, D]`` last hidden states after the final norm; None unless ``needs_hidden``.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    path: tuple[int, ...]
    emitted: tuple[int, ...]
    logits: Tensor
    hidden: Tensor | None = None


Law = Callable[[int, Sequence[int], Tensor], Tensor]
"""Row, drafted tokens after its answer so far, ``[V]`` logits -> the law ``[V]`` (float32) after processors."""


@dataclass(frozen=True)
class Request:
    """One call of ``generate``, as a drafter sees it.

    Attributes:
        prompts: per row the token ids of the prompt, without padding, placeholders included.
        first: per row the first token of the answer, which the prompt gave.
        excluded: tokens that are never drafted: placeholders, padding and what marks images and videos.
        stop: tokens that end an answer.
        vocabulary: number of tokens V the model has logits for.
        max_new_tokens: tokens the call may still give, ``first`` not counted.
        sampling: whether tokens are drawn and not the likeliest taken.
        law: how logits of a drafter become a law like the model's: with those processors of the call that have
            no memory. Nothing excluded has weight in it.
        generator: source of chance of each row, for drafters that draw.
        device: of the model.
        dtype: of the model.
        memory: what the drafter remembers over calls, its own; empty on the first call.
        prefill: per row, what the model made of the prompt; empty unless ``needs_hidden``.
        embed: the model's input embeddings.
        head: the model's output layer, from last hidden states to logits.
        model: services of the model, for drafters that run it (see ``needs_model``).
        inputs: what ``generate`` was called with, for drafters that encode images themselves.
        companion: the model that drafts, for drafters that want one (see ``companion`` of :class:`Drafter`).
    """

    prompts: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]
    excluded: frozenset[int]
    stop: frozenset[int]
    vocabulary: int
    max_new_tokens: int
    sampling: bool
    law: Law
    generator: Sequence[torch.Generator]
    device: torch.device
    dtype: torch.dtype
    memory: dict[str, Any] = field(default_factory=dict)
    prefill: tuple[Prefill, ...] = ()
    embed: nn.Module | None = None
    head: nn.Module | None = None
    model: Any = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    companion: Any = None


class Session(ABC):
    """What a drafter knows of one call of ``generate``; rows that have ended are no longer asked."""

    @abstractmethod
    def propose(self, roots: Mapping[int, int], budget: Mapping[int, int]) -> dict[int, Draft]:
        """Draft what follows.

        Args:
            roots: row -> last token of its answer so far.
            budget: row -> at most so many tokens, at least 1.

        Returns:
            Row -> draft, for every row asked; an empty draft where there is nothing to propose.
        """

    @abstractmethod
    def observe(self, verified: Mapping[int, Verified]) -> None:
        """Take note of what became of the drafts, of rows that went without one too.

        Args:
            verified: row -> what the model said.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """End the call: give back what the session holds."""


class RowSession(ABC):
    """What a drafter knows of one row, where rows do not share work."""

    @abstractmethod
    def propose(self, root: int, budget: int) -> Draft:
        """Draft at most ``budget`` tokens that follow ``root``."""

    @abstractmethod
    def observe(self, verified: Verified) -> None:
        """Take note of what became of the draft."""


class EachRow(Session):
    """Rows one by one.

    Args:
        rows: a session for each.
    """

    def __init__(self, rows: Sequence[RowSession]) -> None:
        self.rows = rows

    def propose(self, roots: Mapping[int, int], budget: Mapping[int, int]) -> dict[int, Draft]:
        """Ask each row."""
        return {row: self.rows[row].propose(root, budget[row]) for row, root in roots.items()}

    def observe(self, verified: Mapping[int, Verified]) -> None:
        """Tell each row."""
        for row, seen in verified.items():
            self.rows[row].observe(seen)


@dataclass(frozen=True)
class Drafter(Method):
    """Base of everything that drafts; a subclass is a frozen dataclass whose fields are its options.

    Attributes:
        adaptive_length: draft as many tokens as pay by what rounds are seen to cost and to give, and none where
            nothing does; False always drafts as many as possible.
        trees: whether it proposes trees, for which the model's attention needs a mask.
        stochastic: whether it draws its tokens, and gives the laws, where the call samples.
        needs_hidden: whether it reads last hidden states.
        needs_model: whether it runs the model itself.
        companion: what kind of second model drafts, given to ``accelerate`` as ``draft_model``: ``"vision"`` for one
            that reads images, ``"text"`` for any language model; empty for none.
    """

    kind: ClassVar[str] = "Drafter"
    role: ClassVar[str] = "draft"
    trees: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    companion: ClassVar[Literal["", "vision", "text"]] = ""

    adaptive_length: bool = field(default=True, kw_only=True)

    @property
    @abstractmethod
    def most(self) -> int:
        """Tokens it proposes at most in a round, the root not counted."""

    @property
    def reads_attention(self) -> bool:
        """Whether it reads what the prompt attends to."""
        return "attention" in self.needs

    @abstractmethod
    def start(self, request: Request) -> Session:
        """Begin a call of ``generate``; ``request.first`` is the root of the first round."""


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
        ValueError: naming the field and the value.

    Example:
        >>> check_count("depth", 5)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an int of at least {least}")
