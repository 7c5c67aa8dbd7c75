"""MME: fourteen abilities, two questions about each image, one to affirm and one to deny."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mmfast.eval.datasets.files import Row
from mmfast.eval.datasets.local import SHORT_ANSWER, LocalTask
from mmfast.eval.metrics.yes_no import MME_COGNITION, MME_PERCEPTION, mme_label, mme_scores
from mmfast.eval.task import Media, Outcome, Sample, Scored

_GROUPS = {"all": MME_PERCEPTION + MME_COGNITION, "perception": MME_PERCEPTION, "cognition": MME_COGNITION}
_GUESSED = 75.0  # half of the answers and a quarter of the pairs of an ability
_OFFICIAL_TAIL = " Please answer yes or no."
_IMAGES = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True)
class Mme(LocalTask):
    """MME (Fu et al., 2023): 2,374 questions.

    The headline is perception, of 2000, which is what papers call "MME"; some print the sum with cognition, of
    2800, which is ``total`` here. Where only abilities of cognition are asked about, cognition is the headline.

    Args:
        root: the folder.
        split: ``"all"``, ``"perception"``, ``"cognition"`` or one ability, as ``"OCR"``.
        limit: ask only so many questions, the first ones; None for all. An odd number halves a pair.
    """

    name: ClassVar[str] = "mme"
    media: ClassVar[Media] = "image"
    metric: ClassVar[str] = "perception"
    chance: ClassVar[float] = 10 * _GUESSED
    paper: ClassVar[str] = "arXiv:2306.13394"
    splits: ClassVar[tuple[str, ...]] = (*_GROUPS, *_GROUPS["all"])
    source: ClassVar[str] = "MME_Benchmark_release_version (BradyFU/Awesome-Multimodal-Large-Language-Models)"
    layout: ClassVar[tuple[str, ...]] = (
        "<ability>/questions_answers_YN/<image>.txt and <ability>/images/<image>.jpg",
        "or <ability>/<image>.txt and <ability>/<image>.jpg",
    )
    export: ClassVar[str] = "lmms-lab/MME"

    split: str = "all"

    def __post_init__(self) -> None:
        """Choose the headline.

        Raises:
            ValueError: naming the option, its value and what is legal.
        """
        super().__post_init__()
        abilities = set(_GROUPS.get(self.split, (self.split,)))
        perception = abilities & set(MME_PERCEPTION)
        object.__setattr__(self, "metric", "perception" if perception else "cognition")
        object.__setattr__(self, "chance", _GUESSED * len(perception or abilities))

    def read(self) -> Iterator[Sample]:
        """Yield all questions, ability by ability."""
        abilities = _GROUPS.get(self.split, (self.split,))
        top = self.find("MME_Benchmark_release_version") or self.folder()
        if not any((top / ability).is_dir() for ability in abilities):
            yield from self._exported(abilities)
            return
        for ability in abilities:
            yield from self._ability(top / ability)

    def _ability(self, folder: Path) -> Iterator[Sample]:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder; download {self.source}")
        texts = folder / "questions_answers_YN"
        for path in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
            place = Row(str(path), {})
            names = [f"{part}{path.stem}{suffix}" for part in ("images/", "") for suffix in _IMAGES]
            picture = place.file(folder, *names)
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
                if not line.strip():
                    continue
                question, tab, answer = line.rpartition("\t")
                row = Row(f"{path}:{number}", {"question": question, "answer": answer})
                if not tab:
                    raise row.error("must be a question and an answer with a tab between them")
                yield self._sample(row, folder.name, path.stem, number, picture)

    def _exported(self, abilities: Sequence[str]) -> Iterator[Sample]:
        seen: dict[str, int] = {}
        for row in self.exported("test"):
            if (ability := row.choice("category", _GROUPS["all"])) in abilities:
                image = row.text("question_id")
                seen[image] = seen.get(image, 0) + 1
                yield self._sample(row, ability, image, seen[image], row.image("image", self.folder()))

    def _sample(self, row: Row, ability: str, image: str, number: int, picture: Image.Image | Path) -> Sample:
        answer = row.text("answer").strip().lower().replace(".", "")
        if answer not in ("yes", "no"):
            raise row.error(f"answer is {row.text('answer')!r}; it must be yes or no")
        return Sample(
            sample_id=f"{ability}/{image.removeprefix(ability + '/')}/{number}",
            question=row.text("question").strip().removesuffix(_OFFICIAL_TAIL.strip()).strip() + SHORT_ANSWER,
            answers=(answer,),
            images=(picture,),
            category=ability,
            cluster=f"{ability}/{image}",
        )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score 1.0 for the right label."""
        label = mme_label(prediction)
        return Scored(float(label == sample.answers[0]), "" if label == "other" else label)

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Report perception, cognition, their sum and each ability: accuracy plus share of images all right."""
        if not outcomes:
            return {}
        right = ((one.sample.category, one.sample.cluster, one.scored.score == 1.0) for one in outcomes)
        scores = mme_scores(right)
        return {self.metric: scores[self.metric], **scores}
