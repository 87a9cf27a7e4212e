"""The `actor_critic_loss_and_grads` kernels against float64 autograd and against the reference."""

import pytest
import torch
import torch._dynamo
from calls import assert_agrees
from cases_actor_critic import CASES, Networks, made
from torch import nn

from ppo_fast.device_errors import raise_device_errors
from ppo_fast.dispatch import backend
from ppo_fast.functional.actor_critic import ActorCriticWorkspace
from ppo_fast.kernels._launch import recorded
from ppo_fast.kernels._layerwise import layerwise_loss_and_grads
from ppo_fast.results import PPO_STATS

NAMES = ("obs", "actions", "old_log_probs", "advantages", "old_values", "returns")


def outcome(call, name="triton"):
    """Loss, statistics and gradient."""
    with backend(name):
        result = call.op(*call.args, **call.kwargs)
    return result.loss, result.stats, call.args[1].clone()


def exact(call):
    """Loss, statistics and gradient in float64 by autograd over plain modules."""
    flat, _, spec, *rows, index = call.args
    o = call.kwargs
    d = dict(zip(NAMES, rows, strict=True))
    d |= {name: o[name] for name in ("mask", "weights", "action_mask") if name in o}
    if index is not None:
        d = {name: x[index.long()] for name, x in d.items()}
    if "mask" in d:
        keep = d.pop("mask")
        d = {name: x[keep] for name, x in d.items()}
    d = {name: x.double() if x.is_floating_point() else x for name, x in d.items()}
    networks = Networks(spec, flat.double())
    log_probs, entropy, values = networks.evaluate(
        spec, d["obs"], d["actions"], d.get("action_mask")
    )
    A = d["advantages"]
    if o.get("advantage_moments") is not None:
        count, mean, squares = o["advantage_moments"].double()
        A = (A - mean) / ((squares / (count - 1)).sqrt() + 1e-8)
    elif o.get("norm_adv"):
        A = (A - A.mean()) / (A.std() + 1e-8)
    log_ratio = log_probs - d["old_log_probs"]
    ratio = log_ratio.exp()
    low, high = 1 - o["clip_coef"], 1 + o.get("clip_coef_high", o["clip_coef"])
    gain = torch.minimum(A * ratio, A * ratio.clamp(low, high))
    held = torch.zeros_like(A, dtype=torch.bool)
    if "dual_clip" in o:
        held = (A < 0) & (gain < o["dual_clip"] * A)
        gain = torch.where(held, o["dual_clip"] * A, gain)
    squared = (values - d["returns"]).square()
    moved = torch.zeros_like(A, dtype=torch.bool)
    if "vf_clip_coef" in o:
        c = o["vf_clip_coef"]
        moved = (values - d["old_values"]).abs() > c
        near = d["old_values"] + (values - d["old_values"]).clamp(-c, c)
        clipped = (near - d["returns"]).square()
        squared = clipped if o.get("vf_clip") == "clipped" else torch.maximum(squared, clipped)
    kl = ratio - 1 - log_ratio
    w = d.get("weights", torch.ones_like(A))
    n = o.get("normalizer", len(A))
    sums = [w * -gain, w * squared / 2, w * entropy, 0 * A, w * kl, -log_ratio]
    sums += [(ratio < low) | (ratio > high), held, moved, ratio]
    stats = torch.stack([x.sum() / n for x in sums])
    loss = stats[0] + o.get("vf_coef", 0.5) * stats[1] - o.get("ent_coef", 0.0) * stats[2]
    loss = loss + o.get("old_kl_coef", 0.0) * stats[4]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in networks.parameters()])
    last = torch.stack([(ratio - 1).abs().max(), torch.tensor(float(len(A)), device=A.device)])
    return loss.detach(), torch.cat((stats, last)).detach(), gradient


def error(x, y):
    return float((x.double() - y).norm() / y.norm())


def assert_exact(call, limit=2e-6):
    loss, stats, gradient = exact(call)
    assert len(stats) == len(PPO_STATS)
    our_loss, our_stats, ours = outcome(call)
    assert error(ours, gradient) < limit
    torch.testing.assert_close(our_loss.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_stats.double(), stats, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


ORDINARY = [
    *("categorical", "unequal networks", "multi-discrete", "gaussian", "squashed"),
    *("clipped values only", "normalised", "normalised, masked", "normalised by moments"),
    *("normalizer", "everything, masked", "everything, masked, gaussian"),
]


@pytest.mark.parametrize("name", ORDINARY)
def test_loss_statistics_and_gradient_are_those_of_float64(name):
    assert_exact(CASES[name](), limit=4e-6 if "gaussian" in name else 2e-6)


MATRIX = [
    # D, actor, critic, head, rows, activation
    (1, (16,), (16,), (2,), 1, "tanh"),
    (4, (64, 64), (64, 64), (2,), 65, "tanh"),
    (17, (64, 64), (32, 16), 6, 31, "relu"),
    (60, (64, 32), (48, 64), 8, 64, "elu"),
    (4, (48, 48), (48, 48), (8,), 130, "silu"),
    (17, (32, 64, 16), (16, 16, 16), (2,), 64, "elu"),
    (60, (16,), (64,), (32,), 31, "tanh"),
    (1, (64, 48), (48,), 1, 130, "silu"),
    (63, (32,), (32,), (2, 3, 4), 65, "relu"),
    (64, (32,), (16,), 2, 31, "tanh"),
    (15, (16,), (16,), (2,), 64, "tanh"),
    (8, (17, 33), (5,), (3,), 65, "tanh"),
]


@pytest.mark.parametrize(("D", "actor", "critic", "head", "n", "activation"), MATRIX)
def test_any_shape(D, actor, critic, head, n, activation):
    call = made(D, actor, critic, head, n, activation, vf_clip_coef=0.2, ent_coef=0.01)
    with recorded() as launches:
        call.op.kernel(*call.args, **call.kwargs)
    assert launches[0].kernel.__name__ == "actor_critic_step_kernel"
    assert_exact(call)


def test_many_outputs_are_as_exact_as_pytorch():
    call = made(4, (16,), (16,), 32, 65, vf_clip_coef=0.2)
    gradient = exact(call)[2]
    theirs = error(outcome(call, "reference")[2], gradient)
    assert error(outcome(call)[2], gradient) < 2e-6 + 2 * theirs


@pytest.mark.parametrize("name", ["everything, masked", "everything, masked, gaussian", "squashed"])
def test_index_dtype_strides_and_integer_dtypes_do_not_matter(name):
    call = CASES[name]()
    flat, gradients, spec, obs, actions, *rows, index = call.args
    spread = torch.stack([torch.cat((x, x[:3])) for x in rows], 1)[: len(obs)]
    index = torch.arange(len(obs)) if index is None else index
    wide = torch.full((len(obs), 2 * obs.shape[1] + 1), torch.nan)
    wide[:, 1 : 1 + obs.shape[1]] = obs
    if not actions.is_floating_point():
        actions = actions.to(torch.int16)
    others = torch.stack((index, -index), 1)[:, 0]
    args = flat, gradients, spec, wide[:, 1 : 1 + obs.shape[1]], actions, *spread.unbind(1)
    expected = outcome(call)
    for own_index in (others.int(), others):
        found = outcome(call._replace(args=(*args, own_index)))
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
    across = obs.t().contiguous().t()
    found = outcome(call._replace(args=(*args[:3], across, *args[4:], index)))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


def test_what_a_masked_row_holds_is_never_used():
    for name in ("everything, masked", "everything, masked, gaussian"):
        call = CASES[name]()
        flat, gradients, spec, obs, actions, *rows, index = call.args
        expected = outcome(call)
        drop = ~call.kwargs["mask"]
        obs, rows = obs.clone(), [x.masked_fill(drop, torch.nan) for x in rows]
        obs[drop] = torch.nan
        actions = actions.clone()
        actions[drop] = -7 if spec.head_sizes else torch.nan
        weights = call.kwargs["weights"].masked_fill(drop, torch.nan)
        spoilt = call._replace(
            args=(flat, gradients, spec, obs, actions, *rows, index),
            kwargs=call.kwargs | {"weights": weights},
        )
        torch.testing.assert_close(outcome(spoilt), expected, rtol=0, atol=0)
    raise_device_errors()


@pytest.mark.parametrize("spoil", ["obs", "old_log_probs", "advantages", "returns"])
def test_a_nan_in_a_row_shows_in_loss_and_gradient(spoil):
    call = made(4, (16,), (16,), (3,), 20, index_dtype=None)
    call.args[3 + NAMES.index(spoil)][7] = torch.nan
    loss, _, gradient = outcome(call)
    assert loss.isnan() and gradient.isnan().any()


@pytest.mark.parametrize("entry", [-1, 57, 1 << 40])
def test_an_index_out_of_range_is_named_and_makes_the_loss_nan(entry):
    call = made(4, (16,), (16,), (3,), 40)
    call.args[-1][5] = entry
    call = call._replace(args=(*call.args[:-1], call.args[-1].clone()))
    loss, _, gradient = outcome(call)
    assert loss.isnan() and gradient.isnan().any()
    with pytest.raises(IndexError, match=r"an entry of index lies outside \[0, N\)"):
        raise_device_errors()


@pytest.mark.parametrize("action", [-1, 3, 1 << 33])
def test_an_action_out_of_its_head_is_named_and_makes_the_loss_nan(action):
    call = made(4, (16,), (16,), (3, 2), 40, index_dtype=None)
    call.args[4][11, 0] = action
    loss, _, gradient = outcome(call)
    assert loss.isnan() and gradient.isnan().any()
    with pytest.raises(IndexError, match="actor_critic_loss_and_grads: an action lies outside"):
        raise_device_errors()


@pytest.mark.parametrize("norm_adv", [False, True])
def test_no_rows_give_zeros(norm_adv):
    empty = torch.empty(0, dtype=torch.int64)
    for n in (5, 0):
        call = made(4, (16,), (16,), (3,), n, N=n, norm_adv=norm_adv)
        loss, stats, gradient = outcome(call._replace(args=(*call.args[:-1], empty)))
        assert loss == 0.0 and not stats.any() and not gradient.any()


def test_repeated_rows_count_as_often():
    call = made(4, (16,), (16,), (3,), 12, norm_adv=True, ent_coef=0.1)
    index = torch.tensor([3, 3, 3, 0, 7])
    together = outcome(call._replace(args=(*call.args[:-1], index)))
    rows = [x[index] for x in call.args[3:-1]]
    apart = outcome(call._replace(args=(*call.args[:3], *rows, None)))
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-7)


def test_the_same_call_gives_the_same_bits():
    call = CASES["everything, masked"]()
    torch.testing.assert_close(outcome(call), outcome(call), rtol=0, atol=0)


def test_launches():
    for kwargs, names in (
        ({}, []),
        ({"norm_adv": True}, []),
        ({"norm_adv": True, "n": 2049}, ["whitening_kernel"]),
        ({"advantage_moments": torch.tensor([40.0, 0.0, 40.0])}, []),
    ):
        call = made(4, (16,), (16,), (3,), kwargs.pop("n", 40), **kwargs)
        with recorded() as launches:
            call.op.kernel(*call.args, **call.kwargs)
        found = [launch.kernel.__name__ for launch in launches]
        assert found == [*names, "actor_critic_step_kernel", "actor_critic_reduce_kernel"]


def test_the_workspace_is_left_the_sums_of_squares():
    call = CASES["gaussian"]()
    workspace = ActorCriticWorkspace(*call.args[:3])
    gradient = outcome(call._replace(kwargs=call.kwargs | {"workspace": workspace}))[2]
    torch.testing.assert_close(workspace.square_sums.sum().sqrt(), gradient.norm())
    outcome(call._replace(kwargs=call.kwargs | {"workspace": workspace}), "reference")
    assert workspace.square_sums is None


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"D": 65},
        {"actor": (65,)},
        {"actor": (8,) * 4},
        {"critic": ()},
        {"head": 33},
        {"shared": (8,)},
    ],
)
def test_networks_that_do_not_fit_are_worked_on_layer_by_layer(change):
    shape = {"D": 4, "actor": (16,), "critic": (16,), "head": (2,), "n": 4} | change
    shared = shape.pop("shared", ())
    call = made(**shape)
    if shared:
        spec = call.args[2]._replace(shared_sizes=shared)
        flat = torch.zeros(spec.num_parameters)
        call = call._replace(args=(flat, torch.empty_like(flat), spec, *call.args[3:]))
    assert call.op.why_not_kernel(*call.args, **call.kwargs) is None
    with recorded() as launches:
        call.op.kernel(*call.args, **call.kwargs)
    names = {launch.kernel.__name__ for launch in launches}
    assert ("actor_critic_step_kernel" in names) is (change == {})


@pytest.mark.parametrize("name", ["everything, masked", "gaussian"])
def test_both_ways_agree(name):
    call = CASES[name]()
    expected = outcome(call)
    with backend("triton"):
        result = layerwise_loss_and_grads(*call.args, **call.kwargs)
    found = result.loss, result.stats, call.args[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_float64_is_named():
    call = made(4, (16,), (16,), (2,), 4)
    doubles = [x.double() if torch.is_tensor(x) else x for x in call.args]
    assert "float64" in call.op.why_not_kernel(*doubles, **call.kwargs)


def test_a_whole_graph_compiles_and_writes_the_gradient():
    torch._dynamo.reset()
    call = CASES["everything, masked"]()
    expected = outcome(call)
    call.args[1].fill_(torch.nan)
    compiled = torch.compile(call.op, fullgraph=True, backend="aot_eager")
    with backend("triton"):
        result = compiled(*call.args, **call.kwargs)
    found = result.loss, result.stats, call.args[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class RoundedLinear(torch.autograd.Function):
    """A linear layer whose products take operands of 16 bits, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        x, weight = x.to(dtype).double(), weight.to(dtype).double()
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        rounded = g.to(ctx.dtype).double()
        return rounded @ weight, rounded.t() @ x, g.sum(0), None


def rounded_linears(monkeypatch, dtype):
    def linear(layer, x):
        return RoundedLinear.apply(x, layer.weight, layer.bias, dtype)

    monkeypatch.setattr(nn.Linear, "forward", linear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("D", "head", "activation", "squash"),
    [
        (4, (2,), "tanh", False),
        (17, 6, "elu", False),
        (60, 8, "silu", True),
        (8, (3, 2), "relu", False),
    ],
)
def test_16_bit_operands_cost_what_their_rounding_costs(
    D, head, activation, squash, dtype, monkeypatch
):
    call = made(D, (32, 64), (64, 32), head, 130, activation, squash, ent_coef=0.01)
    call.kwargs["normalizer"] = 1.0  # gradients are kept undivided while they are rounded
    # No ratio comes near an edge of the clip range, where rounding would choose the branch.
    with torch.no_grad():
        spec, obs, actions, old = call.args[2:6]
        log_probs = Networks(spec, call.args[0]).evaluate(spec, obs, actions, None)[0]
        old.copy_(
            log_probs + torch.tensor([0.0, 0.05, -0.05, 0.6, -0.6])[torch.arange(len(old)) % 5]
        )
    gradient = exact(call)[2]
    call.kwargs["matmul_dtype"] = dtype
    ours = error(outcome(call)[2], gradient)
    rounded_linears(monkeypatch, dtype)
    rounding = error(exact(call)[2], gradient)
    assert rounding > 1e-5
    assert ours < 2 * rounding


def test_float16_keeps_gradients_whatever_the_number_of_rows():
    call = made(4, (16,), (16,), (2,), 40, matmul_dtype=torch.float16)
    gradient = outcome(call)[2]
    call.kwargs["normalizer"] = 1e9
    torch.testing.assert_close(outcome(call)[2] * 1e9, gradient * 40, rtol=1e-5, atol=0)


def test_a_huge_advantage_does_not_overflow_float16():
    call = made(4, (16,), (16,), (2,), 40, matmul_dtype=torch.float16)
    call.args[6][3] = 1e7
    assert outcome(call)[2].isfinite().all()
    call.args[6][3] = torch.inf
    assert not outcome(call)[2].isfinite().all() or not outcome(call)[0].isfinite()
