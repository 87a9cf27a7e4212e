"""Hyper-parameters: frozen dataclasses, a docstring under each field, checked when made.

Field names are CleanRL's; the README translates them for users of other libraries.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields
from typing import Any, Literal


def _require(ok: bool, field: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{field} = {value!r}; expected {expected}")


def _check_types(config: PPOConfig) -> None:
    """Refuse values of another type than their field's; numpy's numbers become Python's."""
    for field in fields(config):
        value = getattr(config, field.name)
        kind, *others = str(field.type).split(" | ")
        if kind not in ("float", "int", "bool", "str") or (value is None and "None" in others):
            continue
        wanted: dict[str, tuple[type, str]] = {
            "float": (numbers.Real, "a number"),
            "int": (numbers.Integral, "an integer"),
            "bool": (bool, "True or False"),
            "str": (str, "a string"),
        }
        base, name = wanted[kind]
        fits = isinstance(value, base) and isinstance(value, bool) == (kind == "bool")
        _require(fits and value == value, field.name, value, " or ".join([name, *others]))
        if kind in ("float", "int"):
            object.__setattr__(config, field.name, float(value) if kind == "float" else int(value))


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """What every PPO update needs, for control and for language models."""

    learning_rate: float = 2.5e-4
    """Adam's step size; the starting one if it is annealed or adaptive"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over the call of `learn`"""
    adaptive_lr_kl: float | None = None
    """desired KL(old || new) per update: divide the learning rate by 1.5 above twice this value,
    multiply by 1.5 below half of it, before every step, within 1e-5 to 1e-2 (rsl_rl's rule);
    replaces `anneal_lr`"""
    adam_eps: float = 1e-5
    """Adam's epsilon"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    update_epochs: int = 4
    """passes over each rollout"""
    num_minibatches: int = 4
    """minibatches per pass; each pass draws a new permutation"""
    norm_adv: Literal["minibatch", "batch", "none"] | bool = "minibatch"
    """whiten advantages over each minibatch, once over the whole rollout, or not at all
    (True means minibatch, False none)"""
    clip_coef: float = 0.2
    """the ratio is clipped to [1 - clip_coef, 1 + clip_coef_high]"""
    clip_coef_high: float | None = None
    """upper clip; equal to clip_coef where None"""
    anneal_clip: bool = False
    """lower both clip coefficients linearly to 0 over the call of `learn`"""
    dual_clip: float | None = None
    """c > 1 bounds the objective below by c * advantage where the advantage is negative"""
    vf_coef: float = 0.5
    """weight of the value loss 0.5 * (value - return)^2 (twice the vf_coef of SB3, which has no 0.5)"""
    vf_clip_coef: float | None = 0.2
    """values are clipped to within this of the old values, in reward units; None for no clip"""
    vf_clip: Literal["max", "clipped"] = "max"
    """with vf_clip_coef: the larger of clipped and unclipped error (CleanRL), or the clipped (SB3)"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    anneal_ent: bool = False
    """lower the entropy weight linearly to 0 over the call of `learn`"""
    max_grad_norm: float = 0.5
    """gradients are scaled down to this global norm; inf for no clipping"""
    target_kl: float | None = None
    """stop the update when a minibatch's approx_kl exceeds this, before its step
    (SB3 stops at 1.5 times its target_kl)"""
    kl_coef: float = 0.0
    """weight of a KL penalty: KL(old || new) in control, KL(policy || reference) for language models"""
    kl_controller: Literal["fixed", "paper", "proportional"] = "fixed"
    """how kl_coef moves after an update: not at all, doubled or halved outside 1.5 times kl_target
    (Schulman et al. 2017, section 4), or proportionally to the error (Ziegler et al. 2019)"""
    kl_target: float | None = None
    """KL that an adaptive kl_controller aims at, in nats per `kl_unit`"""
    kl_unit: Literal["token", "seq"] = "token"
    """the KL is a mean per action (token), or a mean of sums per sequence"""
    kl_horizon: float = 10_000
    """steps over which the proportional controller acts"""
    seed: int = 1
    """seeds initialisation, actions, permutations and environments"""
    device: str = "auto"
    """"auto" (a GPU if there is one and it pays, else the CPU), "cpu", "cuda" or "cuda:1" """

    def __post_init__(self) -> None:
        """Check every field; raise ValueError naming the field, its value and what was expected."""
        _check_types(self)
        if isinstance(self.norm_adv, bool):
            object.__setattr__(self, "norm_adv", "minibatch" if self.norm_adv else "none")
        for field in ("learning_rate", "adam_eps", "max_grad_norm"):
            value = getattr(self, field)
            _require(value > 0, field, value, "a number above 0")
            # No gradient clipping is a wish, an infinite step size is not.
            finite = math.isfinite(value) or field == "max_grad_norm"
            _require(finite, field, value, "a finite number")
        for field in ("gamma", "gae_lambda"):
            value = getattr(self, field)
            _require(0 <= value <= 1, field, value, "a number in [0, 1]")
        for field in ("update_epochs", "num_minibatches"):
            value = getattr(self, field)
            _require(value >= 1, field, value, "an integer >= 1")
        _require(self.seed >= 0, "seed", self.seed, "an integer >= 0")
        _require(self.clip_coef > 0, "clip_coef", self.clip_coef, "a number above 0")
        for field in ("clip_coef_high", "vf_clip_coef", "target_kl", "adaptive_lr_kl"):
            value = getattr(self, field)
            _require(value is None or value > 0, field, value, "a number above 0, or None")
        _require(
            self.dual_clip is None or self.dual_clip > 1,
            "dual_clip",
            self.dual_clip,
            "above 1, or None",
        )
        for field in ("vf_coef", "kl_coef"):
            value = getattr(self, field)
            _require(value >= 0 and math.isfinite(value), field, value, "a number >= 0")
        _require(math.isfinite(self.ent_coef), "ent_coef", self.ent_coef, "a finite number")
        for field, allowed in (
            ("norm_adv", ("minibatch", "batch", "none")),
            ("vf_clip", ("max", "clipped")),
            ("kl_controller", ("fixed", "paper", "proportional")),
            ("kl_unit", ("token", "seq")),
        ):
            value = getattr(self, field)
            _require(value in allowed, field, value, f"one of {', '.join(allowed)}")
        if self.kl_controller != "fixed":
            _require(
                self.kl_target is not None and self.kl_target > 0,
                "kl_target",
                self.kl_target,
                f"a number above 0 for kl_controller={self.kl_controller!r}",
            )
            _require(self.kl_coef > 0, "kl_coef", self.kl_coef, "above 0 to be adapted")


@dataclass(frozen=True, kw_only=True)
class ControlConfig(PPOConfig):
    """PPO on environments."""

    num_envs: int | None = None
    """environments stepped together; None means 8, or as many as a given vector environment has"""
    num_steps: int = 128
    """steps per environment between updates"""
    vectorization: Literal["auto", "tensor", "native", "sync", "async"] = "auto"
    """for environment ids and callables: in torch (tensor; classic control ids), the id's native vector
    form or else one process (native), one process (sync), or one per environment (async); auto is the
    first of these that there is"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """widths of the hidden layers of actor and critic"""
    shared_sizes: tuple[int, ...] = ()
    """widths of hidden layers that actor and critic have in common, before their own"""
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh"
    """activation of the hidden layers"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of matrix products and convolutions: bf16 is autocast (and, for MLPs on a GPU, the operands of
    the kernel), fp16 those operands only; parameters, losses and statistics stay float32"""
    ortho_init: bool = True
    """orthogonal weights (gain sqrt 2, actor head 0.01, critic head 1) and zero biases"""
    log_std_init: float = 0.0
    """initial log standard deviation of continuous actions"""
    squash: bool = False
    """squash continuous actions by tanh into the action space's bounds, instead of clipping them"""
    norm_obs: bool = False
    """normalise float observations by running mean and variance"""
    norm_reward: bool = False
    """divide rewards by the running standard deviation of the discounted return"""
    clip_obs: float = 10.0
    """normalised observations are clipped to +- this"""
    clip_reward: float = 10.0
    """normalised rewards are clipped to +- this"""
    recurrent: bool = False
    """recurrent policies are not available yet"""
    stop_return: float | None = None
    """stop when the mean return of the last `stats_window` episodes reaches this"""
    stats_window: int = 100
    """episodes in the reported means"""
    run_dir: str | None = None
    """folder for config, checkpoint, metrics and plot; None writes nothing"""
    save_every: int = 20
    """iterations between checkpoints in run_dir"""
    torch_threads: int | None = None
    """CPU threads during `learn`; None means 1 for small networks, where more only cost"""
    progress_bar: bool = False
    """show a progress bar"""

    def __post_init__(self) -> None:
        """Check every field; see `PPOConfig.__post_init__`."""
        super().__post_init__()
        for field in ("hidden_sizes", "shared_sizes"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("num_steps", "stats_window", "save_every"):
            value = getattr(self, field)
            _require(value >= 1, field, value, "an integer >= 1")
        for field in ("num_envs", "torch_threads"):
            value = getattr(self, field)
            _require(value is None or value >= 1, field, value, "an integer >= 1, or None")
        for field in ("hidden_sizes", "shared_sizes"):
            sizes = getattr(self, field)
            whole = isinstance(sizes, tuple) and all(isinstance(s, int) and s >= 1 for s in sizes)
            _require(whole, field, sizes, "a tuple of integers >= 1")
        for field in ("clip_obs", "clip_reward"):
            value = getattr(self, field)
            _require(value > 0, field, value, "a number above 0")
        for field, allowed in (
            ("activation", ("tanh", "relu", "elu", "silu")),
            ("precision", ("fp32", "bf16", "fp16")),
            ("vectorization", ("auto", "tensor", "native", "sync", "async")),
        ):
            value = getattr(self, field)
            _require(value in allowed, field, value, f"one of {', '.join(allowed)}")
        if self.recurrent:
            raise NotImplementedError(
                "recurrent = True: recurrent policies are not available yet; stack observations "
                "(gymnasium.wrappers.FrameStackObservation) or use a feed-forward policy"
            )


def check_minibatches(num_steps: int, num_envs: int, num_minibatches: int) -> None:
    """Raise ValueError, with remedies, unless a rollout divides into equal minibatches."""
    rows = num_steps * num_envs
    if rows % num_minibatches == 0:
        return
    divisor = max(d for d in range(1, num_minibatches + 1) if rows % d == 0)
    steps = num_steps
    while steps * num_envs % num_minibatches:
        steps += 1
    raise ValueError(
        f"num_envs * num_steps = {num_envs} * {num_steps} = {rows} is not divisible by "
        f"num_minibatches = {num_minibatches}; use num_minibatches = {divisor} or num_steps = {steps}"
    )


def config_from_dict(cls: type[Any], values: dict[str, Any]) -> Any:
    """Rebuild a config from JSON data, naming the fields this version does not know.

    Raises:
        ValueError: an unknown field, or a value its field refuses.
    """
    known = cls.__dataclass_fields__
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no field {', '.join(unknown)}; fields are {', '.join(sorted(known))}"
        )
    return cls(**values)
