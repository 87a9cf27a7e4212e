"""Instructions an element, ours beside the peers' kernels, all compiled for sm_90 by one Triton.

`python aot_peers.py` needs no GPU, only the peers on PYTHONPATH (liger-kernel, trl, rl-triton,
rl_games); an absent one is reported as absent. Writes `results/aot-<date>-<commit>.json` with --json.

Counted are the instructions a lane issues in its hot loop, or in the whole kernel where there is no
loop, over the elements it handles there: loads, stores and addresses included. What a call costs
beyond that (launches, separate passes for what a kernel leaves out) is not in the figure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import aot
import torch
import triton
from harness import print_table, write_results

from ppo_fast.kernels._launch import Launch

V = 151936


class Peer(NamedTuple):
    """A peer's kernel as the peer launches it."""

    task: str
    name: str
    load: Callable[[], Any]
    args: tuple[Any, ...]
    meta: dict[str, Any]
    elements: float
    """Elements a lane handles in one turn of its loop, or in the whole kernel without one."""
    note: str = ""
    sweeps: int = 1
    """Loops over the elements, one after the other."""


class Ours(NamedTuple):
    """A kernel of a case of tests/kernels."""

    task: str
    case: str
    kernel: str
    elements: float
    sweeps: int = 1


def function(module: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(module), name)


def from_file(package: str, file: str, name: str) -> Callable[[], Any]:
    """A kernel out of one file, where importing its whole package would ask for much more."""

    def load() -> Any:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise ImportError(f"No module named {package!r}")
        path = Path(found.submodule_search_locations[0]) / file
        if not path.exists():
            raise ImportError(f"{package} has no {file}")
        spec = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    return load


def _peers() -> list[Peer]:
    logits = torch.empty(2, V, dtype=torch.bfloat16)
    index, row = torch.empty(2, dtype=torch.int64), torch.empty(2)
    rollout = torch.empty(1 << 14)
    trl = "trl", "kernels/logprob_entropy.py"
    forward = (logits, index, logits, row, row, row, row, 0, V, 0, 1, 0, 0, V, 2, 1.0, False, 1024)
    backward = (logits, index, logits, row, row, row, row, logits, 0, V, 0, 1, 0, 0, 0, V)
    selective = (logits, index, row, None, 0.9, 1, 1, 0, 0, 1, V, 2048)
    cross_entropy = {
        "X_ptr": logits,
        "X_stride": V,
        "Y_ptr": index,
        "Y_stride": 1,
        "weight_ptr": logits,
        "loss_ptr": row,
        "z_loss_ptr": None,
        "loss_stride": 1,
        "token_accuracy_ptr": None,
        "token_accuracy_stride": 0,
        "predicted_tokens_ptr": None,
        "predicted_tokens_stride": 0,
        "n_cols": V,
        "n_non_ignore": 2,
        "sum_non_ignore_weight": 2,
        "weight_sum": 0.0,
        "ignore_index": -100,
        "lse_square_scale": 0.0,
        "label_smoothing": 0.0,
        "reduction": "mean",
        "softcap": None,
        "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False,
        "RETURN_PREDICTED_TOKENS": False,
        "BLOCK_SIZE": 32768,
        "HAS_WEIGHT": False,
        "HAS_SOFTCAPPING": False,
        "HAS_GRADIENTS": True,
        "num_warps": 32,
    }
    gae = [
        Peer(
            *("gae", f"rl-triton, T = {T}", function("rl_triton.kernels.gae", "gae_fused_kernel")),
            (*[rollout] * 6, T, T, 0.99, 0.95),
            {"BLOCK_SIZE": T, "HAS_TRUNCATIONS": False, "HAS_BOOTSTRAP": True, "num_warps": warps},
            *(T / warps / 32, "advantages only, [N, T], flags in fp32"),
        )
        for T, warps in ((128, 2), (1024, 8), (4096, 16))
    ]
    serial = (*[rollout] * 6, 0.99, 0.95, 128, 1, 4096, 1, 4096, 1, 4096, 1, 4096, 1)
    return [
        Peer(
            *("log_probs and entropy, forward", "TRL", from_file(*trl, "_forward_kernel")),
            *(forward, {}, 8),
        ),
        Peer(
            *("log_probs and entropy, backward", "TRL", from_file(*trl, "_backward_kernel")),
            *((*backward, V, 2, 1.0, False, 1024, True, True), {}, 8),
        ),
        Peer(
            *("log_probs, forward", "Liger"),
            function("liger_kernel.ops.grpo_loss", "_selective_log_softmax_kernel"),
            *(selective, {"num_warps": 1, "num_stages": 4}, 64),
        ),
        Peer(
            *("loss and gradient from logits", "Liger cross_entropy"),
            function("liger_kernel.ops.cross_entropy", "liger_cross_entropy_kernel"),
            *((), cross_entropy, 32, "no policy ratio, no entropy, no clip", 2),
        ),
        *gae,
        Peer(
            *("gae", "rl_games, T = 128"),
            from_file("rl_games", "triton_kernels/gae_kernel.py", "_gae_kernel"),
            *(serial, {}, 1 / 128, "128 lanes do the work of one; advantages only"),
        ),
    ]


LOG_PROBS = "log_probs: 8192 x 151936"
OURS = (
    Ours("log_probs and entropy, forward", LOG_PROBS, "log_probs_kernel", 32),
    Ours("log_probs and entropy, backward", LOG_PROBS, "log_probs_grad_kernel", 16),
    Ours("log_probs, forward", f"{LOG_PROBS}, log-probs alone", "log_probs_kernel", 32),
    Ours(
        "loss and gradient from logits",
        *("vocabulary: 8192 x 151936", "vocabulary_loss_kernel", 32, 2),
    ),
    Ours("gae", "gae: 1024 x 32768", "gae_kernel", 16),
    Ours("gae", "gae: [8192, 128].t()", "gae_kernel", 8),
    Ours("gae", "gae: [8192, 1024].t()", "gae_kernel", 8),
)


def per_element(found: aot.Compiled, elements: float, sweeps: int) -> float:
    """Instructions of the hot loops, or of the whole kernel where there is none, over elements."""
    wide = [loop for loop in found.loops if loop.count("LDG.E.128")] or found.loops
    hot = sorted((loop.instructions for loop in wide), reverse=True)[:sweeps]
    return (sum(hot) if hot else sum(found.opcodes.values())) / elements


def _row(entry: Peer | Ours, name: str, found: aot.Compiled, note: str) -> dict[str, Any]:
    return {
        "task": entry.task,
        "kernel": name,
        "instructions an element": per_element(found, entry.elements, entry.sweeps),
        "registers": found.registers,
        "stack": found.stack,
        "note": note,
    }


def rows() -> list[dict[str, Any]]:
    """One row a kernel; a peer that is absent or does not compile says so."""
    found = []
    for ours in OURS:
        matching = [x for x in aot.inspected(ours.case) if x.kernel == ours.kernel]
        found.append(_row(ours, f"ppo_fast, {ours.case}", matching[-1], ""))
    for peer in _peers():
        try:
            kernel = peer.load()
        except ImportError as error:
            found.append({"task": peer.task, "kernel": peer.name, "note": f"absent: {error}"})
            continue
        compiled = aot.inspect(Launch(kernel, (1,), peer.args, peer.meta))
        found.append(_row(peer, peer.name, compiled, peer.note))
    return sorted(found, key=lambda row: row["task"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write a file under results/")
    arguments = parser.parse_args()
    found = rows()
    print_table(found, f"instructions an element on sm_90, triton {triton.__version__}")
    if arguments.json:
        print(f"\nwrote {write_results('aot', found)}")


if __name__ == "__main__":
    main()
