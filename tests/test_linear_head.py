"""The language-model head against autograd in float64, in what it costs, and in what it refuses."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_fast
from ppo_fast.functional import _linear_head_rows as by_rows
from ppo_fast.functional import _linear_head_tiles as by_tiles
from ppo_fast.functional import linear_head as module
from ppo_fast.functional._terms import Terms
from ppo_fast.functional.linear_head import (
    hidden_gradients,
    log_probs_from_hidden,
    ppo_loss_from_hidden,
)
from ppo_fast.functional.ppo_loss import ppo_loss, ppo_loss_from_logits

F64 = torch.float64
PATHS = ["tiles", "small tiles", "kept tiles", "threads", "rows"]


@pytest.fixture(autouse=True)
def one_thread():
    """Counting what torch is asked for works in the thread that counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch, one_thread):
    """Run the test through each way of evaluating, small tiles and chunks among them."""
    if request.param in ("small tiles", "kept tiles", "threads"):
        share = {"small tiles": 0.0, "kept tiles": 0.6, "threads": 0.5}[request.param]
        monkeypatch.setattr(by_tiles, "ROWS", 4)
        monkeypatch.setattr(by_tiles, "NARROWEST_TILE", 1)
        monkeypatch.setattr(by_tiles, "WIDEST_TILE", 16)
        monkeypatch.setattr(by_tiles, "KEPT_SHARE", share)
    if request.param == "threads":
        torch.set_num_threads(3)
        monkeypatch.setattr(by_tiles, "TILES_OF_A_THREAD", 1)
    if request.param == "rows":
        monkeypatch.setattr(module, "_takes_rows", lambda hidden: True)
        monkeypatch.setattr(by_rows, "CAST_COLUMNS", 16)
    return request.param


def case(rows=11, size=53, width=7, dtype=torch.float32, seed=0, grad=True):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    given = {
        "hidden": randn(rows, width).to(dtype),
        "weight": randn(size, width).to(dtype),
        "bias": randn(size).to(dtype),
    }
    if grad:
        given = {name: x.requires_grad_() for name, x in given.items()}
    given["index"] = torch.randint(size, (rows,), generator=g)
    return given


def doubled(given):
    """The same inputs as float64 leaves."""
    return {
        name: x.detach().double().requires_grad_() if x.is_floating_point() else x
        for name, x in given.items()
    }


def oracle_logits(hidden, weight, bias=None, softcap=None, logit_scale=1.0):
    x = hidden @ weight.t()
    x = logit_scale * (x if bias is None else x + bias)
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def oracle(hidden, weight, index, *, bias=None, temperature=1.0, mask=None, **head):
    """Log-probs and entropies by the textbook formulas, for autograd."""
    log_p = torch.log_softmax(oracle_logits(hidden, weight, bias, **head) / temperature, -1)
    log_probs = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    if mask is None:
        return log_probs, entropy
    return log_probs * mask, entropy * mask


def leaves(given):
    return [x for x in given.values() if x.requires_grad]


def close(got, want, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(got.detach().double(), want.detach().double(), rtol=rtol, atol=atol)


def in_python(code, *arguments, **environment):
    """What a process of its own prints."""
    root = str(Path(ppo_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": root, "PPO_FAST_BACKEND": "auto"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of_loss(rows, seed=1, dtype=torch.float32):
    """Arguments of the loss: some ratios and values within their clip ranges, some beyond."""
    g = torch.Generator().manual_seed(seed)
    names = ("advantages", "values", "old_values", "returns", "weights")
    found = {name: torch.randn(rows, generator=g, dtype=F64).to(dtype) for name in names}
    found["weights"] = found["weights"].abs()
    found["values"].requires_grad_()
    noise = 0.3 * torch.randn(2, rows, generator=g, dtype=F64)
    return found, noise.to(dtype)


def loss_case(rows=11, dtype=torch.float32, seed=0, **size):
    given = case(rows, dtype=dtype, seed=seed, **size)
    found, noise = rows_of_loss(rows, seed + 1, torch.float64 if dtype is F64 else torch.float32)
    with torch.no_grad():
        near, _ = oracle(
            given["hidden"].double(), given["weight"].double(), given["index"], bias=given["bias"]
        )
    found["old_log_probs"] = (near + noise[0]).to(noise.dtype)
    found["ref_log_probs"] = (near - noise[1]).to(noise.dtype)
    return given, found


HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperature in a tensor": {"temperature": torch.tensor(1.8, dtype=F64)},
    "softcap": {"softcap": 2.5},
    "scale": {"logit_scale": 0.3},
    "all": {"temperature": 0.6, "softcap": 3.0, "logit_scale": 1.7},
}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


# Log-probs and entropies


def test_two_outcomes_of_a_quarter_and_three_quarters(path):
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [math.log(3.0)]])
    log_probs, entropy = log_probs_from_hidden(hidden, weight, torch.tensor([0]), with_entropy=True)
    close(log_probs, torch.tensor([math.log(0.25)]))
    close(entropy, torch.tensor([-0.25 * math.log(0.25) - 0.75 * math.log(0.75)]))


@every_head
@pytest.mark.parametrize("with_bias", [False, True])
def test_log_probs_entropies_and_all_gradients_match_float64_autograd(path, head, with_bias):
    given = case()
    if not with_bias:
        del given["bias"]
    exact = doubled(given)
    g, h = torch.randn(2, 11, generator=torch.Generator().manual_seed(3))
    found = log_probs_from_hidden(**given, **head, with_entropy=True)
    wanted = oracle(**exact, **head)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype is torch.float32
        close(got, want)
    gradients = torch.autograd.grad(found, leaves(given), [g, h])
    expected = torch.autograd.grad(wanted, leaves(exact), [g.double(), h.double()])
    for got, want in zip(gradients, expected, strict=True):
        close(got, want)


def test_either_output_alone_can_be_differentiated(path):
    given = case()
    exact = doubled(given)
    for which in (0, 1):
        found = log_probs_from_hidden(**given, with_entropy=True)[which]
        wanted = oracle(**exact)[which]
        gradients = torch.autograd.grad(found.square().sum(), leaves(given))
        expected = torch.autograd.grad(wanted.square().sum(), leaves(exact))
        for got, want in zip(gradients, expected, strict=True):
            close(got, want)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 33, 257])
def test_any_vocabulary_size_beside_the_tile(path, size):
    given, exact = case(5, size), doubled(case(5, size))
    found = log_probs_from_hidden(**given, with_entropy=True)
    wanted = oracle(**exact)
    for got, want in zip(found, wanted, strict=True):
        close(got, want)
    total = sum(out.sum() for out in found)
    for got, want in zip(
        torch.autograd.grad(total, leaves(given)),
        torch.autograd.grad(sum(out.sum() for out in wanted), leaves(exact)),
        strict=True,
    ):
        close(got, want)


@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
def test_gradcheck(path, head):
    given = case(4, 19, 3, F64)
    mask = torch.tensor([True, False, True, True])

    def op(hidden, weight, bias):
        return log_probs_from_hidden(
            hidden, weight, given["index"], bias=bias, mask=mask, with_entropy=True, **head
        )

    inputs = [given[name] for name in ("hidden", "weight", "bias")]
    torch.autograd.gradcheck(op, inputs)
    torch.autograd.gradcheck(lambda *x: op(*x)[0], inputs)
    torch.autograd.gradcheck(lambda *x: op(*x)[1], inputs)


def test_leading_dimensions_and_strides_do_not_matter(path):
    given = case(12, 53, 7)
    hidden = given["hidden"].detach()
    wide = torch.full((4, 3, 14), math.nan)
    wide[..., ::2] = hidden.view(4, 3, 7)
    strided = wide[..., ::2].requires_grad_()
    transposed = given["weight"].detach().t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    index = given["index"].view(4, 3).int()
    shaped = log_probs_from_hidden(strided, transposed, index)
    flat = log_probs_from_hidden(given["hidden"], given["weight"], given["index"])
    assert shaped.shape == (4, 3)
    close(shaped.view(-1), flat)
    ours = torch.autograd.grad(shaped.sum(), [strided, transposed])
    plain = torch.autograd.grad(flat.sum(), [given["hidden"], given["weight"]])
    close(ours[0].reshape(12, 7), plain[0])
    close(ours[1], plain[1])


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(path, rows):
    given = case(rows)
    log_probs, entropy = log_probs_from_hidden(**given, with_entropy=True)
    assert log_probs.shape == entropy.shape == (rows,)
    gradients = torch.autograd.grad((log_probs + entropy).sum(), leaves(given))
    exact = doubled(given)
    expected = torch.autograd.grad(sum(oracle(**exact)).sum(), leaves(exact))
    for got, want in zip(gradients, expected, strict=True):
        close(got, want)


def test_what_masked_rows_hold_is_never_read(path):
    given = case()
    mask = torch.arange(11) % 3 != 1
    clean = log_probs_from_hidden(**given, mask=mask, with_entropy=True)
    expected = torch.autograd.grad(sum(clean).sum(), leaves(given))
    poisoned = dict(given, index=given["index"].masked_fill(~mask, 10**9))
    poisoned["hidden"] = (
        given["hidden"].detach().masked_fill(~mask.unsqueeze(1), math.nan).requires_grad_()
    )
    found = log_probs_from_hidden(**poisoned, mask=mask, with_entropy=True)
    for got, want in zip(found, clean, strict=True):
        assert torch.equal(got, want)
        assert (got[~mask] == 0).all()
    gradients = torch.autograd.grad(sum(found).sum(), leaves(poisoned))
    for got, want in zip(gradients, expected, strict=True):
        close(got, want)
    assert (gradients[0][~mask] == 0).all()


def test_all_rows_masked_gives_zeros_and_zero_gradients(path):
    given = case()
    found = log_probs_from_hidden(
        **given, mask=torch.zeros(11, dtype=torch.bool), with_entropy=True
    )
    assert all((out == 0).all() for out in found)
    for gradient in torch.autograd.grad(sum(found).sum(), leaves(given)):
        assert (gradient == 0).all()


def test_a_logit_of_minus_infinity_has_no_part_in_anything(path):
    given = case()
    with torch.no_grad():
        given["bias"][[0, 17, 52]] = -math.inf
    index = given["index"].masked_fill(torch.isin(given["index"], torch.tensor([0, 17, 52])), 1)
    index[2] = 17
    found = log_probs_from_hidden(
        given["hidden"], given["weight"], index, bias=given["bias"], with_entropy=True
    )
    others = [j for j in range(53) if j not in (0, 17, 52)]
    part = {name: given[name].detach()[others].double() for name in ("weight", "bias")}
    place = torch.tensor([others.index(int(i)) if int(i) in others else 0 for i in index])
    hidden = given["hidden"].detach().double().requires_grad_()
    wanted = oracle(hidden, part["weight"], place, bias=part["bias"])
    assert found[0][2] == -math.inf
    legal = torch.arange(11) != 2
    close(found[0][legal], wanted[0][legal])
    close(found[1], wanted[1])
    got = torch.autograd.grad(found[0][legal].sum() + found[1].sum(), leaves(given))
    (want,) = torch.autograd.grad(wanted[0][legal].sum() + wanted[1].sum(), hidden)
    close(got[0], want)
    assert (got[1][[0, 17, 52]] == 0).all() and (got[2][[0, 17, 52]] == 0).all()


def test_a_row_of_nothing_but_minus_infinity_has_no_entropy_and_no_gradient(path):
    given = case()
    with torch.no_grad():
        given["bias"].fill_(-math.inf)
    found = log_probs_from_hidden(**given, with_entropy=True, temperature=0.01)
    assert (found[0] == -math.inf).all() and (found[1] == 0).all()
    for gradient in torch.autograd.grad(sum(found).sum(), leaves(given)):
        assert (gradient == 0).all()


def test_a_nan_stays_in_its_row(path):
    given = case()
    with torch.no_grad():
        given["hidden"][4] = math.nan
    log_probs, entropy = log_probs_from_hidden(**given, with_entropy=True)
    assert log_probs.isnan().nonzero().tolist() == entropy.isnan().nonzero().tolist() == [[4]]
    use = torch.arange(11) != 4
    gradient = torch.autograd.grad((log_probs + entropy)[use].sum(), given["hidden"])[0]
    assert gradient[use].isfinite().all() and (gradient[4] == 0).all()


def test_logits_far_from_zero_cancel_nowhere(path):
    given = case(dtype=F64)
    far = {name: x.detach().float() for name, x in given.items() if name != "index"}
    far["bias"] = far["bias"].round() + 4096.0
    far["hidden"], far["weight"] = far["hidden"].round(), far["weight"].round()
    near = dict(far, bias=far["bias"] - 4096.0)
    found = log_probs_from_hidden(**far, index=given["index"], with_entropy=True)
    wanted = log_probs_from_hidden(**near, index=given["index"], with_entropy=True)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


def test_a_vocabulary_beyond_131072():
    given = case(3, 131_077, 5)
    exact = doubled(given)
    found, wanted = log_probs_from_hidden(**given, with_entropy=True), oracle(**exact)
    for got, want in zip(found, wanted, strict=True):
        close(got, want)
    gradients = torch.autograd.grad(sum(found).sum(), leaves(given))
    for got, want in zip(
        gradients, torch.autograd.grad(sum(wanted).sum(), leaves(exact)), strict=True
    ):
        close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_give_float32_logits(path, dtype):
    given = case(dtype=dtype)
    found, exact = log_probs_from_hidden(**given, with_entropy=True), doubled(given)
    wanted = oracle(**exact)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype is torch.float32
        close(got, want)  # as close as from float32 inputs
    eps = torch.finfo(dtype).eps
    gradients = torch.autograd.grad(sum(found).sum(), leaves(given))
    expected = torch.autograd.grad(sum(wanted).sum(), leaves(exact))
    for got, want in zip(gradients, expected, strict=True):
        assert got.dtype is dtype
        if path == "rows":  # products in the hidden states' dtype
            close(got, want, rtol=2 * eps, atol=4 * eps * float(want.abs().max()))
        else:
            close(got, want, rtol=eps, atol=1e-5)


def test_hidden_states_and_weights_of_different_dtypes(path):
    given = case()
    given["hidden"] = given["hidden"].detach().bfloat16().requires_grad_()
    if path == "rows":  # there products are made in the hidden states' dtype
        with torch.no_grad():
            given["weight"].copy_(given["weight"].bfloat16())
    found, wanted = log_probs_from_hidden(**given), oracle(**doubled(given))[0]
    close(found, wanted)
    for got, x in zip(torch.autograd.grad(found.sum(), leaves(given)), leaves(given), strict=True):
        assert got.dtype is x.dtype


def test_autocast_leaves_the_arithmetic_alone(path):
    given = case()
    with torch.autocast("cpu", torch.bfloat16):
        under = log_probs_from_hidden(**given)
    assert torch.equal(under, log_probs_from_hidden(**given))


# The PPO loss


NAMES = ("old_log_probs", "advantages")
LOSSES = {
    "policy": ((), {}),
    "clip higher, dual clip": ((), {"clip_coef_high": 0.35, "dual_clip": 1.3}),
    "value": (("values", "returns"), {"vf_coef": 0.7}),
    "value clip": (("values", "returns", "old_values"), {"vf_clip_coef": 0.2}),
    "entropy": ((), {"ent_coef": 0.3}),
    "entropy, weights": (("weights",), {"ent_coef": torch.tensor(0.3)}),
    "kl": (("ref_log_probs",), {"kl_coef": 0.2}),
    "kl k1, old kl": (
        ("ref_log_probs",),
        {"kl_coef": 0.2, "kl_estimator": "k1", "old_kl_coef": 0.4},
    ),
    "normalised": ((), {"norm_adv": True}),
    "moments": ((), {"advantage_moments": torch.tensor([40.0, 0.2, 50.0])}),
    "normalizer": (("values", "returns"), {"normalizer": torch.tensor(100.0)}),
}
every_loss = pytest.mark.parametrize(("names", "options"), LOSSES.values(), ids=LOSSES.keys())


def by_oracle(given, found, names, options, mask=None, **head):
    """Loss, stats and gradients: textbook logits in float64, then `ppo_loss` of their log-probs."""
    exact = doubled(given)
    rows = {name: found[name].detach().double() for name in (*NAMES, *names)}
    if "values" in rows:
        rows["values"].requires_grad_()
    index = exact["index"] if mask is None else exact["index"].masked_fill(~mask, 0)
    log_probs, entropy = oracle(**{**exact, "index": index}, **head)
    result = ppo_loss(log_probs, entropy=entropy, clip_coef=0.2, mask=mask, **rows, **options)
    inputs = [*leaves(exact), *leaves(rows)]
    return result, torch.autograd.grad(result.loss, inputs)


@every_loss
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
def test_loss_stats_and_gradients_match_float64_autograd(path, names, options, masked):
    given, found = loss_case()
    mask = torch.arange(11) % 4 != 1 if masked else None
    rows = {name: found[name] for name in (*NAMES, *names)}
    result = ppo_loss_from_hidden(**given, clip_coef=0.2, mask=mask, **rows, **options)
    expected, gradients = by_oracle(given, found, names, options, mask)
    assert result.loss.dtype is torch.float32
    close(result.loss, expected.loss)
    close(result.stats, expected.stats)
    inputs = [*leaves(given), *leaves(rows)]
    for got, want in zip(torch.autograd.grad(result.loss, inputs), gradients, strict=True):
        close(got, want)
    with torch.no_grad():
        alone = ppo_loss_from_hidden(**given, clip_coef=0.2, mask=mask, **rows, **options)
    assert not alone.loss.requires_grad
    close(alone.loss, expected.loss)
    close(alone.stats, expected.stats)


@every_head
def test_loss_through_every_head(path, head):
    given, found = loss_case()
    rows = {name: found[name] for name in (*NAMES, "values", "returns")}
    result = ppo_loss_from_hidden(**given, clip_coef=0.2, ent_coef=0.1, **rows, **head)
    expected, gradients = by_oracle(given, found, ("values", "returns"), {"ent_coef": 0.1}, **head)
    close(result.loss, expected.loss)
    close(result.stats, expected.stats)
    inputs = [*leaves(given), found["values"]]
    for got, want in zip(torch.autograd.grad(result.loss, inputs), gradients, strict=True):
        close(got, want)


def test_loss_is_that_of_the_logits(path):
    given, found = loss_case()
    rows = {name: found[name] for name in NAMES}
    with torch.no_grad():
        given["bias"][5] = -math.inf
        given["index"][3] = 5  # an illegal token taken
    ours = ppo_loss_from_hidden(**given, clip_coef=0.2, ent_coef=0.1, **rows)
    logits = oracle_logits(given["hidden"], given["weight"], given["bias"])
    theirs = ppo_loss_from_logits(logits, given["index"], clip_coef=0.2, ent_coef=0.1, **rows)
    close(ours.loss, theirs.loss)
    close(ours.stats, theirs.stats)
    wanted = [given["hidden"], given["weight"]]
    got = torch.autograd.grad(ours.loss, wanted)
    # The product's own backward multiplies 0 with the -inf of nothing: finite here as well.
    for one, other in zip(got, torch.autograd.grad(theirs.loss, wanted), strict=True):
        close(one, other)


def test_gradcheck_of_the_loss(path):
    given, found = loss_case(5, F64, size=19, width=3)
    rows = {name: found[name] for name in NAMES}

    def op(hidden, weight, bias):
        head = {"bias": bias, "softcap": 3.0, "temperature": 0.8}
        return ppo_loss_from_hidden(
            hidden, weight, given["index"], clip_coef=0.2, ent_coef=0.1, **rows, **head
        ).loss

    torch.autograd.gradcheck(op, [given[name] for name in ("hidden", "weight", "bias")])


@pytest.mark.parametrize("rows", [0, 1])
def test_loss_of_no_row_and_one_row(path, rows):
    given, found = loss_case(rows)
    arguments = {name: found[name] for name in (*NAMES, "values", "returns")}
    result = ppo_loss_from_hidden(**given, clip_coef=0.2, **arguments)
    gradients = torch.autograd.grad(result.loss, [*leaves(given), found["values"]])
    assert float(result.count) == rows
    if rows == 0:
        assert result.loss.item() == 0
    else:
        expected, wanted = by_oracle(given, found, ("values", "returns"), {})
        close(result.loss, expected.loss)
        for got, want in zip(gradients, wanted, strict=True):
            close(got, want)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[1].shape == given["weight"].shape


def test_loss_of_masked_rows_alone_is_zero_with_zero_gradients(path):
    given, found = loss_case()
    with torch.no_grad():
        given["hidden"].fill_(math.nan)
    rows = {name: found[name] for name in (*NAMES, "values", "returns")}
    mask = torch.zeros(11, dtype=torch.bool)
    result = ppo_loss_from_hidden(**given, clip_coef=0.2, ent_coef=0.1, mask=mask, **rows)
    assert result.loss.item() == 0 and float(result.count) == 0
    for gradient in torch.autograd.grad(result.loss, [*leaves(given), found["values"]]):
        assert (gradient == 0).all()


INTERPRETED = """
    import torch
    import ppo_fast
    from ppo_fast.functional import log_probs_from_hidden, ppo_loss_from_hidden

    rows = 9
    for dtype, size, workspace in ((torch.float32, 70, 512), (torch.bfloat16, 300, 0.006)):
        hidden = torch.randn(rows, 5).to(dtype).requires_grad_()
        weight = torch.randn(size, 5).to(dtype).requires_grad_()
        index, old, advantages = torch.randint(size, (rows,)), torch.randn(rows) - 6, torch.randn(rows)
        mask = torch.arange(rows) % 3 != 1

        def run():
            options = {"mask": mask, "temperature": torch.tensor(0.8), "softcap": 5.0}
            options["workspace_mb"] = workspace
            result = ppo_loss_from_hidden(
                hidden, weight, index, old, advantages, clip_coef=0.2, ent_coef=0.1, **options
            )
            found = log_probs_from_hidden(hidden, weight, index, with_entropy=True, **options)
            outputs = [result.loss, result.stats, *found]
            for out in (result.loss, sum(found).sum()):
                outputs += torch.autograd.grad(out, [hidden, weight])
            return outputs

        for ours, reference in zip(run(), ppo_fast.backend("reference")(run)(), strict=True):
            bound = 4 * torch.finfo(reference.dtype).eps + 2e-5
            bound = {"rtol": bound, "atol": bound * float(reference.abs().max())}
            torch.testing.assert_close(ours, reference, **bound)
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_row_kernels_in_the_interpreter_give_what_tiles_give():
    in_python(INTERPRETED, TRITON_INTERPRET="1", PPO_FAST_BACKEND="triton")


# How autograd uses it


def simple(given, found, **options):
    return ppo_loss_from_hidden(
        **given, clip_coef=0.2, ent_coef=0.1, **{name: found[name] for name in NAMES}, **options
    )


def test_an_upstream_gradient_scales_all_gradients(path):
    given, found = loss_case()
    one = torch.autograd.grad(simple(given, found).loss, leaves(given))
    scaled = torch.autograd.grad(65536.0 * simple(given, found).loss, leaves(given))
    for got, want in zip(scaled, one, strict=True):
        close(got, 65536.0 * want, rtol=1e-6)
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(simple(given, found).loss, leaves(given), create_graph=True)


def test_a_retained_graph_gives_the_same_gradients_again(path):
    given, found = loss_case()
    loss = simple(given, found).loss
    first = torch.autograd.grad(loss, leaves(given), 2.0 * torch.ones(()), retain_graph=True)
    for gradient in first:
        gradient.mul_(3.0)  # what an optimizer may do to what it was given
    second = torch.autograd.grad(loss, leaves(given))
    for one, other in zip(first, second, strict=True):
        close(one, 6.0 * other, rtol=1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves(given))


def test_gradients_accumulate_over_micro_batches_and_uses_of_a_tied_weight(path):
    given, found = loss_case(12)
    weight = given["weight"]
    rows = {name: found[name] for name in NAMES}

    def part(own, embedded):
        arguments = {name: row[own] for name, row in rows.items()}
        return ppo_loss_from_hidden(
            given["hidden"][own] + embedded[own],
            weight,
            given["index"][own],
            bias=given["bias"],
            clip_coef=0.2,
            normalizer=12.0,
            **arguments,
        ).loss

    for own in (slice(0, 5), slice(5, 12)):
        part(own, weight[:12]).backward()
    got = [x.grad.clone() for x in leaves(given)]
    for x in leaves(given):
        x.grad = None
    exact = doubled(given)
    hidden = exact["hidden"] + exact["weight"][:12]
    log_probs, entropy = oracle(hidden, exact["weight"], exact["index"], bias=exact["bias"])
    wide = {name: row.double() for name, row in rows.items()}
    result = ppo_loss(log_probs, entropy=entropy, clip_coef=0.2, **wide)
    for one, other in zip(got, torch.autograd.grad(result.loss, leaves(exact)), strict=True):
        close(one, other)


def test_a_weight_edited_before_the_backward_is_noticed(path):
    given = case()
    loss = log_probs_from_hidden(**given).sum()
    with torch.no_grad():
        given["weight"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Products(TorchDispatchMode):
    """Counts the multiplications of all matrix products."""

    def __init__(self):
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def multiplications(function):
    with Products() as products:
        function()
    return products.multiplications


def test_products_three_two_with_a_frozen_weight_one_without_gradients(path, monkeypatch):
    if path == "threads":
        torch.set_num_threads(1)
    # One chunk whose tiles are all kept, or rows of logits.
    monkeypatch.setattr(by_tiles, "ROWS", 512)
    monkeypatch.setattr(by_tiles, "KEPT_SHARE", 1.0)
    given, found = loss_case(64, size=48, width=16)
    whole = 64 * 48 * 16
    assert multiplications(lambda: simple(given, found).loss.backward()) == 3 * whole
    frozen = dict(given, weight=given["weight"].detach())
    assert multiplications(lambda: simple(frozen, found).loss.backward()) == 2 * whole
    fixed = dict(given, hidden=given["hidden"].detach())
    assert multiplications(lambda: simple(fixed, found).loss.backward()) == 2 * whole
    with torch.no_grad():
        assert multiplications(lambda: simple(given, found)) == whole
        assert multiplications(lambda: log_probs_from_hidden(**given)) == whole
    log_probs = log_probs_from_hidden(**given)
    assert multiplications(log_probs.sum().backward) == 3 * whole


def test_masked_rows_cost_no_product_on_a_cpu():
    given, found = loss_case(64, size=48, width=16)
    mask = torch.arange(64) % 4 == 0
    few = {name: x[mask].detach() if len(x) == 64 else x for name, x in given.items()}
    few["hidden"].requires_grad_()
    few_found = {name: x[mask] for name, x in found.items()}

    def with_mask():
        simple(given, found, mask=mask).loss.backward()
        log_probs_from_hidden(**given, mask=mask).sum().backward()

    def without_those_rows():
        simple(few, few_found).loss.backward()
        log_probs_from_hidden(**few).sum().backward()

    assert multiplications(with_mask) == multiplications(without_those_rows) > 0


def test_no_logits_are_ever_whole():
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    given = case(64, 40_000, 2, grad=False)
    with Sizes():
        log_probs_from_hidden(**given, with_entropy=True)
    assert largest <= 3 * 4 * by_tiles.TILE_ELEMENTS < 4 * 64 * 40_000


def test_threads_leave_torch_as_it_was_and_repeat_to_the_bit(monkeypatch):
    given, found = loss_case(40, size=3000, width=16)
    torch.set_num_threads(2)
    monkeypatch.setattr(by_tiles, "WIDEST_TILE", 256)

    def gradients():
        return torch.autograd.grad(simple(given, found).loss, leaves(given))

    first = gradients()
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
    for one, other in zip(first, gradients(), strict=True):
        assert torch.equal(one, other)
    with torch.inference_mode():
        quiet = log_probs_from_hidden(**given)
    close(quiet, log_probs_from_hidden(**given))
    torch.set_num_threads(1)
    for one, other in zip(first, gradients(), strict=True):
        close(one, other)


# Buffers given by the caller


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_grad_is_added_to_and_the_weight_gets_no_other(path, dtype):
    given, found = loss_case()
    expected = torch.autograd.grad(simple(given, found).loss, leaves(given))
    buffer = torch.full_like(given["weight"], 0.5, dtype=dtype).detach()
    simple(given, found, weight_grad=buffer).loss.backward()
    assert given["weight"].grad is None
    eps = 4 * torch.finfo(dtype).eps
    close(buffer, 0.5 + expected[1], rtol=eps, atol=eps)
    close(given["hidden"].grad, expected[0])
    close(given["bias"].grad, expected[2])


def test_weight_grad_refuses_an_upstream_gradient_other_than_one(path):
    given, found = loss_case()
    loss = simple(given, found, weight_grad=torch.zeros(53, 7)).loss
    with pytest.raises(RuntimeError, match="upstream gradient of 1"):
        (loss / 2).backward()


def test_hidden_gradients_are_those_of_autograd(path):
    given, found = loss_case()
    names = (*NAMES, "values", "returns")
    rows = {name: found[name] for name in names}
    head = {"temperature": 0.7, "softcap": 4.0, "logit_scale": 1.2}
    mask = torch.arange(11) % 4 != 1
    options = {"clip_coef": 0.2, "ent_coef": 0.1, "mask": mask, "normalizer": torch.tensor(20.0)}
    result = ppo_loss_from_hidden(**given, **rows, **options, **head)
    expected = torch.autograd.grad(result.loss, [*leaves(given), found["values"]])
    of_weight, of_bias = torch.ones(53, 7), torch.ones(53)
    terms = Terms(**{name: row.detach() for name, row in rows.items()}, **options)
    got, of_hidden, of_values = hidden_gradients(
        **given, t=terms, weight_grad=of_weight, bias_grad=of_bias, **head
    )
    close(got.loss, result.loss)
    close(got.stats, result.stats)
    for one, other in zip(
        (of_hidden, of_weight - 1, of_bias - 1, of_values), expected, strict=True
    ):
        close(one, other)
    frozen = hidden_gradients(**given, t=terms._replace(values=None, returns=None), **head)
    close(frozen[1], expected[0])
    assert frozen[2] is None


def test_log_probs_compile_to_one_graph():
    mask = torch.arange(11) % 4 != 1

    def op(hidden, weight, bias, index, temperature):
        return log_probs_from_hidden(
            hidden,
            weight,
            index,
            bias=bias,
            temperature=temperature,
            mask=mask,
            with_entropy=True,
            softcap=4.0,
        )

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    # The second width makes the compiler treat it as dynamic.
    for temperature, width in ((1.0, 7), (1.0, 9), (torch.tensor(0.7), 7)):
        given = case(width=width)
        results = []
        for function in (op, compiled):
            found = function(*leaves(given), given["index"], temperature)
            results.append([*found, *torch.autograd.grad(sum(found).sum(), leaves(given))])
        for got, want in zip(*results, strict=True):
            close(got, want)


@pytest.mark.parametrize("weight_frozen", [False, True])
def test_the_loss_compiles_to_one_graph(weight_frozen):
    given, found = loss_case()
    if weight_frozen:
        given["weight"] = given["weight"].detach()
    names = (*NAMES, "values", "returns", "weights", "ref_log_probs")
    mask = torch.arange(11) % 4 != 1

    def op(given, rows, ent_coef):
        result = ppo_loss_from_hidden(
            **given, **rows, clip_coef=0.2, ent_coef=ent_coef, kl_coef=0.1, mask=mask
        )
        return 3.0 * result.loss, result.stats

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    rows = {name: found[name] for name in names}
    inputs = [*leaves(given), rows["values"]]
    for ent_coef in (0.1, torch.tensor(0.2)):
        results = []
        for function in (op, compiled):
            loss, stats = function(given, rows, ent_coef)
            results.append([loss, stats, *torch.autograd.grad(loss, inputs)])
        for got, want in zip(*results, strict=True):
            close(got, want)


# Drift and memory


def trained(weight, gradient_of, rounds=300):
    """Entropies over Adam steps on a float32 master, of which a bfloat16 copy is evaluated."""
    master = weight.clone()
    mean, square = torch.zeros_like(master), torch.zeros_like(master)
    entropies = []
    for step in range(1, rounds + 1):
        gradient, entropy = gradient_of(master.bfloat16())
        mean.lerp_(gradient.float(), 0.1)
        square.lerp_(gradient.float().square(), 0.01)
        size = (square / (1 - 0.99**step)).sqrt_().add_(1e-8)
        master.addcdiv_(mean, size, value=-1e-2 / (1 - 0.9**step))
        entropies.append(float(entropy))
    return torch.tensor(entropies)


def test_entropy_over_300_steps_in_bfloat16_is_that_of_float32_where_bfloat16_sums_drift(
    monkeypatch,
):
    rows, chunk = 96, 3
    given, found = loss_case(rows, size=24, width=8, seed=7)
    hidden, index = given["hidden"].detach().bfloat16(), given["index"]
    advantages = found["advantages"]

    def ours(dtype):
        def gradient_of(weight):
            leaf, x = weight.to(dtype).requires_grad_(), hidden.to(dtype)
            with torch.no_grad():
                old = log_probs_from_hidden(x, leaf, index)
            result = ppo_loss_from_hidden(x, leaf, index, old, advantages, clip_coef=0.2)
            result.loss.backward()
            return leaf.grad, result.entropy

        return gradient_of

    def sums_in_bfloat16(weight):
        """At ratio 1 the gradient by the logits is A (p - 1[j = index]) / n."""
        x = hidden.float()
        log_p = torch.log_softmax(x @ weight.float().t(), -1)
        p = log_p.exp()
        d = (p - torch.nn.functional.one_hot(index, 24)) * advantages.unsqueeze(1) / rows
        parts = d.view(-1, chunk, 24).transpose(1, 2) @ x.view(-1, chunk, 8)
        total = torch.zeros_like(weight)
        for part in parts.bfloat16():
            total += part
        return total, -(p * log_p).sum(-1).mean()

    start = given["weight"].detach()
    exact = trained(start, ours(torch.float32))
    monkeypatch.setattr(by_tiles, "ROWS", chunk)
    low = trained(start, ours(torch.bfloat16))
    drifting = trained(start, sums_in_bfloat16)
    assert exact[0] - exact[-1] > 0.5  # it learns
    off, drift = float((low - exact).abs().max()), float((drifting - exact).abs().max())
    assert off < 1e-3
    assert drift > 3 * off, (off, drift)


MEMORY = """
    import sys, torch
    from ppo_fast.functional.linear_head import log_probs_from_hidden, ppo_loss_from_hidden
    from ppo_fast.functional.ppo_loss import ppo_loss

    def status(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

    torch.set_num_threads(1)
    M, V, D = 256, 64_000, 64
    hidden = torch.randn(M, D, requires_grad=True)
    weight = torch.randn(V, D).mul_(0.1).requires_grad_()
    index, old, advantages = torch.randint(V, (M,)), torch.full((M,), -11.0), torch.randn(M)
    small = weight.detach()[:8].clone().requires_grad_()  # open what libraries open once

    def run(kind, weight, index):
        if kind == "eager":
            logits = hidden @ weight.t()
            log_probs = torch.log_softmax(logits, -1).gather(1, index[:, None]).squeeze(1)
            ppo_loss(log_probs, old, advantages, clip_coef=0.2).loss.backward()
        elif kind == "loss":
            ppo_loss_from_hidden(
                hidden, weight, index, old, advantages, clip_coef=0.2, workspace_mb=WORKSPACE
            ).loss.backward()
        else:
            log_probs_from_hidden(hidden, weight, index, workspace_mb=WORKSPACE).sum().backward()

    run(sys.argv[1], small, index % 8)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    run(sys.argv[1], weight, index)
    print(status("VmHWM") - before)
"""


def peak(kind, workspace=512):
    return int(in_python(MEMORY.replace("WORKSPACE", str(workspace)), kind))


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)
def test_peak_memory_is_a_third_of_eager_and_the_workspace_is_honoured():
    gradients, logits = 4 * 64_000 * 64, 4 * 256 * 64_000
    assert peak("eager") > 3 * logits
    assert peak("loss") < logits
    # Three tiles, the gradients and what libraries take for themselves.
    tiles = 3 * 4 * by_tiles.TILE_ELEMENTS
    assert peak("loss", workspace=8) < gradients + tiles + (12 << 20)
    assert peak("log_probs") < gradients + tiles + (12 << 20)


def test_chunks_of_rows_keep_to_the_workspace(monkeypatch):
    monkeypatch.setattr(module, "_takes_rows", lambda hidden: True)
    monkeypatch.setattr(by_rows, "ROUND", 2)
    given, found = loss_case(11, size=40_000, width=2)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._overloadpacket is torch.ops.aten.mm and out.shape[-1] == 40_000:
                sizes.append(out.shape[0])
            return out

    with Sizes():
        simple(given, found, workspace_mb=0.8)  # 5.2 rows
        assert sizes == [4, 4, 3]
        sizes.clear()
        simple(given, found, workspace_mb=0.8, softcap=3.0)  # a second buffer
        assert sizes == [2, 2, 2, 2, 2, 1]
        sizes.clear()
        simple(given, found, workspace_mb=0.01)
        assert sizes == [1] * 11


# What is refused


def changed(**changes):
    given, found = loss_case()
    return {**given, **{name: found[name] for name in NAMES}, "clip_coef": 0.2, **changes}


WRONG = {
    "integer hidden": ({"hidden": torch.ones(11, 7).long()}, "hidden is torch.int64"),
    "weight [D, V]": ({"weight": torch.ones(7, 53)}, r"weight.t\(\)"),
    "weight of one dimension": ({"weight": torch.ones(7)}, r"expected \[V, D\]"),
    "no vocabulary": ({"weight": torch.ones(0, 7)}, "V at least 1"),
    "index": ({"index": torch.ones(3).long()}, "index must be"),
    "index dtype": ({"index": torch.ones(11)}, "expected int64 or int32"),
    "bias": ({"bias": torch.ones(52)}, r"bias is \[52\]"),
    "mask": ({"mask": torch.ones(11)}, "torch.bool"),
    "temperature": ({"temperature": 0.0}, "temperature is 0.0"),
    "softcap": ({"softcap": -1.0}, "softcap is -1.0"),
    "logit_scale": ({"logit_scale": math.inf}, "logit_scale is inf"),
    "workspace": ({"workspace_mb": 0}, "workspace_mb is 0"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(changes, message):
    arguments = changed(**changes)
    with pytest.raises(ValueError, match=message) as loss_error:
        ppo_loss_from_hidden(**arguments)
    assert "ppo_loss_from_hidden: " in str(loss_error.value)
    for name in (*NAMES, "clip_coef"):
        del arguments[name]
    with pytest.raises(ValueError, match=message) as error:
        log_probs_from_hidden(**arguments)
    assert "log_probs_from_hidden: " in str(error.value)


LOSS_WRONG = {
    "old log-probs": ({"old_log_probs": torch.zeros(3)}, "old_log_probs is"),
    "returns": ({"values": torch.zeros(11)}, "returns is None"),
    "reference": ({"kl_coef": 0.1}, "ref_log_probs is None"),
    "weight_grad": ({"weight_grad": torch.zeros(7, 53)}, "weight_grad is"),
    "weight_grad dtype": ({"weight_grad": torch.zeros(53, 7).long()}, "weight_grad is torch.int64"),
}


@pytest.mark.parametrize(("changes", "message"), LOSS_WRONG.values(), ids=LOSS_WRONG.keys())
def test_wrong_arguments_of_the_loss_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ppo_loss_from_hidden(**changed(**changes))


def test_a_gradient_buffer_without_gradients_is_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="hidden_gradients"):
        ppo_loss_from_hidden(**changed(weight_grad=torch.zeros(53, 7)))
    arguments = changed(bias=None)
    terms = Terms(*(arguments.pop(name) for name in (*NAMES, "clip_coef")))
    with pytest.raises(ValueError, match="bias is None"):
        hidden_gradients(**arguments, t=terms, bias_grad=torch.zeros(53))


def test_an_index_out_of_range_is_named_before_any_product():
    arguments = changed()
    arguments["index"][4] = 53

    def refused():
        with pytest.raises(
            IndexError, match=r"to 53, but there are 53 logits a row; expected 0 to 52"
        ):
            ppo_loss_from_hidden(**arguments)

    assert multiplications(refused) == 0


def test_a_transform_is_refused():
    given = case(grad=False)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.vmap(lambda hidden: log_probs_from_hidden(hidden, given["weight"], torch.tensor(1)))(
            given["hidden"]
        )
