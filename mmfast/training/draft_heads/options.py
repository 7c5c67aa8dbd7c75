"""What can be said of the training of a draft head."""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = {"medusa": 4, "hydra": 3, "flash": 4}
"""Tokens that a slot foretells by itself, for the methods that foretell several; Hydra's heads are the larger ones."""

QUERIES = {"vispec": 2, "flash": 16}
"""Learned queries that read an image, for the methods that compress images."""

METHODS = ("msd", "vispec", "medusa", "hydra", "flash")


@dataclass(frozen=True)
class HeadOptions:
    """How a draft head is trained, beside the numbers of the loop.

    Attributes:
        method: ``"msd"``, ``"vispec"``, ``"medusa"``, ``"hydra"`` or ``"flash"``.
        prompts: questions the model answers for training: the first ones of the data.
        new_tokens: tokens it writes to each, at most.
        past_end: forbid the end of an answer, so that the model writes on; for models whose answers are short.
        sampled: share of the answers that are drawn at ``temperature``; the others are greedy.
        temperature: of those.
        together: answers that the model writes at once.
        noise: width of the uniform noise on hidden states that enter the head, at 512 tokens.
        unroll: how often the head's own states take the place of the model's in further passes; msd and vispec.
        levels: tokens that a slot foretells; medusa, hydra and flash. None takes :data:`LEVELS`.
        queries: learned queries that read an image; vispec and flash. None takes :data:`QUERIES`.
        two_stage_epochs: E of MSD's two stages: text alone for E / 2 epochs, then more and more pictures. An epoch is
            as long as the smaller of the two pools. 0 mixes everything from the start.
        held_out: questions behind those of ``prompts``, or of the held-out split of the rendered world, on which the
            exported head is tried; 0 for none.
        memory: GiB of hidden states of the model that are kept; what does not fit is computed again when needed.
        seed: of the answers that are drawn, of the new head, and of the order of the answers.

    Raises:
        ValueError: for a value that is not legal.

    Example:
        >>> HeadOptions(method="hydra").num_levels
        3
    """

    method: str = "msd"
    prompts: int = 800
    new_tokens: int = 40
    past_end: bool = True
    sampled: float = 0.3
    temperature: float = 0.7
    together: int = 8
    noise: float = 0.2
    unroll: int = 1
    levels: int | None = None
    queries: int | None = None
    two_stage_epochs: int = 0
    held_out: int = 60
    memory: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} must be one of {', '.join(METHODS)}")
        if not isinstance(self.past_end, bool):
            raise ValueError(f"past_end={self.past_end!r} must be true or false")
        least = {"prompts": 1, "new_tokens": 2, "together": 1, "unroll": 0, "two_stage_epochs": 0, "held_out": 0}
        for name, bound in {**least, "seed": 0}.items():
            _check_count(name, getattr(self, name), bound)
        for name, known in (("levels", LEVELS), ("queries", QUERIES)):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 1)
                if self.method not in known:
                    raise ValueError(f"{name}={getattr(self, name)!r} is for {', '.join(known)}, not for {self.method}")
        if self.two_stage_epochs and self.method != "msd":
            raise ValueError(f"two_stage_epochs={self.two_stage_epochs} is for msd, not for {self.method}")
        for name, low, high in (("sampled", 0, 1), ("temperature", 1e-3, 1e3), ("noise", 0, 1e3), ("memory", 0, 1e6)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} must be a number between {low:g} and {high:g}")

    @property
    def num_levels(self) -> int:
        """Tokens that a slot foretells."""
        return self.levels or LEVELS.get(self.method, 1)

    @property
    def num_queries(self) -> int:
        """Learned queries that read an image."""
        return self.queries or QUERIES.get(self.method, 1)


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an int of at least {least}")
