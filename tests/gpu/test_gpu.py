"""Determinism, graphs, size, precision and memory safety of every kernel, on a GPU."""

import contextlib
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import Call, assert_as_exact_as_torch, run
from cases import cases as problems

from ppo_fast.dispatch import _map_tensors, _tensors, backend
from ppo_fast.functional.gae import gae
from ppo_fast.functional.log_probs import log_probs_from_logits

DRY = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parent.parent.parent
REPEATS = 3 if DRY else 100
SANITIZER_SECONDS = 100


def all_cases():
    """Name -> case, over every op's cases; and the first of each op's."""
    found, first = {}, {}
    for file in sorted((ROOT / "tests" / "kernels").glob("cases_*.py")):
        for name, case in importlib.import_module(file.stem).CASES.items():
            label = f"{file.stem.removeprefix('cases_')}: {name}"
            found[label] = case
            torch.manual_seed(0)
            first.setdefault(case().op.__name__, (label, case))
    return found, dict(first.values())


CASES, ONE_EACH = {"every case": None}, {"one case an op": None}
if DRY or torch.cuda.is_available():
    CASES, ONE_EACH = all_cases()
if DRY:
    CASES = ONE_EACH


def drawn(case, seed=0):
    torch.manual_seed(seed)
    return case()


def bits(tensors):
    """The bytes of tensors: NaN equals itself there."""
    return [
        None if x is None else x.detach().contiguous().view(-1).view(torch.uint8) for x in tensors
    ]


def written(call):
    """The tensors that the op writes to."""
    arguments = inspect.signature(call.op.reference).bind(*call.args, **call.kwargs).arguments
    return [arguments[name].detach() for name in call.op.mutates]


@contextlib.contextmanager
def put_back(call):
    """Leave what the op writes to as it was."""
    before = [x.clone() for x in written(call)]
    yield
    for x, old in zip(written(call), before, strict=True):
        x.copy_(old)


def outcome(call, seed=0):
    """Outputs and gradients of the kernels, and what they wrote, which is put back.

    What a call draws at random is drawn from `seed`.
    """
    torch.manual_seed(seed)
    for value in call.kwargs.values():
        if isinstance(value, torch.Generator):
            value.manual_seed(seed)
    with put_back(call):
        outputs, gradients = run(call, "triton")
        return [x if x is None else x.clone() for x in bits(outputs + gradients + written(call))]


def assert_same_bits(got, want):
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same_in_every_run(name):
    call = drawn(CASES[name])
    first = outcome(call)
    for _ in range(REPEATS - 1):
        assert_same_bits(outcome(call), first)


def with_numbers_on_the_device(call):
    """The call with its float hyper-parameters as 0-d tensors."""
    kwargs = {n: torch.tensor(x) if type(x) is float else x for n, x in call.kwargs.items()}
    return call._replace(kwargs=kwargs)


@pytest.mark.parametrize("name", CASES)
def test_numbers_on_the_device_are_the_same_numbers(name):
    call = drawn(CASES[name])
    assert_same_bits(outcome(with_numbers_on_the_device(call)), outcome(call))


@pytest.mark.parametrize("name", CASES)
def test_a_graph_replays_with_new_inputs_and_numbers(gpu, name):
    call = with_numbers_on_the_device(drawn(CASES[name]))
    if any(isinstance(x, torch.Generator) for x in call.kwargs.values()):
        pytest.skip("a generator of one's own has to be registered with the graph")
    if call.op.__name__ == "sample_from_logits":
        pytest.skip("a replay draws new numbers; see tests/kernels")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(call, "triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gradients = run(call, "triton")

    fresh = with_numbers_on_the_device(drawn(CASES[name], seed=1))
    held, new = (list(_tensors((c.args, c.kwargs))) for c in (call, fresh))
    with torch.no_grad():
        for mine, other in zip(held, new, strict=True):
            # A number the graph must not have kept.
            is_number = mine.dim() == 0 and mine.is_floating_point()
            other = other.detach() * 0.9 if is_number else other.detach()
            if mine.shape != other.shape:
                pytest.skip("its shapes are drawn too")
            mine.copy_(other)
    with put_back(call):
        graph.replay()
        got = [x if x is None else x.clone() for x in bits(outputs + gradients + written(call))]
    assert_same_bits(got, outcome(call))


@pytest.mark.parametrize("name", ONE_EACH)
def test_compiles_whole(name):
    call = drawn(ONE_EACH[name])
    if any(isinstance(x, torch.Generator) for x in call.kwargs.values()):
        pytest.skip("Dynamo takes no generator")
    call = call._replace(
        args=_map_tensors(call.args, torch.Tensor.detach),
        kwargs=_map_tensors(call.kwargs, torch.Tensor.detach),
    )
    torch._dynamo.reset()
    how = "aot_eager" if DRY else "inductor"
    compiled = torch.compile(
        lambda: call.op(*call.args, **call.kwargs), fullgraph=True, backend=how
    )
    with backend("triton"):
        torch.manual_seed(0)
        with put_back(call):
            got = [*_tensors(compiled()), *(x.clone() for x in written(call))]
        torch.manual_seed(0)
        want = [*_tensors(call.op(*call.args, **call.kwargs)), *written(call)]
    if call.op.__name__ == "sample_from_logits":
        want, got = want[2:], got[2:]  # Inductor draws its own numbers
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def headlines():
    """The first problem of each op's benchmark that leaves float64 room."""
    found = {}
    for case in problems(tiny=DRY):
        if case.function is None and case.op is not None and case.op.kernel is not None:
            found.setdefault(case.label, case)
    return found


HEADLINES = headlines()


@pytest.mark.parametrize("op", [x for x in HEADLINES if x != "sample_from_logits"])
def test_the_error_at_real_sizes_is_no_more_than_twice_pytorchs(op):
    call = Call(HEADLINES[op].op, (), HEADLINES[op].make())
    # The interpreter truncates to bfloat16 where a GPU rounds.
    assert_as_exact_as_torch(call, floor=2**-8 if DRY else 2e-6)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_more_elements_than_an_int32_can_count(with_entropy):
    if log_probs_from_logits.kernel is None:
        pytest.skip(log_probs_from_logits.no_kernel)
    B, T, V = (2, 3, 50) if DRY else (16, 1024, 151936)
    if not DRY and torch.cuda.mem_get_info()[0] < 6 * 2 * B * T * V:
        pytest.skip("needs 30 GB of free GPU memory")
    logits = torch.randn(B, T, V, dtype=torch.bfloat16).mul_(3).requires_grad_()
    index = torch.randint(V, (B, T))
    upstream = torch.randn(B, T)
    with backend("triton"):
        result = log_probs_from_logits(logits, index, with_entropy=with_entropy)
    outputs = result if with_entropy else (result,)
    (gradient,) = torch.autograd.grad(outputs, logits, [upstream] * len(outputs))
    # Rows on both sides of 2^31 elements, and the last.
    rows = torch.tensor([0, 1, (1 << 31) // V, (1 << 31) // V + 1, B * T - 1]).clamp(max=B * T - 1)
    some = logits.detach().view(-1, V)[rows].double().requires_grad_()
    truth = log_probs_from_logits.reference(some, index.view(-1)[rows], with_entropy=with_entropy)
    truth = truth if with_entropy else (truth,)
    up = upstream.view(-1)[rows].double()
    (exact,) = torch.autograd.grad(truth, some, [up] * len(truth))
    for mine, theirs in zip(outputs, truth, strict=True):
        torch.testing.assert_close(mine.view(-1)[rows].double(), theirs, rtol=1e-4, atol=1e-4)
    assert not gradient.isnan().any()
    torch.testing.assert_close(
        gradient.view(-1, V)[rows].double(), exact, rtol=1e-2, atol=1e-5 * float(exact.abs().max())
    )


@pytest.mark.parametrize("name", CASES)
def test_runs_on_a_device_that_is_not_the_current_one(gpu, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    torch.manual_seed(0)
    with torch.device("cuda:1"):
        call = CASES[name]()
        there = outcome(call)
    assert torch.cuda.current_device() == 0
    torch.manual_seed(0)
    assert_same_bits([x.cpu() for x in there], [x.cpu() for x in outcome(CASES[name]())])


SANITIZED = """
import torch
from ppo_fast.dispatch import backend
from ppo_fast.functional.gae import gae
from ppo_fast.functional.log_probs import log_probs_from_logits
with torch.device("cuda"), backend("triton"):
    for T, N in ((37, 5), (300, 2)):
        end = torch.rand(T, N) < 0.1
        gae(torch.randn(T, N), torch.randn(T, N), torch.randn(N), end, gamma=0.9, gae_lambda=0.9)
    if log_probs_from_logits.kernel is not None:
        logits = torch.randn(7, 1025, dtype=torch.bfloat16, requires_grad=True)
        log_probs_from_logits(logits, torch.randint(1025, (7,))).sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck"])
def test_compute_sanitizer_finds_nothing(gpu, tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    # Memory from the caching allocator has neighbours that an overrun would hit unseen.
    env = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=SANITIZER_SECONDS, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer did not end in {SANITIZER_SECONDS} s")
    said = done.stdout + done.stderr
    if "not supported" in said:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, said[-3000:]
    assert "ERROR SUMMARY: 0 errors" in said


def test_a_call_does_not_wait_for_the_device(gpu):
    T, N = 128, 4096
    args = torch.randn(T, N), torch.randn(T, N), torch.randn(N), torch.rand(T, N) < 0.01
    gae(*args, gamma=0.99, gae_lambda=0.95)
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for case in CASES.values():
                torch.cuda.set_sync_debug_mode("default")
                call = drawn(case)
                run(call, "triton")
                torch.cuda.set_sync_debug_mode("error")
                run(call, "triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
