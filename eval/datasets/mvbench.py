"""MVBench: twenty abilities that a single frame does not show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmfast.eval.datasets.files import Row, json_rows
from mmfast.eval.datasets.local import ChoiceTask, mean_over_kinds
from mmfast.eval.metrics.choice import letters_of
from mmfast.eval.task import Media, Outcome, Sample

_FRAMES_PER_SECOND = 3  # of the clips that are published as pictures

# Ability -> folders below video/ that releases of the data keep its clips in.
_PLACES: dict[str, tuple[str, ...]] = {
    "action_sequence": ("star/Charades_v1_480", "star/Charades_segment"),
    "action_prediction": ("star/Charades_v1_480", "star/Charades_segment"),
    "action_antonym": ("ssv2_video", "ssv2_video_mp4"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",),
    "unexpected_action": ("FunQA_test/test",),
    "object_existence": ("clevrer/video_validation",),
    "object_interaction": ("star/Charades_v1_480", "star/Charades_segment"),
    "object_shuffle": ("perception/videos",),
    "moving_direction": ("clevrer/video_validation",),
    "action_localization": ("sta/sta_video", "sta/sta_video_segment"),
    "scene_transition": ("scene_qa/video",),
    "action_count": ("perception/videos",),
    "moving_count": ("clevrer/video_validation",),
    "moving_attribute": ("clevrer/video_validation",),
    "state_change": ("perception/videos",),
    "fine_grained_pose": ("nturgbd", "nturgbd_convert"),
    "character_order": ("perception/videos",),
    "egocentric_navigation": ("vlnqa",),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"),
    "counterfactual_inference": ("clevrer/video_validation",),
}


@dataclass(frozen=True)
class MvBench(ChoiceTask):
    """MVBench (Li et al., 2024): 4,000 questions; the headline is the mean over the abilities.

    Failed questions count as wrong; lmms-eval leaves them out of what it divides by.

    Args:
        root: the folder.
        split: ``"all"`` or one ability, as ``"action_count"``.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``.
        frames: how many pictures are taken of a clip that is a folder of pictures, evenly spread.
    """

    name: ClassVar[str] = "mvbench"
    media: ClassVar[Media] = "video"
    chance: ClassVar[float] = 27.3  # as published
    paper: ClassVar[str] = "arXiv:2311.17005"
    splits: ClassVar[tuple[str, ...]] = ("all", *_PLACES)
    source: ClassVar[str] = (
        "the json folder and the unpacked videos of MVBench (Hugging Face data set OpenGVLab/MVBench)"
    )
    layout: ClassVar[tuple[str, ...]] = ("json/<ability>.json", "video/<collection>/<video>")

    split: str = "all"
    parser: str = "mvbench"
    frames: int = 16

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option, its value and what is legal.
        """
        super().__post_init__()
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: must be at least 1")

    def read(self) -> Iterator[Sample]:
        """Yield all questions, ability by ability."""
        for ability in _PLACES if self.split == "all" else (self.split,):
            path = self.find(f"json/{ability}.json", f"{ability}.json")
            if path is None:
                raise self.missing()
            for number, row in enumerate(json_rows(path), start=1):
                yield self._sample(row, ability, number)

    def _sample(self, row: Row, ability: str, number: int) -> Sample:
        name, start, end = row.text("video"), row.seconds("start"), row.seconds("end")
        choices = tuple(choice.strip() for choice in row.texts("candidates"))
        answer = letters_of(choices, row.place)[choices.index(row.choice("answer", choices))]
        places = [f"video/{place}/{name}" for place in _PLACES[ability]]
        pictures, rate = self._pictures(row, places, start, end)
        video = None if pictures else row.file(self.folder(), *places)
        # What was cut out already starts at 0.
        cut = video is None or "segment" in video.parent.name
        return Sample(
            sample_id=f"{ability}/{number}",
            question=option_question(row.text("question"), choices),
            answers=(answer,),
            frames=tuple(pictures),
            frames_per_second=rate,
            video=video,
            start=0.0 if cut or start is None else start,
            end=None if cut else end,
            choices=choices,
            category=ability,
            cluster=name,
        )

    def _pictures(
        self, row: Row, places: Sequence[str], start: float | None, end: float | None
    ) -> tuple[list[Path], float]:
        """Choose pictures of a clip that is a folder of them, and say how many show a second; none if it is not."""
        folder = next((path for place in places if (path := row.inside(self.folder(), place)).is_dir()), None)
        if folder is None:
            return [], 1.0
        found = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
        if not found:
            raise FileNotFoundError(f"{folder}: there are no pictures in this folder")
        first = min(int((start or 0.0) * _FRAMES_PER_SECOND), len(found) - 1)
        last = len(found) if end is None else min(max(int(end * _FRAMES_PER_SECOND), first + 1), len(found))
        step = max((last - first) / self.frames, 1.0)
        chosen = [found[int(first + step * (number + 0.5))] for number in range(int((last - first) / step))]
        return chosen, _FRAMES_PER_SECOND / step

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Report the mean over abilities, the plain mean, and each ability."""
        return mean_over_kinds(super().summary(outcomes), outcomes)


def option_question(question: str, choices: Sequence[str]) -> str:
    r"""Ask as MVBench and MLVU do.

    Example:
        >>> option_question("What is it?", ("a cat", "a dog"))
        'Question: What is it?\nOptions:\n(A) a cat\n(B) a dog\nOnly give the best option.'
    """
    options = "".join(f"({letter}) {choice}\n" for letter, choice in zip(letters_of(choices), choices, strict=True))
    return f"Question: {question.strip()}\nOptions:\n{options}Only give the best option."
