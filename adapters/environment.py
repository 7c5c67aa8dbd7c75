"""What the installed transformers offers: model classes and attention implementations."""

from __future__ import annotations

import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available, is_torch_available


def importable(model_type: str) -> str:
    """Say in words whether the model class of a type can be imported here.

    Example:
        >>> importable("llava")
        'works'
    """
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    if name is None:
        return "unknown to this transformers; install a newer one"
    try:
        getattr(transformers, name if isinstance(name, str) else name[0])
    except (ImportError, RuntimeError, AttributeError) as error:
        return f"cannot be imported: {' '.join(str(error).split())[:120]}"
    return "works"


def attention_backends() -> dict[str, str]:
    """List the attention implementations with whether they run here.

    Example:
        >>> attention_backends()["sdpa"]
        'works'
    """
    found = {"eager": "works", "sdpa": "works" if is_torch_available() else "needs torch"}
    for name in sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()):
        if name == "flash_attention_2":
            found[name] = "works" if is_flash_attn_2_available() else "needs a CUDA device and the package flash-attn"
    found["flex_attention"] = "works, but not with methods that drop inside the language model"
    return found
