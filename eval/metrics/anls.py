"""Average normalised Levenshtein similarity (Biten et al., 2019), in the two ways it is computed."""

from __future__ import annotations

from collections.abc import Sequence

_THRESHOLD = 0.5


def levenshtein(first: str, second: str) -> int:
    """Count the insertions, deletions and substitutions that turn one string into the other.

    Example:
        >>> levenshtein("1987", "1978"), levenshtein("", "abc")
        (2, 3)
    """
    shorter, longer = sorted((first, second), key=len)
    row = list(range(len(shorter) + 1))
    for place, letter in enumerate(longer, start=1):
        above, row = row, [place]
        for column, other in enumerate(shorter):
            row.append(min(above[column] + (letter != other), above[column + 1] + 1, row[column] + 1))
    return row[-1]


def anls_docvqa(prediction: str, references: Sequence[str]) -> float:
    """Score one answer as DocVQA and InfoVQA do.

    Case and runs of white space are forgiven, but lengths are those of the raw strings.

    Args:
        prediction: the raw text.
        references: accepted answers.

    Returns:
        The best similarity over the references; 0.0 if it is below 0.5. Empty against empty is 1.0.

    Raises:
        ValueError: if there are no references.

    Example:
        >>> anls_docvqa("1978", ["1987"]), anls_docvqa("no", ["yes"]), anls_docvqa("itc limited", ["  ITC   Limited "])
        (0.5, 0.0, 1.0)
    """
    best = 0.0
    for reference in _checked(references):
        distance = levenshtein(" ".join(prediction.lower().split()), " ".join(reference.lower().split()))
        # Capitals, as the official tool counts: a sharp s has two.
        length = max(len(prediction.upper()), len(reference.upper()))
        best = max(best, 1.0 - distance / length if length else 1.0)
    return best if best >= _THRESHOLD else 0.0


def anls_stvqa(prediction: str, references: Sequence[str]) -> float:
    """Score one answer as ST-VQA is scored for LLaVA: inner white space counts.

    Args:
        prediction: the raw text.
        references: accepted answers.

    Returns:
        The best similarity over the references, those below 0.5 being 0.0. Empty against empty is 1.0.

    Raises:
        ValueError: if there are no references.

    Example:
        >>> anls_stvqa("abx", ["abcd"]), round(anls_stvqa("itc limited", ["  ITC   Limited "]), 3)
        (0.5, 0.846)
    """
    found = prediction.lower().strip()
    best = 0.0
    for reference in _checked(references):
        wanted = reference.lower().strip()
        length = max(len(found), len(wanted))
        best = max(best, 1.0 - levenshtein(found, wanted) / length if length else 1.0)
    return best if best >= _THRESHOLD else 0.0


def _checked(references: Sequence[str]) -> Sequence[str]:
    if not references:
        raise ValueError("references: none given, must be at least one")
    return references
