"""The package as a whole: names, import cost, samples, sniffing, writing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmfast.media
from mmfast.media import MediaError, is_image, is_video, kind_of, load_image, read_video, sample, write_video


def loaded(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing() -> None:
    assert loaded("import mmfast.media") & {"numpy", "PIL", "av", "decord", "torch", "transformers"} == set()


def test_reading_loads_only_what_it_needs() -> None:
    image = loaded("from mmfast.media import load_image, sample; load_image(sample('coffee.jpg'))")
    assert image & {"av", "decord", "torch", "torchcodec"} == set()
    video = loaded("from mmfast.media import *; read_video(sample('bigbuckbunny.mp4'), indices=[0])")
    assert video & {"decord", "torch", "torchcodec"} == set()


def test_public_names() -> None:
    assert dir(mmfast.media) == sorted(mmfast.media.__all__)
    for name in mmfast.media.__all__:
        assert getattr(mmfast.media, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = mmfast.media.no_such_name


def test_samples() -> None:
    assert load_image(sample("coffee.jpg")).size == (600, 400)
    video = read_video(sample("bigbuckbunny.mp4"), num_frames=8, size=64)
    assert (video.frames.shape, video.total_frames, video.fps) == ((8, 36, 64, 3), 132, 25.0)
    assert len({frame.tobytes() for frame in video.frames}) == 8
    assert sample("coffee.jpg").stat().st_size <= 150_000
    assert sample("bigbuckbunny.mp4").stat().st_size <= 1_100_000


def test_every_sample_is_attributed() -> None:
    folder = sample("coffee.jpg").parent
    text = (folder / "ATTRIBUTION.md").read_text()
    names = [path.name for path in folder.iterdir() if path.is_file() and path.name != "ATTRIBUTION.md"]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize(("name", "near"), [("coffe.jpg", "coffee.jpg"), ("BigBuckBunny", "bigbuckbunny.mp4")])
def test_unknown_sample_lists_near_names(name: str, near: str) -> None:
    with pytest.raises(MediaError, match=f"did you mean {near}"):
        sample(name)


@pytest.mark.parametrize("name", ["../samples/coffee.jpg", "ATTRIBUTION.md", "", "."])
def test_only_samples_are_samples(name: str) -> None:
    with pytest.raises(MediaError, match="no sample is named"):
        sample(name)


def test_kind_is_told_by_content(clips, clip_name: str, tmp_path: Path) -> None:
    disguised = tmp_path / "photo.jpg"
    disguised.write_bytes(clips.get(clip_name).read_bytes())
    assert kind_of(disguised) == "video"
    assert is_video(disguised)
    assert not is_image(disguised)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_images_are_images(tmp_path: Path, format_name: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "clip.mp4", format_name)
    assert kind_of(tmp_path / "clip.mp4") == "image"
    assert is_image(str(tmp_path / "clip.mp4"))
    assert kind_of(tmp_path) == "video"


@pytest.mark.parametrize(
    "content", [b"text", b"", b"RIFF\x00\x00\x00\x00WAVEfmt ", b"ID3\x04", b"%PDF-1.7", bytes(2000)]
)
def test_neither_image_nor_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(MediaError, match=r"clip.mp4: .+; give an image \(PNG"):
        kind_of(tmp_path / "clip.mp4")
    assert not is_image(tmp_path / "clip.mp4")
    assert not is_video(tmp_path / "clip.mp4")


def test_missing_is_neither(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        kind_of(tmp_path / "none")
    assert not is_image(tmp_path / "none")
    assert not is_video(tmp_path)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("rate", [10, 29.97, 0.5])
def test_written_clips_are_read_back(clips, tmp_path: Path, suffix: str, rate: float) -> None:
    frames = np.stack([clips.numbered(n) for n in range(20)])
    path = write_video(tmp_path / f"clip{suffix}", frames, rate)
    video = read_video(path, indices=range(20))
    assert clips.numbers(video.frames) == list(range(20))
    assert video.fps == pytest.approx(rate, rel=1e-3)
    assert video.warnings == ()
    assert np.abs(video.frames.astype(int) - frames).mean() < 4


def test_odd_sides_are_padded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "odd.mp4", [Image.new("L", (31, 17), 200)] * 3, 5)
    video = read_video(path)
    assert video.frames.shape == (3, 18, 32, 3)
    np.testing.assert_allclose(video.frames, 200, atol=3)


@pytest.mark.parametrize("without", ["libx264"])
def test_other_encoder_if_there_is_no_h264(clips, tmp_path: Path, monkeypatch, without: str) -> None:
    import av.codec

    monkeypatch.setattr(av.codec, "codecs_available", av.codec.codecs_available - {without})
    path = write_video(tmp_path / "clip.mp4", [clips.numbered(n) for n in range(9)], 10)
    assert clips.numbers(read_video(path).frames) == list(range(9))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"


@pytest.mark.parametrize(
    ("name", "frames", "rate", "message"),
    [
        ("clip.gif", np.zeros((1, 8, 8, 3), np.uint8), 5, r"must end in \.mp4"),
        ("none/clip.mp4", np.zeros((1, 8, 8, 3), np.uint8), 5, "does not exist"),
        ("clip.mp4", np.zeros((0, 8, 8, 3), np.uint8), 5, "no frames"),
        ("clip.mp4", np.zeros((1, 8, 8, 3), np.float32), 5, "float32"),
        ("clip.mp4", np.zeros((1, 8, 8), np.uint8), 5, r"uint8 \[8, 8\]"),
        ("clip.mp4", [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 10))], 5, "different sizes"),
        ("clip.mp4", np.zeros((1, 8, 8, 3), np.uint8), 0, r"fps=0 must lie in \(0, 1000\]"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, name: str, frames, rate: float, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        write_video(tmp_path / name, frames, rate)
    assert not (tmp_path / name).exists()


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(MediaError, match="cannot be written"):
        write_video(tmp_path / "clip.mp4", np.zeros((1, 8, 8, 3), np.uint8), 5)
