"""A video that keeps arriving: bounded memory, questions at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor, nn

from mmfast.accelerated import accelerate
from mmfast.kv.base import Evictor, ModelEvictor
from mmfast.media import prefetched
from mmfast.plan import Plan, PlanLike
from mmfast.shared import asked_ids

Clip = TypeVar("Clip")


class VideoStream:
    """Read clip after clip into a cache of bounded size, and answer questions on what it holds.

    After each clip the evictor of the plan brings the visual entries of every layer and head down to its
    ``keep``, which is a number of tokens here; text stays. Questions go on from the cache and leave it as it
    is. Positions keep counting, so that a stream ends where the model's positions do. Layers with a sliding
    window forget by themselves and are left alone.

    Args:
        model: a vision-language model, without a plan at work on it; the stream's is, until :meth:`close`.
        plan: one evictor with ``keep`` as a count, such as ``"infinipot_v(keep=4096)"`` or
            ``"streammem(keep=6000)"``; methods before it shorten each clip first.

    Raises:
        ValueError: if the plan has no such evictor, or methods of the cache beside it.

    Example:
        >>> import mmfast
        >>> from mmfast.adapters import prepare
        >>> from PIL import Image
        >>> model, processor = mmfast.load_default()
        >>> inputs = prepare(processor, ["what do you see?"], [Image.new("RGB", (224, 224))])
        >>> with mmfast.VideoStream(model, "infinipot_v(keep=64)") as stream:
        ...     for _ in range(3):
        ...         stream.add(inputs)
        ...     answer = stream.ask([[5, 6]], max_new_tokens=2)
        ...     max(stream.held), len(answer)
        (64, 1)
    """

    def __init__(self, model: nn.Module, plan: PlanLike) -> None:
        from mmfast.adapters import for_model

        whole = Plan.of(plan)
        evictor = _evictor(whole)
        self.plan = whole
        adapter = for_model(model)
        self._fast = accelerate(model, Plan(tuple(method for method in whole.methods if method is not evictor)))
        try:
            self._stream: Any = adapter.stream(evictor, int(evictor.keep))
        except BaseException:
            self._fast.remove()
            raise
        self._ends = adapter.end_tokens

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Read the next clip, image or text.

        Args:
            inputs: what the processor made of ONE prompt: the placeholders of the clip and whatever text belongs
                around it. The first may hold the start of the conversation.

        Raises:
            ValueError: if there are several prompts in ``inputs`` or padding, or the stream has been closed.
        """
        if not self._fast.active:
            raise ValueError("this stream has been closed; open a new one")
        if inputs["input_ids"].shape[0] != 1:
            raise ValueError(f"inputs hold {inputs['input_ids'].shape[0]} prompts; a stream has one")
        self._stream.add(inputs, self._tokens_per_frame)

    def watch(self, clips: Iterable[Clip], prepare: Callable[[Clip], Mapping[str, Any]], *, ahead: int = 2) -> int:
        """Read clips as they come: the next ones are decoded and prepared while the model reads the last.

        Args:
            clips: where clips come from, such as ``mmfast.media.video_clips("lecture.mp4", fps=1.0)``.
            prepare: makes of a clip what :meth:`add` takes. It is called in another thread.
            ahead: most prepared clips that wait.

        Returns:
            How many clips were read.

        Raises:
            ValueError: as :meth:`add`; and whatever ``clips`` or ``prepare`` raise, after the clips before that.

        Example:
            >>> import mmfast
            >>> from mmfast.adapters import prepare
            >>> from mmfast.media import sample, video_clips
            >>> model, processor = mmfast.load_default()
            >>> clips = video_clips(sample("bigbuckbunny.mp4"), clip_frames=2, fps=1.0, size=224)
            >>> with mmfast.VideoStream(model, "infinipot_v(keep=64)") as stream:
            ...     stream.watch(clips, lambda clip: prepare(processor, "watch", video_frames=clip.images()))
            ...     max(stream.held)
            3
            64
        """
        count = 0
        with prefetched(clips, prepare, ahead) as ready:
            for inputs in ready:
                self.add(inputs)
                count += 1
        return count

    def _tokens_per_frame(self) -> int:
        """Count the tokens of a frame of the clip that was just read, as they entered the language model."""
        media = self._fast.report().media
        frames = sum(int(item.layout.frame.clamp_min(0).unique().numel()) for item in media)
        return sum(item.entered for item in media) // frames if frames else 0

    def ask(
        self,
        questions: Sequence[Sequence[int] | Tensor],
        *,
        max_new_tokens: int = 64,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Answer questions greedily on what the stream holds now; as :meth:`mmfast.SharedContext.ask`."""
        asked, ends = asked_ids(questions, max_new_tokens, self._ends if eos_token_id is None else eos_token_id)
        if not self._stream.seen:
            raise ValueError("nothing has been added to this stream yet")
        found: list[list[int]] = self._stream.continue_with(asked, max_new_tokens, ends)
        return found

    @property
    def seen(self) -> int:
        """Tokens that have arrived, text included."""
        return int(self._stream.seen)

    @property
    def held(self) -> list[int]:
        """Visual entries that each layer holds."""
        found: list[int] = self._stream.held
        return found

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache."""
        layers = self._stream.cache.layers
        return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in layer.storage())

    def close(self) -> None:
        """Take the plan off the model; closing twice does no harm."""
        self._fast.remove()

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _evictor(plan: Plan) -> Evictor:
    kept = plan.at("cache")
    found = [method for method in kept if isinstance(method, Evictor)]
    if len(kept) != 1 or not found:
        raise ValueError(
            f"a stream needs exactly one method of the cache, an evictor such as 'infinipot_v(keep=4096)', got "
            f"{plan.to_text()!r}"
        )
    (evictor,) = found
    if not isinstance(evictor.keep, int):
        raise ValueError(f"keep={evictor.keep} of {evictor.name!r} must be a count (int) in a stream, which has no end")
    if isinstance(evictor, ModelEvictor) or evictor.decodes or evictor.ragged:
        raise ValueError(
            f"method {evictor.name!r} cannot keep up with a stream: it needs all layers at once, acts at every step or "
            "lets heads differ in number; use one such as 'infinipot_v' or 'streammem'"
        )
    if not evictor.needs <= {"attention"}:
        raise ValueError(
            f"method {evictor.name!r} needs {', '.join(sorted(evictor.needs))}, which a stream does not keep; use one "
            "such as 'infinipot_v' or 'streammem'"
        )
    return evictor
