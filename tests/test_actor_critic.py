"""`actor_critic_loss_and_grads` against plain formulas and autograd in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from ppo_fast.functional import actor_critic as file
from ppo_fast.functional.actor_critic import (
    ActorCriticWorkspace,
    actor_critic_loss_and_grads,
)
from ppo_fast.results import PPO_STATS, ActorCriticSpec

N, D = 40, 5
ACTIVATIONS = {"tanh": torch.tanh, "relu": F.relu, "elu": F.elu, "silu": F.silu}
OPTIONS = {
    "clip_coef": 0.2,
    "clip_coef_high": 0.3,
    "dual_clip": 2.0,
    "vf_coef": 0.7,
    "vf_clip_coef": 0.1,
    "ent_coef": 0.02,
    "old_kl_coef": 0.1,
    "norm_adv": True,
}
SPECS = {
    "discrete": ActorCriticSpec(D, (), (16, 8), (16, 8), 3, "tanh", (3,)),
    "unequal": ActorCriticSpec(D, (), (8,), (12, 6, 4), 2, "relu", (2,)),
    "linear": ActorCriticSpec(D, (), (), (), 3, "tanh", (3,)),
    "shared": ActorCriticSpec(D, (16, 12), (8,), (), 3, "elu", (3,)),
    "all shared": ActorCriticSpec(D, (16,), (), (), 3, "silu", (3,)),
    "multi": ActorCriticSpec(D, (), (16,), (16,), 6, "silu", (1, 3, 2)),
    "gaussian": ActorCriticSpec(D, (), (16, 8), (16, 8), 3, "tanh", None),
    "squashed": ActorCriticSpec(D, (8,), (16,), (16,), 3, "elu", None, True),
}


def cut(flat, spec):
    """The flat vector as log_std and lists of (weight, bias), read off in order."""
    offset = 0

    def take(*shape):
        nonlocal offset
        start, offset = offset, offset + math.prod(shape)
        return flat[start:offset].view(shape)

    log_std = take(spec.num_outputs) if spec.head_sizes is None else None
    trunk, width = [], spec.obs_size
    for out in spec.shared_sizes:
        trunk.append((take(out, width), take(out)))
        width = out
    nets = []
    for sizes in ((*spec.actor_sizes, spec.num_outputs), (*spec.critic_sizes, 1)):
        layers, size = [], width
        for out in sizes:
            layers.append((take(out, size), take(out)))
            size = out
        nets.append(layers)
    assert offset == flat.numel() == spec.num_parameters
    return log_std, trunk, *nets


def networks(flat, spec, obs):
    log_std, trunk, actor, critic = cut(flat, spec)
    act = ACTIVATIONS[spec.activation]
    for weight, bias in trunk:
        obs = act(F.linear(obs, weight, bias))
    results = []
    for layers in (actor, critic):
        x = obs
        for weight, bias in layers[:-1]:
            x = act(F.linear(x, weight, bias))
        results.append(F.linear(x, *layers[-1]))
    return log_std, results[0], results[1].squeeze(1)


def policy_terms(flat, spec, d):
    log_std, outputs, values = networks(flat, spec, d["obs"])
    if spec.head_sizes is None:
        normal = torch.distributions.Normal(outputs, log_std.exp())
        log_probs = normal.log_prob(d["actions"]).sum(1)
        entropy = normal.entropy().sum(1)
        if spec.squash:
            jacobian = torch.log1p(-(d["actions"].tanh() ** 2)).sum(1)
            log_probs = log_probs - jacobian
            entropy = -log_probs
        return log_probs, entropy, values
    log_probs = entropy = 0.0
    actions = d["actions"].view(len(values), -1)
    masks = d.get("action_mask")
    for head, (logits, mask) in enumerate(
        zip(
            outputs.split(spec.head_sizes, 1),
            [None] * len(spec.head_sizes) if masks is None else masks.split(spec.head_sizes, 1),
            strict=True,
        )
    ):
        if mask is not None:
            logits = logits.masked_fill(~mask, -1e30)
        all_log_probs = logits.log_softmax(1)
        probs = all_log_probs.exp()
        log_probs = log_probs + all_log_probs.gather(1, actions[:, head, None]).squeeze(1)
        entropy = entropy - torch.where(probs > 0, probs * all_log_probs, 0.0).sum(1)
    return log_probs, entropy, values


def oracle(flat, spec, d, o):
    """The loss in float64 by autograd: written from the equations in ppo_loss's docstring."""
    flat = flat.double().requires_grad_()
    d = {k: v.double() if v.is_floating_point() else v for k, v in d.items()}
    keep = d.get("mask", torch.ones(len(d["obs"]), dtype=torch.bool))
    d = {k: v[keep] for k, v in d.items()}
    log_probs, entropy, values = policy_terms(flat, spec, d)
    weights = d.get("weights", torch.ones_like(values))
    advantages = d["advantages"]
    if o.get("norm_adv"):
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = (log_probs - d["old_log_probs"]).exp()
    high = o.get("clip_coef_high") or o["clip_coef"]
    objective = torch.minimum(
        advantages * ratio, advantages * ratio.clamp(1 - o["clip_coef"], 1 + high)
    )
    if o.get("dual_clip"):
        floor = o["dual_clip"] * advantages
        objective = torch.where(advantages < 0, torch.maximum(objective, floor), objective)
    error = values - d["returns"]
    value_loss = error**2
    if o.get("vf_clip_coef"):
        near = d["old_values"] + (values - d["old_values"]).clamp(
            -o["vf_clip_coef"], o["vf_clip_coef"]
        )
        value_loss = torch.maximum(value_loss, (near - d["returns"]) ** 2)
    terms = -objective + o.get("vf_coef", 0.5) * 0.5 * value_loss - o.get("ent_coef", 0) * entropy
    terms = terms + o.get("old_kl_coef", 0) * (ratio - 1 - ratio.log())
    loss = (weights * terms).sum() / o.get("normalizer", len(values))
    (gradient,) = torch.autograd.grad(loss, flat)
    return loss.detach(), gradient


def data(spec, dtype=torch.float32, seed=0, masked=False):
    torch.manual_seed(seed)
    flat = 0.5 * torch.randn(spec.num_parameters)
    d = {"obs": torch.randn(N, D), "advantages": torch.randn(N)}
    if spec.head_sizes is None:
        d["actions"] = torch.randn(N, spec.num_outputs)
    else:
        heads = [torch.randint(size, (N,)) for size in spec.head_sizes]
        d["actions"] = heads[0] if len(heads) == 1 else torch.stack(heads, 1)
    if masked:
        d["mask"] = torch.rand(N) < 0.7
        d["weights"] = torch.rand(N) + 0.5
        if spec.head_sizes is not None:
            legal = torch.rand(N, spec.num_outputs) < 0.6
            taken = d["actions"].view(N, -1)
            start = 0
            for head, size in enumerate(spec.head_sizes):
                legal[torch.arange(N), start + taken[:, head]] = True
                start += size
            d["action_mask"] = legal
    log_probs, _, values = policy_terms(flat, spec, d)
    d["old_log_probs"] = log_probs + 0.3 * torch.randn(N)
    d["old_values"] = values + 0.2 * torch.randn(N)
    d["returns"] = values + torch.randn(N)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in d.items()}
    return flat.to(dtype), cast


def call(flat, spec, d, index=None, gradients=None, **options):
    gradients = torch.full_like(flat, math.nan) if gradients is None else gradients
    names = ("obs", "actions", "old_log_probs", "advantages", "old_values", "returns")
    rows = {k: v for k, v in d.items() if k not in names}
    result = actor_critic_loss_and_grads(
        flat, gradients, spec, *(d[name] for name in names), index, **rows, **options
    )
    return result, gradients


def error(gradient, exact):
    return float((gradient.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_it_is_the_gradient_of_the_loss(name, masked):
    spec = SPECS[name]
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 5e-6)):
        flat, d = data(spec, dtype, masked=masked)
        loss, gradient = oracle(flat, spec, d, OPTIONS)
        result, found = call(flat, spec, d, **OPTIONS)
        assert result.loss.double() == pytest.approx(float(loss), rel=tolerance * 10)
        assert error(found, gradient) < tolerance
        assert not result.loss.requires_grad


@pytest.mark.parametrize("name", ["discrete", "shared", "gaussian"])
def test_few_options(name):
    spec = SPECS[name]
    flat, d = data(spec)
    loss, gradient = oracle(flat, spec, d, {"clip_coef": 0.2})
    result, found = call(flat, spec, d, clip_coef=0.2)
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-5)
    assert error(found, gradient) < 3e-6


@pytest.mark.parametrize("name", ["shared", "multi", "gaussian"])
def test_blocks_of_rows_change_nothing(name, monkeypatch):
    spec = SPECS[name]
    flat, d = data(spec, torch.float64, masked=True)
    whole, gradient = call(flat, spec, d, **OPTIONS)
    monkeypatch.setattr(file, "BLOCK_ROWS", 16)  # 16 + 16 + 8
    parts, found = call(flat, spec, d, **OPTIONS)
    torch.testing.assert_close(parts.stats, whole.stats, rtol=1e-12, atol=1e-12)
    assert error(found, gradient) < 1e-12


@pytest.mark.parametrize("name", ["discrete", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_takes_rows_as_often_as_it_names_them(name, dtype):
    spec = SPECS[name]
    flat, d = data(spec, torch.float64, masked=True)
    index = torch.tensor([7, 0, 7, 39, 12, 7, 3], dtype=dtype)
    loss, gradient = oracle(flat, spec, {k: v[index.long()] for k, v in d.items()}, OPTIONS)
    result, found = call(flat, spec, d, index, **OPTIONS)
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-10)
    assert error(found, gradient) < 1e-10


def test_a_workspace_changes_nothing_and_serves_all_sizes():
    spec = SPECS["shared"]
    flat, d = data(spec)
    gradients = torch.empty_like(flat)
    workspace = ActorCriticWorkspace(flat, gradients, spec)
    for rows in (40, 7, 40, 1, 39, 38, 37, 36, 40):
        own = {k: v[:rows] for k, v in d.items()}
        alone, expected = call(flat, spec, own, **OPTIONS)
        gradients.fill_(math.nan)
        result, found = call(flat, spec, own, gradients=gradients, workspace=workspace, **OPTIONS)
        assert torch.equal(found, expected)
        assert torch.equal(result.stats, alone.stats)


def test_coefficients_may_be_tensors():
    spec = SPECS["discrete"]
    flat, d = data(spec)
    numbers, gradient = call(flat, spec, d, **OPTIONS)
    as_tensors = {k: torch.tensor(v) if isinstance(v, float) else v for k, v in OPTIONS.items()}
    tensors, found = call(flat, spec, d, **as_tensors)
    torch.testing.assert_close(tensors.stats, numbers.stats, rtol=1e-6, atol=1e-7)
    assert error(found, gradient.double()) < 1e-6


def test_the_ratio_is_one_under_the_parameters_that_acted():
    spec = SPECS["discrete"]
    flat, d = data(spec)
    d["old_log_probs"] = policy_terms(flat, spec, d)[0]
    result, _ = call(flat, spec, d, clip_coef=0.2)
    assert float(result.stats[PPO_STATS.index("ratio_deviation")]) < 1e-5
    assert float(result.clip_fraction) == 0


def test_no_rows_leave_a_gradient_of_zero():
    spec = SPECS["shared"]
    flat, d = data(spec)
    result, found = call(flat, spec, {k: v[:0] for k, v in d.items()}, clip_coef=0.2)
    assert (found == 0).all()
    assert float(result.loss) == 0
    d["mask"] = torch.zeros(N, dtype=torch.bool)
    result, found = call(flat, spec, d, **OPTIONS)
    assert (found == 0).all()
    assert float(result.count) == 0


def test_what_is_masked_is_not_read():
    spec = SPECS["gaussian"]
    flat, d = data(spec, masked=True)
    result, expected = call(flat, spec, d, **OPTIONS)
    for name in ("actions", "advantages", "old_log_probs", "old_values", "returns"):
        d[name] = d[name].clone()
        d[name][~d["mask"]] = math.nan
    again, found = call(flat, spec, d, **OPTIONS)
    assert torch.equal(again.stats, result.stats)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs": torch.zeros(N, 4)}, r"obs is \[40, 4\]; expected \[N, obs_size\] = \[N, 5\]"),
        ({"obs": torch.zeros(N, D, dtype=torch.float64)}, "obs is torch.float64"),
        ({"actions": torch.zeros(N, 2).long()}, r"actions is \[40, 2\]; expected \[40\]"),
        ({"actions": torch.zeros(N)}, "actions is torch.float32; expected integers"),
        ({"old_values": torch.zeros(N, 1)}, r"old_values is \[40, 1\]"),
        ({"action_mask": torch.ones(N, 3)}, "action_mask is .*; expected bool"),
        ({"index": torch.zeros(3)}, r"index is \[3\] torch.float32; expected \[M\] int32 or int64"),
        ({"clip_coef": -1.0}, "clip_coef is -1.0; expected a number >= 0"),
        ({"mask": torch.ones(N)}, "mask is torch.float32"),
    ],
)
def test_bad_arguments_are_named(change, message):
    spec = SPECS["discrete"]
    flat, d = data(spec)
    arguments = {**d, "clip_coef": 0.2, **change}
    index = arguments.pop("index", None)
    options = {"clip_coef": arguments.pop("clip_coef")}
    with pytest.raises(ValueError, match=message):
        call(flat, spec, arguments, index, **options)


def test_bad_vectors_are_named():
    spec = SPECS["discrete"]
    flat, d = data(spec)
    with pytest.raises(ValueError, match=r"parameters is \[7\]; expected a contiguous"):
        call(flat[:7], spec, d, clip_coef=0.2)
    with pytest.raises(ValueError, match="gradients is the same memory"):
        call(flat, spec, d, gradients=flat, clip_coef=0.2)
    with pytest.raises(ValueError, match=r"spec\.activation is 'gelu'"):
        call(flat, spec._replace(activation="gelu"), d, clip_coef=0.2)
    workspace = ActorCriticWorkspace(flat, torch.empty_like(flat), spec)
    with pytest.raises(ValueError, match="workspace was made for other"):
        call(flat, spec, d, clip_coef=0.2, workspace=workspace)
    with pytest.raises(IndexError, match="3 logits a row"):
        call(flat, spec, {**d, "actions": d["actions"] + 3}, clip_coef=0.2)
