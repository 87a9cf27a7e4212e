"""How much of the returns' variance the critic explains."""

from __future__ import annotations

import torch
from torch import Tensor


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over unmasked rows; NaN where returns are constant.

    Args:
        values, returns: [M] float32.
        mask: [M] bool or None.
    """
    if mask is None:
        error, spread = (returns - values).var(correction=0), returns.var(correction=0)
    else:
        count = mask.sum().clamp(min=1)

        def variance(x: Tensor) -> Tensor:
            mean = torch.where(mask, x, 0).sum() / count
            return torch.where(mask, x - mean, 0).square().sum() / count

        error, spread = variance(returns - values), variance(returns)
    return torch.where(spread > 0, 1 - error / spread, float("nan"))
