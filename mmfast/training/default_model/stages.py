"""The stages of the recipe, each an objective of its own over the same student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.training.default_model.packing import Packed, Packer
from mmfast.training.default_model.student import Student, whiten
from mmfast.training.default_model.world import PATCHES, Episode, clip, generator, picture
from mmfast.training.objective import Loss, Objective

_VISION, _LANGUAGE, _ALIGN, _JOINT, _LOOK = range(5)
_CLIPS = 0.4
"""Share of the joint steps that show clips."""
_WHOLE = (0.25, 0.7)
"""Share of the joint steps that show all patches, at the beginning and at the end."""
STUDENT = "student.safetensors"


class _Stage(Objective):
    """What the stages share.

    Args:
        student: what is trained.
        seed: of the data.
        steps: of the whole stage, for curricula.
    """

    number: int

    def __init__(self, student: Student, seed: int, steps: int) -> None:
        super().__init__()
        self.student, self.seed, self.steps = student, seed, steps
        student.requires_grad_(False)
        for part in self.learned():
            part.requires_grad_(True)

    def learned(self) -> Sequence[torch.nn.Module]:
        """Return the parts that this stage trains."""
        return [self.student]

    def rng(self, step: int, part: int) -> np.random.Generator:
        """Return the source of chance of a share of a step."""
        return generator(self.seed, self.number, step, part)

    def matrices(self) -> list[torch.nn.Parameter]:
        """Leave the output heads to AdamW, as embeddings are."""
        heads = {id(p) for part in (self.student.heads, self.student.present) for p in part.parameters()}
        return [p for p in super().matrices() if id(p) not in heads]

    def export(self, folder: Path) -> None:
        """Write the student."""
        self.student.save(folder / STUDENT)


class VisionStage(_Stage):
    """Stage 0: every patch says what it shows."""

    number = _VISION

    def __init__(self, student: Student, seed: int, steps: int) -> None:
        super().__init__(student, seed, steps)
        rng = generator(seed, 99)
        samples = [picture(rng, crowded=True).pixels for _ in range(24)]
        whiten(student, torch.cat([sample for sample in samples if sample is not None]))

    def learned(self) -> Sequence[torch.nn.Module]:
        """Train the tower and the heads."""
        student = self.student
        return [student.tower, student.norm, student.heads, student.present]

    def batch(self, step: int, part: int, parts: int, size: int) -> list[Episode]:
        """Draw pictures, mostly crowded ones until near the end."""
        rng = self.rng(step, part)
        share = 0.9 if step < 0.75 * self.steps else 0.35
        return [picture(rng, crowded=bool(rng.random() < share)) for _ in range(size)]

    def forward(self, batch: list[Episode], done: float) -> Loss:
        """Read labels off patches, and later off the class token too."""
        pixels, labels = _stacked(batch, self.student.device)
        features, pooled = self.student.see(pixels)
        loss, figures = self.student.dense_loss(features, labels)
        if done >= 0.7:
            loss = loss + 2.0 * self.student.presence_loss(pooled, labels)
        return Loss(loss, figures)


class LanguageStage(_Stage):
    """Stage 1: the language model answers from symbols that stand for patches."""

    number = _LANGUAGE

    def __init__(self, student: Student, seed: int, steps: int) -> None:
        super().__init__(student, seed, steps)
        self.packer = Packer(student.processor)
        # Only eager attention gives its weights out.
        student.model.set_attn_implementation("eager")

    def learned(self) -> Sequence[torch.nn.Module]:
        """Train the language model and the codes."""
        return [self.student.language, self.student.symbols]

    def batch(self, step: int, part: int, parts: int, size: int) -> tuple[list[Episode], Packed]:
        """Draw scenes, small ones first, and clips once the words are known."""
        rng, done = self.rng(step, part), step / self.steps
        moving = done > 0.4 and rng.random() < 0.3
        small = 0.7 * max(0.0, 1 - 2 * done)
        if moving:
            frames = int(rng.integers(2, 7))
            episodes = [_asked(lambda: clip(rng, frames, pixels=False)) for _ in range(max(1, size * 2 // frames))]
            most = int(rng.integers(16, 33))
        else:
            episodes = [
                _asked(
                    lambda: picture(
                        rng,
                        most=3 if rng.random() < small else None,
                        extras=0.35 if done > 0.5 else 0.0,
                        pixels=False,
                    )
                )
                for _ in range(size)
            ]
            most = int(rng.integers(32, 49) if done < 0.6 else rng.integers(48, 97))
        kept = [_thinned(episode, most, rng) for episode in episodes]
        compact = bool(rng.random() < 0.5)
        return episodes, self.packer.pack(episodes, kept, compact=compact, questions=14, rng=rng)

    def forward(self, batch: tuple[list[Episode], Packed], done: float) -> Loss:
        """Answer, and look at what was asked about."""
        episodes, packed = batch
        student = self.student
        visual = student.symbols(_labels(episodes, student.device), student.language.embed_tokens.weight)
        middle = student.middle - 1, student.middle
        answer, looked, figures = student.read(packed.to(student.device), visual, attended=middle if done < 0.7 else ())
        return Loss(answer + 0.15 * looked, {**figures, "attention": float(looked.detach())})


class AlignStage(_Stage):
    """Stage 2: the projector learns the language of the symbols."""

    number = _ALIGN

    def learned(self) -> Sequence[torch.nn.Module]:
        """Train the projector alone."""
        return [self.student.projector]

    def batch(self, step: int, part: int, parts: int, size: int) -> list[Episode]:
        """Draw pictures."""
        rng = self.rng(step, part)
        return [picture(rng, crowded=bool(rng.random() < 0.5)) for _ in range(size)]

    def forward(self, batch: list[Episode], done: float) -> Loss:
        """Fit the symbols of patches with objects, and some of the background."""
        student = self.student
        pixels, labels = _stacked(batch, student.device)
        with torch.no_grad():
            features, _ = student.see(pixels)
            wanted = student.symbols(labels, student.language.embed_tokens.weight)
        gap = (student.projector(features) - wanted).square().mean(dim=-1) / wanted.square().mean()
        there = labels["shape"] > 0
        loss = (gap[there].mean() if bool(there.any()) else gap.mean()) + 0.3 * gap[~there].mean()
        return Loss(loss, {"unexplained": float(gap[there].mean().detach())})


class JointStage(_Stage):
    """Stage 3: everything together on pixels, pictures and clips."""

    number = _JOINT

    def __init__(self, student: Student, seed: int, steps: int) -> None:
        super().__init__(student, seed, steps)
        self.packer = Packer(student.processor)
        student.model.set_attn_implementation("sdpa")

    def batch(self, step: int, part: int, parts: int, size: int) -> tuple[list[Episode], Packed]:
        """Draw pictures or clips, more and more of them with all their patches."""
        rng, done = self.rng(step, part), step / self.steps
        whole = bool(rng.random() < _WHOLE[0] + (_WHOLE[1] - _WHOLE[0]) * done)
        if rng.random() < _CLIPS:
            frames = int(rng.integers(2, 7))
            episodes = [_asked(lambda: clip(rng, frames)) for _ in range(max(1, size // frames))]
            most = int(rng.integers(24, 65))
        else:
            episodes = [_asked(lambda: picture(rng, extras=0.35)) for _ in range(size)]
            most = int(rng.integers(40, 97))
        kept = [
            [np.arange(PATCHES)] * len(episode.scenes) if whole else _thinned(episode, most, rng)
            for episode in episodes
        ]
        compact = not whole and bool(rng.random() < 0.5)
        return episodes, self.packer.pack(episodes, kept, compact=compact, questions=12, rng=rng)

    def forward(self, batch: tuple[list[Episode], Packed], done: float) -> Loss:
        """Answer from pixels; the patches go on saying what they show."""
        episodes, packed = batch
        student = self.student
        pixels, labels = _stacked(episodes, student.device)
        features, pooled = student.see(pixels)
        dense, named = student.dense_loss(features, labels)
        visual = student.projector(features)
        answer, _, figures = student.read(packed.to(student.device), visual)
        presence, place = student.presence_loss(pooled, labels), student.place_loss(visual, labels)
        kind = "clips" if len(episodes[0].scenes) > 1 else "pictures"
        return Loss(
            answer + 0.25 * dense + 0.1 * presence + 0.25 * place,
            {
                **figures,
                f"{kind}_right": figures["tokens_right"],
                "dense": float(dense.detach()),
                "place": float(place.detach()),
                **named,
            },
        )


class LookStage(JointStage):
    """Stage 4: the layers before the middle look at what is asked about, too.

    Without it only the middle layers tell which patches matter, and a method that reads the attention of an early one
    chooses at random. What the vision tower and the projector have learned stays as it is.
    """

    number = _LOOK

    def __init__(self, student: Student, seed: int, steps: int) -> None:
        super().__init__(student, seed, steps)
        student.model.set_attn_implementation("eager")

    def learned(self) -> Sequence[torch.nn.Module]:
        """Train the layers of the language model."""
        return [self.student.language.layers]

    def forward(self, batch: tuple[list[Episode], Packed], done: float) -> Loss:
        """Answer from pixels, and look at what was asked about in every layer from the second to the middle."""
        episodes, packed = batch
        student = self.student
        pixels, _ = _stacked(episodes, student.device)
        with torch.no_grad():
            visual = student.projector(student.see(pixels)[0])
        answer, looked, figures = student.read(packed.to(student.device), visual, attended=range(1, student.middle + 1))
        return Loss(answer + 0.15 * looked, {**figures, "attention": float(looked.detach())})


def _asked(draw: Any) -> Episode:
    """Draw until there is something to ask."""
    while True:
        episode: Episode = draw()
        if episode.questions:
            return episode


def _thinned(episode: Episode, most: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Keep the patches of objects, and of the background what room there is."""
    kept = []
    for owners in episode.owners:
        objects, ground = np.flatnonzero(owners >= 0), np.flatnonzero(owners < 0)
        room = max(0, most - len(objects))
        kept.append(np.sort(np.concatenate([objects, rng.permutation(ground)[:room]])))
    return kept


def _labels(episodes: Sequence[Episode], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.cat([episode.labels[name] for episode in episodes]).to(device) for name in episodes[0].labels}


def _stacked(episodes: Sequence[Episode], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    pixels = torch.cat([e.pixels for e in episodes if e.pixels is not None])
    return pixels.to(device), _labels(episodes, device)


__all__ = ["STUDENT", "AlignStage", "JointStage", "LanguageStage", "LookStage", "VisionStage"]
