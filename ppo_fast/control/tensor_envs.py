"""Gymnasium's classic control environments in torch: thousands at a time, on any device.

| id | class | Gymnasium's limit |
|---|---|---|
| CartPole-v1 | `TensorCartPole` | 500 |
| Pendulum-v1 | `TensorPendulum` | 200 |
| Acrobot-v1 | `TensorAcrobot` | 500 |
| MountainCar-v0 | `TensorMountainCar` | 200 |
| MountainCarContinuous-v0 | `TensorMountainCarContinuous` | 999 |

A step makes from the same state and action the same observation, reward and flags as Gymnasium's own,
up to the rounding of `dtype`; the time limit is part of it, resets have the same law. Equations and
constants are those of gymnasium.envs.classic_control 1.x.

State is kept as rows [R, N], one per variable, so that every operation runs over contiguous memory.
Constants are folded so that a step takes few operations: on a CPU with few environments, and on a GPU
always, their number is the cost. A step allocates nothing and never waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NoReturn

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

# Initial states are drawn for all environments once in so many steps. No episode that starts from a
# reset ends sooner, in any of the five, so no draw serves the same environment twice: a pole pushed
# one way from the worst corner falls at step 8; a car needs 13 steps at full speed; a torque of 1
# needs 24 steps to put 24.5 J into the acrobot; the pendulum never ends before its limit.
SHORTEST_EPISODE = 8

# Without a gap between rows, torch transposes [R, N] to [N, R] by blocks, which takes 2.5 times as long.
ROW_GAP = 16

# Rows count steps as floats, which are exact up to here in float32.
MAX_EPISODE_STEPS = 1 << 24


class TensorEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """N environments that step together in torch, with Gymnasium's vector interface.

    Observations are float32 [N, *shape], rewards [N] of `dtype`, flags [N] bool. Environments whose
    episode ends are reset within the step (SAME_STEP); `info["final_obs"]` is what every observation,
    [N, *shape], was before that, and `info["_final_obs"]` [N] bool tells whose episode ended. As
    under Gymnasium's `TimeLimit`, both flags may be set.

    The returned tensors are buffers that the next step or reset overwrites: copy what is kept longer.
    Writing into them changes nothing but themselves.

    Discrete actions are checked against their range: a ValueError on a CPU, a device-side assertion
    on a GPU. Continuous ones are clipped as Gymnasium clips them; NaN in an action makes a NaN state,
    as in Gymnasium, until the episode's end.

    To capture steps in a CUDA graph, call `begin_sequence()` right before the first, and register
    `generator` with the graph (`CUDAGraph.register_generator_state`).

    Args:
        num_envs: N.
        device: where everything lives.
        dtype: of the state and of rewards: float32, or float64 as in Gymnasium.
        max_episode_steps: the time limit; None takes Gymnasium's.

    Attributes:
        generator: draws initial states; on `device`, seeded by `reset(seed=...)`.

    Raises:
        TypeError: a number that is no integer.
        ValueError: `num_envs` or `max_episode_steps` out of range, or another dtype.
    """

    env_id: ClassVar[str]
    variables: ClassVar[int]
    """rows of the state that a reset sets; the last one counts the episode's steps"""

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_episode_steps: int | None = None,
    ) -> None:
        name = type(self).__name__
        self.spec = gym.spec(self.env_id)
        limit = self.spec.max_episode_steps if max_episode_steps is None else max_episode_steps
        for field, value in (("num_envs", num_envs), ("max_episode_steps", limit)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool):
                raise TypeError(f"{name}: {field} = {value!r}; expected an integer")
        if num_envs < 1:
            raise ValueError(f"{name}: num_envs = {num_envs}; expected at least 1")
        assert limit is not None  # checked with its type
        if not 1 <= limit <= MAX_EPISODE_STEPS:
            raise ValueError(
                f"{name}: max_episode_steps = {limit}; expected 1 to {MAX_EPISODE_STEPS}"
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: dtype = {dtype}; expected torch.float32 or torch.float64")
        self.num_envs = int(num_envs)
        self.max_episode_steps = int(limit)
        self.dtype = dtype
        self.single_observation_space, self.single_action_space = self._spaces()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._action_shape = (self.num_envs, *(self.single_action_space.shape or ()))
        self._action_dtypes: tuple[torch.dtype, ...] = (
            (torch.int64, torch.int32)
            if isinstance(self.single_action_space, spaces.Discrete)
            else (torch.float32, torch.float64)
        )
        self._window = min(SHORTEST_EPISODE, self.max_episode_steps)
        self._since_draw = 0
        self._started = False
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.device = torch.empty(0, device=device).device
            self.generator = torch.Generator(self.device)
            self.generator.seed()
            self._allocate()
            self._prepare()

    def _spaces(self) -> tuple[spaces.Box, spaces.Space]:
        """The spaces of Gymnasium's own environment."""
        env = gym.make(self.env_id).unwrapped
        assert isinstance(env.observation_space, spaces.Box)
        return env.observation_space, env.action_space

    def _allocate(self) -> None:
        observed = math.prod(self.single_observation_space.shape or ())
        # Rows beyond the variables are constants that some environments keep beside them.
        self._state, self._next = (self._rows(self.variables + 1, ROW_GAP) for _ in range(2))
        self._resets = self._rows(self.variables)
        self._reset_to = self._state[: self.variables]
        self._reset_from = self._next[: self.variables]
        self._observed = self._state[:observed].t()
        self._last_observed = self._next[:observed].t()
        self._obs = torch.zeros(self.num_envs, observed, device=self.device)
        self._final_obs = self._last_observed
        if self.dtype != torch.float32:
            self._final_obs = torch.zeros_like(self._obs)
        self._rewards = self._row()
        self._terminated, self._truncated, self._done = (
            torch.zeros(self.num_envs, dtype=torch.bool, device=self.device) for _ in range(3)
        )

    def _rows(self, count: int, gap: int = 0) -> Tensor:
        shape = (count, self.num_envs + gap)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)[:, : self.num_envs]

    def _row(self) -> Tensor:
        return torch.zeros(self.num_envs, dtype=self.dtype, device=self.device)

    def _constant(self, value: Any) -> Tensor:
        return torch.tensor(value, dtype=self.dtype, device=self.device)

    def _prepare(self) -> None:
        """Make the working memory of `_advance`: every view it needs, ready."""
        raise NotImplementedError

    def _draw(self) -> None:
        """Draw initial states for all environments into `_resets`; its last row stays 0."""
        raise NotImplementedError

    def _advance(self, actions: Tensor) -> None:
        """From `_state`, fill the variables of `_next`, `_rewards` and the three flags."""
        raise NotImplementedError

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes everywhere.

        Args:
            seed: of `generator`; None goes on with it as it is.
            options: none are known.

        Returns:
            The observations [N, *shape] and an empty dict.

        Raises:
            TypeError: a seed that is no integer.
            ValueError: a negative seed, or options.
        """
        name = type(self).__name__
        if options:
            raise ValueError(f"{name}.reset: options = {options!r}; expected none")
        if seed is not None:
            if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
                raise TypeError(f"{name}.reset: seed = {seed!r}; expected an integer or None")
            if seed < 0:
                raise ValueError(f"{name}.reset: seed = {seed}; expected at least 0")
            self.generator.manual_seed(int(seed))
        self._draw()
        self._reset_to.copy_(self._resets)
        self._obs.copy_(self._observed)
        self._started = True
        self.begin_sequence()
        return self._obs, {}

    def begin_sequence(self) -> None:
        """Have the next step draw initial states anew.

        Steps recorded from here on draw at the same places whenever they are replayed, and no draw
        is older than it may be.
        """
        self._since_draw = 0

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Step all environments, and reset those whose episode ends.

        Args:
            actions: [N] int64 or int32 for Discrete spaces, [N, *shape] float32 or float64 for Box.

        Returns:
            Observations, rewards, terminated, truncated and info; see the class.

        Raises:
            TypeError: `actions` is no tensor, or of another dtype.
            ValueError: of another shape or on another device, or on a CPU out of range.
            RuntimeError: `reset` was not called before.
        """
        if (
            not isinstance(actions, Tensor)
            or actions.shape != self._action_shape
            or actions.dtype not in self._action_dtypes
            or actions.device != self.device
        ):
            self._refuse(actions)
        if not self._started:
            raise RuntimeError(f"{type(self).__name__}: step before reset; call reset() first")
        if actions.requires_grad:
            actions = actions.detach()
        if self._since_draw == 0:
            self._draw()
        self._since_draw = (self._since_draw + 1) % self._window
        self._advance(actions)
        torch.where(self._done, self._resets, self._reset_from, out=self._reset_to)
        self._obs.copy_(self._observed)
        if self._final_obs is not self._last_observed:
            self._final_obs.copy_(self._last_observed)
        info = {"final_obs": self._final_obs, "_final_obs": self._done}
        return self._obs, self._rewards, self._terminated, self._truncated, info

    def _refuse(self, actions: Any) -> NoReturn:
        name = f"{type(self).__name__}.step: actions"
        dtypes = " or ".join(str(dtype) for dtype in self._action_dtypes)
        if not isinstance(actions, Tensor):
            raise TypeError(f"{name} is a {type(actions).__name__}; expected a tensor of {dtypes}")
        if actions.dtype not in self._action_dtypes:
            raise TypeError(f"{name} has dtype {actions.dtype}; expected {dtypes}")
        if actions.shape != self._action_shape:
            raise ValueError(
                f"{name} has shape {tuple(actions.shape)}; expected "
                f"[num_envs, *space.shape] = {self._action_shape}"
            )
        raise ValueError(f"{name} is on {actions.device}; expected {self.device}")

    def _look_up(self, table: Tensor, actions: Tensor, out: Tensor) -> None:
        """out = table[actions]; index_select checks the range on every device without a sync."""
        try:
            torch.index_select(table, 0, actions, out=out)
        except IndexError as error:
            low, high = int(actions.min()), int(actions.max())
            raise ValueError(
                f"{type(self).__name__}.step: actions lie in [{low}, {high}]; "
                f"expected 0 to {len(table) - 1}"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Everything the next steps depend on, copied: they go on bitwise after `load_state_dict`.

        "state" [R, N] and "resets" [R, N] (initial states drawn, not yet used) are the rows of the
        class, "generator" is the generator's state, "since_draw" the steps since the last draw.
        """
        return {
            "env_id": self.env_id,
            "max_episode_steps": self.max_episode_steps,
            "started": self._started,
            "since_draw": self._since_draw,
            "state": self._reset_to.clone(),
            "resets": self._resets.clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, of this or another device.

        A generator's state does not fit a device of another kind; there the seed stays and new
        initial states are drawn, so the continuation has the same law but not the same bits.

        Raises:
            ValueError: the state of another environment, of another number of them, of another
                dtype or of another time limit.
        """
        name = f"{type(self).__name__}.load_state_dict"
        for key in ("env_id", "max_episode_steps"):
            if state.get(key) != getattr(self, key):
                raise ValueError(
                    f"{name}: the state has {key} = {state.get(key)!r}; "
                    f"expected {getattr(self, key)!r}"
                )
        for key, rows in (("state", self._reset_to), ("resets", self._resets)):
            saved = state[key]
            if saved.shape != rows.shape or saved.dtype != rows.dtype:
                raise ValueError(
                    f"{name}: {key!r} has shape {tuple(saved.shape)} and dtype {saved.dtype}; "
                    f"expected {tuple(rows.shape)}, {rows.dtype}"
                )
            rows.copy_(saved)
        self._obs.copy_(self._observed)
        self._since_draw, self._started = int(state["since_draw"]), bool(state["started"])
        if state["generator"].shape == self.generator.get_state().shape:
            self.generator.set_state(state["generator"].cpu())
        else:
            self.begin_sequence()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made from: the views of a pickled tensor no longer share its memory."""
        settings = {
            "num_envs": self.num_envs,
            "device": self.device,
            "dtype": self.dtype,
            "max_episode_steps": self.max_episode_steps,
        }
        return {"settings": settings, "state": self.state_dict()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """Make a copy; see `__getstate__`."""
        TensorEnv.__init__(self, **saved["settings"])
        self.load_state_dict(saved["state"])


class TensorCartPole(TensorEnv):
    """CartPole-v1 (Barto, Sutton and Anderson 1983): actions 0 and 1 push left and right.

    Rows: x, x_dot, theta, theta_dot, steps.
    """

    env_id = "CartPole-v1"
    variables = 5
    gravity, masspole, length, force, tau = 9.8, 0.1, 0.5, 10.0, 0.02
    total_mass = 1.1
    x_limit, theta_limit = 2.4, 12 * 2 * math.pi / 360

    def _prepare(self) -> None:
        state, new = self._state, self._next
        # Steps pass at a rate of 1/tau: Euler's rule counts them with the rows 0 and 2.
        state[5] = 1 / self.tau
        limits = (self.x_limit, self.theta_limit, self.max_episode_steps - 1)
        self._limits = self._constant([_down(limit, self.dtype) for limit in limits])[:, None]
        push = self.force / (self.total_mass * self.gravity)
        self._table = self._constant([-push, push])
        self._denominator = self._constant(self.length * 4 / 3)
        magnitudes, accelerations = self._rows(3), self._rows(2)
        over = torch.zeros(3, self.num_envs, dtype=torch.bool, device=self.device)
        self._truncated = over[2]
        self._views = (
            (state[2], state[3], state[0:6:2], state[1:6:2], state[1:4:2]),
            (new[0:5:2], new[1:4:2]),
            (magnitudes, over, over[0], over[1]),
            (accelerations, accelerations[0], accelerations[1]),
            tuple(self._row() for _ in range(5)),
        )

    def _draw(self) -> None:
        self._resets[:4].uniform_(-0.05, 0.05, generator=self.generator)

    def _advance(self, actions: Tensor) -> None:
        (theta, theta_dot, position, velocity_rate, velocity), (new_position, new_velocity) = (
            self._views[0],
            self._views[1],
        )
        magnitudes, over, over_x, over_theta = self._views[2]
        accelerations, x_acc, theta_acc = self._views[3]
        sin, cos, push, temp, work = self._views[4]
        pole = self.masspole * self.length / self.total_mass
        # All accelerations are divided by gravity, which the last product puts back.
        torch.sin(theta, out=sin)
        torch.cos(theta, out=cos)
        self._look_up(self._table, actions, push)
        torch.mul(theta_dot, sin, out=work)
        torch.addcmul(push, theta_dot, work, value=pole / self.gravity, out=temp)
        torch.addcmul(sin, cos, temp, value=-1.0, out=theta_acc)
        torch.addcmul(self._denominator, cos, cos, value=-pole, out=work)
        theta_acc.div_(work)
        torch.addcmul(temp, theta_acc, cos, value=-pole, out=x_acc)
        torch.add(position, velocity_rate, alpha=self.tau, out=new_position)
        torch.add(velocity, accelerations, alpha=self.tau * self.gravity, out=new_velocity)
        torch.abs(new_position, out=magnitudes)
        torch.gt(magnitudes, self._limits, out=over)
        torch.bitwise_or(over_x, over_theta, out=self._terminated)
        torch.bitwise_or(self._terminated, self._truncated, out=self._done)
        self._rewards.fill_(1.0)


class TensorPendulum(TensorEnv):
    """Pendulum-v1: swing up a pendulum by a torque [N, 1], clipped to +-2.

    Rows: cos(theta), sin(theta), theta_dot, steps. The angle itself is the rows' arctangent, which is
    already normalised, and as exact after many turns as at the start.
    """

    env_id = "Pendulum-v1"
    variables = 4

    def _prepare(self) -> None:
        state, new = self._state, self._next
        self._zero, self._one = self._constant(0.0), self._constant(1.0)
        self._limit = self._constant(self.max_episode_steps - 1)
        # Only the time limit ends an episode.
        self._done = self._truncated
        torque = self._row()
        self._views = (
            state.unbind(0),
            new.unbind(0),
            (self._row(), torque, torque[:, None]),
        )

    def _draw(self) -> None:
        cos, sin, speed = self._resets[:3].unbind(0)
        sin.uniform_(-math.pi, math.pi, generator=self.generator)
        torch.cos(sin, out=cos)
        sin.sin_()
        speed.uniform_(-1.0, 1.0, generator=self.generator)

    def _advance(self, actions: Tensor) -> None:
        (cos, sin, speed, steps, _), new, (angle, torque, torque_column) = self._views
        new_cos, new_sin, new_speed, new_steps, _ = new
        torch.atan2(sin, cos, out=angle)
        if actions.dtype == self.dtype:
            torch.clamp(actions, -2.0, 2.0, out=torque_column)
        else:
            torque_column.copy_(actions).clamp_(-2.0, 2.0)
        torch.addcmul(self._zero, angle, angle, value=-1.0, out=self._rewards)
        self._rewards.addcmul_(speed, speed, value=-0.1)
        self._rewards.addcmul_(torque, torque, value=-0.001)
        # g = 10, l = m = 1, dt = 0.05: 3 g / (2 l) dt = 0.75, 3 / (m l^2) dt = 0.15
        torch.add(speed, sin, alpha=0.75, out=new_speed)
        new_speed.add_(torque, alpha=0.15).clamp_(-8.0, 8.0)
        angle.add_(new_speed, alpha=0.05)
        torch.cos(angle, out=new_cos)
        torch.sin(angle, out=new_sin)
        torch.add(steps, self._one, out=new_steps)
        torch.gt(new_steps, self._limit, out=self._truncated)
        self._terminated.zero_()


class TensorAcrobot(TensorEnv):
    """Acrobot-v1 (Sutton 1996, dynamics of Sutton and Barto's book): torques -1, 0, 1 on the joint.

    Rows: cos and sin of theta1, of theta2, their speeds, theta1, theta2, steps.
    """

    env_id = "Acrobot-v1"
    variables = 9
    dt = 0.2
    gravity = 4.9
    """m l_c g: of one link's centre of mass about its joint"""
    scale = 1.25 * 4.9
    """what the equations of `_accelerate` are divided by"""

    def _prepare(self) -> None:
        state, new = self._state, self._next
        self._table = self._constant([1.0 / self.scale, 0.0, -1.0 / self.scale])
        self._determinant = self._constant(-2.8125 / self.scale)
        self._inertia = self._constant(2.5)
        self._one, self._zero = self._constant(1.0), self._constant(0.0)
        self._minus_one = self._constant(-1.0)
        self._limit = self._constant(self.max_episode_steps - 1)
        self._per_turn = self._constant(1 / (2 * math.pi))
        self._max_speed = self._constant([[4 * math.pi], [9 * math.pi]])
        self._min_speed = -self._max_speed
        # A stage of Runge and Kutta: accelerations, speeds, angles, the angles' sum. Its derivative is
        # the same memory two rows up.
        self._stages = [self._stage_views(self._rows(7)) for _ in range(4)]
        sines, scratch, turns = self._rows(3), self._rows(6), self._rows(2)
        self._work = (sines, *sines.unbind(0), *scratch.unbind(0))
        self._views = (
            (state[4:8], state[8]),
            (new[4:8], new[4:6], new[6:8], new[0:4:2], new[1:4:2]),
            (new[0], new[6], new[7], new[8]),
            (self._rows(4), turns, self._row()),
        )

    def _stage_views(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows[0:4], rows[2:6], rows[0:2], rows[4:7], *rows.unbind(0)

    def _draw(self) -> None:
        resets = self._resets
        resets[4:8].uniform_(-0.1, 0.1, generator=self.generator)
        torch.cos(resets[6:8], out=resets[0:4:2])
        torch.sin(resets[6:8], out=resets[1:4:2])

    def _accelerate(self, stage: tuple[Tensor, ...], torque: Tensor) -> None:
        """Fill a stage's accelerations from its speeds w1, w2 and angles.

        Gymnasium's ddtheta solve [[d1, d2], [d2, 1.25]] ddtheta = [-phi1, rest] with
        d1 = 3.5 + c, d2 = (2.5 + c) / 2, c = cos(theta2), determinant 2.8125 - c^2 / 4, and s the sines:
        phi1 = 14.7 s1 + 4.9 s12 - s2 w2 (w2 + 2 w1) / 2, rest = torque - 4.9 s12 - s2 w1^2 / 2.
        Here first = phi1 / 4.9 and second = -rest / 6.125, so that one division serves both.
        """
        _, _, accelerations, angles, acc1, acc2, w1, w2, theta1, theta2, theta12 = stage
        sines, s1, s2, s12, cos, first, second, inertia, determinant, work = self._work
        torch.add(theta1, theta2, out=theta12)
        torch.sin(angles, out=sines)
        torch.cos(theta2, out=cos)
        torch.mul(w1, s2, out=work)
        torch.addcmul(torque, w1, work, value=0.5 / self.scale, out=second)
        second.add_(s12, alpha=self.gravity / self.scale)
        torch.add(w2, w1, alpha=2.0, out=work)
        work.mul_(w2)
        torch.add(s12, s1, alpha=3.0, out=first)
        first.addcmul_(s2, work, value=-0.5 / self.gravity)
        torch.addcmul(self._determinant, cos, cos, value=0.25 / self.scale, out=determinant)
        torch.add(cos, self._inertia, out=inertia)
        torch.add(second, first, alpha=-0.4, out=work)
        torch.addcmul(second, inertia, work, out=acc2)
        torch.addcmul(first, inertia, second, value=-0.5, out=acc1)
        accelerations.div_(determinant)

    def _advance(self, actions: Tensor) -> None:
        (moving, steps), (new_moving, new_speeds, new_angles, new_cos, new_sin) = (
            self._views[0],
            self._views[1],
        )
        new_cos1, new_theta1, new_theta2, new_steps = self._views[2]
        slope, turns, torque = self._views[3]
        one, two, three, four = self._stages
        self._look_up(self._table, actions, torque)
        one[1].copy_(moving)
        self._accelerate(one, torque)
        torch.add(moving, one[0], alpha=self.dt / 2, out=two[1])
        self._accelerate(two, torque)
        torch.add(moving, two[0], alpha=self.dt / 2, out=three[1])
        self._accelerate(three, torque)
        torch.add(moving, three[0], alpha=self.dt, out=four[1])
        self._accelerate(four, torque)
        torch.add(two[0], three[0], out=slope)
        torch.add(one[0], slope, alpha=2.0, out=slope)
        slope.add_(four[0])
        torch.add(moving, slope, alpha=self.dt / 6, out=new_moving)
        torch.mul(new_angles, self._per_turn, out=turns)
        turns.round_()
        new_angles.add_(turns, alpha=-2 * math.pi)
        torch.clamp(new_speeds, self._min_speed, self._max_speed, out=new_speeds)
        torch.cos(new_angles, out=new_cos)
        torch.sin(new_angles, out=new_sin)
        # Above the line: -cos(theta1) - cos(theta1 + theta2) > 1
        torch.add(new_theta1, new_theta2, out=torque)
        torque.cos_().add_(new_cos1)
        torch.lt(torque, self._minus_one, out=self._terminated)
        torch.add(steps, self._one, out=new_steps)
        torch.gt(new_steps, self._limit, out=self._truncated)
        torch.bitwise_or(self._terminated, self._truncated, out=self._done)
        torch.where(self._terminated, self._zero, self._minus_one, out=self._rewards)


class TensorMountainCar(TensorEnv):
    """MountainCar-v0 (Moore 1990): actions 0, 1, 2 push left, not at all, right.

    Rows: position, velocity, steps.
    """

    env_id = "MountainCar-v0"
    variables = 3
    goal = 0.5

    def _prepare(self) -> None:
        state, new = self._state, self._next
        # Steps pass at a rate of 1: one addition moves the car and counts.
        new[3] = 1.0
        # Reached: the goal, not on the way back, and the time limit.
        self._limits = self._constant([[self.goal], [0.0], [self.max_episode_steps]])
        self._table = self._constant([-0.001, 0.0, 0.001])
        self._three, self._wall = self._constant(3.0), self._constant(-1.2)
        self._zero, self._hundred = self._constant(0.0), self._constant(100.0)
        reached = torch.zeros(3, self.num_envs, dtype=torch.bool, device=self.device)
        self._truncated = reached[2]
        force = self._row()
        self._force, self._force_column = force, force[:, None]
        self._views = (
            (state[0], state[1], state[0:3:2]),
            (new[0], new[1], new[0:3:2], new[1:4:2], new[0:3]),
            (reached, reached[0], reached[1]),
            (self._row(), torch.zeros_like(self._done)),
        )

    def _draw(self) -> None:
        self._resets[0].uniform_(-0.6, -0.4, generator=self.generator)

    def _move(self, force_scale: float) -> None:
        """Move every car by `_force` times `force_scale`, and set the flags."""
        (position, velocity, counted), new, (reached, at_goal, forwards), work = self._views
        new_position, new_velocity, new_counted, rates, new_rows = new
        slope, stopped = work
        torch.mul(position, self._three, out=slope)
        slope.cos_()
        torch.add(velocity, self._force, alpha=force_scale, out=new_velocity)
        new_velocity.add_(slope, alpha=-0.0025).clamp_(-0.07, 0.07)
        torch.add(counted, rates, out=new_counted)
        # At the left wall the car stops; it only gets there moving left.
        torch.le(new_position, self._wall, out=stopped)
        new_velocity.masked_fill_(stopped, 0.0)
        new_position.clamp_(-1.2, 0.6)
        torch.ge(new_rows, self._limits, out=reached)
        torch.bitwise_and(at_goal, forwards, out=self._terminated)
        torch.bitwise_or(self._terminated, self._truncated, out=self._done)

    def _advance(self, actions: Tensor) -> None:
        self._look_up(self._table, actions, self._force)
        self._move(1.0)
        self._rewards.fill_(-1.0)


class TensorMountainCarContinuous(TensorMountainCar):
    """MountainCarContinuous-v0: a force [N, 1], clipped to +-1; its square is charged unclipped.

    Rows: as `TensorMountainCar`. Gymnasium rounds this state to float32 after every step.
    """

    env_id = "MountainCarContinuous-v0"
    goal = 0.45

    def _advance(self, actions: Tensor) -> None:
        force = self._force
        self._force_column.copy_(actions)
        torch.addcmul(self._zero, force, force, value=-0.1, out=self._rewards)
        force.clamp_(-1.0, 1.0)
        self._move(0.0015)
        prize = torch.where(self._terminated, self._hundred, self._zero, out=force)
        self._rewards.add_(prize)


TENSOR_ENVS: dict[str, type[TensorEnv]] = {
    cls.env_id: cls
    for cls in (
        TensorCartPole,
        TensorPendulum,
        TensorAcrobot,
        TensorMountainCar,
        TensorMountainCarContinuous,
    )
}


def make_tensor_env(env_id: str, num_envs: int, **options: Any) -> TensorEnv:
    """Make the tensor environment of a Gymnasium id; `options` as in `TensorEnv`.

    Raises:
        ValueError: an id without a tensor version.
    """
    if env_id not in TENSOR_ENVS:
        raise ValueError(
            f"environment id {env_id!r} has no tensor version; expected one of "
            f"{', '.join(TENSOR_ENVS)}"
        )
    return TENSOR_ENVS[env_id](num_envs, **options)


def _down(limit: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` not above `limit`: x > limit says the same of it."""
    if dtype == torch.float64:
        return limit
    rounded = np.float32(limit)
    # Compared as it is, a Python number would first be rounded to float32 as well.
    above = float(rounded) > limit
    return float(np.nextafter(rounded, np.float32(-np.inf)) if above else rounded)
