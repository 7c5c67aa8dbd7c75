"""Watch the model encode images and videos, and note what is known of their tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from mmfast.adapters.base import Adapter
from mmfast.adapters.clip import clip_signals
from mmfast.adapters.encoder import add_groups
from mmfast.adapters.frames import FrameRunner
from mmfast.adapters.media import FEATURE_KEYS, items_of, tag, tagged
from mmfast.adapters.recorder import Recorder
from mmfast.adapters.resizing import shrinker
from mmfast.adapters.turns import Turns
from mmfast.adapters.vision import VisionReader
from mmfast.plan import Plan
from mmfast.token_pruning.base import BeforeLLM


class FeatureWatch:
    """Note the layout of every image and video the model encodes.

    Args:
        adapter: the adapter of the model.
        plan: the plan.
        recorder: takes the times of the encoder.
        turns: keeps features aside for later turns, if so.
        frames: chooses the frames of videos.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        recorder: Recorder,
        turns: Turns | None,
        frames: FrameRunner,
    ) -> None:
        self.adapter, self.plan, self.recorder, self.turns, self.frames = adapter, plan, recorder, turns, frames
        self._encoding = False

    def watched(self, modality: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``get_image_features`` or ``get_video_features``."""
        signature = inspect.signature(original)
        reader = VisionReader(self.adapter, modality, self.plan.methods, clip_signals(self.plan))
        before = next((method for method in self.plan.methods if isinstance(method, BeforeLLM)), None)
        shrinking = shrinker(self.adapter, modality, before)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._encoding:
                # One entry may call the other, as Qwen3-VL's for videos: the outer one knows what it encodes.
                return original(*args, **kwargs)
            outer = self.frames.outer.call
            arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
            arguments.update(arguments.pop("kwargs", {}))
            pixels = next((arguments[name] for name in FEATURE_KEYS if arguments.get(name) is not None), None)
            known = None
            if self.turns is not None and not self.frames.chooses_anew(modality):
                known = self.turns.encoded(modality, pixels)
            if known is not None:
                if outer is not None:
                    outer.layouts[modality] = tagged(known) or []
                return known
            begin = self.recorder.watch.mark()
            self._encoding = True
            try:
                cut = self.frames.cut(modality, arguments)
                if cut is not None:
                    args, kwargs = (), cut.arguments
                    arguments = cut.arguments
                # In this order: what is read of a block is what it gave before anything is merged.
                with reader.reading(arguments) as reading, shrinking.at_work(arguments) as shrunk:
                    output = original(*args, **kwargs)
                    reading.expand = shrunk.expand
            finally:
                self._encoding = False
            self.recorder.add_vision(begin, self.recorder.watch.mark())
            if getattr(output, "pooler_output", None) is None:
                # A caller of its own that asked for a tuple: the model itself never does.
                return output
            features = items_of(output)
            layouts = self.adapter.layouts(modality, arguments, features)
            layouts = reader.describe(reading, arguments, features, layouts)
            add_groups(self.adapter, modality, arguments, features, shrunk, layouts)
            if cut is not None:
                layouts = cut.spread(output, layouts)
            tag(output, layouts)
            if outer is not None:
                outer.layouts[modality] = layouts
            if self.turns is not None:
                self.turns.keep(modality, pixels, output)
            return output

        return watched
