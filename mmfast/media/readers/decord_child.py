"""Runs decord in a process of its own: a script that imports nothing of mmfast.

Standard input: one JSON object, ``{"path", "indices", "height", "width"}``; without indices it only looks.
Standard output: one line of JSON, then the frames as raw bytes ``[k, H, W, 3]``.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Answer the one request on standard input."""
    request = json.load(sys.stdin)
    # Libraries that chatter on standard output must not end up between the frames.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        import decord
        from PIL import Image

        clip = decord.VideoReader(request["path"], ctx=decord.cpu(0))
        indices = request.get("indices", [])
        height, width = clip[0].shape[:2]
        start = clip.get_frame_timestamp(0)[0]
        header = {
            "total_frames": len(clip),
            "fps": float(clip.get_avg_fps()),
            "height": height,
            "width": width,
            "timestamps": [float(clip.get_frame_timestamp(index)[0] - start) for index in indices],
        }
        answer.write(json.dumps(header).encode() + b"\n")
        for index in indices:
            frame = clip[index].asnumpy()
            if frame.shape[:2] != (request["height"], request["width"]):
                image = Image.fromarray(frame)
                frame = image.resize((request["width"], request["height"]), Image.Resampling.BICUBIC)
            answer.write(frame.tobytes())


if __name__ == "__main__":
    main()
