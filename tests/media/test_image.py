"""Images: formats, modes, orientation, limits and damage."""

from __future__ import annotations

import io
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from mmfast.media import MediaError, load_image, sample


@pytest.fixture
def picture() -> Image.Image:
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return small.resize((80, 60), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format_name: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format_name, **options)
    return out.getvalue()


@pytest.mark.parametrize("format_name", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP"])
def test_formats(picture: Image.Image, tmp_path: Path, format_name: str) -> None:
    # The suffix lies: only the content counts.
    path = tmp_path / "picture.xyz"
    path.write_bytes(encoded(picture, format_name))
    expected = np.asarray(Image.open(path).convert("RGB"))
    for source in (path, str(path), path.read_bytes()):
        image = load_image(source)
        assert (image.mode, image.size) == ("RGB", (80, 60))
        np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("format_name", ["PPM", "ICO", "PCX"])
def test_other_formats_are_refused(picture: Image.Image, format_name: str) -> None:
    with pytest.raises(MediaError, match=r"image bytes: .*not an image; give PNG, JPEG"):
        load_image(encoded(picture, format_name))


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_picture_of_several(format_name: str) -> None:
    first, second = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    data = encoded(first, format_name, save_all=True, append_images=[second])
    red = np.asarray(load_image(data)).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(red, (255, 0, 0), atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15], upright[:10, 15:], upright[10:, :15] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif.tobytes()))
    np.testing.assert_array_equal(np.asarray(image), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_broken_exif_is_ignored(picture: Image.Image) -> None:
    data = encoded(picture, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\xff\xff")
    assert load_image(data).size == (80, 60)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes(picture: Image.Image, mode: str) -> None:
    converted = picture.convert(mode)
    data = encoded(converted, "TIFF")
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(converted.convert("RGB")))


def test_palette_with_transparency_warns_nobody(picture: Image.Image) -> None:
    data = encoded(picture.convert("P"), "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data).mode == "RGB"


def test_sixteen_bit_grey_keeps_the_upper_bits() -> None:
    grey = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    image = np.asarray(load_image(encoded(Image.fromarray(grey), "PNG")))
    np.testing.assert_array_equal(image, np.repeat((grey >> 8)[..., None], 3, axis=2))


def test_pixels_without_a_range_are_refused() -> None:
    with pytest.raises(MediaError, match="32-bit pixels"):
        load_image(encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"))


def test_pillow_image_is_copied(picture: Image.Image) -> None:
    image = load_image(picture)
    image.putpixel((0, 0), (1, 2, 3))
    assert picture.getpixel((0, 0)) != (1, 2, 3)


def test_huge_header_is_refused_at_once(clips, tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(clips.png(30_000, 30_000, complete=False))
    start = time.perf_counter()
    with pytest.raises(MediaError, match=r"huge.png: 30000x30000 pixels .* more than max_pixels=64000000"):
        load_image(tmp_path / "huge.png")
    assert time.perf_counter() - start < 1


def test_pixel_cap_is_ours_alone(clips) -> None:
    # Pillow itself would refuse, or warn, from 89 million pixels on.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match="damaged or cut off"):
            load_image(clips.png(15_000, 15_000, complete=False), max_pixels=225_000_000)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 101)])
def test_extreme_aspect_ratio(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size).save(tmp_path / "strip.png")
    with pytest.raises(MediaError, match=r"strip.png: .* extreme aspect ratio; .* at most 100 times"):
        load_image(tmp_path / "strip.png")
    with pytest.raises(MediaError, match="extreme aspect ratio"):
        load_image(Image.new("RGB", size))


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1)])
def test_smallest_images_pass(size: tuple[int, int]) -> None:
    assert load_image(Image.new("RGB", size)).size == size


def test_byte_cap(picture: Image.Image, tmp_path: Path) -> None:
    data = encoded(picture, "PNG")
    (tmp_path / "picture.png").write_bytes(data)
    for source in (data, tmp_path / "picture.png"):
        assert load_image(source, max_bytes=len(data)).size == (80, 60)
        with pytest.raises(MediaError, match=f"{len(data)} bytes are more than max_bytes"):
            load_image(source, max_bytes=len(data) - 1)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_truncated(picture: Image.Image, tmp_path: Path, format_name: str) -> None:
    data = encoded(picture, format_name)
    (tmp_path / "cut").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(MediaError, match=r"cut: .*(damaged|cut off)") as caught:
        load_image(tmp_path / "cut")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Tag data larger than file:UserWarning")
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_no_damage_crashes_the_loader(clips, picture: Image.Image, format_name: str) -> None:
    data, refusals = encoded(picture, format_name), []
    for seed in range(60):
        try:
            load_image(clips.damaged(data, seed), max_pixels=1_000_000)
        except MediaError as error:
            refusals.append(str(error))
    assert len(refusals) >= 15
    assert not any("\n" in message for message in refusals)


@pytest.mark.parametrize(
    ("content", "found"), [(b"", "an empty file"), (b"hello", "text"), (b"\x00\x00\x00\x18ftypmp42", "MP4/MOV")]
)
def test_no_image(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(MediaError, match=f"photo.jpg: {found}, not an image"):
        load_image(tmp_path / "photo.jpg")


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"none.png: no such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(MediaError, match="a folder; give a plain file"):
        load_image(tmp_path)
    with pytest.raises(TypeError, match="source is int"):
        load_image(3)


def test_globals_of_pillow_stay(clips, picture: Image.Image) -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    load_image(sample("coffee.jpg"))
    for bad in (clips.png(30_000, 30_000, complete=False), encoded(picture, "PNG")[:200]):
        with pytest.raises(MediaError):
            load_image(bad)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
