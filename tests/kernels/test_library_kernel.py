"""The kernels as `torch.library` ops: opcheck, whole-graph compilation, hyper-parameters as inputs."""

import importlib
from pathlib import Path

import pytest
import torch
import torch._dynamo  # before its functions are patched below
from calls import run
from conftest import DEVICE
from torch.library import opcheck

from ppo_fast.dispatch import _map_tensors, backend
from ppo_fast.kernels._library import OPS

FILES = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
CASES = {
    f"{file[6:]}: {name}": case
    for file in FILES
    for name, case in importlib.import_module(file).CASES.items()
}
WORDS = ("all options", "everything, masked", "packed", "library")
RICH = {name: case for name, case in CASES.items() if any(word in name for word in WORDS)}


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in OPS.values():
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls_of_ops() -> list[tuple]:
    """Every call of an opaque op that the rich cases make, forward and backward."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, torch.device(DEVICE), Recorder() as recorder:
        # As while a graph is traced, when the ops stand in for the functions.
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        for case in RICH.values():
            run(case(), "triton")
    return recorder.calls


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, calls_of_ops):
    calls = [args for op, args in calls_of_ops if op is OPS[name]]
    assert calls, "no case named as WORDS say makes a call of it"
    # Memory filled with NaN would differ from itself.
    torch.use_deterministic_algorithms(False)
    for args in calls:
        detached = _map_tensors(args, torch.Tensor.detach)
        opcheck(OPS[name], detached, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", RICH)
def test_a_whole_graph_compiles_and_gives_the_same_bits(name):
    torch._dynamo.reset()  # the calls differ, and graphs of one code object are limited
    call = RICH[name]()
    torch.manual_seed(1)
    expected = run(call, "triton")
    compiled = torch.compile(call.op, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    actual = run(call._replace(op=compiled), "triton")
    for outputs, others in zip(expected, actual, strict=True):
        for x, y in zip(outputs, others, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_a_changed_hyper_parameter_needs_no_new_graph():
    torch._dynamo.reset()
    call = CASES["gae: columns"]()
    graphs = 0

    def count(module, inputs):
        nonlocal graphs
        graphs += 1
        return module

    def step(gamma):
        return call.op(*call.args, **call.kwargs | {"gamma": gamma})

    compiled = torch.compile(step, fullgraph=True, backend=count)
    with backend("triton"):
        for gamma in (0.9, 0.5, 0.1):
            torch.testing.assert_close(compiled(torch.tensor(gamma)), step(gamma))
    assert graphs == 1


def test_double_backward_is_refused():
    for case in RICH.values():
        call = case()
        with backend("triton"):
            result = call.op(*call.args, **call.kwargs)
        outputs = result if isinstance(result, tuple) else (result,)
        roots = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
        leaves = [
            x for x in (*call.args, *call.kwargs.values()) if getattr(x, "requires_grad", False)
        ]
        if roots:
            with pytest.raises(NotImplementedError, match="create_graph"):
                torch.autograd.grad(roots[0].sum(), leaves[0], create_graph=True)


@pytest.mark.parametrize("name", ["gae: columns", "ppo_loss: policy"])
def test_vmap_is_refused(name):
    call = CASES[name]()
    stacked = [torch.stack((x, x)) for x in call.args[:3]]

    def one(*args):
        return call.op(*args, *call.args[3:], **call.kwargs)

    with backend("triton"), pytest.raises(NotImplementedError, match=r"vmap"):
        torch.vmap(one)(*stacked)
