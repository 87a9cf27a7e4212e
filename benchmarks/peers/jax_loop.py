"""The whole of PPO on CartPole in one jitted function: rollout, GAE, all epochs and minibatches.

In the manner of purejaxrl, written for speed on a CPU: environments and networks are plain
jax.numpy, so that nothing but jax is imported; noise is drawn for a rollout at once; values and old
log-probabilities come from one pass over the rollout; a permutation is one sort. Truncated episodes
are bootstrapped, as ours and SB3's are; purejaxrl takes them for terminated.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from peers import NotHere, Trained, Trainer, Watch

if TYPE_CHECKING:
    from ppo_fast.config import ControlConfig

Array = jax.Array
Params = list[tuple[Array, Array]]

# Gymnasium's CartPoleEnv.
GRAVITY, FORCE, TAU = 9.8, 10.0, 0.02
MASS_CART, MASS_POLE, HALF_LENGTH = 1.0, 0.1, 0.5
TOTAL_MASS = MASS_CART + MASS_POLE
POLE_MOMENT = MASS_POLE * HALF_LENGTH
FARTHEST, STEEPEST = 2.4, 12 * 2 * np.pi / 360
LONGEST = 500
RESET = 0.05

ROWS_A_CALL = 4096
"""Iterations are joined into calls of about this many rows: the host looks at episodes in between."""

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


def cartpole_step(state: Array, action: Array) -> tuple[Array, Array]:
    """Advance [N, 4] states by [N] actions in {0, 1}; return states and whether they are terminal."""
    x, x_dot, theta, theta_dot = state.T
    force = jnp.where(action == 1, FORCE, -FORCE)
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    push = (force + POLE_MOMENT * theta_dot**2 * sin) / TOTAL_MASS
    theta_acc = (GRAVITY * sin - cos * push) / (
        HALF_LENGTH * (4.0 / 3.0 - MASS_POLE * cos**2 / TOTAL_MASS)
    )
    x_acc = push - POLE_MOMENT * theta_acc * cos / TOTAL_MASS
    following = jnp.stack(
        (
            x + TAU * x_dot,
            x_dot + TAU * x_acc,
            theta + TAU * theta_dot,
            theta_dot + TAU * theta_acc,
        ),
        axis=1,
    )
    fallen = (jnp.abs(following[:, 0]) > FARTHEST) | (jnp.abs(following[:, 2]) > STEEPEST)
    return following, fallen


def mlp(layers: Params, x: Array, activation: Any) -> Array:
    for weight, bias in layers[:-1]:
        x = activation(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def new_mlp(draw: np.random.Generator, sizes: tuple[int, ...], gain: float) -> Params:
    """Orthogonal weights, gain sqrt 2 in hidden layers, zero biases.

    By numpy: compiling the same in JAX takes seconds.
    """
    layers = []
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        normal = draw.standard_normal((max(inputs, outputs), min(inputs, outputs)))
        q, r = np.linalg.qr(normal)
        q = q * np.sign(np.diag(r))
        weight = q if inputs >= outputs else q.T
        scale = gain if number == len(sizes) - 2 else 2**0.5
        layers.append((jnp.asarray(scale * weight, jnp.float32), jnp.zeros(outputs)))
    return layers


class State(NamedTuple):
    """What an iteration hands to the next."""

    params: dict[str, Params]
    first_moments: dict[str, Params]
    second_moments: dict[str, Params]
    adam_steps: Array
    env: Array
    """[N, 4] float32"""
    lengths: Array
    """[N] int32, steps of the episode under way, which are its return"""
    key: Array


class Rows(NamedTuple):
    obs: Array
    actions: Array
    log_probs: Array
    advantages: Array
    returns: Array
    values: Array


def initial(c: ControlConfig) -> State:
    num_envs, hidden = c.num_envs or 8, tuple(c.hidden_sizes)
    draw = np.random.default_rng(c.seed)
    params = {
        "actor": new_mlp(draw, (4, *hidden, 2), 0.01),
        "critic": new_mlp(draw, (4, *hidden, 1), 1.0),
    }

    def zeros() -> dict[str, Params]:
        return jax.tree.map(jnp.zeros_like, params)

    env = jnp.asarray(draw.uniform(-RESET, RESET, (num_envs, 4)), jnp.float32)
    lengths = jnp.zeros(num_envs, jnp.int32)
    adam_steps = jnp.zeros((), jnp.int32)
    return State(params, zeros(), zeros(), adam_steps, env, lengths, jax.random.key(c.seed))


def make_iteration(c: ControlConfig, block_rows: int | None = None) -> Any:
    """Return iteration(state, (learning rate, clip)) -> (state, (ends [T, N], lengths [T, N]))."""
    num_envs, num_steps = c.num_envs or 8, c.num_steps
    batch_size = num_envs * num_steps
    minibatch_size = batch_size // c.num_minibatches
    activation = ACTIVATIONS[c.activation]

    def rollout(state: State) -> tuple[Array, Array, tuple[Array, ...]]:
        # One draw for all steps: the generator's fixed costs are paid once.
        choose, restart = jax.random.split(state.key)
        noise = jax.random.gumbel(choose, (num_steps, num_envs, 2))
        starts = jax.random.uniform(restart, (num_steps, num_envs, 4), minval=-RESET, maxval=RESET)

        def step(carry: tuple[Array, Array], drawn: tuple[Array, Array]) -> tuple[Any, Any]:
            env, lengths = carry
            gumbel, start = drawn
            logits = mlp(state.params["actor"], env, activation)
            action = jnp.argmax(logits + gumbel, axis=1)
            following, fallen = cartpole_step(env, action)
            lengths = lengths + 1
            done = fallen | (lengths >= LONGEST)
            carry = jnp.where(done[:, None], start, following), jnp.where(done, 0, lengths)
            return carry, (env, action, following, fallen, done, lengths)

        (env, lengths), seen = lax.scan(step, (state.env, state.lengths), (noise, starts))
        return env, lengths, seen

    def to_rows(params: dict[str, Params], seen: tuple[Array, ...]) -> Rows:
        obs, actions, following, fallen, done, _ = seen
        logits = mlp(params["actor"], obs, activation)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], 2)[..., 0]
        values = mlp(params["critic"], obs, activation)[..., 0]
        following_values = mlp(params["critic"], following, activation)[..., 0]
        # Every step is rewarded by 1.
        deltas = 1.0 + c.gamma * jnp.where(fallen, 0.0, following_values) - values

        def back(running: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            delta, more = at
            running = delta + c.gamma * c.gae_lambda * more * running
            return running, running

        _, advantages = lax.scan(back, jnp.zeros(num_envs), (deltas, 1.0 - done), reverse=True)
        rows = Rows(obs, actions, log_probs, advantages, advantages + values, values)
        return jax.tree.map(lambda x: x.reshape(batch_size, *x.shape[2:]), rows)

    def loss_of(params: dict[str, Params], rows: Rows, clip: Array) -> Array:
        """Mean loss of rows whose advantages are whitened."""
        log_policy = jax.nn.log_softmax(mlp(params["actor"], rows.obs, activation))
        log_probs = jnp.take_along_axis(log_policy, rows.actions[:, None], 1)[:, 0]
        entropy = -(jnp.exp(log_policy) * log_policy).sum(1).mean()
        ratio = jnp.exp(log_probs - rows.log_probs)
        limited = jnp.clip(ratio, 1 - clip, 1 + clip)
        advantages = rows.advantages
        policy_loss = jnp.maximum(-advantages * ratio, -advantages * limited).mean()
        values = mlp(params["critic"], rows.obs, activation)[:, 0]
        error = (values - rows.returns) ** 2
        if c.vf_clip_coef is not None:
            change = jnp.clip(values - rows.values, -c.vf_clip_coef, c.vf_clip_coef)
            error = jnp.maximum(error, (rows.values + change - rows.returns) ** 2)
        return policy_loss - c.ent_coef * entropy + c.vf_coef * 0.5 * error.mean()

    def gradients_of(params: dict[str, Params], rows: Rows, clip: Array) -> dict[str, Params]:
        if c.norm_adv == "minibatch":
            mean, deviation = rows.advantages.mean(), rows.advantages.std(ddof=1)
            rows = rows._replace(advantages=(rows.advantages - mean) / (deviation + 1e-8))
        if block_rows is None or minibatch_size <= block_rows:
            return jax.grad(loss_of)(params, rows, clip)

        blocks = minibatch_size // block_rows
        if blocks * block_rows != minibatch_size:
            raise ValueError(f"block_rows = {block_rows} does not divide {minibatch_size} rows")

        def add(total: dict[str, Params], block: Rows) -> tuple[dict[str, Params], None]:
            return jax.tree.map(jnp.add, total, jax.grad(loss_of)(params, block, clip)), None

        split = jax.tree.map(lambda x: x.reshape(blocks, block_rows, *x.shape[1:]), rows)
        total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, params), split)
        return jax.tree.map(lambda g: g / blocks, total)

    def adam(state: State, rows: Rows, rate: Array, clip: Array) -> State:
        gradients = gradients_of(state.params, rows, clip)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
        scale = jnp.minimum(1.0, c.max_grad_norm / (norm + 1e-6))
        steps = state.adam_steps + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * scale * g, state.first_moments, gradients)
        second = jax.tree.map(
            lambda v, g: 0.999 * v + 0.001 * (scale * g) ** 2, state.second_moments, gradients
        )
        mean, spread = 1 - 0.9**steps, 1 - 0.999**steps
        params = jax.tree.map(
            lambda p, m, v: p - rate * (m / mean) / (jnp.sqrt(v / spread) + c.adam_eps),
            state.params,
            first,
            second,
        )
        return state._replace(
            params=params, first_moments=first, second_moments=second, adam_steps=steps
        )

    def epoch(state: State, rows: Rows, rate: Array, clip: Array) -> State:
        key, mine = jax.random.split(state.key)
        bits = jax.random.bits(mine, (batch_size,))
        _, order = lax.sort((bits, jnp.arange(batch_size, dtype=jnp.int32)), num_keys=1)

        def one(state: State, index: Array) -> tuple[State, None]:
            taken = jax.tree.map(lambda x: x[index], rows)
            return adam(state, taken, rate, clip), None

        order = order.reshape(c.num_minibatches, minibatch_size)
        return lax.scan(one, state._replace(key=key), order)[0]

    def iteration(state: State, now: tuple[Array, Array]) -> tuple[State, tuple[Array, Array]]:
        key, mine = jax.random.split(state.key)
        env, lengths, seen = rollout(state._replace(key=mine))
        rows = to_rows(state.params, seen)
        state = state._replace(env=env, lengths=lengths, key=key)
        state, _ = lax.scan(
            lambda state, _: (epoch(state, rows, *now), None), state, length=c.update_epochs
        )
        return state, seen[-2:]

    return iteration


def build(env_id: str, config: ControlConfig, *, block_rows: int | None = None) -> Trainer:
    """Compile the loop, ahead of time.

    Args:
        env_id: CartPole-v1.
        config: its recipe.
        block_rows: sum up a larger minibatch's gradient in blocks of so many rows, whose activations
            stay in the cache; compiled loops do not usually do so.

    Raises:
        NotHere: an environment other than CartPole-v1.
    """
    if env_id != "CartPole-v1":
        raise NotHere("has CartPole's equations only")
    c = config
    batch_size = (c.num_envs or 8) * c.num_steps
    joined = max(1, ROWS_A_CALL // batch_size)
    iteration = make_iteration(c, block_rows)
    state = initial(c)

    @jax.jit
    def call(state: State, now: tuple[Array, Array]) -> tuple[State, tuple[Array, Array]]:
        return lax.scan(iteration, state, now)

    start = time.perf_counter()
    compiled = call.lower(state, (jnp.zeros(joined),) * 2).compile()
    compile_seconds = time.perf_counter() - start

    def train(total_timesteps: int, watch: Watch) -> Trained:
        nonlocal state
        iterations = -(-total_timesteps // batch_size)
        iterations = -(-iterations // joined) * joined  # whole calls
        returns: deque[float] = deque(maxlen=100)
        steps = 0
        for first in range(0, iterations, joined):
            left = 1.0 - np.arange(first, first + joined) / iterations
            constant = np.ones(joined)
            rates = c.learning_rate * (left if c.anneal_lr else constant)
            clips = c.clip_coef * (left if c.anneal_clip else constant)
            state, (done, lengths) = compiled(
                state, (rates.astype(np.float32), clips.astype(np.float32))
            )
            returns.extend(np.asarray(lengths)[np.asarray(done)].astype(float).tolist())
            steps += joined * batch_size
            if watch(steps, returns):
                break
        jax.block_until_ready(state)
        return Trained(steps, list(returns), {}, compile_seconds)

    return train
