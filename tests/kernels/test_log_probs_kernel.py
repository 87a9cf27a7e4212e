"""The `log_probs_from_logits` kernels against the reference and the definition."""

import math

import pytest
import torch
from calls import Call, assert_agrees, assert_as_exact_as_torch, run
from cases_log_probs import CASES, rows

from ppo_fast.device_errors import raise_device_errors
from ppo_fast.dispatch import backend
from ppo_fast.functional.log_probs import log_probs_from_logits

INF = math.inf
WIDTHS = [10, 1025, 9001]
"""A width for each way of reading a row: tiled, by one program, in parts."""

pytestmark = pytest.mark.filterwarnings("ignore:overflow|invalid value|All-NaN:RuntimeWarning")


def kernel(logits, index, **kwargs):
    with backend("triton"):
        return log_probs_from_logits(logits, index, with_entropy=True, **kwargs)


def check(logits, index, **kwargs):
    """Assert that kernel and reference agree, gradients too; return the kernel's outputs."""
    args = logits.requires_grad_(), index
    assert_agrees(Call(log_probs_from_logits, args, {"with_entropy": True, **kwargs}))
    return kernel(logits.detach(), index, **kwargs)


def gradient(logits, outputs, g, h):
    return torch.autograd.grad(outputs, logits, [g, h])[0]


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


@pytest.mark.parametrize(
    "name",
    [
        *("short, all options", "short, bf16", "long, all options", "long, bf16", "long, fp16"),
        *("long, -inf", "split, all options", "split, bf16"),
    ],
)
def test_the_error_is_no_more_than_twice_pytorchs(name):
    # The interpreter cuts float32 to bfloat16 off, where a GPU and PyTorch round.
    assert_as_exact_as_torch(CASES[name](), floor=4e-3 if "bf16" in name else 2e-6)


@pytest.mark.parametrize("V", [1, 2, 7, 256, 257, 1000, 1024, 1025, 2048, 2053])
@pytest.mark.parametrize("M", [1, 3])
def test_shapes(M, V):
    assert_agrees(rows(M, V))


@pytest.mark.parametrize(("M", "V"), [(130, 7), (1025, 1), (2, 32000), (1, 151936)])
def test_large_shapes(M, V):
    assert_agrees(rows(M, V))


def test_one_row_without_leading_dimensions():
    assert_agrees(rows(9))
    assert_agrees(rows(1025))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 1025)])
def test_no_rows(shape):
    logits = torch.randn(shape, requires_grad=True)
    outputs = kernel(logits, torch.zeros(shape[:-1], dtype=torch.int64))
    assert all(x.shape == shape[:-1] for x in outputs)
    assert gradient(logits, outputs, *outputs).shape == shape


# Values


@pytest.mark.parametrize("V", WIDTHS)
@pytest.mark.parametrize("value", [-1e4, 1e4, 0.0, torch.finfo(torch.float32).min, 3e38])
def test_equal_logits(V, value):
    log_probs, entropy = check(torch.full((2, V), value), torch.tensor([0, V - 1]))
    torch.testing.assert_close(log_probs, torch.full((2,), -math.log(V)))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(V)))


@pytest.mark.parametrize("V", WIDTHS)
def test_an_offset_changes_nothing(V):
    logits = (3 * torch.randn(3, V) * 256).round() / 256
    index = torch.randint(V, (3,))
    g, h = torch.randn(2, 3)
    results = []
    for offset in (0.0, 5000.0, -5000.0):
        leaf = (logits + offset).requires_grad_()
        outputs = kernel(leaf, index, temperature=0.7)
        results.append((*outputs, gradient(leaf, outputs, g, h)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("V", WIDTHS)
def test_the_only_possible_logit_is_certain(V):
    logits = torch.full((4, V), -INF)
    index = torch.tensor([0, V // 2, V - 1, 1])
    logits[torch.arange(4), index] = torch.tensor([0.0, 1e4, -1e4, 1e30])
    log_probs, entropy = check(logits, index)
    assert log_probs.tolist() == entropy.tolist() == [0.0] * 4


@pytest.mark.parametrize("V", WIDTHS)
def test_the_first_half_impossible(V):
    logits = torch.randn(2, V)
    logits[:, : V // 2] = -INF
    logits[1, : V - 1] = -INF
    check(logits, torch.tensor([V - 2, V - 1]))


@pytest.mark.parametrize("V", WIDTHS)
def test_nothing_possible(V):
    log_probs, entropy = check(torch.full((2, V), -INF), torch.tensor([0, V - 1]))
    assert log_probs.tolist() == [-INF, -INF] and entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("V", WIDTHS)
@pytest.mark.parametrize("poison", [math.nan, INF])
def test_nan_and_infinity_stay_in_their_row(V, poison):
    logits = torch.randn(3, V)
    logits[1, V - 2] = poison
    log_probs, entropy = check(logits, torch.tensor([0, 1, V - 1]))
    assert log_probs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("V", WIDTHS)
def test_ties(V):
    logits = torch.randint(3, (3, V)).float()
    check(logits, torch.tensor([0, V // 2, V - 1]))


@pytest.mark.parametrize("V", WIDTHS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4, 1e30])
def test_log_probs_are_never_positive_nor_entropies_negative(V, scale):
    logits = torch.randn(3, V) * scale
    log_probs, entropy = kernel(logits, logits.argmax(-1), temperature=0.7)
    assert (log_probs <= 0).all() and (entropy >= 0).all()


@pytest.mark.parametrize("V", WIDTHS)
def test_the_entropy_of_a_peaked_row_keeps_its_digits(V):
    logits = torch.full((3, V), -math.inf)
    logits[:, 1] = torch.tensor([0.0, 100.0, 5000.0])
    logits[:, [0, V - 1]] = logits[:, 1:2] - 20
    _, entropy = kernel(logits, torch.ones(3, dtype=torch.int64))
    p = math.exp(-20.0)
    torch.testing.assert_close(entropy, torch.full((3,), 2 * p * 21), rtol=0.05, atol=0)


@pytest.mark.parametrize("V", [10, 1025])
def test_rows_without_upstream_gradient_are_zero_whatever_they_hold(V):
    logits = torch.randn(4, V)
    logits[1] = math.nan
    logits.requires_grad_()
    g, h = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 2.0])
    dx = gradient(logits, kernel(logits, torch.tensor([0, 1, 2, 3])), g, h)
    assert dx.isfinite().all() and not dx[1:3].any() and dx[0].any() and dx[3].any()


@pytest.mark.parametrize("V", [10, 1025])
@pytest.mark.parametrize("output", [0, 1])
def test_each_output_alone_and_an_expanded_upstream_gradient(V, output):
    logits, index = torch.randn(3, V), torch.tensor([0, 5, V - 1])
    grads = []
    for name in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        with backend(name):
            outputs = log_probs_from_logits(leaf, index, temperature=1.3, with_entropy=True)
        outputs[output].sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


# The index


@pytest.mark.parametrize("V", WIDTHS)
@pytest.mark.parametrize("bad", [-1, -100, 2**31, 2**32])
def test_an_index_out_of_range_is_nan_and_marked(V, bad):
    raise_device_errors()
    logits = torch.randn(3, V)
    index = torch.tensor([0, bad, V - 1])
    log_probs, entropy = kernel(logits, index)
    assert log_probs.isnan().tolist() == [False, True, False] and entropy.isfinite().all()
    with pytest.raises(IndexError, match="log_probs_from_logits"):
        raise_device_errors()
    raise_device_errors()
    mask = torch.tensor([True, False, True])
    assert kernel(logits, index, mask=mask)[0].isfinite().all()
    raise_device_errors()


@pytest.mark.parametrize("V", [10, 1025])
def test_the_first_index_out_of_range_is_v(V):
    kernel(torch.randn(1, V), torch.tensor([V]))
    with pytest.raises(IndexError):
        raise_device_errors()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_other_index(dtype):
    index = torch.randint(300, (2, 6), dtype=dtype)[:, ::2]
    check(torch.randn(2, 3, 300), index, mask=torch.rand(3, 2).t() < 0.7)


# Strides


def layouts():
    """Logits [..., 12] and [..., 260] in all the ways they may lie."""
    for V in (12, 260):
        base = torch.randn(3, 4, V)
        yield "next-token slice", base[:, :-1]
        yield "time first", base.transpose(0, 1)
        yield "padded rows", torch.randn(3, 4, V + 8)[..., 3 : V + 3]
        yield "every other column", torch.randn(3, 2 * V)[:, ::2]
        yield "feature major", torch.randn(V, 3).t()
        yield "expanded", torch.randn(1, V).expand(3, V)
        yield "expanded twice", torch.randn(1, 1, V).expand(3, 2, V)
        yield "expanded in the middle", torch.randn(2, 1, V).expand(2, 3, V)
        yield "three odd dimensions", torch.randn(3, 2, 2, V).permute(2, 1, 0, 3)[:, 1:]


def test_strides():
    for name, logits in layouts():
        shape, V = logits.shape[:-1], logits.shape[-1]
        index = torch.randint(V, shape)
        try:
            check(logits.detach(), index, mask=torch.rand(shape) < 0.8)
        except AssertionError as error:
            raise AssertionError(f"{name}, {list(logits.shape)}: {error}") from None


# The gradient over the logits


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("shape", [(3, 10), (2, 3, 1025), (2, 20000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_may_replace_the_logits(name, shape, dtype):
    call = rows(*shape, dtype=dtype, masked=True, temperature=0.7)
    (leaf, index), kwargs = call.args, call.kwargs
    grads = []
    for inplace in (False, True):
        logits = leaf * 1
        with backend(name):
            outputs = log_probs_from_logits(logits, index, inplace_backward=inplace, **kwargs)
        (dx,) = torch.autograd.grad([x.sum() for x in outputs], logits)
        grads.append(dx)
    assert dx.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("V", [10, 1025])
def test_edited_logits_have_no_gradient_in_place(name, V):
    leaf = torch.randn(3, V, requires_grad=True)
    index = torch.tensor([0, 1, 2])
    for spoil in ("edit", "backward"):
        logits = leaf * 1
        with backend(name):
            log_probs = log_probs_from_logits(logits, index, inplace_backward=True)
        if spoil == "edit":
            logits.mul_(2)
        else:
            log_probs.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="logits were edited since the forward"):
            log_probs.sum().backward()


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_another_user_of_overwritten_logits_fails(name):
    leaf = torch.randn(3, 300, requires_grad=True)
    logits = leaf * 1
    other = logits.exp().log().sum() + logits.square().sum()
    with backend(name):
        log_probs = log_probs_from_logits(logits, torch.tensor([0, 1, 2]), inplace_backward=True)
    torch.autograd.grad(log_probs.sum(), logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_logits_that_must_not_be_overwritten(name):
    leaf = torch.randn(4, 300, requires_grad=True)
    index = torch.zeros(4, dtype=torch.int64)
    with backend(name):
        for logits, message in (
            (leaf, "leaf"),
            (leaf.view(2, 2, 300), "leaf"),
            (leaf[:3], "leaf"),
            ((leaf * 1).expand(4, 4, 300), "rows that lie"),
            ((leaf.t() * 1).contiguous().t(), "rows that lie"),
            ((leaf * 1).view(2, 2, 300).transpose(0, 1), "rows that lie"),
        ):
            shaped = index[:1].expand(logits.shape[:-1])
            with pytest.raises(ValueError, match=f"inplace_backward, but logits .*{message}"):
                log_probs_from_logits(logits, shaped, inplace_backward=True)
        # Nothing to write: there is no gradient.
        log_probs_from_logits(leaf.detach(), index, inplace_backward=True)


# Integration


@pytest.mark.parametrize("V", WIDTHS)
def test_the_same_call_gives_the_same_bits(V):
    first, second = (run(rows_of(V), "triton") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def rows_of(V):
    torch.manual_seed(3)
    return rows(3, V, dtype=torch.bfloat16, masked=True)


@pytest.mark.parametrize("V", WIDTHS)
def test_a_temperature_on_the_device_is_the_number(V):
    logits, index = torch.randn(2, V), torch.tensor([0, 1])
    for dtype in (torch.float32, torch.float64):
        ours = kernel(logits, index, temperature=torch.tensor(0.5, dtype=dtype))
        torch.testing.assert_close(ours, kernel(logits, index, temperature=0.5), rtol=0, atol=0)


def test_no_graph_without_need_and_no_double_backward():
    logits = torch.randn(2, 300)
    index = torch.tensor([0, 1])
    assert not kernel(logits, index)[0].requires_grad
    log_probs, _ = kernel(logits.requires_grad_(), index)
    with pytest.raises(NotImplementedError, match=r"log_probs_from_logits: .*create_graph"):
        torch.autograd.grad(log_probs.sum(), logits, create_graph=True)


def test_float64_is_left_to_the_reference():
    with pytest.raises(RuntimeError, match="float64 tensors run on the reference"):
        kernel(torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1]))


def test_compiles_to_one_graph():
    def op(logits, index, mask, temperature):
        with backend("triton"):
            return log_probs_from_logits(
                logits, index, mask=mask, temperature=temperature, with_entropy=True
            )

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for V, temperature in ((12, 0.7), (300, torch.tensor(1.3))):
        logits, index = torch.randn(3, V), torch.tensor([0, 5, 11])
        mask = torch.tensor([True, False, True])
        g, h = torch.randn(2, 3)
        results = []
        for function in (op, compiled):
            leaf = logits.clone().requires_grad_()
            outputs = function(leaf, index, mask, temperature)
            results.append((*outputs, gradient(leaf, outputs, g, h)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("V", [1, 3, 300])
def test_a_row_without_upstream_gradient_gets_none_even_if_it_is_not_finite(bad, V):
    logits = torch.randn(2, V)
    logits[0, 0] = bad
    logits.requires_grad_()
    with backend("triton"):
        log_probs = log_probs_from_logits(logits, torch.tensor([0, V - 1]))
    log_probs.backward(torch.tensor([0.0, 1.0]))
    assert not logits.grad[0].any() and logits.grad[1].isfinite().all()


def test_an_infinite_logit_makes_its_row_nan_in_both():
    logits = torch.tensor([[math.inf, 0.0, 1.0]]).requires_grad_()
    for name in ("triton", "reference"):
        with backend(name):
            log_probs = log_probs_from_logits(logits, torch.tensor([1]))
        (gradient,) = torch.autograd.grad(log_probs.sum(), logits)
        assert gradient.isnan().any()
