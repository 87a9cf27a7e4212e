"""KL coefficient controllers."""

from __future__ import annotations

import math

import pytest
import torch

from ppo_fast.kl_control import KLController


def test_fixed_coefficient_stays():
    controller = KLController(0.05)
    assert [controller.update(kl) for kl in (0.0, 1e-3, 50.0)] == [0.05] * 3


def test_paper_rule_halves_below_and_doubles_above_and_waits_between():
    controller = KLController(1.0, target=0.03, rule="paper")
    assert controller.update(0.019) == 0.5  # 0.03 / 1.5 = 0.02
    assert controller.update(0.0201) == 0.5
    assert controller.update(0.0449) == 0.5  # 1.5 * 0.03 = 0.045
    assert controller.update(0.046) == 1.0
    assert controller.update(9.0) == 2.0
    assert controller.coef == 2.0


def test_proportional_rule_matches_numbers_by_hand():
    controller = KLController(0.2, target=6.0, rule="proportional", unit="seq", horizon=10_000)
    # error 6.6 / 6 - 1 = 0.1; 256 episodes: 1 + 0.1 * 256 / 10000
    assert controller.update(6.6, steps=256) == pytest.approx(0.2 * 1.00256, rel=1e-12)
    # clipped at +0.2 and -0.2
    before = controller.coef
    assert controller.update(600.0, steps=100) == pytest.approx(before * 1.002, rel=1e-12)
    before = controller.coef
    assert controller.update(0.0, steps=100) == pytest.approx(before * 0.998, rel=1e-12)


def test_proportional_rule_rests_at_the_target():
    controller = KLController(0.1, target=3.0, rule="proportional")
    assert controller.update(3.0, steps=500) == pytest.approx(0.1, rel=1e-15)


@pytest.mark.parametrize(("rule", "gain"), [("paper", 0.05), ("proportional", 1.0)])
def test_feedback_brings_the_kl_to_the_target(rule, gain):
    # A policy whose KL falls as the penalty rises: kl = gain / coef.
    controller = KLController(10.0, target=0.02, rule=rule, horizon=10)
    for _ in range(2000):
        controller.update(gain / controller.coef, steps=2)
    assert gain / controller.coef == pytest.approx(0.02, rel=0.5)


def test_negative_estimates_count_as_low():
    paper = KLController(1.0, target=0.1, rule="paper")
    assert paper.update(-0.5) == 0.5
    proportional = KLController(1.0, target=0.1, rule="proportional", horizon=100)
    assert proportional.update(-0.5, steps=10) == pytest.approx(0.98)


def test_reads_a_tensor():
    controller = KLController(1.0, target=0.1, rule="paper")
    assert controller.update(torch.tensor(1.0)) == 2.0
    assert isinstance(controller.coef, float)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
@pytest.mark.parametrize("rule", ["fixed", "paper", "proportional"])
def test_a_kl_that_is_not_finite_is_an_error_and_changes_nothing(rule, kl):
    controller = KLController(0.3, target=0.1, rule=rule)
    with pytest.raises(ValueError, match="kl is"):
        controller.update(kl)
    assert controller.coef == 0.3


def test_state_survives_a_round_trip():
    first = KLController(1.0, target=0.1, rule="paper", unit="seq")
    first.update(5.0)
    second = KLController(1.0, target=0.1, rule="paper", unit="seq")
    second.load_state_dict(first.state_dict())
    assert second.coef == 2.0
    assert second.update(5.0) == 4.0


def test_a_state_in_another_unit_is_refused():
    state = KLController(1.0, unit="seq").state_dict()
    with pytest.raises(ValueError, match="unit is 'seq'"):
        KLController(1.0, unit="token").load_state_dict(state)


def test_steps_that_could_turn_the_sign_are_refused():
    controller = KLController(1.0, target=0.1, rule="proportional", horizon=100)
    assert controller.update(0.0, steps=499) > 0
    with pytest.raises(ValueError, match="steps is 500"):
        controller.update(0.0, steps=500)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "pid"}, "rule is 'pid'"),
        ({"unit": "batch"}, "unit is 'batch'"),
        ({"coef": -0.1}, "coef is -0.1"),
        ({"coef": math.nan}, "coef is nan"),
        ({"coef": 0.0, "rule": "paper", "target": 0.1}, "coef is 0"),
        ({"rule": "paper"}, "target is None"),
        ({"rule": "paper", "target": 0.0}, "target is 0.0"),
        ({"rule": "proportional", "target": -1.0}, "target is -1.0"),
        ({"rule": "proportional", "target": math.nan}, "target is nan"),
        ({"rule": "proportional", "target": 1.0, "horizon": 0}, "horizon is 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KLController(**{"coef": 0.1, **arguments})
