import math
from decimal import Decimal

import pytest
import torch

from ppo_fast.functional import _rows
from ppo_fast.functional.kl import approx_kl, kl_from_logits

INF = math.inf
DIRECTIONS = ["forward", "reverse"]


@pytest.fixture(params=["one block", "many blocks"])
def path(request, monkeypatch):
    """Run the test with all rows in one block, and in blocks of two rows."""
    if request.param == "many blocks":
        monkeypatch.setattr(_rows, "rows_per_block", lambda logits: 2)
    return request.param


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


def log_softmax(row):
    top = max(row)
    total = math.fsum(math.exp(value - top) for value in row)
    return [value - top - math.log(total) for value in row]


def oracle(logits, ref_logits, direction):
    """KL of each row by plain Python loops in float64, with the conventions 0 log 0 = 0 and inf."""
    first, second = (logits, ref_logits) if direction == "forward" else (ref_logits, logits)
    results = []
    for row, ref in zip(first.double().tolist(), second.double().tolist(), strict=True):
        if max(row) == -INF:
            results.append(0.0)
            continue
        log_p = log_softmax(row)
        log_q = log_softmax(ref) if max(ref) > -INF else ref
        pairs = zip(log_p, log_q, strict=True)
        results.append(math.fsum(math.exp(p) * (p - q) for p, q in pairs if p > -INF))
    return torch.tensor(results, dtype=torch.float64)


def naive(logits, ref_logits, direction):
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    p, q = (p, q) if direction == "forward" else (q, p)
    return (p.exp() * (p - q)).sum(-1)


def case(rows, width, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits, ref = 2 * torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    g = torch.randn(rows, generator=generator, dtype=torch.float64)
    up = torch.float64 if dtype is torch.float64 else torch.float32
    return logits.to(dtype), ref.to(dtype), g.to(up)


def gradient(logits, ref_logits, g, **options):
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(kl_from_logits(leaf, ref_logits, **options), leaf, g)[0]


# Numbers by hand


def test_half_and_half_against_a_quarter_and_three_quarters(path):
    half = torch.zeros(1, 2)
    quarter = torch.tensor([[0.0, math.log(3.0)]])
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_from_logits(half, quarter).item() == pytest.approx(forward, rel=1e-6)
    ours = kl_from_logits(half, quarter, direction="reverse")
    assert ours.item() == pytest.approx(reverse, rel=1e-6)
    # forward: p_j (log p_j - log q_j - KL); reverse: p_j - q_j
    terms = [0.5 * (math.log(2) - forward), 0.5 * (math.log(2 / 3) - forward)]
    torch.testing.assert_close(gradient(half, quarter, torch.ones(1)), torch.tensor([terms]))
    grad = gradient(half, quarter, torch.ones(1), direction="reverse")
    torch.testing.assert_close(grad, torch.tensor([[0.25, -0.25]]))


# Against the oracle


@pytest.mark.parametrize("width", [1, 2, 7, 1000, 1025])
def test_matches_float64_loops(path, direction, width):
    logits, ref, _ = case(5, width)
    ours = kl_from_logits(logits, ref, direction=direction)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours.double(), oracle(logits, ref, direction), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 7, 1000, 1025])
def test_gradient_matches_float64_autograd(path, direction, width):
    logits, ref, g = case(5, width)
    leaf = logits.double().requires_grad_()
    (expected,) = torch.autograd.grad(naive(leaf, ref.double(), direction), leaf, g.double())
    ours = gradient(logits, ref, g, direction=direction)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [2, 9])
def test_gradcheck(path, direction, width):
    logits, ref, _ = case(5, width, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, True])
    for keep in (None, mask):
        torch.autograd.gradcheck(
            lambda x, keep=keep: kl_from_logits(x, ref, direction=direction, mask=keep),
            logits.requires_grad_(),
        )


# Identities


def test_divergence_from_itself_is_exactly_zero(path, direction):
    logits, _, g = case(5, 300)
    assert (kl_from_logits(logits, logits.clone(), direction=direction) == 0).all()
    assert gradient(logits, logits.clone(), g, direction=direction).abs().max() < 1e-7


def test_swapping_arguments_is_swapping_directions(path):
    logits, ref, _ = case(5, 30)
    forward, swapped = kl_from_logits(logits, ref), kl_from_logits(ref, logits, direction="reverse")
    torch.testing.assert_close(forward, swapped, rtol=0, atol=0)
    assert (forward != kl_from_logits(logits, ref, direction="reverse")).all()


def test_offsets_of_either_argument_change_nothing(path, direction):
    logits, ref, g = ((x * 256).round() / 256 for x in case(5, 30))
    plain = kl_from_logits(logits, ref, direction=direction)
    grad = gradient(logits, ref, g, direction=direction)
    for a, b in ((5000.0, 0.0), (0.0, -5000.0), (5000.0, 5000.0)):
        moved = kl_from_logits(logits + a, ref + b, direction=direction)
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            gradient(logits + a, ref + b, g, direction=direction), grad, rtol=1e-6, atol=1e-7
        )


def test_never_negative(path, direction):
    logits, _, _ = case(200, 50)
    for distance in (1e-6, 1e-4, 1e-2):
        near = logits + distance * torch.randn_like(logits)
        assert (kl_from_logits(logits, near, direction=direction) >= 0).all()


def test_forward_to_uniform_is_log_of_the_number_less_entropy(path):
    logits, _, _ = case(5, 30)
    p = torch.softmax(logits, -1)
    entropy = -(p * p.log()).sum(-1)
    ours = kl_from_logits(logits, torch.zeros_like(logits))
    torch.testing.assert_close(ours, math.log(30) - entropy)


# Impossible outcomes


def test_an_outcome_impossible_in_the_first_argument_is_no_term(path):
    logits, ref, g = case(5, 12)
    for both in (False, True):
        p, q = logits.clone(), ref.clone()
        p[:, :4] = -INF
        if both:
            q[:, :4] = -INF
        torch.testing.assert_close(
            kl_from_logits(p, q).double(), oracle(p, q, "forward"), rtol=1e-5, atol=1e-6
        )
        grad = gradient(p, q, g)
        assert (grad[:, :4] == 0).all() and torch.isfinite(grad).all() and (grad != 0).any()
        swapped = kl_from_logits(q, p, direction="reverse")
        torch.testing.assert_close(swapped, kl_from_logits(p, q))
        assert torch.isfinite(gradient(q, p, g, direction="reverse")).all()


def test_first_columns_impossible_in_both_equal_the_rest_alone(path, direction):
    logits, ref, g = case(5, 40)
    logits[:, :20] = ref[:, :20] = -INF
    ours = kl_from_logits(logits, ref, direction=direction)
    torch.testing.assert_close(
        ours, kl_from_logits(logits[:, 20:], ref[:, 20:], direction=direction)
    )
    grad = gradient(logits, ref, g, direction=direction)
    assert (grad[:, :20] == 0).all()
    torch.testing.assert_close(
        grad[:, 20:], gradient(logits[:, 20:], ref[:, 20:], g, direction=direction)
    )


def test_impossible_only_in_the_second_argument_is_infinite_without_gradient(path, direction):
    logits, ref, g = case(5, 12)
    (ref if direction == "forward" else logits)[1, 3] = -INF
    ours = kl_from_logits(logits, ref, direction=direction)
    assert ours[1] == INF and torch.isfinite(ours[[0, 2, 3, 4]]).all()
    grad = gradient(logits, ref, g, direction=direction)
    assert (grad[1] == 0).all() and torch.isfinite(grad).all() and (grad[2] != 0).all()


@pytest.mark.parametrize("which", ["logits", "ref", "both"])
def test_rows_all_minus_infinity_are_never_nan(path, direction, which):
    logits, ref, g = case(5, 12)
    if which != "ref":
        logits[2] = -INF
    if which != "logits":
        ref[2] = -INF
    ours = kl_from_logits(logits, ref, direction=direction)
    assert ours[2] == oracle(logits, ref, direction)[2]
    grad = gradient(logits, ref, g, direction=direction)
    assert (grad[2] == 0).all() and torch.isfinite(grad).all()


def test_very_low_finite_logits_are_not_impossible(path):
    logits, ref, g = case(3, 6)
    ref[1, 2] = -1e30
    ours, grad = kl_from_logits(logits, ref), gradient(logits, ref, g)
    p = torch.softmax(logits[1], -1)
    assert ours[1].item() == pytest.approx(1e30 * p[2].item(), rel=1e-5)
    assert torch.isfinite(grad).all() and grad[1, 2] != 0


def test_extreme_logits(path, direction):
    flat, spike = torch.full((2, 50), -1e4), torch.zeros(2, 50)
    spike[:, 7] = 1e4
    assert (kl_from_logits(flat, torch.zeros(2, 50), direction=direction) == 0).all()
    ours = kl_from_logits(spike, torch.zeros(2, 50), direction=direction)
    torch.testing.assert_close(ours.double(), oracle(spike, torch.zeros(2, 50), direction))
    assert torch.isfinite(gradient(spike, flat, torch.ones(2), direction=direction)).all()


@pytest.mark.parametrize("poison", [math.nan, INF])
@pytest.mark.parametrize("which", ["logits", "ref"])
def test_nan_and_plus_infinity_spoil_their_own_row_only(path, direction, which, poison):
    logits, ref, g = case(5, 12)
    clean = kl_from_logits(logits, ref, direction=direction)
    clean_grad = gradient(logits, ref, g, direction=direction)
    (logits if which == "logits" else ref)[3, 4] = poison
    ours = kl_from_logits(logits, ref, direction=direction)
    grad = gradient(logits, ref, g, direction=direction)
    others = torch.arange(5) != 3
    torch.testing.assert_close(ours[others], clean[others])
    torch.testing.assert_close(grad[others], clean_grad[others])
    assert ours[3].isnan() and grad[3].isnan().all()
    g[3] = 0
    assert (gradient(logits, ref, g, direction=direction)[3] == 0).all()


# Masks, shapes, dtypes


def test_masked_rows_are_zero_whatever_they_hold(path, direction):
    logits, ref, g = case(7, 12)
    mask = torch.tensor([True, False, False, True, True, False, True])
    expected = kl_from_logits(logits[mask], ref[mask], direction=direction)
    expected_grad = gradient(logits[mask], ref[mask], g[mask], direction=direction)
    for poison in (math.nan, -INF):
        logits[~mask] = ref[~mask] = poison
        ours = kl_from_logits(logits, ref, direction=direction, mask=mask)
        grad = gradient(logits, ref, g, direction=direction, mask=mask)
        torch.testing.assert_close(ours[mask], expected)
        torch.testing.assert_close(grad[mask], expected_grad)
        assert (ours[~mask] == 0).all() and (grad[~mask] == 0).all()
    nothing = torch.zeros(7, dtype=torch.bool)
    assert (kl_from_logits(logits, ref, direction=direction, mask=nothing) == 0).all()
    assert (gradient(logits, ref, g, direction=direction, mask=nothing) == 0).all()


def test_a_mask_may_be_strided(path, direction):
    logits, ref = torch.randn(2, 3, 4, 12)
    mask = (torch.rand(4, 3) < 0.5).t()
    ours = kl_from_logits(logits, ref, direction=direction, mask=mask)
    torch.testing.assert_close(ours, kl_from_logits(logits, ref, direction=direction) * mask)


@pytest.mark.parametrize(
    ("logits", "ref"),
    [
        (torch.randn(4, 7, 12)[:, :-1], torch.randn(4, 6, 12)),
        (torch.randn(4, 6, 12), torch.randn(4, 7, 12)[:, 1:]),
        (torch.randn(6, 4, 12).transpose(0, 1), torch.randn(4, 6, 24)[..., ::2]),
        (torch.randn(12), torch.randn(12)),
        (torch.randn(9, 2, 3, 12).transpose(1, 2), torch.randn(9, 3, 2, 12)),
        (torch.randn(5, 12), torch.randn(12).expand(5, 12)),
    ],
)
def test_any_strides(path, direction, logits, ref):
    g = torch.randn(logits.shape[:-1])
    ours = kl_from_logits(logits, ref, direction=direction)
    flat = kl_from_logits(
        logits.reshape(-1, 12).clone(), ref.reshape(-1, 12).clone(), direction=direction
    )
    torch.testing.assert_close(ours, flat.view(ours.shape))
    grad = gradient(logits.clone(memory_format=torch.contiguous_format), ref, g)
    leaf = logits.detach().requires_grad_()
    (strided,) = torch.autograd.grad(kl_from_logits(leaf, ref), leaf, g)
    torch.testing.assert_close(grad, strided)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_empty_input_gives_empty_output(path, direction, shape):
    logits = torch.randn(shape, requires_grad=True)
    ours = kl_from_logits(logits, torch.randn(shape), direction=direction)
    assert ours.shape == shape[:-1]
    assert torch.autograd.grad(ours.sum(), logits)[0].shape == shape


@pytest.mark.parametrize("width", [7, 1025])
def test_bfloat16_errs_at_most_twice_as_much_as_eager(path, direction, width):
    logits, ref, g = case(9, width, dtype=torch.bfloat16)
    leaf = logits.double().requires_grad_()
    truth = naive(leaf, ref.double(), direction)
    (true_grad,) = torch.autograd.grad(truth, leaf, g.double())
    low = logits.clone().requires_grad_()
    eager = naive(low, ref, direction)
    (eager_grad,) = torch.autograd.grad(eager, low, g.bfloat16())
    ours, grad = (
        kl_from_logits(logits, ref, direction=direction),
        gradient(logits, ref, g, direction=direction),
    )
    assert grad.dtype is torch.bfloat16 and ours.dtype is torch.float32
    for got, rough, true in ((ours, eager, truth), (grad, eager_grad, true_grad)):
        assert (got - true).abs().max() <= 2 * (rough - true).abs().max() + 1e-6


def test_dtypes_may_differ(path, direction):
    logits, ref, g = case(5, 40)
    mixed = kl_from_logits(logits, ref.bfloat16(), direction=direction)
    torch.testing.assert_close(
        mixed, kl_from_logits(logits, ref.bfloat16().float(), direction=direction)
    )
    double = kl_from_logits(logits, ref.double(), direction=direction)
    assert double.dtype is torch.float64
    assert gradient(logits, ref.double(), g.double(), direction=direction).dtype is torch.float32


# Autograd


def test_editing_the_output_does_not_corrupt_the_gradient(path, direction):
    logits, ref, g = case(5, 12)
    leaf = logits.requires_grad_()
    ours = kl_from_logits(leaf, ref, direction=direction)
    (before,) = torch.autograd.grad(ours, leaf, g, retain_graph=True)
    with torch.no_grad():
        ours.fill_(123.0)
    (again,) = torch.autograd.grad(ours, leaf, g, retain_graph=True)
    torch.testing.assert_close(before, again, rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match=r"kl_from_logits: .*create_graph"):
        torch.autograd.grad(ours.sum(), leaf, create_graph=True)


def test_function_transforms_are_refused():
    logits, ref, _ = case(3, 4)
    with pytest.raises(NotImplementedError, match=r"kl_from_logits: torch\.func"):
        torch.func.vmap(kl_from_logits)(logits, ref)


def test_compiles_to_one_graph(direction):
    logits, ref, g = case(5, 6)
    compiled = torch.compile(
        lambda x: kl_from_logits(x, ref, direction=direction), fullgraph=True, backend="aot_eager"
    )
    leaf = logits.requires_grad_()
    ours = compiled(leaf)
    torch.testing.assert_close(ours, kl_from_logits(leaf, ref, direction=direction))
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaf, g)[0], gradient(logits, ref, g, direction=direction)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_logits": torch.randn(3, 5)}, r"ref_logits are \[3, 5\] .*logits \[3, 4\]"),
        ({"ref_logits": torch.ones(3, 4).long()}, "floating-point"),
        ({"logits": torch.ones(3, 4).long()}, "floating-point"),
        ({"direction": "backward"}, "direction is 'backward'; expected 'forward' or 'reverse'"),
        ({"mask": torch.ones(3)}, "mask is"),
        ({"ref_logits": torch.randn(3, 4, requires_grad=True)}, r"ref_logits\.detach\(\)"),
    ],
)
def test_bad_input_is_explained(change, message):
    arguments = {"logits": torch.randn(3, 4), "ref_logits": torch.randn(3, 4)} | change
    with pytest.raises(ValueError, match=f"kl_from_logits: .*{message}"):
        kl_from_logits(**arguments)


def test_a_reference_that_requires_grad_is_fine_without_grad_mode():
    with torch.no_grad():
        kl_from_logits(torch.randn(3, 4), torch.randn(3, 4, requires_grad=True))


# approx_kl


def test_estimators_by_hand():
    # p = 0.5, other = 0.25: d = -log 2
    log_probs, other = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    d = -math.log(2)
    for estimator, expected in (("k1", -d), ("k2", d * d / 2), ("k3", 0.5 - 1 - d)):
        ours = approx_kl(log_probs, other, estimator=estimator)
        assert ours.item() == pytest.approx(expected, rel=1e-6)


def exact_k3(d):
    """exp(d) - 1 - d to 28 digits."""
    d = Decimal(d)
    return d.exp() - 1 - d


@pytest.mark.parametrize(
    ("dtype", "tolerance", "exponents"),
    [(torch.float32, 5e-7, range(-8, 2)), (torch.float64, 1e-15, range(-6, 2))],
)
def test_k3_and_its_gradient_keep_their_digits_at_any_distance(dtype, tolerance, exponents):
    values = [s * m * 10.0**e for e in exponents for m in (1.0, 2.3, 4.9, 5.1) for s in (1, -1)]
    d = torch.tensor([value for value in values if abs(value) < 19], dtype=dtype)
    leaf = d.clone().requires_grad_()
    ours = approx_kl(torch.zeros_like(d), leaf)
    (grad,) = torch.autograd.grad(ours.sum(), leaf)
    for value, got, slope in zip(d.tolist(), ours.tolist(), grad.tolist(), strict=True):
        assert got == pytest.approx(float(exact_k3(value)), rel=tolerance)
        assert slope == pytest.approx(math.expm1(value), rel=tolerance)


def test_the_textbook_formula_for_k3_fails_near_zero():
    d = torch.tensor([1e-3, 1e-4])
    exact = torch.tensor([float(exact_k3(value)) for value in d.tolist()])
    for formula in (d.exp() - 1 - d, torch.expm1(d) - d):
        assert ((formula / exact - 1).abs() > 5e-5).all()
    torch.testing.assert_close(approx_kl(torch.zeros(2), d), exact, rtol=2e-7, atol=0)


def test_k1_and_k3_are_unbiased():
    logits, ref = case(1, 8, dtype=torch.float64)[:2]
    log_p, log_q = torch.log_softmax(logits[0], -1), torch.log_softmax(ref[0], -1)
    exact = kl_from_logits(logits, ref)[0]
    for estimator in ("k1", "k3"):
        torch.testing.assert_close(
            (log_p.exp() * approx_kl(log_p, log_q, estimator=estimator)).sum(), exact
        )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_equal_policies_have_estimate_and_second_order_gradient_zero(estimator):
    log_probs = torch.full((4,), -1.3, requires_grad=True)
    ours = approx_kl(log_probs, log_probs.detach().clone(), estimator=estimator)
    assert (ours == 0).all()
    (grad,) = torch.autograd.grad(ours.sum(), log_probs)
    assert (grad == (1.0 if estimator == "k1" else 0.0)).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_log_ratio_is_clamped_at_20_without_gradient_outside(estimator):
    log_probs = torch.tensor([0.0, -300.0, 0.0, -INF], requires_grad=True)
    other = torch.tensor([-300.0, 0.0, -INF, -1.0])
    ours = approx_kl(log_probs, other, estimator=estimator)
    at = {
        "k1": [20.0, -20.0],
        "k2": [200.0, 200.0],
        "k3": [19 + math.exp(-20), math.exp(20) - 21],
    }[estimator]
    torch.testing.assert_close(ours, torch.tensor([at[0], at[1], at[0], at[1]]))
    assert (torch.autograd.grad(ours.sum(), log_probs)[0] == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_approx_kl_gradcheck(estimator):
    log_probs, other = torch.randn(2, 3, 4, dtype=torch.float64).neg()
    other = log_probs + torch.tensor([1e-3, 0.1, -0.3, 2.0]).double()
    log_probs, other = log_probs.requires_grad_(), other.requires_grad_()
    op = lambda a, b: approx_kl(a, b, estimator=estimator)  # noqa: E731
    torch.autograd.gradcheck(op, (log_probs, other))
    torch.autograd.gradgradcheck(op, (log_probs, other))


def test_approx_kl_shapes_and_dtypes():
    assert approx_kl(torch.randn(0, 3), torch.randn(0, 3)).shape == (0, 3)
    assert approx_kl(torch.tensor(-1.0), torch.tensor(-2.0)).shape == ()
    half = torch.randn(4, 5).bfloat16()
    assert approx_kl(half, half).dtype is torch.float32
    assert approx_kl(half, half.double()).dtype is torch.float64
    strided = torch.randn(5, 4).t()
    other = torch.randn(4, 5)
    torch.testing.assert_close(approx_kl(strided, other), approx_kl(strided.contiguous(), other))
    leaf = torch.randn(4).bfloat16().requires_grad_()
    assert torch.autograd.grad(approx_kl(leaf, leaf.detach()).sum(), leaf)[0].dtype is leaf.dtype


def test_approx_kl_compiles_to_one_graph():
    log_probs, other = torch.randn(2, 9)
    compiled = torch.compile(approx_kl, fullgraph=True, backend="aot_eager")
    leaf = log_probs.requires_grad_()
    torch.testing.assert_close(compiled(leaf, other), approx_kl(leaf, other))
    grads = [torch.autograd.grad(f(leaf, other).sum(), leaf)[0] for f in (compiled, approx_kl)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("log_probs", "other", "estimator", "message"),
    [
        (torch.zeros(3), torch.zeros(3), "k4", "estimator is 'k4'"),
        (torch.zeros(3), torch.zeros(4), "k3", r"log_probs is \[3\], other \[4\]"),
        (torch.zeros(3), torch.zeros(3).long(), "k3", "other torch.int64"),
    ],
)
def test_approx_kl_explains_bad_input(log_probs, other, estimator, message):
    with pytest.raises(ValueError, match=f"approx_kl: .*{message}"):
        approx_kl(log_probs, other, estimator=estimator)
