"""The page of a comparison, the figures on it, and which drawing belongs where."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmfast.adapters import prepare
from mmfast.budget import LanguageShape
from mmfast.cli import main
from mmfast.cli.common import Media
from mmfast.cli.drawings import LIMIT, View, as_seen, drawings, shown_frames
from mmfast.cli.figures import as_json, figures, memory_note
from mmfast.cli.html import page
from mmfast.cli.patches import patches, time_line
from mmfast.compare import PlanComparison, PlanRun
from mmfast.report import Comparison, LayerWork, MediaRecord, Report, Timing
from mmfast.tokens import Layout
from support.pages import Tags, assert_self_contained

SHAPE = LanguageShape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=2, head_dim=4)
UNCUT = SimpleNamespace()


def record(layout: Layout, kept: list[int] | None = None) -> MediaRecord:
    indices = torch.arange(len(layout)) if kept is None else torch.tensor(kept)
    return MediaRecord(0, layout.modality, len(layout), len(indices), len(indices), indices, indices, layout)


def report(plan: str, *records: MediaRecord, **values: int) -> Report:
    entered = sum(item.entered for item in records)
    layers = [[entered + 3] * SHAPE.layers]
    work = [[LayerWork(count, count, count) for count in row] for row in layers]
    return Report(plan, "Model", SHAPE, list(records), [3], work, kv_bytes=1000 * entered, **values)


def comparison(*totals: float, peaks: tuple[int, ...] = (0, 0, 0)) -> PlanComparison:
    layout = Layout.grid(2, 2)
    plans = (("full", None), ("uniform(keep=2)", [0, 2]), ("pool2d(keep=1)", [0]))
    runs = [
        PlanRun(
            plan, Timing(total / 2, 0.1, total, 3), report(plan, record(layout, kept)), torch.zeros(1, 3), 1.0, peak
        )
        for (plan, kept), total, peak in zip(plans, totals, peaks, strict=False)
    ]
    return PlanComparison(tuple(runs), "sdpa attention, float32", 3)


def small_page(result: PlanComparison, answer: str = "red", question: str = "what?") -> str:
    media = Media(("a.png",), (Image.new("RGB", (20, 20), "white"),))
    return page(result, [answer] * len(result.runs), media, UNCUT, question, "Model")


def test_compare_writes_a_page_that_needs_nothing_else(
    capsys: pytest.CaptureFixture[str], media: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    plans = ("--plan", "divprune(keep=64)", "--plan", "divprune(keep=128) + pyramiddrop()")
    words = ("what <b>color</b> is the ring?", "--repeats", "1", "--max-new-tokens", "4", "--frames", "2")
    assert main(["compare", str(media / "clip.mp4"), *words, *plans, "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().err
    content = out.read_text()
    tags = assert_self_contained(content)
    assert not tags.named("b")
    # Every picture is held once, and shown by each of the three plans.
    held = [str(image["id"]) for image in tags.named("image")]
    assert held == ["picture-0", "picture-1"]
    assert [use["href"] for use in tags.named("use")] == [f"#{name}" for name in held] * 3
    for text in ("clip.mp4 (2 frames)", "sdpa attention, float32", "transformers 5.", "the embedded demo model"):
        assert text in content


def test_everything_foreign_is_escaped() -> None:
    evil = "</title><script>alert('x')</script>\"&"
    content = small_page(comparison(1.0, 0.5), answer=evil, question=evil)
    assert_self_contained(content)
    assert "alert('x')" not in content
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;" in content


def test_slower_plans_are_marked_and_faster_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever the sentence says, its figure decides.
    for said in (Comparison.verdict, lambda *_, **__: "SLOWER or not"):
        monkeypatch.setattr(Comparison, "verdict", said)
        content = small_page(comparison(1.0, 0.5, 2.0))
        marked = re.findall(r'<p class="verdict( slow)?">([^:]+):', content)
        assert marked == [("", "uniform(keep=2)"), (" slow", "pool2d(keep=1)")]


def test_merging_is_not_called_dropping() -> None:
    sections = small_page(comparison(1.0, 0.5, 2.0)).split("<section>")
    assert ["merged into the clear ones" in section for section in sections] == [False, False, False, True]


def test_one_bar_per_layer_is_as_high_as_its_tokens() -> None:
    bars = [rect for rect in Tags(small_page(comparison(1.0, 0.5))).named("rect") if rect.get("class") == "bar"]
    # The full model reads 4 visual and 3 text tokens, the plan 2 and 3.
    assert [float(str(bar["height"])) for bar in bars] == [100.0, 100.0, 71.43, 71.43]


def boxes(path: str) -> set[tuple[int, ...]]:
    """Read back the boxes of a drawn path."""
    return {tuple(map(int, found)) for found in re.findall(r"M(\d+) (\d+)H(\d+)V(\d+)H\d+z", path)}


def test_patches_are_drawn_where_they_lie_and_by_the_layer_that_drops_them() -> None:
    # Of a row of four patches the first never enters, the second is dropped after layer 0, the others stay.
    layout, alive = Layout.grid(1, 4), torch.tensor([0, 1, 3, 3])
    one = replace(record(layout, [2, 3]), layers_alive=alive)
    tags = Tags(patches(View("a", stills(1)[0], one, 0), layers=3, height=100))
    gone = {path["data-alive"]: path for path in tags.named("path") if "data-alive" in path}
    assert boxes(str(gone["0"]["d"])) == {(0, 0, 112, 100)}
    assert boxes(str(gone["1"]["d"])) == {(112, 0, 224, 100)}
    assert (gone["0"]["class"], gone["1"]["class"]) == ("gone", "gone inside")
    edges = [path for path in tags.named("path") if "data-from" in path]
    # Before layer 0 nothing is dropped, so no line is drawn; at first only the last stage is shown.
    assert [(edge["data-from"], edge["data-to"], "hidden" in edge) for edge in edges] == [
        ("1", "1", True),
        ("2", "3", False),
    ]
    # The line around two patches side by side leaves out the side they share.
    assert len(re.findall("M", str(edges[1]["d"]))) == 6
    assert "M336 0L336 100" not in str(edges[1]["d"])


def test_neighbouring_patches_are_one_box() -> None:
    one = record(Layout.grid(2, 2), [3])
    (path,) = (
        path for path in Tags(patches(View("a", stills(1)[0], one, 0), 1, 100)).named("path") if "data-alive" in path
    )
    assert boxes(str(path["d"])) == {(0, 0, 448, 50), (0, 50, 224, 100)}


@pytest.mark.parametrize("plan", ["divprune(keep=128) + pyramiddrop()", "fastv(layer=2, keep=0.5)", "full"])
def test_reports_know_which_layers_had_a_token(plan: str) -> None:
    import mmfast

    model, processor = mmfast.load_default()
    inputs = prepare(processor, "what color is the star?", Image.new("RGB", (64, 64), "red"))
    with mmfast.accelerate(model, plan) as fast:
        model.generate(**inputs, max_new_tokens=1)
    found = fast.report()
    alive = found.media[0].layers_alive
    assert alive is not None
    per_layer = [int((alive > layer).sum()) for layer in range(len(found.tokens_per_layer[0]))]
    assert per_layer == [count - found.text_tokens[0] for count in found.tokens_per_layer[0]]
    assert (alive > 0).nonzero().squeeze(-1).tolist() == found.media[0].entered_indices.tolist()


def test_the_time_line_counts_each_frame() -> None:
    layout = Layout.grid(1, 2, frames=3, modality="video")
    clip = MediaRecord(0, "video", 6, 3, 1, torch.tensor([0, 1, 2]), torch.tensor([1]), layout)
    media = Media(("a",), (), stills(3), (0.0, 1.5, 3.0))
    content = time_line(shown_frames(report("random(keep=1)", clip), media) or [])
    assert re.findall(r"<title>(.*?)</title>", content) == [
        "0.0 s: 2 tokens, 2 enter, 1 read by the last layer",
        "1.5 s: 2 tokens, 1 enter, 0 read by the last layer",
        "3.0 s: 2 tokens, 0 enter, 0 read by the last layer",
    ]
    heights = [float(str(bar["height"])) for bar in Tags(content).named("rect")]
    assert heights == [100, 100, 50, 100, 50, 0, 100, 0, 0]
    assert time_line(shown_frames(report("full", record(Layout.grid(2, 2))), Media(("a",), stills(1))) or []) == ""


def test_frames_that_a_model_takes_for_images_have_a_time_line_too() -> None:
    media = Media(("a",), (), stills(2), (0.0, 1.0))
    shown = shown_frames(report("full", record(Layout.grid(2, 2), [0]), record(Layout.grid(2, 2))), media) or []
    titles = re.findall(r"<title>(.*?)</title>", time_line(shown))
    assert titles == [
        f"{second}.0 s: 4 tokens, {n} enter, {n} read by the last layer" for second, n in ((0, 1), (1, 4))
    ]


def test_only_plans_that_drop_something_can_be_stepped_through() -> None:
    sections = small_page(comparison(1.0, 0.5)).split("<section>")
    assert ['type="range"' in section for section in sections] == [False, False, True]


def test_figures_are_shares_of_the_full_model() -> None:
    found = {figure.label: figure for figure in figures(comparison(1.0, 0.5))}
    assert found["visual tokens into the LLM"].values == ("4", "2")
    assert found["visual tokens into the LLM"].shares == ("", "50%")
    assert found["end to end"].values == ("1.000", "0.500")
    assert found["time to first token"].values == ("500.0", "250.0")
    assert found["decoding"].values == ("10", "10")
    assert "peak memory" not in found


def test_peaks_are_shown_where_they_tell_plans_apart() -> None:
    result = comparison(1.0, 0.5, peaks=(3_000_000, 2_000_000))
    found = {figure.label: figure for figure in figures(result)}
    assert found["peak memory"].values == ("3", "2")
    assert "device" in memory_note(result)
    values = as_json(result, ["", ""], "what?")
    assert [run["peak_bytes"] for run in values["runs"]] == [3_000_000, 2_000_000]
    assert "process_peak_bytes" not in values


def stills(count: int) -> tuple[Image.Image, ...]:
    """Pictures that can be told apart by their brightness."""
    return tuple(Image.new("RGB", (8, 8), (40 * number,) * 3) for number in range(count))


def shade(drawing: Image.Image) -> int:
    return int(np.asarray(drawing)[0, 0, 0])


def test_images_come_before_frames_as_in_the_prompt() -> None:
    pictures = stills(3)
    media = Media(("a", "b"), pictures[:1], pictures[1:], (0.0, 2.5))
    drawn, note = drawings(report("full", *[record(Layout.grid(2, 2))] * 3), media, UNCUT)
    assert [(one.caption, shade(one.image)) for one in drawn] == [("image 1", 0), ("0.0 s", 40), ("2.5 s", 80)]
    assert note == ""


def test_joined_frames_are_drawn_once() -> None:
    media = Media(("a",), (), stills(4), (0.0, 1.0, 2.0, 3.0))
    clip = record(Layout.grid(2, 2, frames=2, modality="video"))
    drawn, _ = drawings(report("full", clip), media, UNCUT)
    assert [(one.caption, shade(one.image)) for one in drawn] == [("0.0 s", 0), ("2.0 s", 80)]


def test_long_clips_are_thinned_out() -> None:
    frames = stills(6) * 5
    media = Media(("a",), (), frames, tuple(map(float, range(30))))
    drawn, note = drawings(report("full", *[record(Layout.grid(1, 1))] * 30), media, UNCUT)
    assert [one.caption for one in drawn] == [f"{second}.0 s" for second in range(0, 30, 3)]
    assert len(drawn) <= LIMIT
    assert note == "One picture in 3 is drawn."


def test_tiles_that_belong_to_no_picture_are_not_guessed() -> None:
    media = Media(("a",), stills(1))
    drawn, note = drawings(report("full", *[record(Layout.grid(2, 2))] * 5), media, UNCUT)
    assert drawn == []
    assert "cuts pictures into tiles" in note


def test_unknown_places_are_not_guessed() -> None:
    drawn, note = drawings(report("full", record(Layout.unknown(5))), Media(("a",), stills(1)), UNCUT)
    assert drawn == []
    assert "does not say where its tokens lie" in note


@pytest.mark.parametrize("size", [(96, 48), (48, 96), (64, 64)], ids=str)
@pytest.mark.parametrize("rules", [{"shortest_edge": 32}, {"height": 32, "width": 32}], ids=["shortest", "fixed"])
def test_pictures_are_cut_as_the_processor_cuts_them(size: tuple[int, int], rules: dict[str, int]) -> None:
    import mmfast

    _, processor = mmfast.load_default()
    processor.image_processor.do_center_crop = True
    processor.image_processor.size = type(processor.image_processor.size)(**rules)
    processor.image_processor.crop_size = {"height": 28, "width": 28}
    # A slope in both directions: a wrong cut would shift its values.
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    pixels = np.stack([rows * 2, columns * 2, rows + columns], axis=-1).astype(np.uint8)
    picture = Image.fromarray(pixels)
    mean, deviation = (
        torch.tensor(getattr(processor.image_processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    tensor = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    seen = ((tensor * deviation + mean) * 255).permute(1, 2, 0).numpy()
    cut = np.asarray(as_seen(processor, picture, "image").resize((28, 28), Image.Resampling.BICUBIC), float)
    assert np.abs(seen - cut).mean() < 2.5


def test_pictures_are_left_alone_where_nothing_is_cut() -> None:
    import mmfast

    _, processor = mmfast.load_default()
    picture = Image.new("RGB", (30, 20))
    assert as_seen(processor, picture, "image") is picture
    assert tuple(prepare(processor, "what?", picture)["pixel_values"].shape[2:]) == (224, 224)
