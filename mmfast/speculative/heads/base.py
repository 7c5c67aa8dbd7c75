"""What trained drafters are made of: sizes, a decoder layer with a cache of its own, and reading of weights.

Weights come from one ``.safetensors`` file with a ``config.json`` beside it, never from a pickle. Which parts a head
has (biases, output layers of its own) is read from the names in the file, the sizes of attention from the config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

H = TypeVar("H", bound=nn.Module)

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape of every tensor in a file."""

_COPIES = (
    "embed_tokens.weight",
    "lm_head.weight",
    "model.embed_tokens.weight",
    "prefix_embeding_layer.embed_tokens.weight",
)
"""Frozen copies of the model's own layers that official files carry; the model itself is there."""


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of the decoder layer of a head.

    Attributes:
        width: D, of the model's hidden states.
        inner: of the feed-forward block.
        heads: query heads.
        groups: key/value heads.
        head_dim: width of one head.
        layers: decoder layers.
        eps: of the norms.
        theta: base of the rotary positions.
        sections: pairs of a head that turn with each of the three rows of positions; empty where positions
            have one row. A head without sections reads the first row.
        interleaved: whether the rows take turns pair by pair and not in blocks.

    Raises:
        ValueError: for sizes that do not fit each other.
    """

    width: int
    inner: int
    heads: int
    groups: int
    head_dim: int
    layers: int = 1
    eps: float = 1e-6
    theta: float = 10000.0
    sections: tuple[int, ...] = ()
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ValueError(f"num_attention_heads={self.heads} must be a multiple of {self.groups} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")
        if self.sections and (len(self.sections) != 3 or sum(self.sections) * 2 != self.head_dim):
            raise ValueError(
                f"mrope_section={self.sections} must hold three numbers that add up to {self.head_dim // 2}"
            )

    @classmethod
    def read(cls, data: Mapping[str, Any], width: int) -> HeadConfig:
        """Take the sizes from a ``config.json`` in the form of Llama's.

        Args:
            data: the file.
            width: D of the model, for files that do not say it.

        Raises:
            ValueError: naming the field that is missing or of no use.

        Example:
            >>> config = HeadConfig.read({"num_attention_heads": 4, "intermediate_size": 96}, 64)
            >>> config.head_dim, config.groups
            (16, 4)
        """
        data = data.get("text_config", data)
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "mrope"):
            raise ValueError(f"rope_type={kind!r} must be 'default' or 'mrope': others are not built")
        if data.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act={data['hidden_act']!r} must be 'silu'")
        heads = size(data, "num_attention_heads")
        return cls(
            width=width,
            inner=size(data, "intermediate_size"),
            heads=heads,
            groups=size(data, "num_key_value_heads", heads),
            head_dim=size(data, "head_dim", max(1, width // heads)),
            layers=size(data, "num_hidden_layers", 1),
            eps=float(data.get("rms_norm_eps", 1e-6)),
            theta=float(data.get("rope_theta", rope.get("rope_theta", 10000.0))),
            sections=tuple(rope.get("mrope_section", ())),
            interleaved=bool(rope.get("mrope_interleaved", False)),
        )


def size(data: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Read one size from a config.

    Raises:
        ValueError: if it is missing, or no whole number of at least 1.

    Example:
        >>> size({"num_q": 2}, "num_q")
        2
    """
    value = data.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} in config.json must be an int of at least 1")
    return value


class SlotCache:
    """Keys and values of one layer, ``[G, n, d]``, in buffers that grow by doubling.

    Example:
        >>> cache = SlotCache()
        >>> cache.append(torch.ones(1, 3, 2), torch.ones(1, 3, 2))[0].shape
        torch.Size([1, 3, 2])
        >>> cache.crop(1)
        >>> cache.length
        1
    """

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[G, m, d]`` behind what is there and return everything."""
        end = self.length + keys.shape[1]
        if self._buffers is None or end > self._buffers[0].shape[1]:
            room = keys.shape[0], max(2 * end, 64), keys.shape[2]
            bigger = keys.new_empty(room), values.new_empty(room)
            for new, old in zip(bigger, self._buffers or (), strict=False):
                new[:, : self.length] = old[:, : self.length]
            self._buffers = bigger
        for buffer, piece in zip(self._buffers, (keys, values), strict=True):
            buffer[:, self.length : end] = piece
        self.length = end
        return self._buffers[0][:, :end], self._buffers[1][:, :end]

    def crop(self, length: int) -> None:
        """Forget what stands behind the first ``length`` entries."""
        self.length = min(self.length, length)


def rotation(config: HeadConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine for positions ``[n]`` or ``[3, n]``: float32 ``[n, d]`` each."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    speed = config.theta ** -(pairs / config.head_dim)
    rows = positions if positions.ndim == 2 else positions[None]
    if config.sections and rows.shape[0] == 3:
        row = torch.tensor(_row_of_pair(config), device=positions.device)
        angles = rows.float().T[:, row] * speed
    else:
        angles = rows[0].float()[:, None] * speed
    angles = angles.repeat(1, 2)
    return angles.cos(), angles.sin()


def _row_of_pair(config: HeadConfig) -> list[int]:
    if not config.interleaved:
        return [row for row, count in enumerate(config.sections) for _ in range(count)]
    rows = [0] * (config.head_dim // 2)
    for row in (1, 2):
        rows[row : 3 * config.sections[row] : 3] = [row] * len(rows[row : 3 * config.sections[row] : 3])
    return rows


class Attention(nn.Module):
    """Grouped attention with rotary positions over the slots of one row.

    Args:
        config: the sizes.
        bias: whether queries, keys and values have one.
    """

    def __init__(self, config: HeadConfig, bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.width, config.groups * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.width, config.groups * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], cache: SlotCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: ``[n, D]``, the new slots.
            turn: what :func:`rotation` says of their positions.
            cache: the slots before; None for none, and then gradients flow.
            mask: bool ``[n, m]``, which of all slots each new one sees; None for all before it and itself.

        Returns:
            ``[n, D]``.
        """
        d = self.config.head_dim
        q, k, v = (rearrange(layer(x), "n (h d) -> h n d", d=d) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _turned(q, turn), _turned(k, turn)
        if cache is not None:
            k, v = cache.append(k, v)
        new, total = q.shape[1], k.shape[1]
        if mask is None and 1 < new < total:
            mask = torch.ones(new, total, dtype=torch.bool, device=x.device).tril(total - new)
        causal = mask is None and new == total
        y = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        joined: Tensor = self.o_proj(rearrange(y[0], "h n d -> n (h d)"))
        return joined


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = (part.to(x.dtype) for part in turn)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class FeedForward(nn.Module):
    """Gated feed-forward block with SiLU."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.inner, bias=False)
        self.up_proj = nn.Linear(config.width, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, D]`` to ``[n, D]``."""
        y: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class DecoderLayer(nn.Module):
    """Decoder layer of the Llama family.

    Args:
        config: the sizes.
        bias: whether queries, keys and values have one.
        first_norm: whether the input is normed before attention; EAGLE leaves it out in its first layer.
    """

    def __init__(self, config: HeadConfig, bias: bool = False, first_norm: bool = True) -> None:
        super().__init__()
        self.self_attn = Attention(config, bias)
        self.mlp = FeedForward(config)
        if first_norm:
            self.input_layernorm = nn.RMSNorm(config.width, eps=config.eps)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.eps)
        self.first_norm = first_norm

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], cache: SlotCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Map ``[n, D]`` to ``[n, D]``; the arguments are those of :class:`Attention`."""
        x = x + self.self_attn(self.input_layernorm(x) if self.first_norm else x, turn, cache, mask)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


def load_head(
    build: Callable[[Mapping[str, Any], Shapes], H], path: Path, width: int, device: torch.device, dtype: torch.dtype
) -> H:
    """Read a head from its file.

    Args:
        build: makes the module from the config and the shapes in the file; its state dict says what is due.
        path: a folder with one ``.safetensors`` file, or the file; ``config.json`` lies beside it.
        width: D of the model.
        device: where to put it.
        dtype: floating type.

    Returns:
        The module, in evaluation mode, without gradients.

    Raises:
        ValueError: if a file is missing or cannot be read, or names and shapes are not those of the method and model.
    """
    weights = weights_file(path)
    config = read_config(weights.parent)
    told = config.get("text_config", config).get("hidden_size", width)
    if told != width:
        raise ValueError(f"the head in {str(path)!r} is for hidden states of width {told}; this model's have {width}")
    try:
        with safe_open(weights, framework="pt") as file:
            tensors = {_plain(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(weights)!r} cannot be read as safetensors: {error}") from error
    tensors = {name: value for name, value in tensors.items() if name not in _COPIES}
    try:
        with torch.device("meta"):
            head = build(config, {name: tuple(value.shape) for name, value in tensors.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the head in {str(path)!r}: {error}") from error
    due = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    _compare(due, tensors, path)
    head.load_state_dict(tensors, assign=True)
    return head.to(device=device, dtype=dtype).eval().requires_grad_(False)


def weights_file(path: Path) -> Path:
    """Find the weights.

    Raises:
        ValueError: if there are none, or several to choose from.
    """
    path = path.expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"path={str(path)!r} must be a .safetensors file or a folder that holds one")
        return path
    if not path.is_dir():
        raise ValueError(f"path={str(path)!r} must be a folder or a .safetensors file; there is neither")
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"path={str(path)!r} holds {len(found)} .safetensors files; name the one to read")
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    why = f"; {pickled[0]} may run code when it is opened and is not read, convert it" if pickled else ""
    raise ValueError(f"path={str(path)!r} holds no .safetensors file{why}")


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a folder.

    Raises:
        ValueError: if it is missing or no JSON object.
    """
    file = folder / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(folder)!r} holds no config.json, which says the sizes of the head") from error
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("text_config", {}), dict):
        raise ValueError(f"{str(file)!r} must hold a JSON object")
    return data


def _plain(name: str) -> str:
    for prefix in ("module.", "medusa_head."):
        name = name.removeprefix(prefix)
    return name


def _compare(due: Shapes, tensors: Mapping[str, Tensor], path: Path) -> None:
    for what, names in (("lacks", due.keys() - tensors.keys()), ("does not know", tensors.keys() - due.keys())):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(
                f"the file of path={str(path)!r} {what} {shown}"
                if what == "lacks"
                else f"the file of path={str(path)!r} holds tensors that this method {what}: {shown}"
            )
    for name, shape in due.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name} in path={str(path)!r} has shape {tuple(tensors[name].shape)}; config.json and this model "
                f"ask for {shape}"
            )
