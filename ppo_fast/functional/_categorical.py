"""Categorical policies for `ppo_loss_from_logits`: log-probs, entropies and d loss / d logits.

Two ways to the same numbers. A small head (control) is laid out [A, M] and costs a few operations
over short vectors; a vocabulary is walked in blocks of rows through scratch memory, and the one
buffer as large as the logits is their gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.functional._rows import (
    Blocks,
    check_logits,
    check_temperature,
    gathered,
    may_ask,
    rows_per_block,
    softmax_stats,
)
from ppo_fast.functional._surrogate import Summands, Surrogate, joined, nothing, surrogate
from ppo_fast.functional._terms import Rows, Scalar, Terms, is_on, plus, row_ent_coef

OP = "ppo_loss_from_logits"

ILLEGAL = -1e9
"""Stands for log 0. Finite, so that probability 0 times it is 0 and not NaN."""

WIDE_FROM = 64
"""Smaller heads are laid out [A, M]: on a CPU, reductions over a short last dimension are 5 to 15
times slower than over the first (log_softmax of 4096 x 4: 196 us against 13)."""


class Policy(NamedTuple):
    """Checked arguments: `logits`, `action_mask` [..., A], `actions` [M, heads]."""

    logits: Tensor
    actions: Tensor
    action_mask: Tensor | None
    head_sizes: tuple[int, ...]
    divisor: Scalar | None
    """The temperature; None for 1."""
    from_network: bool = False
    """Whether no logit is -inf but where `action_mask` says so."""


class Head(NamedTuple):
    """One small distribution a row."""

    probs: Tensor
    """[A, M]."""
    probs_log_probs: Tensor
    """[A, M]: p log p, whose sum is minus the entropy."""
    taken: Tensor
    """[1, M]: the action taken."""
    log_probs: Tensor
    """[M], of the actions taken."""
    neg_entropy: Tensor
    """[M]."""


def check(
    logits: Tensor,
    actions: Tensor,
    head_sizes: tuple[int, ...] | None,
    action_mask: Tensor | None,
    temperature: Scalar,
) -> Policy:
    check_logits(OP, logits)
    size = logits.shape[-1]
    leading = logits.shape[:-1]
    expected = leading if head_sizes is None else (*leading, len(head_sizes))
    if actions.shape != expected:
        raise ValueError(
            f"{OP}: actions is {list(actions.shape)}; expected {list(expected)} for logits "
            f"{list(logits.shape)} and head_sizes {head_sizes}"
        )
    if actions.is_floating_point() or actions.is_complex() or actions.dtype is torch.bool:
        raise ValueError(f"{OP}: actions is {actions.dtype}; expected integers, use actions.long()")
    if head_sizes is not None and (sum(head_sizes) != size or min(head_sizes, default=0) < 1):
        raise ValueError(
            f"{OP}: head_sizes is {tuple(head_sizes)}, logits {list(logits.shape)}; expected "
            f"positive sizes that add up to {size}"
        )
    if action_mask is not None and (
        action_mask.dtype is not torch.bool or action_mask.shape != logits.shape
    ):
        raise ValueError(
            f"{OP}: action_mask is {list(action_mask.shape)} {action_mask.dtype}; expected the "
            f"shape of the logits, {list(logits.shape)}, and torch.bool, True where legal"
        )
    sizes = (size,) if head_sizes is None else tuple(head_sizes)
    return Policy(
        logits,
        actions.reshape(-1, len(sizes)).to(torch.int64),
        action_mask,
        sizes,
        check_temperature(OP, temperature),
    )


def sweep(
    policy: Policy, rows: Rows, t: Terms, dtype: torch.dtype, wants_gradient: bool
) -> tuple[Surrogate, Tensor | None]:
    """The loss's terms and, if wanted, n d loss / d logits in their dtype; block by block."""
    logits = policy.logits
    number, size = policy.actions.shape[0], logits.shape[-1]
    wide = len(policy.head_sizes) == 1 and size >= WIDE_FROM
    if number <= rows_per_block(logits):
        policy = policy._replace(logits=logits.reshape(-1, size))
        if policy.action_mask is not None:
            policy = policy._replace(action_mask=policy.action_mask.reshape(-1, size))
        if wide:
            part, gradient = _wide(policy, rows, t, dtype, wants_gradient, None, None)
        else:
            part, gradient = _small(policy, rows, t, dtype, wants_gradient)
        return part, gradient if gradient is None else gradient.to(logits.dtype)

    whole = None
    if wants_gradient:
        whole = torch.empty(number, size, dtype=logits.dtype, device=logits.device)
    parts = []
    tensors = (logits,) if policy.action_mask is None else (logits, policy.action_mask)
    for own, views, scratch in Blocks(2 if wide else 0, dtype, *tensors):
        block_rows = rows.slice(own)
        if block_rows.keep is not None and may_ask(logits) and not block_rows.keep.any():
            parts.append(nothing(block_rows))
            if whole is not None:
                whole[own] = 0
            continue
        block = policy._replace(
            logits=views[0],
            actions=policy.actions[own],
            action_mask=None if policy.action_mask is None else views[1],
        )
        if wide:
            part, gradient = _wide(block, block_rows, t, dtype, wants_gradient, *scratch)
        else:
            part, gradient = _small(block, block_rows, t, dtype, wants_gradient)
        parts.append(part)
        if whole is not None and gradient is not None:
            whole[own] = gradient
    return joined(parts), whole


def _small(
    policy: Policy, rows: Rows, t: Terms, dtype: torch.dtype, wants_gradient: bool
) -> tuple[Surrogate, Tensor | None]:
    """One or several heads of [M, A] logits, laid out [A, M]."""
    logits = policy.logits if policy.logits.dtype is dtype else policy.logits.to(dtype)
    action_mask = None if policy.action_mask is None else policy.action_mask.t()
    columns = policy._replace(
        logits=logits.t().contiguous(), actions=policy.actions.t(), action_mask=action_mask
    )
    part, gradient = small_columns(columns, rows, t, wants_gradient)
    return part, None if gradient is None else gradient.t()


def small_columns(
    policy: Policy, rows: Rows, t: Terms, wants_gradient: bool, summands: Summands | None = None
) -> tuple[Surrogate, Tensor | None]:
    """The same of a policy whose tensors are laid out that way: [A, M] and actions [heads, M].

    `summands`: see `surrogate`.
    """
    logits, actions = policy.logits, policy.actions
    if policy.action_mask is not None:
        logits = logits.masked_fill(~policy.action_mask, -torch.inf)
    if rows.drop is not None:
        logits = logits.masked_fill(rows.drop, 0.0)
        actions = actions.masked_fill(rows.drop, 0)
    finite = policy.from_network and policy.action_mask is None
    if len(policy.head_sizes) == 1:
        heads = [_head(logits, actions, policy.divisor, finite)]
    else:
        pairs = zip(logits.split(policy.head_sizes), actions.split(1), strict=True)
        heads = [_head(*pair, policy.divisor, finite) for pair in pairs]
    log_probs, neg_entropy = heads[0].log_probs, heads[0].neg_entropy
    for head in heads[1:]:
        log_probs = log_probs + head.log_probs
        neg_entropy = neg_entropy + head.neg_entropy
    entropy = torch.neg(neg_entropy, out=None if summands is None else summands.entropy)
    part = surrogate(log_probs, entropy, rows, t, summands)
    if not wants_gradient:
        return part, None
    grad_log_probs, ent_coef = part.grad_log_probs, row_ent_coef(rows, t)
    if policy.divisor is not None:
        grad_log_probs, ent_coef = grad_log_probs / policy.divisor, ent_coef / policy.divisor
    gradients = [_head_gradient(head, grad_log_probs, ent_coef) for head in heads]
    return part, gradients[0] if len(gradients) == 1 else torch.cat(gradients)


def _head(logits: Tensor, taken: Tensor, divisor: Scalar | None, finite: bool) -> Head:
    if divisor is not None:
        # In the other order the quotient would round at the size of the logits.
        largest = logits.amax(0).clamp_(min=torch.finfo(logits.dtype).min)
        logits = (logits - largest) / divisor
    log_probs = torch.log_softmax(logits, 0)
    if not finite:
        # By the logits, not by what came out: a row of -inf alone comes out as NaN.
        log_probs.masked_fill_(logits == -math.inf, ILLEGAL)
    probs = log_probs.exp()
    probs_log_probs = probs * log_probs
    of_taken = gathered(OP, log_probs, taken, 0).squeeze(0)
    return Head(probs, probs_log_probs, taken, of_taken, probs_log_probs.sum(0))


def _head_gradient(head: Head, grad_log_probs: Tensor, ent_coef: Scalar) -> Tensor:
    """Derivative of `sum(grad_log_probs log p(action) - ent_coef H)` by the logits; consumes `head`.

    With g the row's `grad_log_probs` and c its `ent_coef` (a number, 0-d or [M]):
    d_j = g (1[j = action] - p_j) + c p_j (log p_j + H).
    """
    if is_on(ent_coef):
        pull = plus(grad_log_probs, head.neg_entropy, ent_coef)
        gradient = head.probs_log_probs.mul_(ent_coef).addcmul_(head.probs, pull, value=-1)
    else:
        gradient = head.probs.mul_(grad_log_probs.neg())
    return gradient.scatter_add_(0, head.taken, grad_log_probs.unsqueeze(0))


def _wide(
    policy: Policy,
    rows: Rows,
    t: Terms,
    dtype: torch.dtype,
    wants_gradient: bool,
    scaled: Tensor | None,
    exponentials: Tensor | None,
) -> tuple[Surrogate, Tensor | None]:
    """One head of [M, V] logits; `scaled` and `exponentials` are scratch. Softmax as in `_rows`.

    With e_j = exp(u_j), u the logits less their maximum over the temperature T, l their sum and s
    the sum of e u: log p_j = u_j - log l and H = log l - s / l, so that the gradient
    d_j = (g (1[j = action] - p_j) + c p_j (log p_j + H)) / T
    is one combination of e u and e a row, plus g / T at the action.
    """
    logits, actions = policy.logits, policy.actions
    if policy.action_mask is not None:
        logits = logits.masked_fill(~policy.action_mask, -torch.inf)
    if rows.drop is not None:
        actions = actions.masked_fill(rows.drop.unsqueeze(1), 0)
    of_taken = gathered(OP, logits, actions, 1).to(dtype)
    if scaled is None:
        scaled = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    stats, e = softmax_stats(logits, dtype, policy.divisor, True, scaled, exponentials)
    of_taken = of_taken - stats.maximum
    if policy.divisor is not None:
        of_taken = of_taken / policy.divisor
    total = stats.total.clamp_(min=1.0)  # below 1 only where all logits are -inf
    log_total, mean = total.log(), stats.weighted / total
    log_probs = (of_taken - log_total).clamp_(min=ILLEGAL)
    part = surrogate(log_probs.squeeze(1), (log_total - mean).squeeze(1), rows, t)
    if not wants_gradient:
        return part, None
    grad_log_probs, ent_coef = part.grad_log_probs.unsqueeze(1), row_ent_coef(rows, t)
    if policy.divisor is not None:
        grad_log_probs, ent_coef = grad_log_probs / policy.divisor, ent_coef / policy.divisor
    if is_on(ent_coef):
        if isinstance(ent_coef, Tensor) and ent_coef.ndim:
            ent_coef = ent_coef.unsqueeze(1)
        pull = plus(grad_log_probs, mean, ent_coef) / total
        # softmax_stats left e u in its first scratch buffer.
        gradient = scaled.mul_(ent_coef / total).addcmul_(e, pull, value=-1)
    else:
        gradient = e.mul_(grad_log_probs / -total)
    gradient.scatter_add_(1, actions, grad_log_probs)
    if rows.drop is not None:
        gradient.masked_fill_(rows.drop.unsqueeze(1), 0.0)  # what was read there may be NaN
    return part, gradient
