"""What of the table of an evaluation is the same in every run of it."""

from __future__ import annotations

import json
from typing import Any

from mmfast.eval import Table

COUNTED = ("n_visual_in", "n_visual_kept", "n_visual_layer_average", "prefill_macs", "prefill_flops", "kv_bytes")


def untimed(table: Table) -> Any:
    """Everything but what a clock says."""
    rows = json.loads(json.dumps(table.to_dict()["rows"]))
    for row in rows:
        row["costs"] = {name: row["costs"][name] for name in COUNTED}
    return rows, table.comparisons, table.notes
