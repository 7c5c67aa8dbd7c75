"""Which option an answer means: the parsers of the common tools, each under the name of where it is used.

All of them return a letter, or "" where nothing was read. Tools that guess then would return a random letter;
:func:`guess` does so in a way that can be repeated.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase

from mmfast.eval.metrics.text import one_line, strip_punctuation

Parser = Callable[[str, Sequence[str]], str]

_EDGES = ",.!?;:'"
_WORDS_OF_A_SENTENCE = 5

_START, _END, _PHRASE, _BRACKETS, _PERIOD, _COLON, _CLOSED, _SPACE, _ANYWHERE = 10, 9, 7, 6, 5, 4, 3, 2, 0
_FORMS = (("({})", _BRACKETS), ("{}.", _PERIOD), ("{}:", _COLON), ("{})", _CLOSED), ("{} ", _SPACE))
# Longer phrases are not idle beside the shorter ones in them: each is looked for where it stands first.
_PHRASES = (
    *("answer is", "the answer is", "my answer is"),
    *("correct answer is", "the correct answer is", "best answer is", "the best answer is"),
    *("correct option is", "the correct option is", "best option is", "the best option is"),
    *("choice is", "the choice is", "my choice is", "correct choice is", "the correct choice is"),
    *("i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:"),
    *("答案是", "答案为", "选"),
    "答えは",
)

_LONGVIDEOBENCH_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)

_MVBENCH_LABEL = re.compile(r"^([A-E])\.\s*(.+)$", re.IGNORECASE)
_MVBENCH_LETTER = re.compile(r"\b([A-E])\b", re.IGNORECASE)
_SCIENCEQA_PHRASE = re.compile(r"The answer is ([A-Z]).")
_MMBENCH_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_QUANTIFIER_WORDS = 3


def letters_of(choices: Sequence[str], place: str = "") -> str:
    """Name the options.

    Args:
        choices: the options.
        place: what they belong to, for the error: file and record, or the question.

    Raises:
        ValueError: if there are none or more than 26.

    Example:
        >>> letters_of(["a red car", "two dogs"])
        'AB'
    """
    if not 1 <= len(choices) <= len(ascii_uppercase):
        where = f"{place}: " if place else ""
        raise ValueError(f"{where}choices: {len(choices)} given, must be 1 to {len(ascii_uppercase)}")
    return ascii_uppercase[: len(choices)]


def guess(letters: Sequence[str], key: str) -> str:
    """Pick a letter that looks random and is the same for the same key on every machine.

    Args:
        letters: what to pick from.
        key: for example seed and sample id.

    Example:
        >>> guess("ABCD", "0:17") == guess("ABCD", "0:17")
        True
    """
    return letters[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % len(letters)]


def mmmu_style(text: str, choices: Sequence[str]) -> str:
    """Parse as MMMU's tool (Yue et al., 2023), which lmms-eval also uses for NExT-QA and EgoSchema.

    "(B)" before "B " before "B." before the text of an option in a sentence; of several the last one. (Of
    several letters of which none stands between spaces the tool takes the first, and so does this.)

    Args:
        text: the raw answer.
        choices: the options without letters.

    Returns:
        A letter, or "" where the tool would guess.

    Example:
        >>> options = ["a red car", "two dogs playing in the park", "the man", "nothing"]
        >>> mmmu_style("Both A and C are wrong, so D", options), mmmu_style("D) nothing", options)
        ('D', '')
    """
    for mark in _EDGES:
        text = text.strip(mark)
    text = f" {text} "
    letters = letters_of(choices)
    if found := [letter for letter in letters if f"({letter})" in text]:
        return max(found, key=lambda letter: text.rfind(f"({letter})"))
    for form in ("{} ", "{}."):
        if found := [letter for letter in letters if form.format(letter) in text]:
            return max(found, key=lambda letter: text.rfind(f" {letter} "))
    if len(text.split()) <= _WORDS_OF_A_SENTENCE:
        return ""
    lowered = text.lower()
    places = {letter: lowered.rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=True)}
    best = max(places, key=lambda letter: places[letter])
    return best if places[best] >= 0 else ""


def priority_extract(text: str, choices: Sequence[str]) -> str:
    """Parse as lmms-eval does for Video-MME and MLVU since 2025; the default here.

    A letter that starts the answer counts most, then one that ends it, one after "the answer is" and the like,
    "(B)", "B.", "B:", "B)", "B " and any "B"; among equals the last one.

    Args:
        text: the raw answer.
        choices: the options; only their number matters.

    Returns:
        A letter, or "".

    Example:
        >>> priority_extract("(A) is wrong; (B) is right", "ABCD"), priority_extract("b", "ABCD")
        ('B', '')
    """
    bare = text.strip()
    for mark in _EDGES + '"':
        bare = bare.strip(mark)
    padded, stripped, letters = f" {bare} ", bare.strip(), letters_of(choices)
    found: list[tuple[int, int, str]] = []
    for letter in letters:
        forms = ((padded.rfind(form.format(letter)), rank) for form, rank in _FORMS)
        found += [(rank, place, letter) for place, rank in forms if place >= 0]
        found += [(_PHRASE, place, letter) for place in _after_phrases(padded, letter)]
        if stripped.startswith(letter) and not stripped[1:2].isalpha():
            found.append((_START, 0, letter))
        if stripped.endswith(letter) and not stripped[-2:-1].isalpha():
            found.append((_END, len(padded), letter))
    if not found:
        found = [(_ANYWHERE, padded.rfind(letter), letter) for letter in letters if letter in padded]
    return max(found)[-1] if found else ""


def _after_phrases(text: str, letter: str) -> list[int]:
    lowered = text.lower()
    ends = [lowered.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in lowered]
    return [place for end in ends if (place := text.find(letter, end)) >= 0]


def longvideobench(text: str, choices: Sequence[str]) -> str:
    """Parse as LongVideoBench's tool (Wu et al., 2024): the first capital from A to E, wherever it stands.

    Args:
        text: the raw answer.
        choices: not used: the tool looks for A to E whatever the options.

    Returns:
        A letter, or "" where the tool would guess.

    Example:
        >>> longvideobench("Answer: (C)", "ABCDE"), longvideobench("The best answer is: B", "ABCDE")
        ('A', 'B')
    """
    for phrase in _LONGVIDEOBENCH_PHRASES:
        text = text.replace(phrase, "")
    return next((letter for letter in text if letter in "ABCDE"), "")


def scienceqa(text: str, choices: Sequence[str]) -> str:
    """Parse as LLaVA does for ScienceQA (Lu et al., 2022): a bare letter, "B. ..." or one "The answer is B.".

    Args:
        text: the raw answer.
        choices: the options; only their number matters.

    Returns:
        A letter, or "" where the tool writes FAILED.

    Example:
        >>> scienceqa("B. two dogs", "ABCD"), scienceqa("B.", "ABCD"), scienceqa("So: The answer is C.", "ABCD")
        ('B', '', 'C')
    """
    letters = letters_of(choices)
    if text in tuple("ABCDE"):
        found = text
    elif text[:1] in tuple("ABCDE") and text[1:3] == ". ":
        found = text[0]
    else:
        phrases = _SCIENCEQA_PHRASE.findall(text)
        found = phrases[0] if len(phrases) == 1 else ""
    return found if found in tuple(letters) else ""


def seed_first_char(text: str, choices: Sequence[str]) -> str:
    """Parse as SEED-Bench is scored (Li et al., 2023): the first character, whatever it is.

    Args:
        text: the raw answer.
        choices: not used.

    Example:
        >>> seed_first_char("B. two dogs", "ABCD"), seed_first_char("(B)", "ABCD")
        ('B', '(')
    """
    return text.strip()[:1]


def mvbench(text: str, choices: Sequence[str]) -> str:
    """Parse as lmms-eval does for MVBench (Li et al., 2023): "b. ..." or the first letter standing alone.

    Case is ignored, so the article in "a man is walking" is read as option A.

    Args:
        text: the raw answer.
        choices: not used: the tool looks for A to E whatever the options.

    Returns:
        A letter, or "".

    Example:
        >>> mvbench("a man is walking", "ABCD"), mvbench("**B**", "ABCD"), mvbench("two dogs", "ABCD")
        ('A', 'B', '')
    """
    match = _MVBENCH_LABEL.match(text.strip()) or _MVBENCH_LETTER.search(strip_punctuation(one_line(text)))
    return match.group(1).upper() if match else ""


def mmbench_rules(text: str, choices: Sequence[str]) -> str:
    """Parse by the rules of MMBench's tool (Liu et al., 2023), without the language model it falls back on.

    Exactly one letter standing alone, else exactly one option whose text is in the answer. An "A" in a sentence
    may be an article and is no letter.

    Args:
        text: the raw answer.
        choices: the options without letters.

    Returns:
        A letter, or "".

    Example:
        >>> options = ["teddy bear", "rabbit", "cat", "dog"]
        >>> mmbench_rules("(B).", options), mmbench_rules("A cute little cat", options)
        ('B', 'C')
    """
    letters = letters_of(choices)
    words = text.translate(_MMBENCH_MARKS).split()
    found = [letter for letter in letters if letter in words]
    article = "A" in found and len(words) > _QUANTIFIER_WORDS
    if len(found) != 1 or article:
        lowered = text.lower()
        found = [letter for letter, choice in zip(letters, choices, strict=True) if choice.lower() in lowered]
    return found[0] if len(found) == 1 else ""


PARSERS: Mapping[str, Parser] = {
    parser.__name__: parser
    for parser in (
        longvideobench,
        mmbench_rules,
        mmmu_style,
        mvbench,
        priority_extract,
        scienceqa,
        seed_first_char,
    )
}
