"""The `ppo_loss` kernel against the reference."""

import math

import pytest
import torch
from calls import assert_agrees, assert_as_exact_as_torch, run
from cases_ppo_loss import ALL, CASES, EVERYTHING, loss

from ppo_fast.dispatch import backend
from ppo_fast.functional.ppo_loss import ppo_loss
from ppo_fast.kernels._launch import recorded


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


@pytest.mark.parametrize("name", ["everything, masked", "everything, bf16"])
def test_the_error_is_no_more_than_twice_pytorchs(name):
    assert_as_exact_as_torch(CASES[name]())


@pytest.mark.parametrize("M", [1, 2, 511, 512, 513, 1025])
def test_any_number_of_rows(M):
    assert_agrees(loss(M, *ALL, masked=M > 2, norm_adv=True, **EVERYTHING))


def test_it_is_one_launch():
    call = CASES["everything, masked"]()
    with recorded() as launches:
        call.op.kernel(*call.args, **call.kwargs)
    assert [launch.kernel.__name__ for launch in launches] == ["ppo_loss_kernel"]


def test_the_ratio_is_one_before_the_first_step():
    log_probs = -torch.rand(700) * 5
    with backend("triton"):
        result = ppo_loss(
            log_probs.requires_grad_(), log_probs.detach(), torch.randn(700), clip_coef=0.2
        )
    assert result.ratio_mean == 1.0
    assert result.ratio_deviation == result.approx_kl == result.clip_fraction == 0.0


@pytest.mark.parametrize("advantage", [-1.5, 0.0, 1.5])
@pytest.mark.parametrize("edge", [0.8, 1.0, 1.2])
def test_ties_and_clip_edges_follow_the_reference(edge, advantage):
    ratio = torch.tensor([edge])
    for nudge in (-1e-6, 0.0, 1e-6):
        log_probs = (ratio + nudge).log().requires_grad_()
        call = CASES["policy"]()
        args = log_probs, torch.zeros(1), torch.tensor([advantage])
        # Where exp and exp2 fall on different sides of the edge the gradient may be either's.
        (_, (ours,)), (_, (theirs,)) = (
            run(call._replace(args=args, kwargs={"clip_coef": 0.2}), name)
            for name in ("triton", "reference")
        )
        on_the_edge = abs(float(log_probs.detach().exp()) - edge) < 3e-7 and edge != 1.0
        if not on_the_edge:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gap", [-200.0, 200.0, -20.0, 20.0])
def test_a_huge_log_ratio_gives_finite_loss_and_no_gradient_beyond_the_limit(gap):
    for advantage in (-1.0, 1.0):
        call = loss(1)
        args = torch.tensor([gap]).requires_grad_(), torch.zeros(1), torch.tensor([advantage])
        assert_agrees(call._replace(args=args))
        outputs, (gradient,) = run(call._replace(args=args), "triton")
        assert all(x.isfinite().all() for x in outputs)
        assert gradient.isfinite().all()
        if abs(gap) > 20:
            assert not gradient.any()


def test_equal_advantages_whiten_to_zero():
    call = loss(600, norm_adv=True)
    with backend("triton"):
        result = ppo_loss(*call.args[:2], torch.full((600,), 0.1), clip_coef=0.2, norm_adv=True)
    assert result.policy_loss == 0.0


def test_a_masked_row_is_never_used_whatever_it_holds():
    call = loss(50, *ALL, masked=True, norm_adv=True, **EVERYTHING)
    mask = call.kwargs["mask"]
    outputs, gradients = run(call, "triton")
    assert all(x.isfinite().all() for x in outputs)
    for gradient in gradients:
        assert gradient.isfinite().all() and not gradient[~mask].any()


def test_a_nan_shows_in_the_loss_and_in_its_own_gradient():
    call = loss(600, "values", "returns")
    with torch.no_grad():
        call.args[0][7] = math.nan
    (value, stats), (gradient, grad_values) = run(call, "triton")
    assert value.isnan()
    assert gradient[7].isnan() and gradient[8:].isfinite().all() and grad_values.isfinite().all()
    assert stats[10].isnan()


@pytest.mark.parametrize("upstream", [0.0, 1.0, -2.5])
def test_the_upstream_gradient_scales_all(upstream):
    call = loss(60, *ALL, **EVERYTHING)
    leaves = [call.args[0], call.kwargs["values"], call.kwargs["entropy"]]
    results = {}
    for name in ("triton", "reference"):
        with backend(name):
            value = call.op(*call.args, **call.kwargs).loss
        results[name] = torch.autograd.grad(value, leaves, torch.tensor(upstream))
    torch.testing.assert_close(results["triton"], results["reference"])


def test_backward_twice_gives_the_same_gradient_twice():
    call = loss(60, "values", "returns")
    with backend("triton"):
        value = call.op(*call.args, **call.kwargs).loss
    first = torch.autograd.grad(value, call.args[0], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(value, call.args[0]), first, rtol=0, atol=0)


def test_micro_batches_add_up_to_the_batch():
    call = loss(90, "values", "returns", "weights", normalizer=90.0)
    rows = {name: x for name, x in call.kwargs.items() if isinstance(x, torch.Tensor)}
    whole = run(call, "triton")
    total = torch.zeros(90)
    for own in (slice(0, 40), slice(40, 90)):
        part = call._replace(
            args=tuple(x[own].detach().requires_grad_(x.requires_grad) for x in call.args),
            kwargs=call.kwargs | {name: x[own].detach() for name, x in rows.items()},
        )
        total[own] = run(part, "triton")[1][0]
    torch.testing.assert_close(total, whole[1][0])


@pytest.mark.parametrize("shape", [(), (1,), (6, 10), (3, 4, 5)])
def test_any_shape(shape):
    x = torch.randn(3, *shape)
    assert_agrees(
        loss(1)._replace(args=(x[0].requires_grad_(), x[1], x[2]), kwargs={"clip_coef": 0.2})
    )


def test_strided_rows():
    x = torch.randn(64, 3)
    args = x[:, 0].requires_grad_(), x[::1, 1], torch.randn(1).expand(64)
    assert_agrees(loss(1)._replace(args=args, kwargs={"clip_coef": 0.2}))


def test_no_rows_give_a_loss_of_zero():
    empty = torch.empty(0)
    for norm_adv in (False, True):
        with backend("triton"):
            result = ppo_loss(
                empty.clone().requires_grad_(), empty, empty, clip_coef=0.2, norm_adv=norm_adv
            )
        result.loss.backward()
        assert result.loss == 0.0 and not result.stats.any()


def test_the_same_call_gives_the_same_bits():
    call = loss(17000, *ALL, masked=True, norm_adv=True, **EVERYTHING)
    first = run(call, "triton")
    for outputs, others in zip(first, run(call, "triton"), strict=True):
        for x, y in zip(outputs, others, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_inputs_stay_as_they_are():
    call = loss(60, *ALL, norm_adv=True, **EVERYTHING)
    tensors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, torch.Tensor)]
    before = [x.detach().clone() for x in tensors]
    run(call, "triton")
    torch.testing.assert_close([x.detach() for x in tensors], before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_coef": -0.1}, "clip_coef is -0.1"),
        ({"mask": torch.ones(9)}, "mask is torch.float32"),
        ({"mask": torch.ones(8, dtype=torch.bool)}, r"mask is \[8\]"),
        ({"values": torch.zeros(9)}, "values is given but returns is None"),
        ({"kl_coef": 0.1}, "kl_coef is given but ref_log_probs is None"),
        ({"advantage_moments": torch.zeros(2)}, "advantage_moments"),
    ],
)
def test_bad_input_is_refused_as_by_the_reference(change, message):
    call = loss(9)
    for name in ("triton", "reference"):
        with backend(name), pytest.raises(ValueError, match=message):
            call.op(*call.args, **call.kwargs | change)


@pytest.mark.parametrize("M", [50, 17000])
@pytest.mark.parametrize(("mean", "std"), [(1e6, 1.0), (1e3, 0.01), (0.0, 1e-3)])
def test_whitening_keeps_its_digits_under_a_large_mean(M, mean, std):
    old = torch.zeros(M)
    advantages = mean + std * torch.randn(M)
    log_probs = old.clone().requires_grad_()
    with backend("triton"):
        value = ppo_loss(log_probs, old, advantages, clip_coef=0.2, norm_adv=True).loss
    (gradient,) = torch.autograd.grad(value, log_probs)
    exact = advantages.double()
    expected = -(exact - exact.mean()) / (exact.std() + 1e-8) / M
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=2e-6 / M)


@pytest.mark.parametrize(
    "moments",
    [
        torch.tensor([50.0, 9.0, 0.1, 9.0, 20.0])[::2],
        torch.tensor(2.0).expand(3),
        torch.tensor([50.0, 0.1, 20.0], dtype=torch.bfloat16),
    ],
)
def test_moments_may_lie_anyhow(moments):
    assert_agrees(loss(50, advantage_moments=moments.to(torch.empty(0).device)))


@pytest.mark.parametrize("name", ["kl_coef", "old_kl_coef", "ent_coef", "vf_coef", "normalizer"])
def test_a_coefficient_of_nan_shows(name):
    call = loss(9, *ALL, **{"ent_coef": 0.1, "kl_coef": 0.1, name: math.nan})
    assert run(call, "triton")[0][0].isnan() and run(call, "reference")[0][0].isnan()


def test_values_that_are_nan_are_left_out_at_weight_0():
    call = loss(9, "values", "returns", vf_coef=0.0)
    with torch.no_grad():
        call.kwargs["values"].fill_(math.nan)
    assert run(call, "triton")[0][0].isfinite() and run(call, "reference")[0][0].isfinite()
