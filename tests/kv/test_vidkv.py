"""VidKV: keys in one or two bits per channel, values in three levels."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.packing.vidkv import VidKV
from mmfast.kv.quantised import minmax


def prompt(states: torch.Tensor, visual: range, query: torch.Tensor | None = None) -> Entries:
    mask = torch.zeros(states.shape[1], dtype=torch.bool)
    mask[list(visual)] = True
    return Entries.of(states, states, query, mask)


def test_three_levels_by_hand() -> None:
    values = torch.tensor([-3.0, -0.5, 0.5, 3.0]).view(1, 4, 1) + 5
    # The mean magnitude around the mean of 5 is 1.75; half of a level is what separates two of them.
    assert VidKV(level=1.0).ternary(values).restore().flatten().tolist() == [3.25, 5.0, 5.0, 6.75]
    assert VidKV(level=2.0).ternary(values).restore().flatten().tolist() == [1.5, 5.0, 5.0, 8.5]


def test_the_default_level_is_closer_than_the_mean_magnitude() -> None:
    torch.manual_seed(0)
    for values in (torch.randn(2, 512, 16), torch.distributions.Laplace(0, 1).sample((2, 512, 16))):
        errors = [(VidKV(level=level).ternary(values).restore() - values).norm() for level in (1.0, 1.5)]
        assert errors[1] < 0.9 * errors[0]


def test_frequencies_by_hand() -> None:
    # Four tokens have the frequencies 1 (two parts) and 2 (one part; the other has no effect).
    keys = torch.tensor([4.0, 0.0, 0.0, 0.0]).view(1, 4, 1)
    block = VidKV(bits=1.0, group=4).spectrum(keys)
    # All of them are 4 / sqrt(4) but for the imaginary parts, which are 0; the mean magnitude is 1.
    assert (block.size.item(), block.mean.item()) == (1.0, 1.0)
    signs = torch.view_as_complex(torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    expected = 1 + torch.fft.irfft(signs, n=4, norm="ortho")
    torch.testing.assert_close(block.restore().flatten(), expected)


def test_keys_are_closer_than_without_the_transform() -> None:
    torch.manual_seed(0)
    noise = torch.randn(2, 512, 16)
    rare = noise + 30 * noise.sign() * (torch.rand(2, 512, 16) < 0.01)
    for keys, share in ((noise, 0.35), (noise.cumsum(dim=1), 0.85), (rare, 0.2)):
        plain = minmax(keys, 2, 128, 1).restore()
        assert (VidKV(bits=1.0).quantise_keys(keys).restore() - keys).norm() < share * (plain - keys).norm()


def test_channels_of_large_range_get_two_bits() -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 128, 8)
    keys[0, :, [1, 6]] *= 30
    keys[1, :, [0, 3]] *= 30
    block = VidKV(bits=1.25).quantise_keys(keys)
    assert block.order[:, :2].tolist() == [[1, 6], [0, 3]]
    large = minmax(keys, 4, 128, 1).restore()
    for head, channels in ((0, [1, 6]), (1, [0, 3])):
        assert torch.equal(block.restore()[head][:, channels], large[head][:, channels])
    assert (VidKV(bits=2.0).quantise_keys(keys).restore() == large).all()


def test_what_is_stored_is_counted_to_the_byte() -> None:
    states = torch.randn(2, 128, 16, dtype=torch.bfloat16)
    entries = prompt(states, range(128))
    key, value = (VidKV().pack(states, side, entries).tensors() for side in ("key", "value"))
    numbers = states.numel() // 2
    scales = 2 * 16 * 2 * 2
    stored = sum(tensor.numel() * tensor.element_size() for tensor in key)
    assert stored == numbers // 4 + numbers // 8 + scales + 2 * 16 * 2
    # Twenty codes of three levels are a word.
    assert sum(tensor.numel() * tensor.element_size() for tensor in value) == 2 * 16 * 7 * 4 + scales


def test_text_and_generated_entries_stay() -> None:
    states = torch.randn(2, 50, 8)
    for side in ("key", "value"):
        restored = VidKV().pack(states, side, prompt(states, range(10, 42))).restore()
        assert torch.equal(restored[:, :10], states[:, :10])
        assert torch.equal(restored[:, 42:], states[:, 42:])
        assert not torch.isin(restored[:, 10:42], states[:, 10:42]).all()
        assert torch.equal(VidKV().pack(states, side, None).restore(), states)


def test_salient_values_are_closer() -> None:
    torch.manual_seed(0)
    states = torch.randn(1, 40, 8)
    query = torch.zeros(2, 40, 8)
    query[:, 36:] = 20 * states[0, 7]
    states[0, [7, 9]] *= 2
    method = VidKV(salient=1 / 36)
    assert "attention" in method.needs
    assert method.reads_question
    assert "attention" not in VidKV().needs
    entries = prompt(states, range(36), query)
    assert method.salience(entries).nonzero().flatten().tolist() == [7]
    # A group of one token has nothing but its own number.
    assert torch.equal(method.pack(states, "value", entries).restore()[:, 7], states[:, 7])
    with pytest.raises(RuntimeError, match="attention"):
        method.pack(states, "value", prompt(states, range(36)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 33, 131])
def test_blocks_of_any_size_keep_shape_and_dtype(dtype: torch.dtype, tokens: int) -> None:
    states = torch.randn(1, tokens, 5).to(dtype)
    query = torch.randn(2, tokens, 5).to(dtype)
    for visual in (range(0), range(tokens), range(tokens // 2)):
        for bits in (1.0, 1.5, 2.0):
            for side in ("key", "value"):
                block = VidKV(bits=bits, salient=0.3).pack(states, side, prompt(states, visual, query))
                assert (block.restore().shape, block.restore().dtype) == (states.shape, dtype)
                assert block.restore().isfinite().all()


def test_constant_channels_come_back() -> None:
    states = torch.full((1, 9, 4), 3.25)
    for side in ("key", "value"):
        torch.testing.assert_close(VidKV().pack(states, side, prompt(states, range(9))).restore(), states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0.9}, "bits=0.9 must lie between 1 and 2"),
        ({"group": 0}, "group=0 must be an int of at least 1"),
        ({"level": 0}, "level=0 must be above 0"),
        ({"salient": 2}, "salient=2 must lie between 0 and 1"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VidKV(**options)
