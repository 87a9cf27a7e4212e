"""The `sample_from_logits` kernels against the reference, and their draws against the policy.

Kernel and reference draw by the same random numbers and the same segments, so they draw the same
actions unless a random number falls within rounding of a boundary between two; here none does.
"""

import math

import pytest
import torch
from calls import assert_agrees, assert_as_exact_as_torch
from cases_sample import CASES, policy

from ppo_fast.dispatch import backend
from ppo_fast.functional.log_probs import log_probs_from_logits
from ppo_fast.functional.sample import sample_from_logits


def draw(logits, **kwargs):
    with backend("triton"):
        return sample_from_logits(logits, **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [40, 1500, 5000])
def test_log_prob_and_entropy_are_as_exact_as_pytorchs(dtype, V):
    # The actions are those of a float64 reference, too.
    assert_as_exact_as_torch(policy(3, V, dtype=dtype))


@pytest.mark.parametrize("V", [1, 2, 7, 511, 512, 513, 1000, 1024, 1025, 2053, 4097])
@pytest.mark.parametrize("rows", [1, 3])
def test_any_number_of_rows_and_columns(V, rows):
    assert_agrees(policy(rows, V))


def test_many_rows_and_a_wide_row():
    assert_agrees(policy(130, 7))
    assert_agrees(policy(1, 32_000))


@pytest.mark.parametrize("V", [10, 1100, 4700])
def test_the_log_prob_is_that_of_the_action(V):
    logits = policy(4, V, illegal=0.3).args[0]
    sample = draw(logits, temperature=0.7)
    expected = log_probs_from_logits.reference(logits, sample.actions, temperature=0.7)
    torch.testing.assert_close(sample.log_probs, expected)


@pytest.mark.parametrize("V", [3, 6])
def test_draws_follow_the_distribution(V):
    M = 20_000
    logits = torch.randn(V)
    logits[1] = -math.inf
    actions = draw(logits.expand(M, V), temperature=1.5).actions
    counts = actions.bincount(minlength=V).double()
    expected = (logits.double() / 1.5).softmax(0) * M
    assert counts[1] == 0
    live = expected > 0
    chi_square = ((counts - expected)[live] ** 2 / expected[live]).sum()
    assert chi_square < 20.0  # 4 degrees of freedom: p = 0.0005


def test_draws_over_segments_follow_the_distribution():
    # Two columns of equal mass in each of three segments, 1 : 2 : 5; nothing elsewhere.
    M, V = 120, 1300
    logits = torch.full((V,), -math.inf)
    for segment, share in enumerate((1.0, 2.0, 5.0)):
        logits[segment * 512 + torch.tensor([3, 100])] = math.log(share)
    actions = draw(logits.expand(M, V)).actions
    counts = actions.bincount(minlength=V).double()
    expected = logits.double().softmax(0) * M
    live = expected > 0
    assert not counts[~live].any()
    assert ((counts - expected)[live] ** 2 / expected[live]).sum() < 22.0  # 5 degrees: p = 0.0005


def test_the_random_numbers_at_their_ends_stay_inside_the_row():
    from ppo_fast.kernels.sample import _sample

    V = 1100
    logits = torch.zeros(2, V)
    logits[:, 0] = logits[:, V - 1] = -math.inf
    lowest, highest = 0.0, 1.0 - 2.0**-53
    uniform = torch.tensor([[lowest] * 2, [highest] * 2], dtype=torch.float64)
    assert _sample(logits, None, uniform, [1.0], [None])[0].tolist() == [1, V - 2]
    assert _sample(logits[:, :20], None, uniform, [1.0], [None])[0].tolist() == [1, 19]
    narrow = logits[:, V - 20 :]
    assert _sample(narrow, None, uniform, [1.0], [None])[0].tolist() == [0, 18]


def test_a_row_depends_on_its_own_random_numbers_and_logits_only():
    from ppo_fast.kernels.sample import _sample

    logits = policy(6, 4700).args[0]
    uniform = torch.rand(6, 2, dtype=torch.float64)
    together = _sample(logits, None, uniform, [1.0], [None])
    for row in range(6):
        alone = _sample(logits[row : row + 1], None, uniform[row : row + 1], [1.0], [None])
        for one, all_ in zip(alone, together, strict=True):
            assert one.item() == all_[row].item()


@pytest.mark.parametrize("V", [9, 1100, 4700])
def test_rows_without_a_distribution_show_it_and_touch_no_other(V):
    logits = torch.randn(5, V)
    logits[1] = -math.inf
    logits[2, 4] = math.nan
    logits[3, V - 1] = math.inf
    sample = draw(logits)
    assert ((sample.actions >= 0) & (sample.actions < V)).all()
    assert sample.log_probs[1] == -math.inf and sample.entropy[1] == 0.0
    assert sample.log_probs[2:4].isnan().all() and sample.entropy[2:4].isnan().all()
    for x in sample:
        assert x[[0, 4]].isfinite().all()


@pytest.mark.parametrize("V", [9, 1100, 4700])
def test_masked_rows_are_not_read(V):
    call = policy(4, V, masked=True)
    call.kwargs["mask"][0] = False
    call.args[0][0] = math.nan
    sample = draw(*call.args, **call.kwargs)
    hidden = ~call.kwargs["mask"]
    for x in sample:
        assert not x[hidden].any() and x.isfinite().all()


def test_no_rows():
    for V in (5, 1100, 4700):
        assert all(x.shape == (0,) for x in draw(torch.empty(0, V)))


@pytest.mark.parametrize("V", [9, 700])
def test_the_seed_decides_and_the_generator_moves_on(V):
    logits = torch.zeros(16, V)

    def generator():
        return torch.Generator(torch.get_default_device()).manual_seed(3)

    first, second = generator(), generator()
    one, two = draw(logits, generator=first).actions, draw(logits, generator=second).actions
    assert torch.equal(one, two)
    assert not torch.equal(draw(logits, generator=first).actions, one)


def test_a_log_prob_is_never_positive():
    logits = torch.full((3, 1100), -200.0)
    logits[:, 7] = 300.0
    sample = draw(logits)
    assert (sample.log_probs == 0).all() and (sample.actions == 7).all()
    assert (sample.entropy >= 0).all() and sample.entropy.max() < 1e-6


def test_nothing_is_differentiated():
    sample = draw(torch.randn(3, 5, requires_grad=True))
    assert not sample.log_probs.requires_grad and not sample.entropy.requires_grad


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.randn(3),), {}, r"expected \[M, V\]"),
        ((torch.zeros(2, 3).int(),), {}, "floating-point dtype"),
        ((torch.randn(2, 0),), {}, "V at least 1"),
        ((torch.randn(2, 3),), {"temperature": 0.0}, "temperature is 0.0"),
        ((torch.randn(2, 3),), {"temperature": torch.ones(1)}, "expected a number or a 0-d"),
        ((torch.randn(2, 3),), {"mask": torch.ones(3).bool()}, r"mask is \[3\]"),
    ],
)
def test_bad_input_is_refused_as_by_the_reference(args, kwargs, message):
    for name in ("triton", "reference"):
        with backend(name), pytest.raises(ValueError, match=message):
            sample_from_logits(*args, **kwargs)


def test_it_compiles_into_one_graph():
    logits = policy(4, 700).args[0]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def act(logits, temperature):
        return sample_from_logits(logits * 1.0, temperature=temperature)

    with backend("triton"):
        torch.manual_seed(5)
        got = act(logits, torch.tensor(0.8))
        torch.manual_seed(5)
        expected = sample_from_logits(logits, temperature=torch.tensor(0.8))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
