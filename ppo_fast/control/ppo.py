"""`PPO`: train a policy on environments, use it, save it, load it."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ppo_fast.capture import Phase, may_read
from ppo_fast.checkpoint import CheckpointError
from ppo_fast.config import ControlConfig, check_minibatches, config_from_dict
from ppo_fast.control.collect import Collector
from ppo_fast.control.envs import Environments
from ppo_fast.control.episodes import EpisodeStats
from ppo_fast.control.explicit import why_not_explicit
from ppo_fast.control.loss import ExplicitLoss, make_loss
from ppo_fast.control.make_envs import checked_device, make_environments
from ppo_fast.control.normalize import ObservationNormalizer, RewardNormalizer
from ppo_fast.control.precision import in_precision
from ppo_fast.control.saving import (
    check_same_spaces,
    live_tensors,
    read_control_checkpoint,
    restore,
    restore_environments,
    run_folder_of,
    save,
)
from ppo_fast.control.spaces import as_batch, space_from_json, space_leaves
from ppo_fast.device_errors import raise_device_errors
from ppo_fast.distributions import distribution_for
from ppo_fast.functional.explained_variance import explained_variance
from ppo_fast.interrupt import DeferredInterrupt
from ppo_fast.kl_control import KLController
from ppo_fast.models import ActorCritic, actor_of, critic_of, is_image
from ppo_fast.profiling import StageTimer
from ppo_fast.results import PPO_STATS
from ppo_fast.rollout import Batch, Rollout
from ppo_fast.run_folder import RunFolder
from ppo_fast.tree import tree_leaves
from ppo_fast.update import FlatAdam, UpdateStats, ppo_update

log = logging.getLogger("ppo_fast")

Schedule = Callable[[float], float]
"""progress_remaining, from 1 at the start of a call of `learn` to 0 at its end -> value"""

SCHEDULED = ("learning_rate", "clip_coef", "ent_coef")
Callback = Callable[["PPO"], bool | None]


class PPO:
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) on environments.

        model = PPO("CartPole-v1", num_envs=8)
        model.learn(100_000)
        actions, _ = model.predict(observation)

    Args:
        env: a Gymnasium id, an `Env`, a callable returning one, a `VectorEnv`, an EnvPool, or a
            tensor environment; see `ppo_fast.control.envs`.
        policy: an `nn.Module` as `ppo_fast.models` describes; None builds an `ActorCritic`.
        config: a `ControlConfig`; `overrides` are applied to it.
        **overrides: fields of `ControlConfig`. `learning_rate`, `clip_coef` and `ent_coef` may be
            functions of the remaining progress (1 to 0), as in SB3.

    Attributes:
        config: the `ControlConfig` in force.
        policy: the module being trained.
        num_timesteps: environment steps so far; rows that are no transitions do not count.
        metrics: the last iteration's, floats by key.

    Raises:
        TypeError: a field `ControlConfig` does not have, or an `env` that is none.
        ValueError: a value a field refuses, an unknown environment id, or a space without support.
    """

    def __init__(
        self,
        env: Any,
        policy: nn.Module | None = None,
        *,
        config: ControlConfig | None = None,
        **overrides: Any,
    ) -> None:
        self.schedules: dict[str, Schedule] = {}
        for field in SCHEDULED:
            if callable(overrides.get(field)):
                self.schedules[field] = overrides[field]
                overrides[field] = float(overrides[field](1.0))
        _check_fields(overrides)
        config = dataclasses.replace(config or ControlConfig(), **overrides)
        envs = make_environments(env, config.num_envs, config.vectorization, config.device)
        self._build(config, envs, envs.observation_space, envs.action_space, envs.num_envs, policy)
        self.from_id = isinstance(env, str)

    def _build(
        self,
        config: ControlConfig,
        envs: Environments | None,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        num_envs: int,
        policy: nn.Module | None,
    ) -> None:
        check_minibatches(config.num_steps, num_envs, config.num_minibatches)
        self.config = config
        self.envs = envs
        self.env_id = envs.env_id if envs is not None else None
        self.observation_space = observation_space
        self.action_space = action_space
        self.num_envs = num_envs
        self.leaves = space_leaves(observation_space)
        self.distribution = distribution_for(action_space, config.squash)
        self.device = self._choose_device()
        self.custom_policy = policy is not None
        # The QR decomposition behind orthogonal weights rounds differently on more threads.
        with torch.random.fork_rng(devices=[]), _threads(1):
            torch.default_generator.manual_seed(config.seed)  # the CPU's alone
            self.policy = (policy if policy is not None else self._default_policy()).to(self.device)
        self.optimizer = FlatAdam(
            self.policy.parameters(), config.learning_rate, config.adam_eps, config.max_grad_norm
        )
        self.evaluator = in_precision(self.policy, config.precision, self.device)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.obs_normalizers = self._make_obs_normalizers()
        self.reward_normalizer = (
            RewardNormalizer(num_envs, self.device, config.gamma, config.clip_reward)
            if config.norm_reward
            else None
        )
        self.kl_controller = KLController(
            config.kl_coef,
            target=config.kl_target,
            rule=config.kl_controller,
            unit=config.kl_unit,
            horizon=config.kl_horizon,
        )
        self._clip_coef = torch.tensor(config.clip_coef, device=self.device)
        self._clip_coef_high = torch.tensor(
            config.clip_coef_high or config.clip_coef, device=self.device
        )
        self._ent_coef = torch.tensor(config.ent_coef, device=self.device)
        self._kl_coef = torch.tensor(config.kl_coef, device=self.device)
        self.episodes = EpisodeStats(num_envs, config.stats_window)
        self.timer = StageTimer()
        self.metrics: dict[str, float] = {}
        self.num_timesteps = 0
        self.iteration = 0
        self.learn_total = 0
        self.learn_done = 0
        self.collector: Collector | None = None
        self.saved: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        self.missing_schedules: list[str] = []
        self.from_id = False
        self._folder: RunFolder | None = None
        self._loss_options: dict[str, Any] = {}
        self._own_folder: Path | None = None
        self._phase: Phase[UpdateStats] | None = None
        self._phase_place: tuple[Any, ...] = ()

    def _choose_device(self) -> torch.device:
        wanted = self.config.device
        if wanted != "auto":
            return checked_device(wanted)
        if self.envs is not None and hasattr(self.envs.env, "device"):
            return torch.device(self.envs.env.device)
        # Small networks on numpy environments are faster on the CPU: launches and copies dominate.
        images = any(is_image(space) for space in self.leaves.values())
        return torch.device("cuda" if images and torch.cuda.is_available() else "cpu")

    def _default_policy(self) -> ActorCritic:
        c = self.config
        return ActorCritic(
            self.leaves,
            self.distribution,
            c.hidden_sizes,
            c.activation,
            c.ortho_init,
            c.log_std_init,
            c.shared_sizes,
        )

    def _make_obs_normalizers(self) -> dict[str, ObservationNormalizer]:
        if not self.config.norm_obs:
            return {}
        floats = {
            path: space
            for path, space in self.leaves.items()
            if isinstance(space, spaces.Box) and np.dtype(space.dtype).kind == "f"
        }
        if not floats:
            raise ValueError(
                f"norm_obs = True, but {self.observation_space} holds no floats; use norm_obs = False"
            )
        return {
            path: ObservationNormalizer(space.shape, self.device, self.config.clip_obs)
            for path, space in floats.items()
        }

    def learn(self, total_timesteps: int, callback: Callback | None = None) -> PPO:
        """Train for that many more environment steps, rounded up to whole rollouts.

        Schedules run from the start to the end of this call. The environments go on where an
        earlier call left them.

        Args:
            total_timesteps: steps, summed over the environments.
            callback: called with this object after every iteration; False ends the call.

        Raises:
            ValueError: `total_timesteps` below 1, or NaN and infinite observations or rewards.
            FloatingPointError: no minibatch of an iteration had a finite loss and gradient, or the
                policy chose NaN actions.
            KeyboardInterrupt: Ctrl-C; the iteration is finished and a checkpoint saved first.
        """
        if total_timesteps < 1:
            raise ValueError(f"learn: total_timesteps = {total_timesteps}; expected at least 1")
        self.learn_total, self.learn_done = int(total_timesteps), 0
        return self._learn(callback)

    def resume(self, callback: Callback | None = None) -> PPO:
        """Continue a call of `learn` that was interrupted, from a loaded checkpoint.

        Where the environments' state could be saved, the continuation is the one the interrupted
        call would have had; elsewhere it starts with new episodes, which is logged.

        Raises:
            ValueError: nothing is left to do, or a schedule given as a function is missing.
        """
        if self.learn_done >= self.learn_total:
            raise ValueError(
                f"resume: the last call of learn was finished ({self.learn_done} of "
                f"{self.learn_total} steps); call learn(total_timesteps) for more"
            )
        return self._learn(callback)

    def _learn(self, callback: Callback | None) -> PPO:
        config = self.config
        if self.missing_schedules:
            raise ValueError(
                f"the run used functions for {', '.join(self.missing_schedules)}, which a "
                "checkpoint does not hold; pass them or numbers to load, as in "
                f"PPO.load(path, {self.missing_schedules[0]}=...)"
            )
        self._phase = None
        self._loss = make_loss(
            self.policy,
            self.distribution,
            lambda: self._loss_options,
            self.optimizer,
            config.precision,
        )
        self._start()
        self._open_folder()
        if isinstance(self._loss, ExplicitLoss):
            log.info("gradients are written out: actor_critic_loss_and_grads")
        else:
            why = why_not_explicit(self.policy) or f"precision is {config.precision}"
            log.info("gradients by autograd: %s", why)
        bar = self._progress_bar()
        threads = torch.get_num_threads()
        if self.device.type == "cpu":
            threads = config.torch_threads or self._fitting_threads(threads)
        interrupt = DeferredInterrupt()
        try:
            with _threads(threads), interrupt:
                while self.learn_done < self.learn_total:
                    before = self.learn_done
                    try:
                        self._iterate()
                    except (KeyboardInterrupt, Exception):
                        # A signal to the process group also ends the environments' workers.
                        if interrupt.requested and not interrupt.insisted:
                            self._save_interrupted(interrupt.name, with_environments=False)
                            interrupt.deliver()
                        raise
                    if bar is not None:
                        bar.update(min(self.learn_done, self.learn_total) - before)
                        if self.episodes.returns:
                            mean = self.metrics["rollout/ep_rew_mean"]
                            bar.set_postfix_str(f"return {mean:.1f}", refresh=False)
                    stop = callback is not None and callback(self) is False
                    if self.reached_stop_return():
                        log.info("mean return %.1f reached", self.metrics["rollout/ep_rew_mean"])
                        self.learn_done = self.learn_total
                    if interrupt.requested:
                        self._save_interrupted(interrupt.name)
                        interrupt.deliver()
                    last = stop or self.learn_done >= self.learn_total
                    if self._folder is not None and (
                        last or self.iteration % config.save_every == 0
                    ):
                        self.save(self._folder.checkpoint)
                    if stop:
                        break
        finally:
            if bar is not None:
                bar.close()
            if self._folder is not None:
                self._folder.close(draw=not interrupt.insisted)
                self._folder = None
        return self

    def _iterate(self) -> None:
        started = time.perf_counter()
        self._anneal()
        collector = self.collector
        assert collector is not None
        with self.timer.stage("rollout"):
            try:
                rollout = collector.collect()
            except BaseException as error:
                # The environments stand somewhere inside the rollout: learn begins new episodes.
                self.collector = None
                if isinstance(error, Exception):
                    self._save_after_error()
                raise
        with self.timer.stage("gae"):
            batch = rollout.to_batch(
                self.config.gamma, self.config.gae_lambda, self.config.norm_adv == "batch"
            )
            if may_read(self.device) and len(batch) > self.config.num_minibatches * 4:
                # Shapes are free to vary here, and a mask would cost the loss a fifth of its time.
                batch = batch.without_masked_rows()
        with self.timer.stage("update"):
            stats = self._update_phase(batch)()
        with self.timer.stage("log"):
            self._report(rollout, batch, stats, collector, started)

    def _update_phase(self, batch: Batch) -> Phase[UpdateStats]:
        """The update of a batch; the same phase as long as batches lie at the same addresses."""
        place = batch.addresses()
        if self._phase is None or self._phase_place != place:
            self._phase_place = place
            self._phase = Phase(
                "update",
                lambda: ppo_update(self._loss, self.optimizer, batch, self.config, self.generator),
                self.device,
                [self.generator],
            )
        return self._phase

    def _make_loss_options(self) -> dict[str, Any]:
        config = self.config
        options = {
            "clip_coef": self._clip_coef,
            "clip_coef_high": self._clip_coef_high,
            "dual_clip": config.dual_clip,
            "vf_coef": config.vf_coef,
            "vf_clip_coef": config.vf_clip_coef,
            "vf_clip": config.vf_clip,
            "ent_coef": self._ent_coef,
            "old_kl_coef": self._kl_coef if config.kl_coef else 0.0,
            "norm_adv": config.norm_adv == "minibatch",
        }
        if may_read(self.device):
            # Numbers spare operations; on a GPU a captured graph would freeze them.
            options |= {k: v.item() for k, v in options.items() if isinstance(v, Tensor)}
        return options

    def _anneal(self) -> None:
        config = self.config
        remaining = 1.0 - self.learn_done / self.learn_total

        def value(field: str, anneal: bool) -> float:
            if field in self.schedules:
                scheduled = float(self.schedules[field](remaining))
                if not (scheduled >= 0 and math.isfinite(scheduled)):
                    raise ValueError(
                        f"{field}({remaining:g}) = {scheduled}; expected a number >= 0 for every "
                        "remaining progress from 1 to 0"
                    )
                return scheduled
            return getattr(config, field) * (remaining if anneal else 1.0)

        if config.adaptive_lr_kl is None:
            self.optimizer.lr.fill_(value("learning_rate", config.anneal_lr))
        clip = value("clip_coef", config.anneal_clip)
        self._clip_coef.fill_(clip)
        high = config.clip_coef_high
        self._clip_coef_high.fill_(clip if high is None else high * clip / config.clip_coef)
        self._ent_coef.fill_(value("ent_coef", config.anneal_ent))
        self._kl_coef.fill_(self.kl_controller.coef)
        self._loss_options = self._make_loss_options()

    def _report(
        self,
        rollout: Rollout,
        batch: Batch,
        stats: UpdateStats,
        collector: Collector,
        started: float,
    ) -> None:
        """Count, summarise and log an iteration, with one copy from the device."""
        variance = explained_variance(batch.values, batch.returns, batch.mask)
        extra = [stats.last_kl, stats.grad_norm, stats.steps, stats.skipped, stats.stopped]
        extra += [self.optimizer.lr, stats.first[PPO_STATS.index("ratio_deviation")], variance]
        extra += [self._clip_coef, rollout.mask.sum().float()]
        log_std = getattr(self.policy, "log_std", None)
        if isinstance(log_std, Tensor):
            extra.append(log_std.detach().exp().mean())
        numbers = torch.cat([stats.means, torch.stack(extra)]).tolist()
        raise_device_errors()
        means = dict(zip(PPO_STATS, numbers, strict=False))
        (
            last_kl,
            grad_norm,
            steps,
            skipped,
            stopped,
            lr,
            first_ratio,
            variance,
            clip,
            rows,
            *std,
        ) = numbers[len(means) :]
        if steps == 0 and skipped > 0:
            self._save_after_error()
            raise FloatingPointError(
                f"iteration {self.iteration + 1}: no minibatch had a finite loss and gradient, "
                "nothing was learnt; lower learning_rate, normalise observations and rewards "
                "(norm_obs, norm_reward), or check the policy's outputs"
            )
        if self.config.kl_controller != "fixed":
            self.kl_controller.update(last_kl, int(rows))
        done = (rollout.terminated | rollout.truncated).cpu().numpy()
        mask = None if rollout.all_valid else rollout.mask.cpu().numpy()
        self.episodes.update(collector.raw_rewards, done, mask)
        self.iteration += 1
        self.num_timesteps += int(rows)
        self.learn_done += int(rows)
        seconds = self.timer.take()
        stages = {f"time/{name}_seconds": s for name, s in {**seconds, **collector.seconds}.items()}
        self.metrics = {
            **self.episodes.metrics(),
            **{
                f"train/{name}": value
                for name, value in means.items()
                if name not in ("kl", "count")
            },
            "train/explained_variance": variance,
            "train/learning_rate": lr,
            "train/clip_range": clip,
            "train/grad_norm": grad_norm,
            "train/optimizer_steps": steps,
            "train/skipped_steps": skipped,
            "train/stopped_by_target_kl": stopped,
            "train/first_ratio_deviation": first_ratio,
            "time/iterations": float(self.iteration),
            "time/total_timesteps": float(self.num_timesteps),
            "time/sps": rows / (time.perf_counter() - started),
            **stages,
        }
        if self.config.kl_coef:
            self.metrics["train/kl_coef"] = self.kl_controller.coef
        if std:
            self.metrics["train/std"] = std[0]
        if self._folder is not None:
            self._folder.log(self.num_timesteps, self.metrics)

    def reached_stop_return(self) -> bool:
        """Whether the mean return over a full `stats_window` of episodes is at `stop_return`."""
        stop = self.config.stop_return
        full = len(self.episodes.returns) == self.config.stats_window
        return stop is not None and full and self.metrics["rollout/ep_rew_mean"] >= stop

    def _fitting_threads(self, available: int) -> int:
        """One thread for small networks: their operations are shorter than a thread's wake-up."""
        images = any(is_image(space) for space in self.leaves.values())
        widest = max((p.numel() for p in self.policy.parameters()), default=0)
        return available if images or widest > 1 << 17 else 1

    def _progress_bar(self) -> Any:
        if not self.config.progress_bar:
            return None
        from ppo_fast.extras import require

        tqdm = require("tqdm.auto", "train", "progress_bar=True").tqdm
        # disable=None: no bar in logs, only on a terminal or in a notebook.
        return tqdm(
            total=self.learn_total,
            initial=self.learn_done,
            unit=" steps",
            unit_scale=True,
            disable=None,
        )

    def _start(self) -> None:
        """Reset the environments on the first call, or restore them after a load."""
        if self.collector is None:
            if self.envs is None:
                if self.env_id is None or not self.from_id:
                    raise ValueError(
                        "learn: no environment, and the checkpoint is of one that was given as an "
                        "object, which an id cannot make again; pass one, as in "
                        "PPO.load(path, env=...)"
                    )
                self.envs = make_environments(
                    self.env_id, self.num_envs, self.config.vectorization, self.config.device
                )
            self.collector = Collector(
                self.envs,
                self.evaluator,
                self.distribution,
                self.config.num_steps,
                self.device,
                self.generator,
                self.obs_normalizers,
                self.reward_normalizer,
            )
            saved, self.saved = self.saved, None
            if saved is not None and saved[0]["env_state"] is not None:
                restore_environments(self, *saved)
                return
            if saved is not None:
                log.info(
                    "the environments' state was not saved: training goes on with new episodes"
                )
            self.episodes.running_returns[:] = self.episodes.running_lengths[:] = 0
            if self.reward_normalizer is not None:
                self.reward_normalizer.returns.zero_()
            # A loaded run must not replay the episodes it began with.
            self.collector.start(self.config.seed + self.num_timesteps)

    def _open_folder(self) -> None:
        if self.config.run_dir is None:
            return
        path = Path(self.config.run_dir).resolve()
        # Another run's folder is refused, also to a loaded model.
        resume = self.num_timesteps if path == self._own_folder else None
        self._folder = RunFolder(self.config.run_dir, resume, _draw_curve)
        self._own_folder = path
        self._folder.write_config({"env_id": self.env_id}, self.config, gymnasium)
        # Whatever happens to the run from here on, it can be resumed.
        self.save(self._folder.checkpoint)

    def _save_interrupted(self, signal_name: str, with_environments: bool = True) -> None:
        if self._folder is not None:
            path = self._folder.checkpoint
            goes_on = f"ppo-fast train --resume {self._folder.path}"
        else:
            name = (self.env_id or "ppo").replace("/", "-")
            path = Path(f"{name}-interrupted.safetensors").resolve()
            goes_on = f"PPO.load({str(path)!r}).resume()"
        save(self, path, with_environments)
        print(f"\n{signal_name}: saved {path} after {self.num_timesteps} steps; {goes_on} goes on")

    def _save_after_error(self) -> None:
        """Keep what was learnt when an environment fails; its own state is in doubt and left out."""
        if self._folder is None:
            return
        path = self._folder.checkpoint
        # An infinite observation may have reached the normalisers: such a state is worth nothing.
        if not all(t.isfinite().all() for t in live_tensors(self).values()):
            log.error("training stopped by an error; %s is the state before it", path)
            return
        try:
            save(self, path, with_environments=False)
        except CheckpointError as error:
            log.error("training stopped by an error, and saving failed: %s", error)
            return
        log.error("training stopped by an error; saved %s", path)

    def predict(
        self, obs: Any, deterministic: bool = True, action_masks: Any = None
    ) -> tuple[Any, None]:
        """Choose actions for one observation or a batch.

        Args:
            obs: as the environment gives it: arrays, tensors, or dicts and tuples of them.
            deterministic: the most likely action; False samples.
            action_masks: [A] or [M, A] bool, legal actions.

        Returns:
            The action or actions in the environment's form (numpy, or torch for a tensor
            observation), and None where recurrent policies return their state.

        Raises:
            ValueError: an observation or a mask of another shape, or a mask that forbids all.
        """
        batch, batched = as_batch(obs, self.leaves, self.device)
        mask = None
        if action_masks is not None:
            mask = torch.as_tensor(action_masks, dtype=torch.bool, device=self.device)
            rows = len(next(iter(tree_leaves(batch)))[1])
            mask = self.distribution.checked_mask(mask if mask.dim() > 1 else mask[None], rows)
        with torch.no_grad():
            parameters = actor_of(self.evaluator, self._normalized(batch))
            if deterministic:
                actions = self.distribution.mode(parameters, mask)
            else:
                rows = len(next(iter(tree_leaves(batch)))[1])
                noise = self.distribution.noise((rows,), self.device, self.generator)
                actions = self.distribution.sample(parameters, noise, mask)
            actions = self.distribution.to_env(actions)
        if not batched:
            actions = actions[0]
        # [()]: a lone discrete action is a number, which environments may use as a key.
        return (actions if _is_tensor(obs) else actions.cpu().numpy()[()]), None

    def predict_values(self, obs: Any) -> Any:
        """Values of one observation (0-d) or a batch [M], numpy, or torch for a tensor observation."""
        batch, batched = as_batch(obs, self.leaves, self.device)
        with torch.no_grad():
            values = critic_of(self.evaluator, self._normalized(batch))
        values = values if batched else values[0]
        return values if _is_tensor(obs) else values.cpu().numpy()

    def _normalized(self, obs: Any) -> Any:
        if not self.obs_normalizers:
            return obs
        if isinstance(obs, Tensor):
            return self.obs_normalizers[""](obs)
        return {
            path: self.obs_normalizers[path](leaf) if path in self.obs_normalizers else leaf
            for path, leaf in obs.items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint from which training resumes exactly; replaces the file atomically.

        Raises:
            CheckpointError: the file cannot be written; what was there before is intact.
        """
        save(self, path, with_environments=True)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        env: Any = None,
        policy: nn.Module | None = None,
        **overrides: Any,
    ) -> PPO:
        """Load a checkpoint, or the one in a run folder; never executes code from it.

        Args:
            path: the file, or a run folder. A run goes on in its folder; a checkpoint elsewhere
                writes nothing unless `run_dir` is given.
            env: to train on; None makes the id named in the checkpoint when `learn` needs it. With
                as many environments as before, they are put into the saved state.
            policy: a fresh module, where the run was started with a module of the user's own.
            **overrides: fields of `ControlConfig` to change; functions for schedules.

        Raises:
            CheckpointError: a missing, truncated or foreign file.
            ValueError: the checkpoint is of another environment, or of another policy.
        """
        path, tensors, meta = read_control_checkpoint(path)
        if meta["custom_policy"] and policy is None:
            raise ValueError(
                f"{path} holds a policy of class {meta['custom_policy']}, whose code is not in the "
                "checkpoint; pass a fresh one, as in PPO.load(path, policy=MyPolicy())"
            )
        self = cls.__new__(cls)
        missing = [field for field in meta["schedules"] if field not in overrides]
        self.schedules = {f: overrides.pop(f) for f in SCHEDULED if callable(overrides.get(f))}
        _check_fields(overrides)
        folder = run_folder_of(path)
        settings = {**meta["config"], "run_dir": folder and str(folder), **overrides}
        config = config_from_dict(ControlConfig, settings)
        num_envs = overrides.get("num_envs") or meta["num_envs"]
        envs = None
        if env is not None:
            # Environments that exist already bring their number.
            exist = hasattr(env, "step") and not isinstance(env, type)
            wanted = overrides.get("num_envs") if exist else num_envs
            envs = make_environments(env, wanted, config.vectorization, config.device)
            check_same_spaces(path, meta, envs)
            num_envs = envs.num_envs
        if config.num_envs is not None:
            config = dataclasses.replace(config, num_envs=num_envs)
        observation_space = space_from_json(meta["observation_space"])
        action_space = space_from_json(meta["action_space"])
        self._build(config, envs, observation_space, action_space, num_envs, policy)
        self.env_id = self.env_id or meta["env_id"]
        self.from_id = isinstance(env, str) or (env is None and meta["from_id"])
        self.missing_schedules = missing
        self._own_folder = folder and folder.resolve()
        restore(self, path, tensors, meta)
        if "learning_rate" in overrides:
            self.optimizer.lr.fill_(config.learning_rate)
        return self

    def close(self) -> None:
        """Close the environments."""
        if self.envs is not None:
            self.envs.close()


def _draw_curve(folder: Path) -> None:
    from ppo_fast.plots import plot_learning_curves

    plot_learning_curves([folder], folder / "learning_curve.png")


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Use so many CPU threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_fields(overrides: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(ControlConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise TypeError(
            f"PPO: unknown setting {', '.join(unknown)}; ControlConfig has {', '.join(sorted(known))}"
        )


def _is_tensor(obs: Any) -> bool:
    if isinstance(obs, dict):
        return _is_tensor(next(iter(obs.values())))
    if isinstance(obs, tuple):
        return _is_tensor(obs[0])
    return isinstance(obs, Tensor)
