"""The `_from_hidden` ops on the CPU against whole logits: `python bench_linear_head.py`.

Log-probs without and with gradient, and the PPO loss with and without entropy bonus: time in turns in
this process, peak memory each in a process of its own. Every arm is checked against float64 first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import compare, print_table, timing_rows, write_results
from torch import Tensor

from ppo_fast.functional import (
    log_probs_from_hidden,
    log_probs_from_logits,
    ppo_loss,
    ppo_loss_from_hidden,
    ppo_loss_from_logits,
)

SHAPES = ("512x128256x512", "2048x50257x768", "256x32000x256")
OURS = "ppo_fast"
ENT_COEF = 0.01
MIB = 1 << 20


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    index: Tensor
    old_log_probs: Tensor
    advantages: Tensor

    @classmethod
    def new(cls, shape: str) -> Problem:
        """Rows x vocabulary x hidden size; logits of about unit variance, ratios about 1."""
        M, V, D = map(int, shape.split("x"))
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(M, D, generator=g)
        weight = torch.randn(V, D, generator=g).mul_(D**-0.5)
        index = torch.randint(V, (M,), generator=g)
        with torch.no_grad():
            old = log_probs_from_hidden(hidden, weight, index)
        old += 0.2 * torch.randn(M, generator=g)
        advantages = torch.randn(M, generator=g)
        return cls(hidden.requires_grad_(), weight.requires_grad_(), index, old, advantages)


alive: list[Tensor] = []
"""Logits of the textbook's arm until its pass ends, as a model's output holds them."""

Case = Callable[[Problem], Tensor]
"""From a problem to a number, the log-probs' sum or the loss; with graph where gradients are on."""


def textbook(p: Problem, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    logits = p.hidden @ p.weight.t()
    log_p = torch.log_softmax(logits, -1)
    chosen = log_p.gather(1, p.index.unsqueeze(1)).squeeze(1)
    alive.append(logits)
    return chosen, -(log_p.exp() * log_p).sum(-1) if with_entropy else None


def eager_log_probs(p: Problem) -> Tensor:
    return textbook(p, False)[0].sum()


def eager_loss(p: Problem, with_entropy: bool) -> Tensor:
    log_probs, entropy = textbook(p, with_entropy)
    options: dict[str, Any] = {"entropy": entropy, "ent_coef": ENT_COEF} if with_entropy else {}
    return ppo_loss(log_probs, p.old_log_probs, p.advantages, clip_coef=0.2, **options).loss


def whole_log_probs(p: Problem) -> Tensor:
    return log_probs_from_logits(p.hidden @ p.weight.t(), p.index).sum()


def whole_loss(p: Problem, with_entropy: bool) -> Tensor:
    ent_coef = ENT_COEF if with_entropy else 0.0
    terms = p.index, p.old_log_probs, p.advantages
    logits = p.hidden @ p.weight.t()
    return ppo_loss_from_logits(logits, *terms, clip_coef=0.2, ent_coef=ent_coef).loss


def our_log_probs(p: Problem) -> Tensor:
    return log_probs_from_hidden(p.hidden, p.weight, p.index).sum()


def our_loss(p: Problem, with_entropy: bool) -> Tensor:
    return ppo_loss_from_hidden(*p, clip_coef=0.2, ent_coef=ENT_COEF if with_entropy else 0.0).loss


CASES: dict[str, dict[str, Case]] = {
    "log_probs": {
        OURS: our_log_probs,
        "log_softmax": eager_log_probs,
        "log_probs_from_logits": whole_log_probs,
    },
    "loss": {
        OURS: partial(our_loss, with_entropy=False),
        "log_softmax": partial(eager_loss, with_entropy=False),
        "ppo_loss_from_logits": partial(whole_loss, with_entropy=False),
    },
    "loss, entropy": {
        OURS: partial(our_loss, with_entropy=True),
        "log_softmax": partial(eager_loss, with_entropy=True),
        "ppo_loss_from_logits": partial(whole_loss, with_entropy=True),
    },
}


def forward(case: Case, p: Problem) -> float:
    with torch.no_grad():
        found = float(case(p))
    alive.clear()
    return found


def both(case: Case, p: Problem) -> tuple[Tensor, Tensor]:
    """Forward and backward; the gradients of hidden states and weight."""
    p.hidden.grad = p.weight.grad = None
    case(p).backward()
    alive.clear()
    assert p.hidden.grad is not None
    assert p.weight.grad is not None
    return p.hidden.grad, p.weight.grad


PASSES: dict[str, Callable[[Case, Problem], object]] = {
    "forward": forward,
    "forward + backward": both,
}


def check(shape: str) -> None:
    """Compare all arms with the textbook in float64, on 32 rows of 4096 logits."""
    width = shape.split("x")[2]
    p = Problem.new(f"32x4096x{width}")
    exact = Problem(*(x.detach().double() if x.is_floating_point() else x for x in p))
    exact.hidden.requires_grad_()
    exact.weight.requires_grad_()
    for output, cases in CASES.items():
        want = both(cases["log_softmax"], exact)
        scale = [float(x.abs().max()) for x in want]
        for name, case in cases.items():
            value = forward(case, p) - forward(cases["log_softmax"], exact)
            for got, expected, largest in zip(both(case, p), want, scale, strict=True):
                error = float((got - expected).abs().max()) / largest
                if not max(error, abs(value) / 100) < 1e-5:
                    raise SystemExit(f"{name}: {output} is off by {error:.3g}; not timed")


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


def own_peak(output: str, name: str, what: str, shape: str) -> int:
    """Bytes that a case adds to this process at most; run once, in a process of its own."""
    p, case = Problem.new(shape), CASES[output][name]
    PASSES[what](case, Problem.new("8x64x8"))  # what libraries open once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    PASSES[what](case, p)
    return status("VmHWM") - before


def peak(output: str, name: str, what: str, shape: str, threads: int) -> float:
    """Peak memory in MiB beyond the inputs; the gradients included."""
    command = [sys.executable, __file__, "--threads", str(threads), "--peak", output, name, what]
    done = subprocess.run(
        [*command, shape], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return int(done.stdout) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write a file under results/")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x vocabulary x hidden")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(own_peak(*arguments.peak))
        return

    rows = []
    for shape in arguments.shapes:
        check(shape)
        p = Problem.new(shape)
        for output, cases in CASES.items():
            for what, run in PASSES.items():
                peaks = {name: peak(output, name, what, shape, arguments.threads) for name in cases}
                calls = {name: partial(run, case, p) for name, case in cases.items()}
                timings = compare(calls, rounds=arguments.rounds)
                labels = {"shape": shape, "output": output, "pass": what}
                found = timing_rows(timings, OURS, **labels, threads=arguments.threads)
                for row in found:
                    name = row["case"]
                    best = timings[OURS].min / timings[name].min
                    row["ours / this, minima"] = best
                    pairs = zip(timings[OURS].samples, timings[name].samples, strict=True)
                    row["ours / this, median"] = statistics.median(a / b for a, b in pairs)
                    row["peak_mib"] = peaks[name]
                    row["ours / this, peak"] = peaks[OURS] / peaks[name]
                print_table(found, f"[{shape}] float32, {output}, {what}, CPU")
                rows += found
    if arguments.json:
        print(f"\nwrote {write_results('linear_head', rows)}")


if __name__ == "__main__":
    main()
