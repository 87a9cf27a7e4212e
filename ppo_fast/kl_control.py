"""The coefficient of a KL penalty, held fixed or steered towards a target KL.

Two rules from the literature: the PPO paper's doubling and halving, and the proportional controller
of the first RLHF papers. Both look at the KL of an iteration and set the coefficient of the next.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

RULES = ("fixed", "paper", "proportional")
UNITS = ("token", "seq")


class KLController:
    """`kl_coef` for `ppo_loss` (or for a KL reward), updated once an iteration.

        fixed:         the coefficient stays.
        paper:         halved where kl < target / 1.5, doubled where kl > 1.5 target
                       (Schulman et al. 2017, section 4, arXiv:1707.06347).
        proportional:  coef *= 1 + clip(kl / target - 1, -0.2, 0.2) steps / horizon
                       (Ziegler et al. 2019, section 2.2, arXiv:1909.08593; TRL, OpenRLHF, verl).

    `target` and the `kl` given to `update` must be in the same `unit`, nats per token or nats per
    sequence: they differ by the response length, a factor of hundreds, and mixing them drives the
    coefficient to 0 or infinity without an error. The controller cannot see which one it is given;
    the unit is stated for logs and checked when a state is loaded.

    Args:
        coef: first coefficient; positive for the adaptive rules, which only ever multiply it.
        target: KL to steer to, in nats per `unit`; needed by the adaptive rules.
        rule: "fixed", "paper" or "proportional".
        unit: "token" or "seq".
        horizon: steps over which a proportional coefficient changes by at most 20 %.

    Attributes:
        coef: the coefficient in force, a float.

    Raises:
        ValueError: rule or unit is another word, coef is negative, or an adaptive rule lacks a
            positive coef, target or horizon.
    """

    def __init__(
        self,
        coef: float,
        target: float | None = None,
        rule: str = "fixed",
        unit: str = "token",
        horizon: float = 10_000,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"KLController: rule is {rule!r}; expected one of {', '.join(RULES)}")
        if unit not in UNITS:
            raise ValueError(f"KLController: unit is {unit!r}; expected 'token' or 'seq'")
        if not (math.isfinite(coef) and coef >= 0):
            raise ValueError(f"KLController: coef is {coef}; expected a finite number >= 0")
        if rule != "fixed":
            if coef == 0:
                raise ValueError(
                    f"KLController: coef is 0, which rule {rule!r} can only multiply; start it "
                    "above 0 or use rule='fixed'"
                )
            if target is None or not (math.isfinite(target) and target > 0):
                raise ValueError(
                    f"KLController: target is {target}; rule {rule!r} expects a number > 0 (nats "
                    f"per {unit})"
                )
            if not horizon > 0:
                raise ValueError(f"KLController: horizon is {horizon}; expected a number > 0")
        self.coef = float(coef)
        self.target = target
        self.rule = rule
        self.unit = unit
        self.horizon = horizon

    def update(self, kl: float | Tensor, steps: float = 1) -> float:
        """Look at an iteration's mean KL and return the coefficient of the next.

        Args:
            kl: nats per `unit`; may be negative, as k1 estimates are. A tensor is read, which on a
                GPU waits for it.
            steps: what the iteration counts against `horizon`, in whatever that counts (Ziegler et
                al.: episodes, so the batch size). Only "proportional" reads it.

        Raises:
            ValueError: kl is not finite, or steps is so large against the horizon that one update
                could make the coefficient 0 or negative.
        """
        kl = float(kl)
        if not math.isfinite(kl):
            raise ValueError(
                f"KLController: kl is {kl}; expected a finite number. The policy or the reference "
                "gave a log-prob that is not finite, or the mean was over no tokens"
            )
        if self.rule == "fixed":
            return self.coef
        assert self.target is not None
        if self.rule == "paper":
            if kl < self.target / 1.5:
                self.coef /= 2
            elif kl > self.target * 1.5:
                self.coef *= 2
            return self.coef
        if not 0 <= steps < 5 * self.horizon:
            raise ValueError(
                f"KLController: steps is {steps} with horizon {self.horizon}; expected 0 <= steps < "
                "5 horizon, above which a low KL makes the coefficient negative; raise the horizon"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * steps / self.horizon
        return self.coef

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the coefficient, and the unit it is a price for."""
        return {"coef": self.coef, "unit": self.unit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; rule, target and horizon stay those of the constructor.

        Raises:
            ValueError: the state was saved with another unit.
        """
        if state["unit"] != self.unit:
            raise ValueError(
                f"KLController: the state's unit is {state['unit']!r}, this controller's "
                f"{self.unit!r}; expected the same, a coefficient per token is none per sequence"
            )
        self.coef = float(state["coef"])
