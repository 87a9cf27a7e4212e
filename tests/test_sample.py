import math

import pytest
import torch

from ppo_fast.functional import _rows
from ppo_fast.functional.log_probs import log_probs_from_logits
from ppo_fast.functional.sample import sample_from_logits
from ppo_fast.results import Sample

INF = math.inf


@pytest.fixture(params=["one block", "many blocks"])
def path(request, monkeypatch):
    """Run the test with all rows in one block, and in blocks of two rows."""
    if request.param == "many blocks":
        monkeypatch.setattr(_rows, "rows_per_block", lambda logits: 2)
    return request.param


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square(actions, probabilities):
    """Pearson's statistic over the outcomes expected at least 5 times, and its degrees of freedom."""
    expected = probabilities.double() * actions.numel()
    counts = torch.bincount(actions, minlength=probabilities.numel()).double()
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    kept = expected > 0
    return ((counts - expected)[kept].square() / expected[kept]).sum(), int(kept.sum()) - 1


@pytest.mark.parametrize("width", [2, 7, 512, 513, 1025])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution(width, temperature):
    row = 1.5 * torch.randn(width, generator=seeded(width))
    row[width // 3] = -INF if width > 2 else 0.0
    probabilities = torch.softmax(row.double() / temperature, -1)
    logits = row.expand(20000 if width < 100 else 4000, width)
    actions = sample_from_logits(logits, temperature=temperature, generator=seeded()).actions
    statistic, freedom = chi_square(actions, probabilities)
    # Mean `freedom`, variance twice that: four standard deviations, one run in ten thousand.
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4
    assert probabilities[actions].min() > 0


def test_rows_are_drawn_independently():
    actions = sample_from_logits(torch.zeros(20000, 3), generator=seeded()).actions
    statistic, _ = chi_square(3 * actions[:-1] + actions[1:], torch.full((9,), 1 / 9))
    assert statistic < 8 + 4 * math.sqrt(16) + 4


@pytest.mark.parametrize("width", [1, 2, 7, 1000, 1025, 3000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor(1.5)])
def test_log_probs_and_entropy_are_those_of_log_probs_from_logits(path, width, temperature):
    logits = 2 * torch.randn(9, width, generator=seeded(1))
    drawn = sample_from_logits(logits, temperature=temperature, generator=seeded())
    assert isinstance(drawn, Sample) and drawn.actions.dtype is torch.int64
    assert ((drawn.actions >= 0) & (drawn.actions < width)).all()
    log_probs, entropy = log_probs_from_logits(
        logits, drawn.actions, temperature=temperature, with_entropy=True
    )
    torch.testing.assert_close(drawn.log_probs, log_probs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(drawn.entropy, entropy, rtol=1e-6, atol=1e-6)


def test_on_vocabularies_sampling_and_evaluation_agree_to_the_last_bit():
    logits = 2 * torch.randn(40, 20000, generator=seeded(1))
    drawn = sample_from_logits(logits, generator=seeded())
    log_probs, entropy = log_probs_from_logits(logits, drawn.actions, with_entropy=True)
    assert torch.equal(drawn.log_probs, log_probs) and torch.equal(drawn.entropy, entropy)


@pytest.mark.parametrize("width", [5, 2000])
def test_the_generator_decides_the_draws(width):
    logits = torch.randn(50, width, generator=seeded(1))
    first, again = (sample_from_logits(logits, generator=seeded(7)) for _ in range(2))
    assert torch.equal(first.actions, again.actions)
    generator = seeded(7)
    one, two = (sample_from_logits(logits, generator=generator).actions for _ in range(2))
    assert torch.equal(one, first.actions) and not torch.equal(one, two)


def test_draws_do_not_depend_on_the_size_of_blocks(monkeypatch):
    logits = torch.randn(50, 2000, generator=seeded(1))
    whole = sample_from_logits(logits, generator=seeded())
    for elements in (1, 5000):
        monkeypatch.setattr(_rows, "CPU_BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(sample_from_logits(logits, generator=seeded()), whole)


def test_without_a_generator_the_global_one_is_used():
    logits = torch.zeros(50, 9)
    torch.manual_seed(3)
    first = sample_from_logits(logits).actions
    torch.manual_seed(3)
    assert torch.equal(first, sample_from_logits(logits).actions)


@pytest.mark.parametrize("width", [6, 1500])
def test_impossible_outcomes_are_never_drawn(path, width):
    logits = torch.full((50, width), -INF)
    legal = torch.tensor([width // 2, width - 1])
    logits[:, legal] = torch.tensor([0.0, -80.0])
    drawn = sample_from_logits(logits, generator=seeded())
    assert (drawn.actions == width // 2).all()
    assert (drawn.log_probs == 0).all() and (drawn.entropy >= 0).all()
    logits[:, legal] = 3.0
    drawn = sample_from_logits(logits, generator=seeded())
    assert set(drawn.actions.tolist()) == set(legal.tolist())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("width", [6, 512, 1500])
def test_the_ends_of_the_unit_interval_draw_possible_outcomes(monkeypatch, uniform, width):
    logits = torch.randn(20, width, generator=seeded(2))
    logits[:, :3] = logits[:, -2:] = -INF
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, **_: self.fill_(uniform))
    drawn = sample_from_logits(logits)
    assert (drawn.actions == (3 if uniform == 0 else width - 3)).all()


@pytest.mark.parametrize("width", [6, 2000])
def test_given_random_numbers_replace_the_generators(path, width):
    logits = torch.randn(9, width, generator=seeded(1))
    uniform = torch.empty(9, 2, dtype=torch.float64).uniform_(generator=seeded(7))
    state = torch.get_rng_state()
    drawn = sample_from_logits(logits, temperature=0.7, uniform=uniform)
    assert torch.equal(torch.get_rng_state(), state)
    want = sample_from_logits(logits, temperature=0.7, generator=seeded(7))
    torch.testing.assert_close(drawn, want, rtol=0, atol=0)
    for row in (slice(4, 5), [8, 0, 3]):
        some = sample_from_logits(logits[row], temperature=0.7, uniform=uniform[row])
        torch.testing.assert_close(some, Sample(*(part[row] for part in drawn)))


def test_extreme_logits(path):
    for value in (-1e4, 1e4):
        drawn = sample_from_logits(torch.full((400, 4), value), generator=seeded())
        assert set(drawn.actions.tolist()) == {0, 1, 2, 3}
        torch.testing.assert_close(drawn.entropy, torch.full((400,), math.log(4)))
    spike = torch.zeros(10, 700)
    spike[:, 600] = 1e4
    assert (sample_from_logits(spike, generator=seeded()).actions == 600).all()


@pytest.mark.parametrize("width", [5, 1000])
@pytest.mark.parametrize(
    ("poison", "message"), [(-INF, "all -inf"), (math.nan, "NaN"), (INF, "NaN or ")]
)
def test_a_row_without_a_distribution_is_an_error_unless_masked(path, width, poison, message):
    logits = torch.randn(7, width, generator=seeded(1))
    logits[4] = poison
    with pytest.raises(ValueError, match=rf"sample_from_logits: row 4 .*{message}"):
        sample_from_logits(logits)
    mask = torch.arange(7) != 4
    drawn = sample_from_logits(logits, generator=seeded(), mask=mask)
    logits[4] = 0.0
    clean = sample_from_logits(logits, generator=seeded())
    for got, want in zip(drawn, clean, strict=True):
        torch.testing.assert_close(got[mask], want[mask])
        assert got[4] == 0


def test_strides_and_dtypes(path):
    logits = torch.randn(6, 40, generator=seeded(1))
    want = sample_from_logits(logits, generator=seeded())
    wide = torch.full((6, 80), math.nan)
    wide[:, 10:50] = logits
    every_other = torch.full((6, 80), math.nan)
    every_other[:, ::2] = logits
    for strided in (wide[:, 10:50], every_other[:, ::2], logits.t().contiguous().t()):
        torch.testing.assert_close(sample_from_logits(strided, generator=seeded()), want)
    half = logits.bfloat16()
    torch.testing.assert_close(
        sample_from_logits(half, generator=seeded()),
        sample_from_logits(half.float(), generator=seeded()),
    )
    double = sample_from_logits(logits.double(), generator=seeded())
    assert double.log_probs.dtype is torch.float64 and torch.equal(double.actions, want.actions)


def test_empty_input_gives_empty_output():
    drawn = sample_from_logits(torch.randn(0, 5))
    assert [tuple(part.shape) for part in drawn] == [(0,)] * 3


def test_nothing_is_differentiated():
    drawn = sample_from_logits(torch.randn(3, 5, requires_grad=True))
    assert not drawn.log_probs.requires_grad and not drawn.entropy.requires_grad


def test_compiles_to_one_graph():
    compiled = torch.compile(sample_from_logits, fullgraph=True, backend="aot_eager")
    for rows, width in ((4, 5), (6, 5), (4, 1200)):
        logits = torch.randn(rows, width, generator=seeded(1))
        torch.manual_seed(5)
        ours = compiled(logits, temperature=0.8)
        torch.manual_seed(5)
        torch.testing.assert_close(ours, sample_from_logits(logits, temperature=0.8))


def test_function_transforms_are_refused():
    with pytest.raises(NotImplementedError, match=r"sample_from_logits: torch\.func"):
        torch.func.vmap(sample_from_logits, randomness="different")(torch.randn(3, 2, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.randn(2, 3, 4)}, r"logits are \[2, 3, 4\]; expected \[M, V\]"),
        ({"logits": torch.randn(4)}, r"expected \[M, V\]"),
        ({"logits": torch.randn(3, 0)}, "V at least 1"),
        ({"logits": torch.ones(3, 4).long()}, "floating-point"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive"),
        ({"uniform": torch.rand(3, 2)}, r"uniform is \[3, 2\] torch.float32; expected \[3, 2\]"),
        ({"uniform": torch.rand(2, 2).double()}, r"uniform is \[2, 2\] .* expected \[3, 2\]"),
        ({"uniform": torch.ones(3, 2).double()}, r"outside \[0, 1\)"),
        ({"uniform": torch.rand(3, 2).double().to("meta")}, "uniform is on meta; expected cpu"),
        ({"uniform": torch.rand(3, 2).double(), "generator": seeded()}, "both generator and"),
        ({"mask": torch.ones(3, 4).bool()}, r"mask is \[3, 4\]"),
    ],
)
def test_bad_input_is_explained(change, message):
    with pytest.raises(ValueError, match=f"sample_from_logits: .*{message}"):
        sample_from_logits(**({"logits": torch.randn(3, 4)} | change))
