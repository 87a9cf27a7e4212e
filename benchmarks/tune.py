"""Time the kernels' tiles against their neighbours: `python tune.py`, on a GPU.

Kernels choose their tiles by fixed rules of shape and dtype, so that nothing is tuned at run time and
results repeat. This is where the rules come from: each case of the suite runs with the shipped tile
and with every candidate, in turns, and the table says what the best one would save. A person moves a
finding into the rule; a rule that is right saves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import bench_kernels
import ceilings
import timing
import torch
from cases import Case, cases
from harness import print_table, write_results

SHIPPED = "shipped"


class Knob(NamedTuple):
    """A function that chooses a kernel's tile, and others to put in its place."""

    ops: tuple[str, ...]
    module: str
    function: str
    candidates: dict[str, Callable[..., Any]]


def _gae(BT: int, BN: int, num_warps: int, chunks: int) -> Callable[..., Any]:
    return lambda T, N, time_axis, rows: (BT, BN, num_warps, min(chunks, -(-T // BT)))


def _row(K: int, num_warps: int) -> Callable[..., Any]:
    sizes = {"K": K, "W": 32 * num_warps, "num_warps": num_warps}
    return lambda V, itemsize: sizes | {"VEC": 16 // itemsize}


def _vocabulary(K: int, num_warps: int, each: int) -> Callable[..., Any]:
    row = _row(K, num_warps)
    extra = {"programs": 132 * each, "maxnreg": min(255, 2048 // num_warps // each)}
    return lambda V, itemsize: row(V, itemsize) | extra


KNOBS = (
    Knob(
        ("gae",),
        *("ppo_fast.kernels.gae", "_tiles"),
        {
            f"BT {BT}, BN {BN}, {warps} warps, {chunks} chunks": _gae(BT, BN, warps, chunks)
            for (BT, BN, warps), chunks in itertools.product(
                (
                    *((8, 32, 1), (16, 32, 1), (32, 32, 2), (64, 32, 4), (128, 32, 8)),
                    *((32, 8, 1), (128, 8, 4), (256, 1, 1), (1024, 1, 4), (2048, 1, 8)),
                ),
                [1, 4, 32],
            )
        },
    ),
    Knob(
        ("log_probs_from_logits",),
        *("ppo_fast.kernels.log_probs", "_long"),
        {f"K {K}, {w} warps": _row(K, w) for K in (1, 2, 4, 8) for w in (1, 2, 4, 8)},
    ),
    Knob(
        ("ppo_loss_from_logits",),
        *("ppo_fast.kernels._vocabulary", "_tile"),
        {
            f"K {K}, {w} warps, {each} a multiprocessor": _vocabulary(K, w, each)
            for K, (w, each) in itertools.product(
                (2, 4, 8), ((16, 1), (8, 1), (8, 2), (4, 4), (4, 2), (2, 8))
            )
        },
    ),
)


@contextlib.contextmanager
def chosen(knob: Knob, name: str) -> Iterator[None]:
    """Put a candidate in the place of the shipped rule."""
    module = importlib.import_module(knob.module)
    shipped = getattr(module, knob.function)
    setattr(module, knob.function, shipped if name == SHIPPED else knob.candidates[name])
    try:
        yield
    finally:
        setattr(module, knob.function, shipped)


def _arm(case: Case, knob: Knob, name: str, inputs: Any, upstream: Any) -> Callable[[], Any]:
    call = bench_kernels.our_arm(case)(inputs, upstream)

    def run() -> Any:
        with chosen(knob, name):
            return call()

    return run


def tune(case: Case, knob: Knob, rounds: int) -> list[dict[str, Any]]:
    """A row for each candidate that runs and agrees with the shipped tile, the fastest first."""
    inputs, upstream = bench_kernels.new_inputs(case)
    expected = _arm(case, knob, SHIPPED, inputs, upstream)()
    arms = {}
    for name in (SHIPPED, *knob.candidates):
        run = _arm(case, knob, name, inputs, upstream)
        try:
            got = run()
            for x, y in zip(got.values(), expected.values(), strict=True):
                torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2 * float(y.abs().max()))
        except Exception as error:
            print(f"{case.label} {case.name}, {name}: {str(error).splitlines()[0]}", flush=True)
            continue
        arms[name] = [run]
    measured = timing.measure(arms, rounds)
    shipped = measured[SHIPPED].timing.median
    rows = [
        {
            "op": case.label,
            "case": case.name,
            "pass": case.passes,
            "tile": name,
            "median_us": found.timing.median * 1e6,
            "of shipped": found.timing.median / shipped,
        }
        for name, found in measured.items()
    ]
    return sorted(rows, key=lambda row: row["median_us"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it without a GPU")
    parser.add_argument("--only", nargs="+", default=[], help="words of which a case has one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="write a file under results/")
    arguments = parser.parse_args(argv)
    print(ceilings.measure())
    rows = []
    for case, knob in itertools.product(cases(arguments.tiny), KNOBS):
        wanted = any(word in f"{case.label} {case.name}" for word in arguments.only)
        if case.label not in knob.ops or (arguments.only and not wanted):
            continue
        found = tune(case, knob, arguments.rounds)
        print_table(found[:5] + [row for row in found if row["tile"] == SHIPPED])
        rows += found
    if arguments.json and not arguments.tiny:
        print(f"wrote {write_results('tune', rows)}")


if __name__ == "__main__":
    main()
