"""Files of results with chosen scores, written without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfast.eval.records import Header, Record
from mmfast.eval.results import ResultsFile, file_name


def header(plan: str, **values: Any) -> Header:
    found: dict[str, Any] = {"task": "mine", "task_version": 1, "task_options": {}, "metric": "accuracy"}
    found |= {"chance": 0.0, "plan": plan, "model": "tiny", "weights": "w", "dtype": "float32"}
    found |= {"max_new_tokens": 8, "batch": 1, "frames": 8, "hardware": {"device": "cpu"}}
    return Header(**(found | values))


def records(scores: Sequence[float], *, tokens: int = 256, ttft: float = 100.0, **values: Any) -> list[Record]:
    return [
        Record(
            f"q{number:04d}",
            "mine",
            **{"prediction": f"said {score:g}", "parsed": "", "answers": ("truth",), "score": score}
            | {"question": f"question {number}?", "n_visual_kept": tokens, "n_visual_layer_average": float(tokens)}
            | {"ttft_ms": ttft, "decode_tok_s": 50.0, "prefill_flops": 10**9, "kv_bytes": 10**6}
            | values,
        )
        for number, score in enumerate(scores)
    ]


def write(folder: Path, plan: str, found: Sequence[Record], **values: Any) -> None:
    head = header(plan, **values)
    with ResultsFile(folder / file_name(head.task, plan, head.model), head) as file:
        for record in found:
            file.append(record)
