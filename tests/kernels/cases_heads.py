"""Calls of the `ppo_loss` ops with small heads, and faulty kernels they have to catch."""

import math
from functools import partial

import torch
from calls import Budget, Call, Mutant
from cases_ppo_loss import rows

from ppo_fast.functional.ppo_loss import ppo_loss_from_gaussian, ppo_loss_from_logits

VALUE = ("values", "returns", "old_values")
ALL = (*VALUE, "ref_log_probs", "weights")
EVERYTHING = {
    "clip_coef_high": 0.3,
    "dual_clip": 1.3,
    "vf_clip_coef": 0.2,
    "ent_coef": 0.05,
    "kl_coef": 0.2,
    "old_kl_coef": 0.3,
}


def near(given: dict, log_probs: torch.Tensor) -> None:
    """Put the old and reference log-probs within and beyond the clip range of these."""
    for name, distance in (("old_log_probs", 0.3), ("ref_log_probs", 0.6)):
        if name in given:
            # NaN, where masked, stays.
            noise = distance * torch.randn(len(log_probs))
            given[name] = given[name] * 0.0 + log_probs + noise


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second of a wider tensor's columns further apart."""
    return torch.cat((x, x[:, :3]), 1)[:, : x.shape[1]]


def categorical(
    M: int,
    sizes: tuple[int, ...],
    *names: str,
    masked: bool = False,
    illegal: bool = False,
    dtype: torch.dtype = torch.float32,
    actions_dtype: torch.dtype = torch.int64,
    layout=lambda x: x,
    **kwargs,
) -> Call:
    """M rows of one or several heads; NaN where masked or illegal."""
    given = rows(M, *names, masked=masked)
    logits = (2.0 * torch.randn(M, sum(sizes))).to(dtype)
    actions = torch.stack([torch.randint(0, size, (M,)) for size in sizes], 1)
    columns = actions + torch.tensor([0, *sizes[:-1]]).cumsum(0)
    legal = torch.rand(M, sum(sizes)) < (0.6 if illegal else 1.0)
    legal.scatter_(1, columns, True)
    exact = (logits.float() / kwargs.get("temperature", 1.0)).masked_fill(~legal, -math.inf)
    heads = zip(exact.split(sizes, 1), actions.split(1, 1), strict=True)
    near(given, sum(x.log_softmax(1).gather(1, a).squeeze(1) for x, a in heads))
    if illegal:
        logits = logits.masked_fill(~legal, math.nan)
        given["action_mask"] = layout(legal)
    if masked:
        logits = logits.masked_fill(~given["mask"].unsqueeze(1), math.nan)
        actions = actions.masked_fill(~given["mask"].unsqueeze(1), -7)
    if len(sizes) > 1:
        given["head_sizes"] = sizes
    else:
        actions = actions.squeeze(1)
    args = layout(logits).requires_grad_(), actions.to(actions_dtype)
    old = given.pop("old_log_probs"), given.pop("advantages")
    return Call(ppo_loss_from_logits, (*args, *old), {"clip_coef": 0.2} | given | kwargs)


def gaussian(
    M: int,
    A: int,
    *names: str,
    masked: bool = False,
    per_row: bool = False,
    dtype: torch.dtype = torch.float32,
    actions_dtype: torch.dtype = torch.float32,
    layout=lambda x: x,
    **kwargs,
) -> Call:
    """M rows of A dimensions, with one log_std or one a row; NaN where masked."""
    given = rows(M, *names, masked=masked)
    mean = torch.randn(M, A)
    log_std = (0.4 * torch.randn(M, A) - 0.5) if per_row else 0.4 * torch.randn(A) - 0.5
    mean, log_std = mean.to(dtype), log_std.to(dtype)
    actions = (mean.float() + log_std.float().exp() * torch.randn(M, A)).to(actions_dtype)
    z = (actions.float() - mean.float()) * (-log_std.float()).exp()
    log_probs = (-0.5 * z * z - log_std.float() - 0.5 * math.log(2 * math.pi)).sum(1)
    if kwargs.get("squash"):
        u = actions.float()
        log_probs -= 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u)).sum(1)
    near(given, log_probs)
    if masked:
        drop = ~given["mask"].unsqueeze(1)
        mean, actions = mean.masked_fill(drop, math.nan), actions.masked_fill(drop, math.nan)
        log_std = log_std.masked_fill(drop, math.nan) if per_row else log_std
    args = layout(mean).requires_grad_(), log_std.requires_grad_(), layout(actions)
    old = given.pop("old_log_probs"), given.pop("advantages")
    return Call(ppo_loss_from_gaussian, (*args, *old), {"clip_coef": 0.2} | given | kwargs)


def special(rule: str) -> Call:
    """60 rows of 5 logits, some of them out of the ordinary."""
    call = categorical(60, (5,), "values", "returns", ent_coef=0.1, illegal="mask" in rule)
    logits, actions = call.args[0].detach(), call.args[1]
    if rule == "illegal actions taken":
        logits[torch.arange(0, 60, 3), actions[::3]] = -math.inf
    elif rule == "nothing legal":
        logits[::3] = -math.inf
    elif rule == "nothing legal by the mask":
        call.kwargs["action_mask"][::3] = False
    elif rule == "lowest numbers":
        logits[::3] = torch.finfo(torch.float32).min
        logits[1::3, 2] = torch.finfo(torch.float32).min
    elif rule == "far logits":
        logits += 3000.0
        logits[::2] *= -1.0
    elif rule == "peaked":
        logits[torch.arange(0, 60, 2), actions[::2]] += 200.0
    elif rule == "ties":
        logits[::2] = 1.0
    elif rule == "NaN":
        logits[7, 3] = math.nan
    elif rule == "infinite":
        logits[7, 3] = math.inf
    return call._replace(args=(logits.requires_grad_(), *call.args[1:]))


def numbers_on_the_device(make) -> Call:
    call = make()
    numbers = EVERYTHING | {"clip_coef": 0.2, "normalizer": 50.0}
    if call.op is ppo_loss_from_logits:
        numbers["temperature"] = 1.5
    return call._replace(kwargs=call.kwargs | {k: torch.tensor(x) for k, x in numbers.items()})


def frozen(call: Call, *which: int | str) -> Call:
    """The call with these arguments not requiring gradients."""
    args = tuple(x.detach() if i in which else x for i, x in enumerate(call.args))
    return call._replace(
        args=args, kwargs={k: x.detach() if k in which else x for k, x in call.kwargs.items()}
    )


def leading(call: Call, *shape: int) -> Call:
    """The call with its rows, the first dimension of all tensors, as this shape."""
    rows = math.prod(shape)

    def fold(x):
        is_row = isinstance(x, torch.Tensor) and x.dim() and len(x) == rows
        return x.detach().unflatten(0, shape).requires_grad_(x.requires_grad) if is_row else x

    return call._replace(
        args=tuple(map(fold, call.args)), kwargs={k: fold(x) for k, x in call.kwargs.items()}
    )


THREE = (3, 4, 5)
MANY = (2, 3, 1, 5, 2, 2, 4, 3, 2)
CASES = {
    "one action": partial(categorical, 3, (1,), ent_coef=0.1),
    "two actions": partial(categorical, 130, (2,), *VALUE, ent_coef=0.01),
    "one row": partial(categorical, 1, (4,), *VALUE, ent_coef=0.01, vf_clip_coef=0.2),
    "six actions": partial(categorical, 130, (6,), ent_coef=0.1),
    "no entropy bonus": partial(categorical, 70, (6,)),
    "temperature": partial(categorical, 70, (6,), ent_coef=0.1, temperature=0.6),
    "categorical: everything, masked": partial(
        categorical,
        300,
        (7,),
        *ALL,
        masked=True,
        illegal=True,
        norm_adv=True,
        temperature=1.3,
        **EVERYTHING,
    ),
    "18 actions": partial(categorical, 60, (18,), ent_coef=0.1),
    "37 actions": partial(categorical, 60, (37,), ent_coef=0.1, illegal=True),
    "64 actions": partial(categorical, 40, (64,), *ALL, masked=True, **EVERYTHING),
    "100 actions, masked": partial(
        categorical, 40, (100,), masked=True, illegal=True, ent_coef=0.1
    ),
    "128 actions": partial(categorical, 20, (128,), ent_coef=0.1),
    "bf16": partial(categorical, 60, (6,), *ALL, dtype=torch.bfloat16, **EVERYTHING),
    "fp16": partial(categorical, 60, (8,), masked=True, dtype=torch.float16, ent_coef=0.1),
    "int32 actions": partial(categorical, 20, (6,), actions_dtype=torch.int32),
    "uint8 actions": partial(categorical, 20, (6,), actions_dtype=torch.uint8),
    "three heads": partial(categorical, 130, THREE, *VALUE, ent_coef=0.1),
    "three heads: everything, masked": partial(
        categorical,
        130,
        THREE,
        *ALL,
        masked=True,
        illegal=True,
        norm_adv=True,
        temperature=0.7,
        **EVERYTHING,
    ),
    "three heads, bf16": partial(categorical, 33, (4, 8, 4), dtype=torch.bfloat16, ent_coef=0.1),
    "wide heads": partial(categorical, 9, (300, 2, 500), ent_coef=0.1, masked=True),
    "many heads": partial(
        categorical, 40, MANY, *ALL, masked=True, illegal=True, temperature=0.7, **EVERYTHING
    ),
    "many wide heads": partial(categorical, 5, (96,) * 10, ent_coef=0.1),
    "strided": partial(categorical, 40, (6,), illegal=True, layout=strided, ent_coef=0.1),
    "columns apart": partial(
        categorical,
        40,
        (6,),
        illegal=True,
        ent_coef=0.1,
        layout=lambda x: torch.stack((x, x), -1)[..., 0],
    ),
    "several tiles a program": partial(
        categorical, 1200, (2,), *VALUE, masked=True, norm_adv=True, ent_coef=0.1
    ),
    "normalizer": partial(categorical, 20, (3,), normalizer=77.0),
    "categorical, numbers on the device": partial(
        numbers_on_the_device, partial(categorical, 40, THREE, *ALL)
    ),
    "time-major": lambda: leading(categorical(60, (4,), *VALUE, illegal=True), 3, 4, 5),
    "logits frozen": lambda: frozen(categorical(40, (4,), *VALUE), 0),
    "values frozen": lambda: frozen(categorical(40, (4,), *VALUE), "values"),
    "all masked": lambda: categorical(
        5, (4,), "values", "returns", mask=torch.zeros(5, dtype=torch.bool), norm_adv=True
    ),
    **{
        rule: partial(special, rule)
        for rule in (
            *("illegal actions taken", "nothing legal", "nothing legal by the mask"),
            *("lowest numbers", "far logits", "peaked", "ties", "NaN", "infinite"),
        )
    },
    "gaussian": partial(gaussian, 130, 6, *VALUE, ent_coef=0.01),
    "gaussian, one dimension": partial(gaussian, 3, 1, ent_coef=0.1),
    "gaussian, one row": partial(gaussian, 1, 5, *VALUE, ent_coef=0.1),
    "gaussian: everything, masked": partial(
        gaussian, 300, 6, *ALL, masked=True, norm_adv=True, **EVERYTHING
    ),
    "gaussian, per row: everything, masked": partial(
        gaussian, 130, 6, *ALL, masked=True, per_row=True, norm_adv=True, **EVERYTHING
    ),
    "squashed": partial(gaussian, 130, 6, *ALL, squash=True, **EVERYTHING),
    "squashed, per row": partial(
        gaussian, 130, 3, "weights", masked=True, per_row=True, squash=True, ent_coef=0.1
    ),
    "gaussian, 17": partial(gaussian, 60, 17, *VALUE, ent_coef=0.1),
    "gaussian, 21": partial(gaussian, 60, 21, squash=True, per_row=True, ent_coef=0.1),
    "gaussian, 64": partial(gaussian, 40, 64, masked=True, ent_coef=0.1, squash=True),
    "gaussian, 200": partial(gaussian, 9, 200, masked=True, ent_coef=0.1),
    "gaussian, bf16": partial(gaussian, 60, 8, dtype=torch.bfloat16, ent_coef=0.1),
    "gaussian, fp16": partial(
        gaussian, 60, 4, dtype=torch.float16, actions_dtype=torch.float16, per_row=True
    ),
    "gaussian, strided": partial(gaussian, 40, 6, layout=strided, masked=True),
    "gaussian, time-major": lambda: leading(gaussian(60, 4, *VALUE, squash=True), 3, 4, 5),
    "gaussian, several tiles": partial(gaussian, 1200, 2, masked=True, norm_adv=True, ent_coef=0.1),
    "gaussian, numbers on the device": partial(
        numbers_on_the_device, partial(gaussian, 40, 3, *ALL, squash=True)
    ),
    "mean frozen": lambda: frozen(gaussian(40, 4, *VALUE), 0),
    "log_std frozen": lambda: frozen(gaussian(40, 4, *VALUE), 1),
}


def blank(M: int, shape: tuple[int, ...], *names: str, masked: bool = False, **kwargs) -> Call:
    """A call of these sizes for the compiler, its tensors unwritten: logits of heads, or a mean.

    `per_row` (None for a categorical policy) tells the two apart.
    """
    per_row, dtype = kwargs.pop("per_row", None), kwargs.pop("dtype", torch.float32)
    illegal = kwargs.pop("illegal", False)
    given = {name: x.detach() for name, x in rows(1, *names, masked=masked).items()}
    given = {name: torch.empty(M, dtype=x.dtype) for name, x in given.items()}
    if "values" in given:
        given["values"].requires_grad_()
    A = sum(shape)
    first = torch.empty(M, A, dtype=dtype).requires_grad_()
    old = given.pop("old_log_probs"), given.pop("advantages")
    if per_row is None:
        if illegal:
            given["action_mask"] = torch.empty(M, A, dtype=torch.bool)
        if len(shape) > 1:
            given["head_sizes"] = shape
        actions = torch.empty((M, len(shape)) if len(shape) > 1 else (M,), dtype=torch.int64)
        op, args = ppo_loss_from_logits, (first, actions)
    else:
        log_std = torch.empty((M, A) if per_row else (A,)).requires_grad_()
        op, args = ppo_loss_from_gaussian, (first, log_std, torch.empty(M, A))
    return Call(op, (*args, *old), {"clip_coef": 0.2} | given | kwargs)


CLEANRL = {"vf_clip_coef": 0.2, "ent_coef": 0.01, "norm_adv": True}
# Many are those whose advantages have a launch of their own; how many makes no difference.
FEW, MUCH = 4096, 1 << 15
RICH = {"masked": True, "norm_adv": True} | EVERYTHING
AOT_CASES = {
    **{
        f"{A} actions": partial(blank, MUCH, (A,), *VALUE, **CLEANRL)
        for A in (2, 4, 6, 18, 64, 128)
    },
    **{f"{A} actions, few rows": partial(blank, FEW, (A,), *VALUE, **CLEANRL) for A in (6, 128)},
    **{
        f"{A} actions, everything": partial(blank, MUCH, (A,), *ALL, illegal=True, **RICH)
        for A in (6, 18, 64, 100)
    },
    "64 actions, bf16": partial(blank, MUCH, (64,), *VALUE, dtype=torch.bfloat16, **CLEANRL),
    "three heads": partial(blank, MUCH, THREE, *VALUE, **CLEANRL),
    "three heads, everything": partial(blank, MUCH, THREE, *ALL, illegal=True, **RICH),
    "wide heads": partial(blank, MUCH, (300, 2, 500), *VALUE, **CLEANRL),
    "many heads, everything": partial(blank, MUCH, (11,) * 17, *ALL, illegal=True, **RICH),
    **{
        f"gaussian, {A}{', per row' if per_row else ''}": partial(
            blank, MUCH, (A,), *VALUE, per_row=per_row, **CLEANRL
        )
        for A in (1, 6, 21, 64)
        for per_row in (False, True)
    },
    "gaussian, 6, few rows": partial(blank, FEW, (6,), *VALUE, per_row=False, **CLEANRL),
    "gaussian, 256, few rows": partial(blank, FEW, (256,), *VALUE, per_row=False, **CLEANRL),
    **{
        f"squashed, {A}{', per row' if per_row else ''}, everything": partial(
            blank, MUCH, (A,), *ALL, per_row=per_row, squash=True, **RICH
        )
        for A in (6, 21, 64)
        for per_row in (False, True)
    },
}
CATEGORICAL, GAUSSIAN = "categorical_loss_kernel", "gaussian_loss_kernel"
WIDE, QUIET = {"wide_loads": True}, {"quiet_loop": True}
BUDGETS = [
    # Instructions an action or dimension include the PPO terms of its row, about 180 a row. They
    # are promised where the loop over rows loads 128 bits at a time, which tells it from others.
    Budget("2 actions", CATEGORICAL, 72),
    Budget("4 actions", CATEGORICAL, 72, **WIDE, **QUIET, elements=4, instructions=60),
    Budget("6 actions", CATEGORICAL, 72),
    Budget("6 actions, everything", CATEGORICAL, 80),
    Budget("18 actions", CATEGORICAL, 88),
    Budget("18 actions, everything", CATEGORICAL, 104),
    Budget("64 actions", CATEGORICAL, 128, **WIDE, elements=16, instructions=27),
    Budget("64 actions, everything", CATEGORICAL, 168, **WIDE, elements=16, instructions=36),
    Budget("64 actions, bf16", CATEGORICAL, 128),
    Budget("128 actions", CATEGORICAL, 128, **WIDE, elements=16, instructions=28),
    Budget("three heads", CATEGORICAL, 80),
    Budget("three heads, everything", CATEGORICAL, 104),
    Budget("many heads, everything", CATEGORICAL, 96),
    Budget("wide heads", CATEGORICAL, 168),
    Budget("gaussian, 6", GAUSSIAN, 88),
    Budget("gaussian, 6, per row", GAUSSIAN, 72),
    Budget("gaussian, 21", GAUSSIAN, 128),
    Budget("gaussian, 21, per row", GAUSSIAN, 104),
    Budget("gaussian, 64", GAUSSIAN, 104, **WIDE, elements=8, instructions=36),
    Budget("gaussian, 64, per row", GAUSSIAN, 96, **WIDE, elements=8, instructions=36),
    Budget("squashed, 64, per row, everything", GAUSSIAN, 104, **WIDE, elements=8, instructions=66),
]

HEADS = "_heads.py"
MUTANTS = [
    Mutant(HEADS, 'x = tl.where(legal, x, float("-inf"))', "x = x", "37 actions"),
    Mutant(
        HEADS,
        'taken = tl.where(is_legal, taken, float("-inf"))',
        "taken = taken",
        "nothing legal by the mask",
    ),
    Mutant(
        HEADS,
        'x = tl.where(keep[:, None], x, float("-inf"))',
        "x = x",
        "categorical: everything, masked",
    ),
    Mutant(HEADS, "t = tl.maximum(t, FAR)", "t = t", "37 actions"),
    Mutant(HEADS, "l = tl.where(l < 1.0, 1.0, l)", "l = l", "nothing legal"),
    Mutant(HEADS, "largest = tl.maximum(largest, xs[k])", "largest = largest", "peaked"),
    Mutant(HEADS, "(taken - largest) * inv_temperature", "(taken - largest)", "temperature"),
    Mutant(
        "_surrogate.py",
        "ILLEGAL = tl.constexpr(-1e9)",
        "ILLEGAL = tl.constexpr(-9.0)",
        "illegal actions taken",
    ),
    Mutant(HEADS, "log_l - m * LN2, (ts", "log_l - m, (ts", "two actions"),
    Mutant(HEADS, "offset = -g * inv_l", "offset = g * inv_l", "two actions"),
    Mutant(HEADS, "offset -= slope * m", "offset += slope * m", "six actions"),
    Mutant(HEADS, "slope = c * LN2 * inv_l", "slope = c * inv_l", "six actions"),
    Mutant(
        HEADS, "action[:, None], g[:, None], 0.0)", "action[:, None], 0.0, 0.0)", "no entropy bonus"
    ),
    Mutant(HEADS, "g = terms[10] * inv_temperature", "g = terms[10]", "temperature"),
    Mutant(HEADS, "terms[12] * inv_temperature", "inv_temperature", "64 actions"),
    Mutant(HEADS, "actions + at * len(HEADS) + i", "actions + at * len(HEADS)", "three heads"),
    Mutant(HEADS, "(_columns(k, W) < size)", "(_columns(k, W) < size - 1)", "many heads"),
    Mutant(HEADS, "_beside(legal, HEADS[i][0])", "legal", "three heads: everything, masked"),
    Mutant(HEADS, "(sums[i] + terms[i],)", "(terms[i],)", "several tiles a program"),
    Mutant(
        HEADS,
        "tl.maximum(sums[9], terms[9], propagate_nan=ALL)",
        "terms[9]",
        "gaussian, several tiles",
    ),
    Mutant(HEADS, "z = (u - mu) * inv_std", "z = (mu - u) * inv_std", "gaussian"),
    Mutant(HEADS, "(z * z - 1.0)", "(z * z)", "gaussian"),
    Mutant(HEADS, "g[:, None] - bonus[:, None]", "g[:, None] + bonus[:, None]", "gaussian"),
    Mutant(HEADS, "A * (HALF_LOG_2PI + 0.5)", "A * HALF_LOG_2PI", "gaussian"),
    Mutant(HEADS, "total += 2.0 * size", "total -= 2.0 * size", "squashed"),
    Mutant(HEADS, "total += 2.0 * tl.log(product)", "total += tl.log(product)", "squashed"),
    Mutant(HEADS, "factor = tl.where(is_entry, factor, 1.0)", "factor = factor", "gaussian, 21"),
    Mutant(HEADS, "g += bonus", "g -= bonus", "squashed"),
    Mutant(HEADS, "added += (pulls[k] + pull,)", "added += (pull,)", "gaussian, several tiles"),
    Mutant(HEADS, "(part < programs) & (every", "(part < programs - 1) & (every", "gaussian"),
    Mutant(
        HEADS,
        "s = tl.where(keep[:, None], s, 0.0)",
        "s = s",
        "gaussian, per row: everything, masked",
    ),
    Mutant(
        HEADS,
        "tl.where(keep[:, None], mu, 0.0)",
        "mu",
        "gaussian: everything, masked",
    ),
    Mutant(
        HEADS,
        "_foreach_mul(gradients, grad_loss * inv_n)",
        "_foreach_mul(gradients, grad_loss)",
        "gaussian",
    ),
]
