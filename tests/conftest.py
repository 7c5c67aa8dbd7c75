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
