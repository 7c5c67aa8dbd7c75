"""Image data sets in their published layouts: what is read, what answers score, what the summary says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfast.eval.datasets import task
from mmfast.eval.datasets.local import LETTER_ANSWER, SHORT_ANSWER
from mmfast.eval.task import Outcome, Task

LayOut = Callable[..., Path]


def answered(asked: Task, predictions: Mapping[str, str]) -> dict[str, float]:
    """Summarise the answers given by sample; questions without one failed."""
    samples = list(asked.samples())
    assert set(predictions) <= {sample.sample_id for sample in samples}
    texts = [predictions.get(sample.sample_id, "") for sample in samples]
    return asked.summary(
        [Outcome(sample, text, asked.score(sample, text)) for sample, text in zip(samples, texts, strict=True)]
    )


class TestVqaV2:
    PICTURES = ("val2014/COCO_val2014_000000000007.jpg", "val2014/COCO_val2014_000000000012.jpg")

    def test_reads(self, lay_out: LayOut) -> None:
        root = lay_out("vqav2", *self.PICTURES)
        first, _, last = task("vqav2", root).samples()
        assert (first.sample_id, first.question) == ("7000", "Is the square red?" + SHORT_ANSWER)
        assert first.answers == ("yes",) * 10
        assert last.images == (root / self.PICTURES[1],)
        assert (last.category, last.cluster) == ("other", "12")

    def test_summary(self, lay_out: LayOut) -> None:
        root = lay_out("vqav2", *self.PICTURES)
        given = {"7000": "Yes", "7001": "three", "12000": "Blue."}
        # 1.0, two matches of ten, 1.0; the official rule compares the first one raw.
        figures = answered(task("vqav2", root), given)
        assert figures["accuracy"] == pytest.approx(100 * (1 + 0.6 + 1) / 3)
        assert figures["accuracy/yes/no"] == pytest.approx(100)
        assert figures["accuracy/number"] == pytest.approx(60)
        assert figures["accuracy/question/how many"] == pytest.approx(60)
        official = answered(task("vqav2", root, rule="vqa_official"), given)
        assert official["accuracy"] == pytest.approx(100 * (0 + 0.6 + 1) / 3)

    def test_question_without_annotation(self, lay_out: LayOut) -> None:
        root = lay_out("vqav2", *self.PICTURES)
        path = root / "v2_mscoco_val2014_annotations.json"
        content = json.loads(path.read_text())
        content["annotations"].pop()
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"questions.json, record 3: question 12000 has no answers"):
            list(task("vqav2", root).samples())


class TestGqa:
    def test_reads_and_sums_up(self, lay_out: LayOut) -> None:
        root = lay_out("gqa", "images/n1.jpg", "images/n2.jpg")
        samples = list(task("gqa", root).samples())
        assert [sample.category for sample in samples] == ["binary", "open", "open"]
        figures = answered(task("gqa", root), {"101": "Yes.", "102": "The cup", "103": "WHITE"})
        assert figures == pytest.approx({"accuracy": 200 / 3, "accuracy/binary": 100, "accuracy/open": 50})

    def test_punctuation(self, lay_out: LayOut) -> None:
        root = lay_out("gqa", "images/n1.jpg", "images/n2.jpg")
        given = {"102": "cup!"}
        assert answered(task("gqa", root), given)["accuracy/open"] == 0
        assert answered(task("gqa", root, punctuation=True), given)["accuracy/open"] == 50


class TestTextVqa:
    def test_reads_and_sums_up(self, lay_out: LayOut) -> None:
        root = lay_out("textvqa", "train_images/aa01.jpg", "train_images/aa02.jpg")
        first, second = task("textvqa", root).samples()
        assert first.images == (root / "train_images/aa01.jpg",)
        assert second.question == "what is the number?" + SHORT_ANSWER
        assert answered(task("textvqa", root), {"34602": "STOP", "34603": "42"})["accuracy"] == pytest.approx(95)

    def test_ocr_tokens_are_in_the_export_alone(self, lay_out: LayOut, tmp_path: Path) -> None:
        root = lay_out("textvqa", "train_images/aa01.jpg", "train_images/aa02.jpg")
        with pytest.raises(ValueError, match="no field 'ocr_tokens'"):
            list(task("textvqa", root, ocr_tokens=True).samples())
        Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
        row = {"image_id": "x", "question_id": 1, "question": "what?", "image": "x.png", "answers": ["a"] * 10}
        (tmp_path / "validation.jsonl").write_text(json.dumps(row | {"ocr_tokens": ["STOP", "42"]}))
        (sample,) = task("textvqa", tmp_path, ocr_tokens=True).samples()
        assert sample.question == "what?\nReference OCR token: STOP, 42" + SHORT_ANSWER


class TestPope:
    PICTURES = ("val2014/COCO_val2014_000000000001.jpg", "val2014/COCO_val2014_000000000002.jpg")

    def test_reads(self, lay_out: LayOut) -> None:
        root = lay_out("pope", *self.PICTURES)
        samples = list(task("pope", root).samples())
        assert len(samples) == 12
        assert samples[0].sample_id == "random/1"
        assert samples[0].answers == ("yes",)
        assert {sample.category for sample in task("pope", root, split="popular").samples()} == {"popular"}

    def test_summary(self, lay_out: LayOut) -> None:
        root = lay_out("pope", *self.PICTURES)
        given = {f"random/{n}": word for n, word in enumerate(("Yes", "No.", "yes, a cat", "There is not"), 1)}
        given |= {f"popular/{n}": "Yes" for n in range(1, 5)}
        # adversarial: one right yes, one wrong yes, two failed.
        given |= {"adversarial/1": "yes", "adversarial/2": "maybe"}
        figures = answered(task("pope", root), given)
        assert figures["f1/random"] == 100
        assert figures["f1/popular"] == pytest.approx(200 / 3)
        assert figures["f1/adversarial"] == pytest.approx(50)
        assert next(iter(figures)) == "f1"
        assert figures["f1"] == pytest.approx((100 + 200 / 3 + 50) / 3)
        assert figures["accuracy"] == pytest.approx((100 + 50 + 25) / 3)
        assert figures["yes_ratio"] == pytest.approx((50 + 100 + 50) / 3)

    def test_other_reading_takes_bare_words_alone(self, lay_out: LayOut) -> None:
        root = lay_out("pope", *self.PICTURES)
        asked = task("pope", root, reading="lmms_eval")
        sample = next(asked.samples())
        assert asked.score(sample, "YES ").score == 1.0
        assert asked.score(sample, "yes, a dog").score == 0.0

    def test_a_missing_kind_is_not_left_out(self, lay_out: LayOut) -> None:
        root = lay_out("pope", *self.PICTURES)
        (root / "coco_pope_popular.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"coco_pope_<kind>\.json"):
            list(task("pope", root).samples())


class TestMme:
    def test_both_layouts(self, lay_out: LayOut) -> None:
        root = lay_out("mme", "existence/images/000000006040.jpg", "code_reasoning/0001.png", "code_reasoning/0002.jpg")
        first, second = task("mme", root, split="existence").samples()
        assert first.question == "Is there a train in this image?" + SHORT_ANSWER
        assert (first.answers, second.answers, first.cluster == second.cluster) == (("yes",), ("no",), True)
        given = {
            "code_reasoning/0001/1": "Yes",
            "code_reasoning/0001/2": "no, it prints 3",
            "code_reasoning/0002/1": "yes",
            "code_reasoning/0002/2": "I cannot tell",
        }
        figures = answered(task("mme", root, split="code_reasoning"), given)
        # 3 of 4 answers and 1 of 2 pairs; the headline is that of the abilities asked about.
        assert next(iter(figures)) == "cognition"
        assert figures == {"perception": 0, "cognition": 125.0, "total": 125.0, "code_reasoning": 125.0}

    @pytest.mark.parametrize(
        ("split", "metric", "chance"),
        [("all", "perception", 750), ("cognition", "cognition", 300), ("OCR", "perception", 75)],
    )
    def test_headline_and_chance_follow_the_split(self, split: str, metric: str, chance: float) -> None:
        asked = task("mme", "mme", split=split)
        assert (asked.metric, asked.chance) == (metric, chance)

    def test_a_missing_ability_is_not_left_out(self, lay_out: LayOut) -> None:
        root = lay_out("mme", "existence/images/000000006040.jpg")
        with pytest.raises(FileNotFoundError, match=r"count: there is no such folder"):
            list(task("mme", root).samples())

    def test_line_without_tab(self, lay_out: LayOut) -> None:
        root = lay_out("mme", "existence/images/000000006040.jpg")
        (root / "existence/questions_answers_YN/000000006040.txt").write_text("Is it?\tYes\nIs it not? No\n")
        with pytest.raises(ValueError, match=r"000000006040.txt:2: must be a question and an answer with a tab"):
            list(task("mme", root, split="existence").samples())


class TestMmBench:
    def test_reads_the_rotations_of_the_file(self, lay_out: LayOut) -> None:
        samples = list(task("mmbench", lay_out("mmbench")).samples())
        assert [sample.sample_id for sample in samples] == ["3", "8", "1000003", "1000008", "2000003"]
        hinted = "The clock\tshows noon.\nIs it day or night?\nA. day\nB. night" + LETTER_ANSWER
        assert samples[1].question == hinted
        # The pictures of rotations are those of their questions.
        red, white = samples[2].images[0], samples[3].images[0]
        assert isinstance(red, Image.Image)
        assert isinstance(white, Image.Image)
        assert (red.getpixel((0, 0)), white.getpixel((0, 0))) == ((255, 0, 0), (255, 255, 255))

    def test_makes_the_same_rotations_where_the_file_has_none(self, lay_out: LayOut) -> None:
        root = lay_out("mmbench")
        full = {sample.sample_id: sample for sample in task("mmbench", root).samples()}
        path = root / "mmbench_dev_20230712.tsv"
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "00000" not in line[:7]))
        made = {sample.sample_id: sample for sample in task("mmbench", root).samples()}
        assert set(made) == set(full)
        for name, sample in made.items():
            assert (sample.question, sample.answers) == (full[name].question, full[name].answers)

    def test_counts_only_what_is_right_in_every_rotation(self, lay_out: LayOut) -> None:
        asked = task("mmbench", lay_out("mmbench"))
        given = {"3": "A", "1000003": "C. red", "2000003": "C", "8": "(A)", "1000008": "The answer is day."}
        figures = answered(asked, given)
        assert figures == {
            "accuracy": 50.0,
            "accuracy_plain": 100.0,
            "accuracy/attribute_reasoning": 100.0,
            "accuracy/attribute_recognition": 0.0,
            "n_unparsed": 0.0,
            "n_incomplete": 0.0,
        }
        assert answered(asked, given | {"2000003": "it is red"})["accuracy"] == 100.0
        assert answered(asked, {"3": "A"})["n_unparsed"] == 4

    def test_questions_without_all_rotations_are_counted(self, lay_out: LayOut) -> None:
        asked = task("mmbench", lay_out("mmbench"))
        samples = [sample for sample in asked.samples() if sample.sample_id != "2000003"]
        figures = asked.summary([Outcome(one, one.answers[0], asked.score(one, one.answers[0])) for one in samples])
        assert (figures["accuracy"], figures["n_incomplete"]) == (100.0, 1.0)

    def test_limit_counts_questions(self, lay_out: LayOut) -> None:
        samples = list(task("mmbench", lay_out("mmbench"), limit=1).samples())
        assert [sample.sample_id for sample in samples] == ["3", "1000003", "2000003"]

    def test_each_once(self, lay_out: LayOut) -> None:
        asked = task("mmbench", lay_out("mmbench"), circular=False)
        assert answered(asked, {"3": "A"})["accuracy"] == 50.0
        assert (asked.chance, task("mmbench", "mmbench").chance) == (25.0, 0.4)

    def test_bad_answer(self, lay_out: LayOut) -> None:
        root = lay_out("mmbench")
        path = root / "mmbench_dev_20230712.tsv"
        path.write_text(path.read_text().replace("\tB\tattribute_reasoning", "\tD\tattribute_reasoning"))
        with pytest.raises(ValueError, match=r"mmbench_dev_20230712.tsv:5: answer is 'D'; it must be one of A, B"):
            list(task("mmbench", root).samples())


class TestScienceQa:
    PICTURES = ("images/test/11/image.png", "images/test/13/image.png")

    def test_reads(self, lay_out: LayOut) -> None:
        root = lay_out("scienceqa", *self.PICTURES)
        first, second = task("scienceqa", root).samples()
        lines = "Context: Mammals have fur.\nWhich is a mammal?\nA. cat\nB. frog"
        assert first.question == lines + LETTER_ANSWER
        assert (second.sample_id, second.answers, second.category) == ("13", ("B",), "social science")
        words = [sample for sample in task("scienceqa", root, images_only=False).samples() if not sample.images]
        assert [sample.sample_id for sample in words] == ["12"]

    def test_summary(self, lay_out: LayOut) -> None:
        root = lay_out("scienceqa", *self.PICTURES)
        figures = answered(task("scienceqa", root), {"11": "A", "13": "Oslo"})
        assert (figures["accuracy"], figures["n_unparsed"]) == (50.0, 1.0)

    def test_split_names_an_unknown_problem(self, lay_out: LayOut) -> None:
        root = lay_out("scienceqa", *self.PICTURES)
        (root / "pid_splits.json").write_text('{"test": ["11", "99"]}')
        with pytest.raises(ValueError, match=r"pid_splits.json: test names '99'"):
            list(task("scienceqa", root).samples())


class TestSeed:
    PICTURES = ("SEED-Bench-image/1454426_25911", "SEED-Bench-image/77_1", "SEED-Bench-video-image/10_v10.png")

    def lay(self, lay_out: LayOut) -> Path:
        # The published pictures have no suffix.
        root = lay_out("seed", *(f"{name}.png" for name in self.PICTURES[:2]), self.PICTURES[2])
        for name in self.PICTURES[:2]:
            (root / f"{name}.png").rename(root / name)
        return root

    def test_reads_and_sums_up(self, lay_out: LayOut) -> None:
        root = self.lay(lay_out)
        samples = list(task("seed", root).samples())
        assert [sample.category for sample in samples] == ["Instances Counting", "Scene Understanding"]
        given = {"101669": "B", "101670": "(A)", "v10": "D. Pouring"}
        figures = answered(task("seed", root, split="all"), given)
        assert figures["accuracy"] == pytest.approx(200 / 3)
        assert (figures["accuracy/image"], figures["accuracy/video"]) == (50.0, 100.0)
        assert (figures["accuracy/Action Recognition"], figures["n_unparsed"]) == (100.0, 1.0)


class TestMmmu:
    PICTURES = tuple(f"images/validation_{name}.png" for name in ("Art_1_1", "Art_2_1", "Art_2_2", "Math_1_1"))

    def test_reads(self, lay_out: LayOut) -> None:
        root = lay_out("mmmu", *self.PICTURES)
        art, shown, maths = task("mmmu", root).samples()
        assert art.question == "Who painted <image 1>?\nA. Monet\nB. Degas\nC. Klee\nD. Miro" + LETTER_ANSWER
        # In the order in which the text names them.
        assert shown.images == (root / self.PICTURES[2], root / self.PICTURES[1])
        assert (maths.choices, maths.answers, maths.category) == ((), ("12.5",), "Math")

    def test_mean_over_subjects(self, lay_out: LayOut) -> None:
        root = lay_out("mmmu", *self.PICTURES)
        given = {"validation_Art_1": "(C)", "validation_Art_2": "none", "validation_Math_1": "So it is 12.50"}
        figures = answered(task("mmmu", root), given)
        assert figures["accuracy"] == 75.0
        assert figures["accuracy_plain"] == pytest.approx(200 / 3)
        assert (figures["accuracy/Art"], figures["accuracy/Math"], figures["n_unparsed"]) == (50.0, 100.0, 1.0)

    def test_guesses_only_where_asked_and_only_for_an_answer(self, lay_out: LayOut) -> None:
        root = lay_out("mmmu", *self.PICTURES)
        plain, guessing = task("mmmu", root), task("mmmu", root, unparsed="guess")
        sample = next(guessing.samples())
        assert plain.score(sample, "no idea").parsed == ""
        scored = guessing.score(sample, "no idea")
        assert scored.parsed in tuple("ABCD")
        assert scored == guessing.score(sample, "no idea")
        assert scored.details["unparsed"] == 1.0
        assert guessing.score(sample, " ").parsed == ""

    @pytest.mark.parametrize("options", ["[1, 2", "__import__('os')", "[1, 2]", "[]"])
    def test_bad_options(self, lay_out: LayOut, options: str) -> None:
        root = lay_out("mmmu", *self.PICTURES)
        path = root / "Art/validation.jsonl"
        path.write_text(path.read_text().replace("['Monet', 'Degas', 'Klee', 'Miro']", options))
        with pytest.raises(ValueError, match=r"validation.jsonl:1: options"):
            list(task("mmmu", root).samples())


class TestDocVqa:
    def test_reads_and_sums_up(self, lay_out: LayOut) -> None:
        root = lay_out("docvqa", "documents/p1.png")
        asked = task("docvqa", root)
        assert [sample.cluster for sample in asked.samples()] == ["1", "1"]
        figures = answered(asked, {"49153": "1200.50", "49154": "Phillip Morris Inc."})
        assert figures["anls"] == pytest.approx(50 * (1 + 13 / 19))
        assert figures["anls/form"] == pytest.approx(100 * 13 / 19)


class TestChartQa:
    def test_reads_and_sums_up(self, lay_out: LayOut) -> None:
        root = lay_out("chartqa", "test/png/41699051005347.png", "test/png/two_col_101.png")
        asked = task("chartqa", root)
        question = "How many bars are there?\nAnswer the question with a single word."
        assert next(asked.samples()).question == question
        figures = answered(asked, {"human/1": "15", "human/2": "blue", "augmented/1": "24"})
        # 15 is 7 % off, 24 is 2 % off.
        expected = {
            "relaxed_accuracy": 200 / 3,
            "relaxed_accuracy/augmented": 100.0,
            "relaxed_accuracy/human": 50.0,
        }
        assert figures == pytest.approx(expected)


class TestCocoCaption:
    PICTURES = ("val2014/COCO_val2014_000000391895.jpg", "val2014/COCO_val2014_000000060623.jpg")

    def test_reads(self, lay_out: LayOut) -> None:
        root = lay_out("coco_caption", *self.PICTURES)
        assert [sample.sample_id for sample in task("coco-caption", root).samples()] == ["391895", "60623"]
        (official,) = task("coco-caption", root, split="val2014").samples()
        assert official.answers == ("A man riding a horse on the beach.", "A person rides a horse.")

    def test_summary_is_the_mean_of_all_scores(self, lay_out: LayOut) -> None:
        asked = task("coco-caption", lay_out("coco_caption", *self.PICTURES))
        samples = list(asked.samples())
        captions = ["A man riding a horse on the beach!", "two cats"]
        scored = [asked.score(sample, text) for sample, text in zip(samples, captions, strict=True)]
        figures = answered(asked, dict(zip(["391895", "60623"], captions, strict=True)))
        assert figures == pytest.approx({"cider": 50 * (scored[0].score + scored[1].score)})
        assert scored[0].score > 4
        assert 0 < scored[1].score < 1


class TestRefCoco:
    PICTURE = "train2014/COCO_train2014_000000000009.jpg"

    def test_scales(self, lay_out: LayOut) -> None:
        root = lay_out("refcoco", self.PICTURE, size=(80, 60))
        given = {
            "unit": "[0.0, 0.0, 0.5, 0.66]",
            "thousand": "<box>(0,0),(500,660)</box>",
            "pixels": "[0, 0, 40, 40]",
            # The square is 80 wide; the picture lies 10 below its top.
            "padded": "[0.0, 0.125, 0.5, 0.625]",
        }
        for scale, text in given.items():
            asked = task("refcoco", root, scale=scale)
            scored = asked.score(next(asked.samples()), text)
            assert scored.score == 1.0
            assert scored.details["iou"] == pytest.approx(1.0, abs=0.02)

    def test_summary(self, lay_out: LayOut) -> None:
        root = lay_out("refcoco", self.PICTURE, size=(80, 60))
        given = {"refcoco/val/1": "[0, 0, 40, 20]", "refcoco/val/2": "on the right"}
        figures = answered(task("refcoco", root, scale="pixels"), given)
        # Half of the box is just enough.
        assert figures == pytest.approx({"accuracy": 50.0, "iou": 25.0, "n_unparsed": 1.0})

    def test_splits_belong_to_variants(self) -> None:
        with pytest.raises(ValueError, match="split='testA': must be one of val, test"):
            task("refcoco", variant="refcocog", split="testA")

    @pytest.mark.parametrize(("bbox", "problem"), [([1, 2, 3], "list of 4 numbers"), ([5, 5, 5, 9], "have an area")])
    def test_bad_box(self, lay_out: LayOut, bbox: list[Any], problem: str) -> None:
        root = lay_out("refcoco", self.PICTURE)
        (root / "refcoco_val.jsonl").write_text(
            json.dumps({"image": self.PICTURE, "sent": "x", "bbox": bbox, "height": 6, "width": 8})
        )
        with pytest.raises(ValueError, match=rf"refcoco_val.jsonl:1: bbox is .*{problem}"):
            list(task("refcoco", root).samples())
