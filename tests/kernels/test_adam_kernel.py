"""The `clipped_adam_` kernel against the reference and against torch.optim in float64."""

import math

import pytest
import torch
from calls import assert_agrees
from cases_adam import CASES, adam

from ppo_fast.dispatch import backend
from ppo_fast.functional.adam import clipped_adam_
from ppo_fast.kernels._launch import recorded


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


def test_many_steps_are_those_of_torch_in_float64():
    P = 1300
    flat = torch.randn(P)
    exact = flat.double().requires_grad_()
    optimizer = torch.optim.Adam([exact], lr=3e-3, eps=1e-5)
    buffers = flat, torch.zeros(P), torch.zeros(P), torch.zeros(P), torch.zeros(())
    for step in range(30):
        gradients = torch.randn(P) * 10 ** (step % 4 - 3)
        exact.grad = gradients.double()
        norm = torch.nn.utils.clip_grad_norm_([exact], 0.5)
        optimizer.step()
        buffers[1].copy_(gradients)
        with backend("triton"):
            found = clipped_adam_(*buffers, 3e-3, max_grad_norm=0.5)
        torch.testing.assert_close(found.double(), torch.stack((norm, norm * 0 + 1)))
    torch.testing.assert_close(flat.double(), exact.detach(), rtol=1e-6, atol=1e-6)
    assert buffers[4] == 30


@pytest.mark.parametrize("steps", [0.0, 1.0, 10.0, 300.0, 1e4])
def test_bias_corrections_keep_their_digits(steps):
    # A mean and a mean square of 1 that stay: the step is lr times their corrections' quotient.
    ones = torch.ones(8)
    flat = torch.zeros(8)
    with backend("triton"):
        clipped_adam_(
            flat,
            ones.clone(),
            ones.clone(),
            ones.clone(),
            torch.tensor(steps),
            1.0,
            max_grad_norm=math.inf,
            eps=1e-12,
        )
    t = steps + 1
    expected = -math.sqrt(-math.expm1(t * math.log(0.999))) / -math.expm1(t * math.log(0.9))
    torch.testing.assert_close(flat, torch.full((8,), expected), rtol=5e-7, atol=0)


@pytest.mark.parametrize(
    "name", ["vetoed", "a loss of NaN", "an infinite loss", "a NaN in the gradients"]
)
def test_no_step_leaves_every_bit(name):
    call = CASES[name]()
    before = [x.clone() for x in call.args[:5]]
    with backend("triton"):
        _, finite = call.op(*call.args, **call.kwargs)
    assert bool(finite) is (name == "vetoed")
    torch.testing.assert_close(list(call.args[:5]), before, rtol=0, atol=0, equal_nan=True)


def test_it_is_one_launch_where_the_sums_are_known():
    for known, names in (
        (True, ["clipped_adam_kernel"]),
        (False, ["square_sums_kernel", "clipped_adam_kernel"]),
    ):
        call = adam(2500, known=known)
        with recorded() as launches:
            call.op.kernel(*call.args, **call.kwargs)
        assert [launch.kernel.__name__ for launch in launches] == names


def test_the_same_call_gives_the_same_bits():
    first, second = adam(5000), adam(5000)
    for x, y in zip(first.args[:4], second.args[:4], strict=True):
        y.copy_(x)
    with backend("triton"):
        for call in (first, second):
            call.op(*call.args, **call.kwargs)
    torch.testing.assert_close(first.args[:5], second.args[:5], rtol=0, atol=0)


@pytest.mark.parametrize("P", [1, 1023, 1024, 1025])
def test_nothing_beyond_the_buffers_is_touched(P):
    whole = torch.full((4, P + 64), 7.0)
    call = adam(P)
    buffers = []
    for row, x in zip(whole, call.args[:4], strict=True):
        buffers.append(row[:P].copy_(x))
    with backend("triton"):
        call.op(*buffers, *call.args[4:], **call.kwargs)
    assert (whole[:, P:] == 7.0).all()


def test_other_dtypes_are_named():
    call = adam(10)
    args = [x.double() for x in call.args[:4]]
    assert "torch.float64" in call.op.why_not_kernel(*args, *call.args[4:], **call.kwargs)
