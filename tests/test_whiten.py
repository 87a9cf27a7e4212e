"""Whitening over unmasked entries."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from ppo_fast.functional.whiten import masked_whiten, moments

F64 = torch.float64


def loop(x, mask, eps=1e-8, shift_mean=True):
    """The definition, entry by entry in Python floats."""
    flat, keep = x.reshape(-1).tolist(), mask.reshape(-1).tolist()
    used = [value for value, kept in zip(flat, keep, strict=True) if kept]
    if len(used) < 2:
        return torch.tensor([v if k else 0.0 for v, k in zip(flat, keep, strict=True)], dtype=F64)
    mean, std = statistics.fmean(used), statistics.stdev(used)
    back = 0.0 if shift_mean else mean
    out = [(v - mean) / (std + eps) + back if k else 0.0 for v, k in zip(flat, keep, strict=True)]
    return torch.tensor(out, dtype=F64)


def test_matches_numbers_by_hand():
    x = torch.tensor([1.0, 3.0, 100.0], dtype=F64)
    mask = torch.tensor([True, True, False])
    half = 1 / math.sqrt(2)  # mean 2, unbiased std sqrt(2)
    expected = torch.tensor([-half, half, 0.0], dtype=F64)
    torch.testing.assert_close(masked_whiten(x, mask), expected)
    expected[:2] += 2
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), expected)
    got = masked_whiten(x, mask, eps=math.sqrt(2))
    torch.testing.assert_close(got, torch.tensor([-half, half, 0], dtype=F64) / 2)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_matches_the_loop(masked, shift_mean):
    g = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(7, 11, generator=g, dtype=F64)
    mask = torch.rand(7, 11, generator=g) > (0.4 if masked else -1)
    got = masked_whiten(x, mask if masked else None, shift_mean=shift_mean)
    torch.testing.assert_close(got.view(-1), loop(x, mask, shift_mean=shift_mean))


def test_equals_the_two_lines_of_cleanrl_and_stable_baselines3():
    x = torch.randn(257)
    torch.testing.assert_close(masked_whiten(x), (x - x.mean()) / (x.std() + 1e-8))


def test_shift_and_positive_scale_change_nothing():
    x = torch.randn(100, dtype=F64)
    torch.testing.assert_close(masked_whiten(5 * x - 7), masked_whiten(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked", [True, False])
def test_a_large_mean_costs_no_precision(masked):
    # E[x^2] - E[x]^2 in fp32 is off by 20 % at mean 1000.
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4096, dtype=torch.bool) if masked else None
    shifted = x + 1000.0
    got = masked_whiten(shifted, mask)
    expected = masked_whiten(shifted.double(), mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert got.std().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("value", [0.1, 1e4, -3.3e-5])
def test_equal_entries_become_zero(value, masked):
    x = torch.full((1000,), value)
    mask = torch.arange(1000) < 777 if masked else None
    assert masked_whiten(x, mask).abs().max() < 1e-4


@pytest.mark.parametrize("shift_mean", [True, False])
def test_one_entry_alone_is_unchanged(shift_mean):
    one = torch.tensor([3.0])
    assert masked_whiten(one, shift_mean=shift_mean).item() == 3.0
    x, mask = (
        torch.tensor([[1.0, 3.0], [math.nan, 4.0]]),
        torch.tensor([[False, True], [False] * 2]),
    )
    got = masked_whiten(x, mask, shift_mean=shift_mean)
    assert got.tolist() == [[0.0, 3.0], [0.0, 0.0]]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_entries_are_never_read_and_come_out_zero(shift_mean):
    x = torch.randn(20, dtype=F64)
    mask = torch.arange(20) % 3 != 0
    poisoned = x.masked_fill(~mask, math.nan)
    got = masked_whiten(poisoned, mask, shift_mean=shift_mean)
    torch.testing.assert_close(got[mask], masked_whiten(x[mask], shift_mean=shift_mean))
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_a_fully_masked_tensor_is_zero_and_an_empty_one_empty(shift_mean):
    x = torch.full((3, 4), math.nan)
    got = masked_whiten(x, torch.zeros(3, 4, dtype=torch.bool), shift_mean=shift_mean)
    assert torch.equal(got, torch.zeros(3, 4))
    assert masked_whiten(torch.empty(0, 4), shift_mean=shift_mean).shape == (0, 4)
    empty_mask = torch.empty(0, 4, dtype=torch.bool)
    assert masked_whiten(torch.empty(0, 4), empty_mask, shift_mean=shift_mean).shape == (0, 4)


def test_strides_are_free():
    x, mask = torch.randn(6, 5), torch.rand(6, 5) > 0.3
    expected = masked_whiten(x, mask)
    torch.testing.assert_close(masked_whiten(x.t(), mask.t()), expected.t())
    assert x.t().is_contiguous() is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype):
    x = torch.randn(500).to(dtype)
    got = masked_whiten(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), masked_whiten(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_moments_of_x_given_change_nothing(masked, shift_mean):
    x = 3 + 2 * torch.randn(60, dtype=F64)
    mask = torch.arange(60) % 3 != 0 if masked else None
    got = masked_whiten(x, mask, shift_mean=shift_mean, moments=moments(x, mask))
    torch.testing.assert_close(got, masked_whiten(x, mask, shift_mean=shift_mean))


def test_the_moments_of_a_larger_batch_whiten_a_part_as_the_whole():
    x = torch.randn(50, dtype=F64)
    part = masked_whiten(x[:10], moments=moments(x))
    torch.testing.assert_close(part, masked_whiten(x)[:10])


def test_moments_of_one_or_no_entry_leave_x_unchanged():
    for kept in (0, 1):
        x, mask = torch.tensor([5.0, math.nan]), torch.tensor([kept == 1, False])
        found = moments(x, mask)
        assert found.tolist() == [kept, 5.0 * kept, 0.0]
        assert masked_whiten(x, mask, moments=found).tolist() == [5.0 * kept, 0.0]


@pytest.mark.parametrize("value", [0.1, 1e4, -3.3e-5])
def test_the_moments_of_equal_entries_are_exact(value):
    x = torch.full((1000,), value)
    mask = torch.arange(1000) < 777
    for keep in (None, mask):
        _, mean, squares = moments(x, keep).tolist()
        assert mean == x[0].item()
        assert squares < 1e-20
        assert not masked_whiten(x, keep, moments=moments(x, keep)).any()


def test_the_input_is_left_alone():
    x = torch.randn(10)
    copy = x.clone()
    masked_whiten(x).add_(1)
    masked_whiten(x[:1]).add_(1)
    assert torch.equal(x, copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(3), torch.ones(3)),
            r"mask is \[3\] torch.float32; expected \[3\] torch.bool",
        ),
        ((torch.zeros(3), torch.ones(2, dtype=torch.bool)), r"mask is \[2\] torch.bool"),
        ((torch.zeros(3, requires_grad=True),), "x requires a gradient"),
        ((torch.zeros(3).long(),), "x is torch.int64; it must be floating"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"masked_whiten: {message}"):
        masked_whiten(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"moments": torch.zeros(2)}, r"moments is \[2\] torch.float32; expected \[3\] floating"),
        ({"moments": torch.zeros(3).long()}, r"moments is \[3\] torch.int64"),
        ({"eps": torch.zeros(1)}, r"eps is a tensor of shape \[1\]"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"masked_whiten: {message}"):
        masked_whiten(torch.zeros(3), **arguments)
