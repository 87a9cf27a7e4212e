"""`log_probs_from_logits` on the CPU against the formulas of its peers: `python bench_log_probs.py`.

Log-probability alone and with entropy, forward alone and with the gradient. The peers' formulas are
written out here, float32 as they would run. Every arm is checked against float64 first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import compare, print_table, timing_rows, write_results
from torch import Tensor

from ppo_fast.functional.log_probs import log_probs_from_logits

SHAPES = ("256x2", "1024x4", "512x32000", "512x128256", "64x256000")
OURS = "log_probs_from_logits"
Outputs = tuple[Tensor, ...]
Op = Callable[[Tensor, Tensor], Outputs]


def gathered(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def naive(logits: Tensor, index: Tensor, with_entropy: bool) -> Outputs:
    log_p = torch.log_softmax(logits, -1)
    chosen = gathered(log_p, index)
    return (chosen, -(log_p.exp() * log_p).sum(-1)) if with_entropy else (chosen,)


def cross_entropy(logits: Tensor, index: Tensor) -> Outputs:
    return (-F.cross_entropy(logits, index, reduction="none"),)


def row_by_row(logits: Tensor, index: Tensor) -> Tensor:
    """What TRL (`selective_log_softmax`) and verl (`logprobs_from_logits_v2`) do in float32."""
    return gathered(logits, index) - torch.stack([torch.logsumexp(row, -1) for row in logits])


def trl(logits: Tensor, index: Tensor) -> Outputs:
    """With `entropy_from_logits`, by 128 rows."""
    entropy = []
    for chunk in logits.split(128):
        log_p = F.log_softmax(chunk, -1)
        entropy.append(-(log_p.exp() * log_p).sum(-1))
    return row_by_row(logits, index), torch.cat(entropy)


def verl(logits: Tensor, index: Tensor) -> Outputs:
    """With `entropy_from_logits`."""
    p = F.softmax(logits, -1)
    entropy = torch.logsumexp(logits, -1) - (p * logits).sum(-1)
    return row_by_row(logits, index), entropy


def whole_logsumexp(logits: Tensor, index: Tensor) -> Outputs:
    return (gathered(logits, index) - torch.logsumexp(logits, -1),)


def categorical(logits: Tensor, index: Tensor, with_entropy: bool) -> Outputs:
    distribution = torch.distributions.Categorical(logits=logits)
    chosen = distribution.log_prob(index)
    return (chosen, distribution.entropy()) if with_entropy else (chosen,)


def ours(logits: Tensor, index: Tensor, with_entropy: bool) -> Outputs:
    if with_entropy:
        return log_probs_from_logits(logits, index, with_entropy=True)
    return (log_probs_from_logits(logits, index),)


def arms(with_entropy: bool) -> dict[str, Op]:
    shared = {OURS: ours, "log_softmax": naive, "Categorical": categorical}
    found: dict[str, Op] = {
        name: partial(op, with_entropy=with_entropy) for name, op in shared.items()
    }
    if with_entropy:
        return found | {"trl": trl, "verl": verl}
    return found | {
        "trl, verl": lambda logits, index: (row_by_row(logits, index),),
        "logsumexp": whole_logsumexp,
        "cross_entropy": cross_entropy,
    }


def backward(op: Op, logits: Tensor, index: Tensor, upstream: Tensor) -> Tensor:
    outputs = op(logits, index)
    return torch.autograd.grad(outputs, logits, list(upstream[: len(outputs)]))[0]


def check(name: str, op: Op, logits: Tensor, index: Tensor, upstream: Tensor) -> None:
    """Compare outputs and gradient with float64, on three of the rows."""
    some = torch.tensor([0, 1, len(logits) - 1])
    leaf = logits.detach()[some].double().requires_grad_()
    outputs = op(logits, index)
    expected = naive(leaf, index[some], True)[: len(outputs)]
    (gradient,) = torch.autograd.grad(expected, leaf, list(upstream[: len(outputs), some].double()))
    got = {"gradient": backward(op, logits, index, upstream), "log_probs": outputs[0]}
    want = {"gradient": gradient, "log_probs": expected[0]}
    if len(outputs) == 2:
        got["entropy"], want["entropy"] = outputs[1], expected[1]
    for what, tensor in got.items():
        error = float((tensor.detach()[some].double() - want[what].detach()).abs().max())
        if not error < 1e-4:
            raise SystemExit(f"{name}: {what} is off by {error:.3g}; not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write a file under results/")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x vocabulary")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    rows = []
    for shape in arguments.shapes:
        M, V = map(int, shape.split("x"))
        logits = torch.randn(M, V).mul_(3).requires_grad_()
        index, upstream = torch.randint(V, (M,)), torch.randn(2, M)
        for with_entropy in (False, True):
            ops = arms(with_entropy)
            for name, op in ops.items():
                check(name, op, logits, index, upstream)
            cases = {
                "forward": {n: partial(op, logits.detach(), index) for n, op in ops.items()},
                "forward + backward": {
                    n: partial(backward, op, logits, index, upstream) for n, op in ops.items()
                },
            }
            for what, calls in cases.items():
                timings = compare(calls, rounds=arguments.rounds)
                output = "log_probs, entropy" if with_entropy else "log_probs"
                labels = {"shape": shape, "output": output, "pass": what}
                found = timing_rows(timings, OURS, **labels, threads=arguments.threads)
                print_table(found, f"[{M}, {V}] float32, {output}, {what}, CPU")
                rows += found
    if arguments.json:
        print(f"\nwrote {write_results('log_probs', rows)}")


if __name__ == "__main__":
    main()
