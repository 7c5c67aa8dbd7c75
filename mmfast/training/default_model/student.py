"""The model in training: the vision-language model itself, and what only training needs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import mmfast
from mmfast.eval.datasets.shapes.scene import CHARACTERS, COLORS, GRID, SHAPES
from mmfast.training.default_model.packing import Packed
from mmfast.training.default_model.world import LABELS, PATCHES
from mmfast.training.objective import IGNORED

_BACKGROUND = {"color": 0.12, "shape": 0.12, "character": 0.05, "size": 0.05, "centre": 0.25, "row": 0.0, "column": 0.0}
# Without rows and columns a tower that only names things forgets where they are, and no later stage brings that back.
_WEIGHT = {"color": 1.0, "shape": 1.0, "character": 1.5, "size": 0.5, "centre": 1.0, "row": 1.0, "column": 1.0}
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


class Student(nn.Module):
    """A fresh model of the embedded kind, with heads that read labels off patches, and codes for symbols.

    Args:
        layers: decoder layers.
        seed: of the weights.
    """

    def __init__(self, layers: int = 8, seed: int = 0) -> None:
        super().__init__()
        shipped, self.processor = mmfast.load_default(dtype="float32")
        config: Any = copy.deepcopy(shipped.config)
        config.text_config.num_hidden_layers = layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = type(shipped)(config).float()
            _initialise(self.model)
            width = config.vision_config.hidden_size
            self.norm = nn.LayerNorm(width)
            self.heads = nn.ModuleDict({name: nn.Linear(width, values) for name, values in LABELS.items()})
            self.present = nn.Linear(width, len(COLORS) * len(SHAPES) + len(CHARACTERS))
            self.symbols = Symbols(config.text_config.hidden_size, self.processor.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights lie; whatever it is shown must lie there too."""
        return self.present.weight.device

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return self.model.model.vision_tower

    @property
    def language(self) -> Any:
        """The decoder without its output layer."""
        return self.model.model.language_model

    @property
    def middle(self) -> int:
        """The layer in the middle of the decoder."""
        return len(self.language.layers) // 2

    @property
    def projector(self) -> Any:
        """What brings patches to the width of the decoder."""
        return self.model.model.multi_modal_projector

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Run the vision tower.

        Args:
            pixels: float ``[F, 3, 224, 224]``.

        Returns:
            ``[F, 256, Dv]`` features as the model selects them, and ``[F, Dv]`` the last state of the class token.
        """
        out = self.tower(pixels, output_hidden_states=True)
        return out.hidden_states[-2][:, 1:], out.last_hidden_state[:, 0]

    def dense_loss(self, features: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Read the labels off the patches.

        Args:
            features: ``[F, 256, Dv]``.
            labels: name -> int64 ``[F, 256]``.

        Returns:
            Scalar, and the accuracy of each label on patches that carry one.
        """
        normal = self.norm(features)
        total, figures = features.new_zeros(()), {}
        for name, head in self.heads.items():
            logits, wanted = head(normal).flatten(0, 1), labels[name].flatten()
            weights = torch.where(wanted > 0, 1.0, _BACKGROUND[name])
            each = functional.cross_entropy(logits, wanted, reduction="none")
            total = total + _WEIGHT[name] * (each * weights).sum() / weights.sum()
            there = wanted > 0
            right = (logits.argmax(-1) == wanted)[there].float().mean() if bool(there.any()) else torch.ones(())
            figures[name] = float(right)
        return total, figures

    def presence_loss(self, pooled: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Let the class token say which coloured shapes and which characters there are, so that it looks at them."""
        wanted = torch.zeros(pooled.shape[0], self.present.out_features, device=pooled.device)
        color, shape, character = (labels[name] for name in ("color", "shape", "character"))
        for frame in range(pooled.shape[0]):
            shapes = (shape[frame] > 0) & (shape[frame] <= len(SHAPES))
            wanted[frame, ((color[frame] - 1) * len(SHAPES) + shape[frame] - 1)[shapes]] = 1.0
            wanted[frame, (len(COLORS) * len(SHAPES) + character[frame] - 1)[character[frame] > 0]] = 1.0
        return functional.binary_cross_entropy_with_logits(self.present(pooled), wanted)

    def place_loss(self, visual: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Let what stands for the patch of an object say in words where it lies, as the symbols do.

        Args:
            visual: ``[F, 256, D]``, what the language model is given.
            labels: name -> int64 ``[F, 256]``.
        """
        shown = (labels["shape"] > 0).flatten()
        if not bool(shown.any()):
            return visual.sum() * 0.0
        states = functional.rms_norm(visual.flatten(0, 1)[shown], visual.shape[-1:])
        losses: list[Tensor] = []
        for line, words in zip(("row", "column"), self.symbols.place_words(states.device), strict=True):
            # The middle has no word: its score is that of saying nothing.
            said = torch.where(words >= 0, states @ _worded(words, self.language.embed_tokens.weight).T, 0.0)
            losses.append(functional.cross_entropy(said, self.symbols.thirds(labels[line].flatten()[shown])))
        return torch.stack(losses).mean()

    def read(
        self, packed: Packed, visual: Tensor, *, attended: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Answer the questions of a packed batch.

        Args:
            packed: the batch.
            visual: ``[F, 256, D]``, what stands for each patch.
            attended: the layers that are asked to look at what an answer depends on.

        Returns:
            The loss of the answers, the loss of attention (0 where it is not looked at), and figures.
        """
        table = self.language.embed_tokens.weight
        embeds = functional.embedding(packed.ids, table)
        rows = packed.places
        shown = visual[packed.patches[:, 0], packed.patches[:, 1]].to(embeds.dtype)
        embeds = embeds.index_put((rows[:, 0], rows[:, 1]), shown)
        hidden = ~packed.visible
        mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, torch.finfo(torch.float32).min)
        out = self.language(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=packed.positions,
            use_cache=False,
            output_attentions=bool(attended),
        )
        learned = packed.targets != IGNORED
        logits = out.last_hidden_state[learned] @ table.T
        wanted = packed.targets[learned]
        loss = functional.cross_entropy(logits, wanted)
        figures = {"answer": float(loss.detach()), "tokens_right": float((logits.argmax(-1) == wanted).float().mean())}
        looked = _attention_loss(packed, [out.attentions[i] for i in attended]) if attended else loss.new_zeros(())
        return loss, looked, figures

    def save(self, path: Path) -> None:
        """Write all weights."""
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        state.pop("model.lm_head.weight", None)
        save_file(state, path)

    def load(self, path: Path) -> None:
        """Read all weights.

        Raises:
            ValueError: if they belong to another student.
        """
        missing, unknown = self.load_state_dict(load_file(path), strict=False)
        if unknown or set(missing) - {"model.lm_head.weight"}:
            raise ValueError(f"{path} holds another student: {[*missing, *unknown][:3]}")


class Symbols(nn.Module):
    """Stands for a patch what is known of it: the words of its object, and where it lies.

    Args:
        width: D of the language model.
        tokenizer: of the language model.
    """

    words: Tensor

    def __init__(self, width: int, tokenizer: Any) -> None:
        super().__init__()
        self.row, self.column = nn.Embedding(GRID, width), nn.Embedding(GRID, width)
        self.flag = nn.Embedding(3, width)
        for table in (self.row, self.column, self.flag):
            nn.init.normal_(table.weight, std=0.02)

        def ids(*words: str) -> list[int]:
            return [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] if word else -1 for word in words]

        self._tables = {
            "color": [-1, *ids(*COLORS)],
            "shape": [-1, *ids(*SHAPES), -1],
            "character": [-1, *ids(*CHARACTERS)],
            "size": [-1, *ids("small", "large")],
        }
        self._above, self._beside = ids(*_ROWS), ids(*_COLUMNS)

    def place_words(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the words of the three rows and of the three columns of places, int64 ``[3]`` each, -1 for none."""
        return torch.tensor(self._above, device=device), torch.tensor(self._beside, device=device)

    @staticmethod
    def thirds(lines: Tensor) -> Tensor:
        """Return which third of the picture rows or columns lie in; they count from 1."""
        return (lines - 1) * 3 // GRID

    def forward(self, labels: dict[str, Tensor], words: Tensor) -> Tensor:
        """Compose the symbols.

        Args:
            labels: name -> int64 ``[F, 256]``.
            words: the word embeddings ``[V, D]``.

        Returns:
            ``[F, 256, D]``.
        """
        device = words.device
        place = torch.arange(PATCHES, device=device)
        row, column = place // GRID, place % GRID
        there = labels["shape"] > 0
        flag = there.long() + labels["centre"]
        out: Tensor = self.row(row) + self.column(column) + self.flag(flag)
        for name, table in self._tables.items():
            out = out + _worded(torch.tensor(table, device=device)[labels[name]], words)
        above, beside = self.place_words(device)
        where = _worded(above[self.thirds(row + 1)], words) + _worded(beside[self.thirds(column + 1)], words)
        return out + 0.7 * where * there[..., None]


def _attention_loss(packed: Packed, attentions: Sequence[Tensor]) -> Tensor:
    """Ask every second head of some layers to look at the objects that an answer depends on."""
    there = packed.owned.any(dim=1)
    if not bool(there.any()):
        return torch.zeros((), device=packed.owned.device)
    rows, places = packed.asked[there, 0], packed.asked[there, 1]
    losses = []
    for attention in attentions:
        mass = (attention[rows, ::2, places] * packed.owned[there][:, None]).sum(dim=-1)
        losses.append(-(mass + 1e-4).log().mean())
    return torch.stack(losses).mean()


def _worded(ids: Tensor, words: Tensor) -> Tensor:
    return functional.embedding(ids.clamp(min=0), words) * (ids >= 0)[..., None]


def _initialise(model: nn.Module) -> None:
    """Draw the weights; the ends of residual branches begin at zero, so that depth does no harm at first."""
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            ends = name.endswith(("o_proj", "down_proj", "out_proj", "fc2"))
            nn.init.zeros_(part.weight) if ends else nn.init.normal_(part.weight, std=part.in_features**-0.5 * 0.7)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)


def whiten(student: Student, pixels: Tensor) -> None:
    """Start the patch embedding with turned, whitened principal components, the positions with waves.

    Args:
        student: is changed.
        pixels: ``[F, 3, 224, 224]`` pictures to take the components from.
    """
    tower = getattr(student.tower, "vision_model", student.tower)
    embeddings = tower.embeddings
    weight = embeddings.patch_embedding.weight
    size = weight.shape[-1]
    patches = functional.unfold(pixels, size, stride=size).transpose(1, 2).reshape(-1, weight[0].numel())
    centred = patches - patches.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    width = weight.shape[0]
    best = vectors[:, -width:] / (values[-width:] + 1e-2).sqrt()
    turn = torch.linalg.qr(torch.randn(best.shape[1], width, generator=torch.Generator().manual_seed(1)))[0]
    with torch.no_grad():
        weight.copy_((best @ turn).T.reshape(weight.shape))
        table = embeddings.position_embedding.weight
        table[1:].copy_(0.5 * _waves(table.shape[1]))


def _waves(width: int) -> Tensor:
    quarter = width // 4
    rates = torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)
    place = torch.arange(PATCHES)
    angles = [axis[:, None] * rates for axis in (place // GRID, place % GRID)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
