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


@pytest.mark.parametrize("spare", [True, False])
def test_distinct_tokens_have_rows_of_their_own(spare: bool, tmp_path: Path) -> None:
    model, processor = mmfast.load_default(dtype="float32")
    if not spare:
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    size = len(processor.tokenizer)
    added = add_compression_tokens(model, processor, tokens=3, distinct=True)
    rows = model.get_input_embeddings().weight[size : size + 3].detach()
    assert (added.token_id, added.entries, len(processor.tokenizer)) == (size, 3, size + 3)
    assert len(torch.unique(rows, dim=0)) == 3
    others = model.get_input_embeddings().weight[:size].detach()
    assert bool(((rows - others.mean(dim=0)).abs() < 5 * others.std(dim=0)).all())
    inputs = prepare(processor, ["red?", "same?"], [RED, [RED, BLUE]])
    ids = inputs["input_ids"]
    assert [row[row >= size].tolist() for row in ids] == [[size, size + 1, size + 2], [size, size + 1, size + 2] * 2]
    shorter = prepare(processor, "red?", RED, num_compressed=2)["input_ids"]
    assert shorter[shorter >= size].tolist() == [size, size + 1]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, own = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert compression_tokens(loaded) == compression_tokens(own) == added
    assert torch.equal(prepare(own, "same?", [RED, BLUE])["input_ids"][0], ids[1])
    first, question = split_compressed(own, prepare(own, "red?", RED))
    assert first["input_ids"][0, -3:].tolist() == [size, size + 1, size + 2]
    assert own.decode(question) == "red?<|assistant|>"
    with pytest.raises(ValueError, match="4 compression tokens are asked for, but only 3 differ"):
        prepare(own, "red?", RED, num_compressed=4)
    with pytest.raises(ValueError, match="must not contain the placeholder '<voco_3>'"):
        prepare(own, "what is <voco_3>?", RED)
    with pytest.raises(ValueError, match="5 compression tokens"):
        add_compression_tokens(loaded, own, tokens=5)


def test_copies_do_not_become_distinct(ready: tuple[Any, Any]) -> None:
    model, processor = ready
    with pytest.raises(ValueError, match="distinct=True, but the model has"):
        add_compression_tokens(model, processor, tokens=4, distinct=True)


def test_distinct_tokens_hide_an_image_however_the_prompt_is_given() -> None:
    model, processor = mmfast.load_default(dtype="float32")
    add_compression_tokens(model, processor, tokens=4, distinct=True)
    red, blue = (prepare(processor, "what color is it?", image) for image in (RED, BLUE))
    known = compression_tokens(processor)
    assert known is not None
    with torch.no_grad(), mmfast.accelerate(model, "voco()"):
        asked = [model(**inputs, use_cache=True) for inputs in (red, blue)]
        cached = asked[0].past_key_values.get_seq_length()
        embedded = model.get_input_embeddings()(red["input_ids"])
        given = model(inputs_embeds=embedded, **{k: v for k, v in red.items() if k != "input_ids"}).logits
    text = int((~known.find(red["input_ids"]) & (red["input_ids"] != processor.image_token_id)).sum())
    assert cached == red["input_ids"].shape[1]
    assert asked[0].past_key_values.layers[0].keys.shape[-2] == 4 + text - 2
    # The image reaches the text through the tokens, and the tokens are found by their embeddings too.
    assert not torch.equal(asked[0].logits[:, -1], asked[1].logits[:, -1])
    assert torch.allclose(given, asked[0].logits, atol=1e-5)


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
