"""Load any vision-language model with its processor: safetensors only, never code from a repository."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    ProcessorMixin,
)
from transformers.utils import logging

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_pretrained(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    local_files_only: bool = False,
    revision: str = "main",
    progress: bool = True,
) -> tuple[nn.Module, Any]:
    """Load a model and its processor, ready to generate.

    Weights come from safetensors files alone, and code inside a repository is never run. The model is in
    evaluation mode; the tokenizer pads on the left, which batched generation needs.

    Args:
        name_or_path: a model id on the hub, or a folder that ``save_pretrained`` wrote.
        dtype: ``torch.float32``, ``"bfloat16"`` and so on, or ``"auto"`` for the type of the file. None is
            ``"auto"``, except that a float16 file becomes float32 on a CPU, where float16 is slow.
        device: where to put the model; None leaves it on the CPU.
        attn_implementation: ``"sdpa"``, ``"eager"``, ...; None lets transformers choose.
        local_files_only: take what the hub cache holds and do not use the network.
        revision: branch, tag or commit on the hub; ignored for a folder.
        progress: show a bar while weights are read.

    Returns:
        ``(model, processor)``.

    Raises:
        ValueError: if the folder, the model type, the weights, the processor or an argument will not do.
        OSError: if files of a hub model cannot be fetched.
        ImportError: if the processor needs a package that is missing or broken.

    Example:
        >>> import mmfast
        >>> model, processor = load_pretrained(Path(mmfast.__file__).parent / "data" / "tinyvlm", progress=False)
        >>> model.dtype, processor.tokenizer.padding_side
        (torch.float32, 'left')
    """
    place = torch.device("cpu" if device is None else device)
    source = _source(name_or_path)
    options: dict[str, Any] = {
        "local_files_only": local_files_only,
        "revision": revision,
        "trust_remote_code": False,
    }
    config = _load_config(source, options)
    # Before the weights: a processor that cannot be made should not cost a long download.
    processor = _load_processor(source, options)
    with _progress_bar(progress):
        model = _load_weights(source, config, _dtype(dtype, config, place), attn_implementation, options)
    return model.to(place).eval(), processor


def _source(name_or_path: str | Path) -> str:
    """Check what can be checked without the network."""
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"name_or_path must be a model id or a folder, got {type(name_or_path).__name__}.")
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if not name or not folder.exists():
        if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or not name or name.count("/") > 1:
            raise ValueError(f"{name!r} is neither a folder nor a model id like 'organisation/model'.")
        return name
    if not folder.is_dir():
        raise ValueError(f"{name!r} is a file; give the folder that holds config.json and the weights.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name!r} holds no config.json; give a folder that save_pretrained() wrote.")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f"; {pickled[0]} may run code when it is opened and is not read" if pickled else ""
        raise ValueError(
            f"{name!r} holds no *.safetensors weights{found}. "
            "Load the model elsewhere and write it again with save_pretrained()."
        )
    return str(folder)


def _load_config(source: str, options: dict[str, Any]) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise _needs_code(source) from error
        raise ValueError(
            f"the config.json of {source!r} does not describe a model that this transformers knows: {_short(error)}"
        ) from error
    except OSError as error:
        if Path(source).is_dir():
            raise ValueError(f"the config.json of {source!r} cannot be read: {_short(error)}") from error
        raise _unreachable(source, error) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"{source!r} is a {config.model_type!r} model, which does not take images and write text.")
    return config


def _load_processor(source: str, options: dict[str, Any]) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
    except (ImportError, AttributeError, RuntimeError) as error:
        # Video processors exist for torchvision only. Without it some releases end in an AttributeError.
        raise ImportError(f"the processor of {source!r} cannot be made: {_torchvision_hint(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise _needs_code(source) from error
        raise ValueError(f"the processor files of {source!r} cannot be used: {_short(error)}") from error
    except OSError as error:
        if Path(source).is_dir():
            raise ValueError(f"{source!r} lacks files of its processor: {_short(error)}") from error
        raise _unreachable(source, error) from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{source!r} has a {type(processor).__name__} but no processor for images and text together; "
            "add its processor_config.json or preprocessor_config.json."
        )
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _load_weights(
    source: str, config: Any, dtype: torch.dtype | str, attention: str | None, options: dict[str, Any]
) -> nn.Module:
    if attention is not None:
        options = {**options, "attn_implementation": attention}
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise ValueError(f"the weights of {source!r} are damaged: {_short(error)}") from error
    except OSError as error:
        if "safetensors" in str(error):
            raise ValueError(
                f"{source!r} has no *.safetensors weights, and others are not read. "
                "Load the model elsewhere and write it again with save_pretrained()."
            ) from error
        raise _unreachable(source, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers only warns, and goes on with random numbers in their place.
        raise ValueError(f"the weights of {source!r} lack {len(missing)} tensors, the first is {missing[0]!r}.")
    loaded: nn.Module = model
    return loaded


def _dtype(dtype: torch.dtype | str | None, config: Any, device: torch.device) -> torch.dtype | str:
    if dtype is None:
        stored = getattr(config, "dtype", None)
        return torch.float32 if device.type == "cpu" and stored is torch.float16 else "auto"
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {(*_DTYPES, 'auto')}, got {dtype!r}.")
        return _DTYPES[dtype]
    return dtype


def _torchvision_hint(error: Exception) -> str:
    if isinstance(error, ImportError) and "torchvision" not in str(error).lower():
        return _short(error)
    if importlib.util.find_spec("torchvision") is None:
        return (
            "it needs torchvision, as every processor with a video slot does. Install the release that belongs to "
            f"torch {torch.__version__} (pip install torchvision, from the same index as torch)."
        )
    return (
        f"torchvision is installed but may not fit torch {torch.__version__}. Reinstall the matching release, "
        f"or uninstall it: processors without a video slot do not need it. ({_short(error)})"
    )


def _needs_code(source: str) -> ValueError:
    return ValueError(
        f"{source!r} needs Python code from its repository, which mmfast never runs; "
        "look for a version of the model that transformers has built in."
    )


def _unreachable(source: str, error: OSError) -> OSError:
    return OSError(
        f"{source!r} cannot be fetched: check the spelling, the network and, for a gated model, your access; "
        f"or download it elsewhere and give the folder. ({_short(error)})"
    )


def _short(error: Exception) -> str:
    """The beginning of a message, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "..."


@contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    """Hide the bar of transformers, and give it back as it was."""
    was_shown = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown and not shown:
            logging.enable_progress_bar()
