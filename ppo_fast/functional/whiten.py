"""Whitening of advantages or rewards over the unmasked entries."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.dispatch import accelerated
from ppo_fast.functional._rows import compute_dtype


def _validate(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float | Tensor = 1e-8,
    moments: Tensor | None = None,
) -> None:
    if not x.is_floating_point():
        raise ValueError(f"masked_whiten: x is {x.dtype}; it must be floating, use x.float()")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "masked_whiten: x requires a gradient; expected a constant, use x.detach()"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape):
        raise ValueError(
            f"masked_whiten: mask is {list(mask.shape)} {mask.dtype}; expected "
            f"{list(x.shape)} torch.bool"
        )
    if isinstance(eps, Tensor) and eps.dim() != 0:
        raise ValueError(
            f"masked_whiten: eps is a tensor of shape {list(eps.shape)}; expected a number or a "
            "0-d tensor"
        )
    if moments is not None and (moments.shape != (3,) or not moments.is_floating_point()):
        raise ValueError(
            f"masked_whiten: moments is {list(moments.shape)} {moments.dtype}; expected [3] "
            "floating: count, mean and sum of squared deviations"
        )
    for name, other in (("mask", mask), ("moments", moments)):
        if other is not None and other.device != x.device:
            raise ValueError(
                f"masked_whiten: {name} is on {other.device}, x is on {x.device}; move one of them"
            )


@accelerated(validate=_validate)
def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float | Tensor = 1e-8,
    moments: Tensor | None = None,
) -> Tensor:
    """Give the unmasked entries mean 0 and standard deviation 1.

        y = (x - mean) / (std + eps),   std unbiased (division by n - 1)

    `eps` is added to the standard deviation, as CleanRL and Stable-Baselines3 do; TRL and verl have
    it inside the root, (x - mean) rsqrt(var + eps). The variance is taken in a second pass over
    x - mean, so a large mean costs no precision and equal entries become exactly 0.

    Args:
        x: any shape, floating; a constant.
        mask: same shape, bool. False: the entry is never read (it may be NaN) and comes out 0.
        shift_mean: False adds the mean back, so that only the scale changes (Ziegler et al. 2019,
            arXiv:1909.08593, whiten rewards so).
        eps: float or 0-d tensor.
        moments: [3] floating: count, mean and sum of squared deviations, as `gae` and `gae_packed`
            return them with `with_moments`. They are taken in place of those of x, which saves a
            pass, or are those of a larger batch that x is a part of.

    Returns:
        The shape of x; float32, or float64 where x is. Fewer than two unmasked entries have no
        scale and come out unchanged, masked ones 0.

    Raises:
        ValueError: x is not floating or requires a gradient; mask, eps or moments are misshapen, of
            another dtype or on another device.
    """
    _validate(x, mask, shift_mean=shift_mean, eps=eps, moments=moments)
    flat = x.reshape(-1).to(compute_dtype(x))
    keep = None
    count: float | Tensor = x.numel()
    if mask is not None:
        flat = flat.masked_fill(~mask.reshape(-1), 0.0)
        keep = mask.reshape(-1).to(flat.dtype)
        count = mask.sum().to(flat.dtype)
    if moments is None:
        whitened, mean = standardize(flat, keep, count, eps)
    else:
        whitened, mean = standardize_by(moments.to(flat.dtype), flat, keep, eps)
    if not shift_mean:
        whitened = whitened + (mean if keep is None else mean * keep)
    return whitened.reshape(x.shape)


def standardize(
    x: Tensor, keep: Tensor | None, count: float | Tensor, eps: float | Tensor
) -> tuple[Tensor, Tensor | float]:
    """Return `((x - mean) / (std + eps), mean)` of an [M] vector; fewer than two entries stay.

    `keep` is 1 or 0 per entry and x is 0 where it is 0; `count` is its sum.
    """
    if not isinstance(count, Tensor):
        if count < 2:
            return x.clone(), 0.0
        mean = x.mean()
        deviation = x - mean
        # The second pass removes the mean's own rounding: equal entries become 0, not (one ulp) / eps.
        std, rest = torch.std_mean(deviation)
        return deviation.sub_(rest).div_(std.add_(eps)), mean
    assert keep is not None
    at_least_one = count.clamp(min=1)
    mean = x.sum() / at_least_one
    deviation = (x - mean) * keep
    deviation = (deviation - deviation.sum() / at_least_one) * keep
    std = (deviation.square().sum() / (count - 1).clamp(min=1)).sqrt()
    alone = count < 2
    return torch.where(alone, x, deviation / (std + eps)), torch.where(alone, 0.0, mean)


def standardize_by(
    moments: Tensor, x: Tensor, keep: Tensor | None, eps: float | Tensor
) -> tuple[Tensor, Tensor]:
    """`standardize` with the count, mean and sum of squared deviations given."""
    count, mean, squares = moments.unbind()
    deviation = x - mean if keep is None else (x - mean) * keep
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    alone = count < 2
    return torch.where(alone, x, deviation / (std + eps)), torch.where(alone, 0.0, mean)


def moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """[3]: count, mean and sum of squared deviations of the unmasked entries, in the dtype of x."""
    count = x.new_full((), x.numel())
    if mask is not None:
        count = mask.sum().to(x.dtype)
        x = x.masked_fill(~mask, 0.0)
    at_least_one = count.clamp(min=1)
    mean = x.sum() / at_least_one
    deviation = x - mean
    if mask is not None:
        deviation.masked_fill_(~mask, 0.0)
    # The mean's own rounding, taken out as in `standardize`.
    rest = deviation.sum() / at_least_one
    deviation.sub_(rest)
    if mask is not None:
        deviation.masked_fill_(~mask, 0.0)
    return torch.stack((count, mean + rest, deviation.square().sum()))
