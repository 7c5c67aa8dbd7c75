"""The one call: attach a plan to a model, and take it off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn

from mmfast.measure import agreement, in_turn, setting_of
from mmfast.plan import Plan, PlanLike
from mmfast.report import Comparison, Report
from mmfast.token_pruning.base import check_choice
from mmfast.token_pruning.weights import Lesson
from mmfast.zoo.clip import ClipTower


def accelerate(
    model: nn.Module,
    plan: PlanLike,
    *,
    replace: bool = False,
    clip: ClipTower | None = None,
    on_new_turn: Literal["reuse", "reselect"] = "reuse",
    draft_model: nn.Module | None = None,
    compile: bool = False,
) -> Accelerated:
    """Make a vision-language model faster, in place and reversibly.

    The model keeps its class, its weights and its ``generate``; every change is entered in a ledger
    that :meth:`Accelerated.remove` undoes exactly.

    Args:
        model: an unmodified Hugging Face vision-language model.
        plan: text such as ``"divprune(keep=64) + pyramiddrop()"``, a :class:`~mmfast.plan.Plan`, a
            list of method objects, or the path of a TOML or JSON file.
        replace: take off a plan that is already at work on this model; otherwise that is an error.
        clip: a CLIP model, for methods that compare patches with words in its space.
        on_new_turn: what a later question of a conversation finds, where the plan reads questions.
            ``"reuse"`` goes on from what the first question left; ``"reselect"`` reads the conversation again
            from features that were kept aside, without encoding, so that the new question chooses. The report
            says what that cost. It takes effect in ``generate()`` with the cache of the turn before.
        draft_model: a smaller model, for plans with ``assistant`` or ``text_draft``, in which it drafts. Nothing is
            left on it after :meth:`Accelerated.remove`.
        compile: run the decode steps of ``generate()`` compiled, over a cache of fixed size that holds what is left
            of the prompt; on a GPU as one CUDA graph. The first prompt of a length waits for that, and the report
            says how long. Greedy decoding and sampling are, with everything ``generate()`` knows of processors,
            stopping and streaming; beams decode as without it, and so do the rounds of a drafter in the plan.
            Where nothing can be compiled the same steps run as they are, and the report says why.

    Returns:
        A handle that is also a context manager.

    Raises:
        TypeError: if no adapter serves the model, or the plan or ``compile`` is of the wrong type.
        ValueError: if the plan cannot be read or the model cannot do what it asks for. The model is
            untouched then.

    Example:
        >>> import mmfast
        >>> model, processor = mmfast.load_default()
        >>> with mmfast.accelerate(model, "uniform(keep=64)") as fast:
        ...     fast.plan.to_text()
        'uniform(keep=64)'
    """
    # The outer wall is reached here and nowhere else; it imports transformers.
    from mmfast.adapters import for_model

    check_choice("on_new_turn", on_new_turn, ["reuse", "reselect"])
    if not isinstance(compile, bool):
        raise TypeError(f"compile={compile!r} must be True or False")
    reselect = on_new_turn == "reselect"
    return Accelerated(
        model,
        Plan.of(plan),
        for_model(model),
        replace=replace,
        clip=clip,
        reselect=reselect,
        draft_model=draft_model,
        compile=compile,
    )


class Accelerated:
    """A model with a plan at work on it.

    Attributes:
        model: the model, the same object that was passed in.
        plan: the plan.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        adapter: Any,
        *,
        replace: bool = False,
        clip: ClipTower | None = None,
        reselect: bool = False,
        draft_model: nn.Module | None = None,
        compile: bool = False,
    ) -> None:
        self.model = model
        self.plan = plan
        self._adapter = adapter
        self._comparison: Comparison | None = None
        self._options = {"clip": clip, "reselect": reselect, "draft_model": draft_model, "compile": compile}
        self._binding = adapter.bind(plan, replace=replace, **self._options)

    @property
    def active(self) -> bool:
        """Whether the plan is at work."""
        return self._binding is not None and bool(self._binding.active)

    def remove(self) -> None:
        """Give back exactly the model there was; calling it twice does no harm."""
        if self._binding is not None:
            binding, self._binding = self._binding, None
            self._last_report = binding.report()
            binding.detach()

    def report(self) -> Report:
        """Describe the last prompt with images or videos; also after ``remove()``."""
        report: Report = self._last_report if self._binding is None else self._binding.report()
        return report if self._comparison is None else report.with_comparison(self._comparison)

    def measure(self, inputs: Mapping[str, Any], *, max_new_tokens: int = 16, repeats: int = 3) -> Comparison:
        """Time the untouched and the accelerated model side by side on the same inputs.

        Both generate greedily, in turn, in this process; what is reported is the run with the median
        total. The plan is taken off for the untouched runs and put back.

        Args:
            inputs: what the processor returned.
            max_new_tokens: tokens to generate.
            repeats: counted runs of each, after one warm-up.

        Raises:
            ValueError: if the plan has been removed, or ``repeats`` is below 1.
        """
        self._at_work("measure it")
        runs = in_turn(
            self.model,
            {"baseline": self.suspended, "accelerated": nullcontext},
            inputs,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
        )
        (baseline, plain), (accelerated, pruned) = runs["baseline"], runs["accelerated"]
        self._comparison = Comparison(
            baseline, accelerated, repeats, setting_of(self.model, inputs), agreement(plain, pruned)
        )
        return self._comparison

    @contextmanager
    def suspended(self) -> Iterator[nn.Module]:
        """Take the plan off for a while.

        Example:
            >>> import mmfast
            >>> model, processor = mmfast.load_default()
            >>> fast = mmfast.accelerate(model, "uniform(keep=64)")
            >>> with fast.suspended() as plain:
            ...     plain is model
            True
            >>> fast.remove()
        """
        if self._binding is None:
            yield self.model
            return
        before = self._binding
        self.remove()
        try:
            yield self.model
        finally:
            self._binding = self._adapter.bind(self.plan, **self._options)
            self._binding.go_on_from(before)

    def learned(self) -> nn.ModuleDict:
        """Return the learned parts of the plan's methods inside the language model, by method.

        They are in evaluation mode and ask for no gradients. The methods work with these very modules: what is trained
        or loaded here is at work, also after they are moved. Their state dict is what ``weights=`` loads.

        Returns:
            Method name -> module; empty where nothing of the plan is learned this way.

        Raises:
            ValueError: if the plan has been removed.

        Example:
            >>> import mmfast
            >>> model, processor = mmfast.load_default()
            >>> with mmfast.accelerate(model, "p_mod()") as fast:
            ...     [name for name, weight in fast.learned().named_parameters()]
            ['p_mod.layers.2.weight', 'p_mod.layers.2.bias', 'p_mod.layers.3.weight', ..., 'p_mod.layers.7.bias']
        """
        parts: nn.ModuleDict = self._at_work("ask for its learned parts").layers.learned()
        return parts

    @contextmanager
    def training(
        self,
        answers: Tensor | None = None,
        *,
        gates: bool = False,
        done: float = 0.0,
        noise: bool = True,
        parts: int = 0,
    ) -> Iterator[Lesson]:
        """Tell the methods that calls of the model in this context are training.

        Prompts end before their answers: what the last token of a prompt decides in use, it then decides here too,
        without having seen the answer. With several answers in a row the first question decides, as in use.

        Args:
            answers: ``[B, S]`` bool, which tokens of the next call are answers; None = there are none.
            gates: learned parts follow their training form; otherwise all methods act as in use.
            done: share of the training that is over, 0 to 1, for schedules.
            noise: draw decisions where a method's training draws; False decides as in use, with training's gradients.
            parts: in the first so many layers it is noted under ``"own_part"``, as float32 ``[H, n]``, how much each of
                n compression tokens looks at its own part of what it reads.

        Yields:
            What the methods noted; give it to :meth:`training_losses`.

        Raises:
            ValueError: if the plan has been removed. With ``gates`` calls of the model raise it for a cache that is
                not empty, and for gradient checkpointing.

        Example:
            >>> import mmfast
            >>> model, processor = mmfast.load_default()
            >>> with mmfast.accelerate(model, "p_mod()") as fast, fast.training(done=0.5) as lesson:
            ...     lesson.done
            0.5
        """
        layers = self._at_work("train with it").layers
        before, layers.lesson = layers.lesson, Lesson(answers, gates, done, noise, parts)
        try:
            yield layers.lesson
        finally:
            layers.lesson = before

    def training_losses(self, lesson: Lesson) -> dict[str, Tensor]:
        """Return what the methods add to the loss of the answers, weighed as their papers do.

        Args:
            lesson: of a call of the model in :meth:`training`.

        Returns:
            Name -> scalar with gradients.
        """
        learners = self._at_work("train with it").layers.learners.values() if lesson.gates else ()
        return {name: loss for method in learners for name, loss in method.training_loss(lesson).items()}

    def _at_work(self, purpose: str) -> Any:
        if self._binding is None:
            raise ValueError(f"the plan has been removed from this model; call accelerate() again to {purpose}")
        return self._binding

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"Accelerated({type(self.model).__name__}, {self.plan.to_text()!r}, {state})"
