"""The embedded model, loaded once."""

from __future__ import annotations

from typing import Any

import pytest

import mmfast


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    """The embedded model with its processor."""
    return mmfast.load_default()
