"""CopySpec: when the last few words stood before, copy what came then."""

from __future__ import annotations

from dataclasses import dataclass

from mmfast.registry import register
from mmfast.speculative.base import Draft, Drafter, EachRow, Request, RowSession, Session, Verified
from mmfast.speculative.drafters.prompt_lookup import Ngrams, allowed, check_number, clipped


@register("copyspec", stage="decode", paper="arXiv 2502.08923", source="RazvanDu/CopySpec")
@dataclass(frozen=True)
class CopySpec(Drafter):
    """Draft what followed the last ``gamma`` tokens where they stood first, in the prompt or the answer.

    Where the official code falls back to a draft model, nothing is drafted. Placeholders of images interrupt the
    text. Near the end of an answer ``gamma`` stays what it is; the official code shrinks it and then finds nothing.

    Paper: "CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without Compromising Quality".

    Attributes:
        gamma: tokens that have to agree.
        num_draft: most tokens to copy.
    """

    gamma: int = 3
    num_draft: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, 1)
        check_number("num_draft", self.num_draft, 1)

    @property
    def most(self) -> int:
        """Tokens it proposes at most."""
        return self.num_draft

    def start(self, request: Request) -> Session:
        """Read the prompts."""
        return EachRow([_Row(self, request, row) for row in range(len(request.prompts))])


class _Row(RowSession):
    def __init__(self, drafter: CopySpec, request: Request, row: int) -> None:
        self.drafter, self.request = drafter, request
        # Keyed by the tokens themselves: two n-grams with the same hash are still told apart.
        self.text = Ngrams(drafter.gamma, drafter.gamma, request.excluded, "first")
        self.text.extend((*request.prompts[row], request.first[row]))

    def propose(self, root: int, budget: int) -> Draft:
        if root in self.request.stop:
            return Draft()
        found = self.text.find(self.text.tail, min(budget, self.drafter.num_draft)).draft
        return Draft(clipped(allowed(found, self.request.vocabulary), self.request.stop))

    def observe(self, verified: Verified) -> None:
        self.text.extend(verified.emitted)
