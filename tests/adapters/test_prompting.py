"""Questions, pictures and clips become the inputs of generate()."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmfast.adapters import prepare
from mmfast.zoo import load_default

RED = Image.new("RGB", (60, 40), (200, 30, 30))


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_default()[1]


class Recorder:
    """A processor with a slot for video that notes what it is called with."""

    image_token, video_token = "<image>", "<video>"
    chat_template: Any = "{% for part in messages[0]['content'] %}[{{ part['text'] or part['type'] }}]{% endfor %}"

    def __init__(self, bos: str | None = "<s>", video: bool = True) -> None:
        self.tokenizer = SimpleNamespace(bos_token=bos, chat_template=None)
        self.video_processor = object() if video else None
        self.call: dict[str, Any] = {}
        self.content: list[dict[str, str]] = []

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        assert options["add_generation_prompt"] is True
        assert options["tokenize"] is False
        self.content = messages[0]["content"]
        return "<s>prompt"

    def __call__(self, **call: Any) -> Any:
        self.call = call
        return SimpleNamespace(to=lambda *place, **options: (place, options))


def shown(processor: Any, inputs: Any) -> list[str]:
    texts = processor.tokenizer.batch_decode(inputs["input_ids"])
    return [text.replace("<image>" * 256, "<image>").replace("<pad>", "") for text in texts]


def test_one_picture(processor: Any) -> None:
    inputs = prepare(processor, "What color is the star?", RED)
    assert shown(processor, inputs) == ["<s><|user|><image>what color is the star?<|assistant|>"]
    assert inputs["pixel_values"].shape == (1, 3, 224, 224)


def test_pictures_of_any_mode_and_arrays_are_read_alike(processor: Any) -> None:
    expected = prepare(processor, "q?", RED)["pixel_values"]
    for image in (RED.convert("RGBA"), RED.quantize(4), np.asarray(RED), [RED], np.asarray(RED)[None]):
        torch.testing.assert_close(prepare(processor, "q?", image)["pixel_values"], expected, rtol=0, atol=0)


def test_frames_stand_behind_their_numbers(processor: Any) -> None:
    inputs = prepare(processor, "is there a star?", video_frames=np.zeros((2, 30, 40, 3), np.uint8))
    expected = "<s><|user|>frame 1:<image>frame 2:<image>is there a star?<|assistant|>"
    assert shown(processor, inputs) == [expected]


def test_a_batch_is_padded_on_the_left(processor: Any) -> None:
    inputs = prepare(processor, ["one?", "two?", "three?"], [RED, [RED, RED], None], [None, None, [RED]])
    assert shown(processor, inputs) == [
        "<s><|user|><image>one?<|assistant|>",
        "<s><|user|><image><image>two?<|assistant|>",
        "<s><|user|><image>three?<|assistant|>",
    ]
    assert inputs["pixel_values"].shape[0] == 4
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert inputs["attention_mask"][0, 0] == 0


def test_a_question_without_pictures(processor: Any) -> None:
    inputs = prepare(processor, "hello", None)
    assert "pixel_values" not in inputs
    assert shown(processor, inputs) == ["<s><|user|>hello<|assistant|>"]


def test_dtype_and_device(processor: Any) -> None:
    inputs = prepare(processor, "q?", RED, dtype=torch.bfloat16, device="meta")
    assert inputs["pixel_values"].dtype is torch.bfloat16
    assert inputs["input_ids"].dtype is torch.int64
    assert {tensor.device.type for tensor in inputs.values()} == {"meta"}


def test_video_slot_is_used() -> None:
    recorder = Recorder()
    prepare(recorder, "q?", RED, [RED] * 3, fps=2.0)
    assert recorder.content == [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "q?"}]
    assert [video.shape for video in recorder.call["videos"]] == [(3, 40, 60, 3)]
    assert recorder.call["do_sample_frames"] is False
    assert recorder.call["video_metadata"] == [
        {"total_num_frames": 3, "fps": 2.0, "duration": 1.5, "frames_indices": [0, 1, 2]}
    ]
    assert [len(images) for images in recorder.call["images"]] == [1]
    prepare(recorder, ["q?", "r?"], video_frames=[[RED] * 2, [RED] * 2], fps=[2.0, 0.5])
    assert [video["duration"] for video in recorder.call["video_metadata"]] == [1.0, 4.0]
    prepare(recorder, "q?", video_frames=[RED] * 2, frames_as_images=True)
    assert "videos" not in recorder.call
    assert [part.get("text", "*") for part in recorder.content] == ["frame 1:", "*", "frame 2:", "*", "q?"]


@pytest.mark.parametrize(("bos", "told"), [("<s>", True), ("<bos>", False), (None, False)])
def test_begin_of_text_is_not_written_twice(bos: str | None, told: bool) -> None:
    recorder = Recorder(bos=bos)
    prepare(recorder, "q?", RED)
    assert ("add_special_tokens" in recorder.call) is told
    assert recorder.call.get("add_special_tokens", False) is False


def test_base_model_without_template() -> None:
    recorder = Recorder()
    recorder.chat_template = None
    prepare(recorder, "q?", [RED, RED], [RED])
    assert recorder.call["text"] == ["<image>\n<image>\n<video>\nq?"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": ""}, "question must be a text that is not empty"),
        ({"question": []}, "at least one question"),
        ({"question": "an <image> here"}, "must not contain the placeholder '<image>'"),
        ({"question": ["a", "b"], "images": RED}, "one entry for each of the 2 questions, got one image"),
        ({"question": ["a", "b"], "images": [RED]}, "images must hold one entry for each of the 2 questions, got 1"),
        ({"question": ["a"], "video_frames": []}, "video_frames must hold one entry"),
        ({"question": "a", "video_frames": []}, "at least one frame"),
        ({"question": "a", "images": np.zeros((4, 4, 3), np.float32)}, r"uint8 \[H, W, 3\], got float32 \[4, 4, 3\]"),
        ({"question": "a", "images": np.zeros((3, 4, 4), np.uint8)}, r"uint8 \[H, W, 3\], got uint8 \[3, 4, 4\]"),
        ({"question": "a", "images": np.zeros((0, 4, 3), np.uint8)}, r"got uint8 \[0, 4, 3\]"),
        ({"question": "a", "images": RED, "fps": 0.0}, "fps must be positive, got 0.0"),
        ({"question": ["a", "b"], "fps": [1.0]}, "one number or one for each of the 2 questions, got 1"),
        ({"question": "a", "video_frames": [RED], "frames_as_images": False}, "slot for video, which LlavaProcessor"),
    ],
)
def test_refusals(processor: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(processor, **arguments)


def test_refuses_paths(processor: Any) -> None:
    with pytest.raises(TypeError, match="images must be PIL images or uint8 arrays, got str"):
        prepare(processor, "a", ["picture.png"])


def test_frames_of_one_video_have_one_size() -> None:
    with pytest.raises(ValueError, match="must all have one size"):
        prepare(Recorder(), "a", video_frames=[RED, RED.resize((10, 10))])
