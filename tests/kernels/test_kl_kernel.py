"""The `kl_from_logits` kernels against the reference and the definition."""

import math

import pytest
import torch
from calls import Call, assert_agrees, assert_as_exact_as_torch, run
from cases_kl import CASES, illegal, pair

from ppo_fast.dispatch import backend
from ppo_fast.functional.kl import kl_from_logits

DIRECTIONS = ["forward", "reverse"]


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [33, 2100])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_error_is_no_more_than_twice_pytorchs(dtype, V, direction):
    # The interpreter cuts bf16 off where a GPU rounds: its gradients get one unit in the last place.
    floor = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert_as_exact_as_torch(pair(3, V, direction=direction, dtype=dtype), floor)


def test_logits_far_from_zero_cost_no_precision():
    assert_as_exact_as_torch(CASES["large, offset"]())


@pytest.mark.parametrize("V", [1, 2, 7, 1000, 1024, 1025, 2047, 2048, 2053])
@pytest.mark.parametrize("rows", [1, 3])
def test_any_number_of_rows_and_columns(V, rows):
    assert_agrees(pair(rows, V))


def test_many_small_rows_and_one_wide_row():
    assert_agrees(pair(130, 7, direction="reverse"))
    assert_agrees(pair(1, 32_000, direction="reverse"))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("V", [9, 2053])
def test_special_rows_follow_the_reference_and_touch_no_other(direction, V):
    call = illegal(15, V, direction)
    (kl,), (gradient,) = run(call, "triton")
    nan = kl.isnan().nonzero().flatten().tolist()
    assert nan == [6, 7, 8, 9]
    first, second = (0, 1) if direction == "reverse" else (1, 0)
    assert kl[first] == math.inf and not gradient[first].any()
    assert kl[second].isfinite() and gradient[second].isfinite().all()
    assert kl[5] == kl[10] == kl[14] == 0.0
    assert gradient[nan].isnan().all()
    others = [row for row in range(15) if row not in nan]
    assert gradient[others].isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("V", [9, 2053])
def test_rows_without_upstream_gradient_get_exactly_zero_unread(direction, V):
    call = illegal(15, V, direction)
    logits = call.args[0].detach().requires_grad_()
    with backend("triton"):
        kl = kl_from_logits(logits, call.args[1], direction=direction)
        upstream = torch.zeros(15)
        upstream[14] = 1.0
        (gradient,) = torch.autograd.grad(kl, logits, upstream)
    assert not gradient[:14].any()


@pytest.mark.parametrize("V", [9, 2053, 9001])
def test_masked_rows_are_not_read(V):
    call = pair(5, V, masked=True)
    (kl,), (gradient,) = run(call, "triton")
    assert not kl[~call.kwargs["mask"]].any()
    assert not gradient[~call.kwargs["mask"]].any()
    assert kl[call.kwargs["mask"]].isfinite().all()


def test_all_rows_masked_and_no_rows():
    call = pair(4, 2053, masked=True)
    call.kwargs["mask"].fill_(False)
    (kl,), (gradient,) = run(call, "triton")
    assert not kl.any() and not gradient.any()
    for shape in ((0, 5), (0, 3000), (2, 0, 4)):
        (kl,), (gradient,) = run(pair(*shape), "triton")
        assert kl.shape == shape[:-1] and gradient.shape == shape


def test_leading_dimensions_in_any_order():
    call = pair(3, 4, 2, 50)
    x, z = (t.detach().transpose(0, 2) for t in call.args)
    mask = (torch.rand(3, 4, 2) < 0.7).transpose(0, 2)
    assert_agrees(Call(kl_from_logits, (x.requires_grad_(), z), {"mask": mask}))
    one = x[0, 0, 0].detach().requires_grad_()
    assert_agrees(Call(kl_from_logits, (one, z[0, 0, 0]), {}))


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_rows_that_start_anywhere_in_memory(shift):
    # [2, V + 5] rows whose first 16-byte boundary differs from row to row, and between the two.
    x, z = torch.randn(2, 2104)[:, shift : 2094 + shift], torch.randn(2, 2104)[:, 1:2095]
    assert_agrees(Call(kl_from_logits, (x.requires_grad_(), z), {}))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_gradient_step_equals_autograd_through_log_softmax(direction):
    call = pair(3, 2100, direction=direction)
    (kl,), (gradient,) = run(call, "triton")
    x = call.args[0].detach().double().requires_grad_()
    p, q = x.log_softmax(-1), call.args[1].double().log_softmax(-1)
    if direction == "reverse":
        p, q = q, p
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(kl.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    mix = torch.cos(torch.arange(3) + 0.5).double()
    (wanted,) = torch.autograd.grad(expected, x, mix)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-7)


def test_an_expanded_upstream_gradient():
    call = pair(4, 3, 20)
    logits = call.args[0].detach().requires_grad_()
    with backend("triton"):
        kl_from_logits(logits, call.args[1]).sum().backward()
    ones = call.args[0].detach().requires_grad_()
    kl_from_logits.reference(ones, call.args[1]).sum().backward()
    torch.testing.assert_close(logits.grad, ones.grad, rtol=1e-5, atol=1e-6)


def test_the_result_can_be_edited_in_place():
    call = pair(3, 5, 7)
    with backend("triton"):
        kl = kl_from_logits(*call.args)
        kl.mul_(2.0).sum().backward()


def test_double_backward_is_refused():
    call = pair(3, 7)
    with backend("triton"):
        kl = kl_from_logits(*call.args)
        with pytest.raises(NotImplementedError, match="create_graph=True"):
            torch.autograd.grad(kl.sum(), call.args[0], create_graph=True)


def test_vmap_is_refused():
    with backend("triton"), pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(kl_from_logits)(torch.randn(2, 3, 5), torch.randn(2, 3, 5))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.randn(2, 3), torch.randn(2, 4)), {}, "expected the same shape"),
        ((torch.zeros(2, 3).long(), torch.randn(2, 3)), {}, "floating-point dtype"),
        ((torch.randn(2, 0), torch.randn(2, 0)), {}, "V at least 1"),
        ((torch.randn(2, 3), torch.randn(2, 3)), {"direction": "up"}, "direction is 'up'"),
        ((torch.randn(2, 3), torch.randn(2, 3)), {"mask": torch.ones(2)}, "mask is"),
        ((torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)), {}, "requires grad"),
    ],
)
def test_bad_input_is_refused_as_by_the_reference(args, kwargs, message):
    for name in ("triton", "reference"):
        with backend(name), pytest.raises(ValueError, match=message):
            kl_from_logits(*args, **kwargs)


def test_it_compiles_into_one_graph_with_its_gradient():
    call = CASES["large, reverse"]()
    mask = call.kwargs["mask"]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def penalty(logits, ref_logits, mask):
        return kl_from_logits(logits * 1.0, ref_logits, direction="reverse", mask=mask) * 2.0

    with backend("triton"):
        got = penalty(*call.args, mask)
        (gradient,) = torch.autograd.grad(got.sum(), call.args[0])
        expected = kl_from_logits(*call.args, direction="reverse", mask=mask) * 2.0
        (wanted,) = torch.autograd.grad(expected.sum(), call.args[0])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, wanted)
