"""The `masked_whiten` kernel against the reference and the definition."""

import math

import pytest
import torch
from calls import Call, assert_agrees, assert_as_exact_as_torch
from cases_whiten import CASES, LARGE, entries

from ppo_fast.dispatch import backend
from ppo_fast.functional.gae import gae
from ppo_fast.functional.whiten import masked_whiten


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


@pytest.mark.parametrize("name", ["few, masked", "programs", "large mean", "programs, bf16"])
def test_the_error_is_no_more_than_twice_pytorchs(name):
    assert_as_exact_as_torch(CASES[name]())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    call = entries(700, masked=True, dtype=dtype)
    assert_agrees(call)
    assert_as_exact_as_torch(call)


@pytest.mark.parametrize("N", [1, 2, 3, 511, 2047, 2048, 2049, 16384, 16385])
def test_any_number_of_entries(N):
    assert_agrees(entries(N))
    assert_agrees(entries(N, masked=True))


@pytest.mark.parametrize("N", [1000, LARGE])
@pytest.mark.parametrize("value", [0.1, 1e4, -3.3e-5])
@pytest.mark.parametrize("masked", [True, False])
def test_equal_entries_become_exactly_zero(N, value, masked):
    x = torch.full((N,), value)
    mask = torch.rand(N) < 0.7 if masked else None
    with backend("triton"):
        assert not masked_whiten(x, mask).any()


@pytest.mark.parametrize("N", [5, LARGE])
@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_fewer_than_two_entries_stay(N, kept, shift_mean):
    x = torch.full((N,), math.nan)
    mask = torch.zeros(N, dtype=torch.bool)
    x[N // 2 : N // 2 + kept] = 3.0
    mask[N // 2 : N // 2 + kept] = True
    with backend("triton"):
        got = masked_whiten(x, mask, shift_mean=shift_mean)
    assert torch.equal(got, torch.where(mask, 3.0, torch.zeros(N)))


def test_an_outlier_in_the_first_program_costs_no_precision():
    x = torch.randn(LARGE)
    x[0] = 1e6
    call = entries(LARGE)._replace(args=(x,))
    assert_as_exact_as_torch(call)


def test_the_moments_of_gae_whiten_its_advantages():
    T, N = 12, 7
    mask = torch.rand(T, N) < 0.7
    args = torch.randn(T, N), torch.randn(T, N), torch.randn(N), torch.rand(T, N) < 0.1
    with backend("triton"):
        advantages, _, moments = gae(*args, mask=mask, gamma=0.9, gae_lambda=0.9, with_moments=True)
        got = masked_whiten(advantages, mask, moments=moments)
    expected = masked_whiten.reference(advantages.double(), mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_layout_of_x_is_kept_and_no_mask_layout_matters():
    x, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.7
    columns = x.t().contiguous().t()
    with backend("triton"):
        expected = masked_whiten(x, mask)
        got = masked_whiten(columns, mask)
    assert got.stride() == columns.stride()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(0,), (0, 4), ()])
def test_empty_and_scalar_inputs(shape):
    x = torch.ones(shape)
    with backend("triton"):
        got = masked_whiten(x, x.bool())
    assert torch.equal(got, x)


def test_strides_of_more_dimensions_are_copied_once():
    x, mask = torch.randn(3, 4, 10)[..., 2:7], torch.rand(5, 4, 3) < 0.7
    call = entries(1)._replace(args=(x, mask.transpose(0, 2)))
    assert_agrees(call)


def test_repeated_calls_give_the_same_bits():
    call = entries(LARGE, masked=True)
    with backend("triton"):
        first, second = (masked_whiten(*call.args) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(4)}, r"mask is \[4\] torch.float32"),
        ({"moments": torch.ones(2)}, r"moments is \[2\]"),
        ({"eps": torch.ones(2)}, r"eps is a tensor of shape \[2\]"),
    ],
)
def test_bad_input_is_refused_as_by_the_reference(change, message):
    for name in ("triton", "reference"):
        with backend(name), pytest.raises(ValueError, match=message):
            masked_whiten(torch.randn(4), **change)


def test_float64_runs_on_the_reference_or_says_so():
    with backend("triton"), pytest.raises(RuntimeError, match="float64 tensors run on the ref"):
        masked_whiten(torch.randn(3, dtype=torch.float64))


def test_it_compiles_into_one_graph():
    call = CASES["moments, library"]()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def whiten(x, mask, moments):
        return masked_whiten(x * 1.0, mask, moments=moments)

    with backend("triton"):
        got = whiten(*call.args, call.kwargs["moments"])
        expected = masked_whiten(*call.args, **call.kwargs)
    assert torch.equal(got, expected)


def test_moments_may_be_strided():
    moments = torch.tensor([[10.0, 0.0], [2.0, 0.0], [30.0, 0.0]])[:, 0]
    assert_agrees(Call(masked_whiten, (torch.arange(4.0),), {"moments": moments}))
