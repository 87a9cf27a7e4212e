"""Controllers of a KL penalty's coefficient."""

from __future__ import annotations

import math
from typing import Any, Literal


class KLController:
    """A coefficient that is fixed, or moved after each update so that the KL nears a target.

    | rule | coefficient after an update that ended at KL d |
    |---|---|
    | fixed | unchanged |
    | paper | halved if d < target / 1.5, doubled if d > 1.5 target (Schulman et al. 2017, sec. 4) |
    | proportional | times 1 + clip(d / target - 1, -0.2, 0.2) steps / horizon (Ziegler et al. 2019) |

    Args:
        coef: starting coefficient.
        target: KL aimed at, in nats per `unit`.
        rule: "fixed", "paper" or "proportional".
        unit: what `update` is given: a mean per action ("token") or a mean of sums per sequence
            ("seq"). Only a label, but one that has to match the target.
        horizon: steps over which the proportional rule acts.

    Raises:
        ValueError: an unknown rule or unit, or an adaptive rule without a coefficient and a target
            above 0.
    """

    def __init__(
        self,
        coef: float,
        target: float | None = None,
        rule: Literal["fixed", "paper", "proportional"] = "fixed",
        unit: Literal["token", "seq"] = "token",
        horizon: float = 10_000,
    ) -> None:
        if rule not in ("fixed", "paper", "proportional"):
            raise ValueError(
                f"KLController: rule = {rule!r}; expected fixed, paper or proportional"
            )
        if unit not in ("token", "seq"):
            raise ValueError(f"KLController: unit = {unit!r}; expected token or seq")
        if not (coef >= 0 and math.isfinite(coef)):
            raise ValueError(f"KLController: coef = {coef}; expected a number >= 0")
        if rule != "fixed":
            if target is None or not (target > 0 and math.isfinite(target)):
                raise ValueError(
                    f"KLController: target = {target}; rule {rule!r} needs one above 0"
                )
            if coef == 0:
                raise ValueError(
                    f"KLController: coef = 0 stays 0 under rule {rule!r}; start above 0"
                )
        if not horizon > 0:
            raise ValueError(f"KLController: horizon = {horizon}; expected a number above 0")
        self.coef = float(coef)
        self.target = target
        self.rule = rule
        self.unit = unit
        self.horizon = horizon

    def update(self, kl: float, steps: int = 1) -> float:
        """Move the coefficient after an update, and return it.

        Args:
            kl: measured KL in nats per `unit`; estimates may be slightly negative.
            steps: actions (token) or sequences (seq) the update used, for the proportional rule.

        Raises:
            ValueError: `kl` is NaN or infinite.
        """
        if not math.isfinite(kl):
            raise ValueError(f"KLController: kl = {kl}; expected a finite number")
        if self.rule == "fixed":
            return self.coef
        assert self.target is not None
        if self.rule == "paper":
            if kl < self.target / 1.5:
                self.coef /= 2
            elif kl > self.target * 1.5:
                self.coef *= 2
        else:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * steps / self.horizon
        return self.coef

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the coefficient; the rest is configuration."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the coefficient of a `state_dict`."""
        self.coef = float(state["coef"])
