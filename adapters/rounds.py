"""Run the model in rounds: a prompt, then blocks of drafted tokens of which some stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfast.adapters.call import Block, Inner
from mmfast.adapters.kernel_attention import arm_block
from mmfast.adapters.masks import gather_positions
from mmfast.adapters.self_draft import SelfDraft, VisualScores
from mmfast.speculative.base import Draft, Prefill
from mmfast.speculative.decode import Outcome
from mmfast.speculative.tree import ancestors, depths

if TYPE_CHECKING:
    from mmfast.adapters.binding import Binding

_HOLES = 0.25
"""Share of the answers' columns that may be empty before rows are moved together."""


@dataclass
class _Read:
    """What the decoder was given and gave for a prompt.

    Attributes:
        inner: the call.
        embeds: ``[B, K, D]`` what entered.
        positions: position ids it was entered with.
        asked: position ids of the whole prompt, before anything was renumbered.
        hidden: ``[B, K', D]`` what left its last layer.
    """

    inner: Inner
    embeds: Tensor
    positions: Tensor
    asked: Tensor
    hidden: Tensor | None = None


class ModelRounds:
    """One call of ``generate`` on one model: rows grow by different numbers of tokens.

    Every block of tokens is appended to the cache at a common place. What a row accepts moves to the front of
    its part of the block, so that the columns behind that are empty in some rows only: positions and places are
    those of each row, masks hide what is empty.

    Args:
        binding: the plan at work on the model.
        cache: a cache with logical layers.
    """

    def __init__(self, binding: Binding, cache: Any) -> None:
        self.binding, self.cache = binding, cache
        self.model = binding.adapter.model
        # Looked up once: it reads a signature.
        self._options = {"logits_to_keep": 0} if self.model._supports_logits_to_keep() else {}
        self.read: _Read | None = None
        self._hidden: Tensor | None = None
        self._start: Tensor | None = None
        self._seen = 0
        self.added: list[int] = []
        self._query = 0
        self._columns = 0
        self.scores: VisualScores | None = None

    # ------------------------------------------------------------------- drafting

    @property
    def seen(self) -> int:
        """Logical tokens of the prompt, earlier turns included."""
        return self._seen

    @property
    def prompt(self) -> Inner:
        """The call that brought the prompt."""
        if self.read is None:
            raise RuntimeError("no prompt has been read")
        return self.read.inner

    def itself(self) -> SelfDraft:
        """Let the model draft between its rounds, in its own cache."""
        return SelfDraft(self)

    def beside(self, cache: Any) -> ModelRounds:
        """Go on from the same prompt with another cache, which has to be told of all that is accepted."""
        other = ModelRounds(self.binding, cache)
        other.read, other._start, other._seen, other.added = self.read, self._start, self._seen, list(self.added)
        other.scores, other._columns = self.scores, self._columns
        return other

    def grown(self, added: Sequence[int], columns: int) -> None:
        """Note that the cache has been given tokens, so that each row has ``added`` now."""
        self.added = list(added)
        self._columns += columns
        self._tidy()

    # ------------------------------------------------------------------ listening

    def entered(self, inner: Inner, kwargs: Mapping[str, Any]) -> None:
        """Note where the next token stands, and let kernels attend from drafted ones where they can."""
        if inner.block is not None:
            self._arm_block(inner, inner.block)
        else:
            asked = inner.tables["asked positions"]
            self.read = _Read(inner, kwargs["inputs_embeds"], kwargs["position_ids"], asked)
            if self.scores is not None:
                self.scores.arm(inner)

    def _arm_block(self, inner: Inner, block: Block) -> None:
        # Weights of merged tokens depend on who looks, and a single token sees no tree.
        if inner.length == 1 or self.binding.calibrates:
            return
        for index in range(self.binding.adapter.shape.layers):
            if self.binding.kv.selects(inner, index) is None:
                arm_block(self.binding.adapter, inner, block, index)

    def left(self, inner: Inner, output: Any) -> None:
        """Note the last hidden states."""
        self._hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state

    # -------------------------------------------------------------------- prompt

    def prefill(self, run: Callable[[], Any], mask: Tensor | None) -> Any:
        """Run the prompt.

        Args:
            run: calls the model with it.
            mask: ``[B, S]``, which tokens are real; None = all.

        Returns:
            What the model returned.
        """
        self.binding.onlooker = self
        output = run()
        if self.read is None or self._hidden is None:
            raise RuntimeError("the decoder did not run on the prompt")
        asked, self.read.hidden = self.read.asked, self._hidden
        valid = torch.ones(asked.shape[-2:], dtype=torch.bool, device=asked.device)
        if mask is not None:
            valid = mask[:, -asked.shape[-1] :].to(asked.device).bool()
        last = asked.masked_fill(~valid, 0).amax(dim=-1, keepdim=True)
        if last.ndim == 3:
            # Text goes on behind what reaches farthest in any direction; a first row of four counts tokens.
            spatial = last[-3:].amax(dim=0, keepdim=True).expand(3, -1, -1)
            last = spatial if last.shape[0] == 3 else torch.cat([last[:1], spatial])
        self._start = last + 1
        self._seen = int(self.cache.get_seq_length())
        self.added = [0] * asked.shape[-2]
        return output

    def described(self, ids: Tensor) -> tuple[Prefill, ...]:
        """Describe, row by row, what the decoder made of the prompt.

        Args:
            ids: ``[B, S]`` token ids of the call.
        """
        if self.read is None or self.read.hidden is None:
            raise RuntimeError("no prompt has been read")
        inner = self.read.inner
        depth = self.binding.adapter.shape.layers
        first, last = inner.levels[0], inner.level_at(depth - 1)
        ids = ids[:, -inner.length :]
        found = []
        for row in range(ids.shape[0]):
            media = torch.full((inner.length,), -1, dtype=torch.int64, device=ids.device)
            for number, part in enumerate(inner.segments[row] if inner.segments else []):
                media[part.slots.to(ids.device)] = number
            left = torch.ones(last.length, dtype=torch.bool) if last.real is None else last.real[row].cpu()
            places = left.nonzero().squeeze(-1).to(ids.device)
            # A prompt that nothing was taken from has places of its own.
            slots = places if last.whole else last.slots[row].to(ids.device)[places]
            entry = places if last.entry is None else last.entry[row].to(ids.device)[places]
            positions = gather_positions(
                self.read.positions.expand(*self.read.positions.shape[:-2], first.slots.shape[0], -1)[
                    ..., row : row + 1, :
                ],
                entry[None],
            )[..., 0, :]
            found.append(
                Prefill(
                    ids[row, slots],
                    media[slots] >= 0,
                    media[slots],
                    self.read.embeds[row, entry],
                    self.read.hidden[row, places],
                    positions[-3:] if positions.ndim == 2 else positions,
                )
            )
        return tuple(found)

    # -------------------------------------------------------------------- blocks

    def forward(self, tokens: Tensor, real: Tensor | None, depth: Tensor, sees: Tensor | None) -> Outcome:
        """Run a block of tokens and store it.

        Args:
            tokens: ``[B, q]`` int64.
            real: ``[B, q]`` bool, which of them are tokens; None = all.
            depth: ``[B, q]`` int64, tokens between each and the last one stored.
            sees: ``[B, q, q]`` bool, which tokens of the block each sees; None = all up to itself.
        """
        if self._start is None:
            raise RuntimeError("no prompt has been read")
        added = torch.tensor(self.added, device=depth.device)
        block = Block(depth, self._seen + added, sees)
        seen = self.cache.get_seq_length()
        mask = None
        if real is not None:
            mask = torch.nn.functional.pad(real.long(), (seen, 0), value=1)
        self.binding.block = block
        try:
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=self._start + added[:, None] + depth,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                **self._options,
            )
        finally:
            self.binding.block = None
        if self._hidden is None:
            raise RuntimeError("the decoder did not run on the block")
        self._query = tokens.shape[1]
        return Outcome(output.logits, self._hidden)

    def verify(self, drafts: Mapping[int, tuple[int, Draft]]) -> Outcome:
        """Run the root and the draft of each row in one forward; rows that have ended are not named."""
        device = self.cache.layers[0].slots.device
        if len(self.added) == 1 and not drafts[0][1].tokens:
            alone = torch.tensor([[drafts[0][0]]], device=device)
            return self.forward(alone, None, torch.zeros_like(alone), None)
        batch, query = len(self.added), 1 + max(len(draft.tokens) for _, draft in drafts.values())
        even = len(drafts) == batch and all(len(draft.tokens) + 1 == query for _, draft in drafts.values())
        filler = next(iter(drafts.values()))[0]
        tokens = [[filler] * query for _ in range(batch)]
        reach = [list(range(query)) for _ in range(batch)]
        real = torch.zeros(batch, query, dtype=torch.bool)
        chains = all(draft.chain for _, draft in drafts.values())
        sees = None if chains else torch.eye(query, dtype=torch.bool).repeat(batch, 1, 1)
        for row, (root, draft) in drafts.items():
            nodes = len(draft.tokens) + 1
            tokens[row][:nodes] = [root, *draft.tokens]
            real[row, :nodes] = True
            if sees is not None:
                parents = draft.tree()
                reach[row][:nodes] = depths(parents)
                sees[row, :nodes, :nodes] = ancestors(parents)
        return self.forward(
            torch.tensor(tokens, device=device),
            None if even else real.to(device),
            torch.tensor(reach, device=device),
            None if sees is None else sees.to(device),
        )

    def accept(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Keep the nodes of each path and forget the others."""
        batch, width = len(self.added), max(len(path) for path in paths.values())
        if self._query == 1 and len(paths) == batch and self.binding.kv.retriever is None:
            # One token each, of which all stay.
            self.added = [added + 1 for added in self.added]
            self._columns += 1
            return
        places = torch.arange(width).repeat(batch, 1)
        real = torch.zeros(batch, width, dtype=torch.bool)
        for row, path in paths.items():
            places[row, : len(path)] = torch.tensor(path)
            real[row, : len(path)] = True
            self.added[row] += len(path)
        for layer in self.cache.layers:
            layer.keep_block(self._query, places, None if bool(real.all()) else real)
            for row, path in paths.items():
                book = layer.prompts[row] if layer.prompts is not None else None
                if book is not None and book.trail:
                    book.memory, book.trail = book.trail[path[-1]], []
        self._columns += width
        self._tidy()

    def settle(self, width: int, paths: Mapping[int, Sequence[int]]) -> None:
        """Keep some of the last ``width`` tokens, which several forwards brought.

        Args:
            width: tokens since the last call of this.
            paths: row -> places of what stays among them, ascending.
        """
        for layer in self.cache.layers:
            for book in layer.prompts or []:
                if book is not None:
                    book.trail = []
        self._query = width
        self.accept(paths)

    def room(self) -> int | None:
        """Say how many tokens one forward may take; None for any number."""
        if self.binding.kv.packer is None:
            return None
        rooms = [room for layer in self.cache.layers if (room := layer.room()) is not None]
        return min(rooms, default=None)

    def _tidy(self) -> None:
        """Close the holes where there are many."""
        if self._columns * (1 - _HOLES) > max(self.added) + 1 and self._columns > 64:
            self._close_up()

    def _close_up(self) -> None:
        """Move what each row has stored together."""
        for layer in self.cache.layers:
            layer.compact(layer.real_entries())
        self._columns = max(self.added)

    def finish(self) -> None:
        """Leave the cache as plain decoding does: as long as the longest answer but its last token."""
        self.binding.onlooker = None
        if self._columns != max(self.added, default=0) or len(set(self.added)) > 1:
            self._close_up()
            for layer in self.cache.layers:
                layer.seen = self._seen + max(self.added)
                layer.holes = True
