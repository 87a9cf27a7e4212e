"""Calls of `layerwise_loss_and_grads`, and faulty kernels they have to catch.

It has the signature of `actor_critic_loss_and_grads` and serves networks that its own kernel does
not; here it is an op of its own, so that small networks take it too.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from calls import Budget, Call, Mutant
from torch import Tensor
from torch.nn import functional as F

from ppo_fast.dispatch import Accelerated
from ppo_fast.functional.actor_critic import actor_critic_loss_and_grads
from ppo_fast.kernels._layerwise import layerwise_loss_and_grads
from ppo_fast.results import ActorCriticSpec

layerwise = Accelerated(
    actor_critic_loss_and_grads.reference,
    layerwise_loss_and_grads,
    validate=actor_critic_loss_and_grads.validate,
    mutates=("gradients",),
)
layerwise.__module__ = "ppo_fast.kernels._layerwise"
layerwise.__name__ = "layerwise_loss_and_grads"

ACTIVATIONS = {"tanh": torch.tanh, "relu": F.relu, "elu": F.elu, "silu": F.silu}


class Outputs(NamedTuple):
    """What the networks give for some rows."""

    log_probs: Tensor
    entropy: Tensor
    values: Tensor


def layers_of(flat: Tensor, spec: ActorCriticSpec) -> tuple:
    """log_std, and the (weight, bias) of trunk, actor and critic, read off the vector in order."""
    position = 0

    def take(*shape):
        nonlocal position
        start, position = position, position + math.prod(shape)
        return flat[start:position].view(shape)

    log_std = take(spec.num_outputs) if spec.head_sizes is None else None
    features = spec.shared_sizes[-1] if spec.shared_sizes else spec.obs_size
    nets = []
    for width, sizes in (
        (spec.obs_size, spec.shared_sizes),
        (features, (*spec.actor_sizes, spec.num_outputs)),
        (features, (*spec.critic_sizes, 1)),
    ):
        nets.append([])
        for out in sizes:
            nets[-1].append((take(out, width), take(out)))
            width = out
    assert position == len(flat)
    return log_std, *nets


def evaluate(flat: Tensor, spec: ActorCriticSpec, rows: dict[str, Tensor], linear=F.linear):
    """The policy's `Outputs` for the actions in `rows`, by torch alone."""
    log_std, trunk, *nets = layers_of(flat, spec)
    f = ACTIVATIONS[spec.activation]
    x = rows["obs"]
    for layer in trunk:
        x = f(linear(x, *layer))
    ends = []
    for layers in nets:
        h = x
        for layer in layers[:-1]:
            h = f(linear(h, *layer))
        ends.append(linear(h, *layers[-1]))
    outputs, values = ends[0], ends[1].squeeze(1)
    actions = rows["actions"]
    if log_std is not None:
        policy = torch.distributions.Normal(outputs, log_std.exp().expand_as(outputs))
        log_probs, entropy = policy.log_prob(actions).sum(1), policy.entropy().sum(1)
        if spec.squash:
            log_probs = log_probs - (1 - actions.tanh() ** 2).log().sum(1)
            entropy = -log_probs
        return Outputs(log_probs, entropy, values)
    legal = rows.get("action_mask")
    if legal is not None:
        outputs = outputs.masked_fill(~legal, -1e9)
    actions = actions.reshape(len(values), len(spec.head_sizes))
    log_probs, entropy = torch.zeros_like(values), torch.zeros_like(values)
    for head, logits in enumerate(outputs.split(spec.head_sizes, 1)):
        all_log_probs = logits.log_softmax(1)
        log_probs = log_probs + all_log_probs.gather(1, actions[:, head : head + 1])[:, 0]
        entropy = entropy - (all_log_probs.exp() * all_log_probs).sum(1)
    return Outputs(log_probs, entropy, values)


def rollout(spec: ActorCriticSpec, N: int, masked: bool = False, move: float = 0.2) -> dict:
    """N rows and a vector of parameters; ratios and values within and beyond the clip ranges.

    masked: with `mask`, `weights` and for categorical policies `action_mask`.
    """
    flat = torch.randn(spec.num_parameters)
    log_std, *nets = layers_of(flat, spec)
    for net in nets:
        for weight, bias in net:
            weight.mul_(weight.shape[1] ** -0.5)
            bias.mul_(0.3)
    rows = {"obs": torch.randn(N, spec.obs_size)}
    if log_std is not None:
        log_std.mul_(0.2)
        rows["actions"] = torch.randn(N, spec.num_outputs)
    else:
        heads = [torch.randint(size, (N,)) for size in spec.head_sizes]
        rows["actions"] = heads[0] if len(heads) == 1 else torch.stack(heads, 1)
        if masked:
            legal = torch.rand(N, spec.num_outputs) < 0.6
            first = 0
            for size, action in zip(spec.head_sizes, heads, strict=True):
                legal[torch.arange(N), first + action] = True
                first += size
            rows["action_mask"] = legal
    found = evaluate(flat, spec, rows)
    rows["old_log_probs"] = found.log_probs + move * torch.randn(N)
    rows["old_values"] = found.values + move * torch.randn(N)
    rows["returns"] = found.values + torch.randn(N)
    rows["advantages"] = torch.randn(N)
    if masked:
        rows["mask"] = torch.rand(N) < 0.7
        rows["weights"] = torch.rand(N) + 0.5
    return {"parameters": flat} | rows


NAMES = ("obs", "actions", "old_log_probs", "advantages", "old_values", "returns")


def call_of(spec: ActorCriticSpec, given: dict, index: Tensor | None = None, **options) -> Call:
    """A call on a `rollout`; its `gradients` are NaN."""
    flat = given["parameters"]
    more = {k: v for k, v in given.items() if k not in (*NAMES, "parameters")}
    args = (flat, torch.full_like(flat, math.nan), spec, *(given[name] for name in NAMES), index)
    return Call(layerwise, args, {"clip_coef": 0.2} | more | options)


EVERYTHING = {
    "clip_coef_high": 0.3,
    "dual_clip": 1.5,
    "vf_coef": 0.7,
    "vf_clip_coef": 0.1,
    "ent_coef": 0.02,
    "old_kl_coef": 0.1,
    "norm_adv": True,
}
SPECS = {
    "discrete": ActorCriticSpec(5, (), (48, 16), (48, 16), 3, "tanh", (3,)),
    "one hidden": ActorCriticSpec(1, (), (16,), (16,), 2, "relu", (2,)),
    "unequal": ActorCriticSpec(9, (), (17,), (33, 16, 20), 2, "relu", (2,)),
    "multi-discrete": ActorCriticSpec(12, (), (100,), (100,), 9, "silu", (1, 5, 3)),
    "gaussian": ActorCriticSpec(60, (), (100, 128), (100, 128), 8, "tanh", None),
    "squashed": ActorCriticSpec(5, (16,), (24,), (24,), 3, "silu", None, True),
    "trunk, own layers": ActorCriticSpec(6, (40, 20), (16,), (16,), 4, "elu", (4,)),
    "trunk, actor's own": ActorCriticSpec(6, (24,), (16,), (), 4, "elu", (4,)),
    "trunk, critic's own": ActorCriticSpec(6, (24,), (), (16,), 4, "tanh", None),
    "trunk only": ActorCriticSpec(6, (40, 20), (), (), 16, "tanh", (16,)),
    "linear": ActorCriticSpec(5, (), (), (), 3, "tanh", (3,)),
    "wide outputs": ActorCriticSpec(5, (), (16,), (16,), 70, "elu", (60, 10)),
    "wide outputs, trunk": ActorCriticSpec(5, (20,), (16,), (), 40, "relu", (40,)),
}


def case(
    name: str, N: int, M: int | None = None, masked: bool = False, move: float = 0.2, **options
) -> Call:
    """`SPECS[name]` on N rows, or on M of them with repetitions."""
    given = rollout(SPECS[name], N, masked, move)
    index = None if M is None else torch.randint(N, (M,))
    return call_of(SPECS[name], given, index, **options)


CASES = {name: partial(case, name, 70) for name in SPECS} | {
    "discrete, one row": partial(case, "discrete", 1, vf_clip_coef=0.1),
    "discrete, indexed": partial(case, "discrete", 20, 45, vf_clip_coef=0.1, vf_clip="clipped"),
    "gaussian, blocks": partial(case, "gaussian", 50, 300, norm_adv=True, ent_coef=0.01),
    "multi-discrete, everything, masked": partial(
        case, "multi-discrete", 80, 300, True, **EVERYTHING, normalizer=250.0
    ),
    "squashed, everything, masked": partial(case, "squashed", 90, masked=True, **EVERYTHING),
    "trunk, everything, masked": partial(
        case, "trunk, own layers", 90, 70, masked=True, **EVERYTHING
    ),
    "by moments": partial(
        case, "discrete", 30, advantage_moments=torch.tensor([30.0, 0.2, 40.0], device="cpu")
    ),
    # Without a move no ratio is near the clip range, on either side of which rounding could put it.
    "discrete, fp16": partial(case, "discrete", 300, move=0.0, matmul_dtype=torch.float16),
    "no rows": partial(case, "discrete", 0),
}


def large(spec: ActorCriticSpec, M: int, dtype, N: int = 1 << 20) -> Call:
    """A call whose tensors are never looked at."""
    size, row = torch.empty(spec.num_parameters), torch.empty(N)
    actions = torch.empty(N, dtype=torch.int64)
    if spec.head_sizes is None:
        actions = torch.empty(N, spec.num_outputs)
    args = size, size, spec, torch.empty(N, spec.obs_size), actions, row, row, row, row
    index = torch.empty(M, dtype=torch.int32)
    return Call(layerwise, (*args, index), {"clip_coef": 0.2, "matmul_dtype": dtype})


LOCOMOTION = ActorCriticSpec(60, (), (256, 256), (256, 256), 8, "tanh", None)
PYRAMID = ActorCriticSpec(256, (), (512, 256, 128), (512, 256, 128), 32, "elu", None)
TRUNK = ActorCriticSpec(48, (128,), (128,), (), 100, "silu", (100,))
# The first is what is compiled for other targets too, gfx942 among them: float32 activations contain
# no instructions written out for NVIDIA.
AOT_CASES = {
    "48-128-128-100 with a trunk, 24576 rows, fp32": partial(large, TRUNK, 24576, None),
    "60-256-256-8, 131072 rows, fp16": partial(large, LOCOMOTION, 131072, torch.float16),
    "256-512-256-128-32, 65536 rows, fp16": partial(large, PYRAMID, 65536, torch.float16),
}
BUDGETS = [
    Budget(case, f"{kernel}_kernel", registers, tensor_cores=True)
    for case, budgets in (
        (
            "60-256-256-8, 131072 rows, fp16",
            {
                "layer_forward": 112,
                "heads_forward": 64,
                "heads_backward": 176,
                "layer_backward": 160,
                "layer_weights": 224,
            },
        ),
        (
            "256-512-256-128-32, 65536 rows, fp16",
            {
                "layer_forward": 128,
                "heads_forward": 96,
                "heads_backward": 248,
                "layer_backward": 176,
                "layer_weights": 224,
            },
        ),
    )
    for kernel, registers in budgets.items()
]

PRODUCTS, PLAN, LAYERWISE = "_layer_products.py", "_layer_plan.py", "_layerwise.py"
ALL = "multi-discrete, everything, masked"
MUTANTS = [
    Mutant(PRODUCTS, "obs + (row * stride)", "obs + (at * stride)", "discrete, indexed"),
    Mutant(PRODUCTS, "source + (row * STRIDE)", "source + (at * STRIDE)", ALL),
    Mutant(PRODUCTS, "rows_out.mask, row, at", "rows_out.mask, at, at", ALL),
    Mutant(PRODUCTS, "rows_out.weights, row, at", "rows_out.weights, at, at", ALL),
    Mutant(PRODUCTS, "bias = biases + net * biases_net", "bias = biases", "discrete"),
    Mutant(PRODUCTS, "critic = tl.where(net == 0, -1, 0)", "critic = 0", "discrete, one row"),
    Mutant(PRODUCTS, "critic = A", "critic = A - 1", "linear"),
    Mutant(PRODUCTS, "g += tl.load(others + at)", "g -= tl.load(others + at)", "trunk, own layers"),
    Mutant(PRODUCTS, "g = through(g, tl.load(kept + at)", "g = through(g, tl.load(out + at)", ALL),
    Mutant(
        PRODUCTS,
        "a = gradients + net * gradients_net + (row * K)",
        "a = gradients + (row * K)",
        "discrete",
    ),
    Mutant(PRODUCTS, "b += BK * N", "b += BK", "gaussian"),
    Mutant(
        PRODUCTS,
        "tl.minimum(first + turns, tiles)):\n            total = tl.zeros",
        "tl.minimum(first + turns - 1, tiles)):\n            total = tl.zeros",
        "discrete, fp16",
    ),
    Mutant(
        PRODUCTS,
        "APPROXIMATE)\n            a += BM * K\n            at += BM * N",
        "APPROXIMATE)\n            a += BM * K\n            at += BM",
        "discrete, fp16",
    ),
    Mutant(
        PRODUCTS,
        "RAW)\n            a += BM * K\n            at += BM * N",
        "RAW)\n            a += BM\n            at += BM * N",
        "discrete, fp16",
    ),
    Mutant(
        PRODUCTS,
        "b = inputs + net * inputs_net + (row * IN)",
        "b = inputs + (row * IN)",
        "discrete",
    ),
    Mutant(
        PRODUCTS, "(out >= 0) & (tile % TILES == 0)", "(out > 0) & (tile % TILES == 0)", "discrete"
    ),
    Mutant(PRODUCTS, "inside = (row < M)[:, None]", "inside = (row < M - 1)[:, None]", "discrete"),
    Mutant(PRODUCTS, "total *= tl.load(inv_n)", "total *= 1.0", "discrete"),
    Mutant(PRODUCTS, "place += step", "place += 0", "discrete"),
    Mutant(PRODUCTS, "sums += g.to(tl.float32)", "sums = g.to(tl.float32)", "discrete"),
    Mutant(PLAN, "(spec.num_outputs, *critic_head)", "(0, *critic_head)", "linear"),
    Mutant(PLAN, "of_biases[row : row + out]", "of_biases[row + 1 : row + 1 + out]", "discrete"),
    Mutant(PLAN, "step = size + layer.out", "step = size", "discrete"),
    Mutant(LAYERWISE, "int(run.accumulate),\n        OUT", "0,\n        OUT", ALL),
    Mutant(LAYERWISE, "int(run.accumulate),\n        A", "0,\n        A", ALL),
    Mutant(LAYERWISE, "range(len(counts) - 1, -1, -1)", "range(len(counts))", ALL),
    Mutant(LAYERWISE, "named.advantages, named.mask, eps", "named.advantages, None, eps", ALL),
    Mutant(
        LAYERWISE,
        "key=lambda net: not plan.nets[net]",
        "key=lambda net: net",
        "trunk, critic's own",
    ),
    Mutant(LAYERWISE, "sum(shares[:number])", "0", ALL),
]
