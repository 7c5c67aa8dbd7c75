"""mmfast as a model of lmms-eval: ``lmms-eval --model mmfast --model_args pretrained=ID,plan=PLAN --tasks ...``.

lmms-eval finds it through the entry point ``mmfast`` in the group ``lmms_eval.models``; nothing else imports this file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import mmfast
from mmfast.adapters import load_pretrained
from mmfast.eval.lmms_arguments import cut, generation_options, read_arguments
from mmfast.eval.loading import Prompt, batches, prepare_prompts
from mmfast.eval.task import Sample
from mmfast.media import kind_of
from mmfast.zoo import EMBEDDED, is_embedded

try:
    from accelerate import Accelerator
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"this is a plug-in of lmms-eval ({error}): pip install 'mmfast[lmms]'") from error

_PLACEHOLDERS = ("<image>", "<video>")


def manifest() -> ModelManifest:
    """Tell lmms-eval of the model."""
    return ModelManifest(model_id="mmfast", simple_class_path="mmfast.eval.lmms.LmmsModel")


class LmmsModel(lmms):  # type: ignore[misc]
    """A model under a plan, as lmms-eval asks it: tasks that generate, about pictures, videos and text.

    Args:
        pretrained: a model id, a folder, or ``"embedded"`` for the model that comes with mmfast.
        plan: the plan, as text.
        device: where to run; None takes ``cuda`` if there is one. Under ``accelerate launch`` each process has its own.
        dtype: floating type; None takes that of the file, but no float16 on a CPU.
        attn_implementation: None lets transformers choose.
        revision: branch, tag or commit on the hub.
        batch_size: questions answered at once.
        frames: frames taken from a video file.
        max_batch_size: not used; lmms-eval passes it to every model.

    Raises:
        ValueError: if the plan does not suit the model, or a number is below 1.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = EMBEDDED,
        plan: str = "full",
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        revision: str = "main",
        batch_size: int | str = 1,
        frames: int = 8,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        del max_batch_size
        self.batch_size = _count("batch_size", batch_size)
        self.frames = _count("frames", frames)
        # lmms-eval gathers results through it.
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.device = self.accelerator.device if device is None or self._world_size > 1 else torch.device(device)
        if is_embedded(pretrained):
            self.model, self.processor = mmfast.load_default(pretrained, device=self.device, dtype=dtype or "float32")
        else:
            self.model, self.processor = load_pretrained(
                pretrained,
                device=self.device,
                dtype=dtype,
                attn_implementation=attn_implementation,
                revision=revision,
                progress=self._rank == 0,
            )
        self.plan = mmfast.Plan.of(plan)
        self._fast = mmfast.accelerate(self.model, self.plan)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LmmsModel:
        """Build the model from ``--model_args``; lmms-eval's own reader would cut plans at their commas."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **read_arguments(arg_string)})

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests of lmms-eval, each with the text up to the first of its stop strings.

        Raises:
            ValueError: if a picture or a video cannot be read, or for generation arguments that are not known.
            TypeError: for media that are neither pictures nor videos.
        """
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(index)
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            for indices in alike.values():
                options, until = generation_options(requests[indices[0]].args[1])
                samples = (self._sample(str(index), requests[index].args) for index in indices)
                for group in batches(samples, self.batch_size):
                    for sample, text in self._answers(group, options):
                        index = int(sample.sample_id)
                        answers[index] = cut(text, until)
                        self.cache_hook.add_partial("generate_until", requests[index].args[:2], answers[index])
                        bar.update()
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse conversations of several rounds.

        Raises:
            ValueError: always.
        """
        raise ValueError("the model mmfast answers single questions; choose a task whose output_type is generate_until")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse tasks that compare likelihoods: plans that act while tokens are generated would not be at work.

        Raises:
            ValueError: always.
        """
        raise ValueError("the model mmfast generates answers; choose a task whose output_type is generate_until")

    def clean(self) -> None:
        """Take the plan off and let the model go."""
        self._fast.remove()
        super().clean()

    def _sample(self, name: str, arguments: tuple[Any, ...]) -> Sample:
        context, _, to_visual, number, task, split = arguments
        for placeholder in _PLACEHOLDERS:
            # The template of the processor says where pictures stand.
            context = context.replace(placeholder, "")
        images: list[Image.Image | Path] = []
        videos: list[Path] = []
        for visual in to_visual(self.task_dict[task][split][number]) or []:
            if isinstance(visual, Image.Image):
                images.append(visual)
            elif isinstance(visual, str | Path):
                path = Path(visual)
                (videos if kind_of(path) == "video" else images).append(path)
            else:
                raise TypeError(f"{task}, question {number}: media must be pictures or files, got {type(visual)}")
        if len(videos) > 1:
            raise ValueError(f"{task}, question {number} shows {len(videos)} videos; a prompt takes one")
        return Sample(name, context.strip(), (), images=tuple(images), video=videos[0] if videos else None)

    def _answers(self, group: Sequence[Sample], options: dict[str, Any]) -> Iterator[tuple[Sample, str]]:
        dtype = next(self.model.parameters()).dtype
        prompts = prepare_prompts(self.processor, group, frames=self.frames, device=self.device, dtype=dtype)
        for prompt in prompts:
            yield from zip(prompt.samples, self._texts(prompt, options), strict=True)

    @torch.inference_mode()
    def _texts(self, prompt: Prompt, options: dict[str, Any]) -> list[str]:
        if prompt.error:
            raise ValueError(f"a question could not be prepared: {prompt.error}: {prompt.samples[0].question[:200]!r}")
        output = self.model.generate(**prompt.inputs, **options)  # type: ignore[operator]
        tokens = output[:, prompt.inputs["input_ids"].shape[1] :]
        texts: list[str] = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return texts


def _count(name: str, value: int | str) -> int:
    number = int(value) if str(value).isdecimal() else 0
    if number < 1:
        raise ValueError(f"{name}={value} must be a whole number, at least 1")
    return number
