"""Render a clip of moving shapes and print a question about it, with the expected answer on stderr.

python examples/render_clip.py clip.mp4 [--seed N] [--family color|exist|shape|size]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmfast.eval.datasets.shapes import CLIP_FAMILIES, render_clip
from mmfast.media import write_video


def main() -> int:
    """Render, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, help="file to write, .mp4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=CLIP_FAMILIES, default="color")
    options = parser.parse_args()
    clip = render_clip(options.seed, num_frames=32, families=[options.family])
    if not clip.questions:
        parser.error(f"this clip allows no question of family {options.family!r}; take another --seed")
    write_video(options.clip, list(clip.frames), fps=8)
    question = clip.questions[0]
    sys.stderr.write(f"expected answer: {question.answer}\n")
    sys.stdout.write(f"{question.text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
