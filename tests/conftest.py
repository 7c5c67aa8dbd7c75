"""Make ``tests/support`` importable as ``support`` from every test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Tiny models gain nothing from more threads, and beside other work lose a lot.
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("support")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let slow tests be asked for."""
    parser.addoption("--slow", action="store_true", help="run slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests that were not asked for."""
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
