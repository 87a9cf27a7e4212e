"""The problems the kernels are timed on: `cases(tiny)` lists them, those with a record to beat first.

Shapes and targets are of the public records per operation and of the roofline table; `tiny` has every
op at sizes an interpreter can take. What a case must do at least is counted, not estimated: each
input read once and each output written once, unless `reads` says otherwise; FLOPs by the formula
beside each family. Fractions of the measured ceilings are taken from these counts for every arm
alike, whatever it moves itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.dispatch import Accelerated
from ppo_fast.functional.gae import gae, gae_packed
from ppo_fast.functional.kl import kl_from_logits
from ppo_fast.functional.log_probs import log_probs_from_logits
from ppo_fast.functional.ppo_loss import ppo_loss, ppo_loss_from_gaussian, ppo_loss_from_logits
from ppo_fast.functional.sample import sample_from_logits
from ppo_fast.functional.whiten import masked_whiten

Inputs = dict[str, Any]
"""An op's arguments by name."""

Named = dict[str, Tensor]
"""Outputs by name, and gradients as "d <input>"."""

ENDS = 0.01
"""Share of rows that end an episode, and of rows that cut one."""

BF16, FP32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """One op at one size, one pass."""

    op: Accelerated
    name: str
    """Its size and options."""
    make: Callable[[], Inputs]
    """New inputs on the default device; floating inputs that are differentiated require grad."""
    outputs: tuple[str, ...]
    """Names of the op's outputs, in order; the rest of them is not looked at."""
    flops: int
    gradient: bool = False
    """Whether the backward is part of it."""
    reads: dict[str, float] = {}  # noqa: RUF012 - a constant
    """How often an input is read at least, where that is not once."""
    target_us: float | None = None
    """Device time to reach on an H200."""
    priority: int = 2
    """0: named in the acceptance; 1: a public record; cases run in this order."""
    compiled: bool = False
    """Whether torch.compile is an arm: compiling takes longer than measuring."""
    function: Callable[..., Any] | None = None
    """What is called instead of the op alone."""

    @property
    def label(self) -> str:
        return self.op.__name__ if self.function is None else self.function.__name__

    @property
    def passes(self) -> str:
        return "forward + backward" if self.gradient else "forward"

    def call(self, inputs: Inputs) -> Named:
        """Run the op, in the backend in force, and name its outputs."""
        return self.named((self.function or self.op)(**inputs))

    def named(self, result: Any) -> Named:
        found = result if isinstance(result, tuple) else (result,)
        return dict(zip(self.outputs, found, strict=False))

    def bytes(self, inputs: Inputs, results: Named) -> int:
        """What has to pass through the memory of the device."""
        moved = sum(
            self.reads.get(name, 1) * x.numel() * x.element_size()
            for name, x in inputs.items()
            if isinstance(x, Tensor)
        )
        return round(moved + sum(x.numel() * x.element_size() for x in results.values()))


def with_gradients(
    outputs: Named,
    leaves: Named,
    upstream: Named,
    convert: Callable[[Tensor], Tensor] | None = None,
) -> Named:
    """Outputs, detached, and the gradients of the leaves; `convert` brings those into our layout."""
    if upstream:
        names = [name for name in upstream if name in outputs]
        gradients = torch.autograd.grad(
            [outputs[name] for name in names], list(leaves.values()), [upstream[n] for n in names]
        )
        found = {name: x.detach() for name, x in outputs.items()}
        for name, gradient in zip(leaves, gradients, strict=True):
            found[f"d {name}"] = gradient if convert is None else convert(gradient)
        return found
    return {name: x.detach() for name, x in outputs.items()}


def leaves_of(inputs: Inputs) -> Named:
    """The inputs that are differentiated."""
    return {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}


def cases(tiny: bool = False) -> list[Case]:
    """Every case, most wanted first."""
    families = (_gae, _packed, _log_probs, _losses, _heads, _kl, _whiten, _sample, _linear)
    found = [case for family in families for case in family(tiny)]
    return sorted(found, key=lambda case: case.priority)


def _flags(share: float, *shape: int) -> Tensor:
    return torch.rand(shape) < share


def _logits(M: int, V: int, dtype: torch.dtype) -> Tensor:
    """Spread 3, and one outlier a row, as the logits of a trained model have."""
    logits = torch.randn(M, V, dtype=dtype).mul_(3)
    logits[:, V // 2] += 8
    return logits


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]


# --- gae: r, v in fp32, done in 1 byte, advantages and returns in fp32: 17 bytes and 8 FLOPs a step.

GAE = {  # N, T: target in microseconds, priority
    (8192, 1024): (36.9, 0),
    (32768, 128): (18.5, 0),
    (8192, 4096): (156.0, 1),
    (2048, 4096): (39.0, 1),
    (8192, 2048): (None, 1),
    (32768, 8): (4.0, 1),
    (32768, 16): (5.0, 1),
    (32768, 32): (6.5, 1),
    (4096, 128): (None, 1),
    (16, 131072): (13.0, 1),
    (16, 524288): (52.0, 1),
    (4096, 512): (None, 2),
    (256, 1024): (None, 2),
    (32768, 2048): (None, 2),
}
GAE_TIME_MAJOR = ((8192, 1024), (32768, 128), (8192, 4096), (32768, 16), (4096, 128), (16, 131072))


def _gae(tiny: bool) -> Iterator[Case]:
    shapes = {(5, 40): (None, 0)} if tiny else GAE
    for (N, T), (target, priority) in shapes.items():
        for batch_major in (True, False):
            if not batch_major and not tiny and (N, T) not in GAE_TIME_MAJOR:
                continue
            yield Case(
                gae,
                f"{N}x{T}, {'[N, T].t()' if batch_major else '[T, N]'}",
                partial(_rollout, T, N, batch_major),
                ("advantages", "returns"),
                flops=8 * T * N,
                target_us=target,
                priority=priority,
                compiled=(N, T) == (8192, 1024) or tiny,
            )
    N, T = (3, 40) if tiny else (8192, 1024)
    yield Case(
        gae,
        f"{N}x{T}, [T, N], truncated, moments",
        partial(_rollout, T, N, False, truncated=True, with_moments=True),
        ("advantages", "returns", "moments"),
        flops=14 * T * N,
        reads={"bootstrap_values": ENDS},
    )


def _rollout(T: int, N: int, batch_major: bool, truncated: bool = False, **options: bool) -> Inputs:
    shape = (N, T) if batch_major else (T, N)

    def turned(x: Tensor) -> Tensor:
        return x.t() if batch_major else x

    inputs = {
        "rewards": turned(torch.randn(shape)),
        "values": turned(torch.randn(shape)),
        "next_value": torch.randn(N),
        "terminated": turned(_flags(ENDS, *shape)),
        "gamma": 0.99,
        "gae_lambda": 0.95,
        **options,
    }
    if truncated:
        inputs["truncated"] = turned(_flags(ENDS, *shape))
        inputs["bootstrap_values"] = turned(torch.randn(shape))
    return inputs


def _packed(tiny: bool) -> Iterator[Case]:
    sequences, average = (4, 12) if tiny else (8192, 1024)
    yield Case(
        gae_packed,
        f"{sequences} sequences of {average} on average",
        partial(_packed_inputs, sequences, average),
        ("advantages", "returns"),
        flops=8 * sequences * average,
        compiled=tiny,
    )


def _packed_inputs(sequences: int, average: int) -> Inputs:
    lengths = torch.randint(average // 2, average * 3 // 2, (sequences,))
    inputs = _rollout(int(lengths.sum()), 1, False)
    for name in ("rewards", "values", "terminated"):
        inputs[name] = inputs[name].squeeze(1)
    inputs["next_value"] = torch.randn(sequences)
    inputs["cu_seqlens"] = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    return inputs


# --- log_probs_from_logits: a subtraction, exp and two sums an element; with entropy a product and a
# sum more; the backward reads the logits again, 6 FLOPs an element.

LOG_PROBS = {  # M, V, dtype, entropy, gradient: target, priority
    (8192, 151936, BF16, True, False): (630.0, 0),
    (8192, 151936, BF16, True, True): (1890.0, 1),
    (8192, 128256, BF16, False, False): (530.0, 1),
    (8192, 128256, BF16, False, True): (1590.0, 1),
    (8192, 128256, BF16, True, True): (1590.0, 1),
    (8192, 32768, BF16, True, False): (None, 2),
    (8192, 32768, BF16, True, True): (None, 2),
    (8192, 32768, FP32, True, False): (None, 2),
    (16384, 256000, BF16, True, False): (None, 2),
    (16, 151936, BF16, True, False): (None, 2),
    (32768, 4, FP32, True, True): (None, 2),
}


def _log_probs(tiny: bool) -> Iterator[Case]:
    shapes = LOG_PROBS
    if tiny:
        options = ((FP32, False, True), (BF16, True, False))
        shapes = {(4, 300, *option): (None, 0) for option in options}
    for (M, V, dtype, entropy, gradient), (target, priority) in shapes.items():
        yield Case(
            log_probs_from_logits,
            f"{M}x{V} {_short(dtype)}" + (", entropy" if entropy else ""),
            partial(_log_probs_inputs, M, V, dtype, entropy, gradient),
            ("log_probs", "entropy") if entropy else ("log_probs",),
            flops=M * V * ((6 if entropy else 4) + (6 if gradient else 0)),
            gradient=gradient,
            reads={"logits": 2} if gradient else {},
            target_us=target,
            priority=priority,
            compiled=tiny or (V == 151936 and M > 16),
        )


def _log_probs_inputs(M: int, V: int, dtype: torch.dtype, entropy: bool, gradient: bool) -> Inputs:
    return {
        "logits": _logits(M, V, dtype).requires_grad_(gradient),
        "index": torch.randint(V, (M,)),
        "with_entropy": entropy,
    }


# --- the losses: 33 bytes a token from log-probs, 30 FLOPs; heads 12 FLOPs an action more.

COEFFICIENTS = {"clip_coef": 0.2, "vf_coef": 0.5, "vf_clip_coef": 0.2}


def _terms(M: int) -> Inputs:
    old_values = torch.randn(M)
    return {
        "old_log_probs": torch.randn(M).sub_(3),
        "advantages": torch.randn(M),
        "values": (old_values + torch.randn(M).mul_(0.3)).requires_grad_(),
        "old_values": old_values,
        "returns": torch.randn(M),
        **COEFFICIENTS,
    }


def _losses(tiny: bool) -> Iterator[Case]:
    tokens = {1 << 20: (10.0, 1), 32768: (None, 2), 524288: (None, 2), 1 << 26: (None, 2)}
    for M, (target, priority) in ({200: (None, 0)} if tiny else tokens).items():
        yield Case(
            ppo_loss,
            f"{M} tokens, mask",
            partial(_loss_inputs, M),
            ("loss",),
            flops=30 * M,
            gradient=True,
            target_us=target,
            priority=priority,
            compiled=tiny or M == 1 << 20,
        )


def _loss_inputs(M: int) -> Inputs:
    terms = _terms(M)
    log_probs = terms["old_log_probs"] + torch.randn(M).mul_(0.2)
    return {"log_probs": log_probs.requires_grad_(), **terms, "mask": _flags(0.9, M)}


def _heads(tiny: bool) -> Iterator[Case]:
    small = {(32768, 4): (4.0, 1), (524288, 18): (None, 2), (1 << 22, 64): (None, 2)}
    for (M, A), (target, priority) in ({(50, 4): (None, 0)} if tiny else small).items():
        yield Case(
            ppo_loss_from_logits,
            f"{M}x{A} fp32, values",
            partial(_head_inputs, M, A),
            ("loss",),
            flops=M * (30 + 12 * A),
            gradient=True,
            target_us=target,
            priority=priority,
            compiled=tiny or M == 524288,
        )
    # Advantages equal along a sequence, policy term alone: what Liger's kernel can be asked for.
    wide = {(8192, 151936): (1500.0, 0), (8192, 32768): (None, 2)}
    for (M, V), (target, priority) in ({(6, 1100): (None, 0)} if tiny else wide).items():
        yield Case(
            ppo_loss_from_logits,
            f"{M}x{V} bf16",
            partial(_vocabulary_inputs, M, V),
            ("loss",),
            flops=M * V * 12,
            gradient=True,
            target_us=target,
            priority=priority,
            compiled=tiny or V == 151936,
        )
    gaussian = {(524288, 21): (None, 1), (32768, 8): (None, 2)}
    for (M, A), (target, priority) in ({(50, 3): (None, 0)} if tiny else gaussian).items():
        yield Case(
            ppo_loss_from_gaussian,
            f"{M}x{A}, one std",
            partial(_gaussian_inputs, M, A),
            ("loss",),
            flops=M * (30 + 12 * A),
            gradient=True,
            target_us=target,
            priority=priority,
            compiled=tiny or M == 524288,
        )


def _head_inputs(M: int, A: int) -> Inputs:
    return _near_old(torch.randn(M, A), torch.randint(A, (M,))) | {"ent_coef": 0.01}


def _vocabulary_inputs(M: int, V: int) -> Inputs:
    inputs = _near_old(_logits(M, V, BF16), torch.randint(V, (M,)))
    sequences = max(1, M // 1024)
    advantages = torch.randn(sequences).repeat_interleave(M // sequences)
    kept = ("logits", "actions", "old_log_probs", "clip_coef")
    return {name: inputs[name] for name in kept} | {"advantages": advantages}


def _gaussian_inputs(M: int, A: int) -> Inputs:
    mean, actions = (torch.randn(M, A).mul_(0.3) for _ in range(2))
    log_std = torch.full((A,), -0.5)
    z = (actions - mean) / log_std.exp()
    log_probs = (-z.square() / 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    return {
        "mean": mean.requires_grad_(),
        "log_std": log_std.requires_grad_(),
        "actions": actions,
        **_terms(M),
        "old_log_probs": log_probs + torch.randn(M).mul_(0.2),
        "ent_coef": 0.01,
    }


def _near_old(logits: Tensor, actions: Tensor) -> Inputs:
    """A minibatch whose ratios lie on both sides of the clip range."""
    taken = logits.gather(1, actions.unsqueeze(1)).squeeze(1).float()
    blocks = [torch.logsumexp(block.float(), -1) for block in logits.split(1 << 12)]
    log_probs = taken - torch.cat(blocks)
    return {
        "logits": logits.requires_grad_(),
        "actions": actions,
        **_terms(len(logits)),
        "old_log_probs": log_probs + torch.randn(len(logits)).mul_(0.2),
    }


# --- kl_from_logits: two softmaxes and a product; the backward reads both again and writes one.

KL = {  # M, V, direction, gradient: priority
    (8192, 151936, "forward", True): 1,
    (8192, 151936, "reverse", True): 1,
    (8192, 151936, "forward", False): 1,
    (8192, 32768, "forward", True): 2,
    (32768, 128256, "forward", False): 2,
}


def _kl(tiny: bool) -> Iterator[Case]:
    shapes = {(4, 1100, d, True): 0 for d in ("forward", "reverse")} if tiny else KL
    for (M, V, direction, gradient), priority in shapes.items():
        yield Case(
            kl_from_logits,
            f"{M}x{V} bf16, {direction}",
            partial(_kl_inputs, M, V, direction, gradient),
            ("kl",),
            flops=M * V * (10 + (10 if gradient else 0)),
            gradient=gradient,
            reads={"logits": 2, "ref_logits": 2} if gradient else {},
            priority=priority,
            compiled=tiny or (V == 151936 and gradient and direction == "forward"),
        )


def _kl_inputs(M: int, V: int, direction: str, gradient: bool) -> Inputs:
    logits = _logits(M, V, BF16)
    ref_logits = logits + torch.randn_like(logits)
    return {
        "logits": logits.requires_grad_(gradient),
        "ref_logits": ref_logits,
        "direction": direction,
    }


# --- masked_whiten: the moments need all of x before the first output: two reads and a write.


def _whiten(tiny: bool) -> Iterator[Case]:
    sizes = {1 << 24: (64.0, 1), 524288: (None, 2), 1 << 23: (None, 2), 1 << 26: (None, 2)}
    for M, (target, priority) in ({300: (None, 0)} if tiny else sizes).items():
        yield Case(
            masked_whiten,
            f"{M}, mask",
            partial(_whiten_inputs, M),
            ("whitened",),
            flops=6 * M,
            reads={"x": 2, "mask": 2},
            target_us=target,
            priority=priority,
            compiled=tiny or M == 1 << 24,
        )


def _whiten_inputs(M: int) -> Inputs:
    return {"x": torch.randn(M) + 2, "mask": _flags(0.9, M)}


# --- sample_from_logits: one read; noise, exp and three sums an element.


def _sample(tiny: bool) -> Iterator[Case]:
    shapes = {
        (256, 151936, BF16): (25.0, 1),
        (256, 128256, BF16): (None, 2),
        (4096, 151936, BF16): (None, 2),
        (32768, 4, FP32): (None, 2),
    }
    for (M, V, dtype), (target, priority) in (
        {(5, 600, FP32): (None, 0)} if tiny else shapes
    ).items():
        yield Case(
            sample_from_logits,
            f"{M}x{V} {_short(dtype)}",
            partial(_sample_inputs, M, V, dtype),
            ("actions", "log_probs", "entropy"),
            flops=12 * M * V,
            target_us=target,
            priority=priority,
            compiled=tiny or (M, V) == (256, 151936),
        )


def _sample_inputs(M: int, V: int, dtype: torch.dtype) -> Inputs:
    return {"logits": _logits(M, V, dtype)}


# --- a language-model head and the log-prob behind it: 2 M V D FLOPs forward, twice that backward.


def mean_nll_from_hidden(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """The logits pass through memory here; what fuses the head keeps them out of it."""
    return -log_probs_from_logits(hidden @ weight.t(), index).mean()


def _linear(tiny: bool) -> Iterator[Case]:
    M, D, V = (4, 8, 70) if tiny else (8192, 4096, 151936)
    dtype = FP32 if tiny else BF16
    for gradient in (False, True):
        yield Case(
            log_probs_from_logits,
            f"{M}x{D}x{V} {_short(dtype)}",
            partial(_linear_inputs, M, D, V, dtype, gradient),
            ("loss",),
            flops=2 * M * V * D * (3 if gradient else 1),
            gradient=gradient,
            priority=2,
            function=mean_nll_from_hidden,
        )


def _linear_inputs(M: int, D: int, V: int, dtype: torch.dtype, gradient: bool) -> Inputs:
    hidden = torch.randn(M, D, dtype=dtype)
    weight = torch.randn(V, D, dtype=dtype).mul_(3 / D**0.5)
    return {
        "hidden": hidden.requires_grad_(gradient),
        "weight": weight.requires_grad_(gradient),
        "index": torch.randint(V, (M,)),
    }
