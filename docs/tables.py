"""What the writers of generated tables share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mmfast
from mmfast.eval.runner import fingerprint

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows as a Markdown table; the first is the header."""
    lines = [rows[0], tuple("---" for _ in rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def latest(pattern: str) -> dict[str, Any]:
    """Read the newest committed result file (their names end in a date)."""
    content: dict[str, Any] = json.loads(sorted(RESULTS.glob(pattern))[-1].read_text())
    return content


def model_note(result: dict[str, Any]) -> str:
    """Say where figures of the demo model were taken on other weights than the package holds."""
    if result.get("weights") == _weights():
        return ""
    return " **Measured on an earlier demo model**, not on the one that the package holds now."


@cache
def _weights() -> str:
    return fingerprint(mmfast.load_default()[0])
