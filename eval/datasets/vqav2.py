"""VQAv2: open questions about COCO photographs, with ten human answers each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmfast.eval.datasets.files import Row, json_rows
from mmfast.eval.datasets.local import SHORT_ANSWER, LocalTask, detail, one_of
from mmfast.eval.metrics.text import normalise_evalai, normalise_vqa, one_line
from mmfast.eval.metrics.vqa import textvqa_evalai, vqa_lmms_eval, vqa_official
from mmfast.eval.task import Media, Outcome, Sample, Scored, by_kind

_RULES: Mapping[str, tuple[Callable[[str, Sequence[str]], float], Callable[[str], str]]] = {
    "textvqa_evalai": (textvqa_evalai, normalise_evalai),
    "vqa_official": (vqa_official, one_line),
    "vqa_lmms_eval": (vqa_lmms_eval, normalise_vqa),
}


@dataclass(frozen=True)
class VqaV2(LocalTask):
    """VQAv2 (Goyal et al., 2017): 214,354 validation questions with answers; those of the test split are hidden.

    Args:
        root: the folder.
        split: ``"val"`` or ``"train"``.
        limit: ask only so many questions, the first ones; None for all.
        rule: ``"textvqa_evalai"`` as LLaVA's submissions, ``"vqa_official"`` or ``"vqa_lmms_eval"``.
    """

    name: ClassVar[str] = "vqav2"
    media: ClassVar[Media] = "image"
    paper: ClassVar[str] = "arXiv:1612.00837"
    splits: ClassVar[tuple[str, ...]] = ("val", "train")
    source: ClassVar[str] = "questions and annotations of VQA v2.0 (visualqa.org) and the COCO images of 2014"
    layout: ClassVar[tuple[str, ...]] = (
        "v2_OpenEnded_mscoco_{split}2014_questions.json",
        "v2_mscoco_{split}2014_annotations.json",
        "{split}2014/COCO_{split}2014_<12 digits>.jpg",
    )
    export: ClassVar[str] = "lmms-lab/VQAv2"

    split: str = "val"
    rule: str = "textvqa_evalai"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option, its value and what is legal.
        """
        super().__post_init__()
        one_of("rule", self.rule, tuple(_RULES))

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        questions, annotations = (self.find(name.format(split=self.split)) for name in self.layout[:2])
        if questions is None or annotations is None:
            part = "validation" if self.split == "val" else self.split
            yield from (self._sample(row, row) for row in self.exported(part))
            return
        answers = {row.text("question_id"): row for row in json_rows(annotations, "annotations")}
        for row in json_rows(questions, "questions"):
            known = answers.get(row.text("question_id"))
            if known is None:
                raise row.error(f"question {row.text('question_id')} has no answers in {annotations}")
            yield self._sample(row, known)

    def _sample(self, row: Row, annotation: Row) -> Sample:
        image = row.text("image_id")
        if "image" in row.values:
            picture = row.image("image", self.folder())
        else:
            number = row.integer("image_id", 0, 10**12 - 1)
            picture = row.file(self.folder(), f"{self.split}2014/COCO_{self.split}2014_{number:012d}.jpg")
        return Sample(
            sample_id=row.text("question_id"),
            question=row.text("question") + SHORT_ANSWER,
            answers=tuple(answer.text("answer") for answer in annotation.records("answers")),
            images=(picture,),
            category=annotation.text("answer_type", ""),
            cluster=image,
            details={"question_type": annotation.text("question_type", "")},
        )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score by the chosen rule; 0.0 to 1.0."""
        accuracy, normalise = _RULES[self.rule]
        return Scored(accuracy(prediction, sample.answers), normalise(prediction))

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Add accuracies by type of question ("how many", "what color is the", ...) to those by type of answer."""
        kinds = by_kind(outcomes, lambda outcome: detail(outcome, "question_type"))
        return super().summary(outcomes) | {f"accuracy/question/{kind}": value for kind, value in kinds.items()}
