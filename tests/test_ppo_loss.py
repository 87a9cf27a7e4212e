"""The PPO loss: against numbers by hand, an oracle in plain loops, autograd, and peers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Categorical, Normal

from ppo_fast.functional import _rows, _surrogate
from ppo_fast.functional.ppo_loss import ppo_loss, ppo_loss_from_gaussian, ppo_loss_from_logits
from ppo_fast.results import PPO_STATS

F64 = torch.float64


def batch(m=64, dtype=F64, seed=0, spread=0.4):
    """Random rows: some ratios and values within their clip ranges, some beyond on either side."""
    g = torch.Generator().manual_seed(seed)

    def randn():
        return torch.randn(m, generator=g, dtype=F64)

    old = -randn().abs() - 0.1
    values = randn()
    rows = {
        "log_probs": old + spread * randn(),
        "old_log_probs": old,
        "advantages": randn(),
        "values": values,
        "old_values": values + 0.3 * randn(),
        "returns": randn(),
        "entropy": randn().abs(),
        "ref_log_probs": old + spread * randn(),
        "weights": randn().abs(),
    }
    return {name: row.to(dtype) for name, row in rows.items()}


def pick(rows, *names):
    return {name: rows[name] for name in ("log_probs", "old_log_probs", "advantages", *names)}


VALUE = ("values", "returns")
OPTIONS = {
    "policy only": ((), {}),
    "clip higher": ((), {"clip_coef_high": 0.35}),
    "dual clip": ((), {"dual_clip": 1.3}),
    "value": (VALUE, {"vf_coef": 0.7}),
    "value clip max": ((*VALUE, "old_values"), {"vf_clip_coef": 0.2}),
    "value clip only": ((*VALUE, "old_values"), {"vf_clip_coef": 0.2, "vf_clip": "clipped"}),
    "entropy": (("entropy",), {"ent_coef": 0.03}),
    "kl k1": (("ref_log_probs",), {"kl_coef": 0.2, "kl_estimator": "k1"}),
    "kl k2": (("ref_log_probs",), {"kl_coef": 0.2, "kl_estimator": "k2"}),
    "kl k3": (("ref_log_probs",), {"kl_coef": 0.2}),
    "kl to old": ((), {"old_kl_coef": 0.5}),
    "normalised": ((), {"norm_adv": True}),
    "weights": ((*VALUE, "entropy", "weights"), {"ent_coef": 0.1}),
    "normalizer": ((*VALUE, "entropy"), {"ent_coef": 0.1, "normalizer": 1000.0}),
    "everything": (
        (*VALUE, "old_values", "entropy", "ref_log_probs", "weights"),
        {
            "clip_coef_high": 0.28,
            "dual_clip": 1.5,
            "vf_coef": 0.7,
            "vf_clip_coef": 0.2,
            "ent_coef": 0.02,
            "kl_coef": 0.1,
            "old_kl_coef": 0.05,
            "norm_adv": True,
        },
    ),
}
every_option = pytest.mark.parametrize(("names", "options"), OPTIONS.values(), ids=OPTIONS.keys())


# --- Oracles ---------------------------------------------------------------------------------


def clip(x, low, high):
    return min(max(x, low), high)


def loop_oracle(rows, keep=None, clip_coef=0.2, **o):
    """Every statistic and the loss, element by element in Python floats."""
    n_rows = len(rows["log_probs"])
    used = [i for i in range(n_rows) if keep is None or bool(keep[i])]
    at = {name: [float(x) for x in row] for name, row in rows.items()}
    advantages = dict(enumerate(at["advantages"]))
    if o.get("norm_adv") and len(used) > 1:
        mean = sum(advantages[i] for i in used) / len(used)
        var = sum((advantages[i] - mean) ** 2 for i in used) / (len(used) - 1)
        advantages = {i: (advantages[i] - mean) / (math.sqrt(var) + 1e-8) for i in used}
    n = o.get("normalizer", len(used)) or 1
    high = o.get("clip_coef_high", clip_coef)
    sums = dict.fromkeys(PPO_STATS, 0.0)
    for i in used:
        w = at["weights"][i] if "weights" in at else 1.0
        a, log_ratio = advantages[i], clip(at["log_probs"][i] - at["old_log_probs"][i], -20, 20)
        r = math.exp(log_ratio)
        objective = min(a * r, a * clip(r, 1 - clip_coef, 1 + high))
        if "dual_clip" in o and a < 0 and objective < o["dual_clip"] * a:
            objective = o["dual_clip"] * a
            sums["dual_clip_fraction"] += 1
        sums["policy_loss"] -= w * objective
        sums["clip_fraction"] += not 1 - clip_coef <= r <= 1 + high
        sums["old_approx_kl"] -= log_ratio
        sums["approx_kl"] += w * (r - 1 - log_ratio)
        sums["ratio_mean"] += r
        sums["ratio_deviation"] = max(sums["ratio_deviation"], abs(r - 1))
        if "values" in at:
            v, target = at["values"][i], at["returns"][i]
            squares = [(v - target) ** 2]
            if "vf_clip_coef" in o:
                v_old, reach = at["old_values"][i], o["vf_clip_coef"]
                clipped = (v_old + clip(v - v_old, -reach, reach) - target) ** 2
                squares = [clipped] if o.get("vf_clip") == "clipped" else [*squares, clipped]
                sums["value_clip_fraction"] += abs(v - v_old) > reach
            sums["value_loss"] += w * max(squares) / 2
        if "entropy" in at:
            sums["entropy"] += w * at["entropy"][i]
        if "ref_log_probs" in at:
            d = clip(at["ref_log_probs"][i] - at["log_probs"][i], -20, 20)
            estimates = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}
            sums["kl"] += w * estimates[o.get("kl_estimator", "k3")]
    stats = {k: v if k == "ratio_deviation" else v / n for k, v in sums.items()}
    stats["count"] = len(used)
    loss = (
        stats["policy_loss"]
        + o.get("vf_coef", 0.5) * stats["value_loss"]
        - o.get("ent_coef", 0.0) * stats["entropy"]
        + o.get("kl_coef", 0.0) * stats["kl"]
        + o.get("old_kl_coef", 0.0) * stats["approx_kl"]
    )
    return loss, [stats[name] for name in PPO_STATS]


def autograd_oracle(rows, keep=None, clip_coef=0.2, **o):
    """The loss by textbook operations, for autograd; masked rows are cut out."""
    r = rows if keep is None else {name: row[keep] for name, row in rows.items()}
    ones = torch.ones_like(r["advantages"])
    w = r.get("weights", ones)
    a = r["advantages"]
    if o.get("norm_adv"):
        a = (a - a.mean()) / (a.std() + 1e-8)
    log_ratio = torch.clamp(r["log_probs"] - r["old_log_probs"], -20, 20)
    ratio = log_ratio.exp()
    high = o.get("clip_coef_high", clip_coef)
    terms = torch.max(-a * ratio, -a * torch.clamp(ratio, 1 - clip_coef, 1 + high))
    if "dual_clip" in o:
        terms = torch.where(a < 0, torch.min(terms, -o["dual_clip"] * a), terms)
    if "values" in r:
        squares = (r["values"] - r["returns"]) ** 2
        if "vf_clip_coef" in o:
            reach = o["vf_clip_coef"]
            near = r["old_values"] + torch.clamp(r["values"] - r["old_values"], -reach, reach)
            clipped = (near - r["returns"]) ** 2
            squares = clipped if o.get("vf_clip") == "clipped" else torch.max(squares, clipped)
        terms = terms + o.get("vf_coef", 0.5) * 0.5 * squares
    if "entropy" in r:
        terms = terms - o.get("ent_coef", 0.0) * r["entropy"]
    if "ref_log_probs" in r:
        d = torch.clamp(r["ref_log_probs"] - r["log_probs"], -20, 20)
        estimates = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}
        terms = terms + o.get("kl_coef", 0.0) * estimates[o.get("kl_estimator", "k3")]
    terms = terms + o.get("old_kl_coef", 0.0) * (ratio - 1 - log_ratio)
    return (w * terms).sum() / o.get("normalizer", max(len(ones), 1))


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradients_of(function, rows, names):
    """Value and gradients by `names` of a function of the dict `rows`."""
    inputs = dict(zip(names, leaves(*(rows[name] for name in names)), strict=True))
    loss = function({**rows, **inputs})
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return loss.detach(), [
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(inputs.values(), grads, strict=True)
    ]


def differentiable(rows):
    return [name for name in ("log_probs", "values", "entropy") if name in rows]


# --- ppo_loss: value, statistics, gradients ----------------------------------------------------


def test_matches_numbers_by_hand():
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5], dtype=F64)
    log_probs = ratio.log().requires_grad_()
    values = torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=F64, requires_grad=True)
    result = ppo_loss(
        log_probs,
        torch.zeros(4, dtype=F64),
        torch.tensor([2.0, 1.0, -1.0, 3.0], dtype=F64),
        clip_coef=0.2,
        values=values,
        returns=torch.zeros(4, dtype=F64),
        vf_coef=0.5,
        entropy=torch.tensor([0.4, 0.4, 0.4, 0.8], dtype=F64),
        ent_coef=0.1,
    )
    # -2, -min(1.5, 1.2), +1.5 (no clip against a worse outcome), -3 * 0.5
    assert result.policy_loss.item() == pytest.approx((-2 - 1.2 + 1.5 - 1.5) / 4)
    assert result.value_loss.item() == pytest.approx((0.5 + 2.0 + 0.0 + 0.5) / 4)
    assert result.entropy.item() == pytest.approx(0.5)
    assert result.loss.item() == pytest.approx(-0.8 + 0.5 * 0.75 - 0.1 * 0.5)
    assert result.clip_fraction.item() == 0.75
    assert result.ratio_mean.item() == pytest.approx(4.5 / 4)
    assert result.ratio_deviation.item() == pytest.approx(0.5)
    assert result.old_approx_kl.item() == pytest.approx(-math.log(1.5 * 1.5 * 0.5) / 4)
    assert result.count.item() == 4
    result.loss.backward()
    torch.testing.assert_close(log_probs.grad * 4, torch.tensor([-2, 0, 1.5, -1.5], dtype=F64))
    torch.testing.assert_close(values.grad * 4, torch.tensor([0.5, 1, 0, 0.5], dtype=F64))


@every_option
def test_loss_and_statistics_match_the_loop(names, options):
    rows = pick(batch(), *names)
    keep = torch.rand(64, generator=torch.Generator().manual_seed(1)) > 0.3
    for mask in (None, keep):
        result = ppo_loss(**rows, clip_coef=0.2, mask=mask, **options)
        loss, stats = loop_oracle(rows, mask, **options)
        assert result.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-14)
        torch.testing.assert_close(
            result.stats, torch.tensor(stats, dtype=F64), rtol=1e-12, atol=1e-14
        )


@every_option
def test_gradients_match_autograd(names, options):
    rows = pick(batch(), *names)
    keep = torch.rand(64, generator=torch.Generator().manual_seed(1)) > 0.3
    for mask in (None, keep):
        wanted = differentiable(rows)
        loss, got = gradients_of(
            lambda r, m=mask: ppo_loss(**r, clip_coef=0.2, mask=m, **options).loss, rows, wanted
        )
        expected_loss, expected = gradients_of(
            lambda r, m=mask: autograd_oracle(r, m, **options), rows, wanted
        )
        torch.testing.assert_close(loss, expected_loss)
        for name, one, other in zip(wanted, got, expected, strict=True):
            assert other.abs().sum() > 0 or name == "entropy"
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-15)


@every_option
def test_passes_gradcheck(names, options):
    rows = pick(batch(12, seed=3), *names)
    wanted = differentiable(rows)

    def loss(*inputs):
        return ppo_loss(**{**rows, **dict(zip(wanted, inputs, strict=True))}, clip_coef=0.2,
                        **options).loss  # fmt: skip

    assert gradcheck(loss, leaves(*(rows[name] for name in wanted)))


@pytest.mark.parametrize("log_ratio", [1e-2, 1e-3, 1e-4, -1e-3])
def test_a_small_kl_keeps_its_digits_in_fp32(log_ratio):
    log_probs, old = torch.tensor([log_ratio]), torch.zeros(1)
    result = ppo_loss(log_probs, old, old, clip_coef=0.2, ref_log_probs=-old)
    exact = [math.expm1(d) - d for d in (log_probs.item(), -log_probs.item())]
    assert result.approx_kl.item() == pytest.approx(exact[0], rel=3e-3)
    assert result.kl.item() == pytest.approx(exact[1], rel=3e-3)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    old = torch.randn(50, dtype=F64)
    advantages = torch.randn(50, dtype=F64)
    (log_probs,) = leaves(old)
    result = ppo_loss(log_probs, old, advantages, clip_coef=0.2, old_kl_coef=3.0)
    result.loss.backward()
    torch.testing.assert_close(log_probs.grad, -advantages / 50)
    assert result.loss.item() == pytest.approx(-advantages.mean().item())
    assert result.ratio_deviation == 0
    assert result.approx_kl == 0
    assert result.clip_fraction == 0


@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
def test_clip_edges_follow_torch(advantage):
    # exp and log do not hit an edge exactly, so the edge is placed where the ratio is.
    log_ratio = torch.tensor([0.25, -0.25], dtype=F64)
    high, low = log_ratio.exp().tolist()
    ulp = torch.finfo(F64).eps
    for step in (-4 * ulp, 0.0, 4 * ulp):
        options = {"clip_coef": 1 - low + step, "clip_coef_high": high - 1 + step}
        rows = {
            "log_probs": log_ratio,
            "old_log_probs": torch.zeros(2, dtype=F64),
            "advantages": torch.full((2,), advantage, dtype=F64),
        }
        # 1 - (1 - low) must come back as low for the edge to be met.
        assert 1 - (1 - low) == low
        assert 1 + (high - 1) == high
        _, got = gradients_of(lambda r, o=options: ppo_loss(**r, **o).loss, rows, ["log_probs"])
        _, expected = gradients_of(
            lambda r, o=options: autograd_oracle(r, **o), rows, ["log_probs"]
        )
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("vf_clip", ["max", "clipped"])
def test_value_clip_edges_follow_torch(vf_clip):
    moved = torch.tensor([0.5, -0.5, 0.5000001, -0.5000001, 0.0], dtype=F64)
    for target in (-1.0, 1.0, 0.0):
        rows = {
            "log_probs": torch.zeros(5, dtype=F64),
            "old_log_probs": torch.zeros(5, dtype=F64),
            "advantages": torch.zeros(5, dtype=F64),
            "values": 0.25 + moved,
            "old_values": torch.full((5,), 0.25, dtype=F64),
            "returns": torch.full((5,), target, dtype=F64),
        }
        options = {"clip_coef": 0.2, "vf_clip_coef": 0.5, "vf_clip": vf_clip}
        _, got = gradients_of(lambda r, o=options: ppo_loss(**r, **o).loss, rows, ["values"])
        _, expected = gradients_of(lambda r, o=options: autograd_oracle(r, **o), rows, ["values"])
        torch.testing.assert_close(got, expected)


def test_where_the_value_squares_tie_the_gradient_is_the_unclipped_one():
    values = torch.tensor([2.0], requires_grad=True)  # errors +0.5 and -0.5 about the return
    zero = torch.zeros(1)
    result = ppo_loss(
        zero, zero, zero, clip_coef=0.2, values=values, old_values=zero, vf_clip_coef=1.0,
        returns=torch.tensor([1.5]), vf_coef=1.0,
    )  # fmt: skip
    result.loss.backward()
    assert values.grad.item() == 0.5


def test_rounding_never_chooses_the_value_branch():
    # (old + clamp(v - old)) - R rounds away from v - R inside the range, where comparing the two
    # squares would drop the gradient of some rows.
    rows = {name: row.float() for name, row in batch(4096, seed=5).items()}
    rows["old_values"] = rows["values"] + 0.1 * torch.randn(4096)
    inside = (rows["values"] - rows["old_values"]).abs() < 0.99
    assert inside.all()
    rows = pick(rows, *VALUE, "old_values")
    _, (got,) = gradients_of(
        lambda r: ppo_loss(**r, clip_coef=0.2, vf_clip_coef=1.0).loss, rows, ["values"]
    )
    torch.testing.assert_close(got * 4096, 0.5 * (rows["values"] - rows["returns"]))


def test_dual_clip_bounds_the_loss_of_bad_actions_only():
    ratio = torch.tensor([5.0, 5.0, 1.1], dtype=F64)
    log_probs = ratio.log().requires_grad_()
    advantages = torch.tensor([-1.0, 1.0, -1.0], dtype=F64)
    result = ppo_loss(log_probs, torch.zeros(3, dtype=F64), advantages, clip_coef=0.2, dual_clip=3)
    assert result.policy_loss.item() == pytest.approx((3 - 1.2 + 1.1) / 3)
    assert result.dual_clip_fraction.item() == pytest.approx(1 / 3)
    result.loss.backward()
    torch.testing.assert_close(log_probs.grad * 3, torch.tensor([0, 0, 1.1], dtype=F64))


@pytest.mark.parametrize("distance", [200.0, -200.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_overflowing_ratio_stays_finite_and_gets_no_gradient(dtype, distance):
    log_probs = torch.tensor([distance, 0.0], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(2, dtype=dtype)
    for advantage in (1.0, -1.0):
        log_probs.grad = None
        result = ppo_loss(
            log_probs, zeros, zeros + advantage, clip_coef=0.2, old_kl_coef=0.1,
            ref_log_probs=zeros, kl_coef=0.1,
        )  # fmt: skip
        result.loss.backward()
        assert result.stats.isfinite().all()
        assert result.loss.isfinite()
        assert log_probs.grad.tolist() == [0.0, -advantage / 2]


def test_the_reference_limit_and_the_ratio_limit_are_apart():
    # Far from the old policy, near the reference: the KL still pulls, and the other way round.
    log_probs = torch.tensor([30.0, 0.5], dtype=F64, requires_grad=True)
    old, ref = torch.tensor([0.0, 0.0], dtype=F64), torch.tensor([29.0, 40.0], dtype=F64)
    zeros = torch.zeros(2, dtype=F64)
    result = ppo_loss(
        log_probs, old, zeros, clip_coef=0.2, ref_log_probs=ref, kl_coef=1.0, kl_estimator="k2",
        old_kl_coef=1.0,
    )  # fmt: skip
    result.loss.backward()
    expected = torch.tensor([1.0, math.expm1(0.5)], dtype=F64) / 2
    torch.testing.assert_close(log_probs.grad, expected)


# --- Masks, weights, normalizers, sizes ---------------------------------------------------------


def full_options():
    names, options = OPTIONS["everything"]
    return names, {**options, "clip_coef": 0.2}


def test_masked_elements_are_never_read():
    names, options = full_options()
    rows = pick(batch(40), *names)
    keep = torch.arange(40) % 3 != 0
    poisoned = {name: row.masked_fill(~keep, math.nan) for name, row in rows.items()}
    clean = {name: row[keep] for name, row in rows.items()}
    wanted = differentiable(rows)
    loss, got = gradients_of(lambda r: ppo_loss(**r, mask=keep, **options).loss, poisoned, wanted)
    short_loss, expected = gradients_of(lambda r: ppo_loss(**r, **options).loss, clean, wanted)
    torch.testing.assert_close(loss, short_loss)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one[keep], other)
        assert (one[~keep] == 0).all()
    masked = ppo_loss(**poisoned, mask=keep, **options).stats
    torch.testing.assert_close(masked, ppo_loss(**clean, **options).stats)


@pytest.mark.parametrize("size", [0, 5])
def test_an_empty_or_fully_masked_batch_has_loss_and_gradients_zero(size):
    names, options = full_options()
    rows = {name: torch.full((size,), math.nan) for name in pick(batch(1), *names)}
    mask = torch.zeros(size, dtype=torch.bool)
    for normalizer in (None, 7.0, torch.tensor(0), torch.tensor(0.0), 0):
        wanted = differentiable(rows)
        loss, grads = gradients_of(
            lambda r, n=normalizer: ppo_loss(**r, mask=mask, normalizer=n, **options).loss,
            rows,
            wanted,
        )
        assert loss == 0
        assert all((grad == 0).all() and grad.shape == (size,) for grad in grads)
        stats = ppo_loss(**rows, mask=mask, normalizer=normalizer, **options).stats
        assert stats.tolist() == [0.0] * len(PPO_STATS)
    empty = {name: row[:0] for name, row in rows.items()}
    assert ppo_loss(**empty, **options).stats.tolist() == [0.0] * len(PPO_STATS)


def test_micro_batches_with_the_global_count_add_up_to_the_batch():
    names, options = full_options()
    options = {**options, "norm_adv": False}
    rows = pick(batch(48), *names)
    keep = torch.rand(48, generator=torch.Generator().manual_seed(2)) > 0.4
    wanted = differentiable(rows)
    loss, whole = gradients_of(lambda r: ppo_loss(**r, mask=keep, **options).loss, rows, wanted)
    stats = ppo_loss(**rows, mask=keep, **options).stats
    for normalizer in (keep.sum(), float(keep.sum())):
        total, parts, part_stats = 0.0, [[] for _ in wanted], 0.0
        for part in torch.arange(48).split([5, 30, 1, 12]):
            piece = {name: row[part] for name, row in rows.items()}
            more = {"mask": keep[part], "normalizer": normalizer, **options}
            piece_loss, grads = gradients_of(
                lambda r, more=more: ppo_loss(**r, **more).loss, piece, wanted
            )
            total += piece_loss
            part_stats += ppo_loss(**piece, **more).stats
            for collected, grad in zip(parts, grads, strict=True):
                collected.append(grad)
        torch.testing.assert_close(total, loss)
        for collected, grad in zip(parts, whole, strict=True):
            torch.testing.assert_close(torch.cat(collected), grad)
        adds_up = torch.tensor([name != "ratio_deviation" for name in PPO_STATS])
        torch.testing.assert_close(part_stats[adds_up], stats[adds_up])


def test_a_mean_of_micro_batch_means_would_differ():
    rows = pick(batch(9))
    whole = ppo_loss(**rows, clip_coef=0.2).loss
    parts = [
        ppo_loss(**{name: row[part] for name, row in rows.items()}, clip_coef=0.2).loss
        for part in (slice(0, 2), slice(2, 9))
    ]
    assert not torch.allclose(sum(parts) / 2, whole)


def test_a_weight_counts_an_element_that_often_but_the_divisor_stays():
    rows = pick(batch(6), *VALUE, "entropy")
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 1.0], dtype=F64)
    repeated = {n: row.repeat_interleave(weights.long()) for n, row in rows.items()}
    options = {"clip_coef": 0.2, "ent_coef": 0.1}
    got = ppo_loss(**rows, weights=weights, **options)
    torch.testing.assert_close(got.loss, ppo_loss(**repeated, normalizer=6, **options).loss)
    plain = ppo_loss(**rows, **options)
    unweighted = [5, 6, 7, 8, 9, 10, 11]
    torch.testing.assert_close(got.stats[unweighted], plain.stats[unweighted])


def test_the_advantages_of_the_call_are_whitened():
    rows = pick(batch(30))
    advantages = rows["advantages"]
    white = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    got = ppo_loss(**rows, clip_coef=0.2, norm_adv=True)
    rows["advantages"] = white
    torch.testing.assert_close(got.loss, ppo_loss(**rows, clip_coef=0.2).loss)


def test_a_single_advantage_is_not_whitened():
    one = torch.zeros(1)
    for mask in (None, torch.tensor([True])):
        result = ppo_loss(one, one, one + 3, clip_coef=0.2, norm_adv=True, mask=mask)
        assert result.loss == -3


def test_equal_advantages_whiten_to_zero():
    zeros = torch.zeros(1000)
    for mask in (None, torch.arange(1000) < 777):
        result = ppo_loss(zeros, zeros, zeros + 0.1, clip_coef=0.2, norm_adv=True, mask=mask)
        assert abs(result.loss) < 1e-6


def test_any_shape_and_strides_are_the_flat_batch():
    names, options = full_options()
    flat = pick(batch(24), *names)
    keep = torch.arange(24) % 5 != 0
    wanted = differentiable(flat)
    loss, expected = gradients_of(lambda r: ppo_loss(**r, mask=keep, **options).loss, flat, wanted)
    strided = {name: row.view(4, 6).t().contiguous().t() for name, row in flat.items()}
    assert not strided["values"].is_contiguous()
    mask = keep.view(4, 6)
    got_loss, got = gradients_of(
        lambda r: ppo_loss(**r, mask=mask, **options).loss, strided, wanted
    )
    torch.testing.assert_close(got_loss, loss)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.view(4, 6))
    every_second = torch.stack([flat["log_probs"], flat["log_probs"] + 9], 1)[:, 0]
    assert ppo_loss(**{**flat, "log_probs": every_second}, **options).loss == (
        ppo_loss(**flat, **options).loss
    )


def test_many_rows_are_the_sum_of_their_blocks(monkeypatch):
    names, options = full_options()
    rows = pick(batch(50), *names)
    keep = torch.arange(50) % 4 != 0
    wanted = differentiable(rows)

    def run():
        stats = ppo_loss(**rows, mask=keep, **options).stats
        return stats, gradients_of(lambda r: ppo_loss(**r, mask=keep, **options).loss, rows, wanted)

    whole = run()
    threads = torch.get_num_threads()
    monkeypatch.setattr(_surrogate, "CPU_BLOCK_ROWS", 7)
    torch.set_num_threads(1)
    try:
        torch.testing.assert_close(run(), whole)
    finally:
        torch.set_num_threads(threads)


def test_zero_dimensional_tensors_serve_as_coefficients():
    names, options = full_options()
    rows = pick(batch(20), *names)
    numbers = {k: v for k, v in options.items() if isinstance(v, float)}
    tensors = {k: torch.tensor(v, dtype=F64) for k, v in numbers.items()}
    tensors["normalizer"], numbers["normalizer"] = torch.tensor(13), 13
    wanted = differentiable(rows)
    loss, expected = gradients_of(
        lambda r: ppo_loss(**r, **{**options, **numbers}).loss, rows, wanted
    )
    got_loss, got = gradients_of(
        lambda r: ppo_loss(**r, **{**options, **tensors}).loss, rows, wanted
    )
    torch.testing.assert_close(got_loss, loss)
    torch.testing.assert_close(got, expected)
    # One of the two clip bounds alone.
    mixed = {**options, "clip_coef": torch.tensor(0.2, dtype=F64)}
    torch.testing.assert_close(ppo_loss(**rows, **mixed).loss, ppo_loss(**rows, **options).loss)


# --- Autograd behaviour --------------------------------------------------------------------------


def test_the_upstream_gradient_scales_and_the_graph_may_be_reused():
    rows = pick(batch(8), *VALUE)
    rows["log_probs"].requires_grad_()
    rows["values"].requires_grad_()
    inputs = (rows["log_probs"], rows["values"])
    loss = ppo_loss(**rows, clip_coef=0.2).loss
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(once, thrice, again, strict=True):
        assert torch.equal(3 * a, b) or torch.allclose(3 * a, b, rtol=1e-15)
        assert torch.equal(a, c)


def test_double_backward_and_vmap_are_refused():
    rows = pick(batch(8))
    rows["log_probs"].requires_grad_()
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(
            ppo_loss(**rows, clip_coef=0.2).loss, rows["log_probs"], create_graph=True
        )

    def one(log_probs):
        return ppo_loss(log_probs, log_probs.detach(), log_probs.detach(), clip_coef=0.2).loss

    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(NotImplementedError, match=r"torch\.func"):
            transform(one)(torch.randn(4, 4))


def test_without_gradients_wanted_the_loss_is_a_constant():
    rows = pick(batch(8), *VALUE)
    assert not ppo_loss(**rows, clip_coef=0.2).loss.requires_grad
    rows["log_probs"].requires_grad_()
    with torch.no_grad():
        assert not ppo_loss(**rows, clip_coef=0.2).loss.requires_grad
    result = ppo_loss(**rows, clip_coef=0.2)
    assert result.loss.requires_grad
    assert not result.stats.requires_grad


def test_the_loss_shares_no_memory_with_the_statistics():
    rows = pick(batch(8))
    rows["log_probs"].requires_grad_()
    result = ppo_loss(**rows, clip_coef=0.2)
    before = result.policy_loss.clone()
    with torch.no_grad():
        result.loss.mul_(2)
    assert result.policy_loss == before
    assert before != 0


def test_inputs_are_left_alone():
    names, options = full_options()
    rows = pick(batch(16), *names)
    copies = {name: row.clone() for name, row in rows.items()}
    rows["log_probs"].requires_grad_()
    ppo_loss(**rows, mask=torch.ones(16, dtype=torch.bool), **options).loss.backward()
    for name, row in rows.items():
        assert torch.equal(row, copies[name])


def test_a_nan_is_passed_on_and_not_hidden():
    log_probs = torch.tensor([0.0, math.nan], requires_grad=True)
    result = ppo_loss(log_probs, torch.zeros(2), torch.ones(2), clip_coef=0.2)
    result.loss.backward()
    assert result.loss.isnan()
    assert result.ratio_deviation.isnan()
    assert log_probs.grad.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs_are_computed_in_fp32(dtype):
    names, options = full_options()
    low = pick(batch(32, dtype=dtype), *names)
    exact = {name: row.double() for name, row in low.items()}
    wanted = differentiable(low)
    loss, got = gradients_of(lambda r: ppo_loss(**r, **options).loss, low, wanted)
    exact_loss, expected = gradients_of(lambda r: ppo_loss(**r, **options).loss, exact, wanted)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_loss_scale_reaches_fp16_gradients_before_they_vanish():
    n = 1 << 16
    log_probs = torch.zeros(n, dtype=torch.float16, requires_grad=True)
    advantages = torch.full((n,), 1e-3)
    loss = ppo_loss(log_probs, torch.zeros(n), advantages, clip_coef=0.2).loss
    (loss * 65536.0).backward()
    torch.testing.assert_close(log_probs.grad, torch.full((n,), -1e-3).half())


# --- Categorical ---------------------------------------------------------------------------------


def categorical(m=30, a=5, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = batch(m, dtype, seed)
    logits = 2 * torch.randn(m, a, generator=g, dtype=F64)
    actions = torch.randint(a, (m,), generator=g)
    taken = torch.log_softmax(logits, -1).gather(1, actions[:, None])[:, 0]
    rows["old_log_probs"] = taken + 0.4 * torch.randn(m, generator=g, dtype=F64)
    rows["ref_log_probs"] = taken + 0.4 * torch.randn(m, generator=g, dtype=F64)
    del rows["log_probs"], rows["entropy"]
    return {name: row.to(dtype) for name, row in rows.items()}, logits.to(dtype), actions


def without_entropy(names, options):
    return [name for name in ("old_log_probs", "advantages", *names) if name != "entropy"], options


def compare(function, oracle, rows, wanted, **tolerances):
    loss, got = gradients_of(function, rows, wanted)
    expected_loss, expected = gradients_of(oracle, rows, wanted)
    torch.testing.assert_close(loss, expected_loss, **tolerances)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerances)


@every_option
@pytest.mark.parametrize(("a", "temperature"), [(5, 1.0), (5, 0.7), (64, 1.0), (64, 0.7)])
def test_logits_match_autograd_through_torch_distributions(names, options, a, temperature):
    names, options = without_entropy(names, options)
    rows, logits, actions = categorical(a=a)
    rows = {"logits": logits, **{name: rows[name] for name in names}}
    keep = torch.arange(30) % 4 != 1

    def ours(r, mask):
        return ppo_loss_from_logits(
            actions=actions, clip_coef=0.2, temperature=temperature, mask=mask, **r, **options
        ).loss

    def oracle(r, mask):
        r = dict(r)
        policy = Categorical(logits=r.pop("logits") / temperature)
        r |= {"log_probs": policy.log_prob(actions), "entropy": policy.entropy()}
        return autograd_oracle(r, mask, **options)

    wanted = [name for name in ("logits", "values") if name in rows]
    for mask in (None, keep):
        compare(
            lambda r, m=mask: ours(r, m), lambda r, m=mask: oracle(r, m), rows, wanted,
            rtol=1e-10, atol=1e-14,
        )  # fmt: skip


@pytest.mark.parametrize("a", [2, 63, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_logits_agree_with_ppo_loss_in_either_layout(a, dtype):
    rows, logits, actions = categorical(40, a, dtype)
    policy = Categorical(logits=logits)
    options = {"clip_coef": 0.2, "vf_clip_coef": 0.2, "ent_coef": 0.01, "kl_coef": 0.1}
    got = ppo_loss_from_logits(logits, actions, **rows, **options)
    expected = ppo_loss(policy.log_prob(actions), entropy=policy.entropy(), **rows, **options)
    torch.testing.assert_close(got.stats, expected.stats)
    torch.testing.assert_close(got.loss, expected.loss)


@pytest.mark.parametrize(("a", "head_sizes"), [(9, None), (9, (2, 4, 3)), (64, None)])
def test_logits_pass_gradcheck(a, head_sizes):
    rows, logits, actions = categorical(6, a)
    if head_sizes is not None:
        actions = torch.stack([actions % size for size in head_sizes], 1)
    options = {"clip_coef": 0.2, "dual_clip": 2.0, "vf_clip_coef": 0.2, "ent_coef": 0.1,
               "kl_coef": 0.1, "old_kl_coef": 0.1, "head_sizes": head_sizes}  # fmt: skip
    values = rows.pop("values")
    assert gradcheck(
        lambda x, v: ppo_loss_from_logits(x, actions, values=v, **rows, **options).loss,
        leaves(logits, values),
    )


def test_the_gradient_of_an_enumerated_objective_is_exact():
    # Every action once, weighted by its probability: the loss is -E[A], whose gradient by the
    # logits is -p_j (A_j - E[A]).
    (logits,) = leaves(torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=F64))
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
    probs = logits.detach().softmax(-1)
    ppo_loss_from_logits(
        logits.expand(4, 4),
        torch.arange(4),
        probs.log(),
        advantages,
        clip_coef=0.2,
        weights=probs,
        normalizer=1,
    ).loss.backward()
    mean = (probs * advantages).sum()
    torch.testing.assert_close(logits.grad, -probs * (advantages - mean))


@pytest.mark.parametrize("sizes", [(2, 4, 3), (9,), (1, 8), (70, 2)])
def test_heads_add_up(sizes):
    rows, logits, actions = categorical(20, sum(sizes))
    actions = torch.stack([actions % size for size in sizes], 1)
    policies = [Categorical(logits=part) for part in logits.split(sizes, 1)]
    log_probs = sum(p.log_prob(actions[:, k]) for k, p in enumerate(policies))
    rows["old_log_probs"] = log_probs + 0.3
    options = {"clip_coef": 0.2, "ent_coef": 0.1}
    got = ppo_loss_from_logits(logits, actions, head_sizes=sizes, **rows, **options)
    expected = ppo_loss(log_probs, entropy=sum(p.entropy() for p in policies), **rows, **options)
    torch.testing.assert_close(got.stats, expected.stats)
    torch.testing.assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("a", [6, 80])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_action_mask_is_minus_infinity(a, dtype):
    rows, logits, actions = categorical(25, a, dtype)
    legal = torch.rand(25, a, generator=torch.Generator().manual_seed(3)) > 0.4
    legal[torch.arange(25), actions] = True
    options = {"actions": actions, "clip_coef": 0.2, "ent_coef": 0.1, **rows}

    def masked(x):
        return ppo_loss_from_logits(x, action_mask=legal, **options).loss

    def filled(x):
        return ppo_loss_from_logits(x.masked_fill(~legal, -math.inf), **options).loss

    logits = logits - 1e5  # far below any finite stand-in for minus infinity
    x, y = leaves(logits.masked_fill(~legal, math.nan), logits)
    masked(x).backward()
    filled(y).backward()
    assert torch.equal(x.grad, y.grad)
    assert (x.grad[~legal] == 0).all()
    assert (x.grad[legal] != 0).any()
    # Against autograd on the legal actions of one row alone.
    row = 0
    z = logits[row : row + 1, legal[row]].double().requires_grad_()
    index = legal[row].nonzero()[:, 0].tolist().index(int(actions[row]))
    ones = {name: value[row : row + 1].double() for name, value in rows.items()}
    policy = Categorical(logits=z)
    ones |= {"log_probs": policy.log_prob(torch.tensor([index])), "entropy": policy.entropy()}
    autograd_oracle(ones, ent_coef=0.1).backward()
    torch.testing.assert_close(
        x.grad[row, legal[row]].double() * 25, z.grad[0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("a", [4, 64])
def test_rows_without_a_legal_action_are_counted_and_finite(a):
    logits = torch.randn(3, a)
    logits[1] = -math.inf
    logits.requires_grad_()
    zeros = torch.zeros(3)
    result = ppo_loss_from_logits(
        logits, torch.tensor([0, 1, 2]), zeros, zeros - 1, clip_coef=0.2, ent_coef=0.1,
        ref_log_probs=zeros, kl_coef=0.1,
    )  # fmt: skip
    result.loss.backward()
    assert result.count == 3
    assert result.stats.isfinite().all()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()
    others = Categorical(logits=logits.detach()[[0, 2]]).entropy().sum() / 3
    torch.testing.assert_close(result.entropy, others)


@pytest.mark.parametrize("a", [3, 64])
def test_an_action_taken_though_illegal_gets_no_gradient(a):
    logits = torch.randn(1, a)
    logits[0, 1] = -math.inf
    logits.requires_grad_()
    zero = torch.zeros(1)
    for old in (zero, zero - math.inf):
        logits.grad = None
        result = ppo_loss_from_logits(
            logits, torch.tensor([1]), old, zero - 1, clip_coef=0.2, ref_log_probs=old, kl_coef=0.1
        )
        result.loss.backward()
        assert result.stats.isfinite().all()
        assert (logits.grad == 0).all()


@pytest.mark.parametrize("a", [4, 64])
def test_a_nan_logit_stays_in_its_row(a):
    logits = torch.randn(3, a)
    logits[1, 2] = math.nan
    logits.requires_grad_()
    zeros = torch.zeros(3)
    ppo_loss_from_logits(
        logits, torch.tensor([0, 1, 2]), zeros, zeros, clip_coef=0.2
    ).loss.backward()
    assert logits.grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("a", [6, 70])
def test_large_offsets_cost_no_precision(a, temperature):
    rows, logits, actions = categorical(50, a, torch.float32)
    options = {"clip_coef": 0.2, "ent_coef": 0.1, "temperature": temperature}
    whole = logits.round()  # exact under the shift
    near = ppo_loss_from_logits(whole, actions, **rows, **options)
    for offset in (5000.0, -5000.0):
        far = ppo_loss_from_logits(whole + offset, actions, **rows, **options)
        torch.testing.assert_close(far.stats, near.stats, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("a", [5, 64])
def test_masked_rows_of_logits_are_never_read(a):
    rows, logits, actions = categorical(20, a)
    keep = torch.arange(20) % 3 != 0
    bad = {name: row.masked_fill(~keep, math.nan) for name, row in rows.items()}
    bad_actions = actions.masked_fill(~keep, -100)
    options = {"clip_coef": 0.2, "ent_coef": 0.1, "vf_clip_coef": 0.2, "norm_adv": True}
    x, v, y, u = leaves(
        logits.masked_fill(~keep[:, None], math.nan), bad["values"], logits, rows["values"]
    )
    got = ppo_loss_from_logits(x, bad_actions, mask=keep, **{**bad, "values": v}, **options)
    got.loss.backward()
    clean = {name: row[keep] for name, row in {**rows, "values": u}.items()}
    expected = ppo_loss_from_logits(y[keep], actions[keep], **clean, **options)
    expected.loss.backward()
    torch.testing.assert_close(got.stats, expected.stats)
    torch.testing.assert_close(x.grad[keep], y.grad[keep])
    torch.testing.assert_close(v.grad[keep], u.grad[keep])
    assert (x.grad[~keep] == 0).all()
    assert (v.grad[~keep] == 0).all()


@pytest.mark.parametrize("a", [5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_blocks_change_nothing(monkeypatch, a, dtype):
    rows, logits, actions = categorical(33, a, torch.float32)
    logits = logits.to(dtype)
    keep = torch.arange(33) % 4 != 0
    legal = torch.rand(33, a) > 0.3
    legal[torch.arange(33), actions] = True
    options = {"clip_coef": 0.2, "ent_coef": 0.1, "vf_clip_coef": 0.2, "norm_adv": True,
               "mask": keep, "action_mask": legal, "temperature": 1.3}  # fmt: skip

    def run():
        x, v = leaves(logits, rows["values"])
        result = ppo_loss_from_logits(x, actions, **{**rows, "values": v}, **options)
        result.loss.backward()
        return result.stats, x.grad, v.grad

    whole = run()
    for elements in (7 * a, 1):
        monkeypatch.setattr(_rows, "CPU_BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(run(), whole)


@pytest.mark.parametrize("a", [5, 70])
def test_blocks_of_oddly_strided_and_fully_masked_rows_change_nothing(monkeypatch, a):
    rows, logits, actions = categorical(48, a)
    keep = torch.zeros(4, 12, dtype=torch.bool)
    keep[0] = keep[2, 3:] = True
    grid = {name: row.view(4, 12) for name, row in rows.items()}
    options = {"clip_coef": 0.2, "ent_coef": 0.1, "vf_clip_coef": 0.2, "mask": keep}

    def run():
        # As [:, :-1] of a language model's logits: the leading dimensions do not merge.
        padded = torch.cat([logits.view(4, 12, a), torch.zeros(4, 1, a, dtype=F64)], 1)
        x, v = leaves(padded.masked_fill(~torch.nn.functional.pad(keep, (0, 1))[..., None], math.nan),
                      grid["values"])  # fmt: skip
        result = ppo_loss_from_logits(
            x[:, :-1], actions.view(4, 12), **{**grid, "values": v}, **options
        )
        result.loss.backward()
        assert (x.grad[:, :-1][~keep] == 0).all()
        return result.stats, x.grad, v.grad

    whole = run()
    for elements in (30 * a, 5 * a, 1):
        monkeypatch.setattr(_rows, "CPU_BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(run(), whole)
    keep.zero_()
    assert run()[0].tolist() == [0.0] * len(PPO_STATS)


def test_an_action_out_of_range_is_named():
    zeros = torch.zeros(2)
    for a in (3, 64):
        with pytest.raises(IndexError, match=f"ppo_loss_from_logits: index runs from 1 to {a}"):
            ppo_loss_from_logits(
                torch.zeros(2, a), torch.tensor([1, a]), zeros, zeros, clip_coef=0.2
            )


@pytest.mark.parametrize("a", [5, 64])
def test_an_empty_batch_of_logits_or_means_gives_zeros(a):
    logits, values = torch.zeros(0, a, requires_grad=True), torch.zeros(0, requires_grad=True)
    none = torch.zeros(0)
    options = {"values": values, "returns": none, "norm_adv": True, "ent_coef": 0.1}
    for result in (
        ppo_loss_from_logits(logits, none.long(), none, none, clip_coef=0.2, **options),
        ppo_loss_from_gaussian(
            logits, torch.zeros(a), torch.zeros(0, a), none, none, clip_coef=0.2, **options
        ),
    ):
        result.loss.backward()
        assert result.loss == 0
        assert result.stats.tolist() == [0.0] * len(PPO_STATS)
        assert logits.grad.shape == (0, a)


def test_leading_dimensions_and_strides_of_logits_are_free():
    rows, logits, actions = categorical(12, 5)
    options = {"clip_coef": 0.2, "ent_coef": 0.1}
    (flat,) = leaves(logits)
    expected = ppo_loss_from_logits(flat, actions, **rows, **options)
    expected.loss.backward()
    (wide,) = leaves(torch.cat([logits, logits], 1).view(3, 4, 10))
    grid = {name: row.view(3, 4) for name, row in rows.items()}
    got = ppo_loss_from_logits(wide[..., :5], actions.view(3, 4), **grid, **options)
    got.loss.backward()
    assert torch.equal(got.stats, expected.stats)
    assert torch.equal(wide.grad[..., :5].reshape(12, 5), flat.grad)


@pytest.mark.parametrize("a", [7, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_err_no_more_than_eager_torch(dtype, a):
    rows, logits, actions = categorical(200, a, torch.float32)
    low = logits.to(dtype)
    options = {"ent_coef": 0.1}

    def eager(x):
        policy = Categorical(logits=x)
        r = {**rows, "log_probs": policy.log_prob(actions), "entropy": policy.entropy()}
        return autograd_oracle({k: v.to(x.dtype) for k, v in r.items()}, **options)

    def gradient(function, x):
        (x,) = leaves(x)
        function(x).backward()
        return x.grad.double()

    truth = gradient(eager, low.double())
    theirs = (gradient(eager, low) - truth).abs().max()
    ours = gradient(
        lambda x: ppo_loss_from_logits(x, actions, clip_coef=0.2, **rows, **options).loss, low
    )
    assert (ours - truth).abs().max() <= 2 * theirs + 1e-6


# --- Gaussian ------------------------------------------------------------------------------------


def gaussian(m=30, a=3, dtype=F64, seed=0, per_row=False):
    g = torch.Generator().manual_seed(seed)
    rows = batch(m, dtype, seed)
    del rows["log_probs"], rows["entropy"]
    mean = torch.randn(m, a, generator=g, dtype=F64)
    log_std = 0.3 * torch.randn(*((m, a) if per_row else (a,)), generator=g, dtype=F64) - 0.2
    actions = mean + log_std.exp() * torch.randn(m, a, generator=g, dtype=F64)
    taken = Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    rows["old_log_probs"] = taken + 0.4 * torch.randn(m, generator=g, dtype=F64)
    rows["ref_log_probs"] = taken + 0.4 * torch.randn(m, generator=g, dtype=F64)
    head = {"mean": mean, "log_std": log_std, "actions": actions}
    return {k: v.to(dtype) for k, v in rows.items()}, {k: v.to(dtype) for k, v in head.items()}


@every_option
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("squash", [False, True])
def test_gaussian_matches_autograd_through_torch_distributions(names, options, per_row, squash):
    names, options = without_entropy(names, options)
    rows, head = gaussian(per_row=per_row)
    if squash:
        jacobian = (1 - head["actions"].tanh() ** 2).log().sum(-1)
        rows["old_log_probs"] = rows["old_log_probs"] - jacobian
        rows["ref_log_probs"] = rows["ref_log_probs"] - jacobian
    rows = {**head, **{name: rows[name] for name in names}}
    keep = torch.arange(30) % 4 != 1

    def oracle(r, mask):
        r = dict(r)
        policy = Normal(r.pop("mean"), r.pop("log_std").exp())
        u = r.pop("actions")
        log_probs = policy.log_prob(u).sum(-1)
        entropy = policy.entropy().sum(-1).expand(30)
        if squash:
            log_probs = log_probs - (1 - u.tanh() ** 2).log().sum(-1)
            entropy = -log_probs
        return autograd_oracle({**r, "log_probs": log_probs, "entropy": entropy}, mask, **options)

    wanted = [name for name in ("mean", "log_std", "values") if name in rows]
    for mask in (None, keep):
        compare(
            lambda r, m=mask: (
                ppo_loss_from_gaussian(clip_coef=0.2, squash=squash, mask=m, **r, **options).loss
            ),
            lambda r, m=mask: oracle(r, m),
            rows,
            wanted,
            rtol=1e-9,
            atol=1e-13,
        )


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("squash", [False, True])
def test_gaussian_passes_gradcheck(per_row, squash):
    rows, head = gaussian(6, per_row=per_row)
    options = {"clip_coef": 0.2, "dual_clip": 2.0, "vf_clip_coef": 0.2, "ent_coef": 0.1,
               "kl_coef": 0.1, "old_kl_coef": 0.1, "squash": squash}  # fmt: skip
    values = rows.pop("values")
    assert gradcheck(
        lambda mean, log_std, v: (
            ppo_loss_from_gaussian(mean, log_std, head["actions"], values=v, **rows, **options).loss
        ),
        leaves(head["mean"], head["log_std"], values),
    )


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("squash", [False, True])
def test_masked_rows_of_a_gaussian_are_never_read(per_row, squash):
    rows, head = gaussian(20, per_row=per_row)
    keep = torch.arange(20) % 3 != 0

    def poison(x):
        return x.masked_fill(~keep.view(-1, *[1] * (x.ndim - 1)), math.nan)

    bad = {name: poison(row) for name, row in rows.items()}
    bad_head = {k: x if x.ndim == 1 else poison(x) for k, x in head.items()}
    options = {"clip_coef": 0.2, "ent_coef": 0.1, "norm_adv": True, "squash": squash}
    mean, log_std, u, s = leaves(
        bad_head["mean"], bad_head["log_std"], head["mean"], head["log_std"]
    )
    got = ppo_loss_from_gaussian(mean, log_std, bad_head["actions"], mask=keep, **bad, **options)
    got.loss.backward()
    clean = {name: row[keep] for name, row in rows.items()}
    expected = ppo_loss_from_gaussian(
        u[keep], s[keep] if per_row else s, head["actions"][keep], **clean, **options
    )
    expected.loss.backward()
    torch.testing.assert_close(got.stats, expected.stats)
    torch.testing.assert_close(mean.grad, u.grad)
    torch.testing.assert_close(log_std.grad, s.grad)


def test_a_squashed_gaussian_survives_saturated_actions():
    u = torch.tensor([[20.0], [-50.0], [1e4]])
    mean = torch.zeros(3, 1, requires_grad=True)
    result = ppo_loss_from_gaussian(
        mean, torch.zeros(1), u, torch.zeros(3), torch.ones(3), clip_coef=0.2, squash=True
    )
    result.loss.backward()
    assert result.stats.isfinite().all()
    assert mean.grad.isfinite().all()


def test_gaussian_takes_leading_dimensions_and_bf16():
    rows, head = gaussian(12, dtype=torch.bfloat16)
    grid = {name: row.view(3, 4) for name, row in rows.items()}
    mean, log_std = leaves(head["mean"].view(3, 4, 3), head["log_std"])
    result = ppo_loss_from_gaussian(
        mean, log_std, head["actions"].view(3, 4, 3), **grid, clip_coef=0.2
    )
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert mean.grad.shape == mean.shape
    assert mean.grad.dtype == log_std.grad.dtype == torch.bfloat16


# --- Peers' formulas, float32 --------------------------------------------------------------------


def cleanrl(policy, actions, r, clip_coef, ent_coef, vf_coef):
    """ppo.py of CleanRL: advantage normalisation, clipped value loss, three diagnostics."""
    log_ratio = policy.log_prob(actions) - r["old_log_probs"]
    ratio = log_ratio.exp()
    diagnostics = {
        "old_approx_kl": (-log_ratio).mean(),
        "approx_kl": ((ratio - 1) - log_ratio).mean(),
        "clip_fraction": ((ratio - 1.0).abs() > clip_coef).float().mean(),
    }
    a = r["advantages"]
    a = (a - a.mean()) / (a.std() + 1e-8)
    pg_loss = torch.max(-a * ratio, -a * torch.clamp(ratio, 1 - clip_coef, 1 + clip_coef)).mean()
    unclipped = (r["values"] - r["returns"]) ** 2
    near = r["old_values"] + torch.clamp(r["values"] - r["old_values"], -clip_coef, clip_coef)
    v_loss = 0.5 * torch.max(unclipped, (near - r["returns"]) ** 2).mean()
    loss = pg_loss - ent_coef * policy.entropy().mean() + v_loss * vf_coef
    return loss, diagnostics


def sb3(policy, actions, r, clip_range, ent_coef, vf_coef):
    """PPO.train of Stable-Baselines3 with clip_range_vf: mean squared error, no one half."""
    a = r["advantages"]
    a = (a - a.mean()) / (a.std() + 1e-8)
    log_prob = policy.log_prob(actions)
    ratio = torch.exp(log_prob - r["old_log_probs"])
    policy_loss = -torch.min(
        a * ratio, a * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    ).mean()
    pred = r["old_values"] + torch.clamp(r["values"] - r["old_values"], -clip_range, clip_range)
    value_loss = torch.nn.functional.mse_loss(r["returns"], pred)
    entropy_loss = -torch.mean(policy.entropy())
    diagnostics = {
        "approx_kl": torch.mean((torch.exp(log_prob - r["old_log_probs"]) - 1)
                                - (log_prob - r["old_log_probs"])),
        "clip_fraction": torch.mean((torch.abs(ratio - 1) > clip_range).float()),
    }  # fmt: skip
    return policy_loss + ent_coef * entropy_loss + vf_coef * value_loss, diagnostics


@pytest.mark.parametrize("peer", ["cleanrl", "sb3"])
def test_equals_the_peers_formula_in_float32(peer):
    rows, logits, actions = categorical(256, 4, torch.float32, seed=7)
    del rows["weights"], rows["ref_log_probs"]
    x, v, y, u = leaves(logits, rows["values"], logits, rows["values"])
    theirs = {**rows, "values": u}
    if peer == "cleanrl":
        loss, diagnostics = cleanrl(Categorical(logits=y), actions, theirs, 0.2, 0.01, 0.5)
        options = {"vf_coef": 0.5, "vf_clip": "max"}
    else:
        loss, diagnostics = sb3(Categorical(logits=y), actions, theirs, 0.2, 0.01, 0.5)
        options = {"vf_coef": 1.0, "vf_clip": "clipped"}
    loss.backward()
    rows["values"] = v
    got = ppo_loss_from_logits(
        x, actions, clip_coef=0.2, ent_coef=0.01, vf_clip_coef=0.2, norm_adv=True, **rows, **options
    )
    got.loss.backward()
    torch.testing.assert_close(got.loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(v.grad, u.grad, rtol=1e-5, atol=1e-9)
    for name, value in diagnostics.items():
        torch.testing.assert_close(getattr(got, name), value, rtol=1e-4, atol=1e-6)


def test_equals_torchrls_formula_in_float32():
    # ClipPPOLoss, loss_critic_type="l2", sota implementations' critic_coeff 0.25, clip_value.
    rows, logits, actions = categorical(256, 4, torch.float32, seed=8)
    x, v, y, u = leaves(logits, rows["values"], logits, rows["values"])
    policy = Categorical(logits=y)
    log_weight = policy.log_prob(actions) - rows["old_log_probs"]
    clipped = log_weight.clamp(math.log1p(-0.2), math.log1p(0.2))
    a = rows["advantages"]
    gain = torch.stack([log_weight.exp() * a, clipped.exp() * a], -1).min(dim=-1).values
    critic = torch.max(
        (rows["returns"] - u) ** 2,
        (rows["returns"] - (rows["old_values"] + (u - rows["old_values"]).clamp(-0.2, 0.2))) ** 2,
    )
    loss = -gain.mean() - 0.01 * policy.entropy().mean() + 0.25 * critic.mean()
    loss.backward()
    del rows["weights"], rows["ref_log_probs"]
    got = ppo_loss_from_logits(
        x, actions, clip_coef=0.2, ent_coef=0.01, vf_coef=0.5, vf_clip_coef=0.2,
        **{**rows, "values": v},
    )  # fmt: skip
    got.loss.backward()
    torch.testing.assert_close(got.loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(v.grad, u.grad, rtol=1e-5, atol=1e-9)


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [4, 64])
def test_traces_without_a_graph_break(a):
    rows, logits, actions = categorical(16, a, torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x, v):
        return ppo_loss_from_logits(
            x, actions, clip_coef=0.2, ent_coef=0.01, vf_clip_coef=0.2, **{**rows, "values": v}
        ).loss

    x, v, y, u = leaves(logits, rows["values"], logits, rows["values"])
    step(x, v).backward()
    ppo_loss_from_logits(
        y, actions, clip_coef=0.2, ent_coef=0.01, vf_clip_coef=0.2, **{**rows, "values": u}
    ).loss.backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(v.grad, u.grad)


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_log_probs": torch.zeros(4, 1)}, r"old_log_probs is \[4, 1\]; expected \[4\]"),
        ({"values": torch.zeros(4, 1), "returns": torch.zeros(4)}, r"values is \[4, 1\]"),
        ({"values": torch.zeros(4)}, "values is given but returns is None"),
        ({"returns": torch.zeros(4)}, "returns is given but values is None"),
        (
            {"values": torch.zeros(4), "returns": torch.zeros(4), "vf_clip_coef": 0.2},
            "vf_clip_coef is given but old_values is None",
        ),
        ({"ent_coef": 0.1}, "ent_coef is given but entropy is None"),
        ({"kl_coef": 0.1}, "kl_coef is given but ref_log_probs is None"),
        ({"kl_coef": torch.tensor(0.1)}, "kl_coef is given but ref_log_probs is None"),
        ({"vf_clip": "min"}, "vf_clip is 'min'"),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'"),
        ({"clip_coef": -0.2}, "clip_coef is -0.2"),
        ({"clip_coef": math.nan}, "clip_coef is nan"),
        ({"clip_coef_high": -0.2}, "clip_coef_high is -0.2"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0"),
        ({"mask": torch.ones(4)}, "mask is torch.float32; expected torch.bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask is \[3\]"),
        ({"entropy": torch.ones(1)}, r"entropy is \[1\]"),
        ({"advantages": torch.ones(4, requires_grad=True)}, "advantages requires a gradient"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {
        "log_probs": torch.zeros(4),
        "old_log_probs": torch.zeros(4),
        "advantages": torch.zeros(4),
        "clip_coef": 0.2,
    }
    with pytest.raises(ValueError, match=f"ppo_loss: {message}"):
        ppo_loss(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": torch.zeros(4)}, "actions is torch.float32; expected integers"),
        ({"actions": torch.zeros(4, 1, dtype=torch.int64)}, r"actions is \[4, 1\]"),
        ({"head_sizes": (2, 1)}, r"actions is \[4\]; expected \[4, 2\]"),
        (
            {"head_sizes": (2, 2), "actions": torch.zeros(4, 2, dtype=torch.int64)},
            r"head_sizes is \(2, 2\)",
        ),
        ({"action_mask": torch.ones(4, 3)}, r"action_mask is \[4, 3\] torch.float32"),
        ({"action_mask": torch.ones(4, dtype=torch.bool)}, r"action_mask is \[4\]"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, "logits are torch.int64"),
        ({"ref_log_probs": torch.zeros(4, 3)}, r"ref_log_probs is \[4, 3\]"),
    ],
)
def test_bad_categorical_arguments_are_refused(change, message):
    arguments = {
        "logits": torch.zeros(4, 3),
        "actions": torch.zeros(4, dtype=torch.int64),
        "old_log_probs": torch.zeros(4),
        "advantages": torch.zeros(4),
        "clip_coef": 0.2,
    }
    with pytest.raises(ValueError, match=f"ppo_loss_from_logits: {message}"):
        ppo_loss_from_logits(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": torch.zeros(4)}, r"actions is \[4\]; expected the shape of mean, \[4, 3\]"),
        ({"log_std": torch.zeros(4)}, r"log_std is \[4\]; expected \[3\]"),
        ({"log_std": torch.zeros(1)}, r"log_std is \[1\]; expected \[3\]"),
    ],
)
def test_bad_gaussian_arguments_are_refused(change, message):
    arguments = {
        "mean": torch.zeros(4, 3),
        "log_std": torch.zeros(3),
        "actions": torch.zeros(4, 3),
        "old_log_probs": torch.zeros(4),
        "advantages": torch.zeros(4),
        "clip_coef": 0.2,
    }
    with pytest.raises(ValueError, match=f"ppo_loss_from_gaussian: {message}"):
        ppo_loss_from_gaussian(**{**arguments, **change})


@pytest.mark.parametrize("masked", [False, True])
def test_moments_of_the_whole_batch_whiten_a_minibatch(masked):
    rows = pick(batch())
    keep = torch.arange(64) % 3 > 0 if masked else None
    advantages = rows["advantages"] * 3 + 5
    used = advantages[keep] if masked else advantages
    moments = torch.stack(
        (torch.tensor(float(used.numel())), used.mean(), used.var() * (used.numel() - 1))
    )
    whitened = (advantages - used.mean()) / (used.std() + 1e-8)
    rows.pop("advantages")
    got = ppo_loss(
        advantages=advantages, advantage_moments=moments, mask=keep, clip_coef=0.2, **rows
    )
    expected = ppo_loss(advantages=whitened, mask=keep, clip_coef=0.2, **rows)
    torch.testing.assert_close(got, expected)
    whole = ppo_loss(advantages=advantages, norm_adv=True, mask=keep, clip_coef=0.2, **rows)
    torch.testing.assert_close(got, whole)


def test_moments_of_one_advantage_leave_it():
    rows = pick(batch(m=1))
    moments = torch.tensor([1.0, 3.0, 0.0])
    got = ppo_loss(advantage_moments=moments, clip_coef=0.2, **rows)
    torch.testing.assert_close(got, ppo_loss(clip_coef=0.2, **rows))


def test_misshapen_moments_are_named():
    with pytest.raises(ValueError, match=r"advantage_moments is \[2\]; expected \[3\]"):
        ppo_loss(advantage_moments=torch.zeros(2), clip_coef=0.2, **pick(batch()))


def test_the_loss_may_be_divided_in_place():
    rows = pick(batch())
    rows["log_probs"].requires_grad_()
    loss = ppo_loss(clip_coef=0.2, **rows).loss
    loss /= 4
    loss.backward()
    assert rows["log_probs"].grad.any()


def test_an_infinite_value_clip_clips_nothing():
    rows = pick(batch(), "values", "returns", "old_values")
    expected = ppo_loss(clip_coef=0.2, **rows)
    torch.testing.assert_close(ppo_loss(clip_coef=0.2, vf_clip_coef=math.inf, **rows), expected)


@pytest.mark.parametrize("name", ["clip_coef", "ent_coef", "vf_coef", "normalizer"])
def test_a_coefficient_per_row_is_refused(name):
    options = {"clip_coef": 0.2, name: torch.full((64,), 0.1)}
    with pytest.raises(ValueError, match=rf"{name} is a tensor of shape \[64\]; expected a number"):
        ppo_loss(**options, **pick(batch(), "entropy"))
