"""Reading a letter out of an answer: where the tools differ, and repeatable guesses."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast.eval.metrics import PARSERS, guess, letters_of

OPTIONS = ["a red car", "two dogs playing in the park", "the man", "nothing"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: (C)", {"longvideobench": "A", "mmmu_style": "C", "priority_extract": "C", "mvbench": "C"}),
        ("a man is walking", {"mvbench": "A", "priority_extract": "", "mmbench_rules": ""}),
        ("(A) is wrong; (B) is right", {"mmmu_style": "B", "priority_extract": "B", "longvideobench": "A"}),
        ("D) nothing", {"mmmu_style": "", "priority_extract": "D", "mmbench_rules": "D"}),
        ("b. two dogs", {"mvbench": "B", "seed_first_char": "b", "scienceqa": ""}),
        ("", dict.fromkeys(PARSERS, "")),
        # Of several letters with a period and no space beside them MMMU's tool takes the first.
        ("A.B.x", {"mmmu_style": "A"}),
        # An option in a sentence counts for MMMU from six words on, the last one of several.
        ("it shows the man, not two dogs playing in the park", {"mmmu_style": "B"}),
        ("it shows the man", {"mmmu_style": ""}),
        # A longer phrase further back counts beside the shorter one in front.
        ("my answer is A. The correct answer is B, not A here", {"priority_extract": "A"}),
        ("I would say C", {"priority_extract": "C"}),
        ("The answer is D because", {"scienceqa": "D", "priority_extract": "D"}),
        ("The answer is A. The answer is B.", {"scienceqa": ""}),
        ("The answer is E.", {"scienceqa": "", "longvideobench": "E"}),
        ("A", {"scienceqa": "A", "mmbench_rules": "A"}),
        ("A man stands there quietly", {"mmbench_rules": ""}),
        ("B and C", {"mmbench_rules": ""}),
        ("I see two dogs playing in the park", {"mmbench_rules": "B"}),
        ("정답은 C 입니다", {"priority_extract": "C"}),
    ],
)
def test_parsers(text: str, expected: dict[str, str]) -> None:
    assert {name: PARSERS[name](text, OPTIONS) for name in expected} == expected


@pytest.mark.parametrize("name", sorted(set(PARSERS) - {"scienceqa"}))
@pytest.mark.parametrize("letter", "ABCD")
def test_every_parser_reads_a_letter_with_a_period(name: str, letter: str) -> None:
    assert PARSERS[name](f"{letter}.", OPTIONS) == letter
    assert PARSERS[name](letter, OPTIONS) == letter


@pytest.mark.parametrize("name", PARSERS)
@given(text=st.text(max_size=40))
def test_no_text_breaks_a_parser(name: str, text: str) -> None:
    found = PARSERS[name](text, OPTIONS)
    assert len(found) <= 1
    if name not in ("seed_first_char", "longvideobench", "mvbench"):
        assert found in ("", *letters_of(OPTIONS))


def test_guesses_repeat_and_spread() -> None:
    drawn = Counter(guess("ABCD", f"0:{number}") for number in range(400))
    assert set(drawn) == set("ABCD")
    # Four standard deviations of a fair draw.
    assert max(abs(count - 100) for count in drawn.values()) < 4 * (400 * 0.25 * 0.75) ** 0.5
    assert drawn == Counter(guess("ABCD", f"0:{number}") for number in range(400))
    assert [guess("ABCD", f"0:{n}") for n in range(20)] != [guess("ABCD", f"1:{n}") for n in range(20)]


def test_number_of_options() -> None:
    for count in (0, 27):
        with pytest.raises(ValueError, match=f"choices: {count} given"):
            letters_of(["x"] * count)
