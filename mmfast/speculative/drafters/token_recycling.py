"""Token Recycling: what the model held likely after a token once, it may hold likely again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.speculative.base import Draft, Drafter, EachRow, Request, RowSession, Session, Verified
from mmfast.speculative.drafters.prompt_lookup import check_number
from mmfast.speculative.tree import RECYCLING_COUNTS, Template, counted_tree

CANDIDATES = 8
"""Candidates that are kept per token: as many children as a node of the template has at most."""
NOTHING = -1
"""Stands for a candidate that is not known."""


@register("token_recycling", stage="decode", paper="arXiv 2408.08696", source="Luowaterbi/TokenRecycling")
@dataclass(frozen=True)
class TokenRecycling(Drafter):
    """Draft a tree of tokens that the model held likely after each other before, whether or not they were accepted.

    Per token of the vocabulary the eight likeliest successors are kept, as the model last gave them, over calls.
    Nothing is known of a token at first and nothing drafted then; the official code drafts token 0. Its 80-token
    tree pays on large GPUs only.

    Paper: "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling".

    Attributes:
        nodes: tokens of the tree, from 1 to 80, the most promising ones of the official tree; None = 24, and 3
            where the model runs on a CPU.
    """

    trees = True

    nodes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes is not None:
            check_number("nodes", self.nodes, 1, 80)

    @property
    def most(self) -> int:
        """Tokens it proposes at most."""
        return 24 if self.nodes is None else self.nodes

    def start(self, request: Request) -> Session:
        """Take up what was kept."""
        nodes = 3 if self.nodes is None and request.device.type == "cpu" else self.most
        kept: MutableMapping[int, Sequence[int]] = request.memory.setdefault("successors", {})
        banned = torch.tensor(sorted(token for token in request.excluded if 0 <= token < request.vocabulary))
        banned = banned.long().to(request.device)
        return EachRow([_Row(nodes, request, kept, banned) for _ in request.prompts])


class _Row(RowSession):
    def __init__(self, nodes: int, request: Request, kept: MutableMapping[int, Sequence[int]], banned: Tensor) -> None:
        self.nodes, self.request, self.kept, self.banned = nodes, request, kept, banned

    def propose(self, root: int, budget: int) -> Draft:
        if root in self.request.excluded:
            return Draft()
        draft = filled_tree(ranked_tree(), self.kept, root, self.request.stop, min(budget, self.nodes))
        return draft if draft.tokens else Draft()

    def observe(self, verified: Verified) -> None:
        recycle(self.kept, verified.tokens, verified.logits, CANDIDATES, self.banned, self.request.excluded)


def filled_tree(
    template: Template,
    successors: Mapping[int, Sequence[int]] | Sequence[Sequence[int]],
    root: int,
    stop: Collection[int] = (),
    most: int | None = None,
) -> Draft:
    """Fill a template: a node that takes candidate ``r`` becomes the ``r``-th successor of its parent's token.

    Nodes for which nothing is known are left out, with all that hang from them.

    Args:
        template: the shape.
        successors: per token its successors, the likeliest first; negative for none.
        root: token of the root.
        stop: tokens beyond which nothing is drafted.
        most: most tokens to draft; None for all.

    Example:
        >>> filled_tree(counted_tree([2, 1]), {5: [6, 7], 6: [8, 9]}, 5)
        Draft(tokens=(6, 7, 8), parents=(0, 0, 1), laws=None)
    """
    place, tokens, parents = {0: 0}, [root], [-1]
    for node in range(1, len(template.parents)):
        if most is not None and len(tokens) > most:
            break
        above = place.get(template.parents[node])
        if above is None or (above and tokens[above] in stop):
            continue
        known = _of(successors, tokens[above])
        rank = template.ranks[node]
        if rank >= len(known) or known[rank] < 0:
            continue
        place[node] = len(tokens)
        tokens.append(known[rank])
        parents.append(above)
    return Draft(tuple(tokens[1:]), tuple(parents[1:]))


def _of(successors: Mapping[int, Sequence[int]] | Sequence[Sequence[int]], token: int) -> Sequence[int]:
    if isinstance(successors, Mapping):
        return successors.get(token, ())
    return successors[token] if 0 <= token < len(successors) else ()


def recycle(
    successors: MutableMapping[int, Sequence[int]] | list[list[int]],
    tokens: Sequence[int],
    logits: Tensor,
    count: int,
    banned: Tensor | None = None,
    excluded: Collection[int] = (),
) -> None:
    """Keep the likeliest successors of all nodes; where a token stands twice, the later node counts.

    Args:
        successors: per token its successors; changed in place.
        tokens: tokens of the nodes.
        logits: ``[nodes, V]`` after each node.
        count: successors to keep.
        banned: int64, tokens that are never successors.
        excluded: tokens that have none.

    Example:
        >>> kept = {}
        >>> recycle(kept, [3, 1], torch.tensor([[0.1, 0.5, 0.2], [0.9, 0.0, 0.9]]), 2)
        >>> kept
        {3: [1, 2], 1: [0, 2]}
    """
    if banned is not None and banned.numel():
        logits = logits.index_fill(-1, banned.to(logits.device), -torch.inf)
    for token, likely in zip(tokens, likeliest(logits, count), strict=True):
        if token not in excluded:
            successors[token] = likely


def likeliest(logits: Tensor, count: int) -> list[list[int]]:
    """Return the tokens of the highest logits of each row ``[n, V]``, descending; ties to the lower token.

    Fewer than ``count`` where others have a logit of ``-inf``; then filled up with -1.

    Example:
        >>> likeliest(torch.tensor([[0.5, 0.7, 0.5, 0.5]]), 3)
        [[1, 0, 2]]
    """
    # ``topk`` breaks ties as it likes, so all that reach its last value are looked at.
    least = logits.topk(min(count, logits.shape[-1]), dim=-1).values[:, -1:]
    rows, tokens = torch.nonzero((logits >= least) & (logits > -torch.inf), as_tuple=True)
    found: list[list[tuple[float, int]]] = [[] for _ in range(len(logits))]
    # One copy to the host for the three: float64 holds the integers exactly.
    for row, token, value in torch.stack([rows.double(), tokens.double(), logits[rows, tokens].double()], -1).tolist():
        found[int(row)].append((-value, int(token)))
    ranked = [[token for _, token in sorted(row)[:count]] for row in found]
    return [row + [NOTHING] * (count - len(row)) for row in ranked]


@cache
def ranked_tree() -> Template:
    """Return the 80-token tree, the most promising nodes first, so that its beginning is the best smaller tree.

    A node is worth the product of ``0.6 / (r + 1) ** 1.2`` over the ranks ``r`` on the way to it, an assumption
    close to the sizes of the official tree's levels.

    Example:
        >>> ranked_tree().parents[:4], ranked_tree().ranks[:4]
        ((-1, 0, 1, 0), (-1, 0, 0, 1))
    """
    whole = counted_tree(RECYCLING_COUNTS)
    worth = [1.0]
    for parent, rank in zip(whole.parents[1:], whole.ranks[1:], strict=True):
        worth.append(worth[parent] * 0.6 / (rank + 1) ** 1.2)
    order = sorted(range(len(worth)), key=lambda node: (-worth[node], node))
    place = {node: new for new, node in enumerate(order)} | {-1: -1}
    return Template(tuple(place[whole.parents[node]] for node in order), tuple(whole.ranks[node] for node in order))
