"""Speed and memory of taking 64 frames from a long video.

    python benchmarks/video.py [--files NAME ...] [--minutes N] [--repeats N] [--cores N] [--out FILE.json]

Written once, into a folder for temporary files: 1080p at 30 frames per second, a window wandering over a smooth
picture, encoded with x264. To save time, 25 seconds are encoded and their packets repeated, each time 25 seconds
later; decoding cannot tell.

All ways return the same 64 uniform frames, the longer side brought down to 448 pixels. **sequential** decodes from
the first frame on and counts, with as many threads as there are cores; that is what ``read_video`` falls back to.
**read_video** is the default; both read the file's packets first, which is counted. **decord** and **torchcodec** are
measured where installed. Each run is a process of its own, started in turn; seconds are those of reading, imports left
out, peak memory is that of the whole process and what it starts. ``same_bits``: all frames equal the sequential ones.

Every finished run is written at once, and a broken-off benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

FPS, WIDTH, HEIGHT = 30, 1920, 1080
FRAMES, SIZE = 64, 448
PIECE_SECONDS = 25
# name: what is told to x264.
FILES = {
    "keyframe every 2 s": {"preset": "ultrafast", "g": "60"},
    "keyframe every 8.3 s": {"preset": "ultrafast", "g": "250"},
    "x264 defaults": {"preset": "veryfast", "g": "250"},
}
WAYS = {"sequential": None, "read_video": None, "decord": "decord", "torchcodec": "torchcodec"}


def write(name: str, minutes: int) -> Path:
    """Write one of the files, if it is not there yet."""
    import av

    folder = Path(tempfile.gettempdir()) / "mmfast-benchmark"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name.replace(' ', '-')}-{minutes}min.mp4"
    if path.exists():
        return path
    piece = folder / "piece.mp4"
    encode(piece, FILES[name])
    unfinished = folder / "unfinished.mp4"
    with av.open(str(unfinished), "w") as after:
        copy, shift = None, 0
        for _ in range(minutes * 60 // PIECE_SECONDS):
            with av.open(str(piece)) as before:
                stream = before.streams.video[0]
                copy = copy or after.add_stream_from_template(stream)
                for packet in before.demux(stream):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = copy
                        after.mux(packet)
                shift += stream.duration
    piece.unlink()
    return unfinished.replace(path)


def encode(path: Path, options: dict[str, str]) -> None:
    """Encode one piece."""
    import av
    import numpy as np
    from PIL import Image, ImageFilter

    chance = np.random.default_rng(0)
    blocks = np.kron(chance.integers(40, 215, (30, 50), dtype=np.uint8), np.ones((64, 64), np.uint8))
    ground = np.asarray(Image.fromarray(blocks).filter(ImageFilter.BoxBlur(24)))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(PIECE_SECONDS * FPS):
            left, top = int(500 + 480 * np.sin(number / 200)), int(400 + 380 * np.cos(number / 310))
            frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p")
            for plane, value in zip(
                frame.planes, (ground[top : top + HEIGHT, left : left + WIDTH], 100, 150), strict=True
            ):
                np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width] = value
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def one(way: str, path: Path, cores: int) -> dict[str, Any]:
    """Read the frames in one way; called in a process of its own."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import av  # noqa: F401
    import numpy as np

    from mmfast.media import read_video
    from mmfast.media.readers.pyav import PyavClip

    if way == "sequential":
        original = PyavClip.read
        PyavClip.read = lambda self, *wanted: original(
            PyavClip(self.path, self.max_pixels, self.info, self.start), *wanted
        )
    start, start_cpu = time.perf_counter(), processor()
    found = read_video(path, num_frames=FRAMES, size=SIZE, reader=WAYS[way] or "pyav", timeout=600.0)
    seconds, cpu = time.perf_counter() - start, processor() - start_cpu
    # Not the ru_maxrss of this process: it starts at that of the one it was forked from.
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    peak = int(own.split()[1]) + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "seconds": seconds,
        "processor_seconds": cpu,
        "peak_mb": peak // 1024,
        "frames": zlib.crc32(np.ascontiguousarray(found.frames)),
        "reader": found.reader,
    }


def processor() -> float:
    """Processor seconds of this process and of those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and how many times faster than sequential reading each way is."""
    middle = {
        way: {key: median(run[key] for run in each) for key in ("seconds", "processor_seconds", "peak_mb")}
        for way, each in runs.items()
        if each
    }
    base = middle["sequential"]
    for way, found in middle.items():
        found["times_faster"] = base["seconds"] / found["seconds"]
        found["times_less_processor"] = base["processor_seconds"] / found["processor_seconds"]
        # Others make frames small in another way, so that only this one can be compared bit for bit.
        if WAYS[way] is None:
            found["same_bits"] = {run["frames"] for run in runs[way]} == {runs["sequential"][0]["frames"]}
    return middle


def describe(cores: int) -> dict[str, Any]:
    """Machine and versions."""
    import torch
    from speed import machine

    names = [name for name in ("av", "decord", "torchcodec") if find_spec(name)]
    load = os.getloadavg()[0]
    found = machine(torch.device("cpu"))
    return {**found, "threads": str(cores), "load_at_start": load} | {name: version(name) for name in names}


def main() -> int:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", choices=FILES, default=list(FILES), help="which files (default all)")
    parser.add_argument("--minutes", type=int, default=10, help="length of a file (default 10)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way (default 3)")
    parser.add_argument("--cores", type=int, default=2, help="cores that may be used (default 2)")
    parser.add_argument("--out", type=Path, default=Path("build/video.json"), help="results as JSON")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(one(options.one[0], Path(options.one[1]), options.cores)))
        return 0
    from rich.console import Console
    from rich.table import Table

    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(options.out.read_text()) if options.out.exists() else {"machine": describe(options.cores)}
    ways = [way for way, package in WAYS.items() if package is None or find_spec(package)]
    for name in options.files:
        path = write(name, options.minutes)
        setting = (
            f"{options.minutes} minutes of {WIDTH}x{HEIGHT} at {FPS} fps, H.264 {FILES[name]}, {options.cores} cores"
        )
        entry = content.setdefault(name, {"setting": setting, "megabytes": path.stat().st_size // 10**6, "runs": {}})
        for turn in range(options.repeats):
            for way in ways:
                runs = entry["runs"].setdefault(way, [])
                if len(runs) <= turn:
                    command = [sys.executable, __file__, "--cores", str(options.cores), "--one", way, str(path)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    runs.append(json.loads(done.stdout))
                    options.out.write_text(json.dumps(content, indent=1) + "\n")
        entry["median"] = summary(entry["runs"])
        options.out.write_text(json.dumps(content, indent=1) + "\n")
        table = Table(
            "way", "seconds", "processor s", "peak MB", "faster", title=f"{name}: {setting}", title_justify="left"
        )
        for way, found in entry["median"].items():
            cells = [found["seconds"], found["processor_seconds"], found["peak_mb"], found["times_faster"]]
            table.add_row(way, *(f"{cell:.1f}" for cell in cells))
        Console(width=150).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
