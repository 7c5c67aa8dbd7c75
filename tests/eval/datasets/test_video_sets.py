"""Video data sets in their published layouts, and data of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mmfast.eval.datasets import task
from mmfast.eval.datasets.local import LETTER_ANSWER, SHORT_ANSWER
from mmfast.eval.metrics import Request, read_verdict, write_requests
from mmfast.eval.task import Outcome, Task
from mmfast.media import read_video

LayOut = Callable[..., Path]


def outcomes(asked: Task, predictions: Mapping[str, str]) -> list[Outcome]:
    samples = list(asked.samples())
    assert set(predictions) <= {sample.sample_id for sample in samples}
    texts = [predictions.get(sample.sample_id, "") for sample in samples]
    return [Outcome(sample, text, asked.score(sample, text)) for sample, text in zip(samples, texts, strict=True)]


def answered(asked: Task, predictions: Mapping[str, str]) -> dict[str, float]:
    return asked.summary(outcomes(asked, predictions))


class TestOpenQuestions:
    def test_msvd(self, lay_out: LayOut) -> None:
        root = lay_out("msvd_qa", "videos/mv89psg6zh4_33_46.avi")
        first, second = task("msvd-qa", root).samples()
        assert first.question == "what is a bird doing?" + SHORT_ANSWER
        assert first.video == root / "videos/mv89psg6zh4_33_46.avi"
        assert read_video(first.video, num_frames=2).frames.shape[0] == 2
        assert (first.category, second.category, first.cluster) == ("what", "who", "mv89psg6zh4_33_46")
        figures = answered(task("msvd-qa", root), {"v_mv89_0": "bathing", "v_mv89_1": "a Bird."})
        assert figures == {"accuracy": 50, "accuracy/what": 0, "accuracy/who": 100, "accuracy_exact": 50}

    def test_msvd_in_its_first_layout(self, lay_out: LayOut) -> None:
        root = lay_out("msvd_qa", "videos/mv89psg6zh4_33_46.avi")
        for name in ("test_q.json", "test_a.json"):
            (root / name).unlink()
        rows = [{"answer": "bird", "id": 3, "question": "who sings?", "video_id": 1301}]
        (root / "test_qa.json").write_text(json.dumps(rows))
        (root / "youtube_mapping.txt").write_text("other vid1\nmv89psg6zh4_33_46 vid1301\n")
        (sample,) = task("msvd-qa", root).samples()
        assert (sample.sample_id, sample.cluster, sample.answers) == ("3", "mv89psg6zh4_33_46", ("bird",))

    def test_msrvtt(self, lay_out: LayOut) -> None:
        root = lay_out("msrvtt_qa", "videos/video7010.mp4", "videos/video7011.mp4")
        given = {"158581": "They sit on a couch", "158582": "2"}
        assert answered(task("msrvtt-qa", root), given)["accuracy"] == 50
        contained = answered(task("msrvtt-qa", root, scoring="contains"), given)
        assert (contained["accuracy"], contained["accuracy_contains"]) == (100, 100)

    def test_activitynet(self, lay_out: LayOut) -> None:
        root = lay_out("activitynet_qa", "videos/v_1QIUV7WYKXg.mkv")
        asked = task("activitynet-qa", root)
        assert [sample.category for sample in asked.samples()] == ["yes/no", "color"]
        figures = answered(asked, {"v_1QIUV7WYKXg_3": "Yes", "v_1QIUV7WYKXg_4": "red"})
        assert (figures["accuracy/yes/no"], figures["accuracy/color"]) == (100, 0)

    def test_question_without_answer(self, lay_out: LayOut) -> None:
        root = lay_out("activitynet_qa", "videos/v_1QIUV7WYKXg.mkv")
        (root / "test_a.json").write_text('[{"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}]')
        with pytest.raises(ValueError, match=r"test_q.json, record 2: question 'v_1QIUV7WYKXg_4' has no answer"):
            list(task("activitynet-qa", root).samples())

    def test_judge(self, lay_out: LayOut) -> None:
        def judge(request: Request) -> str:
            assert request.question == "is the athlete wearing trousers?" or request.answer == "dark red"
            return "{'pred': 'yes', 'score': 4}" if request.answer == "yes" else "Hm."

        root = lay_out("activitynet_qa", "videos/v_1QIUV7WYKXg.mkv")
        asked = task("activitynet-qa", root, scoring="judge", judge=judge)
        figures = answered(asked, {"v_1QIUV7WYKXg_3": "He does", "v_1QIUV7WYKXg_4": "red"})
        # Half of all; all of those with a verdict.
        assert (figures["accuracy"], figures["accuracy_judge"], figures["accuracy_judged"]) == (50, 50, 100)
        assert (figures["judge_score"], figures["n_unjudged"]) == (4, 1)

    def test_replies_from_a_file(self, lay_out: LayOut, tmp_path: Path) -> None:
        root = lay_out("activitynet_qa", "videos/v_1QIUV7WYKXg.mkv")
        given = {"v_1QIUV7WYKXg_3": "He does"}
        plain = task("activitynet-qa", root)
        # The failed question is not judged.
        assert write_requests(plain.requests(outcomes(plain, given)), tmp_path / "requests.jsonl") == 1  # type: ignore[attr-defined]
        name = json.loads((tmp_path / "requests.jsonl").read_text())["sample_id"]
        reply = json.dumps({"sample_id": name, "reply": "{'pred': 'no', 'score': 1}"})
        (tmp_path / "replies.jsonl").write_text(reply)
        assert read_verdict(json.loads(reply)["reply"]) is not None
        judged = task("activitynet-qa", root, scoring="judge", replies=tmp_path / "replies.jsonl")
        figures = answered(judged, given)
        assert (figures["accuracy"], figures["judge_score"], figures["n_unjudged"]) == (0, 0.5, 0)

    @pytest.mark.parametrize("options", [{"scoring": "judge"}, {"replies": Path("x")}, {"judge": str}])
    def test_scoring_and_judge_go_together(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="must be scoring='judge' and one of them"):
            task("msvd-qa", **options)


class TestNextQa:
    MEDIA = ("NExTVideo/1104/4010069381.mp4", "NExTVideo/10057886514.mp4")

    def test_reads_and_sums_up(self, lay_out: LayOut) -> None:
        root = lay_out("next_qa", *self.MEDIA)
        first, _, last = task("next-qa", root).samples()
        assert first.question.startswith("why did the boy, in red, bend down\nA. to rest\nB. pick up the ball")
        assert (first.video, last.video) == (root / self.MEDIA[0], root / self.MEDIA[1])
        given = {"4010069381_0": "(B)", "4010069381_3": "he threw something then, I think", "10057886514_1": "A."}
        figures = answered(task("next-qa", root), given)
        assert figures["accuracy"] == pytest.approx(200 / 3)
        kinds = [figures[f"accuracy/{kind}"] for kind in ("causal", "temporal", "descriptive", "CW", "TN", "DL")]
        assert kinds == [100, 0, 100, 100, 0, 100]
        assert figures["n_unparsed"] == 1

    def test_bad_answer(self, lay_out: LayOut) -> None:
        root = lay_out("next_qa", *self.MEDIA)
        path = root / "test.csv"
        path.write_text(path.read_text().replace(",4,3,TN", ",5,3,TN"))
        with pytest.raises(ValueError, match=r"test.csv:3: answer is '5'; it must be a whole number from 0 to 4"):
            list(task("next-qa", root).samples())


def test_egoschema(lay_out: LayOut) -> None:
    root = lay_out("egoschema", "videos/0074f737.mp4")
    (sample,) = task("egoschema", root).samples()
    assert (sample.answers, sample.choices[3]) == (("D",), "C sews.")
    # C is what the wearer of the camera is called.
    given = {"0074f737": "D. C sews."}
    assert answered(task("egoschema", root), given)["accuracy"] == 100
    assert answered(task("egoschema", root, parser="mmmu_style"), given)["accuracy"] == 0


class TestMvBench:
    MEDIA = ("video/star/Charades_v1_480/ZS9XR.mp4", "video/perception/videos/video_1.mp4")

    def lay(self, lay_out: LayOut, abilities: tuple[str, ...] = ()) -> Path:
        frames = [f"video/tvqa/frames_fps3_hq/castle_s01/{number:05d}.jpg" for number in range(1, 13)]
        return lay_out("mvbench", *self.MEDIA, *frames)

    def test_bounds(self, lay_out: LayOut) -> None:
        root = self.lay(lay_out)
        (sample,) = task("mvbench", root, split="action_sequence").samples()
        assert (sample.start, sample.end, sample.video) == (0.2, 0.6, root / self.MEDIA[0])
        options = "(A) Ate the medicine.\n(B) Tidied up the blanket.\n(C) Put down the cup.\n"
        assert options + "Only give the best option." in sample.question

    def test_clips_that_are_cut_already_have_no_bounds(self, lay_out: LayOut) -> None:
        root = self.lay(lay_out)
        cut = root / "video/star/Charades_segment/ZS9XR.mp4"
        cut.parent.mkdir()
        (root / self.MEDIA[0]).rename(cut)
        (sample,) = task("mvbench", root, split="action_sequence").samples()
        assert (sample.start, sample.end, sample.video) == (0.0, None, cut)

    def test_folders_of_pictures(self, lay_out: LayOut) -> None:
        root = self.lay(lay_out)
        (sample,) = task("mvbench", root, split="episodic_reasoning").samples()
        # Three a second from second 1 to 3.
        assert (sample.video, len(sample.frames), sample.frames_per_second) == (None, 6, 3.0)
        (fewer,) = task("mvbench", root, split="episodic_reasoning", frames=4).samples()
        assert (len(fewer.frames), fewer.frames_per_second) == (4, 2.0)

    def test_pictures_are_read_only_when_asked_about(self, lay_out: LayOut) -> None:
        root = self.lay(lay_out)
        for picture in (root / "video/tvqa/frames_fps3_hq/castle_s01").iterdir():
            picture.write_bytes(b"no picture")
        (sample,) = task("mvbench", root, split="episodic_reasoning").samples()
        assert len(sample.frames) == 6

    def test_folders_of_pictures_outside_are_refused(self, lay_out: LayOut) -> None:
        root = self.lay(lay_out)
        path = root / "json/episodic_reasoning.json"
        path.write_text(path.read_text().replace('"castle_s01"', '"../frames_fps3_hq/castle_s01"'))
        with pytest.raises(ValueError, match=r"episodic_reasoning.json, record 1: .* leads out of"):
            list(task("mvbench", root, split="episodic_reasoning").samples())

    def test_mean_over_abilities_counts_failed_questions(
        self, lay_out: LayOut, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mmfast.eval.datasets import mvbench

        root = self.lay(lay_out)
        known = {name: mvbench._PLACES[name] for name in ("action_sequence", "action_count")}
        monkeypatch.setattr(mvbench, "_PLACES", known)
        figures = answered(task("mvbench", root), {"action_sequence/1": "(A) Ate", "action_count/1": "B"})
        assert (figures["accuracy"], figures["accuracy_plain"]) == (75, pytest.approx(200 / 3))
        assert (figures["accuracy/action_count"], figures["n_unparsed"]) == (50, 1)

    def test_a_missing_ability_is_not_left_out(self, lay_out: LayOut) -> None:
        with pytest.raises(FileNotFoundError, match=r"json/<ability>\.json"):
            list(task("mvbench", self.lay(lay_out)).samples())

    def test_answer_that_is_no_option(self, lay_out: LayOut) -> None:
        root = self.lay(lay_out)
        path = root / "json/action_count.json"
        path.write_text(path.read_text().replace('"answer": "2"', '"answer": "7"'))
        with pytest.raises(ValueError, match=r"action_count.json, record 1: answer is '7'"):
            list(task("mvbench", root, split="action_count").samples())


class TestVideoMme:
    MEDIA = ("data/fFjv93ACGo8.mp4", "data/zzzz.mp4")

    def test_reads_and_sums_up(self, lay_out: LayOut) -> None:
        root = lay_out("video_mme", *self.MEDIA)
        first = next(task("video-mme", root).samples())
        assert first.choices == ("One.", "Two.", "Three.", "Four.")
        assert first.question.endswith("\nA. One.\nB. Two.\nC. Three.\nD. Four.\nThe best answer is:")
        assert "(A, B, C, or D)" in first.question
        figures = answered(task("video-mme", root), {"001-1": "C", "001-2": "(A)", "601-1": "A"})
        assert figures["accuracy"] == pytest.approx(200 / 3)
        assert (figures["accuracy/short"], figures["accuracy/long"]) == (100, 0)
        assert figures["accuracy/task_type/Counting Problem"] == 50
        assert figures["accuracy/domain/Knowledge"] == 100
        assert len(list(task("video-mme", root, split="long").samples())) == 1

    def test_subtitles(self, lay_out: LayOut) -> None:
        root = lay_out("video_mme", *self.MEDIA)
        first, _, last = task("video-mme", root, subtitles=True).samples()
        said = "This video's subtitles are listed below:\nGood evening.\nLight the\ncandles.\nSelect the best"
        assert first.question.startswith(said)
        assert "video and the subtitles. Respond" in first.question
        assert last.question.startswith("Select the best answer")

    def test_subtitles_that_were_not_unpacked(self, lay_out: LayOut) -> None:
        root = lay_out("video_mme", *self.MEDIA)
        (root / "subtitle/fFjv93ACGo8.srt").unlink()
        (root / "subtitle").rmdir()
        with pytest.raises(FileNotFoundError, match="there is no folder subtitle"):
            list(task("video-mme", root, subtitles=True).samples())


class TestMlvu:
    MEDIA = ("video/1_plotQA/movie101_66.mp4", "video/4_count/count_1.mp4")

    def test_mean_over_kinds(self, lay_out: LayOut) -> None:
        from mmfast.eval.datasets.mlvu import Mlvu

        root = lay_out("mlvu", *self.MEDIA)
        plot, count = (task("mlvu", root, split=kind) for kind in ("plotQA", "count"))
        found = outcomes(plot, {"plotQA/1": "(A)", "plotQA/2": "(B)"}) + outcomes(count, {"count/1": "B)"})
        figures = Mlvu(split="dev").summary(found)
        assert (figures["accuracy"], figures["accuracy_plain"]) == (75, pytest.approx(200 / 3))
        assert (figures["accuracy/plotQA"], figures["accuracy/count"]) == (50, 100)

    def test_a_missing_kind_is_not_left_out(self, lay_out: LayOut) -> None:
        with pytest.raises(FileNotFoundError, match=r"json/<number>_<kind>\.json"):
            list(task("mlvu", lay_out("mlvu", *self.MEDIA)).samples())


def test_longvideobench(lay_out: LayOut) -> None:
    root = lay_out("longvideobench", "videos/86CxyhFV9MI.mp4", "videos/abc.mp4")
    first, second = task("longvideobench", root).samples()
    assert first.question.endswith("\nD. a sign" + LETTER_ANSWER)
    assert (first.answers, second.answers, len(second.choices)) == (("B",), ("E",), 5)
    # The tool reads the A of "Answer".
    figures = answered(task("longvideobench", root), {"86CxyhFV9MI_0": "The answer is B", "abc_0": "Answer: E"})
    assert (figures["accuracy"], figures["accuracy/15 s"], figures["accuracy/T3O"]) == (50, 100, 0)
    other = task("longvideobench", root, parser="priority_extract")
    assert answered(other, {"abc_0": "Answer: E"})["accuracy/3600 s"] == 100


class TestOwn:
    MEDIA = ("sign.png", "lamp.png", "clip.mp4")

    def test_reads_and_sums_up(self, lay_out: LayOut) -> None:
        root = lay_out("own", *self.MEDIA)
        sign, pair, clip, words = task("own", root).samples()
        assert (sign.images, sign.answers) == ((root / "sign.png",), ("stop", "stop sign"))
        assert (len(pair.images), pair.answers) == (2, ("A",))
        assert (clip.video, clip.images, clip.start, clip.end) == (root / "clip.mp4", (), 0.2, 0.6)
        assert clip.answers == ("B",)
        assert (words.images, words.video) == ((), None)
        figures = answered(task("own", root), {"sign": "Stop.", "pair": "A. a street", "clip": "A", "words": "Two"})
        assert figures == {"accuracy": 75, "accuracy/choice": 50, "accuracy/text": 100, "n_unparsed": 0}

    def test_csv(self, lay_out: LayOut) -> None:
        root = lay_out("own", *self.MEDIA)
        (root / "mine.csv").write_text(
            "media,question,answer,choices\nsign.png,What?,B,a cat | a dog\nlamp.png,Who?,,\n"
        )
        samples = task("own", root, table="mine.csv", limit=1).samples()
        assert next(samples).choices == ("a cat", "a dog")
        with pytest.raises(ValueError, match=r"mine.csv:3: answer is missing"):
            list(task("own", root, table="mine.csv").samples())

    @pytest.mark.parametrize(
        ("record", "problem"),
        [
            ({"media": "sign.png", "question": "?", "choices": ["x", "y"], "answer": "C"}, "one of AB"),
            ({"media": "sign.png", "question": "?", "answer": []}, "answer is missing"),
            ({"media": ["sign.png", "clip.mp4"], "question": "?", "answer": "x"}, "one video, or images"),
            ({"media": "clip.mp4", "question": "?", "answer": "x", "start": 2, "end": 1}, "later than start"),
            ({"media": "data.jsonl", "question": "?", "answer": "x"}, "media: "),
            ({"media": "sign.png", "answer": "x"}, "question is missing"),
        ],
    )
    def test_bad_record(self, lay_out: LayOut, record: dict[str, Any], problem: str) -> None:
        root = lay_out("own", *self.MEDIA)
        good = {"question": "?", "answer": "x"}
        (root / "data.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(record)}\n")
        with pytest.raises(ValueError) as error:
            list(task("own", root).samples())
        assert f"{root / 'data.jsonl'}:2: " in str(error.value)
        assert problem in str(error.value)

    def test_ids_are_unique(self, lay_out: LayOut) -> None:
        root = lay_out("own", *self.MEDIA)
        (root / "data.jsonl").write_text('{"id": 1, "question": "?", "answer": "x"}\n' * 2)
        with pytest.raises(ValueError, match=r"data.jsonl:2: id '1' was there before"):
            list(task("own", root).samples())
