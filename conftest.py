"""What the markers mean: a test that needs what this machine lacks is skipped, and the reason is printed."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--network", action="store_true", help="also run the tests that need the internet")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("network") and not config.getoption("--network"):
            item.add_marker(pytest.mark.skip(reason="needs the internet; run pytest --network"))


def _has_cuda() -> bool:
    # Not at the top: collecting without a gpu test should not wait for torch.
    import torch

    return torch.cuda.is_available()
