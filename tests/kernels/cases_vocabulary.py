"""Calls of `ppo_loss_from_logits` with a large vocabulary, and faulty kernels they have to catch."""

import math
from functools import partial

import torch
from calls import Budget, Call, Mutant
from cases_ppo_loss import rows

from ppo_fast.functional.ppo_loss import ppo_loss_from_logits


def loss(
    M: int,
    V: int,
    *names: str,
    masked: bool = False,
    illegal: bool = False,
    dtype=torch.float32,
    scale: float = 2.0,
    **kwargs,
) -> Call:
    """M rows of V logits; NaN where masked or illegal. Ratios within and beyond the clip range."""
    given = rows(M, *names, masked=masked)
    logits = (scale * torch.randn(M, V)).to(dtype)
    actions = torch.randint(0, V, (M,))
    logits[torch.arange(M), actions] += 5.0 * scale  # probable enough to move the entropy
    if illegal:
        legal = torch.rand(M, V) < 0.6
        legal[torch.arange(M), actions] = True
        logits = logits.masked_fill(~legal, math.nan)
        given["action_mask"] = legal
    exact = logits.float() / kwargs.get("temperature", 1.0)
    if illegal:
        exact = exact.masked_fill(~legal, -math.inf)
    log_probs = exact.log_softmax(-1)[torch.arange(M), actions]
    noise = 0.3 * torch.randn(M)
    if masked:
        mask = given["mask"]
        logits = logits.masked_fill(~mask.unsqueeze(1), math.nan)
        actions = actions.masked_fill(~mask, -7)
        noise = noise.masked_fill(~mask, math.nan)
    given["old_log_probs"] = log_probs + noise
    if "ref_log_probs" in names:
        given["ref_log_probs"] = log_probs - 2.0 * noise
    args = logits.requires_grad_(), actions, given.pop("old_log_probs"), given.pop("advantages")
    return Call(ppo_loss_from_logits, args, {"clip_coef": 0.2} | given | kwargs)


VALUE = ("values", "returns", "old_values")
ALL = (*VALUE, "ref_log_probs", "weights")
EVERYTHING = {
    "clip_coef_high": 0.3,
    "dual_clip": 1.3,
    "vf_clip_coef": 0.2,
    "ent_coef": 0.05,
    "kl_coef": 0.2,
    "old_kl_coef": 0.3,
    "temperature": 0.7,
}


def changed(call: Call, **kwargs) -> Call:
    return call._replace(kwargs=call.kwargs | kwargs)


def strided() -> Call:
    """Logits [2, 3, V] of longer sequences and wider rows, as `logits[:, :-1]` leaves them."""
    call = loss(6, 137, ent_coef=0.1)
    wide = torch.full((2, 4, 141), math.nan)
    wide[:, :-1, 1:-3] = call.args[0].detach().view(2, 3, 137)
    logits = wide[:, :-1, 1:-3].detach().requires_grad_()
    return call._replace(args=(logits, *(x.view(2, 3) for x in call.args[1:])))


def clipped() -> Call:
    """Rows 0 and 2 are beyond the range: their gradient is 0."""
    logits, actions, old, _ = (call := loss(4, 2053)).args
    old = old - 3.0 * torch.tensor([1.0, 0.0, 1.0, 0.0])
    return call._replace(args=(logits, actions, old, torch.ones(4)))


def padded(V: int, width: int, **kwargs) -> Call:
    """Rows of V logits, `width` apart."""
    call = loss(3, V, **kwargs)
    wide = torch.full((3, width), math.nan, dtype=call.args[0].dtype)
    wide[:, :V] = call.args[0].detach()
    return call._replace(args=(wide[:, :V].detach().requires_grad_(), *call.args[1:]))


def transposed() -> Call:
    """Logits whose last dimension is not contiguous, whose rows do not merge."""
    call = loss(6, 131, "weights", ent_coef=0.1)
    logits = call.args[0].detach().view(3, 2, 131).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    given = {k: x.view(3, 2) if isinstance(x, torch.Tensor) else x for k, x in call.kwargs.items()}
    args = logits.requires_grad_(), *(x.view(3, 2) for x in call.args[1:])
    return Call(call.op, args, given)


CASES = {
    "policy": partial(loss, 3, 129),
    "one row": partial(loss, 1, 1000, ent_coef=0.1),
    "tiles": partial(loss, 3, 4099, ent_coef=0.1),
    "clipped rows": clipped,
    "temperature": partial(loss, 3, 300, temperature=1.7, ent_coef=0.1),
    "entropy, weights": partial(loss, 4, 257, "weights", ent_coef=0.3),
    "value": partial(loss, 4, 200, *VALUE, vf_clip_coef=0.2, vf_clip="clipped"),
    "swept, value": partial(loss, 3, 1100, *VALUE, vf_clip_coef=0.2),
    "k1": partial(loss, 4, 130, "ref_log_probs", kl_coef=0.5, kl_estimator="k1"),
    "k2": partial(loss, 4, 130, "ref_log_probs", kl_coef=0.5, kl_estimator="k2"),
    "masked": partial(loss, 5, 150, masked=True),
    "masked, normalizer": partial(loss, 5, 150, masked=True, normalizer=9.0),
    "normalised": partial(loss, 5, 150, masked=True, norm_adv=True),
    "everything, masked": partial(loss, 5, 1000, *ALL, masked=True, norm_adv=True, **EVERYTHING),
    "everything, bf16": partial(
        loss, 4, 1000, *ALL, masked=True, dtype=torch.bfloat16, **EVERYTHING
    ),
    "everything, fp16": partial(loss, 4, 531, *ALL, masked=True, dtype=torch.float16, **EVERYTHING),
    "bf16": partial(loss, 4, 2053, dtype=torch.bfloat16),
    "illegal": partial(loss, 4, 300, illegal=True, ent_coef=0.1),
    "illegal, everything": partial(
        loss, 4, 1029, *ALL, masked=True, illegal=True, norm_adv=True, **EVERYTHING
    ),
    "strided": strided,
    "padded": partial(padded, 531, 536, ent_coef=0.1),
    "padded, illegal": partial(padded, 300, 303, illegal=True, dtype=torch.bfloat16),
    "transposed": transposed,
    "numbers on the device": partial(
        lambda: changed(
            loss(4, 200, *ALL, **EVERYTHING),
            **{name: torch.tensor(x) for name, x in EVERYTHING.items()},
            normalizer=torch.tensor(9.0),
        )
    ),
    "all masked": partial(
        lambda: loss(3, 129, *VALUE, mask=torch.zeros(3, dtype=torch.bool), ent_coef=0.1)
    ),
}


def empty(
    M: int, V: int, dtype=torch.bfloat16, illegal: bool = False, full: bool = False, **kwargs
):
    """A call of which only the shapes and types matter."""
    given = {"clip_coef": 0.2} | kwargs
    if illegal:
        given["action_mask"] = torch.empty(M, V, dtype=torch.bool)
    if full:
        given |= {name: torch.empty(M) for name in ALL} | EVERYTHING | {"norm_adv": True}
        given["values"].requires_grad_()
        given["mask"] = torch.empty(M, dtype=torch.bool)
    logits = torch.empty(M, V, dtype=dtype).requires_grad_()
    args = logits, torch.empty(M).long(), torch.empty(M), torch.empty(M)
    return Call(ppo_loss_from_logits, args, given)


AOT_CASES = {
    "8192 x 151936": partial(empty, 8192, 151936, ent_coef=0.01),
    "8192 x 151936, no entropy bonus": partial(empty, 8192, 151936),
    "8192 x 151936, everything": partial(empty, 8192, 151936, full=True),
    "8192 x 151936, fp32": partial(empty, 8192, 151936, torch.float32, ent_coef=0.01),
    "8192 x 151936, fp16": partial(empty, 8192, 151936, torch.float16, ent_coef=0.01),
    "8192 x 50257": partial(empty, 8192, 50257, ent_coef=0.01),
    "8192 x 32000": partial(empty, 8192, 32000, ent_coef=0.01),
    "32768 x 4096": partial(empty, 32768, 4096, ent_coef=0.01),
    "32768 x 4096, illegal, everything": partial(empty, 32768, 4096, illegal=True, full=True),
    "32768 x 1000": partial(empty, 32768, 1000, ent_coef=0.01),
    "32768 x 1000, illegal, everything": partial(empty, 32768, 1000, illegal=True, full=True),
    "32768 x 500, illegal, everything": partial(
        empty, 32768, 500, torch.float32, illegal=True, full=True
    ),
    "32768 x 200": partial(empty, 32768, 200, torch.float32, ent_coef=0.01),
}
KERNEL = "vocabulary_loss_kernel"
# The hot loop is the first sweep's; the second has fewer instructions.
HOT = {"wide_loads": True, "quiet_loop": True}
BUDGETS = [
    Budget("8192 x 151936", KERNEL, 104, **HOT, elements=32, instructions=9.0),
    Budget("8192 x 151936, no entropy bonus", KERNEL, 112, **HOT, elements=32, instructions=9.0),
    Budget("8192 x 151936, everything", KERNEL, 112, **HOT, elements=32, instructions=9.0),
    Budget("8192 x 151936, fp32", KERNEL, 104, **HOT, elements=16, instructions=9.0),
    Budget("8192 x 151936, fp16", KERNEL, 104, **HOT, elements=32, instructions=9.0),
    Budget("8192 x 50257", KERNEL, 104, **HOT, elements=32, instructions=9.0),
    Budget("8192 x 32000", KERNEL, 104, **HOT, elements=32, instructions=9.0),
    Budget("32768 x 4096", KERNEL, 104, wide_loads=True),
    Budget("32768 x 4096, illegal, everything", KERNEL, 128, wide_loads=True),
    Budget("32768 x 1000", "vocabulary_tile_kernel", 128, wide_loads=True),
    Budget("32768 x 200", "vocabulary_tile_kernel", 128, wide_loads=True),
    Budget("8192 x 151936", "rescale_kernel", 64, wide_loads=True, quiet_loop=True),
]

FAULT = partial(Mutant, "_vocabulary.py")
MUTANTS = [
    Mutant("_softmax.py", "slope * tl.maximum(t, FAR)", "slope * t", "illegal"),
    FAULT("-(peak + pull * (s / total * LN2)) / total", "-peak / total", "entropy, weights"),
    FAULT("pull * LN2 / total", "pull / total", "tiles"),
    FAULT("peak = g * early / temperature", "peak = g * early", "temperature"),
    FAULT("active = active | (pull != 0.0)", "active = active", "entropy, weights"),
    FAULT("return 1.0 / tl.where(n == 0.0, 1.0, n)", "return 1.0 + 0.0 * n", "policy"),
    FAULT("n = _count(rows.mask, M, BLOCK).to(", "n = M.to(", "masked"),
    FAULT("peak += softmax_gradient(", "peak = softmax_gradient(", "tiles"),
    FAULT("tl.multiple_of(out + head, 16)", "tl.multiple_of(out, 16)", "tiles"),
    FAULT("floats(body + start, K", "floats(body + step, K", "tiles"),
    FAULT("store(body + start + lane, zero)", "store(body + start, 0.0)", "clipped rows"),
    FAULT("tl.load(legal + column) != 0", "tl.load(legal + column) >= 0", "illegal, everything"),
    FAULT("inside, x, float", "inside | (column < V), x, float", "illegal, everything"),
    FAULT(
        "own_legal = legal + row_offset(index, T, legal_b, legal_t)",
        "own_legal = legal + index * (V + 1)",
        "illegal, everything",
    ),
    FAULT("value_gradient + at, terms[11])", "value_gradient + at, terms[10])", "swept, value"),
    FAULT("value_gradient + at, terms[11], mask", "value_gradient + at, terms[10], mask", "value"),
    FAULT("(legal + row_offset(index, T, legal_b, legal_t)", "(legal + index * (V + 1)", "illegal"),
    FAULT("column, mask=read, other=0) != 0", "column, mask=read, other=0) >= 0", "illegal"),
    FAULT("tl.where(column == action[:, None]", "tl.where(column != action[:, None]", "policy"),
    FAULT("index = program * R + step", "index = program + step", "everything, masked"),
    FAULT("V // VEC * VEC", "V // VEC * VEC - 1", "one row"),
    FAULT("tl.load(at).to(tl.float32) * factor", "tl.load(at).to(tl.float32)", "tiles"),
    FAULT("& (tl.program_id(0) == 0)", "& (tl.program_id(0) == 1)", "policy"),
    FAULT("late = inv_n if", "late = None if", "everything, fp16"),
]
