"""Worked examples of the scorers, computed by hand from the published rules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast.eval import metrics

WORDS = st.text(alphabet="abcde .,'", max_size=12)


class TestVqa:
    @pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
    def test_matches_among_ten(self, matches: int, score: float) -> None:
        answers = ["red"] * matches + ["blue"] * (10 - matches)
        assert metrics.vqa_official("red", answers) == pytest.approx(score)
        assert metrics.textvqa_evalai("red", answers) == pytest.approx(score)
        assert metrics.vqa_lmms_eval("red", answers) == pytest.approx(score)

    def test_identical_answers_are_compared_raw(self) -> None:
        assert metrics.vqa_official("Yes", ["yes"] * 10) == 0.0
        assert metrics.vqa_official("yes\n", ["yes"] * 10) == 1.0
        assert metrics.vqa_official("Yes", ["yes"] * 9 + ["no"]) == 1.0
        assert metrics.vqa_lmms_eval("Yes", ["yes"] * 10) == 1.0

    @pytest.mark.parametrize(
        ("text", "official", "evalai"),
        [
            ("5.", "5", "5"),
            ("3.5", "3.5", "3.5"),
            (".5", ".5", ".5"),
            ("U.S.A.", "usa", "usa"),
            ("It's a cat", "it's cat", "it 's cat"),
            ("dont", "don't", "don't"),
            ("somebody'd", "somebodyd", "somebodyd"),
            ("5 o clock: 20% & $3 ~#*", "5 o clock: 20% & $3 ~#*", "5 o clock: 20% & $3 ~#*"),
            ("none of ten, eleven", "0 of 10 eleven", "0 of 10 eleven"),
            ("a-b, c-d", "b c d", "b c d"),
        ],
    )
    def test_normalisation(self, text: str, official: str, evalai: str) -> None:
        assert (metrics.normalise_vqa(text), metrics.normalise_evalai(text)) == (official, evalai)

    def test_no_more_than_32_periods_go(self) -> None:
        assert metrics.normalise_vqa("." * 40) == "." * 8

    def test_number_of_answers(self) -> None:
        with pytest.raises(ValueError, match="9 given, must be exactly 10"):
            metrics.textvqa_evalai("x", ["x"] * 9)
        with pytest.raises(ValueError, match="at least one"):
            metrics.vqa_official("x", [])

    def test_gqa(self) -> None:
        assert metrics.gqa("Yes..", "yes") == 1.0
        assert metrics.gqa("two", "2") == metrics.gqa("the cup", "cup") == 0.0


class TestAnls:
    @pytest.mark.parametrize(
        ("references", "prediction", "docvqa", "stvqa"),
        [
            (["1987"], "1978", 0.5, 0.5),
            (["abcd"], "abx", 0.5, 0.5),
            (["yes"], "no", 0.0, 0.0),
            (["  ITC   Limited "], "itc limited", 1.0, 11 / 13),
            ([""], "", 1.0, 1.0),
            (["zzzz", "abcd"], "abcd", 1.0, 1.0),
        ],
    )
    def test_worked_examples(self, references: list[str], prediction: str, docvqa: float, stvqa: float) -> None:
        assert metrics.anls_docvqa(prediction, references) == pytest.approx(docvqa)
        assert metrics.anls_stvqa(prediction, references) == pytest.approx(stvqa)

    @given(WORDS, WORDS, WORDS)
    def test_edit_distance_is_a_metric(self, a: str, b: str, c: str) -> None:
        distance = metrics.levenshtein
        assert distance(a, b) == distance(b, a)
        assert (distance(a, b) == 0) == (a == b)
        assert distance(a, c) <= distance(a, b) + distance(b, c)
        assert abs(len(a) - len(b)) <= distance(a, b) <= max(len(a), len(b))


class TestCaption:
    def test_one_image_scores_nothing(self) -> None:
        assert metrics.cider_d(["a man"], [["a man"]]) == (0.0, [0.0])

    def test_by_hand(self) -> None:
        # Two images; every word occurs in one of them, so each n-gram weighs ln 2 and the vectors are parallel
        # in the orders that both captions have: 1 and 2 of 4 are full, 3 and 4 empty.
        mean, each = metrics.cider_d(["red bus", "cat"], [["red bus"], ["two dogs"]])
        assert each == pytest.approx([5.0, 0.0])
        assert mean == pytest.approx(2.5)

    def test_length_penalty_counts_bigrams(self) -> None:
        scorer = metrics.CiderD.of([["red bus"], ["two dogs"]])
        # "red bus red bus": 1-grams parallel (clipped to the reference: half), bigrams "red bus" twice + "bus red".
        weight = math.log(2)
        unigrams = (2 * weight**2) / (math.sqrt(8) * weight * math.sqrt(2) * weight)
        rare = math.log(2)  # never seen: counted as if in one image
        bigrams = weight**2 / (math.sqrt(4 * weight**2 + rare**2) * weight)
        expected = 10 * math.exp(-(2**2) / 72) * (unigrams + bigrams) / 4
        assert scorer.score("red bus red bus", ["red bus"]) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("text", "tokens"),
        [
            ("A man's dog isn't there.", "a man 's dog is n't there"),
            ("They've come, haven't they?", "they 've come have n't they"),
            ("Two-way street; 3.5 meters!", "two-way street 3.5 meters"),
            ("(the) [red] 'bus'", "the red bus"),
            ("cannot see", "can not see"),
            ("", ""),
        ],
    )
    def test_ptb_lite(self, text: str, tokens: str) -> None:
        assert metrics.ptb_lite(text) == tokens

    def test_numbers_must_agree(self) -> None:
        with pytest.raises(ValueError, match="1 given for 2 images"):
            metrics.cider_d(["a"], [["a"], ["b"]])
        with pytest.raises(ValueError, match=r"references\[1\]"):
            metrics.cider_d(["a", "b"], [["a"], []])


class TestYesNo:
    @pytest.mark.parametrize(
        ("text", "pope", "mme"),
        [
            ("Nope", "yes", "no"),
            ("NO", "yes", "no"),
            ("maybe", "yes", "other"),
            ("Yes. There is no dog.", "yes", "yes"),
            ("There is, no doubt", "no", "other"),
            ("n", "yes", "no"),
            ("", "yes", "other"),
        ],
    )
    def test_labels(self, text: str, pope: str, mme: str) -> None:
        assert (metrics.pope_label(text), metrics.mme_label(text)) == (pope, mme)

    def test_figures_by_hand(self) -> None:
        # One answer of four is right; of three times yes one is; of two questions with yes one was found.
        figures = metrics.yes_no_figures(["yes", "yes", "yes", "no"], ["yes", "no", "no", "yes"])
        assert figures == metrics.YesNoFigures(0.25, 1 / 3, 0.5, 0.4, 0.75)

    def test_nothing_said_or_asked_divides_nothing(self) -> None:
        assert metrics.yes_no_figures(["no"], ["no"]) == metrics.YesNoFigures(1.0, 0.0, 0.0, 0.0, 0.0)
        with pytest.raises(ValueError, match="one for each"):
            metrics.yes_no_figures([], [])

    def test_mme_by_hand(self) -> None:
        answers = [
            ("OCR", "1", True),
            ("OCR", "1", True),
            ("OCR", "2", True),
            ("OCR", "2", False),
            ("code_reasoning", "1", True),
            ("code_reasoning", "1", True),
        ]
        # OCR: 3 of 4 answers, 1 of 2 images.
        assert metrics.mme_scores(answers) == {
            "perception": 125.0,
            "cognition": 200.0,
            "total": 325.0,
            "OCR": 125.0,
            "code_reasoning": 200.0,
        }


class TestNumbers:
    @pytest.mark.parametrize(
        ("prediction", "answer", "score"),
        [
            ("105", "100", 1.0),
            ("105.1", "100", 0.0),
            ("95", "100", 1.0),
            ("-95", "-100", 1.0),
            ("5%", "5", 0.0),
            ("5%", "0.05", 1.0),
            ("0", "0", 1.0),
            ("0.01", "0", 0.0),
            ("Blue", "blue", 1.0),
            ("blue bar", "blue", 0.0),
            ("%", "5", 0.0),
            ("", "", 1.0),
        ],
    )
    def test_relaxed(self, prediction: str, answer: str, score: float) -> None:
        assert metrics.relaxed_accuracy(prediction, answer) == score

    @pytest.mark.parametrize(
        ("prediction", "answers", "score"),
        [
            ("The area is 12.5 square meters.", ["12.5"], 1.0),
            ("12.499", ["12.5"], 1.0),
            ("12.49", ["12.5"], 0.0),
            ("x = 1,200", ["1200"], 1.0),
            ("1.2e3", ["1200"], 1.0),
            ("The capital is Paris", ["paris"], 1.0),
            ("The capital is Paris", ["London", "Paris"], 1.0),
            ("banana", ["a"], 0.0),
            ("so the answer is a here", ["a"], 1.0),
            ("", ["5"], 0.0),
        ],
    )
    def test_mmmu_open(self, prediction: str, answers: list[str], score: float) -> None:
        assert metrics.mmmu_open(prediction, answers) == score


class TestBoxes:
    @pytest.mark.parametrize(
        ("text", "box"),
        [
            ("[0.1, 0.2, 0.5, 0.6]", (0.1, 0.2, 0.5, 0.6)),
            ("It is at [10,20,30,40] and [1,2,3,4]", (10, 20, 30, 40)),
            ("<box>(100,200),(300,400)</box>", (100, 200, 300, 400)),
            ("<ref>dog</ref><box>[[5, 6, 7, 8]]</box>", (5, 6, 7, 8)),
            ("(0.5, 0.6, 0.1, 0.2)", (0.1, 0.2, 0.5, 0.6)),
            ("{<10><20><30><40>}", None),
            ("0.1, 0.2, 0.5, 0.6", None),
            ("[1, 2, 3]", None),
            ("", None),
        ],
    )
    def test_find(self, text: str, box: tuple[float, ...] | None) -> None:
        assert metrics.find_box(text) == (box and metrics.Box(*box))

    def test_overlap(self) -> None:
        square = metrics.Box(0, 0, 2, 2)
        assert metrics.intersection_over_union(square, square) == 1.0
        assert metrics.intersection_over_union(square, metrics.Box(0, 0, 2, 1)) == 0.5
        assert metrics.intersection_over_union(square, metrics.Box(2, 0, 3, 1)) == 0.0
        assert metrics.intersection_over_union(metrics.Box(1, 1, 1, 1), metrics.Box(1, 1, 1, 1)) == 0.0


class TestNamedFallbacks:
    def test_exact_and_contains(self) -> None:
        assert metrics.exact("The dog.", ["dog"]) == 1.0
        assert metrics.exact("a small dog", ["dog"]) == 0.0
        assert metrics.contains("a small dog", ["dog"]) == 1.0
        assert metrics.contains("a small doghouse", ["dog"]) == 0.0
        assert metrics.contains("red hot dog", ["red dog"]) == 0.0

    def test_nothing_matches_nothing(self) -> None:
        assert metrics.exact("", ["the"]) == metrics.contains("anything", ["the"]) == metrics.exact("", [""]) == 0.0
