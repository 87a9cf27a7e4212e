"""Calls of `sample_from_logits`, and faulty kernels they have to catch.

The reference refuses rows without a distribution on the CPU, so those are not among these.
"""

import math
from functools import partial

import torch
from calls import Budget, Call, Mutant

from ppo_fast.functional.sample import sample_from_logits


def policy(
    M: int,
    V: int,
    masked: bool = False,
    illegal: float = 0.0,
    dtype=torch.float32,
    offset: float = 0.0,
    spread: float = 2.0,
    **kwargs,
) -> Call:
    """Rows of normal logits, a share of them -inf; masked rows hold NaN."""
    logits = spread * torch.randn(M, V) + offset
    if illegal:
        legal = torch.rand(M, V) >= illegal
        legal[torch.arange(M), torch.randint(V, (M,))] = True
        logits[~legal] = -math.inf
    if masked:
        kwargs["mask"] = torch.rand(M) < 0.6
        logits[~kwargs["mask"]] = math.nan
    return Call(sample_from_logits, (logits.to(dtype),), kwargs)


def seeded(M: int, V: int, seed: int) -> Call:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return policy(M, V, generator=generator)


def numbered(M: int, V: int, **kwargs) -> Call:
    """The random numbers given, every third of a row's."""
    return policy(M, V, uniform=torch.rand(M, 5, dtype=torch.float64)[:, 1::3], **kwargs)


def strided(M: int, V: int) -> Call:
    call = policy(M, V + 4, masked=True)
    mask = torch.stack((call.kwargs["mask"],) * 2, 1)[:, 0]
    return call._replace(args=(call.args[0][:, 1:-3],), kwargs={"mask": mask})


CASES = {
    "small": partial(policy, 300, 7),
    "small, library": partial(policy, 70, 18, masked=True, illegal=0.5),
    "one column": partial(policy, 3, 1),
    "one segment": partial(policy, 9, 512, temperature=0.5),
    "two columns, seeded": partial(seeded, 33, 2, 7),
    "segments": partial(policy, 20, 2053, illegal=0.3),
    "segments, masked": partial(policy, 6, 1500, masked=True, temperature=1.7),
    "segments, full": partial(policy, 4, 4096, spread=4.0),
    "segments, offset": partial(policy, 4, 1025, offset=5000.0),
    "shared, all options": partial(policy, 3, 9001, illegal=0.2, masked=True, temperature=0.8),
    "shared, flat": partial(policy, 12, 5121, spread=0.1),
    "shared, bf16": partial(policy, 3, 8200, dtype=torch.bfloat16),
    "few legal": partial(policy, 5, 5000, illegal=0.9995),
    "temperature on the device": partial(
        lambda: policy(5, 600, temperature=torch.tensor(0.3), spread=0.5)
    ),
    "strided": partial(strided, 6, 700),
    "uniform given": partial(numbered, 40, 30),
    "uniform given, shared": partial(numbered, 12, 5121, spread=0.1, masked=True),
    "fp16": partial(policy, 5, 33, dtype=torch.float16),
}

MUTANTS = [
    Mutant(
        "sample.py",
        "above = (cumulative > tl",
        "above = (cumulative < tl",
        "small",
    ),
    Mutant("sample.py", "uniform + wide * 2 + 1, mask", "uniform + wide * 2, mask", "small"),
    Mutant(
        "sample.py",
        "tl.load(uniform + wide * 2), 0)",
        "tl.load(uniform + wide * 2 + 1), 0)",
        "shared, flat",
    ),
    Mutant(
        "sample.py", "mass = part_l * tl.exp2((part_m - m) * c)", "mass = part_l", "segments, full"
    ),
    Mutant(
        "sample.py",
        "tl.where(action < 0, V - 1, chosen * SEGMENT + action)",
        "chosen * SEGMENT + action - 1",
        "segments",
    ),
    Mutant(
        "sample.py",
        "c = LOG2E / number(temperature)",
        "c = LOG2E * number(temperature)",
        "temperature on the device",
    ),
    Mutant("sample.py", "if uniform is None:", "if uniform is not None:", "uniform given"),
    Mutant("sample.py", "uniform = uniform.contiguous()", "pass", "uniform given, shared"),
    Mutant("sample.py", "mask=at < V, other", "mask=at < V - 1, other", "segments"),
    Mutant(
        "sample.py",
        "begin = tl.program_id(1) * share",
        "begin = tl.program_id(1) * (share - 1)",
        "shared, all options",
    ),
    Mutant(
        "sample.py",
        "tl.where(keep, log_prob_of(picked, m, l, T), 0.0), mask",
        "log_prob_of(picked, m, l, T), mask",
        "small, library",
    ),
    Mutant("sample.py", "0).to(tl.int64))", "1).to(tl.int64))", "segments, masked"),
    Mutant(
        "_softmax.py",
        "s = tl.sum((s + gap * l) * scale, AXIS)",
        "s = tl.sum(s * scale, AXIS)",
        "segments",
    ),
]


def big(M: int, V: int, dtype=torch.bfloat16) -> Call:
    kwargs = {"mask": torch.empty(M, dtype=torch.bool)}
    return Call(sample_from_logits, (torch.empty(M, V, dtype=dtype),), kwargs)


AOT_CASES = {
    "small": partial(big, 4096, 18, torch.float32),
    "small, many rows": partial(big, 1 << 17, 18, torch.float32),
    "one segment": partial(big, 4096, 500),
    "segments": partial(big, 64, 4096),
    "shared": partial(big, 16, 131072),
    "many rows": partial(big, 2200, 8192),
    "many rows, fp32": partial(big, 2200, 8192, torch.float32),
}
# Shuffles reduce each segment within its warp, one an element; the barriers are a warp's own.
BUDGETS = [
    # 13.8 instructions an element go by while its 2 bytes do, on an H200.
    Budget("small", "sample_rows_kernel", 64),
    Budget("one segment", "sample_rows_kernel", 136),
    Budget("segments", "sample_kernel", 128, wide_loads=True, elements=64, instructions=11.5),
    Budget("shared", "sample_kernel", 96, wide_loads=True, elements=64, instructions=11.5),
    Budget("shared", "sample_draw_kernel", 160),
    Budget("many rows", "sample_kernel", 128, wide_loads=True, elements=64, instructions=11.5),
    Budget(
        "many rows, fp32", "sample_kernel", 128, wide_loads=True, elements=64, instructions=10.5
    ),
]
