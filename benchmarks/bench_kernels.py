"""Every op against its reference, torch.compile and the peers' kernels: `python bench_kernels.py`.

On a GPU the arms are timed by graph replay at the shapes of the public records; on a CPU, at tiny
sizes, the same code runs our kernels in Triton's interpreter (TRITON_INTERPRET=1) or our references.
An arm is held against float64 first: a wrong one is said to be wrong and is not timed. `cases.py`
has the problems, `plain.py` what torch.compile gets, `peers/` an adapter for each peer.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ceilings
import plain
import timing
import torch
from cases import Case, Inputs, Named, cases, leaves_of, with_gradients
from harness import print_table, write_results
from peers import KERNEL_PEERS, NotHere, Prepare
from torch import Tensor

from ppo_fast.dispatch import backend
from ppo_fast.functional.log_probs import log_probs_from_logits

OURS, EAGER, COMPILED = "ppo_fast", "eager", "torch.compile"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1e-2}
"""Largest error of an output against float64, by its dtype; see `errors`."""

SLOW = 0.25
"""An arm whose call takes longer than this many seconds is timed by that one call."""


# --- arms: each prepares its inputs and returns the function that is timed


def native(case: Case, function: Callable[..., Any], mode: str | None) -> Prepare:
    """An arm that takes our arguments, in a forced backend or as a user calls it."""

    def prepare(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
        leaves = leaves_of(inputs)

        def call() -> Named:
            with torch.set_grad_enabled(case.gradient):
                return with_gradients(case.named(function(**inputs)), leaves, upstream)

        if mode is None:
            return call

        def forced() -> Named:
            with backend(mode):
                return call()

        return forced

    return prepare


def our_arm(case: Case) -> Prepare:
    if not ON_GPU and not INTERPRETED:
        return native(case, case.function or case.op, None)
    if case.op.kernel is None:
        raise NotHere(f"no kernel: {case.op.no_kernel}")
    # On a GPU as a user calls it, which is how its call time counts.
    ours = native(case, case.function or case.op, "triton" if INTERPRETED else None)

    def prepare(inputs: Inputs, upstream: Named) -> Callable[[], Named]:
        if case.function is None and (why := case.op.why_not_kernel(**inputs)):
            raise NotHere(f"no kernel: {why}")
        return ours(inputs, upstream)

    return prepare


def compiled_arm(case: Case) -> Prepare:
    if not case.compiled:
        raise NotHere("not compiled at this size")
    torch._dynamo.reset()
    how = "inductor" if ON_GPU else "aot_eager"
    return native(case, torch.compile(plain.of(case.op), backend=how, dynamic=False), None)


def arms_of(case: Case) -> Iterator[tuple[str, Callable[[], Prepare]]]:
    """Names of the arms, and what makes them or raises."""
    yield OURS, partial(our_arm, case)
    if ON_GPU or INTERPRETED:
        yield EAGER, lambda: native(case, case.function or case.op, "reference")
    yield COMPILED, partial(compiled_arm, case)
    for peer, package in KERNEL_PEERS.items():
        if importlib.util.find_spec(package) is None:
            continue
        try:
            found = importlib.import_module(f"peers.{peer}").arms(case)
        except Exception as error:
            yield package, partial(_raise, error)
            continue
        for name, prepare in found.items():
            yield name, partial(_same, prepare)


def _raise(error: Exception) -> Prepare:
    raise error


def _same(prepare: Prepare) -> Prepare:
    return prepare


# --- correctness


def truth(case: Case, inputs: Inputs, upstream: Named) -> Named:
    """Outputs and gradients in float64, by the reference."""

    def widened(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    wide = {name: widened(x) for name, x in inputs.items()}
    up = {name: x.double() for name, x in upstream.items()}
    return native(case, case.function or case.op, "reference")(wide, up)()


def errors(case: Case, got: Named, exact: Named, inputs: Inputs) -> Named:
    """Error of each output an arm gives, relative to the root mean square of the exact one.

    A loss is a mean of terms near 1 and may be near 0 itself: its error is taken as it is.
    """
    if "actions" in got:  # drawn at random: what counts is what is said about them
        rows = log_probs_from_logits.reference(
            inputs["logits"].detach().double(), got["actions"], with_entropy=True
        )
        exact = dict(zip(("log_probs", "entropy"), rows, strict=True))
    found = {}
    for name, want in exact.items():
        if name not in got:
            continue
        have = got[name].detach()
        if have.shape != want.shape:
            raise ValueError(f"{name} is {list(have.shape)}; expected {list(want.shape)}")
        scale = want.square().mean().sqrt()
        if not want.dim():
            scale = scale.clamp(min=1)
        found[name] = (have.double() - want).square().mean().sqrt() / scale
    return found


def faults(got: Named, found: Named) -> str:
    """Say which outputs are off, or nothing."""
    return ", ".join(
        f"{name} is off by {float(error):.2g}"
        for name, error in found.items()
        # NaN is no smaller than anything.
        if not float(error) <= TOLERANCE.get(got[name].dtype, 1e-4)
    )


# --- one case


def _row(case: Case, arm: str, status: str, **more: Any) -> dict[str, Any]:
    labels = {"op": case.label, "case": case.name, "pass": case.passes, "arm": arm}
    return {**labels, "status": status, **more}


def new_inputs(case: Case) -> tuple[Inputs, Named]:
    """Inputs, and gradients of the outputs where the backward is timed; a loss has gradient 1."""
    # Not a default device: that would lengthen every call of a torch function that is timed.
    with torch.device(DEVICE):
        inputs = case.make()
        if not case.gradient:
            return inputs, {}
        rows = len(next(iter(inputs.values())))
        upstream = {n: torch.ones(()) if n == "loss" else torch.randn(rows) for n in case.outputs}
        return inputs, upstream


def run_case(case: Case, limits: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Check and time every arm of a case; a row for each, whatever came of it."""
    torch.manual_seed(0)
    inputs, upstream = new_inputs(case)
    exact = truth(case, inputs, upstream)
    moved = case.bytes(inputs, _as_returned(case, inputs, exact))
    count = timing.number_of_sets(moved, limits["l2_bytes"] if ON_GPU else None)

    rows: dict[str, dict[str, Any]] = {}
    good: dict[str, Prepare] = {}
    for name, make in arms_of(case):
        try:
            prepare = make()
            call = prepare(inputs, upstream)
            with poisoned():
                got = call()  # compiles
            found = errors(case, got, exact, inputs)
            if wrong := faults(got, found):
                rows[name] = _row(case, name, f"wrong: {wrong}")
                continue
            seconds = _once(call)
            kept = {"outputs": [*got], "error": {n: float(e) for n, e in found.items()}}
            rows[name] = _row(case, name, "timed", **kept)
            if seconds > SLOW and ON_GPU:
                one = seconds * 1e6
                rows[name] |= {"median_us": one, "min_us": one, "max_us": one, "method": "one call"}
            else:
                good[name] = prepare
        except NotHere as reason:
            rows[name] = _row(case, name, f"not run: {reason}")
        except Exception as error:
            rows[name] = _failed(case, name, error)
        call = got = found = None  # type: ignore[assignment]
    exact = None  # type: ignore[assignment]
    _release()

    sets = [(inputs, upstream), *(new_inputs(case) for _ in range(count - 1))]
    ready: dict[str, timing.Arm] = {}
    for name, prepare in good.items():
        try:
            ready[name] = [prepare(*one) for one in sets]
        except Exception as error:
            rows[name] = _failed(case, name, error)
    for name, measured in timing.measure(ready, rounds).items():
        rows[name] |= {
            "median_us": measured.timing.median * 1e6,
            "min_us": measured.timing.min * 1e6,
            "max_us": measured.timing.max * 1e6,
            "method": measured.method,
            "host_us": measured.host_us,
            "call_us": measured.call_us,
            "peak_mb": measured.peak_mb,
        }
    _add_fractions(case, rows, moved, count, limits)
    del inputs, upstream, sets, ready, good
    _release()
    return list(rows.values())


def _as_returned(case: Case, inputs: Inputs, exact: Named) -> Named:
    """Results as they are written: float32, gradients in the dtype of what they belong to."""
    leaves = leaves_of(inputs)
    return {
        name: x.to("meta", leaves[name[2:]].dtype if name[:2] == "d " else _written(x))
        for name, x in exact.items()
    }


def _written(x: Tensor) -> torch.dtype:
    return torch.float32 if x.is_floating_point() else x.dtype


def _add_fractions(
    case: Case, rows: dict[str, dict[str, Any]], moved: int, sets: int, limits: dict[str, Any]
) -> None:
    ours = rows[OURS].get("median_us")
    for row in rows.values():
        row |= {"bytes": moved, "flops": case.flops, "sets": sets, "target_us": case.target_us}
        if (median := row.get("median_us")) is None:
            continue
        row["copy_fraction"] = moved / (median * 1e-6) / limits["copy_bytes_per_s"]
        row["matrix_fraction"] = case.flops / (median * 1e-6) / limits["matmul_flops_per_s"]
        row[f"times {OURS}"] = None if ours is None else median / ours


def _failed(case: Case, arm: str, error: Exception) -> dict[str, Any]:
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:300]
    place = f"{Path(where.filename).name}:{where.lineno}"
    _release()
    return _row(case, arm, f"failed: {type(error).__name__}: {said} ({place})")


def _once(call: Callable[[], object]) -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _release() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class poisoned:
    """Fill what `torch.empty` returns with NaN: an element that is left out then shows."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)
        self._warnings.__exit__(None, None, None)


# --- all cases


def absent_peers() -> list[str]:
    return [p for p in KERNEL_PEERS.values() if importlib.util.find_spec(p) is None]


def run(
    tiny: bool,
    only: list[str] | None,
    seconds: float | None,
    rounds: int,
    folder: Path | None,
    name: str = "kernels",
) -> tuple[Path, dict[str, Any]]:
    """Run the cases while there is time; the file is written anew after each of them."""
    end = None if seconds is None else time.monotonic() + seconds
    wanted = [c for c in cases(tiny) if not only or any(word in c.label for word in only)]
    with torch.device(DEVICE):
        limits = ceilings.measure()
    record: dict[str, Any] = {"ceilings": limits, "absent": absent_peers()}
    record |= {"tiny": tiny, "interpreted": INTERPRETED, "not_run": []}
    rows: list[dict[str, Any]] = []
    longest = 0.0
    path = write_results(name, rows, folder, **record)
    print(f"results: {path}")
    for case in wanted:
        if end is not None and time.monotonic() + longest > end:
            record["not_run"].append(f"{case.label} {case.name} {case.passes}")
            continue
        began = time.monotonic()
        try:
            found = run_case(case, limits, rounds)
        except Exception as error:
            found = [_failed(case, OURS, error)]
        rows += found
        longest = max(longest, time.monotonic() - began)
        print(f"{time.monotonic() - began:5.1f} s  {case.label} {case.name} {case.passes}")
        for row in found:
            if row["status"] != "timed" and not row["status"].startswith("not run: not compiled"):
                print(f"         {row['arm']}: {row['status']}")
        path = write_results(name, rows, folder, **record)
    path = write_results(name, rows, folder, **record)
    return path, record | {"rows": rows}


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a case: our time and share of the roofline, and how much longer the others take."""
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in record["rows"]:
        key = row["op"], row["case"], "fwd+bwd" if "backward" in row["pass"] else "fwd"
        line = lines.setdefault(key, {"op": key[0], "case": key[1], "pass": key[2]})
        if row["arm"] == OURS:
            timed = row["status"] == "timed"
            share = max(row.get("copy_fraction", 0.0), row.get("matrix_fraction", 0.0))
            line |= {
                "us": row["median_us"] if timed else row["status"][:40],
                "target": row.get("target_us"),
                "roof": f"{share:.0%}" if timed else None,
                "call us": row.get("call_us"),
            }
        elif row["status"] == "timed":
            ratio = row.get(f"times {OURS}")
            text = f"{ratio:.2f}x" if ratio is not None else f"{row['median_us']:.0f} us"
            column = row["arm"] if row["arm"] in (EAGER, COMPILED) else "peers"
            text = text if column != "peers" else f"{row['arm']} {text}"
            line[column] = f"{line[column]}, {text}" if column in line else text
    columns = ("op", "case", "pass", "us", "target", "roof", "call us", EAGER, COMPILED, "peers")
    return [{column: line.get(column) for column in columns} for line in lines.values()]


def troubles(record: dict[str, Any]) -> list[str]:
    """Arms of ours that are wrong or failed."""
    return [
        f"{row['op']} {row['case']} {row['pass']}: {row['status']}"
        for row in record["rows"]
        if row["arm"] == OURS and row["status"].startswith(("wrong", "failed"))
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write a file under results/")
    parser.add_argument("--tiny", action="store_true", help="small sizes; always without a GPU")
    parser.add_argument("--only", nargs="+", help="ops whose name contains one of these")
    parser.add_argument("--seconds", type=float, help="start no case after this long")
    parser.add_argument("--rounds", type=int, help="samples an arm")
    parser.add_argument("--out", type=Path, help="folder for the file, in place of results/")
    arguments = parser.parse_args(argv)
    # The interpreter computes masked elements too, infinite ones among them.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    tiny = arguments.tiny or not ON_GPU
    folder = arguments.out
    if folder is None and (tiny or not arguments.json):
        # Sizes that tell nothing about speed must not stand among the results.
        folder = Path(tempfile.mkdtemp(prefix="ppo-fast-bench-"))
    rounds = arguments.rounds or (15 if ON_GPU else 3)
    path, record = run(tiny, arguments.only, arguments.seconds, rounds, folder)
    if record["absent"]:
        print(f"absent: {', '.join(record['absent'])}")
    if record["not_run"]:
        print("not run, out of time: " + "; ".join(record["not_run"]))
    print_table(summary(record), f"x: times {OURS}; roof: share of the measured ceiling")
    print(f"\nwrote {path}")
    if wrong := troubles(record):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
