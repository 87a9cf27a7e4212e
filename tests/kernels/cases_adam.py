"""Calls of `clipped_adam_`, and faulty kernels they have to catch."""

import math
from functools import partial

import torch
from calls import Budget, Call, Mutant

from ppo_fast.functional.adam import clipped_adam_


def adam(
    P: int,
    *,
    steps: float = 3.0,
    norm: float = 2.0,
    lr: float | torch.Tensor = 1e-2,
    known: bool = False,
    **kwargs,
) -> Call:
    """P parameters, their gradients of about this norm, in the midst of training."""
    gradients = torch.randn(P)
    gradients *= norm / gradients.norm().clamp(min=1e-30)
    if known:
        kwargs["square_sums"] = torch.stack([x.square().sum() for x in gradients.split(100)])
    buffers = torch.randn(P), gradients, 0.1 * torch.randn(P), 0.1 * torch.rand(P)
    return Call(clipped_adam_, (*buffers, torch.tensor(steps), lr), {"max_grad_norm": 0.5} | kwargs)


def everything(veto: bool) -> Call:
    """Every argument given, the numbers in 0-d tensors."""
    numbers = {"lr": torch.tensor(0.03), "max_grad_norm": torch.tensor(0.7)}
    return adam(3000, known=True, loss=torch.tensor(1.5), veto=torch.tensor(veto), **numbers)


def spoilt(value: float, **kwargs) -> Call:
    """One entry of the gradients is `value`."""
    call = adam(1500, **kwargs)
    call.args[1][1200] = value
    return call


CASES = {
    "clipped": partial(adam, 1500),
    "not clipped": partial(adam, 1500, norm=0.1),
    "one parameter": partial(adam, 1),
    "first step": partial(adam, 1100, steps=0.0, lr=100.0),
    "late": partial(adam, 1100, steps=1e5),
    "other betas": partial(adam, 1100, beta1=0.0, beta2=0.9, eps=1e-3),
    "sums known": lambda: adam(2500, known=True, loss=torch.tensor(0.3)),
    "a NaN in the gradients": partial(spoilt, math.nan),
    "infinite gradients": partial(spoilt, math.inf),
    "numbers on the device": lambda: everything(False),
    # Vetoed, a call changes nothing: tests that make it twice compare what it returns.
    "all options": lambda: everything(True),
    "vetoed": partial(lambda: adam(1500, veto=torch.tensor(True))),
    "a loss of NaN": partial(lambda: adam(1500, loss=torch.tensor(math.nan))),
    "an infinite loss": partial(lambda: adam(1500, loss=torch.tensor(-math.inf))),
    "no limit": partial(adam, 1500, max_grad_norm=math.inf),
}

AOT_CASES = {
    "9155": partial(adam, 9155),
    "9155, sums known": partial(adam, 9155, square_sums=torch.empty(72, device="meta")),
    "65536": partial(adam, 65536),
}
BUDGETS = [
    Budget("9155", "square_sums_kernel", 24),
    Budget("9155", "clipped_adam_kernel", 48),
    Budget("65536", "square_sums_kernel", 24, wide_loads=True),
    Budget("65536", "clipped_adam_kernel", 48, wide_loads=True),
]

ADAM = "adam.py"
MUTANTS = [
    Mutant(
        ADAM,
        "tl.minimum(number(max_grad_norm) / (norm",
        "tl.maximum(number(max_grad_norm) / (norm",
        "not clipped",
    ),
    Mutant(ADAM, "tl.sum(x * x, 0)", "tl.sum(tl.abs(x), 0)", "clipped"),
    Mutant(ADAM, "mask=at < size, other=0.0)", "mask=at < size - 1, other=0.0)", "one parameter"),
    Mutant(ADAM, "part < parts, other=0.0)", "part < parts - 1, other=0.0)", "sums known"),
    Mutant(
        ADAM,
        "return -(excess(x, tl.exp2(x * LOG2E)) + x)",
        "return -x",
        "first step",
    ),
    Mutant(ADAM, "tl.load(steps) + taken", "tl.load(steps)", "first step"),
    Mutant(ADAM, "tl.where(taken > 0.0, size, 0)", "size", "vetoed"),
    Mutant(ADAM, "height += tl.abs(", "height += (", "an infinite loss"),
    Mutant(ADAM, "v += (g * g - v)", "v += (g - v)", "other betas"),
    Mutant(
        ADAM,
        "tl.sqrt(v) / scale + number(eps)",
        "(tl.sqrt(v) + number(eps)) / scale",
        "other betas",
    ),
    Mutant(ADAM, "drawn == programs - 1", "drawn == programs", "clipped"),
    Mutant(
        ADAM,
        "tl.store(gradients + at, g, mask=inside)",
        "tl.store(gradients + at, g, mask=at < 0)",
        "clipped",
    ),
    Mutant(
        ADAM,
        "math.log(beta) if beta > 0.0 else -1e4",
        "math.log(max(beta, 1e-30)) * 0",
        "other betas",
    ),
]
