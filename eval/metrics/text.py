"""Bringing short answers to one form before they are compared."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official tool hands a flag of 32 to an argument that counts replacements.
_PERIODS_REMOVED = 32

_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    )
} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))

# Each stands for itself with any one apostrophe left out. The list is the official one, gaps included: "it's"
# is not in it, as "its" is a word of its own, and entries with a capital can match nothing in lower case.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
"""
CONTRACTIONS: dict[str, str] = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def one_line(text: str) -> str:
    r"""Turn line breaks and tabs into spaces, and cut the ends.

    Example:
        >>> one_line(" red\tand\nblue ")
        'red and blue'
    """
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Take punctuation out as the official VQA tool does.

    A mark vanishes where it touches a space anywhere in the text, or where the text holds a number with a
    comma; otherwise it becomes a space. A period goes unless a digit follows.

    Example:
        >>> strip_punctuation("t-shirt"), strip_punctuation("10,000 people, maybe"), strip_punctuation("U.S.A. 3.5")
        ('t shirt', '10000 people maybe', 'USA 3.5')
    """
    comma = _DIGITS_AROUND_COMMA.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        vanishes = comma or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", stripped, count=_PERIODS_REMOVED)


def unify_words(text: str) -> str:
    """Lower the case, write numbers up to ten as digits, drop articles, put apostrophes back.

    Example:
        >>> unify_words("The two dogs dont bark")
        "2 dogs don't bark"
    """
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_vqa(text: str) -> str:
    """Normalise as the official VQA evaluator (Antol et al., 2015) does for answers that people disagree on.

    Example:
        >>> normalise_vqa("Coca-Cola"), normalise_vqa("what's up?"), normalise_vqa("an the")
        ('coca cola', "what's up", '')
    """
    return unify_words(strip_punctuation(one_line(text)))


def normalise_evalai(text: str) -> str:
    """Normalise as the EvalAI server for TextVQA does.

    It differs from :func:`normalise_vqa` by removing commas and question marks first and by splitting off 's.

    Example:
        >>> normalise_evalai("It's a cat"), normalise_vqa("It's a cat")
        ("it 's cat", "it's cat")
    """
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise_vqa(lowered)


def normalise_gqa(text: str) -> str:
    """Lower the case and cut trailing periods: all that GQA forgives.

    Example:
        >>> normalise_gqa("Yes."), normalise_gqa("The two")
        ('yes', 'the two')
    """
    return text.strip().rstrip(".").lower()


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Score 1.0 if the normalised prediction is one of the normalised answers.

    Not what published numbers of judged video question answering mean; never compare the two.

    Example:
        >>> exact("Two.", ["2"]), exact("two dogs", ["2"])
        (1.0, 0.0)
    """
    found = normalise_vqa(prediction)
    return float(found != "" and any(found == normalise_vqa(answer) for answer in answers))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """Score 1.0 if the words of an answer follow each other somewhere in the prediction.

    More forgiving than :func:`exact`, and as little comparable with a judge: a list of guesses scores too.

    Example:
        >>> contains("I can see two dogs.", ["2 dogs"]), contains("a catalogue", ["cat"])
        (1.0, 0.0)
    """
    found = f" {normalise_vqa(prediction)} "
    wanted = [normalise_vqa(answer) for answer in answers]
    return float(any(words and f" {words} " in found for words in wanted))
