"""The `gae` kernels against the reference and the definition."""

import math

import pytest
import torch
from calls import assert_agrees, assert_as_exact_as_torch
from cases_gae import CASES, HYPER, packed, rollout

from ppo_fast.dispatch import backend
from ppo_fast.functional.gae import gae
from ppo_fast.kernels._launch import recorded


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


@pytest.mark.parametrize("name", ["columns, all options", "rows, all options", "packed"])
def test_the_error_is_no_more_than_twice_pytorchs(name):
    assert_as_exact_as_torch(CASES[name]())


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 129])
@pytest.mark.parametrize("N", [1, 31, 33])
def test_any_number_of_rows_and_columns(T, N):
    assert_agrees(rollout(T, N, "truncated"))


@pytest.mark.parametrize("T", [2, 31, 33, 127, 130])
def test_any_number_of_rows_in_a_batch_of_sequences(T):
    assert_agrees(rollout(T, 2, "batch-major", "mask"))


SHIPPED = [
    (4, 32, 1, 1),
    (16, 32, 1, 1),
    (64, 32, 4, 1),
    (32, 8, 1, 1),
    (128, 2, 1, 1),
    (32, 1, 1, 3),
    (16, 32, 1, 20),
]


@pytest.mark.parametrize("tiles", SHIPPED)
@pytest.mark.parametrize("options", [(), ("batch-major",)])
def test_every_tile_gives_the_same(tiles, options, monkeypatch):
    monkeypatch.setattr("ppo_fast.kernels.gae._tiles", lambda *shape: tiles)
    assert_agrees(rollout(70, 9, *options, "truncated", "mask", with_moments=True))


def test_rows_far_apart_are_addressed_in_64_bits():
    call = rollout(3, 3)
    for stride, expected in ((3, False), (1 << 21, True)):
        with recorded() as launches:
            rewards = torch.empty_strided((3, 3), (stride, 1), device="meta")
            call.op.kernel(rewards, *call.args[1:], **call.kwargs)
        assert launches[0].meta["FAR"] == expected


@pytest.mark.parametrize("flag", [True, False])
def test_episodes_end_everywhere_or_nowhere(flag):
    call = rollout(20, 3)
    call.kwargs["terminated"].fill_(flag)
    assert_agrees(call)


def test_a_row_both_terminated_and_truncated_is_terminated():
    call = rollout(12, 3, "truncated")
    call.kwargs["terminated"] |= call.kwargs["truncated"]
    call.kwargs["bootstrap_values"].fill_(math.nan)
    assert_agrees(call)
    with backend("triton"):
        assert call.op(*call.args, **call.kwargs)[0].isfinite().all()


def test_with_lambda_1_and_no_end_the_return_is_the_discounted_sum_of_rewards():
    T, gamma = 37, 0.9
    rewards, next_value = torch.randn(T, 2), torch.randn(2)
    ended = torch.zeros(T, 2, dtype=torch.bool)
    with backend("triton"):
        _, returns = gae(rewards, torch.randn(T, 2), next_value, ended, gamma=gamma, gae_lambda=1.0)
    powers = gamma ** torch.arange(T, dtype=torch.float64)
    expected = (powers[:, None] * rewards.double()).sum(0) + gamma**T * next_value.double()
    torch.testing.assert_close(returns[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_all_rows_masked_gives_zeros():
    call = rollout(20, 3, "mask", with_moments=True)
    call.kwargs["mask"].fill_(False)
    with backend("triton"):
        advantages, returns, moments = call.op(*call.args, **call.kwargs)
    assert not advantages.any() and not returns.any() and not moments.any()


def test_a_long_gap_across_tiles_and_chunks_finds_the_next_value():
    call = rollout(130, 2, "mask")
    call.kwargs["mask"][20:110] = False
    assert_agrees(call)
    call.kwargs["mask"][20:] = False
    assert_agrees(call)


def test_equal_advantages_have_their_value_as_mean_and_no_deviation():
    ended = torch.ones(40, 33, dtype=torch.bool)
    rewards = torch.full((40, 33), 0.1)
    with backend("triton"):
        *_, moments = gae(rewards, rewards * 0, rewards[0], ended, **HYPER, with_moments=True)
    assert moments.tolist() == [40 * 33, rewards[0, 0].item(), 0.0]


def test_v_trace_equals_its_definition():
    T, gamma, rho_clip, c_clip = 23, 0.9, 0.8, 1.1
    call = rollout(T, 2, "ratios", rho_clip=rho_clip, c_clip=c_clip, gamma=gamma, gae_lambda=1.0)
    rewards, values, next_value = (x.double() for x in call.args)
    ended, ratios = call.kwargs["terminated"], call.kwargs["ratios"].double()
    following = torch.cat((values[1:], next_value[None]))
    correction = torch.zeros(2, dtype=torch.float64)
    v = values.clone()
    for t in reversed(range(T)):
        # v_s = V(s) + rho delta + gamma c (v_{s+1} - V(s+1)), Espeholt et al. 2018, remark 1.
        live = gamma * ~ended[t]
        delta = ratios[t].clamp(max=rho_clip) * (rewards[t] + live * following[t] - values[t])
        correction = delta + live * ratios[t].clamp(max=c_clip) * correction
        v[t] += correction
    with backend("triton"):
        _, returns = call.op(*call.args, **call.kwargs)
    torch.testing.assert_close(returns.double(), v, rtol=1e-5, atol=1e-5)


def test_packed_sequences_equal_padded_columns():
    lengths = [7, 1, 30]
    call = packed(lengths, "truncated")
    with backend("triton"):
        advantages, _ = call.op(*call.args, **call.kwargs)
        for number, tokens in enumerate(advantages.split(lengths)):
            start = sum(lengths[:number])
            own = slice(start, start + lengths[number])
            names = ("terminated", "truncated", "bootstrap_values")
            column = {name: call.kwargs[name][own, None] for name in names}
            alone, _ = gae(
                *(x[own, None] for x in call.args[:2]),
                call.args[2][number, None],
                **column,
                **HYPER,
            )
            torch.testing.assert_close(tokens, alone[:, 0], rtol=1e-5, atol=1e-5)


def test_outputs_keep_the_layout_of_the_values():
    call = rollout(20, 3, "batch-major")
    with backend("triton"):
        advantages, returns = call.op(*call.args, **call.kwargs)
    assert advantages.stride() == returns.stride() == call.args[1].stride()


def test_nothing_in_gives_nothing_out():
    empty = torch.empty(0, 3)
    with backend("triton"):
        advantages, returns = gae(empty, empty, empty.sum(0), empty.bool(), **HYPER)
    assert advantages.shape == returns.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"gae_lambda": torch.zeros(2)}, r"gae_lambda is a tensor of shape \[2\]"),
        ({"rho_clip": 0.0}, "rho_clip is 0.0; it must be positive"),
        ({"ratios": torch.zeros(3)}, r"ratios is \[3\]"),
        ({"truncated": torch.zeros(9, 3).bool()}, "truncated is given without bootstrap_values"),
    ],
)
def test_bad_input_is_refused_as_by_the_reference(change, message):
    call = rollout(9, 3)
    for name in ("triton", "reference"):
        with backend(name), pytest.raises(ValueError, match=message):
            call.op(*call.args, **call.kwargs | change)


def test_inputs_that_require_a_gradient_are_refused():
    call = rollout(9, 3)
    call.args[1].requires_grad_()
    with backend("triton"), pytest.raises(ValueError, match="values requires grad"):
        call.op(*call.args, **call.kwargs)


def test_sequence_bounds_may_be_strided():
    call = packed([0, 3, 5])
    bounds = call.kwargs["cu_seqlens"]
    assert_agrees(
        call._replace(kwargs=call.kwargs | {"cu_seqlens": torch.stack((bounds, bounds), 1)[:, 0]})
    )
