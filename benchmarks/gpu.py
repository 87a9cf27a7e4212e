"""Everything that needs a GPU, in one command: `make gpu`, or `python benchmarks/gpu.py`.

Runs the tests of the kernels and of the trainer (tests/gpu, tests/kernels), then the kernels' suite
(bench_kernels.py), the learner step and training on tensor environments (bench_learner.py) and, if
time is left, training against peers (bench_control.py, bench_llm.py), all inside --minutes, each in a
slice of its own that what ran before cannot eat up. Results go to benchmarks/results and, where OUT
names a folder, there too, after each case: nothing measured is lost where a command is cut off.

Without a GPU only `--tiny` runs: the same code, our kernels in Triton's interpreter, small sizes,
results in a temporary folder.

A lent machine needs Python 3.12, torch 2.11, triton 3.6 and, as wheels, what `import ppo_fast` takes
besides: gymnasium and farama-notifications. pytest, pytest-xdist, cloudpickle and numpy are usually
there. Peers are optional: liger-kernel, trl, cut-cross-entropy, verl, torchrl and tensordict from
PyPI; rl-triton and rl_games from their repositories. Once, here:

    echo /.whl/ >>.git/info/exclude
    python3 -m pip download --no-deps -d .whl gymnasium farama-notifications liger-kernel trl
    (cd <rl-triton> && python3 -m pip wheel --no-deps -w <here>/.whl .)

and there, with .whl carried:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site PPO_FAST_COMMIT=<commit> python3 benchmarks/gpu.py
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NEEDED = ("torch", "triton", "numpy", "gymnasium")
# Their evidence is the compiler's output, the interpreter's or the schemas': a GPU adds nothing.
NO_GPU_NEEDED = ("*mutants*", "*aot*", "*budget*", "*library*")
TAIL = 40
TEST_SECONDS, LEARNER_SECONDS = 150.0, 120.0
GRACE = 15.0
"""Seconds that a benchmark has for its tables once it is told to start nothing new."""
CONTROL_SECONDS, LLM_SECONDS = 45.0, 60.0
"""Left over, they are worth a training against a peer."""


def missing() -> list[str]:
    """Packages without which `import ppo_fast` fails here."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def environment(tiny: bool, on_gpu: bool) -> dict[str, str]:
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    found["PYTHONUNBUFFERED"] = "1"
    if tiny and not on_gpu:
        found["TRITON_INTERPRET"] = "1"
        found.setdefault("OMP_NUM_THREADS", "1")
    return found


def run(command: list[str], env: dict[str, str], seconds: float) -> tuple[int | None, list[str]]:
    """Run a command and show what it prints; (exit status, its lines). None: it was stopped."""
    with tempfile.TemporaryFile("w+") as log:
        # Its own process group: the workers a command starts are stopped with it.
        child = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = None
        log.seek(0)
        return status, log.read().splitlines()


def tests(env: dict[str, str], seconds: float, on_gpu: bool) -> tuple[bool, str]:
    """(whether they passed, one line about them)."""
    if importlib.util.find_spec("pytest") is None:
        return False, "not run: pytest is missing; carry it"
    command = [sys.executable, "-m", "pytest", "-p", "deadline"]
    command += ["-p", "no:cacheprovider", "--disable-warnings", "--continue-on-collection-errors"]
    command += [*(f"--ignore-glob={glob}" for glob in NO_GPU_NEEDED)]
    if on_gpu and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]  # compiling is what takes the time
    until = {"PPO_FAST_TESTS_UNTIL": str(time.time() + seconds)}
    status, lines = run([*command, "tests/gpu", "tests/kernels"], env | until, seconds + GRACE)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    shown = lines[-TAIL:] if status not in (0, None) else lines[-4:]
    print("\n".join(shown))
    if status is None:
        return False, f"stopped after {seconds + GRACE:.0f} s: {lines[-1] if lines else ''}"
    return status == 0, "; ".join([*[line[:150] for line in failed[:10]], lines[-1].strip("= ")])


def show_unfinished(module: str, lines: list[str]) -> None:
    """Print the tables of a benchmark that was stopped, from the file it kept up to date."""
    import json

    from harness import print_table

    files = [line.removeprefix("results: ") for line in lines if line.startswith("results: ")]
    if files:
        record = json.loads(Path(files[-1]).read_text(encoding="utf-8"))
        loaded = importlib.import_module(module)
        if module == "bench_kernels":
            print_table(loaded.summary(record))
        else:
            loaded.show(record)
    print(
        f"{module}.py was stopped; what it had measured is in {files[-1] if files else 'no file'}"
    )


def benchmark(
    module: str, flags: list[str], env: dict[str, str], seconds: float
) -> tuple[bool, str]:
    """Run a benchmark that takes --seconds; (whether it was complete, one line about it)."""
    if seconds <= 2 * GRACE:
        return False, "not run: no time was left"
    command = [sys.executable, str(HERE / f"{module}.py"), "--json"]
    command += ["--seconds", str(seconds - GRACE), *flags]
    began = time.monotonic()
    # Its own process: memory that the tests hold would be missing here.
    status, lines = run(command, env, seconds)
    print("\n".join(lines))
    took = f"{time.monotonic() - began:.0f} s"
    print(f"{module}.py took {took}", flush=True)
    if status is None:
        show_unfinished(module, lines)
        return False, f"stopped after {took}"
    return status == 0, f"{'complete' if status == 0 else 'see above'}, {took}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, and no GPU needed")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it")
    parser.add_argument(
        "--test-minutes", type=float, default=TEST_SECONDS / 60, help="for the tests, at most"
    )
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument(
        "--only", nargs="+", default=[], help="ops whose name contains one of these"
    )
    parser.add_argument("--out", help="folder for the results, in place of benchmarks/results")
    arguments = parser.parse_args()
    began = time.monotonic()
    if absent := missing():
        raise SystemExit(
            f"{', '.join(absent)} missing for {sys.executable}: carry wheels, as the text at the "
            f"head of {Path(__file__).name} says. Nothing was run."
        )
    import torch

    on_gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    if not on_gpu and not arguments.tiny:
        raise SystemExit(
            "no CUDA GPU here. Nothing was run; --tiny (make gpu ARGS=--tiny) tries all of it in "
            "Triton's interpreter."
        )
    env = environment(arguments.tiny, on_gpu)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if on_gpu else 'interpreter'}")

    def left() -> float:
        return 60 * arguments.minutes - (time.monotonic() - began)

    passed, said = True, "not asked for"
    if not arguments.no_tests:
        # The interpreter's own tests are CI's; a taste of them shows that they run from here.
        limit = 60 * min(arguments.test_minutes, 0.5 if not on_gpu else arguments.minutes / 2)
        passed, said = tests(env, limit, on_gpu)
        print(f"tests took {time.monotonic() - began:.0f} s", flush=True)

    flags = ["--tiny"] if arguments.tiny else []
    flags += ["--out", arguments.out] if arguments.out else []
    only = ["--only", *arguments.only] if arguments.only else []
    # Without a GPU a taste of each is enough, too.
    learner = LEARNER_SECONDS if on_gpu else min(LEARNER_SECONDS, 60 * arguments.minutes / 4)
    suite, suite_said = benchmark("bench_kernels", [*flags, *only], env, left() - learner)
    steps, steps_said = benchmark("bench_learner", flags, env, min(left(), learner))
    control = "not run: no time was left" if on_gpu else "not run: without a GPU it is `make bench`"
    if on_gpu and left() > CONTROL_SECONDS:
        command = [sys.executable, str(HERE / "bench_control.py"), "--device", "cuda"]
        command += ["--case", "cartpole-tensor", "pendulum-tensor", "--rounds", "1"]
        command += ["--only", "tensor", "rsl_rl", "--json"]
        status, lines = run(command, env, left())
        print("\n".join(lines))
        control = {None: "stopped", 0: "complete"}.get(status, "see above")
    llm = "not run: no time was left" if on_gpu else "not run: without a GPU it is `make bench`"
    if importlib.util.find_spec("transformers") is None:
        llm = "not run: transformers is missing"
    elif on_gpu and left() > LLM_SECONDS:
        command = [sys.executable, str(HERE / "bench_llm.py"), "--case", "qwen", "--rounds", "1"]
        status, lines = run([*command, "--updates", "2", "--json"], env, left())
        print("\n".join(lines))
        llm = {None: "stopped", 0: "complete"}.get(status, "see above")
    print(f"tests: {said}")
    print(f"kernels: {suite_said}")
    print(f"learner: {steps_said}")
    print(f"control: {control}")
    print(f"language models: {llm}")
    print(f"{time.monotonic() - began:.0f} s in all")
    raise SystemExit(0 if passed and suite and steps else 1)


if __name__ == "__main__":
    main()
