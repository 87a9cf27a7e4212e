"""Calls of `actor_critic_loss_and_grads`, and faulty kernels they have to catch."""

import math
from functools import partial

import torch
from calls import Budget, Call, Mutant
from torch import Tensor, nn

from ppo_fast.functional.actor_critic import actor_critic_loss_and_grads
from ppo_fast.results import ActorCriticSpec

MODULES = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}
EVERYTHING = {
    "clip_coef_high": 0.3,
    "dual_clip": 1.3,
    "vf_coef": 0.7,
    "vf_clip_coef": 0.2,
    "ent_coef": 0.05,
    "old_kl_coef": 0.3,
}
H = (64, 64)


def spec_of(
    D: int,
    actor: tuple[int, ...],
    critic: tuple[int, ...],
    head: int | tuple[int, ...],
    activation: str = "tanh",
    squash: bool = False,
) -> ActorCriticSpec:
    """`head`: dimensions of a Gaussian policy, or sizes of categorical heads."""
    outputs, sizes = (head, None) if isinstance(head, int) else (sum(head), head)
    return ActorCriticSpec(D, (), actor, critic, outputs, activation, sizes, squash)


class Networks(nn.Module):
    """The actor-critic as anybody would write it, its parameters in the order of the flat vector."""

    def __init__(self, spec: ActorCriticSpec, flat: Tensor) -> None:
        super().__init__()
        if spec.head_sizes is None:
            self.log_std = nn.Parameter(torch.empty(spec.num_outputs))
        ends = (*spec.actor_sizes, spec.num_outputs), (*spec.critic_sizes, 1)
        self.actor, self.critic = (self._net(spec, sizes) for sizes in ends)
        self.to(flat.dtype)
        nn.utils.vector_to_parameters(flat, self.parameters())

    @staticmethod
    def _net(spec: ActorCriticSpec, sizes: tuple[int, ...]) -> nn.Sequential:
        layers: list[nn.Module] = []
        width = spec.obs_size
        for size in sizes:
            layers += [nn.Linear(width, size), MODULES[spec.activation]()]
            width = size
        return nn.Sequential(*layers[:-1])

    def evaluate(
        self, spec: ActorCriticSpec, obs: Tensor, actions: Tensor, legal: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the actions, entropies and values, [N] each."""
        outputs, values = self.actor(obs), self.critic(obs).squeeze(1)
        if spec.head_sizes is None:
            normal = torch.distributions.Normal(outputs, self.log_std.exp(), validate_args=False)
            log_probs, entropy = normal.log_prob(actions).sum(1), normal.entropy().sum(1)
            if spec.squash:
                log_probs = log_probs - torch.log1p(-actions.tanh().square()).sum(1)
                entropy = -log_probs
            return log_probs, entropy, values
        if legal is not None:
            outputs = outputs.masked_fill(~legal, -1e9)
        log_probs = entropy = torch.zeros_like(values)
        actions = actions.reshape(len(values), len(spec.head_sizes)).long()
        for logits, action in zip(
            outputs.split(spec.head_sizes, 1), actions.unbind(1), strict=True
        ):
            of_each = logits.log_softmax(1)
            log_probs = log_probs + of_each.gather(1, action[:, None]).squeeze(1)
            entropy = entropy - torch.where(of_each > -1e8, of_each.exp() * of_each, 0.0).sum(1)
        return log_probs, entropy, values


def weights_of(spec: ActorCriticSpec) -> Tensor:
    """Flat parameters under which what goes into every activation is of the order of 1."""
    parts = [] if spec.head_sizes is not None else [0.2 * torch.randn(spec.num_outputs)]
    for net in spec.layers:
        for out, width in net:
            parts += [torch.randn(out * width) / math.sqrt(width), 0.3 * torch.randn(out)]
    return torch.cat(parts)


def minibatch(
    spec: ActorCriticSpec,
    n: int,
    *,
    N: int | None = None,
    masked: bool = False,
    illegal: bool = False,
    weighted: bool = False,
    index_dtype: torch.dtype | None = torch.int64,
    pitch: int = 0,
    spread: float = 0.3,
    **kwargs,
) -> Call:
    """n rows of N; ratios and values within and beyond their clip range."""
    N = n + 17 if N is None else N
    flat = weights_of(spec)
    # What pads the rows is not to be used.
    obs = torch.full((N, max(pitch, spec.obs_size)), math.nan)[:, : spec.obs_size]
    obs.copy_(torch.randn(N, spec.obs_size))
    given = {}
    if spec.head_sizes is None:
        actions = torch.randn(N, spec.num_outputs)
    else:
        heads = [torch.randint(0, size, (N,)) for size in spec.head_sizes]
        actions = heads[0] if len(heads) == 1 else torch.stack(heads, 1)
        if illegal:
            first = torch.tensor([0, *spec.head_sizes[:-1]]).cumsum(0)
            legal = torch.rand(N, spec.num_outputs) < 0.6
            given["action_mask"] = legal.scatter_(1, actions.reshape(N, len(heads)) + first, True)
    with torch.no_grad():
        networks = Networks(spec, flat)
        legal = given.get("action_mask")
        if spec.head_sizes is None:
            actions = networks.actor(obs) + flat[: spec.num_outputs].exp() * 0.7 * actions
        log_probs, _, values = networks.evaluate(spec, obs, actions, legal)
    rows = [log_probs + spread * torch.randn(N), torch.randn(N)]
    rows += [values + 0.3 * torch.randn(N), values + torch.randn(N)]
    if masked:
        given["mask"] = torch.rand(N) < 0.7
    if weighted:
        given["weights"] = torch.rand(N) + 0.5
    index = None if index_dtype is None else torch.randint(0, max(N, 1), (n,)).to(index_dtype)
    args = flat, torch.empty_like(flat), spec, obs, actions, *rows, index
    return Call(actor_critic_loss_and_grads, args, {"clip_coef": 0.2} | given | kwargs)


def made(D, actor, critic, head, n, activation="tanh", squash=False, **kwargs) -> Call:
    """`minibatch` of `spec_of`."""
    return minibatch(spec_of(D, actor, critic, head, activation, squash), n, **kwargs)


def on_the_device() -> Call:
    """Every coefficient in a 0-d tensor."""
    coefficients = {name: torch.tensor(x) for name, x in EVERYTHING.items()}
    call = made(4, (16,), (16,), (3,), 40, **coefficients)
    return call._replace(kwargs=call.kwargs | {"clip_coef": torch.tensor(0.2)})


def special(rule: str) -> Call:
    """One ordinary minibatch with something at its edge."""
    zeroed = rule.startswith("on the edge")
    call = made(4, (16,), (16,), (3,), 70, vf_clip_coef=0.25, illegal="mask" in rule, ent_coef=0.1)
    flat, gradients, spec, obs, actions, old, advantages, old_values, returns, index = call.args
    kwargs = dict(call.kwargs)
    if zeroed:
        flat.zero_()
        flat[-1] = 0.5
        old = torch.full_like(old, -math.log(3.0))
        old_values = torch.where(torch.rand(len(old)) < 0.5, 0.25, 0.75)
        kwargs["clip_coef"] = 0.0
    elif rule == "no advantage":
        advantages = torch.zeros_like(advantages)
    elif rule == "all clipped":
        advantages, old = advantages.abs(), old - 3.0
    elif rule == "ratios overflow":
        old = old + torch.where(torch.rand(len(old)) < 0.5, -300.0, 300.0)
    elif rule == "nothing legal by the mask":
        kwargs["action_mask"][::3] = False
    elif rule == "an illegal action taken, by the mask":
        kwargs["action_mask"][torch.arange(len(old)), actions] = False
        # As an op leaves the log-prob of such an action.
        old = torch.where(torch.rand(len(old)) < 0.5, -1e9, old)
    args = flat, gradients, spec, obs, actions, old, advantages, old_values, returns, index
    return call._replace(args=args, kwargs=kwargs)


RULES = (
    *("on the edge of both clips", "no advantage", "all clipped", "ratios overflow"),
    *("nothing legal by the mask", "an illegal action taken, by the mask"),
)

CASES = {
    "categorical": partial(made, 4, (16, 16), (16, 16), (2,), 130, ent_coef=0.1),
    "one row": partial(made, 4, (16,), (16,), (2,), 1),
    "unequal networks": partial(made, 3, (16,), (24, 16, 8), (3,), 65, activation="relu"),
    "multi-discrete": partial(
        made, 5, (32,), (16,), (1, 3, 2), 64, "silu", illegal=True, ent_coef=0.1
    ),
    "gaussian": partial(made, 17, (16, 16), (16, 16), 3, 70, ent_coef=0.1),
    "gaussian, wide": partial(made, 4, (16,), (16,), 20, 31, "elu"),
    "squashed": partial(made, 4, (16,), (16,), 2, 31, "elu", True, ent_coef=0.1),
    "obs of a power of two": partial(made, 16, (16,), (16,), (2,), 31),
    "padded obs": partial(made, 5, (16,), (16,), (2,), 31, pitch=8),
    "clipped values only": partial(
        made, 4, (16,), (16,), (2,), 90, vf_clip_coef=0.2, vf_clip="clipped"
    ),
    "normalised": partial(made, 4, (16,), (16,), (2,), 1100, norm_adv=True, N=300),
    "normalised, many rows": partial(made, 4, (16,), (16,), (2,), 2100, norm_adv=True, masked=True),
    "normalised, masked": partial(
        made, 4, (16,), (16,), (2,), 130, norm_adv=True, masked=True, weighted=True
    ),
    "normalised by moments": partial(
        lambda: made(4, (16,), (16,), (2,), 40, advantage_moments=torch.tensor([40.0, 0.3, 11.0]))
    ),
    "normalizer": partial(made, 4, (16,), (16,), (2,), 40, normalizer=77.0),
    "everything, masked": partial(
        made,
        *(6, (16, 16), (16,), (3, 2), 200),
        **EVERYTHING,
        masked=True,
        weighted=True,
        illegal=True,
        norm_adv=True,
        index_dtype=torch.int32,
    ),
    "everything, masked, gaussian": partial(
        made, 6, (16,), (16,), 3, 90, **EVERYTHING, masked=True, weighted=True, index_dtype=None
    ),
    "float16": partial(made, 4, (16, 16), (16, 16), (2,), 130, matmul_dtype=torch.float16),
    "numbers on the device": on_the_device,
    **{rule: partial(special, rule) for rule in RULES},
}

F16 = {"matmul_dtype": torch.float16}
BF16 = {"matmul_dtype": torch.bfloat16}
CLEANRL = {"vf_clip_coef": 0.2, "ent_coef": 0.01, "norm_adv": True, "N": 1 << 19}
ROWS = 1 << 17
# The first is compiled for every target: wider networks take smaller tiles there, and PTX of their own.
AOT_CASES = {
    "4-16-16-2 relu": partial(made, 4, (16, 16), (16, 16), (2,), 1024, "relu", **F16 | CLEANRL),
    "4-64-64-2": partial(made, 4, H, H, (2,), ROWS, **F16 | CLEANRL),
    "4-64-64-2 bf16": partial(made, 4, H, H, (2,), ROWS, **BF16 | CLEANRL),
    "17-64-64-6 Gaussian": partial(made, 17, H, H, 6, ROWS, pitch=20, **F16 | CLEANRL),
    "60-64-64-8 Gaussian": partial(made, 60, H, H, 8, ROWS, **F16 | CLEANRL),
    "48-64-32-12 Gaussian, ELU": partial(
        made, 48, (64, 32), (64, 32), 12, ROWS, "elu", **F16 | CLEANRL
    ),
    "4-64-64-64-2": partial(made, 4, (64,) * 3, (64,) * 3, (2,), ROWS, **F16 | CLEANRL),
    "24-64-64-(3,4,5) everything": partial(
        lambda: made(
            *(24, H, H, (3, 4, 5), ROWS),
            **F16 | CLEANRL | {name: torch.tensor(x) for name, x in EVERYTHING.items()},
            masked=True,
            weighted=True,
            illegal=True,
        )
    ),
    "3-64-64-1 squashed": partial(made, 3, H, H, 1, ROWS, "tanh", True, **F16 | CLEANRL),
}
STEP_ROWS = 16  # rows a warp handles in one turn
STEP, REDUCE = "actor_critic_step_kernel", "actor_critic_reduce_kernel"
# The hot loop is the actor's, the longer one. The mean of both networks' is what the groundwork
# (actor_critic.md, section 4) counts: 53, 55, 56, 63, 69 and 77 for the first six.
BUDGETS = [
    Budget("4-64-64-2", STEP, 224, True, elements=STEP_ROWS, instructions=64),
    Budget("4-64-64-2 bf16", STEP, 255, True, elements=STEP_ROWS, instructions=66),
    Budget("17-64-64-6 Gaussian", STEP, 255, True, elements=STEP_ROWS, instructions=63),
    Budget("60-64-64-8 Gaussian", STEP, 255, True, elements=STEP_ROWS, instructions=70),
    Budget("48-64-32-12 Gaussian, ELU", STEP, 255, True, elements=STEP_ROWS, instructions=80),
    Budget("4-64-64-64-2", STEP, 255, True, elements=STEP_ROWS, instructions=88),
    Budget("24-64-64-(3,4,5) everything", STEP, 255, True, elements=STEP_ROWS, instructions=130),
    Budget("4-64-64-2", REDUCE, 40),
]

KERNEL, HOST = "_actor_critic_step.py", "actor_critic.py"
ACTIVATIONS = "_activations.py"
MUTANTS = [
    Mutant(ACTIVATIONS, "y = 1.0 - 2.0 * _recip", "y = 2.0 * _recip", "categorical"),
    Mutant(ACTIVATIONS, "square * series, y)", "square, y)", "categorical"),
    Mutant(
        ACTIVATIONS, "kept = sigmoid + y * (1.0 - sigmoid)", "kept = sigmoid + y", "multi-discrete"
    ),
    Mutant(ACTIVATIONS, "out = g + g * tl.minimum(wide, 0.0)", "out = g", "squashed"),
    Mutant(ACTIVATIONS, "out = g - g * wide * wide", "out = g - g * wide", "categorical"),
    Mutant(ACTIVATIONS, "tl.where(kept > 0.0, g, 0.0)", "g", "unequal networks"),
    Mutant(KERNEL, "taken = HEADS[i][0] + action", "taken = action", "multi-discrete"),
    Mutant(
        KERNEL,
        "(column < HEADS[i][0] + HEADS[i][1])\n        x",
        "(column < 9)\n        x",
        "multi-discrete",
    ),
    Mutant(KERNEL, "offset = -(g + slope * s) * inv_l", "offset = -g * inv_l", "categorical"),
    Mutant(KERNEL, "is_legal = tl.load(legal + i,", "is_legal = tl.load(legal,", "multi-discrete"),
    Mutant(
        KERNEL,
        "log_prob = tl.maximum(log_prob_of(of_taken, m, l, 1.0), ILLEGAL, propagate_nan=ALL)",
        "log_prob = log_prob_of(of_taken, m, l, 1.0)",
        "an illegal action taken, by the mask",
    ),
    Mutant(KERNEL, "- LN2)\n    log_probs", "+ LN2)\n    log_probs", "squashed"),
    Mutant(KERNEL, "+ A * (HALF_LOG_2PI + 0.5)", "+ A * HALF_LOG_2PI", "gaussian"),
    Mutant(KERNEL, "g += bonus", "g -= bonus", "squashed"),
    Mutant(KERNEL, "* g[:, None] - bonus[:, None]", "* g[:, None]", "gaussian"),
    Mutant(
        KERNEL, "dz = g[:, None] * distance * inv_std", "dz = g[:, None] * distance", "gaussian"
    ),
    Mutant(
        KERNEL,
        "position = (program + tile * programs)",
        "position = (program + tile)",
        "categorical",
    ),
    Mutant(
        KERNEL,
        "keep = inside & tl.load(rows.mask + at",
        "keep = inside & tl.load(rows.mask + position",
        "everything, masked",
    ),
    Mutant(
        KERNEL,
        "x = tl.where(feature == D, 1.0, x)",
        "x = tl.where(feature == D, 0.0, x)",
        "categorical",
    ),
    Mutant(KERNEL, "x = tl.where(feature < D, x, 0.0)", "x = x", "padded obs"),
    Mutant(
        KERNEL,
        "if not LAYERS[i][5]:\n                a +=",
        "if i > L:\n                a +=",
        "categorical",
    ),
    Mutant(KERNEL, "below = tl.dot(g, ws[L - k]", "below = tl.dot(g, ws[L]", "categorical"),
    Mutant(
        KERNEL,
        "tl.sum(dbs[L - 1 - i], 0) * (1.0 / ONES)",
        "tl.sum(dbs[L - 1 - i], 0)",
        "categorical",
    ),
    Mutant(KERNEL, "program += programs", "program += 0", "categorical"),
    Mutant(
        KERNEL,
        "share: tl.constexpr = 1.0 if PER_ROW else 1.0 / ONES",
        "share: tl.constexpr = 1.0",
        "gaussian, wide",
    ),
    Mutant(HOST, "gradient *= scale", "gradient *= 1.0", "normalizer"),
    Mutant(HOST, "(row < programs)[:, None]", "(row < programs - 1)[:, None]", "categorical"),
    Mutant(
        HOST,
        "for start in range(0, 2 * programs, ROWS)",
        "for start in range(0, programs - programs, ROWS)",
        "categorical",
    ),
    Mutant(HOST, "has_ones = number == 0", "has_ones = number < 2", "unequal networks"),
    Mutant(HOST, "offset = spec.num_outputs if", "offset = 0 if", "gaussian"),
    Mutant(
        HOST,
        "heads.append((sum(part[1] for part in heads), head))",
        "heads.append((0, head))",
        "multi-discrete",
    ),
    Mutant(HOST, "norm = 3\n", "norm = 0\n", "normalised by moments"),
    Mutant("_surrogate.py", "(row < N), row, 0)", "(row < N), at, 0)", "normalised"),
    Mutant("_surrogate.py", "(row < N), row, 0)", "(row < 5), row, 0)", "normalised, many rows"),
    Mutant(
        "_surrogate.py",
        "keep = tl.load(rows.mask + at, mask=inside, other=False)",
        "keep = inside",
        "normalised, masked",
    ),
]
