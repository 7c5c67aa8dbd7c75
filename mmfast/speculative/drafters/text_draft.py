"""A small language model drafts from the text alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmfast.registry import register
from mmfast.speculative.base import Drafter, Request, Session, check_count
from mmfast.speculative.drafters.assistant import CompanionSession
from mmfast.speculative.drafters.swift import check_share


@register("text_draft", stage="decode", paper="arXiv 2404.08856")
@dataclass(frozen=True)
class TextDraft(Drafter):
    """Draft with a small language model that sees no images.

    Give it to ``accelerate`` as ``draft_model``: any causal language model with the tokenizer of the model. It reads
    the prompt without placeholders, padding and what marks images, at positions of its own. Vocabularies may differ in
    size by padding at the end: what only one of them has is never drafted.

    Paper: "On Speculative Decoding for Multimodal Large Language Models".

    Attributes:
        num_draft: tokens of a draft at most.
        risk: a draft ends once a rejection within it is likelier than that, going by how sure the smaller model is
            of each token; 1 for no such end.
    """

    stochastic: ClassVar[bool] = True
    companion: ClassVar[Literal["", "vision", "text"]] = "text"

    num_draft: int = 5
    risk: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_draft", self.num_draft, 1)
        check_share("risk", self.risk)

    @property
    def most(self) -> int:
        """Tokens it proposes at most in a round, the root not counted."""
        return self.num_draft

    def start(self, request: Request) -> Session:
        """Begin a call of ``generate``."""
        return CompanionSession(request, depth=self.num_draft, risk=self.risk)
