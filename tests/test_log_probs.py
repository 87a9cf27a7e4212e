import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast.functional import _rows
from ppo_fast.functional import log_probs as module
from ppo_fast.functional.log_probs import log_probs_from_logits

INF = math.inf
EVERYTHING = ["whole", "one block", "many blocks"]


@pytest.fixture(params=EVERYTHING)
def path(request, monkeypatch):
    """Run the test through each way of evaluating: whole, in one block, in blocks of a few rows."""
    if request.param != "whole":
        monkeypatch.setattr(module, "SHORT_ROW", 0)
        monkeypatch.setattr(module, "WHOLE_ELEMENTS", -1)
    if request.param == "many blocks":
        monkeypatch.setattr(_rows, "rows_per_block", lambda logits: 2)
    return request.param


def oracle(logits, index, temperature=1.0):
    """log p(index) and entropy of one row in float64, by plain Python loops."""
    x = [value / temperature for value in logits.double().tolist()]
    top = max(x)
    if top == -INF:
        return -INF, 0.0
    total = math.fsum(math.exp(value - top) for value in x)
    log_p = [value - top - math.log(total) for value in x]
    entropy = -math.fsum(math.exp(value) * value for value in log_p if value > -INF)
    return log_p[index], entropy


def oracle_rows(logits, index, temperature=1.0):
    rows = [oracle(row, int(i), temperature) for row, i in zip(logits, index, strict=True)]
    log_probs, entropy = zip(*rows, strict=True)
    return torch.tensor(log_probs, dtype=torch.float64), torch.tensor(entropy, dtype=torch.float64)


def naive(logits, index):
    """What autograd makes of the textbook formulas."""
    log_p = torch.log_softmax(logits, -1)
    chosen = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def gradient(function, logits, g, h):
    leaf = logits.detach().clone().requires_grad_()
    log_probs, entropy = function(leaf)
    return torch.autograd.grad([log_probs, entropy], leaf, [g, h])[0]


def case(rows, width, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, width, generator=generator, dtype=torch.float64)).to(dtype)
    index = torch.randint(width, (rows,), generator=generator)
    up = torch.float64 if dtype is torch.float64 else torch.float32
    g, h = torch.randn(2, rows, generator=generator, dtype=torch.float64).to(up)
    return logits, index, g, h


# Numbers by hand


def test_two_outcomes_of_a_quarter_and_three_quarters(path):
    logits = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
    log_probs, entropy = log_probs_from_logits(logits, torch.tensor([0]), with_entropy=True)
    torch.testing.assert_close(log_probs, torch.tensor([math.log(0.25)]))
    by_hand = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    torch.testing.assert_close(entropy, torch.tensor([by_hand]))
    (by_log_prob,) = torch.autograd.grad(log_probs, logits, retain_graph=True)
    torch.testing.assert_close(by_log_prob, torch.tensor([[0.75, -0.75]]))
    # d H / d x_j = -p_j (log p_j + H)
    (by_entropy,) = torch.autograd.grad(entropy, logits)
    expected = [[-0.25 * (math.log(0.25) + by_hand), -0.75 * (math.log(0.75) + by_hand)]]
    torch.testing.assert_close(by_entropy, torch.tensor(expected))


def test_one_outcome_is_certain(path):
    logits = torch.tensor([[3.0], [-1e30]], requires_grad=True)
    log_probs, entropy = log_probs_from_logits(logits, torch.zeros(2).long(), with_entropy=True)
    assert log_probs.tolist() == [0.0, 0.0] and entropy.tolist() == [0.0, 0.0]
    (grad,) = torch.autograd.grad((log_probs + entropy).sum(), logits)
    assert grad.tolist() == [[0.0], [0.0]]


# Against the oracle


SIZES = [(r, v) for r in (1, 3) for v in (1, 2, 7, 1000, 1025)] + [(130, 1), (130, 7)]


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_matches_float64_loops(path, rows, width):
    logits, index, _, _ = case(rows, width)
    log_probs, entropy = log_probs_from_logits(logits, index, with_entropy=True)
    assert log_probs.dtype == entropy.dtype == torch.float32
    expected, expected_entropy = oracle_rows(logits, index)
    torch.testing.assert_close(log_probs.double(), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=2e-6, atol=1e-6)
    alone = log_probs_from_logits(logits, index)
    torch.testing.assert_close(alone, log_probs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_gradient_matches_float64_autograd(path, rows, width):
    logits, index, g, h = case(rows, width)
    expected = gradient(lambda x: naive(x, index), logits.double(), g.double(), h.double())
    ours = gradient(lambda x: log_probs_from_logits(x, index, with_entropy=True), logits, g, h)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [2, 9])
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor(1.8, dtype=torch.float64)])
def test_gradcheck(path, width, temperature):
    logits, index, _, _ = case(5, width, dtype=torch.float64)
    logits.requires_grad_()
    mask = torch.tensor([True, False, True, True, True])

    def op(x):
        return log_probs_from_logits(
            x, index, temperature=temperature, mask=mask, with_entropy=True
        )

    torch.autograd.gradcheck(op, logits)
    torch.autograd.gradcheck(lambda x: op(x)[0], logits)
    torch.autograd.gradcheck(lambda x: op(x)[1], logits)
    torch.autograd.gradcheck(lambda x: log_probs_from_logits(x, index), logits)


def trl(logits, index):
    """`selective_log_softmax` as TRL writes it for float32: gather, then logsumexp row by row."""
    chosen = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, -1) for row in logits])


def verl(logits, index):
    """verl's `logprobs_from_logits_v2`: the whole logsumexp at once."""
    chosen = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(logits, -1)


def cross_entropy(logits, index):
    return -F.cross_entropy(logits, index, reduction="none")


@pytest.mark.parametrize("peer", [trl, verl, cross_entropy])
def test_agrees_with_the_formulas_of_peers(path, peer):
    logits, index, g, _ = case(9, 50)
    logits.requires_grad_()
    ours, theirs = log_probs_from_logits(logits, index), peer(logits, index)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    grads = [torch.autograd.grad(out, logits, g)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=2e-6)


# Identities


def test_probabilities_of_all_indices_sum_to_one(path):
    logits, _, _, _ = case(1, 7)
    each = log_probs_from_logits(logits.expand(7, 7), torch.arange(7))
    assert each.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(6, 6), (130, 6), (6, 300)])
def test_an_offset_of_5000_changes_nothing(path, rows, width):
    # Multiples of 1/256 so that adding 5000 is exact in float32.
    logits, index, g, h = case(rows, width)
    logits = (logits * 256).round() / 256

    def op(x):
        return log_probs_from_logits(x, index, with_entropy=True)

    for offset in (5000.0, -5000.0):
        for ours, theirs in zip(op(logits), op(logits + offset), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            gradient(op, logits, g, h), gradient(op, logits + offset, g, h), rtol=1e-6, atol=1e-6
        )


def test_entropy_of_equal_logits_is_log_of_their_number(path):
    for value in (0.0, -1e4, 1e4):
        logits = torch.full((3, 1000), value)
        index = torch.tensor([0, 500, 999])
        log_probs, entropy = log_probs_from_logits(logits, index, with_entropy=True)
        torch.testing.assert_close(entropy, torch.full((3,), math.log(1000)))
        torch.testing.assert_close(log_probs, torch.full((3,), -math.log(1000)))


def test_gradient_of_a_row_sums_to_zero(path):
    logits, index, g, h = case(5, 33)
    grad = gradient(lambda x: log_probs_from_logits(x, index, with_entropy=True), logits, g, h)
    assert grad.sum(-1).abs().max() < 1e-5


def test_log_probs_are_never_positive_and_entropy_never_negative(path):
    torch.manual_seed(1)
    for scale in (1e-3, 1.0, 30.0, 1e4, 1e30):
        logits = torch.randn(64, 9) * scale
        index = logits.argmax(-1)
        log_probs, entropy = log_probs_from_logits(logits, index, with_entropy=True)
        assert (log_probs <= 0).all() and (entropy >= 0).all()


def test_entropy_of_a_peaked_row_keeps_its_digits(path):
    logits = torch.tensor([[0.0, -20.0, -20.0]])
    _, entropy = log_probs_from_logits(logits, torch.tensor([0]), with_entropy=True)
    expected = oracle(logits[0], 0)[1]
    assert entropy.item() == pytest.approx(expected, rel=0.1)


# Extreme and impossible logits


def test_minus_infinity_is_probability_zero(path):
    logits, index, g, h = case(6, 40)
    logits[:, :10] = -INF
    index = index.clamp(min=10)
    log_probs, entropy = log_probs_from_logits(logits, index, with_entropy=True)
    without = log_probs_from_logits(logits[:, 10:], index - 10, with_entropy=True)
    torch.testing.assert_close((log_probs, entropy), without)
    grad = gradient(lambda x: log_probs_from_logits(x, index, with_entropy=True), logits, g, h)
    assert (grad[:, :10] == 0).all()
    torch.testing.assert_close(
        grad[:, 10:],
        gradient(
            lambda x: log_probs_from_logits(x, index - 10, with_entropy=True), logits[:, 10:], g, h
        ),
    )


def test_an_impossible_index_has_log_prob_minus_infinity_and_no_gradient(path):
    logits = torch.tensor([[-INF, 1.0, 2.0], [0.0, 1.0, 2.0]])
    index = torch.zeros(2).long()
    leaf = logits.clone().requires_grad_()
    log_probs, entropy = log_probs_from_logits(leaf, index, with_entropy=True)
    assert log_probs[0] == -INF and torch.isfinite(log_probs[1])
    (grad,) = torch.autograd.grad(log_probs.sum(), leaf, retain_graph=True)
    assert (grad[0] == 0).all() and (grad[1] != 0).all()
    (grad,) = torch.autograd.grad(entropy.sum(), leaf)
    assert grad[0, 0] == 0 and (grad[0, 1:] != 0).all()


def test_a_row_all_minus_infinity_is_never_nan(path):
    logits, index, g, h = case(4, 5)
    logits[2] = -INF
    log_probs, entropy = log_probs_from_logits(logits, index, with_entropy=True)
    assert log_probs[2] == -INF and entropy[2] == 0
    assert torch.isfinite(log_probs[[0, 1, 3]]).all()
    grad = gradient(lambda x: log_probs_from_logits(x, index, with_entropy=True), logits, g, h)
    assert (grad[2] == 0).all() and torch.isfinite(grad).all() and (grad[3] != 0).any()


def test_one_logit_of_ten_thousand_takes_all(path):
    logits = torch.zeros(2, 50)
    logits[:, 7] = 1e4
    leaf = logits.requires_grad_()
    log_probs, entropy = log_probs_from_logits(leaf, torch.tensor([7, 8]), with_entropy=True)
    assert log_probs.tolist() == [0.0, -1e4] and entropy.tolist() == [0.0, 0.0]
    (grad,) = torch.autograd.grad((log_probs + entropy).sum(), leaf)
    expected = torch.zeros(2, 50)
    expected[1, 7], expected[1, 8] = -1.0, 1.0
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("poison", [math.nan, INF])
def test_nan_and_plus_infinity_spoil_their_own_row_only(path, poison):
    logits, index, g, h = case(5, 8)
    clean = log_probs_from_logits(logits, index, with_entropy=True)
    clean_grad = gradient(
        lambda x: log_probs_from_logits(x, index, with_entropy=True), logits, g, h
    )
    logits[3, 2] = poison
    outputs = log_probs_from_logits(logits, index, with_entropy=True)
    grad = gradient(lambda x: log_probs_from_logits(x, index, with_entropy=True), logits, g, h)
    others = torch.arange(5) != 3
    for output, expected in zip((*outputs, grad), (*clean, clean_grad), strict=True):
        torch.testing.assert_close(output[others], expected[others])
        assert output[3].isnan().all()


def test_a_row_without_upstream_gradient_gets_zero_even_if_it_is_nan(path):
    logits, index, g, h = case(5, 8)
    logits[3, 2] = math.nan
    g[3] = h[3] = g[1] = 0.0
    grad = gradient(lambda x: log_probs_from_logits(x, index, with_entropy=True), logits, g, h)
    assert (grad[3] == 0).all() and torch.isfinite(grad).all() and (grad[1] != 0).all()


# Masks


@pytest.mark.parametrize("width", [3, 200])
def test_masked_rows_are_zero_whatever_they_hold(path, width):
    logits, index, g, h = case(7, width)
    mask = torch.tensor([True, False, False, True, True, False, True])
    expected = log_probs_from_logits(logits[mask], index[mask], with_entropy=True)
    expected_grad = gradient(
        lambda x: log_probs_from_logits(x, index[mask], with_entropy=True),
        logits[mask],
        g[mask],
        h[mask],
    )
    for poison in (math.nan, INF, -INF):
        logits[~mask] = poison
        index[~mask] = -100
        leaf = logits.clone().requires_grad_()
        outputs = log_probs_from_logits(leaf, index, mask=mask, with_entropy=True)
        (grad,) = torch.autograd.grad(outputs, leaf, [g, h])
        for output, want in zip((*outputs, grad), (*expected, expected_grad), strict=True):
            torch.testing.assert_close(output[mask], want)
            assert (output[~mask] == 0).all()


def test_all_rows_masked(path):
    logits = torch.full((5, 6), math.nan, requires_grad=True)
    mask = torch.zeros(5, dtype=torch.bool)
    log_probs = log_probs_from_logits(logits, torch.full((5,), 99), mask=mask)
    assert (log_probs == 0).all()
    assert (torch.autograd.grad(log_probs.sum(), logits)[0] == 0).all()


# Temperature


@pytest.mark.parametrize("width", [5, 300])
def test_temperature_divides_the_logits(path, width):
    logits, index, _, _ = case(4, width)
    for temperature in (0.5, 3.0):
        ours = log_probs_from_logits(logits, index, temperature=temperature, with_entropy=True)
        for got, want in zip(ours, oracle_rows(logits, index, temperature), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)
        tensor = torch.tensor(temperature)
        same = log_probs_from_logits(logits, index, temperature=tensor, with_entropy=True)
        torch.testing.assert_close(ours, same, rtol=0, atol=0)


def test_temperature_keeps_precision_under_an_offset(path):
    logits, index, _, _ = case(6, 300)
    logits = (logits * 256).round() / 256
    plain, moved = (
        log_probs_from_logits(x, index, temperature=0.7, with_entropy=True)
        for x in (logits, logits + 5000)
    )
    torch.testing.assert_close(plain, moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, INF, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=r"log_probs_from_logits: temperature is .*positive"):
        log_probs_from_logits(torch.randn(2, 3), torch.tensor([0, 1]), temperature=temperature)


def test_temperature_is_not_differentiated():
    with pytest.raises(ValueError, match=r"temperature\.detach"):
        log_probs_from_logits(
            torch.randn(2, 3),
            torch.tensor([0, 1]),
            temperature=torch.tensor(1.0, requires_grad=True),
        )


# Shapes, strides, dtypes


def layouts():
    """Strided views, [..., 12]."""
    torch.manual_seed(0)
    base = torch.randn(4, 7, 12)
    yield "contiguous", base
    yield "one row", torch.randn(12)
    yield "next-token slice", base[:, :-1]
    yield "time first", base.transpose(0, 1)
    yield "padded rows", torch.randn(4, 7, 20)[..., 3:15]
    yield "every other column", torch.randn(5, 24)[:, ::2]
    yield "feature major", torch.randn(12, 9).t()
    yield "expanded", torch.randn(1, 12).expand(6, 12)
    yield "short odd inner dimensions", torch.randn(9, 2, 2, 3, 12).permute(0, 3, 2, 1, 4)[:, 1:]
    yield "expanded in the middle", torch.randn(5, 1, 12).expand(5, 3, 12)


@pytest.mark.parametrize(("name", "logits"), list(layouts()), ids=lambda value: str(value)[:20])
def test_any_strides(path, name, logits):
    torch.manual_seed(0)
    index = torch.randint(12, logits.shape[:-1])
    g, h = torch.randn(2, *index.shape)
    mask = torch.rand(index.shape) < 0.8
    plain = logits.clone(memory_format=torch.contiguous_format).requires_grad_()
    strided = logits.detach().requires_grad_()
    results = []
    for x in (plain, strided):
        if x is strided and index.dim() > 1:
            index, mask, g, h = (
                t.transpose(0, 1).contiguous().transpose(0, 1) for t in (index, mask, g, h)
            )
        outputs = log_probs_from_logits(x, index, mask=mask, with_entropy=True)
        assert all(output.shape == index.shape for output in outputs)
        (grad,) = torch.autograd.grad(outputs, x, [g, h])
        results.append((*outputs, grad))
    torch.testing.assert_close(*results)
    want = naive(plain.double(), index)
    torch.testing.assert_close(results[1][0].double(), want[0] * mask, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 3, 1)])
def test_empty_input_gives_empty_output(path, shape):
    logits = torch.randn(shape, requires_grad=True)
    index = torch.zeros(shape[:-1], dtype=torch.int64)
    log_probs, entropy = log_probs_from_logits(logits, index, with_entropy=True)
    assert log_probs.shape == entropy.shape == shape[:-1]
    assert torch.autograd.grad((log_probs + entropy).sum(), logits)[0].shape == shape


def test_int32_index_and_float64_logits(path):
    logits, index, _, _ = case(6, 9, dtype=torch.float64)
    ours = log_probs_from_logits(logits, index.int(), with_entropy=True)
    for got, want in zip(ours, oracle_rows(logits, index), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 1025])
def test_low_precision_errs_at_most_twice_as_much_as_eager(path, dtype, width):
    logits, index, g, h = case(16, width, dtype=dtype)
    truth = naive(logits.double(), index)
    true_grad = gradient(lambda x: naive(x, index), logits.double(), g.double(), h.double())
    ours = log_probs_from_logits(logits, index, with_entropy=True)
    eager = naive(logits, index)
    grad = gradient(lambda x: log_probs_from_logits(x, index, with_entropy=True), logits, g, h)
    eager_grad = gradient(lambda x: naive(x, index), logits, g.to(dtype), h.to(dtype))
    assert grad.dtype is dtype and ours[0].dtype is torch.float32
    for got, low, true in zip(
        (*ours, grad), (*eager, eager_grad), (*truth, true_grad), strict=True
    ):
        error, allowed = (got - true).abs().max(), (low - true).abs().max()
        assert error <= 2 * allowed + 1e-6


# Autograd


def test_editing_an_output_in_place_does_not_corrupt_the_gradient(path):
    logits, index, g, h = case(5, 6)
    logits.requires_grad_()
    outputs = log_probs_from_logits(logits, index, with_entropy=True)
    (before,) = torch.autograd.grad(outputs, logits, [g, h], retain_graph=True)
    with torch.no_grad():
        for output in outputs:
            output.fill_(123.0)
    (after,) = torch.autograd.grad(outputs, logits, [g, h])
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_backward_runs_twice_and_leaves_upstream_gradients_alone(path):
    logits, index, g, h = case(5, 6)
    kept = g.clone(), h.clone()
    logits.requires_grad_()
    for outputs, up in (
        (log_probs_from_logits(logits, index, with_entropy=True), [g, h]),
        ((log_probs_from_logits(logits, index, temperature=2.0),), [g]),
    ):
        first = torch.autograd.grad(outputs, logits, up, retain_graph=True)
        torch.testing.assert_close(first, torch.autograd.grad(outputs, logits, up), rtol=0, atol=0)
    torch.testing.assert_close(kept, (g, h), rtol=0, atol=0)


def test_each_output_alone_has_a_gradient(path):
    logits, index, g, h = case(5, 6)
    logits.requires_grad_()
    log_probs, entropy = log_probs_from_logits(logits, index, with_entropy=True)
    (both,) = torch.autograd.grad([log_probs, entropy], logits, [g, h], retain_graph=True)
    (one,) = torch.autograd.grad(log_probs, logits, g, retain_graph=True)
    (other,) = torch.autograd.grad(entropy, logits, h)
    torch.testing.assert_close(both, one + other)


def test_no_graph_is_built_without_need():
    logits, index, _, _ = case(3, 4)
    assert not log_probs_from_logits(logits, index).requires_grad
    with torch.no_grad():
        assert not log_probs_from_logits(logits.requires_grad_(), index).requires_grad


def test_double_backward_is_refused(path):
    logits, index, _, _ = case(3, 4)
    logits.requires_grad_()
    log_probs = log_probs_from_logits(logits, index)
    with pytest.raises(NotImplementedError, match=r"log_probs_from_logits: .*create_graph"):
        torch.autograd.grad(log_probs.sum(), logits, create_graph=True)


def test_function_transforms_are_refused():
    logits, index, _, _ = case(3, 4)
    with pytest.raises(NotImplementedError, match=r"log_probs_from_logits: torch\.func"):
        torch.func.vmap(log_probs_from_logits)(logits, index)
    with pytest.raises(NotImplementedError, match=r"log_probs_from_logits: torch\.func"):
        torch.func.grad(lambda x: log_probs_from_logits(x, index).sum())(logits)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_compiles_to_one_graph(with_entropy):
    mask = torch.tensor([True, True, False, True, True])

    def op(x, index, temperature):
        outputs = log_probs_from_logits(
            x, index, temperature=temperature, mask=mask, with_entropy=with_entropy
        )
        return outputs if with_entropy else (outputs,)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    # The second width makes the compiler treat it as dynamic.
    for temperature, width in ((1.0, 6), (1.0, 9), (torch.tensor(0.7), 6)):
        logits, index, g, h = case(5, width)
        results = []
        for function in (op, compiled):
            leaf = logits.clone().requires_grad_()
            outputs = function(leaf, index, temperature)
            (grad,) = torch.autograd.grad(outputs, leaf, [g, h][: len(outputs)])
            results.append((*outputs, grad))
        torch.testing.assert_close(*results)


class _Allocations(TorchDispatchMode):
    """Count the tensors of at least `size` elements whose memory is new."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found, self.known = size, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                large = storage.nbytes() >= self.size * tensor.element_size()
                if large and storage.data_ptr() not in self.known:
                    self.found.append((str(func), tensor))  # held: an address must not come back
                    self.known.add(storage.data_ptr())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_only_vocabulary_sized_allocation(dtype):
    logits = torch.randn(64, 40000).to(dtype)
    leaf = logits[:, 1:].requires_grad_()
    index = torch.randint(39999, (64,))
    with _Allocations(leaf.numel()) as allocations:
        allocations.known.add(logits.untyped_storage().data_ptr())
        outputs = log_probs_from_logits(leaf, index, temperature=0.9, with_entropy=True)
        assert allocations.found == []
        sum(output.sum() for output in outputs).backward()
    assert [name for name, _ in allocations.found] == ["aten.empty.memory_format"]


# The gradient over the logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_inplace_backward_gives_the_gradient_in_the_logits_memory(path, dtype, with_entropy):
    values, index, g, h = case(6, 40, dtype=dtype)
    leaf = values.requires_grad_()
    grads = []
    for inplace in (False, True):
        logits = leaf * 1
        outputs = log_probs_from_logits(
            logits, index, temperature=0.7, with_entropy=with_entropy, inplace_backward=inplace
        )
        outputs = outputs if with_entropy else (outputs,)
        (grad,) = torch.autograd.grad(outputs, logits, [g, h][: len(outputs)])
        grads.append(grad)
    assert grads[1].data_ptr() == logits.data_ptr()
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_allocates_nothing_vocabulary_sized(dtype):
    leaf = torch.randn(64, 40000).to(dtype).requires_grad_()
    logits = leaf * 1
    index = torch.randint(40000, (64,))
    with _Allocations(leaf.numel()) as allocations:
        allocations.known.add(logits.untyped_storage().data_ptr())
        outputs = log_probs_from_logits(logits, index, with_entropy=True, inplace_backward=True)
        torch.autograd.grad(sum(output.sum() for output in outputs), logits)
    assert [name for name, _ in allocations.found] == []


def test_inplace_backward_refuses_logits_edited_since(path):
    leaf, index, _, _ = case(5, 6)
    logits = leaf.requires_grad_() * 1
    log_probs = log_probs_from_logits(logits, index, inplace_backward=True)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match=r"log_probs_from_logits: .*edited since the forward"):
        log_probs.sum().backward()


def test_inplace_backward_refuses_leaves_and_copies():
    leaf, index, _, _ = case(6, 6)
    leaf.requires_grad_()
    own = leaf * 1
    for logits in (leaf, leaf[:4], leaf.view(2, 3, 6)):
        shaped = index[: logits[..., 0].numel()].view(logits.shape[:-1])
        with pytest.raises(ValueError, match="inplace_backward, but logits are a leaf"):
            log_probs_from_logits(logits, shaped, inplace_backward=True)
    for logits in (own.t(), own[:1].expand(6, 6)):
        with pytest.raises(ValueError, match=r"inplace_backward, but logits .* not rows"):
            log_probs_from_logits(logits, index, inplace_backward=True)


# Errors


@pytest.mark.parametrize("bad", [4, -1, 10**12])
def test_index_out_of_range_is_named(path, bad):
    logits = torch.randn(3, 4)
    with pytest.raises(IndexError, match=rf"log_probs_from_logits: index .*{bad}.* 0 to 3"):
        log_probs_from_logits(logits, torch.tensor([0, bad, 1]))


@pytest.mark.parametrize(
    ("logits", "index", "mask", "message"),
    [
        (torch.randn(3, 4), torch.zeros(4).long(), None, r"index is \[4\], logits \[3, 4\]"),
        (torch.randn(3, 4), torch.zeros(3), None, "index is torch.float32; expected int64"),
        (torch.randn(3, 0), torch.zeros(3).long(), None, "V at least 1"),
        (torch.tensor(1.0), torch.tensor(0), None, "V at least 1"),
        (torch.ones(3, 4).long(), torch.zeros(3).long(), None, "floating-point"),
        (torch.randn(3, 4), torch.zeros(3).long(), torch.ones(3), "mask is .*torch.bool"),
        (torch.randn(3, 4), torch.zeros(3).long(), torch.ones(2).bool(), r"mask is \[2\]"),
    ],
)
def test_bad_input_is_explained(logits, index, mask, message):
    with pytest.raises(ValueError, match=f"log_probs_from_logits: .*{message}"):
        log_probs_from_logits(logits, index, mask=mask)
