"""CIDEr-D (Vedantam et al., 2015): how much a caption says that only captions of this image say."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_LONGEST = 4
_SIGMA = 6.0
_SCALE = 10.0

_CLITIC = re.compile(r"(?<=\w)('s|'m|'d|'re|'ve|'ll|n't)\b")
_CANNOT = re.compile(r"\bcannot\b")
# Words with inner hyphens, periods, apostrophes and digits stay whole, as in the Penn Treebank.
_TOKEN = re.compile(r"'(?:s|m|d|re|ve|ll)\b|n't\b|\d+(?:[.,:/]\d+)*|(?:[^\W\d_]\.){2,}|\w+(?:[-'/.]\w+)*|[$%&#@+*=<>]")

Ngram = tuple[str, ...]


def ptb_lite(text: str) -> str:
    """Tokenise nearly as the Stanford tokenizer that caption scores are published with, which needs Java.

    Lower case, punctuation dropped, 's and n't and their like split off. Rare cases differ, so say
    ``ptb_lite`` beside a score.

    Example:
        >>> ptb_lite("A man's dog isn't there, on the T-shirt.")
        "a man 's dog is n't there on the t-shirt"
    """
    lowered = _CANNOT.sub("can not", text.lower().replace("\u2019", "'"))
    return " ".join(_TOKEN.findall(_CLITIC.sub(r" \1", lowered)))


@dataclass(frozen=True)
class CiderD:
    """CIDEr-D with the document frequencies of one set of images.

    Attributes:
        images: how many images there are.
        frequencies: in the references of how many of them an n-gram (1 to 4 words) occurs.
    """

    images: int
    frequencies: Counter[Ngram]

    @classmethod
    def of(cls, references: Sequence[Sequence[str]]) -> CiderD:
        """Count n-grams.

        Args:
            references: for each image its captions, tokens separated by spaces.

        Raises:
            ValueError: if there are no images, or one without captions.
        """
        if not references:
            raise ValueError("references: no images given, must be at least one")
        frequencies: Counter[Ngram] = Counter()
        for place, captions in enumerate(references):
            if not captions:
                raise ValueError(f"references[{place}]: no captions given, must be at least one")
            frequencies.update({ngram for caption in captions for ngram in _ngrams(caption)})
        return cls(len(references), frequencies)

    def score(self, caption: str, references: Sequence[str]) -> float:
        """Score one caption.

        Args:
            caption: tokens separated by spaces.
            references: the captions of its image, tokens separated by spaces.

        Returns:
            0.0 to 10.0; tables print its mean times 100. With a single image every weight is 0, and so is this.

        Raises:
            ValueError: if there are no references.

        Example:
            >>> scorer = CiderD.of([["a red bus"], ["two dogs"]])
            >>> round(scorer.score("a red bus", ["a red bus"]), 6), scorer.score("two dogs", ["a red bus"])
            (7.5, 0.0)
        """
        if not references:
            raise ValueError("references: none given, must be at least one")
        found = _ngrams(caption)
        return _SCALE * sum(self._similarity(found, _ngrams(other)) for other in references) / len(references)

    def _similarity(self, found: Counter[Ngram], wanted: Counter[Ngram]) -> float:
        delta = _bigrams(found) - _bigrams(wanted)
        penalty = math.exp(-(delta**2) / (2 * _SIGMA**2))
        return penalty * sum(self._cosine(found, wanted, length) for length in range(1, _LONGEST + 1)) / _LONGEST

    def _cosine(self, found: Counter[Ngram], wanted: Counter[Ngram], length: int) -> float:
        mine, other = self._weights(found, length), self._weights(wanted, length)
        norms = math.sqrt(sum(w * w for w in mine.values())) * math.sqrt(sum(w * w for w in other.values()))
        if norms == 0:
            return 0.0
        # Clipped at the reference, so that repeating a rare word earns nothing.
        return sum(min(weight, other.get(ngram, 0.0)) * other.get(ngram, 0.0) for ngram, weight in mine.items()) / norms

    def _weights(self, ngrams: Counter[Ngram], length: int) -> dict[Ngram, float]:
        return {
            ngram: count * (math.log(self.images) - math.log(max(1, self.frequencies[ngram])))
            for ngram, count in ngrams.items()
            if len(ngram) == length
        }


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Score captions against each other's references.

    Small sets are not comparable with large ones, as rarity is counted within the set.

    Args:
        captions: one per image, tokens separated by spaces.
        references: for each image its captions, likewise.

    Returns:
        The mean over images, and the score of each; times 100 they are what tables print.

    Raises:
        ValueError: if the numbers of captions and images differ, or there are none.

    Example:
        >>> mean, each = cider_d(["a red bus", "a cat"], [["a red bus"], ["two dogs"]])
        >>> round(mean, 6), [round(score, 6) for score in each]
        (3.75, [7.5, 0.0])
    """
    if len(captions) != len(references):
        raise ValueError(f"captions: {len(captions)} given for {len(references)} images; must be one for each")
    scorer = CiderD.of(references)
    each = [scorer.score(caption, others) for caption, others in zip(captions, references, strict=True)]
    return sum(each) / len(each), each


def _ngrams(caption: str) -> Counter[Ngram]:
    words = caption.split()
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, _LONGEST + 1)
        for start in range(len(words) - length + 1)
    )


def _bigrams(ngrams: Counter[Ngram]) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
