"""Decode steps on a cache of codes, which are turned into numbers where they are attended to."""

from __future__ import annotations

from torch import Tensor

from mmfast.kernels.checks import attention_refusal, check_bool, check_heads, check_shape, gradient_refusal
from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.quant_decode import reference
from mmfast.kernels.words import Codes

__all__ = ["Codes", "quant_decode"]


def quant_decode(
    query: Tensor,
    key: Codes | None,
    value: Codes | None,
    loose_key: Tensor,
    loose_value: Tensor,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to codes and to the loose entries behind them; the numbers are never written out.

    Keys and values need not be packed up to the same entry.

    Args:
        query: ``[B, H, q, d]``; meant for q up to 8.
        key: the oldest keys as codes, for G heads, G dividing H; None = none.
        value: the oldest values as codes; None = none.
        loose_key: ``[B, G, m, d]``, the keys that follow.
        loose_value: ``[B, G, m', v]``, the values that follow; as many entries in all, n, as there are keys.
        visible: bool ``[B, S, n]``, or ``[B, S, q, n]`` where query rows differ, S dividing H: which entries are
            seen; None = all.
        bias: float ``[B, S, n]``, added to the logits of each entry, S dividing H; None = nothing.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits, for models that have one.

    Returns:
        ``[B, H, q, v]`` in the dtype of the query, and float32 ``[B, H, q]`` logarithm of the sum of the exponentials
        of the logits; zero and minus infinity for rows that see nothing.

    Raises:
        ValueError: if shapes do not fit, or codes have other than 2, 4 or 8 bits.
        TypeError: if the mask is not bool, or words are not int32.

    Example:
        >>> import torch
        >>> words, scale = torch.full((1, 1, 2, 1), 0x3210, dtype=torch.int32), torch.ones(1, 1, 2, 1)
        >>> codes, loose = Codes(words, scale, None, 16, 3, 4), torch.zeros(1, 1, 0, 4)
        >>> quant_decode(torch.zeros(1, 1, 1, 4), codes, codes, loose, loose)[0].flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    check_shape("query", query, "B H q d")
    batch, heads, tokens, width = query.shape
    check_shape("loose_key", loose_key, "B G m d", B=batch, d=width)
    groups = loose_key.shape[1]
    check_heads("loose_key", groups, 1, heads)
    check_shape("loose_value", loose_value, "B G m v", B=batch, G=groups)
    for name, codes, own in (("key", key, loose_key), ("value", value, loose_value)):
        if codes is not None:
            _check_codes(name, codes, own)
    entries = loose_key.shape[2] + (0 if key is None else key.tokens)
    others = loose_value.shape[2] + (0 if value is None else value.tokens)
    if entries != others:
        raise ValueError(f"value has {others} entries, must have as many as key: {entries}")
    if visible is not None:
        check_bool("visible", visible)
        visible = visible[:, :, None] if visible.ndim == 3 else visible
        rows = 1 if visible.ndim == 4 and visible.shape[2] == 1 else tokens
        check_shape("visible", visible, "B S q n", B=batch, q=rows, n=entries)
        check_heads("visible", visible.shape[1], 1, heads)
    if bias is not None:
        check_shape("bias", bias, "B S n", B=batch, n=entries)
        check_heads("bias", bias.shape[1], 1, heads)
    stored = [one for codes in (key, value) if codes is not None for one in (codes.words, codes.scale, codes.low)]
    refusal = (
        refusal_of(query, loose_key, loose_value, visible, bias, *stored)
        or attention_refusal(query, loose_key, loose_value)
        or gradient_refusal(query, loose_key, loose_value, bias, *stored)
        or _dtype_refusal(query, key, value)
    )
    options = {"scaling": scaling, "softcap": softcap}
    if chosen("quant_decode", refusal) == "triton":
        from mmfast.kernels.quant_decode import triton

        return triton.attend_codes(query, key, value, loose_key, loose_value, visible, bias, **options)
    return reference.attend_codes(query, key, value, loose_key, loose_value, visible, bias, **options)


def _check_codes(name: str, codes: Codes, loose: Tensor) -> None:
    """Refuse codes that do not belong to what follows them."""
    if codes.levels not in (4, 16, 256) or codes.axis not in (2, 3):
        raise ValueError(f"{name} has levels={codes.levels}, axis={codes.axis}; must be 4, 16 or 256, and 2 or 3")
    if codes.signed and codes.levels != 256:
        raise ValueError(f"{name} is signed with levels={codes.levels}; only bytes, of 256 levels, can be")
    if str(codes.words.dtype) != "torch.int32":
        raise TypeError(f"words of {name} are {codes.words.dtype}, must be torch.int32")
    batch, groups, _, width = loose.shape
    check_shape(f"words of {name}", codes.words, "B G n c", B=batch, G=groups)
    if codes.width != width:
        raise ValueError(f"{name} has {codes.width} channels, must have those of what follows it: {width}")
    for part, tensor in (("scale", codes.scale), ("low", codes.low)):
        if tensor is None:
            continue
        check_shape(f"{part} of {name}", tensor, "B G n d", B=batch, G=groups)
        other = 5 - codes.axis
        if tensor.shape[other] not in (1, codes.words.shape[other]) or codes.length % tensor.shape[codes.axis]:
            raise ValueError(
                f"{part} of {name} has shape {list(tensor.shape)}, must have a divisor of {codes.length} along axis "
                f"{codes.axis} and 1 or {codes.words.shape[other]} along axis {other}"
            )
    if codes.low is not None and codes.low.shape != codes.scale.shape:
        raise ValueError(f"low of {name} has shape {list(codes.low.shape)}, must be that of scale")


def _dtype_refusal(query: Tensor, *sides: Codes | None) -> str:
    dtypes = {codes.scale.dtype for codes in sides if codes is not None}
    return "codes stand for numbers of another dtype" if dtypes - {query.dtype} else ""
