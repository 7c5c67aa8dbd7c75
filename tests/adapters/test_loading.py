"""What cannot be loaded is refused with the reason and the cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from mmfast.adapters import load_pretrained, loading
from mmfast.zoo import default_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    copy = tmp_path / "model"
    shutil.copytree(default_path(), copy)
    return copy


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def keep_only(folder: Path, config: dict[str, Any]) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def lose_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in sorted(tensors) if "linear_1.weight" in name)]
    save_file(tensors, path, metadata={"format": "pt"})


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json of .* cannot be read"),
    "unknown model type": (lambda f: edit_config(f, model_type="nonesuch"), "does not describe a model .*nonesuch"),
    "no model type": (lambda f: keep_only(f, {}), "does not describe a model that this transformers knows"),
    "text model": (lambda f: keep_only(f, {"model_type": "bert"}), "'bert' model, which does not take images"),
    "remote code": (
        lambda f: keep_only(f, {"model_type": "nonesuch", "auto_map": {"AutoConfig": "code.Config"}}),
        "needs Python code from its repository, which mmfast never runs",
    ),
    "pickle": (only_pickle, r"holds no \*.safetensors weights; pytorch_model.bin may run code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no \*.safetensors weights\. Load"),
    "cut weights": (cut_weights, "weights of .* are damaged"),
    "missing tensor": (lose_a_tensor, "lack 1 tensors, the first is .*linear_1.weight"),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        "(lacks files of its processor|processor files of .* cannot be used)",
    ),
    "no processor": (
        lambda f: [(f / name).unlink() for name in ("processor_config.json", "tokenizer_config.json")],
        "(lacks files of its processor|no processor for images and text)",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_folder(folder: Path, breakage: str) -> None:
    harm, message = BREAKAGES[breakage]
    harm(folder)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder, progress=False)


@pytest.mark.parametrize("name", [Path("no_such_folder"), "./no_such", "/no/such", "~/no_such_x", "", "a/b/c"])
def test_neither_folder_nor_id(name: str | Path) -> None:
    with pytest.raises(ValueError, match="is neither a folder nor a model id"):
        load_pretrained(name)


def test_a_file_is_no_folder() -> None:
    with pytest.raises(ValueError, match=r"is a file; give the folder that holds config\.json"):
        load_pretrained(default_path() / "config.json")


def test_name_of_another_type() -> None:
    with pytest.raises(TypeError, match="name_or_path must be a model id or a folder, got int"):
        load_pretrained(3)  # type: ignore[arg-type]


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .*'bfloat16'.*got 'half'"):
        load_pretrained(default_path(), dtype="half", progress=False)


def test_hub_model_that_is_not_cached() -> None:
    with pytest.raises(OSError, match=r"'mmfast-tests/none' cannot be fetched: check the spelling, the network"):
        load_pretrained("mmfast-tests/none", local_files_only=True)


@pytest.mark.parametrize(
    ("error", "installed", "message"),
    [
        (
            ImportError("XVideoProcessor requires the Torchvision library"),
            False,
            "needs torchvision.*Install the release",
        ),
        (AttributeError("VIDEO_PROCESSOR_MAPPING has no attribute '_extra_content'"), False, "needs torchvision"),
        (RuntimeError("operator torchvision::nms does not exist"), True, "installed but may not fit.*uninstall it"),
        (ImportError("This processor requires num2words"), False, "requires num2words"),
    ],
)
def test_processor_that_lacks_a_package(
    monkeypatch: pytest.MonkeyPatch, error: Exception, installed: bool, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", fail)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(ImportError, match=message):
        load_pretrained(default_path(), progress=False)


def test_code_is_never_trusted_and_weights_are_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for factory in (loading.AutoConfig, loading.AutoProcessor, loading.AutoModelForImageTextToText):
        real = factory.from_pretrained

        def spy(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            seen.append(kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(factory, "from_pretrained", spy)
    load_pretrained(default_path(), progress=False)
    assert len(seen) >= 3
    assert {call["trust_remote_code"] for call in seen} == {False}
    assert seen[-1]["use_safetensors"] is True


@pytest.mark.parametrize(
    ("stored", "asked", "loaded"),
    [
        ("float16", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("float16", "auto", torch.float16),
        ("float16", "bfloat16", torch.bfloat16),
        ("float16", torch.float32, torch.float32),
    ],
)
def test_dtype(folder: Path, stored: str, asked: torch.dtype | str | None, loaded: torch.dtype) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(getattr(torch, stored)) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    edit_config(folder, dtype=stored)
    model, _ = load_pretrained(folder, dtype=asked, progress=False)
    assert model.dtype is loaded


def test_pad_token_is_supplied(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    _, processor = load_pretrained(folder, progress=False)
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_bar_setting_is_given_back(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], enabled: bool
) -> None:
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    try:
        load_pretrained(default_path(), progress=False)
        assert capfd.readouterr().err == ""
        assert logging.is_progress_bar_enabled() is enabled
        load_pretrained(default_path())
        assert ("Loading weights" in capfd.readouterr().err) is enabled
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
