"""`layerwise_loss_and_grads` against float64 autograd over plain torch, and against rounding."""

import inspect
import math

import pytest
import torch
from calls import assert_agrees
from cases_layerwise import (
    CASES,
    EVERYTHING,
    LOCOMOTION,
    NAMES,
    PYRAMID,
    SPECS,
    call_of,
    evaluate,
    large,
    layers_of,
    rollout,
)
from torch.nn import functional as F

from ppo_fast.device_errors import raise_device_errors
from ppo_fast.dispatch import backend
from ppo_fast.functional.actor_critic import ActorCriticWorkspace, actor_critic_loss_and_grads
from ppo_fast.kernels import _layer_plan as plans
from ppo_fast.kernels import _layerwise as file
from ppo_fast.kernels._launch import INTERPRETED, recorded
from ppo_fast.results import ActorCriticSpec

EXACT = 2e-6


def run(given, spec, index=None, **options):
    """`(PPOLoss, gradients)` of the kernels."""
    call = call_of(spec, given, index, **options)
    with backend("triton"):
        result = call.op(*call.args, **call.kwargs)
    return result, call.args[1]


def oracle(given, spec, index=None, linear=F.linear, **o):
    """`(loss, gradients)` in float64 by autograd, from the equations of `ppo_loss`'s docstring."""
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    flat = given.pop("parameters").clone().requires_grad_()
    number = len(given["obs"])
    chosen = torch.arange(number) if index is None else index.long()
    chosen = chosen[given.pop("mask", torch.ones(number, dtype=torch.bool))[chosen]]
    rows = {k: v[chosen] for k, v in given.items()}
    found = evaluate(flat, spec, rows, linear)
    advantages = rows["advantages"]
    if o.get("norm_adv"):
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    low = o.get("clip_coef", 0.2)
    high = o.get("clip_coef_high", low)
    ratio = (found.log_probs - rows["old_log_probs"]).exp()
    gain = torch.min(advantages * ratio, advantages * ratio.clamp(1 - low, 1 + high))
    if "dual_clip" in o:
        least = torch.where(advantages < 0, o["dual_clip"] * advantages, -math.inf)
        gain = torch.max(gain, least)
    value_loss = (found.values - rows["returns"]).square()
    if "vf_clip_coef" in o:
        moved = (found.values - rows["old_values"]).clamp(-o["vf_clip_coef"], o["vf_clip_coef"])
        clipped = (rows["old_values"] + moved - rows["returns"]).square()
        only = o.get("vf_clip", "max") == "clipped"
        value_loss = clipped if only else torch.max(value_loss, clipped)
    terms = -gain + o.get("vf_coef", 0.5) * 0.5 * value_loss
    terms = terms - o.get("ent_coef", 0.0) * found.entropy
    terms = terms + o.get("old_kl_coef", 0.0) * (ratio - 1 - ratio.log())
    terms = terms * rows.get("weights", 1.0)
    loss = terms.sum() / o.get("normalizer", len(chosen))
    loss.backward()
    return loss.detach(), flat.grad


def assert_exact(given, spec, index=None, **options):
    result, found = run(given, spec, index, **options)
    loss, expected = oracle(given, spec, index, **options)
    assert float(result.loss) == pytest.approx(float(loss), rel=EXACT, abs=EXACT)
    for own, true in zip(parts_of(found, spec), parts_of(expected, spec), strict=True):
        # A small part may be what is left of large ones.
        scale = float(true.norm()) + 0.25 * float(expected.norm())
        assert float((own.double() - true).norm()) <= EXACT * scale, true.shape
    return result, found


def parts_of(flat, spec):
    log_std, *nets = layers_of(flat, spec)
    tensors = [tensor for net in nets for layer in net for tensor in layer]
    return tensors if log_std is None else [log_std, *tensors]


def worst(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_the_reference(name):
    if "blocks" not in name:  # those take long, and are held against float64 below
        assert_agrees(CASES[name]())


@pytest.mark.parametrize("name", SPECS)
def test_it_is_the_gradient_of_the_loss(name):
    spec = SPECS[name]
    given = rollout(spec, 40, masked=True)
    index = torch.randint(40, (60,), dtype=torch.int32)
    assert_exact(given, spec, index, **EVERYTHING)


@pytest.mark.parametrize(
    ("D", "width", "M"),
    [(1, 16, 1), (5, 48, 31), (60, 100, 65), (130, 128, 31), (60, 256, 65), (5, 16, 300)],
)
def test_odd_shapes(D, width, M):
    for spec in (
        ActorCriticSpec(D, (), (width, 16), (width, 16), 3, "tanh", (3,)),
        ActorCriticSpec(D, (width,), (), (16,), 2, "elu", None),
    ):
        given = rollout(spec, 37)
        index = torch.randint(37, (M,))
        assert_exact(given, spec, index, vf_clip_coef=0.1, ent_coef=0.01)


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
def test_activations(activation):
    spec = SPECS["discrete"]._replace(activation=activation)
    given = rollout(spec, 33)
    given["parameters"] *= 2  # into saturation
    assert_exact(given, spec)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vf_clip_coef": 0.1, "vf_clip": "clipped"},
        {"clip_coef": 0.05, "dual_clip": 1.1},
        {"ent_coef": 0.5, "normalizer": 7.0},
        {"old_kl_coef": 1.0, "vf_coef": 0.0},
    ],
)
@pytest.mark.parametrize("name", ["discrete", "trunk, critic's own"])
def test_options(name, options):
    assert_exact(rollout(SPECS[name], 50), SPECS[name], **options)


def test_tied_value_losses_belong_to_the_unclipped_one():
    spec = SPECS["discrete"]
    given = rollout(spec, 64)
    given["old_values"] = given["old_values"] + 1000.0
    given["returns"] = given["returns"] + 1000.0
    given["parameters"][-1] += 1000.0  # the critic's last bias
    result, found = run(given, spec, vf_clip_coef=5.0)
    _, plain = run(given, spec)
    assert float(result.value_clip_fraction) == 0
    assert torch.equal(found, plain)


def test_blocks_of_rows_are_added_up(monkeypatch):
    spec = SPECS["multi-discrete"]
    for M, most, programs in ((256, 1, 8), (129, 1, 12), (300, 1 << 20, 7)):
        # Of one block and of several, whose splits are equal and are not.
        monkeypatch.setattr(plans, "BLOCK_BYTES", most)
        monkeypatch.setattr(plans, "FEWEST_ROWS", 128)
        monkeypatch.setattr(plans, "PROGRAMS", programs)
        plans.plan_of.cache_clear()
        given = rollout(spec, 90, masked=True)
        index = torch.randint(90, (M,))
        with recorded() as launches:
            run(given, spec, index, **EVERYTHING)
        losses = [x for x in launches if x.kernel.__name__ == "categorical_loss_kernel"]
        assert len(losses) == (-(-M // 128) if most == 1 else 1)
        assert_exact(given, spec, index, **EVERYTHING)
    monkeypatch.undo()
    plans.plan_of.cache_clear()


def test_blocks_share_the_moments_of_log_std(monkeypatch):
    monkeypatch.setattr(plans, "BLOCK_BYTES", 1)
    monkeypatch.setattr(plans, "FEWEST_ROWS", 128)
    plans.plan_of.cache_clear()
    spec = SPECS["squashed"]
    given = rollout(spec, 280)
    assert_exact(given, spec, norm_adv=True, ent_coef=0.1)
    monkeypatch.undo()
    plans.plan_of.cache_clear()


def test_the_same_bits_every_time():
    spec = SPECS["unequal"]
    given = rollout(spec, 140)
    first, gradient = run(given, spec, norm_adv=True)
    for _ in range(3):
        again, found = run(given, spec, norm_adv=True)
        assert torch.equal(again.stats, first.stats)
        assert torch.equal(found, gradient)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_takes_rows_as_often_as_it_names_them(dtype):
    spec = SPECS["multi-discrete"]
    given = rollout(spec, 40, masked=True)
    index = torch.tensor([7, 0, 7, 39, 12, 7, 3], dtype=dtype)
    result, found = assert_exact(given, spec, index, **EVERYTHING)
    own = {k: v if k == "parameters" else v[index.long()] for k, v in given.items()}
    same, expected = run(own, spec, **EVERYTHING)
    assert torch.equal(found, expected)
    assert torch.equal(result.stats, same.stats)


def test_an_index_out_of_range_is_noted():
    spec = SPECS["discrete"]
    given = rollout(spec, 10)
    raise_device_errors()
    for wrong in (10, -1):
        result, _ = run(given, spec, torch.tensor([1, wrong, 3]))
        assert math.isnan(float(result.loss))
        with pytest.raises(IndexError, match="index lies outside"):
            raise_device_errors()


@pytest.mark.parametrize("indexed", [False, True])
def test_what_is_masked_is_never_read(indexed):
    spec = SPECS["gaussian"]._replace(obs_size=5)
    given = rollout(spec, 40, masked=True)
    index = torch.randint(40, (50,)) if indexed else None
    result, expected = run(given, spec, index, **EVERYTHING)
    for name in NAMES:
        given[name] = given[name].clone()
        given[name][~given["mask"]] = math.nan
    again, found = run(given, spec, index, **EVERYTHING)
    assert torch.equal(again.stats, result.stats)
    assert torch.equal(found, expected)


def test_rows_apart_and_transposed():
    spec = SPECS["gaussian"]._replace(obs_size=7)
    given = rollout(spec, 30)
    _, expected = run(given, spec)
    wide = torch.randn(30, 20)
    wide[:, 3:10] = given["obs"]
    given["obs"] = wide[:, 3:10]
    given["actions"] = given["actions"].t().contiguous().t()
    for name in NAMES[2:]:
        given[name] = torch.stack((given[name], given[name]), 1)[:, 0]
    _, found = run(given, spec)
    assert torch.equal(found, expected)
    _, found = run(given, spec, torch.arange(30))
    assert torch.equal(found, expected)


def test_no_rows_and_no_row_left():
    spec = SPECS["trunk, own layers"]
    result, found = run(rollout(spec, 0), spec)
    assert not found.any()
    assert float(result.loss) == 0
    given = rollout(spec, 40)
    given["mask"] = torch.zeros(40, dtype=torch.bool)
    result, found = run(given, spec, norm_adv=True)
    assert not found.any()
    assert float(result.count) == 0


def test_numbers_may_be_tensors():
    spec = SPECS["trunk, critic's own"]
    given = rollout(spec, 40)
    options = {"clip_coef": 0.2, **EVERYTHING}
    numbers, expected = run(given, spec, **options)
    as_tensors = {k: torch.tensor(v) if isinstance(v, float) else v for k, v in options.items()}
    result, found = run(given, spec, **as_tensors)
    torch.testing.assert_close(result.stats, numbers.stats, rtol=1e-6, atol=1e-6)
    assert worst(found, expected.double()) < 1e-6


def test_the_workspace_gets_the_sums_of_squares():
    spec = SPECS["unequal"]
    given = rollout(spec, 40)
    flat, gradients = given["parameters"], torch.empty_like(given["parameters"])
    workspace = ActorCriticWorkspace(flat, gradients, spec)
    rows = [given[name] for name in NAMES]
    file.layerwise_loss_and_grads(flat, gradients, spec, *rows, clip_coef=0.2, workspace=workspace)
    assert float(workspace.square_sums.sum()) == pytest.approx(
        float(gradients.double().square().sum()), rel=1e-6
    )


def test_its_arguments_are_those_of_the_op():
    ours = inspect.signature(file.layerwise_loss_and_grads).parameters.values()
    theirs = inspect.signature(actor_critic_loss_and_grads.reference).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]


def cast(x, dtype):
    """x in `dtype`, in float64 again."""
    if INTERPRETED and dtype == torch.bfloat16:
        # The interpreter cuts the digits off.
        return (x.float().view(torch.int32) & -0x10000).view(torch.float32).double()
    return x.to(dtype).double()


class Rounded(torch.autograd.Function):
    """x, and on the way back its gradient times n, rounded to `dtype`."""

    @staticmethod
    def forward(ctx, x, dtype, n):
        ctx.dtype, ctx.n = dtype, n
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return cast(gradient * ctx.n, ctx.dtype) / ctx.n, None, None


def emulated(dtype, n):
    """A linear layer whose products take operands of `dtype`, in float64 but for that."""

    def rounded(x):
        return x + (cast(x.detach(), dtype) - x.detach())

    def linear(x, weight, bias):
        return Rounded.apply(rounded(x) @ rounded(weight).t(), dtype, n) + bias

    return linear


def without_flips(given, spec):
    """The rows whose ratio and value are not near an edge of a clip range."""
    rows = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    found = evaluate(rows.pop("parameters"), spec, rows)
    ratio = (found.log_probs - rows["old_log_probs"]).exp()
    moved = (found.values - rows["old_values"]).abs()
    return (
        ((ratio - 0.8).abs() > 0.03) & ((ratio - 1.2).abs() > 0.03) & ((moved - 0.1).abs() > 0.03)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["discrete", "gaussian", "squashed", "wide outputs"])
def test_16_bit_products_are_as_exact_as_rounded_operands(name, dtype):
    spec = SPECS[name]
    given = rollout(spec, 120)
    given["mask"] = without_flips(given, spec)
    options = {"vf_clip_coef": 0.1, "ent_coef": 0.02}
    n = float(given["mask"].sum())
    result, found = run(given, spec, matmul_dtype=dtype, **options)
    _, expected = oracle(given, spec, **options)
    loss, rounded = oracle(given, spec, linear=emulated(dtype, n), **options)
    error = worst(rounded, expected)
    assert 1e-5 < error < 0.5
    # A GPU's approximate tanh is off by half the last place of a float16 besides.
    assert worst(found, expected) <= (1.25 if INTERPRETED else 2) * error
    assert worst(found, rounded) <= (0.5 if INTERPRETED else 2) * error
    assert float(result.loss) == pytest.approx(float(loss), abs=1e-5 if INTERPRETED else 1e-3)


def test_small_gradients_do_not_vanish_in_16_bits():
    spec = SPECS["discrete"]
    given = rollout(spec, 60)
    _, expected = run(given, spec, matmul_dtype=torch.float16, normalizer=1.0)
    _, found = run(given, spec, matmul_dtype=torch.float16, normalizer=1e9)
    assert worst(found * 1e9, expected.double()) < 1e-6


def test_large_gradients_stay_finite_in_16_bits():
    spec = SPECS["discrete"]
    given = rollout(spec, 60)
    given["returns"] = given["returns"] * 1e6
    given["advantages"] = given["advantages"] * 1e6
    for dtype, is_held in ((torch.float16, True), (torch.bfloat16, False)):
        _, found = run(given, spec, matmul_dtype=dtype)
        _, expected = oracle(given, spec)
        assert found.isfinite().all()
        assert (worst(found, expected) > 0.1) is is_held


def test_a_nan_is_seen():
    spec = SPECS["discrete"]
    given = rollout(spec, 60)
    given["obs"][3, 2] = math.nan
    for dtype in (None, torch.float16):
        result, found = run(given, spec, matmul_dtype=dtype)
        assert math.isnan(float(result.loss))
        assert found.isnan().any()


def test_float32_products_follow_torchs_switch(monkeypatch):
    call = large(LOCOMOTION._replace(actor_sizes=(64,), critic_sizes=(64,)), 100, None, N=200)
    for is_on in (False, True):
        monkeypatch.setattr(file, "takes_tf32", lambda is_on=is_on: is_on)
        with recorded() as launches:
            call.op.kernel(*call.args, **call.kwargs)
        found = {x.meta["PRECISION"] for x in launches if "PRECISION" in x.meta}
        assert found == {"tf32" if is_on else "ieee"}


def kernels_of(spec, M):
    with torch.device("meta"), recorded() as launches:
        call = large(spec, M, torch.float16)
        call.op.kernel(*call.args, **call.kwargs)
    return [launch.kernel.__name__ for launch in launches]


def test_launches(monkeypatch):
    monkeypatch.setattr(plans, "BLOCK_BYTES", 1 << 25)
    monkeypatch.setattr(plans, "FEWEST_ROWS", 2048)
    plans.plan_of.cache_clear()
    assert kernels_of(LOCOMOTION, 16384) == [
        *("pack_kernel", "gather_kernel"),
        *("layer_forward_kernel",) * 2,
        *("heads_forward_kernel", "gaussian_loss_kernel", "heads_backward_kernel"),
        *("layer_weights_kernel", "layer_backward_kernel", "layer_weights_kernel"),
        "gradients_kernel",
    ]
    assert len(kernels_of(LOCOMOTION, 131072)) == 3 + 8 * 8
    assert len(kernels_of(PYRAMID, 8192)) == 3 + 11
    plans.plan_of.cache_clear()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["half", "small half", "tf32", "ieee"])
def test_every_parameter_has_its_place(name, kind):
    with torch.device("cpu"):
        assert_all_placed(SPECS[name], plans.plan_of(SPECS[name], 1000, kind), kind)


def assert_all_placed(spec, plan, kind):
    flat_of, places = plans.tables_of(spec, plan, torch.device("cpu"))
    found = flat_of[flat_of >= 0].sort().values
    assert torch.equal(found, torch.arange(spec.num_parameters, dtype=torch.int32))
    assert len(flat_of) == plan.packed
    # Each split of each block of parameters reads its own part of the partial sums.
    size = len(flat_of) // len(places)
    read = torch.zeros(plan.partials, dtype=torch.int32)
    for own, (first, step, splits) in zip(flat_of.view(-1, size), places.tolist(), strict=True):
        here = torch.nonzero(own >= 0)[:, 0]
        for split in range(splits):
            read[first + split * step + here] += 1
    assert int(read.max()) == 1
    for layer in (*plan.trunk, *plan.nets[0], *plan.nets[1], *plan.heads):
        tile = plans.weights_tile(layer.out, layer.width, kind)
        assert layer.out % tile.m == 0
        assert layer.width % tile.n == 0
        assert plan.rows % tile.k == 0
        for out, width in ((layer.out, layer.width), (layer.width, layer.out)):
            tile = plans.layer_tile(out, width, kind)
            assert plan.rows % tile.m == 0
            assert out % tile.n == 0
            assert width % tile.k == 0


def test_what_is_too_wide_is_named():
    assert file.beyond_layers(LOCOMOTION) is None
    assert "512 outputs" in file.beyond_layers(LOCOMOTION._replace(num_outputs=512))
    assert "observations" in file.beyond_layers(LOCOMOTION._replace(obs_size=0))
