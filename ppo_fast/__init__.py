"""PPO in PyTorch whose hot paths are Triton kernels."""

from ppo_fast.config import ControlConfig, PPOConfig
from ppo_fast.control.evaluate import evaluate
from ppo_fast.control.ppo import PPO
from ppo_fast.control.recipes import recipe
from ppo_fast.device_errors import raise_device_errors
from ppo_fast.dispatch import backend, current_backend
from ppo_fast.functional import (
    actor_critic_loss_and_grads,
    approx_kl,
    clipped_adam_,
    gae,
    gae_packed,
    kl_from_logits,
    log_probs_from_gaussian,
    log_probs_from_hidden,
    log_probs_from_logits,
    masked_whiten,
    ppo_loss,
    ppo_loss_from_gaussian,
    ppo_loss_from_hidden,
    ppo_loss_from_logits,
    sample_from_logits,
)
from ppo_fast.functional.actor_critic import ActorCriticWorkspace
from ppo_fast.kl_control import KLController
from ppo_fast.results import PPO_STATS, ActorCriticSpec, PPOLoss

__version__ = "0.1.0"

__all__ = [
    "PPO",
    "PPO_STATS",
    "ActorCriticSpec",
    "ActorCriticWorkspace",
    "ControlConfig",
    "KLController",
    "PPOConfig",
    "PPOLoss",
    "actor_critic_loss_and_grads",
    "approx_kl",
    "backend",
    "clipped_adam_",
    "current_backend",
    "evaluate",
    "gae",
    "gae_packed",
    "kl_from_logits",
    "log_probs_from_gaussian",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "masked_whiten",
    "ppo_loss",
    "ppo_loss_from_gaussian",
    "ppo_loss_from_hidden",
    "ppo_loss_from_logits",
    "raise_device_errors",
    "recipe",
    "sample_from_logits",
]
