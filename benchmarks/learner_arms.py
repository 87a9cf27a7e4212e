"""The arms of the learner step: ours, autograd's, and the loop of CleanRL and rsl_rl.

All start from the same weights and work on the same synthetic rollout; `bench_learner.py` times them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ppo_fast.capture import Phase
from ppo_fast.config import ControlConfig
from ppo_fast.control.loss import AutogradLoss, ExplicitLoss
from ppo_fast.distributions import Categorical, DiagGaussian, distribution_for
from ppo_fast.models import ActorCritic
from ppo_fast.rollout import Batch
from ppo_fast.update import FlatAdam, ppo_update

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}
OURS = "ppo_fast fp16, graph"
EAGER = "eager loop"
COMPILED = "torch.compile"
USUAL = (
    OURS,
    EAGER,
    "autograd, graph",
    "ppo_fast fp16, eager",
    f"{EAGER}, TF32",
    "ppo_fast fp32, graph",
)
EVERY = (
    *USUAL,
    "ppo_fast bf16, graph",
    "ppo_fast bf16, eager",
    "ppo_fast fp32, eager",
    "autograd, eager",
)
"""Arms in the order of their weight: where kernels take long to compile, the last are left out."""


class Problem(NamedTuple):
    num_envs: int
    num_steps: int
    obs_size: int
    hidden: tuple[int, ...]
    outputs: int
    continuous: bool
    activation: str = "tanh"
    epochs: int = 4
    minibatches: int = 4
    published_ms: float | None = None
    """elsewhere, for the whole update"""

    @property
    def label(self) -> str:
        sizes = "-".join(map(str, (self.obs_size, *self.hidden, self.outputs)))
        head = "Gaussian" if self.continuous else "categorical"
        return f"{self.num_envs} x {self.num_steps}, {sizes} {head}"

    @property
    def rows(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def updates(self) -> int:
        return self.epochs * self.minibatches

    @property
    def flops(self) -> int:
        """Of an update: three products a layer, but no gradient by the observations."""
        total = 0
        for outputs in (self.outputs, 1):
            sizes = (self.obs_size, *self.hidden, outputs)
            products = [a * b for a, b in itertools.pairwise(sizes)]
            total += 2 * (3 * sum(products) - products[0])
        return total * self.rows * self.epochs

    @property
    def bytes(self) -> int:
        """That an update cannot do without: every row read once an epoch, by its index."""
        action = 4 * self.outputs if self.continuous else 8
        return (4 * self.obs_size + action + 4 * 4 + 8) * self.rows * self.epochs

    @property
    def config(self) -> ControlConfig:
        return ControlConfig(
            num_envs=self.num_envs,
            num_steps=self.num_steps,
            update_epochs=self.epochs,
            num_minibatches=self.minibatches,
            hidden_sizes=self.hidden,
            activation=self.activation,  # type: ignore[arg-type]
        )


# The first is PufferLib's operating point; 78.6 ms: TF32 on an H100 (shared notes, direct_peers 2.6).
PUFFER = Problem(16384, 128, 60, (128, 128), 8, True, published_ms=78.6)
NARROW = PUFFER._replace(hidden=(64, 64), published_ms=None)
LOCOMOTION = Problem(4096, 24, 48, (256, 128, 64), 12, True, "elu", epochs=5)
CARTPOLE = Problem(1024, 128, 4, (64, 64), 2, False)


class Start(NamedTuple):
    """Weights and rows; arms copy the former and share the latter."""

    policy: ActorCritic
    distribution: Categorical | DiagGaussian
    batch: Batch
    index: Tensor
    """rows of the minibatch whose gradient is compared"""


def start_of(problem: Problem) -> Start:
    torch.manual_seed(0)
    p = problem
    space: spaces.Space = (
        spaces.Box(-1.0, 1.0, (p.outputs,), np.float32)
        if p.continuous
        else spaces.Discrete(p.outputs)
    )
    distribution = distribution_for(space)
    observed = {"": spaces.Box(-np.inf, np.inf, (p.obs_size,), np.float32)}
    policy = ActorCritic(observed, distribution, p.hidden, p.activation)
    # The initial actor's outputs are all but 0: its gradients would be of one layer alone.
    nn.init.orthogonal_(policy.actor_net[-1].weight, 0.5)  # type: ignore[arg-type]
    policy.to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    obs = torch.randn(p.rows, p.obs_size, device=DEVICE, generator=generator)
    with torch.no_grad():
        parameters, values = policy(obs)
        noise = distribution.noise((p.rows,), DEVICE, generator)
        actions = distribution.sample(parameters, noise, None)
        log_probs = distribution.log_probs(parameters, actions, None)
    advantages = torch.randn(p.rows, device=DEVICE, generator=generator)
    batch = Batch(
        inputs=obs,
        actions=actions,
        log_probs=log_probs,
        values=values.clone(),
        advantages=advantages,
        returns=values + advantages,
    )
    index = torch.randperm(p.rows, device=DEVICE, generator=generator)
    return Start(policy, distribution, batch, index[: p.rows // p.minibatches])


def options_of(config: ControlConfig) -> dict[str, Any]:
    """As the trainer gives them: on a GPU in tensors where they may change."""

    def number(value: float) -> float | Tensor:
        return torch.tensor(value, device=DEVICE) if ON_GPU else value

    return {
        "clip_coef": number(config.clip_coef),
        "clip_coef_high": number(config.clip_coef),
        "vf_coef": config.vf_coef,
        "vf_clip_coef": config.vf_clip_coef,
        "ent_coef": number(config.ent_coef),
        "norm_adv": True,
    }


def flat_gradient(policy: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in policy.parameters() if p.grad is not None])


def true_gradient(start: Start, config: ControlConfig) -> Tensor:
    """Of the first minibatch, by autograd in float64."""
    policy = copy.deepcopy(start.policy).double()
    rows = start.batch.take(start.index)
    obs = rows.inputs
    assert isinstance(obs, Tensor)
    # Not the policy's own forward: its encoder makes float32 of everything.
    parameters: Any = policy.actor_net(obs.double())
    log_std = None if policy.log_std is None else policy.log_std
    loss, _ = plain_loss(
        parameters,
        log_std,
        policy.critic_net(obs.double()).squeeze(-1),
        rows.actions if log_std is None else rows.actions.double(),
        *(x.double() for x in (rows.log_probs, rows.advantages, rows.values, rows.returns)),
        config,
    )
    loss.backward()
    return flat_gradient(policy)


def plain_loss(
    outputs: Tensor,
    log_std: Tensor | None,
    values: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    old_values: Tensor,
    returns: Tensor,
    c: ControlConfig,
) -> tuple[Tensor, Tensor]:
    """PPO's loss and the mean k3 estimate of the KL divergence, in torch as the field writes it."""
    policy: torch.distributions.Distribution
    if log_std is None:
        policy = torch.distributions.Categorical(logits=outputs, validate_args=False)
        log_probs, entropy = policy.log_prob(actions), policy.entropy()
    else:
        policy = torch.distributions.Normal(
            outputs, log_std.exp().expand_as(outputs), validate_args=False
        )
        log_probs, entropy = policy.log_prob(actions).sum(1), policy.entropy().sum(1)
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    limited = ratio.clamp(1 - c.clip_coef, 1 + c.clip_coef)
    policy_loss = torch.max(-advantages * ratio, -advantages * limited).mean()
    error = (values - returns).square()
    if c.vf_clip_coef is not None:
        near = old_values + (values - old_values).clamp(-c.vf_clip_coef, c.vf_clip_coef)
        error = torch.max(error, (near - returns).square())
    loss = policy_loss + c.vf_coef * 0.5 * error.mean() - c.ent_coef * entropy.mean()
    with torch.no_grad():
        kl = ((ratio - 1) - log_ratio).mean()
    return loss, kl


class Arm(NamedTuple):
    update: Callable[[], object]
    """a whole update"""
    gradient: Callable[[], Tensor]
    """[P], of the first minibatch at the present weights"""
    note: str | Callable[[], str] = ""


def our_arm(start: Start, config: ControlConfig, name: str) -> Arm:
    """Of "ppo_fast DTYPE, HOW" and "autograd, HOW"."""
    method, how = name.split(", ")
    policy = copy.deepcopy(start.policy)
    optimizer = FlatAdam(policy.parameters(), config.learning_rate, config.adam_eps)
    options = options_of(config)
    loss: AutogradLoss | ExplicitLoss
    if method == "autograd":
        loss = AutogradLoss(policy, start.distribution, lambda: options)
    else:
        dtype = DTYPES[method.split()[1]]
        loss = ExplicitLoss(policy, start.distribution, lambda: options, optimizer, dtype)
    generator = torch.Generator(DEVICE).manual_seed(1)

    def gradient() -> Tensor:
        optimizer.zero_grad()
        if isinstance(loss, ExplicitLoss):
            loss(start.batch, start.index)
        else:
            loss(start.batch.take(start.index)).loss.backward()
        return flat_gradient(policy)

    def update() -> object:
        return ppo_update(loss, optimizer, start.batch, config, generator)

    if how == "eager":
        return Arm(update, gradient, "" if ON_GPU else "the reference, fp32")
    phase = Phase(name, update, DEVICE, [generator])

    def note() -> str:
        if not ON_GPU:
            return "the reference, fp32; a CPU has no graphs"
        return "" if phase.recorded else f"not recorded: {phase.why_eager or 'too few runs'}"

    return Arm(phase, gradient, note)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Within the block, let fp32 products be those of `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def loop_arm(start: Start, config: ControlConfig, name: str) -> Arm:
    """The loop of CleanRL and rsl_rl: autograd, torch's fused Adam, statistics read every minibatch.

    Compiled, the network and its loss are one function of Inductor's, and nothing is read.
    """
    policy = copy.deepcopy(start.policy)
    # "high" is TF32 on a GPU.
    precision = "high" if name.endswith("TF32") else "highest"
    optimizer = torch.optim.Adam(
        policy.parameters(), lr=config.learning_rate, eps=config.adam_eps, fused=True
    )

    def network_and_loss(obs: Tensor, *columns: Tensor) -> tuple[Tensor, Tensor]:
        outputs = policy.actor_net(obs)
        values = policy.critic_net(obs).squeeze(-1)
        return plain_loss(outputs, policy.log_std, values, *columns, config)  # type: ignore[arg-type]

    of_minibatch: Any = network_and_loss
    if name == COMPILED:
        torch._dynamo.reset()
        of_minibatch = torch.compile(
            network_and_loss, backend="inductor" if ON_GPU else "aot_eager", dynamic=False
        )
    b = start.batch
    columns = (b.actions, b.log_probs, b.advantages, b.values, b.returns)
    generator = torch.Generator(DEVICE).manual_seed(1)
    size = len(b) // config.num_minibatches

    def loss_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(b.inputs, Tensor)
        return of_minibatch(b.inputs[rows], *(column[rows] for column in columns))

    def gradient() -> Tensor:
        optimizer.zero_grad()
        with products(precision):
            loss_of(start.index)[0].backward()
        return flat_gradient(policy)

    def update() -> object:
        losses, kls = [], []
        with products(precision):
            for _ in range(config.update_epochs):
                order = torch.randperm(len(b), device=DEVICE, generator=generator)
                for first in range(0, size * config.num_minibatches, size):
                    loss, kl = loss_of(order[first : first + size])
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                    optimizer.step()
                    if name != COMPILED:
                        losses.append(loss.item())
                        kls.append(kl.item())
        return losses, kls

    return Arm(update, gradient, "" if ON_GPU or name != COMPILED else "aot_eager")


def arm_of(start: Start, config: ControlConfig, name: str) -> Arm:
    if name.startswith((EAGER, COMPILED)):
        return loop_arm(start, config, name)
    return our_arm(start, config, name)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|, in the Euclidean norm."""
    if got.shape != exact.shape:
        raise ValueError(f"the gradient has {got.numel()} entries; expected {exact.numel()}")
    return float((got.double() - exact).norm() / exact.norm())
