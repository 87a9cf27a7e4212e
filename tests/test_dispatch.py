"""The rules of dispatch, with stand-in twins made of plain PyTorch."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ppo_fast.dispatch import Accelerated, _bind_twin, accelerated, backend, current_backend

ROOT = Path(__file__).resolve().parents[1]


def scaled_sum(x: Tensor, weight: Tensor, *, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """The reference of these tests: sum_j scale x_ij w_i, and x^2 without a gradient."""
    return (x * scale).sum(-1) * weight, (x * x).detach()


def twin(x: Tensor, weight: Tensor, *, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    return (x * weight[:, None] * scale).sum(-1), x.detach().square()


def other(x, weight, *, scale=1.0):
    """A twin whose result betrays that it ran."""
    return torch.full_like(weight, 7.0), x


class OnGPU(Tensor):
    """A CPU tensor that claims to be on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = property(lambda self: True)


def on_gpu(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnGPU)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("PPO_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)


def ran_twin(op: Accelerated, *args, **kwargs) -> bool:
    return bool((op(*args, **kwargs)[0] == 7.0).all())


# Which backend is in force.


def test_the_default_backend_is_auto():
    assert current_backend() == "auto"


def test_the_environment_variable_chooses(monkeypatch):
    monkeypatch.setenv("PPO_FAST_BACKEND", "reference")
    assert current_backend() == "reference"


def test_a_with_block_outranks_the_environment_variable(monkeypatch):
    monkeypatch.setenv("PPO_FAST_BACKEND", "reference")
    with backend("check"):
        assert current_backend() == "check"
    assert current_backend() == "reference"


def test_with_blocks_nest_and_the_inner_one_wins():
    with backend("reference"):
        with backend("triton"):
            assert current_backend() == "triton"
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_a_with_block_ends_on_an_error_too():
    with pytest.raises(KeyError), backend("triton"):
        raise KeyError
    assert current_backend() == "auto"


def test_a_wrong_name_in_a_with_block_names_the_right_ones():
    with (
        pytest.raises(ValueError, match=r"'cuda'; expected one of auto, triton, reference, check"),
        backend("cuda"),
    ):
        pass
    assert current_backend() == "auto"


def test_a_wrong_name_in_the_environment_variable_names_the_variable(monkeypatch, inputs):
    monkeypatch.setenv("PPO_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"PPO_FAST_BACKEND is 'fast'; expected one of auto"):
        Accelerated(scaled_sum, twin)(*inputs)


# What a call runs.


def test_auto_runs_the_reference_on_cpu_tensors(inputs):
    assert not ran_twin(Accelerated(scaled_sum, other), *inputs)


def test_auto_runs_the_reference_on_cpu_tensors_under_the_interpreter_too(inputs, interpreted):
    assert not ran_twin(Accelerated(scaled_sum, other), *inputs)


def test_auto_runs_the_twin_on_gpu_tensors(inputs):
    assert ran_twin(Accelerated(scaled_sum, other), *map(on_gpu, inputs))


def test_auto_runs_the_reference_if_one_tensor_is_on_the_cpu(inputs):
    x, weight = inputs
    op = Accelerated(scaled_sum, other)
    assert not ran_twin(op, on_gpu(x), weight)
    assert not ran_twin(op, on_gpu(x), on_gpu(weight), scale=torch.tensor(2.0))


def test_auto_runs_the_reference_where_the_twin_says_unsupported(inputs):
    def limited(x, weight, *, scale=1.0):
        return other(x, weight, scale=scale)

    limited.unsupported = lambda x, weight, *, scale=1.0: "scale is not 1" if scale != 1 else None
    op = Accelerated(scaled_sum, limited)
    assert ran_twin(op, *map(on_gpu, inputs))
    assert not ran_twin(op, *map(on_gpu, inputs), scale=2.0)


def test_reference_runs_the_reference_on_gpu_tensors(inputs):
    with backend("reference"):
        assert not ran_twin(Accelerated(scaled_sum, other), *map(on_gpu, inputs))


def test_triton_runs_the_twin_on_cpu_tensors_under_the_interpreter(inputs, interpreted):
    with backend("triton"):
        assert ran_twin(Accelerated(scaled_sum, other), *inputs)


def test_tensors_are_found_inside_lists_and_dicts():
    def reference(parts):
        return torch.zeros(1)

    def kernel(parts):
        return torch.full((1,), 7.0)

    op = Accelerated(reference, kernel)
    assert op([on_gpu(torch.ones(1)), {"a": on_gpu(torch.ones(1))}]) == 7.0
    assert op([on_gpu(torch.ones(1)), {"a": torch.ones(1)}]) == 0.0


def test_an_op_without_a_twin_runs_its_reference(inputs):
    op = Accelerated(scaled_sum, None, "there is no kernel file kernels/x.py")
    torch.testing.assert_close(op(*inputs), scaled_sum(*inputs))


# A forced backend that cannot run says why and what to do.


@pytest.mark.parametrize("mode", ["triton", "check"])
def test_forcing_a_missing_twin_names_the_reason(mode, inputs):
    op = Accelerated(scaled_sum, None, "there is no kernel file kernels/x.py")
    expected = (
        rf"scaled_sum: backend '{mode}' was asked for, but there is no kernel file kernels/x.py; "
        "use PPO_FAST_BACKEND=auto or reference"
    )
    with backend(mode), pytest.raises(RuntimeError, match=expected):
        op(*inputs)


@pytest.mark.parametrize("mode", ["triton", "check"])
def test_forcing_the_twin_on_cpu_tensors_points_to_the_interpreter(mode, inputs):
    with backend(mode), pytest.raises(RuntimeError, match=r"on the CPU \(set TRITON_INTERPRET=1"):
        Accelerated(scaled_sum, twin)(*inputs)


def test_forcing_the_twin_on_mixed_devices_says_so(inputs):
    x, weight = inputs
    with backend("triton"), pytest.raises(RuntimeError, match="some on a GPU and some not"):
        Accelerated(scaled_sum, twin)(on_gpu(x), weight)


def test_forcing_an_unsupported_call_gives_the_twins_reason(inputs, interpreted):
    def limited(x, weight, *, scale=1.0):
        raise AssertionError("ran")

    limited.unsupported = lambda x, weight, *, scale=1.0: f"x has {x.shape[1]} columns"
    with backend("triton"), pytest.raises(RuntimeError, match="but x has 6 columns; use"):
        Accelerated(scaled_sum, limited)(*inputs)


def test_an_error_inside_the_twin_propagates(inputs):
    def failing(x, weight, *, scale=1.0):
        raise ZeroDivisionError("in the kernel")

    with pytest.raises(ZeroDivisionError, match="in the kernel"):
        Accelerated(scaled_sum, failing)(*map(on_gpu, inputs))


# check.


def check(kernel, *args, reference=scaled_sum, **kwargs):
    with backend("check"):
        return Accelerated(reference, kernel)(*args, **kwargs)


def test_check_returns_the_twins_result_and_keeps_its_graph(inputs, interpreted):
    x, weight = inputs
    x.requires_grad_()
    out, _ = check(twin, x, weight)
    out.sum().backward()
    torch.testing.assert_close(x.grad, weight[:, None].expand(4, 6))


def test_check_catches_a_wrong_output(inputs, interpreted):
    def wrong(x, weight, *, scale=1.0):
        out, square = scaled_sum(x, weight, scale=scale)
        return out, square + 1e-3

    with pytest.raises(AssertionError, match="scaled_sum: output 1: kernel and reference differ"):
        check(wrong, *inputs)


class SumWithWrongBackward(torch.autograd.Function):
    """Sum of rows times weight, whose gradient of x forgets the weight."""

    @staticmethod
    def forward(ctx, x, weight, factor):
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        return x.sum(-1) * weight * factor

    @staticmethod
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors
        return (grad * ctx.factor)[:, None].expand_as(x), grad * x.sum(-1) * ctx.factor, None


@pytest.mark.parametrize("factor", [1.0, 1e-6])
def test_check_catches_a_wrong_gradient_however_small(factor, inputs, interpreted):
    def reference(x, weight):
        return x.sum(-1) * weight * factor

    def wrong(x, weight):
        return SumWithWrongBackward.apply(x, weight, factor)

    x, weight = inputs
    check(wrong, x, weight, reference=reference)
    with pytest.raises(AssertionError, match="gradient 0: kernel and reference differ"):
        check(wrong, x.requires_grad_(), weight, reference=reference)


def test_check_catches_a_gradient_lost_on_the_way(inputs, interpreted):
    def detached(x, weight, *, scale=1.0):
        out, square = scaled_sum(x, weight, scale=scale)
        return out.detach(), square

    x, weight = inputs
    with pytest.raises(AssertionError, match="gradient 0 is missing in the kernel and present"):
        check(detached, x.requires_grad_(), weight)


def test_check_compares_gradients_under_no_grad(inputs, interpreted):
    def detached(x, weight, *, scale=1.0):
        out, square = scaled_sum(x, weight, scale=scale)
        return out.detach(), square

    x, weight = inputs
    with torch.no_grad(), pytest.raises(AssertionError, match="gradient 0"):
        check(detached, x.requires_grad_(), weight)


def test_check_sees_a_twin_that_ignores_strides(interpreted):
    def packed_only(x, weight, *, scale=1.0):
        return scaled_sum(x.as_strided(x.shape, (x.shape[1], 1)), weight, scale=scale)

    x, weight = torch.randn(4, 12), torch.randn(4)
    check(packed_only, x, weight)
    with pytest.raises(AssertionError, match="output 0"):
        check(packed_only, x[:, ::2], weight)


def test_check_catches_wrong_shapes_dtypes_and_numbers_of_outputs(inputs, interpreted):
    def wrong_dtype(x, weight, *, scale=1.0):
        out, square = scaled_sum(x, weight, scale=scale)
        return out.double(), square

    def too_few(x, weight, *, scale=1.0):
        return scaled_sum(x, weight, scale=scale)[0]

    with pytest.raises(AssertionError, match=r"output 0: the kernel gave \(4,\) torch.float64"):
        check(wrong_dtype, *inputs)
    with pytest.raises(AssertionError, match="returned 1 tensors, the reference 2"):
        check(too_few, *inputs)


def test_check_accepts_equal_infinities_and_nan(interpreted):
    def reference(x):
        return x / x.abs()

    x = torch.tensor([-1.0, 0.0, torch.inf, 2.0])
    torch.testing.assert_close(
        check(reference, x, reference=reference), reference(x), equal_nan=True
    )


def test_check_leaves_the_callers_gradients_and_random_streams_alone(interpreted):
    def reference(x, *, generator):
        return x + torch.rand(4, generator=generator) + torch.rand(4)

    x = torch.zeros(4, requires_grad=True)
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    checked = check(reference, x, reference=reference, generator=generator)
    after = torch.rand(1)
    generator.manual_seed(3)
    torch.manual_seed(5)
    torch.testing.assert_close(checked, reference(x, generator=generator))
    assert torch.equal(after, torch.rand(1))
    assert x.grad is None


# Binding.


def test_a_file_without_kernel_binds_nothing_and_says_which_file_is_missing():
    pytest.importorskip("triton")
    op = accelerated(scaled_sum)
    assert op.kernel is None
    assert op.no_kernel == "there is no kernel file kernels/test_dispatch.py"


def test_a_kernel_file_without_the_function_says_so(monkeypatch):
    pytest.importorskip("triton")
    install_kernels(monkeypatch)
    _, why = _bind_twin(scaled_sum)
    assert why == "kernels/test_dispatch.py has no function scaled_sum"


def test_a_twin_of_the_same_name_is_bound(monkeypatch, inputs, interpreted):
    pytest.importorskip("triton")
    install_kernels(monkeypatch, scaled_sum=other)
    op = accelerated(scaled_sum)
    assert op.kernel is other
    assert op.no_kernel == ""


def test_a_twin_with_another_signature_is_refused(monkeypatch):
    pytest.importorskip("triton")
    install_kernels(monkeypatch, scaled_sum=lambda x, weight, *, scale=2.0: x)
    with pytest.raises(
        TypeError, match=r"scaled_sum: the kernel's signature \(x, weight, \*, scale=2.0\) differs"
    ):
        accelerated(scaled_sum)


def install_kernels(monkeypatch, **functions) -> None:
    """Put a module `ppo_fast.kernels.test_dispatch` in place, as kernels/test_dispatch.py would."""
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    name = "ppo_fast.kernels.test_dispatch"
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_without_triton_nothing_is_bound(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert _bind_twin(scaled_sum) == (None, "triton is not installed")


def test_deleting_the_kernels_folder_leaves_the_references(tmp_path):
    pytest.importorskip("triton")
    shutil.copytree(
        ROOT / "ppo_fast",
        tmp_path / "ppo_fast",
        symlinks=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    code = (
        "import sys\n"
        # An editable install would find the repository's kernels.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in str(f)]\n"
        "from ppo_fast.dispatch import accelerated\n"
        "def double(x): return 2 * x\n"
        "op = accelerated(double)\n"
        "assert op(3) == 6\n"
        "print(op.no_kernel)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "there is no kernel file kernels/__main__.py", done.stderr


def test_an_op_keeps_the_name_the_text_and_the_signature_of_its_reference():
    op = Accelerated(scaled_sum, twin)
    assert op.__name__ == "scaled_sum"
    assert op.__doc__ == scaled_sum.__doc__
    assert inspect.signature(op) == inspect.signature(scaled_sum)


# explain.


def test_explain_says_what_would_run_and_why(monkeypatch):
    bound, unbound = Accelerated(scaled_sum, twin), Accelerated(scaled_sum, None, "no file")
    assert bound.explain("cpu") == ("reference", "CPU tensors")
    assert bound.explain("cuda") == ("triton", "GPU tensors")
    assert unbound.explain("cuda") == ("reference", "no file")
    with backend("reference"):
        assert bound.explain("cuda") == ("reference", "forced")
    with backend("triton"):
        assert bound.explain("cuda") == ("triton", "forced")
        assert bound.explain("cpu") == ("error", "CPU tensors need TRITON_INTERPRET=1")
        assert unbound.explain("cuda") == ("error", "no file")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert bound.explain("cpu") == ("triton", "forced")


# torch.compile.


@pytest.mark.parametrize("mode", ["auto", "reference", "triton"])
def test_an_op_compiles_without_a_graph_break(mode, inputs, interpreted):
    torch._dynamo.reset()
    op = Accelerated(scaled_sum, twin)
    x, weight = inputs
    x.requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(x, weight):
        return op(x * 2, weight, scale=0.5)[0].mean()

    with backend(mode):
        loss(x, weight).backward()
    torch.testing.assert_close(x.grad, weight[:, None].expand(4, 6) / 4)


def test_an_op_without_a_twin_compiles_without_a_graph_break(inputs):
    torch._dynamo.reset()
    op = accelerated(scaled_sum)
    compiled = torch.compile(lambda x, w: op(x, w)[0] * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), 2 * scaled_sum(*inputs)[0])


def test_a_compiled_op_follows_a_later_change_of_backend(inputs, interpreted):
    torch._dynamo.reset()
    op = Accelerated(scaled_sum, other)
    compiled = torch.compile(lambda x, w: op(x, w)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), scaled_sum(*inputs)[0])
    with backend("triton"):
        assert (compiled(*inputs) == 7).all()
    torch.testing.assert_close(compiled(*inputs), scaled_sum(*inputs)[0])
