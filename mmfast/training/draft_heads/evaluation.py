"""What a draft head is worth: tokens per forward on questions it has not learned from, and the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmfast
from mmfast.training.conversations import Conversation, ConversationFile, Source, WorldSource
from mmfast.training.draft_heads.answers import inputs_of
from mmfast.training.draft_heads.options import HeadOptions

EVALUATION = "evaluation.json"


def check_enough(source: Source, options: HeadOptions) -> None:
    """Refuse a file that has too few conversations for what is trained on and what is held out.

    Raises:
        ValueError: naming both numbers.
    """
    if isinstance(source, ConversationFile) and options.prompts + options.held_out > len(source):
        raise ValueError(
            f"prompts={options.prompts} and held_out={options.held_out} are more than the {len(source)} conversations "
            f"of {source.path}; lower one of them"
        )


def held_out(source: Source, options: HeadOptions) -> list[Conversation]:
    """Return questions that are not trained on.

    Of the rendered world those of its held-out split; of other data those behind the ones that are trained on.

    Args:
        source: the data of the run.
        options: how many are trained on, and how many are held out.
    """
    if not options.held_out:
        return []
    if isinstance(source, WorldSource):
        return source.held_out(options.held_out)
    # Where a conversation cannot be used the next one takes its place, which may be the last that is trained on; behind
    # the end of a file that is its first.
    seen = {source.at(number).where for number in (0, options.prompts - 1)}
    found = []
    for number in range(options.prompts, options.prompts + options.held_out):
        conversation = source.at(number)
        if conversation.where and conversation.where in seen:
            continue
        seen.add(conversation.where)
        found.append(conversation)
    return found


def evaluate(
    model: Any, processor: Any, asked: list[Conversation], options: HeadOptions, folder: Path
) -> dict[str, float]:
    """Decode greedily with and without an exported head, and write ``evaluation.json`` beside it.

    Args:
        model: the model it was trained for, with nothing at work on it.
        processor: of the model.
        asked: questions.
        options: of the training; answers are as long as they were there.
        folder: where the head lies.

    Returns:
        ``tau`` (tokens per forward, the model's own included; 1 without drafting), ``accepted_per_forward`` (without
        it), ``same_as_plain`` (share of the answers that are token for token those of plain decoding),
        ``held_out_prompts`` and ``new_tokens`` (those of all answers); empty without questions.
    """
    if not asked:
        return {}
    prompts = [inputs_of(processor, [conversation]).to(model.device) for conversation in asked]
    length = {
        "max_new_tokens": options.new_tokens,
        **({"min_new_tokens": options.new_tokens} if options.past_end else {}),
    }
    plain = [_answer(model, prompt, length) for prompt in prompts]
    rounds = emitted = accepted = same = 0
    with mmfast.accelerate(model, f"{options.method}(path={str(folder)!r}, adaptive_length=False)") as fast:
        for prompt, wanted in zip(prompts, plain, strict=True):
            same += torch.equal(_answer(model, prompt, length), wanted)
            drafting = fast.report().drafting
            if drafting is not None:
                rounds, emitted = rounds + drafting.rounds, emitted + drafting.emitted
                accepted += drafting.accepted
    found = {
        "tau": emitted / rounds if rounds else 1.0,
        "accepted_per_forward": accepted / rounds if rounds else 0.0,
        "same_as_plain": same / len(asked),
        "held_out_prompts": float(len(asked)),
        "new_tokens": float(sum(len(answer) for answer in plain)),
    }
    (folder / EVALUATION).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _answer(model: Any, prompt: Any, length: dict[str, int]) -> Tensor:
    ids: Tensor = model.generate(**prompt, **length, do_sample=False)
    return ids[0, prompt["input_ids"].shape[1] :].cpu()
