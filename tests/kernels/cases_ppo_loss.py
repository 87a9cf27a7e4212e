"""Calls of the `ppo_loss` ops, and faulty kernels they have to catch."""

import math
from functools import partial

import torch
from calls import Budget, Call, Mutant

from ppo_fast.functional.ppo_loss import ppo_loss


def rows(M: int, *names: str, masked: bool = False, dtype=torch.float32) -> dict:
    """Row terms of random size, the named optional ones among them; NaN where masked."""
    old = -torch.randn(M).abs() - 0.1
    values = torch.randn(M)
    given = {
        "old_log_probs": old,
        "advantages": torch.randn(M),
        "values": values,
        "old_values": values + 0.3 * torch.randn(M),
        "returns": torch.randn(M),
        "ref_log_probs": old + 0.4 * torch.randn(M),
        "weights": torch.randn(M).abs(),
    }
    always = {"old_log_probs", "advantages"}
    given = {name: x.to(dtype) for name, x in given.items() if name in always | {*names}}
    if masked:
        mask = torch.rand(M) < 0.7
        given = {name: x.masked_fill(~mask, math.nan) for name, x in given.items()}
        given["mask"] = mask
    if "values" in given:
        given["values"].requires_grad_()
    return given


def loss(M: int, *names: str, masked: bool = False, dtype=torch.float32, **kwargs) -> Call:
    """`ppo_loss` of M rows; ratios within and beyond the clip range."""
    given = rows(M, *names, masked=masked, dtype=dtype)
    log_probs = given["old_log_probs"].detach() + (0.4 * torch.randn(M)).to(dtype)
    if "entropy" in names:
        entropy = torch.randn(M).abs().to(dtype)
        if masked:
            entropy = entropy.masked_fill(~given["mask"], math.nan)
        given["entropy"] = entropy.requires_grad_()
    args = log_probs.requires_grad_(), given.pop("old_log_probs"), given.pop("advantages")
    return Call(ppo_loss, args, {"clip_coef": 0.2} | given | kwargs)


VALUE = ("values", "returns", "old_values")
ALL = (*VALUE, "ref_log_probs", "weights", "entropy")
EVERYTHING = {
    "clip_coef_high": 0.3,
    "dual_clip": 1.3,
    "vf_clip_coef": 0.2,
    "ent_coef": 0.01,
    "kl_coef": 0.2,
    "old_kl_coef": 0.3,
}
CASES = {
    "policy": partial(loss, 700),
    "dual clip": partial(loss, 40, dual_clip=1.1, clip_coef_high=0.4),
    "value": partial(loss, 33, "values", "returns", vf_coef=0.7),
    "value clip max": partial(loss, 1, *VALUE, vf_clip_coef=0.2),
    "value clip only": partial(loss, 90, *VALUE, vf_clip_coef=0.2, vf_clip="clipped"),
    "entropy": partial(loss, 50, "entropy", ent_coef=0.1),
    "k1": partial(loss, 50, "ref_log_probs", kl_coef=0.2, kl_estimator="k1"),
    "k2": partial(loss, 50, "ref_log_probs", kl_coef=0.2, kl_estimator="k2"),
    "k3": partial(loss, 50, "ref_log_probs", kl_coef=0.2),
    "kl reported only": partial(loss, 50, "ref_log_probs", "entropy"),
    "normalised": partial(loss, 1100, norm_adv=True),
    "normalised, masked": partial(loss, 1100, masked=True, norm_adv=True),
    "normalised, many rows": partial(loss, 17000, *ALL, masked=True, norm_adv=True, **EVERYTHING),
    "normalised by moments": partial(
        lambda: loss(50, masked=True, advantage_moments=torch.tensor([40.0, 0.3, 11.0]))
    ),
    "everything, masked": partial(loss, 2000, *ALL, masked=True, norm_adv=True, **EVERYTHING),
    "everything, bf16": partial(loss, 200, *ALL, dtype=torch.bfloat16, norm_adv=True, **EVERYTHING),
    "normalizer": partial(loss, 50, "values", "returns", normalizer=77.0),
    "all masked": partial(
        lambda: loss(5, "values", "returns", mask=torch.zeros(5, dtype=torch.bool), norm_adv=True)
    ),
    "numbers on the device": partial(
        lambda: loss(
            70,
            *ALL,
            **{name: torch.tensor(x) for name, x in EVERYTHING.items()} | {"clip_coef": 0.2},
            normalizer=torch.tensor(9.0),
        )
    ),
}

AOT_CASES = {
    "4096": partial(loss, 4096),
    "4096, CleanRL's": partial(
        loss, 4096, *VALUE, "entropy", ent_coef=0.01, vf_clip_coef=0.2, norm_adv=True
    ),
    "524288, everything": partial(loss, 1 << 19, *ALL, masked=True, norm_adv=True, **EVERYTHING),
    "524288, everything, bf16": partial(
        loss, 1 << 19, *ALL, masked=True, dtype=torch.bfloat16, **EVERYTHING
    ),
    "524288, k1": partial(loss, 1 << 19, "ref_log_probs", kl_coef=0.1, kl_estimator="k1"),
}
BUDGETS = [
    Budget("4096, CleanRL's", "ppo_loss_kernel", 80, wide_loads=True),
    Budget("524288, everything", "ppo_loss_kernel", 96, wide_loads=True),
    Budget("524288, everything", "whitening_kernel", 128, wide_loads=True),
]

SURROGATE, LOSS = "_surrogate.py", "ppo_loss.py"
MUTANTS = [
    Mutant(
        SURROGATE, "(clipped_loss <= unclipped_loss)", "(clipped_loss < unclipped_loss)", "policy"
    ),
    Mutant(
        SURROGATE,
        "tl.maximum(unclipped_loss, clipped_loss,",
        "tl.minimum(unclipped_loss, clipped_loss,",
        "policy",
    ),
    Mutant(SURROGATE, "1.0 + high, prop", "1.0 + low, prop", "dual clip"),
    Mutant(SURROGATE, "active = active * (1.0 - held)", "active = active", "dual clip"),
    Mutant(SURROGATE, "beyond = moved - tl", "beyond = tl", "value clip max"),
    Mutant(SURROGATE, "(size >= clipped_size)", "(size <= clipped_size)", "everything, masked"),
    Mutant(SURROGATE, "error - error * value_clipped", "error", "value clip only"),
    Mutant(SURROGATE, "grad_kl *= -(kl + difference)", "grad_kl *= -kl", "k3"),
    Mutant(SURROGATE, "grad_kl *= -difference", "grad_kl *= difference", "k2"),
    Mutant(SURROGATE, "kl = -difference", "kl = difference", "k1"),
    Mutant(
        SURROGATE,
        "keep = tl.load(rows.mask + at, mask=inside, other=False)",
        "keep = inside",
        "normalised, masked",
    ),
    Mutant(
        SURROGATE,
        "one = keep.to(tl.float32)\n    x = (_load(adv",
        "one = inside.to(tl.float32)\n    x = (_load(adv",
        "normalised, many rows",
    ),
    Mutant(SURROGATE, "grad_log_probs * weight,", "grad_log_probs,", "everything, masked"),
    Mutant(SURROGATE, "return 1.0 / tl.where(n == 0.0, 1.0, n)", "return 1.0 / n", "all masked"),
    Mutant(SURROGATE, "value -= number", "value += number", "entropy"),
    Mutant(SURROGATE, "n = number(numbers.normalizer)", "n = count", "normalizer"),
    Mutant(
        SURROGATE, "(program < programs)[:, None]", "(program < programs - 1)[:, None]", "policy"
    ),
    Mutant("_moments.py", "tl.maximum(count - 1.0, 1.0)", "tl.maximum(count, 1.0)", "normalised"),
    Mutant(LOSS, "pull = -number(numbers.ent_coef)", "pull = number(numbers.ent_coef)", "entropy"),
    Mutant(
        LOSS,
        "tl.store(gradients + at, terms[10], mask=inside)",
        "tl.store(gradients + at, terms[10], mask=keep)",
        "everything, masked",
    ),
    Mutant(
        LOSS,
        "scaled = iter(gradients * (grad_loss * inv_n))",
        "scaled = iter(gradients * grad_loss)",
        "value",
    ),
]
