"""What several tests of drafting use."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmfast.registry import build
from mmfast.speculative.base import Drafter
from support.heads import (
    SIZES,
    TURNED,
    random_head,
    write,
)


@pytest.fixture
def drafter(request: pytest.FixtureRequest, tmp_path: Path) -> Drafter:
    name = request.param
    config = dict(TURNED if "rows3" in request.node.callspec.id else SIZES)
    if "2layers" in name:
        config["num_hidden_layers"] = 2
    path = write(tmp_path / "head", random_head(name), config)
    made: Drafter = build(name.partition("-")[0], {"path": str(path)})
    return made
