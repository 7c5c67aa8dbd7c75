"""mmfast makes vision-language models faster without forking them.

One call, :func:`accelerate`, prunes and merges visual tokens of an unmodified Hugging Face model;
``remove()`` gives back exactly the model you had.

    >>> import mmfast
    >>> sorted(method.name for method in mmfast.methods("before_llm"))[:2]
    ['aim_merge', 'anchor_merge']
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfast.accelerated import Accelerated, accelerate
    from mmfast.budget import LanguageShape, prefill_flops
    from mmfast.calibration import calibrate
    from mmfast.plan import Plan
    from mmfast.registry import MethodInfo, methods, register
    from mmfast.report import Report
    from mmfast.shared import SharedContext
    from mmfast.stream import VideoStream
    from mmfast.tokens import Keep, Layout, VisualTokens
    from mmfast.zoo import load_default
    from mmfast.zoo.clip import ClipTower

__version__ = "0.1.0"

_HOME = {
    "Accelerated": "mmfast.accelerated",
    "ClipTower": "mmfast.zoo.clip",
    "Keep": "mmfast.tokens",
    "LanguageShape": "mmfast.budget",
    "Layout": "mmfast.tokens",
    "MethodInfo": "mmfast.registry",
    "Plan": "mmfast.plan",
    "Report": "mmfast.report",
    "SharedContext": "mmfast.shared",
    "VideoStream": "mmfast.stream",
    "VisualTokens": "mmfast.tokens",
    "accelerate": "mmfast.accelerated",
    "calibrate": "mmfast.calibration",
    "load_default": "mmfast.zoo",
    "methods": "mmfast.registry",
    "prefill_flops": "mmfast.budget",
    "register": "mmfast.registry",
}

__all__ = [
    "Accelerated",
    "ClipTower",
    "Keep",
    "LanguageShape",
    "Layout",
    "MethodInfo",
    "Plan",
    "Report",
    "SharedContext",
    "VideoStream",
    "VisualTokens",
    "__version__",
    "accelerate",
    "calibrate",
    "load_default",
    "methods",
    "prefill_flops",
    "register",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import mmfast`` stays cheap and inert."""
    if name not in _HOME:
        raise AttributeError(f"module 'mmfast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
