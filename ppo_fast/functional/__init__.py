"""What PPO computes: one file an op, plain PyTorch.

Each op is its own definition, documentation, reference for the kernels and CPU path.
Shape letters everywhere: T time, N environments, B sequences, M rows of a minibatch, A action size,
V vocabulary, D hidden.
"""

from ppo_fast.functional.actor_critic import actor_critic_loss_and_grads
from ppo_fast.functional.adam import clipped_adam_
from ppo_fast.functional.gae import gae, gae_packed
from ppo_fast.functional.gaussian import log_probs_from_gaussian
from ppo_fast.functional.kl import approx_kl, kl_from_logits
from ppo_fast.functional.linear_head import (
    log_probs_from_hidden,
    ppo_loss_from_hidden,
)
from ppo_fast.functional.log_probs import log_probs_from_logits
from ppo_fast.functional.ppo_loss import ppo_loss, ppo_loss_from_gaussian, ppo_loss_from_logits
from ppo_fast.functional.sample import sample_from_logits
from ppo_fast.functional.whiten import masked_whiten

__all__ = [
    "actor_critic_loss_and_grads",
    "approx_kl",
    "clipped_adam_",
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
    "sample_from_logits",
]
