"""The PPO mathematics of a row, written out with its gradient, and the loss it adds up to.

Works on [M] vectors, one entry a sample. Autograd would record some twenty small operations here and
replay them backwards; the explicit gradient shares most of them with the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from ppo_fast.functional._rows import may_ask
from ppo_fast.functional._terms import Rows, Scalar, Terms, is_on, plus
from ppo_fast.results import PPOLoss

LOG_RATIO_LIMIT = 20.0
"""|log ratio| is held below this: fp32 exp overflows at 88.7, and no update survives e^20."""

HALF = torch.tensor(0.5)
"""In a tensor: a small vector times a Python number takes twice as long."""

CPU_BLOCK_ROWS = 1 << 15
"""Rows for each thread: twice as fast at 131072 rows as all at once."""


class Surrogate(NamedTuple):
    """Sums over rows, and what each row's loss term changes by; both before the division by n."""

    sums: Tensor
    """[10], the first ten of `PPO_STATS`."""
    ratio_deviation: Tensor
    """[1]."""
    grad_log_probs: Tensor
    grad_values: Tensor | None


class Summands(NamedTuple):
    """The rows of the buffer whose sums are the first ten of `PPO_STATS`; [M] each."""

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    kl: Tensor
    old_kl: Tensor
    neg_log_ratio: Tensor
    clipped: Tensor
    held: Tensor
    value_clipped: Tensor
    ratio: Tensor
    whole: Tensor
    """[10, M], the ten"""

    @classmethod
    def empty(cls, like: Tensor) -> Summands:
        """New rows as long as `like` [M]."""
        whole = like.new_empty(10, like.numel())
        return cls._make((*whole.unbind(), whole))


def surrogate(
    log_probs: Tensor,
    entropy: Tensor | None,
    rows: Rows,
    t: Terms,
    summands: Summands | None = None,
) -> Surrogate:
    """The PPO terms of each row, summed, and their gradients. `log_probs`, `entropy`: [M].

    `summands` is overwritten: where one caller has many batches of one size, it spares a sixth of the
    time on 256 rows.
    """
    number = log_probs.numel()
    if summands is not None or number <= CPU_BLOCK_ROWS or not may_ask(log_probs):
        return _block(log_probs, entropy, rows, t, summands or Summands.empty(log_probs))
    step = CPU_BLOCK_ROWS * torch.get_num_threads()
    if number <= step:
        return _block(log_probs, entropy, rows, t, Summands.empty(log_probs))
    blocks = [slice(start, start + step) for start in range(0, number, step)]
    return joined(
        [
            surrogate(log_probs[own], None if entropy is None else entropy[own], rows.slice(own), t)
            for own in blocks
        ]
    )


def joined(parts: list[Surrogate]) -> Surrogate:
    """Consecutive blocks of rows as one."""
    values = [part.grad_values for part in parts if part.grad_values is not None]
    return Surrogate(
        torch.stack([part.sums for part in parts]).sum(0),
        torch.cat([part.ratio_deviation for part in parts]).amax(0, keepdim=True),
        torch.cat([part.grad_log_probs for part in parts]),
        torch.cat(values) if values else None,
    )


def nothing(rows: Rows) -> Surrogate:
    """What rows that are all masked come to."""
    zeros = torch.zeros_like(rows.neg_advantages)
    return Surrogate(
        zeros.new_zeros(10), zeros.new_zeros(1), zeros, None if rows.values is None else zeros
    )


def _block(
    log_probs: Tensor, entropy: Tensor | None, rows: Rows, t: Terms, of: Summands
) -> Surrogate:
    """Do the work of `surrogate`, whose vectors should stay in the cache.

    Every term is written to its row of one buffer, where it is summed. Comparisons are done in place
    where that saves a conversion: flags come out as 0.0 and 1.0.
    """
    if rows.drop is not None:
        log_probs = log_probs.masked_fill(rows.drop, 0.0)
        entropy = None if entropy is None else entropy.masked_fill(rows.drop, 0.0)
    unlimited = log_probs - rows.old_log_probs
    log_ratio = unlimited.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    within_limit = unlimited.eq_(log_ratio)
    ratio = torch.exp(log_ratio, out=of.ratio)
    # Not ratio - 1, which in fp32 leaves 5 % of error in the KL at a log ratio of 1e-3.
    ratio_minus_one = log_ratio.expm1()
    torch.sub(ratio_minus_one, log_ratio, out=of.old_kl)

    high = t.clip_coef if t.clip_coef_high is None else t.clip_coef_high
    clipped_ratio = _clamp(ratio, 1.0 - t.clip_coef, 1.0 + high)
    unclipped_loss = rows.neg_advantages * ratio
    clipped_loss = rows.neg_advantages * clipped_ratio
    policy_loss = torch.maximum(unclipped_loss, clipped_loss, out=of.policy_loss)
    # Inside the range both branches are the same number, so ties belong to the unclipped one.
    active = clipped_loss.le_(unclipped_loss)
    if t.dual_clip is None:
        of.held.zero_()
    else:
        ceiling = rows.neg_advantages * t.dual_clip
        is_held = (rows.neg_advantages > 0) & (policy_loss > ceiling)
        torch.where(is_held, ceiling, policy_loss, out=policy_loss)
        of.held.copy_(is_held)
        active = active.mul_(~is_held)
    # Products rather than selections, so that a NaN shows in the gradient.
    grad_log_probs = unclipped_loss.mul_(active)
    if is_on(t.old_kl_coef):
        grad_log_probs = plus(grad_log_probs, ratio_minus_one, t.old_kl_coef)
    grad_log_probs.mul_(within_limit)

    if rows.ref_log_probs is None:
        of.kl.zero_()
    else:
        kl, grad_kl = _kl_to_reference(log_probs, rows.ref_log_probs, t.kl_estimator)
        of.kl.copy_(kl)
        if is_on(t.kl_coef):
            grad_log_probs = plus(grad_log_probs, grad_kl, t.kl_coef)

    grad_values = None
    if rows.values is None:
        of.value_loss.zero_()
        of.value_clipped.zero_()
    else:
        grad_values = _value_terms(rows, t, of)

    if entropy is None:
        of.entropy.zero_()
    elif entropy is not of.entropy:
        of.entropy.copy_(entropy)
    torch.neg(log_ratio, out=of.neg_log_ratio)
    torch.ne(clipped_ratio, ratio, out=of.clipped)
    if rows.weights is not None:
        of.whole[:5].mul_(rows.weights)
        grad_log_probs.mul_(rows.weights)
        grad_values = None if grad_values is None else grad_values.mul_(rows.weights)
    if rows.keep is not None:
        of.whole[5:].mul_(rows.keep)
    deviation = ratio_minus_one.abs_()
    return Surrogate(
        sums=of.whole.sum(1),
        ratio_deviation=deviation.amax(0, keepdim=True)
        if deviation.numel()
        else log_ratio.new_zeros(1),
        grad_log_probs=grad_log_probs,
        grad_values=grad_values,
    )


def _clamp(x: Tensor, low: Scalar, high: Scalar) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        # One call cannot mix a number and a tensor.
        return x.clamp(min=low).clamp(max=high)
    return x.clamp(low, high)


def _kl_to_reference(log_probs: Tensor, ref: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Estimates of KL(policy || reference) per row and their derivative by the log-prob."""
    unlimited = ref - log_probs
    difference = unlimited.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    within_limit = unlimited.eq_(difference)
    if estimator == "k1":
        return -difference, within_limit
    if estimator == "k2":
        return difference.square() / 2, -difference * within_limit
    excess = difference.expm1()
    return excess - difference, -excess * within_limit


def _value_terms(rows: Rows, t: Terms, of: Summands) -> Tensor:
    """Half the squared error (clipped as asked) and where the value is clipped; the gradient."""
    assert rows.values is not None
    assert rows.returns is not None
    error = rows.values - rows.returns
    limit = t.vf_clip_coef
    if limit is None or (not isinstance(limit, Tensor) and math.isinf(limit)):
        of.value_clipped.zero_()
        torch.mul(error, error, out=of.value_loss).mul_(HALF)
        return error.mul_(t.vf_coef)
    assert rows.old_values is not None
    moved = rows.values - rows.old_values
    # The excess over the clip range is exactly 0 inside it, so there both errors are one number.
    # (old_values + clamp(moved)) - returns rounds differently from `error` and would let noise
    # choose the branch, and with it a zero gradient.
    if isinstance(limit, Tensor):
        excess = moved.sub_(_clamp(moved, -limit, limit))
    else:
        excess = softshrink(moved, limit)
    clipped_error = error - excess
    clipped = torch.ne(excess, 0, out=of.value_clipped)
    if t.vf_clip == "clipped":
        torch.mul(clipped_error, clipped_error, out=of.value_loss).mul_(HALF)
        return error.addcmul_(error, clipped, value=-1).mul_(t.vf_coef)
    size, clipped_size = error.abs(), clipped_error.abs_()
    largest = torch.maximum(size, clipped_size, out=of.value_loss)
    active = size.ge_(clipped_size)
    largest.mul_(largest).mul_(HALF)
    return active.mul_(error).mul_(t.vf_coef)


def assemble(
    part: Surrogate,
    count: Scalar,
    inv_n: Scalar,
    t: Terms,
    gradients: Sequence[tuple[Tensor | None, Tensor | None]],
) -> PPOLoss:
    """The result, with `gradients` = (input, n d loss / d input) attached to its loss."""
    if may_ask(part.sums) and not gradients:
        return _assembled_from_numbers(part, count, inv_n, t)
    means = part.sums * inv_n
    count = count.reshape(1) if isinstance(count, Tensor) else means.new_full((1,), count)
    stats = torch.cat((means, part.ratio_deviation, count))
    loss = policy_loss = means[0]
    if t.values is not None:
        loss = plus(loss, means[1], t.vf_coef)
    for coef, mean in ((-t.ent_coef, 2), (t.kl_coef, 3), (t.old_kl_coef, 4)):
        if is_on(coef):
            loss = plus(loss, means[mean], coef)
    inputs, known = [], []
    if torch.is_grad_enabled():
        for x, gradient in gradients:
            if x is not None and gradient is not None and x.requires_grad:
                inputs.append(x)
                known.append(gradient if gradient.shape == x.shape else gradient.view(x.shape))
    if inputs:
        loss = _WithGradients.apply(loss, inv_n, *inputs, *known)
    elif loss is policy_loss:
        loss = loss.clone()  # not a view, which the caller could not divide in place
    return PPOLoss(loss, stats)


def _assembled_from_numbers(part: Surrogate, count: Scalar, inv_n: Scalar, t: Terms) -> PPOLoss:
    """The result by Python's arithmetic: on a CPU a fifth of the time of as many small tensors."""
    scale = float(inv_n)
    means = [total * scale for total in part.sums.tolist()]
    loss = means[0] - float(t.ent_coef) * means[2] if is_on(t.ent_coef) else means[0]
    if t.values is not None:
        loss += float(t.vf_coef) * means[1]
    if is_on(t.kl_coef):
        loss += float(t.kl_coef) * means[3]
    if is_on(t.old_kl_coef):
        loss += float(t.old_kl_coef) * means[4]
    stats = [*means, float(part.ratio_deviation), float(count)]
    dtype = part.sums.dtype
    return PPOLoss(torch.tensor(loss, dtype=dtype), torch.tensor(stats, dtype=dtype))


class _WithGradients(torch.autograd.Function):
    """`loss` as is, with known gradients: forward(loss, inv_n, *inputs, *(n d loss / d input)).

    The division by n waits for the upstream gradient, which under a loss scaler keeps fp16
    gradients from vanishing.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, inv_n: Scalar, *tensors: Tensor) -> Tensor:
        half = len(tensors) // 2
        ctx.dtypes = [tensor.dtype for tensor in tensors[:half]]
        ctx.inv_n = inv_n
        ctx.save_for_backward(*tensors[half:])
        return (
            loss.clone()
        )  # an input handed on counts as a view, which could not be divided in place

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a penalty on the gradient vanish without a word.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "ppo_loss: its gradient is not differentiable, but create_graph=True asks for that; "
                "write the loss out in torch operations where second derivatives are needed"
            )
        scale = grad_loss * ctx.inv_n
        scaled = [gradient * scale for gradient in ctx.saved_tensors]
        gradients = [
            gradient if gradient.dtype is dtype else gradient.to(dtype)
            for gradient, dtype in zip(scaled, ctx.dtypes, strict=True)
        ]
        return None, None, *gradients, *[None] * len(gradients)
