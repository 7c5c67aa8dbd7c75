"""The compression token in vocabulary, files and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import mmfast
from mmfast.adapters import add_compression_tokens, prepare, split_compressed
from mmfast.adapters.compression import compression_tokens

RED, BLUE = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "blue")


@pytest.fixture
def ready() -> tuple[Any, Any]:
    """The embedded model and its processor, with three compression tokens."""
    model, processor = mmfast.load_default(dtype="float32")
    add_compression_tokens(model, processor, tokens=3)
    return model, processor


def counts(inputs: Any, processor: Any) -> list[int]:
    """Compression tokens of each row."""
    known = compression_tokens(processor)
    assert known is not None
    found: list[int] = (inputs["input_ids"] == known.token_id).sum(dim=1).tolist()
    return found


def test_a_new_row_is_the_mean_of_the_others_and_nothing_else_changes() -> None:
    model, processor = mmfast.load_default(dtype="float32")
    size = len(processor.tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    asked = prepare(processor, "red?", RED)
    with torch.no_grad():
        logits = model(**asked).logits
        added = add_compression_tokens(model, processor, tokens=2, hide_prefix="visual")
        after = model.get_input_embeddings().weight
        assert (added.token_id, added.tokens, added.hide_prefix) == (size, 2, "visual")
        assert torch.equal(after[:size], before[:size])
        assert torch.allclose(after[size], before[:size].mean(dim=0))
        assert torch.equal(model(**asked).logits[..., :size], logits[..., :size])
    # Once more changes the numbers alone.
    again = add_compression_tokens(model, processor, tokens=5)
    assert (again.token_id, again.tokens, len(processor.tokenizer)) == (size, 5, size + 1)


def test_a_vocabulary_without_spare_rows_grows() -> None:
    model, processor = mmfast.load_default(dtype="float32")
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    added = add_compression_tokens(model, processor)
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == len(processor.tokenizer) == added.token_id + 1
    assert torch.allclose(weight[-1], weight[:-1].mean(dim=0), atol=1e-6)
    assert model.get_output_embeddings().weight is weight


def test_a_saved_folder_is_known_again(ready: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = ready
    add_compression_tokens(model, processor, tokens=2, hide_prefix="visual")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert compression_tokens(model) == compression_tokens(processor)
    assert counts(prepare(processor, "red?", RED), processor) == [2]
    with mmfast.accelerate(model, "voco()") as fast:
        assert fast.report().plan == "voco(hide_prefix='visual')"
    assert "<voco>" not in processor.decode([4, compression_tokens(model).token_id], skip_special_tokens=True)  # type: ignore[union-attr]


def test_prompts_get_the_tokens_behind_each_image(ready: tuple[Any, Any]) -> None:
    _, processor = ready
    inputs = prepare(processor, ["red?", "same?", "and?"], [RED, [RED, BLUE], None])
    assert counts(inputs, processor) == [3, 6, 0]
    known = compression_tokens(processor)
    assert known is not None
    ids = inputs["input_ids"][0].tolist()
    last = max(place for place, token in enumerate(ids) if token == processor.image_token_id)
    assert ids[last + 1 : last + 4] == [known.token_id] * 3
    assert counts(prepare(processor, "red?", RED, num_compressed=5), processor) == [5]
    assert counts(prepare(processor, "red?", RED, num_compressed=0), processor) == [0]
    clip = np.zeros((4, 32, 32, 3), np.uint8)
    assert counts(prepare(processor, "what happens?", video_frames=clip), processor) == [12]


def test_a_prompt_is_cut_behind_its_last_token(ready: tuple[Any, Any]) -> None:
    model, processor = ready
    images = prepare(processor, "is it red?", [RED, BLUE])
    first, question = split_compressed(processor, images)
    assert first["input_ids"][0].tolist() + question == images["input_ids"][0].tolist()
    assert first["attention_mask"].shape == first["input_ids"].shape
    context = mmfast.SharedContext(model, first, "voco()")
    with mmfast.accelerate(model, "voco()"):
        whole = model.generate(**images, max_new_tokens=3, do_sample=False)[0, images["input_ids"].shape[1] :]
    assert context.ask([question], max_new_tokens=3)[0] == whole.tolist()
    with pytest.raises(ValueError, match="got 1 with 0"):
        split_compressed(processor, prepare(processor, "red?", RED, num_compressed=0))
    with pytest.raises(ValueError, match="got 2 with"):
        split_compressed(processor, prepare(processor, ["red?", "blue?"], [RED, BLUE]))


def test_senseless_numbers_and_prompts_are_refused(ready: tuple[Any, Any]) -> None:
    model, processor = ready
    plain = mmfast.load_default()[1]
    for arguments, message in (({"tokens": 0}, "tokens=0"), ({"hide_prefix": "text"}, "hide_prefix='text'")):
        with pytest.raises(ValueError, match=message):
            add_compression_tokens(model, processor, **arguments)  # type: ignore[arg-type]
    for owner, count in ((processor, -1), (plain, 2), (processor, True)):
        with pytest.raises(ValueError, match=f"num_compressed={count}"):
            prepare(owner, "red?", RED, num_compressed=count)
    with pytest.raises(ValueError, match="must not contain the placeholder '<voco>'"):
        prepare(processor, "what is <voco>?", RED)
    with pytest.raises(ValueError, match="of which the model knows nothing"):
        add_compression_tokens(mmfast.load_default()[0], processor)
    processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(ValueError, match="does not write one placeholder for each"):
        prepare(processor, "red?", RED)
