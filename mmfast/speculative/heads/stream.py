"""Trained drafters over one row: the slots they read, what they remember, and where their weights lie.

Slot ``j`` reads the embedding of token ``j + 1`` and the model's last hidden state at ``j``, stands at the position of
token ``j``, and gives what foretells token ``j + 2``. Beyond what the model has verified, the head's own output takes
the place of the hidden state; once tokens are accepted, their slots are computed anew from the true states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from mmfast.speculative.base import Drafter, EachRow, Prefill, Request, RowSession, Session, Verified
from mmfast.speculative.heads.base import DecoderLayer, HeadConfig, Shapes, SlotCache, load_head, read_config, rotation

H = TypeVar("H", bound=nn.Module)


@dataclass(frozen=True)
class Slots:
    """What enters a head for a prompt.

    Attributes:
        inputs: ``[n, D]``.
        positions: int64 ``[n]`` or ``[3, n]``.
        places: int64 ``[n]``, number of the slot; -1 for tokens that stand for a compressed image.
        memo: what all later slots read besides, ``[1, D]``; None for nothing.
    """

    inputs: Tensor
    positions: Tensor
    places: Tensor
    memo: Tensor | None = None


class SlotHead(nn.Module):
    """A head that reads slots through decoder layers with keys and values of their own.

    Args:
        config: sizes of the layers.
        bias: whether queries, keys and values have one.
    """

    def __init__(self, config: HeadConfig, bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config, bias, first_norm=i > 0) for i in range(config.layers))

    def prompt(self, prefill: Prefill) -> Slots:
        """Turn a prompt of P tokens into its slots 0 to P - 2, not yet run."""
        text = self.fuse(prefill.embeds[1:], prefill.hidden[:-1], None)
        places = torch.arange(len(text), device=text.device)
        return Slots(text, prefill.positions[..., :-1], places)

    @abstractmethod
    def fuse(self, embeds: Tensor, features: Tensor, memo: Tensor | None) -> Tensor:
        """Make the inputs of slots of text.

        Args:
            embeds: ``[n, D]`` of tokens ``j + 1``.
            features: ``[n, D]``, last hidden states at ``j``.
            memo: of the prompt.

        Returns:
            ``[n, D]``.
        """

    def caches(self) -> list[SlotCache]:
        """Make an empty cache for each layer."""
        return [SlotCache() for _ in self.layers]

    def run(
        self, inputs: Tensor, positions: Tensor, caches: list[SlotCache] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Run the layers.

        Args:
            inputs: ``[n, D]``.
            positions: ``[n]`` or ``[3, n]``.
            caches: slots before, to which these are added; None for none.
            mask: bool ``[n, m]``, which slots each sees; None for all before it and itself.

        Returns:
            ``[n, D]``.
        """
        turn = rotation(self.config, positions)
        for index, layer in enumerate(self.layers):
            inputs = layer(inputs, turn, None if caches is None else caches[index], mask)
        return inputs


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind.

    Attributes:
        start: first token, at least 1: token 0 is in no slot.
        end: after the last.
        media: number of the image or video; -1 for text.
    """

    start: int
    end: int
    media: int

    @property
    def tokens(self) -> slice:
        """The tokens."""
        return slice(self.start, self.end)

    @property
    def slots(self) -> slice:
        """The slots that read these tokens, which are also the tokens one before."""
        return slice(self.start - 1, self.end - 1)


def runs(prefill: Prefill) -> list[Run]:
    """Split a prompt, its first token left out, into text, images and, where positions tell them, frames.

    Frames of a video stand apart where text is between them, or where the first of three rows of positions counts them.
    """
    media = torch.where(prefill.visual, prefill.media, -1)[1:]
    if not len(media):
        return []
    rows = [media]
    if prefill.positions.ndim == 2:
        rows.append(torch.where(media >= 0, prefill.positions[0, 1:], 0))
    marks = torch.stack(rows)
    cuts = ((marks[:, 1:] != marks[:, :-1]).any(dim=0).nonzero().squeeze(-1) + 1).tolist()
    kinds = media.tolist()
    return [Run(a + 1, b + 1, kinds[a]) for a, b in zip([0, *cuts], [*cuts, len(kinds)], strict=True)]


class Stream(RowSession):
    """The slots of one row.

    Attributes:
        feature: ``[1, D]``, last hidden state of the last verified token.

    Args:
        head: the head.
        request: the call of ``generate``.
        row: which row.
    """

    def __init__(self, head: SlotHead, request: Request, row: int) -> None:
        self.head, self.words = head, Words(request)
        prefill = request.prefill[row]
        slots = head.prompt(prefill)
        self.caches, self.memo = head.caches(), slots.memo
        if len(slots.inputs):
            head.run(slots.inputs, slots.positions, self.caches)
        self.feature = prefill.hidden[-1:]
        self.next = prefill.positions[..., -1:]
        self._waiting: list[int] = []
        self._features: list[Tensor] = []
        self._root_done = False

    def advance(self, root: int) -> Tensor:
        """Run the slots of the tokens accepted last and of the root; return the root's output ``[1, D]``."""
        tokens = [*self._waiting, root]
        features = torch.cat([*self._features, self.feature])
        inputs = self.head.fuse(self.words.embed(tokens), features, self.memo)
        steps = torch.arange(len(tokens), device=self.next.device)
        output = self.head.run(inputs, self.next + steps, self.caches)
        self.next = self.next + len(tokens)
        self._waiting, self._features, self._root_done = [], [], True
        return output[-1:]

    @torch.no_grad()
    def observe(self, verified: Verified) -> None:
        """Note the true states of what was accepted."""
        self.words.note(verified)
        path = list(verified.path)
        hidden = states(verified)[path]
        if not self._root_done:
            self._waiting.append(verified.tokens[0])
            self._features.append(self.feature)
        self._waiting += [verified.tokens[node] for node in path[1:]]
        self._features.append(hidden[:-1])
        self.feature, self._root_done = hidden[-1:], False


def states(verified: Verified) -> Tensor:
    """Return the last hidden states of all nodes.

    Raises:
        ValueError: if there are none.
    """
    if verified.hidden is None:
        raise ValueError("hidden of what was verified is None; trained drafters need the last hidden states")
    return verified.hidden


class Words:
    """Embeddings and output layer of the model, for drafting one row.

    Args:
        request: the call of ``generate``.
    """

    def __init__(self, request: Request) -> None:
        if request.embed is None or request.head is None:
            raise ValueError("embed and head of the request are None; trained drafters need both layers of the model")
        self._embed, self._head, self._device = request.embed, request.head, request.device
        self._size, self._stop, self._watches = request.vocabulary, request.stop, not request.sampling
        banned = sorted(token for token in request.excluded if 0 <= token < request.vocabulary)
        self._banned = torch.tensor(banned, dtype=torch.int64, device=request.device)

    def note(self, verified: Verified) -> None:
        """Draft no end of the answer any more once the model was kept from ending it, as ``min_new_tokens`` does."""
        if self._watches and verified.emitted[-1] not in self._stop:
            best = int(verified.logits[verified.path[-1]].argmax())
            if best in self._stop:
                more = self._banned.new_tensor([token for token in self._stop if token < self._size])
                self._banned, self._watches = torch.cat([self._banned, more]), False

    def embed(self, tokens: list[int] | list[list[int]] | Tensor) -> Tensor:
        """Embed tokens: ``[k]`` to ``[k, D]``, or with more dimensions."""
        found: Tensor = self._embed(torch.as_tensor(tokens, device=self._device))
        return found

    def logs(self, features: Tensor, output: nn.Module | None = None) -> Tensor:
        """Return log-probabilities of what follows, float32 ``[..., V]``; ``-inf`` for what is never drafted.

        Args:
            features: ``[..., D]``.
            output: the output layer; None for the model's.
        """
        logits = (self._head if output is None else output)(features)[..., : self._size]
        logs: Tensor = logits.float().log_softmax(dim=-1)
        return logs.index_fill(-1, self._banned, -torch.inf)


@dataclass(frozen=True)
class HeadDrafter(Drafter, Generic[H]):
    """Base of drafters whose weights were trained for one model.

    Attributes:
        path: folder with a ``.safetensors`` file and ``config.json``, or the file; empty for the head that ships
            with the embedded model.
    """

    needs_hidden: ClassVar[bool] = True

    path: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.path, str):
            raise ValueError(f"path={self.path!r} must be text: a folder or a .safetensors file")

    @abstractmethod
    def build(self, config: Mapping[str, Any], shapes: Shapes, width: int, vocabulary: int) -> H:
        """Make the module that fits a file.

        Args:
            config: its ``config.json``.
            shapes: name -> shape of the tensors in it.
            width: D of the model.
            vocabulary: V of the model.

        Raises:
            ValueError: if something in them is of no use.
        """

    @abstractmethod
    def row(self, head: H, request: Request, row: int) -> RowSession:
        """Begin one row."""

    @torch.no_grad()
    def start(self, request: Request) -> Session:
        """Read the weights, on the first call, and every row's prompt."""
        head = self.head(request)
        return EachRow([self.row(head, request, row) for row in range(len(request.prompts))])

    def head(self, request: Request) -> H:
        """Return the head for the model of a request; it is remembered over calls.

        Raises:
            ValueError: if there is none, or it does not fit the model.
        """
        if not request.prefill:
            raise ValueError("prefill of the request is empty; trained drafters need what the model made of the prompt")
        width = request.prefill[0].hidden.shape[-1]
        key = (self.path, width, request.vocabulary, request.device, request.dtype)
        if request.memory.get("key") != key:
            folder = Path(self.path) if self.path else shipped(self.name, width, request.vocabulary)
            request.memory["head"] = load_head(
                lambda config, shapes: self.build(config, shapes, width, request.vocabulary),
                folder,
                width,
                request.device,
                request.dtype,
            )
            request.memory["key"] = key
        head: H = request.memory["head"]
        return head


def shipped(name: str, width: int, vocabulary: int) -> Path:
    """Return the folder of the head that ships with the embedded model.

    Args:
        name: registry name of the method.
        width: D of the model it is wanted for.
        vocabulary: V of that model.

    Raises:
        ValueError: if no head ships for this method, or the model is another one.

    Example:
        >>> shipped("msd", 128, 640).name
        'msd'
    """
    folder = Path(str(files("mmfast"))) / "data" / "drafters" / name
    if not folder.is_dir():
        raise ValueError(
            f"no head of {name} ships with mmfast; give path, a folder with weights trained for this model"
        )
    config = read_config(folder)
    if (config["hidden_size"], config["vocab_size"]) != (width, vocabulary):
        raise ValueError(
            f"the head of {name} that ships with mmfast is for the embedded model (width {config['hidden_size']}, "
            f"{config['vocab_size']} tokens); this one has width {width} and {vocabulary} tokens: give path, a folder "
            "with weights trained for it"
        )
    return folder
