"""First-order linear recursions over the first dimension, in about log2(T) calls."""

from __future__ import annotations

import torch
from torch import Tensor


def reverse_linear_scan_(x: Tensor, decays: Tensor) -> None:
    """Solve `x_t <- x_t + decays_t x_{t+1}` in place, from the last row of dim 0 to the first.

    By odd-even reduction: each even row absorbs the odd row after it, the even rows are a scan of
    half the length, and its results complete the odd rows. That is 3 calls for each halving and
    about 3 multiply-adds for each entry, with no division and no term left out.

    `decays` is overwritten; what its last row holds does not matter.
    """
    length = x.shape[0]
    # On a CPU, bench_gae.py: below 8 rows a call for each row is cheaper, and from 4096 columns
    # on a row's arithmetic outweighs its call, so the fewest passes over memory win.
    is_wide = x.is_cpu and x.numel() >= 4096 * length and not torch.compiler.is_compiling()
    if length <= 8 or is_wide:
        rows, row_decays = x.unbind(0), decays.unbind(0)
        for t in range(length - 2, -1, -1):
            rows[t].addcmul_(row_decays[t], rows[t + 1])
        return
    if length % 2:
        x[-2].addcmul_(decays[-2], x[-1])
        x, decays = x[:-1], decays[:-1]
    even, odd, even_decays, odd_decays = x[::2], x[1::2], decays[::2], decays[1::2]
    even.addcmul_(even_decays, odd)
    even_decays.mul_(odd_decays)
    reverse_linear_scan_(even, even_decays)
    odd[:-1].addcmul_(odd_decays[:-1], even[1:])
