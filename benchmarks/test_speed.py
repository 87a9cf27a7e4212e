"""Our kernels and eager PyTorch under pytest-benchmark: `pytest benchmarks/test_speed.py`.

For comparing commits with its `--benchmark-autosave` and `--benchmark-compare`. Numbers that are
published come from bench_kernels.py, which runs its arms in turns and times graphs; pytest-benchmark
runs one after the other and times calls.
"""

from typing import Any

import bench_kernels
import pytest
import torch
from cases import Case, cases

ARMS = (bench_kernels.OURS, bench_kernels.EAGER)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    "case", cases(not bench_kernels.ON_GPU), ids=lambda c: f"{c.label}-{c.name}-{c.passes}"
)
def test_call(benchmark: Any, case: Case, arm: str) -> None:
    made = dict(bench_kernels.arms_of(case))
    if arm not in made:
        pytest.skip("on a CPU ours is the eager one; TRITON_INTERPRET=1 runs the kernels")
    torch.manual_seed(0)
    try:
        call = made[arm]()(*bench_kernels.new_inputs(case))
    except bench_kernels.NotHere as reason:
        pytest.skip(str(reason))

    def timed() -> None:
        call()
        if bench_kernels.ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{case.label} {case.name} {case.passes}"
    benchmark(timed)
