"""Many questions about one image or video, which is read once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmfast.accelerated import accelerate
from mmfast.plan import Plan, PlanLike
from mmfast.report import Report
from mmfast.zoo.clip import ClipTower

_FORMAT = "mmfast-context-1"


class SharedContext:
    """A prompt with its images or videos, encoded and read once, that any number of questions go on from.

    The questions of one call are answered in one batch. Attention reads the shared part once for all of them
    and combines it exactly with what is each question's own, so that answers are those of separate runs.

    Paper: "Hydragen: High-Throughput LLM Inference with Shared Prefixes" (arXiv 2402.05099).

    Args:
        model: a vision-language model, without a plan at work on it.
        inputs: what the processor made of ONE prompt: everything up to where the questions differ.
        plan: what to do with the prompt. Methods whose choice depends on the question have nothing to go by
            here: prefer those that do not read it.
        clip: a CLIP model, for plans that want one.

    Attributes:
        report: what the plan did.

    Raises:
        ValueError: if there are several prompts in ``inputs`` or padding, or the plan acts at every decode step too.

    Example:
        >>> import mmfast
        >>> from mmfast.adapters import prepare
        >>> from PIL import Image
        >>> model, processor = mmfast.load_default()
        >>> inputs = prepare(processor, ["what do you see?"], [Image.new("RGB", (224, 224))])
        >>> context = mmfast.SharedContext(model, inputs, "knorm(keep=0.5)")
        >>> [len(answer) <= 2 for answer in context.ask([[5, 6], [7]], max_new_tokens=2)]
        [True, True]
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], plan: PlanLike = "full", *, clip: ClipTower | None = None
    ) -> None:
        # The outer wall is reached here and in load(); it imports transformers.
        from mmfast.adapters import for_model

        self.plan = Plan.of(plan)
        _refuse_decoding(self.plan)
        adapter = for_model(model)
        with accelerate(model, self.plan, clip=clip) as fast:
            self._prefix: Any = adapter.contexts.read(inputs)
            self.report: Report = fast.report()
        self.key: str = adapter.contexts.fingerprint(inputs, self.plan.to_text())
        self._model_key: str = adapter.contexts.fingerprint()

    def ask(
        self,
        questions: Sequence[Sequence[int] | Tensor],
        *,
        max_new_tokens: int = 64,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Answer questions greedily, in one batch.

        Args:
            questions: token ids of each, as they follow the shared prompt: without a beginning-of-text token,
                and with whatever the chat template puts before the answer.
            max_new_tokens: longest answer.
            eos_token_id: tokens that end an answer; None = those of the model's generation configuration.

        Returns:
            The new token ids of each answer, its end token included.

        Raises:
            ValueError: if there is no question, one is empty, or ``max_new_tokens`` is below 1.
        """
        ends = self._prefix.adapter.end_tokens if eos_token_id is None else eos_token_id
        asked, ends = asked_ids(questions, max_new_tokens, ends)
        found: list[list[int]] = self._prefix.generate(asked, max_new_tokens, ends)
        return found

    @staticmethod
    def joined(contexts: Sequence[SharedContext]) -> SharedContext:
        """Put contexts one after the other, so that questions go on from all of them.

        Each was read alone, at positions of its own: its keys are turned so that the entries of all stand at
        consecutive positions, in the order given. This is how frames of a video, or images out of a store, that were
        compressed one by one under the plan ``voco()`` become one memory.

        Args:
            contexts: of one model, at least one.

        Raises:
            ValueError: if there is none, their models differ, or a plan left entries that cannot be turned.

        Example:
            >>> import mmfast
            >>> from mmfast.adapters import add_compression_tokens, prepare
            >>> from PIL import Image
            >>> model, processor = mmfast.load_default()
            >>> _ = add_compression_tokens(model, processor, tokens=2)
            >>> read = [prepare(processor, "look", Image.new("RGB", (64, 64), name)) for name in ("red", "blue")]
            >>> frames = [mmfast.SharedContext(model, inputs, "voco()") for inputs in read]
            >>> len(mmfast.SharedContext.joined(frames).ask([[5, 6]], max_new_tokens=2)[0]) <= 2
            True
        """
        from mmfast.adapters import for_model

        if not contexts:
            raise ValueError("contexts must hold at least one context, got none")
        if len({context._model_key for context in contexts}) > 1:
            raise ValueError("contexts were made by models of different weights or configurations; use those of one")
        first = contexts[0]
        joined = SharedContext.__new__(SharedContext)
        joined.plan, joined._model_key = first.plan, first._model_key
        adapter = for_model(first._prefix.adapter.model)
        joined._prefix = adapter.contexts.joined([context._prefix for context in contexts])
        joined.key = hashlib.sha256("\n".join(context.key for context in contexts).encode()).hexdigest()
        name = type(adapter.model).__name__
        joined.report = Report(first.plan.to_text(), name, adapter.shape, note=f"joined from {len(contexts)} contexts")
        return joined

    @property
    def kv_bytes(self) -> int:
        """Bytes of the shared keys and values."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self._prefix.layers
            for tensor in layer.tensors().values()
        )

    def save(self, path: Path) -> None:
        """Write the context to a safetensors file; keys and values that were packed are written as they are read.

        Raises:
            ValueError: if the name does not end in ``.safetensors``.
        """
        if path.suffix != ".safetensors":
            raise ValueError(f"context file {str(path)!r} must end in .safetensors")
        tensors = {
            f"{index}.{name}": tensor.contiguous().clone()
            for index, layer in enumerate(self._prefix.layers)
            for name, tensor in layer.tensors().items()
        }
        known = {
            "key": self.key,
            "model": self._model_key,
            "plan": self.plan.to_dict(),
            "seen": self._prefix.seen,
            "start": self._prefix.start,
            "windows": [layer.window for layer in self._prefix.layers],
        }
        # A file that is there is whole.
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata={"format": _FORMAT, "context": json.dumps(known)})
        part.replace(path)

    @staticmethod
    def load(path: Path, model: nn.Module) -> SharedContext:
        """Read a context that :meth:`save` wrote for the same model.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no context, or one of another model.
        """
        from mmfast.adapters import for_model

        if not path.is_file():
            raise FileNotFoundError(f"context file {str(path)!r} does not exist")
        adapter = for_model(model)
        try:
            with safe_open(path, framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            if metadata.get("format") != _FORMAT:
                raise ValueError("it was not written by SharedContext.save")
            known = json.loads(metadata["context"])
        except Exception as error:
            raise ValueError(f"context file {str(path)!r} cannot be read: {error}") from None
        if known["model"] != adapter.contexts.fingerprint():
            raise ValueError(f"context file {str(path)!r} was made by a model of other weights or configuration")
        context = SharedContext.__new__(SharedContext)
        context.plan, context.key, context._model_key = Plan.from_dict(known["plan"]), known["key"], known["model"]
        context.report = Report(context.plan.to_text(), type(model).__name__, adapter.shape, note="loaded from a file")
        context._prefix = adapter.contexts.rebuild(tensors, known["seen"], known["start"], known["windows"])
        return context

    @classmethod
    def cached(
        cls, model: nn.Module, inputs: Mapping[str, Any], folder: Path, plan: PlanLike = "full"
    ) -> SharedContext:
        """Load the context of these inputs, plan and model from a folder, or make and save it there.

        The file is named by a hash of the bytes, shapes and dtypes of the inputs, the plan and the model.
        """
        from mmfast.adapters import for_model

        key = for_model(model).contexts.fingerprint(inputs, Plan.of(plan).to_text())
        path = folder / f"{key}.safetensors"
        if path.is_file():
            return cls.load(path, model)
        folder.mkdir(parents=True, exist_ok=True)
        context = cls(model, inputs, plan)
        context.save(path)
        return context

    def __repr__(self) -> str:
        tokens = self._prefix.seen
        return f"SharedContext({tokens} tokens, {self.plan.to_text()!r}, {self.kv_bytes / 1e6:.1f} MB)"


def asked_ids(
    questions: Sequence[Sequence[int] | Tensor], max_new_tokens: int, ends: int | Sequence[int]
) -> tuple[list[list[int]], list[int]]:
    """Check questions and return them and the tokens that end an answer as lists.

    Raises:
        ValueError: if there is no question, one is empty, or ``max_new_tokens`` is below 1.

    Example:
        >>> asked_ids([[1, 2], [3]], 4, 0)
        ([[1, 2], [3]], [0])
    """
    asked = [
        question.reshape(-1).tolist() if isinstance(question, Tensor) else list(question) for question in questions
    ]
    if not asked or not all(asked):
        raise ValueError("questions must hold at least one question, and each at least one token id")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    return asked, [ends] if isinstance(ends, int) else list(ends)


def _refuse_decoding(plan: Plan) -> None:
    for method in plan.methods:
        acts = getattr(method, "decodes", False) or getattr(method, "routes_decode", False)
        if acts or method.stage == "decode":
            raise ValueError(
                f"method {method.name!r} acts at every decode step, which a shared context does without the plan; use "
                "a method that acts on the prompt alone"
            )
