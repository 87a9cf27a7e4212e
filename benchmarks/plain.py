"""What one would write without us: each op in the fewest lines of PyTorch, for `torch.compile`.

Arguments are those of our op, results its first outputs. Inductor fuses these well; our references
are written for eager mode on a CPU and would compile to something slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from ppo_fast.dispatch import Accelerated


def _later(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return first[0] * second[0], second[1] + second[0] * first[1]


def _reverse_scan(decay: Tensor, delta: Tensor) -> Tensor:
    # "pointwise" compiles to one kernel; the CPU has no such.
    mode = "pointwise" if delta.is_cuda else "generic"
    maps = decay.flip(0), delta.flip(0)
    return associative_scan(_later, maps, dim=0, combine_mode=mode)[1].flip(0)


def gae(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    following = torch.cat((values[1:], next_value[None]))
    discount = gamma * (1 - terminated.float())
    advantages = _reverse_scan(discount * gae_lambda, rewards + discount * following - values)
    return advantages, advantages + values


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    last = cu_seqlens[1:] - 1
    following = values.roll(-1).index_put((last,), next_value)
    discount = gamma * (1 - terminated.float())
    decay = (discount * gae_lambda).index_fill(0, last, 0.0)
    advantages = _reverse_scan(decay, rewards + discount * following - values)
    return advantages, advantages + values


def log_probs_from_logits(
    logits: Tensor, index: Tensor, with_entropy: bool = False
) -> tuple[Tensor, ...]:
    log_p = torch.log_softmax(logits.float(), -1)
    chosen = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return (chosen, -(log_p.exp() * log_p).sum(-1)) if with_entropy else (chosen,)


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_coef: float,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    vf_coef: float = 0.5,
    vf_clip_coef: float = 0.2,
    entropy: Tensor | None = None,
    ent_coef: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor]:
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    terms = torch.maximum(-advantages * ratio, -advantages * clipped)
    if values is not None and old_values is not None and returns is not None:
        held = old_values + (values - old_values).clamp(-vf_clip_coef, vf_clip_coef)
        squares = torch.maximum((values - returns).square(), (held - returns).square())
        terms = terms + vf_coef * 0.5 * squares
    if entropy is not None:
        terms = terms - ent_coef * entropy
    return ((terms.mean() if mask is None else (terms * mask).sum() / mask.sum()),)


def ppo_loss_from_logits(logits: Tensor, actions: Tensor, **terms: Any) -> tuple[Tensor]:
    log_probs, *entropy = log_probs_from_logits(logits, actions, bool(terms.get("ent_coef")))
    return ppo_loss(log_probs, entropy=entropy[0] if entropy else None, **terms)


def ppo_loss_from_gaussian(
    mean: Tensor, log_std: Tensor, actions: Tensor, **terms: Any
) -> tuple[Tensor]:
    z = (actions - mean) * torch.exp(-log_std)
    half = 0.5 * math.log(2 * math.pi)
    log_probs = (-0.5 * z.square() - log_std - half).sum(-1)
    entropy = (log_std + half + 0.5).sum(-1).expand_as(log_probs)
    return ppo_loss(log_probs, entropy=entropy, **terms)


def kl_from_logits(logits: Tensor, ref_logits: Tensor, direction: str) -> tuple[Tensor]:
    log_p, log_q = (torch.log_softmax(x.float(), -1) for x in (logits, ref_logits))
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),)


def masked_whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> tuple[Tensor]:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return ((x - mean) / (variance.sqrt() + eps) * mask,)


def sample_from_logits(logits: Tensor) -> tuple[Tensor, ...]:
    log_p = torch.log_softmax(logits.float(), -1)
    # By exponential variables, the Gumbel-max trick without its two logarithms.
    actions = (log_p.exp() / torch.empty_like(log_p).exponential_()).argmax(-1)
    chosen = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return actions, chosen, -(log_p.exp() * log_p).sum(-1)


def of(op: Accelerated) -> Callable[..., Any]:
    """The formulation of one of our ops."""
    return globals()[op.__name__]
