"""Made-up data in the published layouts: texts lie in fixtures, pictures and clips are made here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfast.media import write_video

FIXTURES = Path(__file__).parents[1] / "fixtures"

LayOut = Callable[..., Path]


def paint(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path)
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second of video."""
    frames = np.full((10, 16, 16, 3), 90, np.uint8)
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames, fps=10)


@pytest.fixture
def lay_out(tmp_path: Path, clip: Path) -> LayOut:
    """Copy the texts of a data set to a folder and make the pictures and clips it names."""

    def lay(name: str, *media: str, size: tuple[int, int] = (8, 6)) -> Path:
        root = tmp_path / name
        shutil.copytree(FIXTURES / name, root)
        for file in media:
            if Path(file).suffix in (".mp4", ".avi", ".mkv"):
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(clip, root / file)
            else:
                paint(root / file, size)
        return root

    return lay
