"""Calls of `log_probs_from_logits`, and faulty kernels they have to catch."""

import math
from functools import partial

import torch
from calls import Budget, Call, Mutant

from ppo_fast.functional.log_probs import log_probs_from_logits


def rows(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    masked: bool = False,
    with_entropy: bool = True,
    **kwargs,
) -> Call:
    """Logits [*shape]; a masked row holds NaN and an index of -100: reading them shows."""
    logits = (3 * torch.randn(shape)).to(dtype)
    index = torch.randint(shape[-1], shape[:-1], dtype=index_dtype)
    if masked:
        mask = torch.rand(shape[:-1]) < 0.7
        mask.view(-1)[0], mask.view(-1)[-1] = False, True
        kwargs["mask"] = mask
        logits[~mask], index[~mask] = math.nan, -100
    kwargs["with_entropy"] = with_entropy
    return Call(log_probs_from_logits, (logits.requires_grad_(), index), kwargs)


def sliced(*shape: int, first: int = 1, **kwargs) -> Call:
    """A next-token slice of rows that lie `first` columns into wider ones."""
    call = rows(shape[0], shape[1] + 1, shape[2] + first, **kwargs)
    logits, index = call.args
    logits = logits.detach()[:, :-1, first:].requires_grad_()
    index = (index % shape[2]).to(index.dtype)[:, 1:]
    given = {k: v[:, :-1] if k == "mask" else v for k, v in call.kwargs.items()}
    if "mask" in given:
        index = index.where(given["mask"], -100)
    return Call(log_probs_from_logits, (logits, index), given)


def impossible(width: int) -> Call:
    """Rows with logits of -inf: all but one, in the first half, all, at the index."""
    logits = torch.randn(5, width)
    index = torch.randint(width // 2, width, (5,))
    logits[1] = -math.inf
    logits[1, index[1]] = 0.3
    logits[2, : width // 2] = -math.inf
    logits[3] = -math.inf
    logits[4, index[4]] = -math.inf
    return Call(log_probs_from_logits, (logits.requires_grad_(), index), {"with_entropy": True})


CASES = {
    "short": partial(rows, 5, 6),
    "short, all options": partial(
        rows, 3, 50, 6, masked=True, temperature=0.7, index_dtype=torch.int32
    ),
    "short, log-probs alone": partial(rows, 9, 33, with_entropy=False),
    "short, bf16": partial(rows, 5, 100, dtype=torch.bfloat16),
    "short, -inf": partial(impossible, 10),
    "short, sliced": partial(sliced, 3, 4, 7, masked=True),
    "one logit": partial(rows, 3, 1),
    "long": partial(rows, 3, 1025),
    "long, all options": partial(
        lambda: rows(5, 2053, masked=True, temperature=torch.tensor(0.7), index_dtype=torch.int32)
    ),
    "long, log-probs alone": partial(rows, 2, 1000, with_entropy=False, temperature=2),
    "long, bf16": partial(rows, 3, 4999, dtype=torch.bfloat16, masked=True),
    "long, fp16": partial(rows, 3, 1025, dtype=torch.float16, temperature=0.5),
    "long, -inf": partial(impossible, 1025),
    "long, sliced": partial(sliced, 2, 3, 1027, masked=True, first=3),
    "long, sliced, bf16": partial(sliced, 2, 3, 2053, dtype=torch.bfloat16),
    "split, all options": partial(rows, 3, 20003, masked=True, temperature=0.7),
    "split, bf16": partial(rows, 1, 40007, dtype=torch.bfloat16, temperature=1.5),
}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, with_entropy: bool = True) -> Call:
    """A call of which only the shapes and types matter."""
    args = torch.empty(shape, dtype=dtype).requires_grad_(), torch.empty(shape[:-1]).long()
    return Call(log_probs_from_logits, args, {"with_entropy": with_entropy})


AOT_CASES = {
    "4096 x 6, fp32": partial(empty, 4096, 6, dtype=torch.float32),
    "4096 x 256": partial(empty, 4096, 256),
    "4096 x 1000": partial(empty, 4096, 1000),
    "4096 x 8192": partial(empty, 4096, 8192),
    "8192 x 151936": partial(empty, 8192, 151936),
    "8192 x 151936, log-probs alone": partial(empty, 8192, 151936, with_entropy=False),
    "8192 x 151936, fp16": partial(empty, 8192, 151936, dtype=torch.float16),
    "8192 x 151936, fp32": partial(empty, 8192, 151936, dtype=torch.float32),
    "8 x 50257": partial(empty, 8, 50257),
}
HOT = {"wide_loads": True, "quiet_loop": True}
BUDGETS = [
    Budget("4096 x 6, fp32", "log_probs_tile_kernel", 80),
    Budget("4096 x 6, fp32", "log_probs_grad_tile_kernel", 96),
    Budget("4096 x 256", "log_probs_tile_kernel", 80),
    Budget("4096 x 1000", "log_probs_kernel", 64, wide_loads=True),
    Budget("4096 x 1000", "log_probs_grad_kernel", 64, wide_loads=True),
    Budget("4096 x 8192", "log_probs_kernel", 64, **HOT, elements=32, instructions=9.0),
    Budget("8192 x 151936", "log_probs_kernel", 64, **HOT, elements=32, instructions=9.0),
    Budget("8192 x 151936", "log_probs_grad_kernel", 72, wide_loads=True),
    Budget(
        *("8192 x 151936, log-probs alone", "log_probs_kernel", 64),
        **HOT,
        elements=32,
        instructions=7.0,
    ),
    Budget("8192 x 151936, fp16", "log_probs_kernel", 64, **HOT, elements=32, instructions=9.0),
    Budget("8192 x 151936, fp32", "log_probs_kernel", 64, **HOT, elements=16, instructions=8.75),
    Budget("8 x 50257", "log_probs_kernel", 64, **HOT, elements=32, instructions=9.0),
    Budget("8 x 50257", "log_probs_merge_kernel", 40),
]

SOFTMAX = partial(Mutant, "_softmax.py")
LOG_PROBS = partial(Mutant, "log_probs.py")
MUTANTS = [
    SOFTMAX("l = l * scale + tl.sum", "l = l + tl.sum", "long"),
    SOFTMAX("s = (s + gap * l) * scale", "s = s * scale", "long"),
    SOFTMAX("(s + gap * l) * scale, AXIS", "s * scale, AXIS", "long"),
    SOFTMAX("tl.sum(e * tl.maximum(t, FAR), 1)", "tl.sum(e * t, 1)", "short, -inf"),
    SOFTMAX("tl.maximum(tl.max(x, 1), LOWEST)", "tl.max(x, 1)", "short, -inf"),
    SOFTMAX("tl.range(whole, V, REST", "tl.range(whole + REST, V, REST", "long"),
    SOFTMAX("V - head, head, head - V", "V, head, head - V", "long, sliced"),
    SOFTMAX("word << 16", "word << 15", "long, bf16"),
    SOFTMAX("return tl.minimum(head, V), body", "return head * 0, body", "long"),
    SOFTMAX("- s / total * LN2", "+ s / total * LN2", "short"),
    LOG_PROBS("part * part_size", "part * part_size // 2", "split, all options"),
    LOG_PROBS("mask=part < parts, other=LOWEST", "mask=part < 1, other=LOWEST", "split, bf16"),
    LOG_PROBS("tl.load(g, mask=keep, other=0.0)", "tl.load(g)", "long, all options"),
    LOG_PROBS('x == float("-inf"), 0.0, up', 'x == float("-inf"), up, up', "long, -inf"),
    LOG_PROBS("(s / l * LN2) - up", "(s / l * LN2) + up", "short"),
    LOG_PROBS("(-LN2 / temperature) / l", "(-LN2) / l", "short, all options"),
    LOG_PROBS("lane == y - head - start", "lane == y - start", "long, sliced"),
    LOG_PROBS("slope, up / temperature, active", "slope, up, active", "short, all options"),
    Mutant("_rows.py", "(row % T).to(tl.int64) * t", "(row // T).to(tl.int64) * t", "long, sliced"),
]
