"""`clipped_adam_` against torch.optim.Adam and clip_grad_norm_ in float64."""

import math

import pytest
import torch

from ppo_fast.capture import rehearsal
from ppo_fast.dispatch import Accelerated, backend
from ppo_fast.functional.adam import clipped_adam_

P = 50
MODES = ("by numbers", "on the device")


@pytest.fixture(params=MODES)
def mode(request):
    """Both ways of the reference: reading the norm, and not."""
    if request.param == "by numbers":
        yield request.param
        return
    with rehearsal(lambda function, generators: (function, function())):
        yield request.param


def buffers(dtype=torch.float32):
    torch.manual_seed(0)
    flat, gradients = torch.randn(P, dtype=dtype), torch.randn(P, dtype=dtype)
    moments = 0.1 * torch.randn(P, dtype=dtype), 0.1 * torch.rand(P, dtype=dtype)
    return [flat, gradients, *moments, torch.zeros(())]


@pytest.mark.parametrize("limit", [0.5, 3.0, math.inf])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.05)]
)
def test_steps_are_those_of_torch(mode, dtype, tolerance, limit):
    flat = buffers(dtype)[0]
    exact = flat.double().requires_grad_()
    optimizer = torch.optim.Adam([exact], lr=3e-3, betas=(0.8, 0.99), eps=1e-6)
    state = [torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros(())]
    for step in range(12):
        gradients = (torch.randn(P) * 10 ** (step % 4 - 2)).to(dtype)
        exact.grad = gradients.double().clone()
        norm = float(torch.nn.utils.clip_grad_norm_([exact], limit))
        clipped = exact.grad.clone()
        optimizer.step()
        found = clipped_adam_(
            flat, gradients, *state, 3e-3, max_grad_norm=limit, beta1=0.8, beta2=0.99, eps=1e-6
        )
        assert found.dtype == torch.float32 and found[1] == 1
        assert float(found[0]) == pytest.approx(norm, rel=max(tolerance, 1e-6))
        torch.testing.assert_close(gradients.double(), clipped, rtol=max(tolerance, 1e-6), atol=0)
    torch.testing.assert_close(flat.double(), exact.detach(), rtol=0, atol=tolerance)
    assert state[2] == 12


@pytest.mark.parametrize(
    "refusal",
    [
        {"veto": torch.tensor(True)},
        {"loss": torch.tensor(math.nan)},
        {"loss": torch.tensor(-math.inf)},
        {"gradient": math.nan},
        {"gradient": math.inf},
        {"square_sums": torch.tensor([1.0, math.nan])},
    ],
)
def test_no_step_leaves_every_bit(mode, refusal):
    given = dict(refusal)
    state = buffers()
    if "gradient" in given:
        state[1][7] = given.pop("gradient")
    before = [x.clone() for x in state]
    _, finite = clipped_adam_(*state, 1e-3, max_grad_norm=0.5, **given)
    assert bool(finite) is ("veto" in refusal)
    torch.testing.assert_close(state, before, rtol=0, atol=0, equal_nan=True)


def test_a_finite_loss_and_no_veto_change_nothing(mode):
    first, second = buffers(), buffers()
    clipped_adam_(*first, 1e-3, max_grad_norm=0.5)
    clipped_adam_(
        *second, 1e-3, max_grad_norm=0.5, loss=torch.tensor(-3.0), veto=torch.tensor(False)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_numbers_may_lie_in_tensors(mode):
    first, second = buffers(), buffers()
    clipped_adam_(*first, 0.01, max_grad_norm=0.5)
    clipped_adam_(*second, torch.tensor(0.01), max_grad_norm=torch.tensor(0.5))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)


def test_sums_of_squares_stand_for_the_norm(mode):
    first, second = buffers(), buffers()
    sums = torch.stack([x.square().sum() for x in second[1].split(7)])
    norms = [
        clipped_adam_(*first, 0.01, max_grad_norm=0.5),
        clipped_adam_(*second, 0.01, max_grad_norm=0.5, square_sums=sums),
    ]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(first, second)


def test_no_gradient_is_no_movement(mode):
    state = buffers()
    for x in state[1:4]:
        x.zero_()
    before = state[0].clone()
    assert clipped_adam_(*state, 0.1, max_grad_norm=0.5).tolist() == [0.0, 1.0]
    assert torch.equal(state[0], before)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(P, dtype=torch.int64), "parameters is"),
        (0, torch.zeros(5, 10), "parameters is"),
        (1, torch.zeros(P + 1), "gradients is"),
        (1, torch.zeros(2 * P)[::2], "gradients is"),
        (2, torch.zeros(P, dtype=torch.float64), "exp_avg is"),
        (3, torch.zeros(1), "exp_avg_sq is"),
        (4, torch.zeros(1), "steps is"),
        (4, torch.zeros((), dtype=torch.int64), "steps is"),
    ],
)
def test_bad_buffers_are_refused(position, value, message):
    state = buffers()
    state[position] = value
    with pytest.raises(ValueError, match=f"clipped_adam_: {message}"):
        clipped_adam_(*state, 1e-3, max_grad_norm=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"max_grad_norm": torch.zeros(1)}, r"max_grad_norm is \[1\]"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"loss": torch.zeros(2)}, r"loss is \[2\]"),
        ({"veto": torch.zeros(())}, "veto is torch.float32"),
        ({"square_sums": torch.zeros(())}, "square_sums is"),
        ({"square_sums": torch.zeros(0)}, "square_sums is"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=f"clipped_adam_: {message}"):
        clipped_adam_(*buffers(), 1e-3, **{"max_grad_norm": 0.5} | change)


@pytest.mark.parametrize("name", clipped_adam_.mutates)
def test_check_compares_what_is_left_in_each_buffer_and_puts_them_back(name, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = ("parameters", "gradients", "exp_avg", "exp_avg_sq", "steps")
    state = buffers()
    before = [x.clone() for x in state]
    seen = []

    def kernel(*args, **kwargs):
        seen.append([x.clone() for x in args[:5]])
        result = clipped_adam_.reference(*args, **kwargs)
        args[names.index(name)].add_(fault)
        return result

    op = Accelerated(clipped_adam_.reference, kernel, mutates=clipped_adam_.mutates)
    fault = 0.01
    with backend("check"), pytest.raises(AssertionError, match=f"{name}, as the kernel left it"):
        op(*state, 1e-3, max_grad_norm=0.5)
    torch.testing.assert_close(seen[0], before, rtol=0, atol=0)
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    fault = 0.0
    with backend("check"):
        op(*state, 1e-3, max_grad_norm=0.5)
    once = [x.clone() for x in before]
    clipped_adam_.reference(*once, 1e-3, max_grad_norm=0.5)
    torch.testing.assert_close(state, once, rtol=0, atol=0)


def test_check_allows_for_the_coarsest_dtype_among_the_arguments(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def reference(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return x * 1.0

    op = Accelerated(reference, lambda x, dtype=None: x * 1.002)
    with backend("check"):
        op(torch.ones(3), torch.float16)
        with pytest.raises(AssertionError):
            op(torch.ones(3))
