"""The page of a comparison, the figures on it, and which drawing belongs where."""

from __future__ import annotations

import re
from html.parser import HTMLParser
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
from mmfast.cli.drawings import LIMIT, as_seen, drawings
from mmfast.cli.figures import as_json, figures, memory_note
from mmfast.cli.html import page
from mmfast.compare import PlanComparison, PlanRun
from mmfast.report import LayerWork, MediaRecord, Report, Timing
from mmfast.tokens import Layout

SHAPE = LanguageShape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=2, head_dim=4)
UNCUT = SimpleNamespace()


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img") and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        # The tag stands in the parser's own call even for <rect/>, which opens nothing.
        if tag != "rect" or self.open[-1] == "rect":
            assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


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
    tags = Tags(content)
    assert tags.open == []
    assert not tags.named("b")
    images = [str(image["src"]) for image in tags.named("img")]
    assert len(images) == 3 * 2
    assert all(image.startswith("data:image/jpeg;base64,") for image in images)
    assert len(set(images)) == len(images)
    assert not re.search(r"url\(|@import|https?://|<script|<link", content)
    assert not [attributes for _, attributes in tags.found if "href" in attributes or "onload" in attributes]
    for text in ("clip.mp4 (2 frames)", "sdpa attention, float32", "transformers 5.", "the embedded demo model"):
        assert text in content


def test_everything_foreign_is_escaped() -> None:
    evil = "</title><script>alert('x')</script>\"&"
    content = small_page(comparison(1.0, 0.5), answer=evil, question=evil)
    assert "<script" not in content
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;" in content
    assert Tags(content).open == []


def test_slower_plans_are_marked_and_faster_ones_are_not() -> None:
    content = small_page(comparison(1.0, 0.5, 2.0))
    marked = re.findall(r'<p class="verdict( slow)?">([^:]+):', content)
    assert marked == [("", "uniform(keep=2)"), (" slow", "pool2d(keep=1)")]


def test_merging_is_not_called_dropping() -> None:
    sections = small_page(comparison(1.0, 0.5, 2.0)).split("<section>")
    assert ["merged into the clear ones" in section for section in sections] == [False, False, False, True]


def test_one_bar_per_layer_is_as_high_as_its_tokens() -> None:
    bars = [rect for rect in Tags(small_page(comparison(1.0, 0.5))).named("rect") if rect["class"] == "bar"]
    # The full model reads 4 visual and 3 text tokens, the plan 2 and 3.
    assert [float(str(bar["height"])) for bar in bars] == [100.0, 100.0, 71.43, 71.43]


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
