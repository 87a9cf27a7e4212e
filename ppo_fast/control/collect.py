"""Environments -> Rollout: step the environments with a fixed policy, then score the rows once.

During a rollout the policy does not change, so a step runs only the actor; values and old
log-probabilities of all rows come from one batched pass afterwards (unless actor and critic share
convolutions: then a step runs both). Actions are picked with noise drawn beforehand for the whole
rollout.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from ppo_fast.capture import Phase, may_read
from ppo_fast.control.actor import make_actor
from ppo_fast.control.envs import Environments, Step
from ppo_fast.control.normalize import ObservationNormalizer, RewardNormalizer
from ppo_fast.control.precision import Autocast
from ppo_fast.control.spaces import allocate
from ppo_fast.distributions import Categorical, DiagGaussian
from ppo_fast.models import critic_of
from ppo_fast.profiling import ranged
from ppo_fast.rollout import Rollout
from ppo_fast.tree import Tree, tree_cat, tree_copy, tree_leaves, tree_map, tree_rows, tree_unbind

# Rows of a batched pass are chunked to about this many elements of their widest layer, which stay in
# cache; on a GPU they need only fit its memory.
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 17, 1 << 26


class Collector:
    """Fills one preallocated `Rollout` again and again.

    Args:
        envs: where to act.
        policy: see `ppo_fast.models`; on `device`, perhaps `in_precision`.
        distribution: of the environments' action space.
        num_steps: T.
        device: where the rollout and the policy live.
        generator: draws action noise; on `device`.
        obs_normalizers: by leaf path; leaves without one are stored as they come.
        reward_normalizer: or None.

    Attributes:
        rollout: overwritten by every `collect`.
        raw_rewards: [T, N] numpy, before normalisation, for statistics.
        seconds: of the last `collect`, by stage.
    """

    def __init__(
        self,
        envs: Environments,
        policy: Any,
        distribution: Categorical | DiagGaussian,
        num_steps: int,
        device: torch.device,
        generator: torch.Generator,
        obs_normalizers: dict[str, ObservationNormalizer],
        reward_normalizer: RewardNormalizer | None,
    ) -> None:
        self.envs = envs
        self.policy = policy
        self.distribution = distribution
        self.device = device
        self.generator = generator
        self.obs_normalizers = obs_normalizers
        self.reward_normalizer = reward_normalizer
        self.seconds: dict[str, float] = {}
        steps, width = num_steps, envs.num_envs
        self.num_steps = steps
        module = policy.policy if isinstance(policy, Autocast) else policy
        self._widest = max((p.shape[0] for p in module.parameters() if p.ndim), default=1)
        action_shape = distribution.action_shape
        self.rollout = Rollout(
            inputs=allocate(envs.leaves, (steps + 1, width), device),
            actions=torch.zeros(
                steps, width, *action_shape, dtype=distribution.action_dtype, device=device
            ),
            rewards=torch.zeros(steps, width, device=device),
            terminated=torch.zeros(steps, width, dtype=torch.bool, device=device),
            truncated=torch.zeros(steps, width, dtype=torch.bool, device=device),
            mask=torch.ones(steps, width, dtype=torch.bool, device=device),
            values=torch.zeros(steps + 1, width, device=device),
            bootstrap_values=torch.zeros(steps, width, device=device),
            log_probs=torch.zeros(steps, width, device=device),
        )
        self._actor = make_actor(policy, distribution, self.rollout)
        self._input_rows = tree_unbind(self.rollout.inputs)
        # Last observations of all environments at every step: only where picking the truncated ones
        # would wait for a GPU.
        self._dense_finals: Tree | None = None
        self._dense_rows: list[Tree] = []
        generators = [generator, *([envs.env.generator] if envs.capturable else [])]
        self._phase = Phase("rollout", self._step_and_score, device, generators)
        self._staged = False
        self._ignored: Any = None
        self.raw_rewards = np.zeros((steps, width), np.float32)

    def start(self, seed: int | None) -> None:
        """Reset the environments and put their first observations where `collect` begins."""
        obs = self.envs.reset(seed)
        self._stage()
        if self.envs.mode == AutoresetMode.NEXT_STEP:
            zeros = np.zeros(self.envs.num_envs, bool)
            self._ignored = (
                torch.from_numpy(zeros).to(self.device) if self.envs.on_device else zeros
            )
        self._store_observation(obs, self.num_steps, self._ignored)
        action_mask = self.envs.action_masks()
        if action_mask is not None:
            self._expect_action_mask(action_mask)

    def tensors(self) -> dict[str, Tensor]:
        """What the next rollout begins with, by checkpoint name."""
        rows = tree_leaves(self.rollout.inputs)
        state = {f"collector.obs.{path}": leaf[self.num_steps] for path, leaf in rows}
        if self._ignored is not None:
            state["collector.ignored"] = torch.as_tensor(self._ignored)
        action_mask = self.envs.action_masks()
        if action_mask is not None:
            state["collector.action_mask"] = torch.as_tensor(action_mask)
        return state

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Begin the next rollout with what `tensors` saved; call after `start`."""
        for path, leaf in tree_leaves(self.rollout.inputs):
            leaf[self.num_steps].copy_(tensors[f"collector.obs.{path}"])
        if self._ignored is not None:
            self._ignored = self._as_told(tensors["collector.ignored"])
        if "collector.action_mask" in tensors:
            self.envs.info = {"action_mask": self._as_told(tensors["collector.action_mask"])}

    def _as_told(self, saved: Tensor) -> Any:
        return saved.to(self.device) if self.envs.on_device else saved.numpy()

    def _stage(self) -> None:
        """Choose where a step's rewards and flags are written.

        numpy environments write into host arrays: the rollout's own memory on a CPU, staging arrays
        copied once per rollout otherwise. Tensor environments write into the rollout.
        """
        r = self.rollout
        columns = {
            "rewards": r.rewards,
            "terminated": r.terminated,
            "truncated": r.truncated,
            "mask": r.mask,
        }
        if self.envs.on_device:
            self._columns: dict[str, Any] = {
                name: column.unbind(0) for name, column in columns.items()
            }
        elif self.device.type == "cpu":
            self._columns = {name: column.numpy() for name, column in columns.items()}
        else:
            self._columns = {name: column.cpu().numpy() for name, column in columns.items()}
            self._staged = True

    def _expect_action_mask(self, mask: Any) -> None:
        if not isinstance(self.distribution, Categorical):
            raise ValueError("the environment gives action masks, but its actions are continuous")
        expected = (self.envs.num_envs, self.distribution.num_outputs)
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"action mask has shape {tuple(mask.shape)}; expected [num_envs, sum of choices] = {expected}"
            )
        self.rollout.action_mask = torch.ones(
            self.num_steps, *expected, dtype=torch.bool, device=self.device
        )

    @torch.no_grad()
    def collect(self) -> Rollout:
        """Step T times and return the rollout, scored.

        Raises:
            ValueError: an observation or a reward is NaN or infinite, or an action mask forbids all.
            FloatingPointError: the policy chose NaN or infinite actions.
        """
        r = self.rollout
        r.all_valid = self.envs.mode != AutoresetMode.NEXT_STEP
        self._acting = self._stepping = self._scoring = 0.0
        started = time.perf_counter()
        if self.envs.capturable:
            self._phase()
        else:
            self._step_and_score()
        self._check_finite()
        self.raw_rewards = r.rewards.cpu().numpy().copy()
        if self.reward_normalizer is not None:
            done = r.terminated | r.truncated
            mask = None if r.all_valid else r.mask
            r.rewards.copy_(self.reward_normalizer.normalize(r.rewards, done, mask))
        self.seconds = {
            "inference": self._acting + self._scoring,
            "environment": self._stepping,
            "storing": time.perf_counter()
            - started
            - self._acting
            - self._stepping
            - self._scoring,
        }
        return r

    def _step_and_score(self) -> None:
        """Fill the rollout; on tensor environments without ever waiting for the device."""
        steps = self.num_steps
        tree_copy(self._input_rows[0], self._input_rows[steps])
        shape = (steps, self.envs.num_envs)
        self._actor.begin(self.distribution.noise(shape, self.device, self.generator))
        finals: list[tuple[int, Tree, Any]] = []
        if self.envs.capturable:
            self._step_tensors(finals)
        else:
            self._step_any(finals)
        self._finish_columns()
        before = time.perf_counter()
        ranged("rollout/inference", self._score)(finals)
        self._scoring = time.perf_counter() - before

    def _step_tensors(self, finals: list[tuple[int, Tree, Any]]) -> None:
        """Step a `TensorEnv`, whose shapes and dtypes need no asking."""
        env, to_env = self.envs.env, self.distribution.to_env
        env.begin_sequence()
        rewards, terminated, truncated = (
            self._columns[name] for name in ("rewards", "terminated", "truncated")
        )
        clock = time.perf_counter
        act = ranged("rollout/inference", self._actor.act)
        step_envs = ranged("rollout/environment", env.step)
        acting = stepping = 0.0
        for t in range(self.num_steps):
            before = clock()
            actions = to_env(act(t, self._input_rows[t], None))
            acted = clock()
            obs, reward, over, cut, info = step_envs(actions)
            stepped = clock()
            acting += acted - before
            stepping += stepped - acted
            rewards[t].copy_(reward)
            terminated[t].copy_(over)
            truncated[t].copy_(cut)
            self._store_observation(obs, t + 1, None)
            self._keep_finals(t, info["final_obs"], over, cut, finals)
        self._acting, self._stepping = acting, stepping

    def _step_any(self, finals: list[tuple[int, Tree, Any]]) -> None:
        clock = time.perf_counter
        act = ranged("rollout/inference", self._act)
        step_envs = ranged("rollout/environment", self.envs.step)
        acting = stepping = 0.0
        for t in range(self.num_steps):
            before = clock()
            env_actions = act(t)
            acted = clock()
            step = step_envs(env_actions)
            stepped = clock()
            acting += acted - before
            stepping += stepped - acted
            self._store(t, step, finals)
        self._acting, self._stepping = acting, stepping

    def _act(self, t: int) -> Any:
        actions = self._actor.act(t, self._input_rows[t], self._action_mask(t))
        actions = self.distribution.to_env(actions)
        if self.envs.on_device:
            return actions
        # A copy: environments may keep their actions, and the rollout's memory is used again.
        return (actions if actions.is_cpu else actions.cpu()).numpy().copy()

    def _action_mask(self, t: int) -> Tensor | None:
        told = self.envs.action_masks()
        if told is not None and self.rollout.action_mask is None:
            self._expect_action_mask(told)
        if self.rollout.action_mask is None:
            return None
        mask = self.rollout.action_mask[t]
        if told is None:
            return mask.fill_(True)
        mask.copy_(torch.as_tensor(told))
        if may_read(self.device):
            self._check_action_mask(mask.unsqueeze(0), t)
        return mask

    def _check_action_mask(self, mask: Tensor, first_step: int) -> None:
        for head in mask.split(self.distribution.head_sizes, -1):  # type: ignore[union-attr]
            stuck = ~head.any(-1)
            if stuck.any():
                step, env = stuck.nonzero()[0].tolist()
                raise ValueError(
                    f"environment {env} forbids every action at step {first_step + step} of the "
                    "rollout: its action mask is all False"
                )

    def _store(self, t: int, step: Step, finals: list[tuple[int, Tree, Any]]) -> None:
        columns = self._columns
        if self.envs.on_device:
            columns["rewards"][t].copy_(step.rewards)
            columns["terminated"][t].copy_(step.terminated)
            columns["truncated"][t].copy_(step.truncated)
        else:
            columns["rewards"][t] = step.rewards
            columns["terminated"][t] = step.terminated
            columns["truncated"][t] = step.truncated
        if step.ignored is not None:
            if self.envs.on_device:
                torch.logical_not(self._ignored, out=columns["mask"][t])
            else:
                columns["mask"][t] = ~self._ignored
            self._ignored = step.ignored
        self._store_observation(step.obs, t + 1, step.ignored)
        if step.final_obs is None:
            return
        if step.final_index is not None:
            finals.append((t, self._normalized(step.final_obs), step.final_index))
        else:
            self._keep_finals(t, step.final_obs, step.terminated, step.truncated, finals)

    def _keep_finals(
        self,
        t: int,
        final_obs: Any,
        terminated: Tensor,
        truncated: Tensor,
        finals: list[tuple[int, Tree, Any]],
    ) -> None:
        """Keep the last observations of truncated episodes, of all environments' `final_obs`."""
        if not may_read(self.device):
            self._store_dense_final(t, self._normalized(final_obs))
        elif truncated.any():
            index = (truncated & ~terminated).nonzero().squeeze(1)
            if len(index):
                finals.append((t, tree_rows(self._normalized(final_obs), index), index))

    def _store_dense_final(self, t: int, final: Tree) -> None:
        if self._dense_finals is None:
            self._dense_finals = tree_map(
                lambda leaf: leaf.new_zeros(self.num_steps, *leaf.shape), final
            )
            self._dense_rows = tree_unbind(self._dense_finals)
        tree_copy(self._dense_rows[t], final)

    def _normalized(self, obs: Any) -> Tree:
        if self.envs.capturable and not self.obs_normalizers:
            return obs
        named = obs if isinstance(obs, dict) else {"": obs}
        leaves = {}
        for path, like in tree_leaves(self.rollout.inputs):
            leaf = _tensor(named[path]).to(device=like.device, dtype=like.dtype)
            normalizer = self.obs_normalizers.get(path)
            leaves[path] = leaf if normalizer is None else _visibly(normalizer, leaf)
        return leaves[""] if "" in leaves else leaves

    def _store_observation(self, obs: Any, row: int, ignored: Any) -> None:
        if self.envs.capturable and not self.obs_normalizers:
            tree_copy(self._input_rows[row], obs)
            return
        named = obs if isinstance(obs, dict) else {"": obs}
        valid = None
        if self.obs_normalizers and ignored is not None:
            # An observation no action answers is left out of the statistics in every mode alike.
            valid = ~torch.as_tensor(ignored, device=self.device)
        for path, stored in tree_leaves(self._input_rows[row]):
            normalizer = self.obs_normalizers.get(path)
            if (
                normalizer is not None
                and valid is None
                and may_read(self.device)
                and normalizer.step_on_host(_array(named[path]), stored.numpy())
            ):
                continue
            leaf = _tensor(named[path])
            if normalizer is not None:
                counted = valid
                if not may_read(leaf.device) or not leaf.isfinite().all():
                    finite = leaf.isfinite().view(leaf.shape[0], -1).all(1).to(self.device)
                    counted = finite if valid is None else finite & valid
                leaf = leaf.to(device=self.device, dtype=stored.dtype)
                normalizer.update(leaf, counted)
                leaf = normalizer(leaf) if counted is valid else _visibly(normalizer, leaf)
            stored.copy_(leaf)

    def _finish_columns(self) -> None:
        r = self.rollout
        if self._staged:
            for name, column in self._columns.items():
                getattr(r, name).copy_(torch.from_numpy(column))
        if not self.envs.on_device:
            r.all_valid = bool(self._columns["mask"].all())

    def _score(self, finals: list[tuple[int, Tree, Any]]) -> None:
        """Values of all rows, log-probabilities of the taken actions, and bootstrap values."""
        r = self.rollout
        steps, width = self.num_steps, self.envs.num_envs
        rows = steps * width
        flat = tree_map(lambda leaf: leaf.flatten(0, 1), r.inputs)
        actions = r.actions.flatten(0, 1)
        action_mask = None if r.action_mask is None else r.action_mask.flatten(0, 1)
        values, log_probs = r.values.view(-1), r.log_probs.view(-1)
        chunk = self._chunk_rows()
        for start in range(0, 0 if self._actor.also_scores else rows, chunk):
            part = slice(start, min(start + chunk, rows))
            parameters, part_values = self.policy(tree_rows(flat, part))
            values[part] = part_values.reshape(-1)
            mask = None if action_mask is None else action_mask[part]
            log_probs[part] = self.distribution.log_probs(parameters, actions[part], mask)
        values[rows:] = critic_of(self.policy, tree_rows(flat, slice(rows, None)))
        if self.envs.mode == AutoresetMode.NEXT_STEP:
            # Where an episode ended, the next row still holds its last observation.
            r.bootstrap_values.copy_(r.values[1:])
        elif self.envs.approximate_truncation:
            r.bootstrap_values.copy_(r.values[:-1])
        elif self._dense_finals is not None:
            self._score_dense_finals(self._dense_finals, chunk)
        elif finals:
            self._score_finals(finals, chunk)

    def _score_dense_finals(self, finals: Tree, chunk: int) -> None:
        r = self.rollout
        obs = tree_map(lambda leaf: leaf.flatten(0, 1), finals)
        bootstrap = r.bootstrap_values.view(-1)
        for start in range(0, len(bootstrap), chunk):
            part = slice(start, start + chunk)
            bootstrap[part] = self._final_values(tree_rows(obs, part))

    def _score_finals(self, finals: list[tuple[int, Tree, Any]], chunk: int) -> None:
        where = torch.cat([torch.full((len(index),), t) for t, _, index in finals])
        who = torch.cat([torch.as_tensor(index) for _, _, index in finals])
        obs = tree_cat([final for _, final, _ in finals])
        parts = [
            self._final_values(tree_rows(obs, slice(start, start + chunk)))
            for start in range(0, len(where), chunk)
        ]
        self.rollout.bootstrap_values[where.to(self.device), who.to(self.device)] = torch.cat(parts)

    def _final_values(self, obs: Tree) -> Tensor:
        """Values [K] of last observations, NaN where one is not finite."""
        values = critic_of(self.policy, obs)
        for _, leaf in tree_leaves(obs):
            if leaf.is_floating_point():
                values = values + (leaf - leaf).reshape(len(leaf), -1).sum(1)
        return values

    def _chunk_rows(self) -> int:
        inputs = sum(math.prod(leaf.shape[2:]) for _, leaf in tree_leaves(self.rollout.inputs))
        elements = CHUNK_ELEMENTS if self.device.type == "cpu" else GPU_CHUNK_ELEMENTS
        return max(self.envs.num_envs, elements // max(self._widest, inputs))

    def _check_finite(self) -> None:
        """Refuse NaN and infinity before anything learns from them, and name their source.

        Waits for a GPU once.
        """
        r = self.rollout
        columns = {"action": r.actions}
        columns |= {f"observation {path}".strip(): leaf for path, leaf in tree_leaves(r.inputs)}
        columns["reward"] = r.rewards if r.all_valid else r.rewards.where(r.mask, 0.0)
        # A value that is no number would be taken for a last observation that is none.
        cut = r.truncated & ~r.terminated & r.values.isfinite().all()
        columns["last observation of an episode"] = r.bootstrap_values.masked_fill(~cut, 0.0)
        columns = {name: c for name, c in columns.items() if c.is_floating_point()}
        finite = torch.stack([column.isfinite().all() for column in columns.values()])
        if r.action_mask is not None and not may_read(self.device):
            self._check_action_mask(r.action_mask, 0)
        if finite.all():
            return
        name, column = next(
            pair for pair, is_finite in zip(columns.items(), finite, strict=True) if not is_finite
        )
        if name == "action":
            raise FloatingPointError(
                "the policy chose NaN or infinite actions; lower learning_rate, normalise observations "
                "and rewards (norm_obs, norm_reward), or check the policy's outputs"
            )
        row, env = (~column.isfinite()).nonzero()[0, :2].tolist()
        step = row - 1 if name.startswith("observation") else row
        raise ValueError(
            f"environment {env} returned {name} = {column[row, env].tolist()} "
            f"{f'at step {step} of the rollout' if step >= 0 else 'from reset'}; PPO needs finite "
            "observations and rewards. Check the environment, or clip what it returns"
        )


def _visibly(normalizer: ObservationNormalizer, leaf: Tensor) -> Tensor:
    """Normalise, but leave NaN where clipping would hide an infinity from the final check."""
    return normalizer(leaf) + (leaf - leaf)


def _array(leaf: Any) -> np.ndarray:
    return leaf.numpy() if isinstance(leaf, Tensor) else leaf


def _tensor(leaf: Any) -> Tensor:
    return leaf if isinstance(leaf, Tensor) else torch.from_numpy(np.ascontiguousarray(leaf))
