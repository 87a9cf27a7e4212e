"""Log-probs of Gaussian policies: against torch.distributions, numbers by hand, autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from ppo_fast.functional.gaussian import log_probs_from_gaussian

F64 = torch.float64


def head(*leading, a=3, per_row=False, dtype=F64):
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(*leading, a, generator=g, dtype=F64)
    log_std = 0.5 * torch.randn(*(leading if per_row else ()), a, generator=g, dtype=F64)
    actions = mean + log_std.exp() * torch.randn(*leading, a, generator=g, dtype=F64)
    return mean.to(dtype), log_std.to(dtype), actions.to(dtype)


def test_matches_numbers_by_hand():
    # z = (1, -2): -1/2 - log 2 - c and -2 - 0 - c with c = log(2 pi) / 2
    mean, log_std = torch.tensor([[1.0, 2.0]]), torch.tensor([math.log(2), 0.0])
    log_probs, entropy = log_probs_from_gaussian(
        mean, log_std, torch.tensor([[3.0, 0.0]]), with_entropy=True
    )
    assert log_probs.item() == pytest.approx(-2.5 - math.log(2) - math.log(2 * math.pi))
    assert entropy.item() == pytest.approx(math.log(2) + math.log(2 * math.pi * math.e))


@pytest.mark.parametrize("per_row", [False, True])
def test_agrees_with_torch_distributions(per_row):
    mean, log_std, actions = head(4, 5, per_row=per_row)
    policy = Independent(Normal(mean, log_std.exp()), 1)
    log_probs, entropy = log_probs_from_gaussian(mean, log_std, actions, with_entropy=True)
    torch.testing.assert_close(log_probs, policy.log_prob(actions))
    torch.testing.assert_close(entropy, policy.entropy())


def test_squashed_agrees_with_the_transformed_distribution():
    mean, log_std, actions = head(50)
    policy = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform())
    log_probs, entropy = log_probs_from_gaussian(
        mean, log_std, actions, squash=True, with_entropy=True
    )
    torch.testing.assert_close(log_probs, policy.log_prob(actions.tanh()), rtol=1e-6, atol=1e-6)
    assert torch.equal(entropy, -log_probs)


def test_the_squashed_density_integrates_to_one():
    mean, log_std = torch.tensor([[0.3]], dtype=F64), torch.tensor([-0.4], dtype=F64)
    y = torch.linspace(-1, 1, 200_001, dtype=F64)[1:-1]
    u = y.atanh().unsqueeze(1)
    density = log_probs_from_gaussian(mean.expand_as(u), log_std, u, squash=True).exp()
    assert torch.trapezoid(density, y).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("u", [30.0, -30.0, 1e4, -1e4])
def test_saturated_actions_keep_a_finite_density(u):
    # tanh(30) is 1 in fp32; log(1 - tanh^2) = log 4 - 2 |u| + O(e^-2|u|)
    actions = torch.tensor([[u]])
    plain = log_probs_from_gaussian(actions, torch.zeros(1), actions)
    squashed = log_probs_from_gaussian(actions, torch.zeros(1), actions, squash=True)
    torch.testing.assert_close(squashed - plain, torch.tensor([2 * abs(u) - math.log(4)]))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("squash", [False, True])
def test_passes_gradcheck(per_row, squash):
    inputs = [x.requires_grad_() for x in head(5, per_row=per_row)]
    assert gradcheck(
        lambda *x: log_probs_from_gaussian(*x, squash=squash, with_entropy=True), inputs
    )


def test_low_precision_is_computed_in_fp32():
    low = head(100, dtype=torch.bfloat16)
    got = log_probs_from_gaussian(*low)
    assert got.dtype == torch.float32
    exact = log_probs_from_gaussian(*(x.double() for x in low))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_any_strides_and_empty_batches():
    mean, log_std, actions = head(6)
    expected = log_probs_from_gaussian(mean, log_std, actions)
    strided = log_probs_from_gaussian(mean.t().contiguous().t(), log_std, actions.t().clone().t())
    torch.testing.assert_close(strided, expected)
    log_probs, entropy = log_probs_from_gaussian(mean[:0], log_std, actions[:0], with_entropy=True)
    assert log_probs.shape == entropy.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": torch.zeros(4, 2)}, r"actions is \[4, 2\]; expected the shape of mean"),
        ({"log_std": torch.zeros(4)}, r"log_std is \[4\]; expected \[3\]"),
        ({"log_std": torch.zeros(())}, r"log_std is \[\]; expected \[3\]"),
        ({"mean": torch.zeros(())}, "mean is 0-d"),
    ],
)
def test_misshapen_arguments_are_refused(change, message):
    arguments = {
        "mean": torch.zeros(4, 3),
        "log_std": torch.zeros(3),
        "actions": torch.zeros(4, 3),
    }
    with pytest.raises(ValueError, match=f"log_probs_from_gaussian: {message}"):
        log_probs_from_gaussian(**{**arguments, **change})
