"""What the kernels compile to, without a GPU: no spills, budgets kept, every target served."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter leaves no kernels to compile", allow_module_level=True)
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "kernels")]

import aot  # noqa: E402

CASES = aot.shipped_cases()
BUDGETS = [
    budget._replace(case=f"{aot.op_file(module)}: {budget.case}")
    for module in aot.case_modules()
    for budget in module.BUDGETS
]
FILES = sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))


def assert_no_spills(found):
    """At most one 64-bit register waits in local memory.

    The versions of Triton differ by as much: an 8-byte frame under one is none under the other.
    """
    assert found.local == 0, found.kernel
    assert found.stack <= 8, found.kernel


@pytest.mark.parametrize("name", CASES)
def test_no_configuration_spills_on_sm_90(name):
    for found in aot.inspected(name):
        assert_no_spills(found)
        assert found.registers <= 255


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: f"{b.case}: {b.kernel}")
def test_the_budget_on_sm_90_is_kept(budget):
    matching = [found for found in aot.inspected(budget.case) if found.kernel == budget.kernel]
    assert matching
    for found in matching:
        assert found.registers <= budget.registers
        if budget.wide_loads:
            assert found.count("LDG.E.128") > 0
        loop = found.hot_loop
        if budget.quiet_loop:
            assert loop.count("BAR", "SHFL") == 0
        if budget.tensor_cores:
            products, waits = found.count("HGMMA"), found.count("WARPGROUP.DEPBAR")
            assert products > 0
            assert waits <= products / 2
        if budget.instructions is not None:
            assert loop.instructions / budget.elements <= budget.instructions


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("kernel", aot.first_launches())
def test_each_kernel_compiles_for_other_targets(kernel, target):
    launch = aot.first_launches()[kernel]
    if target == "gfx942":
        assert aot.compile_for(launch, aot.TARGETS[target]).asm["amdgcn"]
    else:
        found = aot.inspect(launch, aot.TARGETS[target])
        assert_no_spills(found)


# What they read is a few numbers a program.
FEW = {"merge_kernel"}


@pytest.mark.parametrize("kernel", [name for name in aot.first_launches() if name not in FEW])
def test_rows_are_addressed_in_64_bits(kernel):
    ir = aot.compile_for(aot.first_launches()[kernel], aot.SM90).asm["ttir"]
    assert "i64" in ir


def test_every_kernel_is_compiled():
    compiled = {launch.kernel.__name__ for name in CASES for launch in aot.launches_of(name)}
    kernels = set()
    for path in (ROOT / "kernels").glob("*.py"):
        module = importlib.import_module(f"ppo_fast.kernels.{path.stem}")
        kernels |= {name for name in vars(module) if name.endswith("_kernel")}
    assert kernels == compiled


def test_a_spill_would_be_seen():
    import triton
    import triton.language as tl

    from ppo_fast.kernels._launch import Launch

    @triton.jit
    def spilling_kernel(x, out, N: tl.constexpr):
        at = tl.arange(0, N)
        y = tl.load(x + at)
        tl.debug_barrier()
        z = tl.load(x + N + at)
        tl.store(out + at, tl.cumsum(y * z, 0) + tl.cumsum(z, 0) * y)

    x = torch.empty(1)
    found = aot.inspect(Launch(spilling_kernel, (1,), (x, x), {"N": 16384, "num_warps": 1}))
    assert found.stack > 0 or found.local > 0


def test_the_page_of_figures_names_every_case():
    page = (ROOT / "docs" / "kernels.md").read_text()
    missing = [name for name in CASES if name not in page]
    assert not missing, f"{missing}; write the page anew: python benchmarks/aot.py"


def _keys(op, *args, **kwargs) -> list[str]:
    with torch.device("meta"):
        return [aot.key(launch) for launch in aot.launches(op, *args, **kwargs)]


@pytest.mark.parametrize("gradient", [False, True])
def test_another_number_of_rows_or_columns_or_temperature_compiles_nothing_new(gradient):
    from ppo_fast.functional.log_probs import log_probs_from_logits
    from ppo_fast.functional.ppo_loss import ppo_loss_from_logits

    seen = {log_probs_from_logits: [], ppo_loss_from_logits: []}
    for M, V, temperature in ((8192, 151936, 1.0), (4096, 128256, 0.7), (4112, 151040, 1.3)):
        with torch.device("meta"):
            logits = torch.empty(M, V, dtype=torch.bfloat16, requires_grad=gradient)
            index, row = torch.empty(M, dtype=torch.int64), torch.empty(M)
        options = {"temperature": temperature}
        seen[log_probs_from_logits].append(_keys(log_probs_from_logits, logits, index, **options))
        seen[ppo_loss_from_logits].append(
            _keys(ppo_loss_from_logits, logits, index, row, row, clip_coef=0.2, **options)
        )
    for keys in seen.values():
        assert keys[0] and keys[0] == keys[1] == keys[2]


def test_another_horizon_compiles_nothing_new():
    from ppo_fast.functional.gae import gae

    found = []
    for T, N, gamma in ((1024, 32768, 0.99), (777, 40000, 0.9)):
        with torch.device("meta"):
            x, flag = torch.empty(T, N), torch.empty(T, N, dtype=torch.bool)
            found.append(_keys(gae, x, x, torch.empty(N), flag, gamma=gamma, gae_lambda=0.95))
    assert found[0] == found[1]


def test_rows_are_never_on_the_short_axes_of_the_grid():
    for name in CASES:
        for launch in aot.launches_of(name):
            assert all(size < 1024 for size in launch.grid[1:]), (name, launch.grid)
