"""What follows a layer of a network, and its derivative.

APPROXIMATE says what the caller's products keep of it: 2 operands of 16 bits or TF32, for which
Hopper's approximate tanh is exact enough; 1 those of fp32, on an NVIDIA GPU; 0 the same without its
instructions, in the interpreter too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ppo_fast.kernels._launch import LOG2E
from ppo_fast.kernels._surrogate import ALL


@triton.jit
def _reciprocal(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE > 0:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def _tanh(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE == 2:
        # Off by 2^-11 at most, half the last place of a float16, in one instruction.
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = 1.0 - 2.0 * _reciprocal(1.0 + tl.exp2(x * (2.0 * LOG2E)), APPROXIMATE)
        # Near 0 the difference cancels.
        square = x * x
        series = square * (62.0 / 2835.0) - 17.0 / 315.0
        series = series * square + 2.0 / 15.0
        series = series * square - 1.0 / 3.0
        y = tl.where(tl.abs(x) < 0.3, x + x * square * series, y)
    return y


@triton.jit
def _expm1(x, APPROXIMATE: tl.constexpr):
    """exp(x) - 1 for x <= 0."""
    y = tl.exp2(x * LOG2E) - 1.0
    if APPROXIMATE < 2:
        # Near 0 the difference cancels.
        series = x * (1.0 / 720.0) + 1.0 / 120.0
        series = series * x + 1.0 / 24.0
        series = series * x + 1.0 / 6.0
        series = series * x + 0.5
        y = tl.where(x > -0.3, x + x * x * series, y)
    return y


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr):
    """`(f(x), what f'(x) is taken from)`: f(x) itself, or f'(x) where it does not say."""
    if ACTIVATION == "tanh":
        y = _tanh(x, APPROXIMATE)
        kept = y
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=ALL)
        kept = y
    elif ACTIVATION == "elu":
        y = tl.where(x > 0.0, x, _expm1(x, APPROXIMATE))
        kept = y
    else:
        if APPROXIMATE == 2:
            sigmoid = 0.5 + 0.5 * _tanh(0.5 * x, APPROXIMATE)
        else:
            sigmoid = _reciprocal(1.0 + tl.exp2(-x * LOG2E), APPROXIMATE)
        y = x * sigmoid
        kept = sigmoid + y * (1.0 - sigmoid)
    return y, kept


@triton.jit
def through(g, kept, ACTIVATION: tl.constexpr):
    """g times the activation's derivative."""
    wide = kept.to(tl.float32)
    if ACTIVATION == "tanh":
        out = g - g * wide * wide
    elif ACTIVATION == "relu":
        out = tl.where(kept > 0.0, g, 0.0)
    elif ACTIVATION == "elu":
        out = g + g * tl.minimum(wide, 0.0)
    else:
        out = g * wide
    return out
