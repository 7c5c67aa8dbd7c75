"""What every model family has in common, and the registry of families."""

from __future__ import annotations

import difflib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from mmfast.adapters.alignment import align_tiles, has_class_token, tower_blocks
from mmfast.budget import LanguageShape
from mmfast.tokens import Layout

if TYPE_CHECKING:
    from mmfast.adapters.binding import Binding
    from mmfast.adapters.shared import Contexts
    from mmfast.adapters.streaming import Stream
    from mmfast.kv.base import Evictor
    from mmfast.plan import Plan

_ENTRY_POINTS = "mmfast.adapters"
_FAMILIES: dict[str, type[Adapter]] = {}

A = TypeVar("A", bound="type[Adapter]")


def family(*model_types: str) -> Callable[[A], A]:
    """Register an adapter for the ``config.model_type`` values it serves; use as a class decorator.

    Raises:
        ValueError: if another adapter serves one of them already.
    """

    def add(adapter: A) -> A:
        for model_type in model_types:
            if _FAMILIES.get(model_type, adapter) is not adapter:
                raise ValueError(f"model type {model_type!r} is already served by {_FAMILIES[model_type].__name__}")
            _FAMILIES[model_type] = adapter
        adapter.model_types = model_types
        return adapter

    return add


class Adapter:
    """Find the parts of a model by role and describe its visual tokens.

    A family needs a subclass only for what differs: usually ``layouts``.

    Attributes:
        model_types: the ``config.model_type`` values served (set by :func:`family`).
        can_compact: positions may be renumbered; not so with multi-dimensional RoPE. See also ``slides``.
        masks_before_decoder: the family builds 4-D masks before it calls its decoder.
        reads_both_ways: prompts are read in both directions, text included.
        no_layer_drops: why tokens cannot be dropped between layers; empty where they can.
        merges_in_encoder: patches become visual tokens one by one, so that the encoder may merge some of them.
        packs_patches: the vision encoder takes the patches of all images in one sequence, and their grids.
        signals: names of the signals the family can give to methods.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    can_compact: ClassVar[bool] = True
    masks_before_decoder: ClassVar[bool] = False
    reads_both_ways: ClassVar[bool] = False
    no_layer_drops: ClassVar[str] = ""
    merges_in_encoder: ClassVar[bool] = False
    packs_patches: ClassVar[bool] = False
    signals: ClassVar[frozenset[str]] = frozenset(
        {
            "cls_attention",
            "cls_logits",
            "received_attention",
            "keys",
            "queries",
            "patch_features",
            "cls_features",
            "text_embeds",
            "attention",
            "embeds",
            "final_norm",
            "layer_norm",
            "activations",
            "rotation",
            "output_projection",
        }
    )

    # The parts are Any: what they offer is the families' business and in no static type.
    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @cached_property
    def base(self) -> Any:
        """The model without its language-modelling head."""
        return self.model.base_model

    @cached_property
    def decoder(self) -> Any:
        """The language model that ``base`` calls with embeddings."""
        return self.model.get_decoder()

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers, first to last."""
        found: Sequence[nn.Module] = self.decoder.layers[: self.shape.layers]
        return found

    @property
    def text_config(self) -> Any:
        """Configuration of the language model; its attention modules hold this very object."""
        return self.decoder.config

    @property
    def placeholders(self) -> dict[str, int]:
        """Modality -> id of the token that stands for one visual token in ``input_ids``."""
        config = self.model.config
        found = {}
        for modality in ("image", "video"):
            token = getattr(config, f"{modality}_token_id", None)
            if token is None:
                token = getattr(config, f"{modality}_token_index", None)
            if token is not None:
                found[modality] = int(token)
        return found

    @cached_property
    def shape(self) -> LanguageShape:
        """The sizes that decide the cost of the language model."""
        config = self.decoder.config
        heads = config.num_attention_heads
        return LanguageShape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    @property
    def slides(self) -> bool:
        """Whether some layers look through a sliding window, which counts original positions."""
        config = self.text_config
        kinds = getattr(config, "layer_types", None)
        if kinds is not None:
            return "sliding_attention" in kinds
        return getattr(config, "sliding_window", None) is not None

    def attention(self, layer: nn.Module) -> nn.Module:
        """Return the attention module of a decoder layer."""
        found: nn.Module = layer.self_attn  # type: ignore[assignment]
        return found

    def attention_input(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Normalise hidden states ``[B, S, D]`` as the layer does before its attention."""
        normed: Tensor = layer.input_layernorm(hidden)  # type: ignore[operator]
        return normed

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Normalise hidden states ``[B, S, D]`` as the decoder does after its last layer."""
        normed: Tensor = self.decoder.norm(hidden)
        return normed

    def feed_forward(self, layer: nn.Module) -> nn.Module:
        """Return the feed-forward part of a decoder layer."""
        found: nn.Module = layer.mlp  # type: ignore[assignment]
        return found

    def feed_forward_end(self, layer: nn.Module) -> nn.Module:
        """Return the module whose output is what the feed-forward part adds to the residual stream."""
        # Some families normalise once more; a factor before that norm would be undone by it.
        found = getattr(layer, "post_feedforward_layernorm", None)
        return found if isinstance(found, nn.Module) else self.feed_forward(layer)

    def down_projection(self, layer: nn.Module) -> nn.Module:
        """Return the projection whose input are the activations of the feed-forward part.

        Raises:
            ValueError: if there is no single one, as in mixtures of experts.
        """
        part = self.feed_forward(layer)
        for name in ("down_proj", "fc2"):
            found = getattr(part, name, None)
            if isinstance(found, nn.Module):
                return found
        raise ValueError(
            f"the feed-forward part {type(part).__name__} has no single down projection, so methods that read its "
            "activations cannot run on this model"
        )

    @property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def output_projection(self, layer: nn.Module) -> nn.Linear:
        """Return the projection behind the attention of a decoder layer.

        Raises:
            ValueError: if it cannot be found.
        """
        module = self.attention(layer)
        for name in ("o_proj", "out_proj", "dense", "wo"):
            found = getattr(module, name, None)
            if isinstance(found, nn.Linear):
                return found
        raise ValueError(f"the attention module {type(module).__name__} has no linear output projection")

    def prompt_positions(self, inputs: Mapping[str, Any], start: int) -> Tensor:
        """Return the position ids ``[1, n]`` of one unpadded prompt that begins at position ``start``."""
        ids = inputs["input_ids"]
        return torch.arange(start, start + ids.shape[1], device=ids.device)[None]

    def text_positions(self, places: Tensor) -> Tensor:
        """Turn places ``[m]`` of text into position ids as :meth:`rotary` reads them."""
        return places[None]

    def rotary(self, layer: nn.Module, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines for new positions ``[B, S]``."""
        tables: tuple[Tensor, Tensor] = self.decoder.rotary_emb(hidden, position_ids=position_ids)
        return tables

    def rotary_frequencies(self) -> Tensor | None:
        """Return the frequencies ``[d/2]`` of the rotary position embedding; None if there is not exactly one set."""
        found = getattr(self.decoder.rotary_emb, "inv_freq", None)
        return found if isinstance(found, Tensor) else None

    def layouts(self, modality: str, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Describe the visual tokens of each image or video, in the order of the placeholders.

        The default serves every family whose items are square grids.

        Args:
            modality: ``"image"`` or ``"video"``.
            arguments: arguments of the model's ``get_{modality}_features`` by name.
            features: what it returned, one ``[n, D]`` tensor per item.
        """
        return [square_or_unknown(len(item), modality) for item in features]

    # ---------------------------------------------------------- vision encoder

    def tower(self, modality: str) -> Any:
        """Return the vision encoder for images or videos."""
        return self.model.get_encoder(modality=modality)

    def vision_blocks(self, modality: str) -> Sequence[nn.Module]:
        """Return the blocks of the vision encoder, first to last."""
        return tower_blocks(self.tower(modality))

    def class_token(self, modality: str) -> bool:
        """Say whether the vision encoder has a class token, which then stands before the patches."""
        return has_class_token(self.tower(modality))

    def keeps_class_token(self, modality: str, arguments: Mapping[str, Any]) -> bool:
        """Say whether the class token of a tile becomes a visual token, as the first of its tile."""
        chosen = arguments.get("vision_feature_select_strategy")
        chosen = chosen or getattr(self.model.config, "vision_feature_select_strategy", "default")
        return chosen == "full"

    def feature_layers(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the layers whose outputs the projector reads, counted as hidden states are (0 = embeddings)."""
        # Releases differ in how VipLLaVA calls them.
        names = ("vision_feature_layers", "vision_feature_layer")
        given = [arguments.get(name) for name in names]
        configured = [getattr(self.model.config, name, None) for name in names]
        chosen = next((value for value in (*given, *configured) if value is not None), -1)
        return [chosen] if isinstance(chosen, int) else list(chosen)

    def feature_block(self, modality: str, arguments: Mapping[str, Any]) -> int:
        """Return the block whose output the model uses as features; of several joined ones, the deepest.

        Raises:
            ValueError: if the model uses what enters the first block.
        """
        depth = len(self.vision_blocks(modality))
        block = max(layer - 1 if layer >= 0 else depth + layer for layer in self.feature_layers(arguments))
        if not 0 <= block < depth:
            raise ValueError(
                f"layer='features' is no block of the vision encoder: the model reads hidden state {block + 1}"
            )
        return block

    def attention_block(self, modality: str, block: int) -> int:
        """Return the block that gives attention in place of ``block``, where that one does not see all patches."""
        return block

    def sequences(self, modality: str, arguments: Mapping[str, Any]) -> list[int] | None:
        """Return the patches of each image where the vision encoder packs them all in one sequence."""
        return None

    def align(
        self, modality: str, arguments: Mapping[str, Any], maps: Tensor, features: Sequence[Tensor]
    ) -> list[Tensor]:
        """Bring what is known of patches into the order of the visual tokens.

        Groups of patches that become one token are averaged; newline tokens get zeros. The default
        serves every family whose items are square tiles.

        Args:
            modality: ``"image"`` or ``"video"``.
            arguments: arguments of the model's ``get_{modality}_features`` by name.
            maps: ``[tiles, N, C]`` in the order of the vision encoder, ``[1, N, C]`` where it packs; with
                a first row for the class token if that becomes a visual token.
            features: what the model returned, one ``[n, D]`` tensor per item.

        Returns:
            ``[n, C]`` for each layout that ``layouts`` gives.

        Raises:
            ValueError: if they cannot be brought together.
        """
        return align_tiles(maps, features)

    def patches_per_side(self, modality: str) -> int | None:
        """Return the side of the square of patches that becomes one token; None where pictures cannot be resized."""
        return None

    def tiles_per_item(self, modality: str, arguments: Mapping[str, Any]) -> int:
        """Return how many tiles of the vision encoder make up one image or video."""
        return 1

    def projectable(self, modality: str, arguments: Mapping[str, Any]) -> bool:
        """Say whether the projector turns the output of the feature block into embeddings, token by token."""
        return False

    def pools_before_projecting(self, modality: str) -> bool:
        """Say whether patches are averaged before the projector, so that it still works token by token."""
        return False

    def project(self, features: Tensor) -> Tensor:
        """Turn features of the vision encoder ``[n, C]`` into embeddings ``[n, D]``."""
        projected: Tensor = self.base.multi_modal_projector(features.to(self.model.dtype)[None])[0]
        return projected

    # ------------------------------------------------------------------ binding

    @property
    def contexts(self) -> Contexts:
        """What keeps a prompt that has been read, to go on from it many times."""
        from mmfast.adapters.shared import Contexts

        return Contexts(self)

    def stream(self, evictor: Evictor, budget: int) -> Stream:
        """Open a cache for a video that keeps arriving."""
        from mmfast.adapters.streaming import Stream

        return Stream(self, evictor, budget)

    def bind(self, plan: Plan, *, replace: bool = False, **options: Any) -> Binding:
        """Put a plan to work on the model.

        Args:
            plan: the plan.
            replace: take off a plan that is at work already.
            options: further keywords of ``Binding``: ``clip``, ``reselect``, ``draft_model``, ``compile``.

        Raises:
            ValueError: if the model cannot do what the plan asks for; it is untouched then.
        """
        from mmfast.adapters.binding import Binding

        return Binding(self, plan, replace=replace, **options)

    def check(self) -> None:
        """Refuse models whose parts are not where they are expected.

        Raises:
            TypeError: naming what is missing.
        """
        for role, find in (("base_model", lambda: self.base), ("decoder layers", lambda: self.layers)):
            try:
                find()
            except (AttributeError, TypeError) as error:
                raise TypeError(
                    f"cannot find the {role} of {type(self.model).__name__}: {error}; pass the conditional-generation "
                    "model itself, not a part or a wrapper of it"
                ) from None


def square_or_unknown(tokens: int, modality: str = "image") -> Layout:
    """Lay tokens out as a square grid where their number allows it.

    Example:
        >>> square_or_unknown(9).row.max().item(), square_or_unknown(10).grid_known
        (2, False)
    """
    side = math.isqrt(tokens)
    return Layout.grid(side, side, modality=modality) if side * side == tokens else Layout.unknown(tokens, modality)


def packed_layout(packed: Tensor, crops: tuple[int, int] = (0, 0), side: int = 0) -> Layout:
    """Read the layout of an AnyRes image from coordinates that went through the family's own packing.

    Args:
        packed: ``[n, 4]`` (1, column, row, tile) per token as packed; newline tokens have 0 in channel 0.
            Tile 0 is the whole image; columns and rows of crops count over the grid of all crops. What
            unpadding cut off is missing, and where the packing shrank the crops places lie in between.
        crops: rows and columns of crops; (0, 0) where the whole image is all there is.
        side: patches per side of a crop.

    Example:
        >>> packed_layout(torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 0, 0]])).is_newline.tolist()
        [False, True]
    """
    newline = packed[:, 0] < 0.5
    tile = (packed[:, 3] > 0.5).long().masked_fill(newline, -1)
    row, col = torch.full_like(tile, -1), torch.full_like(tile, -1)
    boxes = torch.zeros(len(packed), 4)
    for number in (0, 1):
        mine = tile == number
        if not bool(mine.any()):
            continue
        row[mine], col[mine] = _ranks(packed[mine, 2]), _ranks(packed[mine, 1])
        # The grid that is left covers the image: what was cut off was padding.
        high, wide = int(row[mine].max()) + 1, int(col[mine].max()) + 1
        x, y = col[mine], row[mine]
        boxes[mine] = torch.stack([x / wide, y / high, (x + 1) / wide, (y + 1) / high], dim=-1)
    # A newline follows the last token of its row of crops; after a whole image it belongs to no row.
    for place in newline.nonzero().squeeze(-1).tolist():
        if tile[place - 1] == 1:
            tile[place], row[place] = 1, row[place - 1]
    crop = None
    if crops != (0, 0):
        # A patch reaches half a patch to either side; what lies on an edge belongs to the crop after it.
        down, across = ((torch.floor(packed[:, axis] + 0.501) // side).long() for axis in (2, 1))
        inside = (tile == 1) & ~newline
        crop = torch.where(inside, down.clamp(0, crops[0] - 1) * crops[1] + across.clamp(0, crops[1] - 1), -1)
    return Layout("image", torch.zeros_like(tile), tile, row, col, newline, boxes, crop=crop, crop_grid=crops)


def _ranks(values: Tensor) -> Tensor:
    """Number coordinates, which may be fractional and inexact, from 0; neighbours are at least 1 apart."""
    ordered, order = values.sort()
    ranks = torch.zeros_like(order)
    ranks[order] = torch.cat([ordered.new_zeros(1), ordered.diff() > 0.5]).long().cumsum(0)
    return ranks


@cache
def _load_families() -> None:
    """Import every module of this room, so that the family files register themselves."""
    package = import_module("mmfast.adapters")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"mmfast.adapters.{module.name}")
    for point in entry_points(group=_ENTRY_POINTS):
        point.load()


def families() -> dict[str, type[Adapter]]:
    """List the supported model types with the adapter of each.

    Example:
        >>> "llava" in families()
        True
    """
    _load_families()
    return dict(sorted(_FAMILIES.items()))


def for_model(model: object) -> Adapter:
    """Return the adapter of a model.

    Args:
        model: a Hugging Face vision-language model, possibly inside a PEFT wrapper.

    Raises:
        TypeError: if it is no model, or no adapter serves its family; the message lists what is
            supported and how to add a family.
    """
    known = families()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Hugging Face vision-language model, got {type(model).__name__}")
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if model_type not in known:
        near = difflib.get_close_matches(str(model_type), known, n=2)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise TypeError(
            f"no adapter for {type(inner).__name__} (model type {model_type!r}){hint}; supported model types: "
            f"{', '.join(known)}. To add a family, write one adapter file (CONTRIBUTING.md, 'Add a family') or "
            f"register a class under the entry-point group {_ENTRY_POINTS!r}"
        )
    adapter = known[str(model_type)](inner)
    adapter.check()
    return adapter
