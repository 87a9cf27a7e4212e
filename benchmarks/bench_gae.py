"""`gae` on the CPU against Stable-Baselines3 and torchrl: `python bench_gae.py`.

Each peer gets the batch in its own layout beforehand, so that only its scan is timed. Every arm is
checked against float64 first; 1 % of the rows end an episode.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import compare, print_table, timing_rows, write_results
from torch import Tensor

from ppo_fast.functional.gae import gae, gae_packed

SHAPES = ((128, 8), (2048, 1), (128, 1024), (2048, 64))
GAMMA, LAMBDA = 0.99, 0.95
HYPER: dict[str, Any] = {"gamma": GAMMA, "gae_lambda": LAMBDA}


def expected_advantages(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Apply the definition in float64, row by row."""
    rewards, values, following = rewards.double(), values.double(), next_value.double()
    advantages, carry = torch.zeros_like(rewards), torch.zeros_like(following)
    for t in reversed(range(len(rewards))):
        target, carried = following, carry
        if truncated is not None and bootstrap_values is not None:
            target = torch.where(truncated[t], bootstrap_values[t].double(), target)
            carried = torch.where(truncated[t], 0.0, carried)
        target = torch.where(terminated[t], 0.0, target)
        carried = torch.where(terminated[t], 0.0, carried)
        advantage = rewards[t] + GAMMA * target - values[t] + GAMMA * LAMBDA * carried
        kept = torch.ones_like(terminated[t]) if mask is None else mask[t]
        advantages[t] = torch.where(kept, advantage, 0.0)
        carry = torch.where(kept, advantage, carry)
        following = torch.where(kept, values[t], following)
    return advantages


def check(name: str, advantages: Tensor, expected: Tensor) -> None:
    error = float((advantages.double() - expected).abs().max())
    if not error < 1e-4:
        raise SystemExit(f"{name}: advantages are off by {error:.3g}; not timed")


def stable_baselines3_arm(
    rewards: Tensor, values: Tensor, next_value: Tensor, terminated: Tensor, expected: Tensor
) -> dict[str, Callable[[], object]]:
    try:
        from gymnasium import spaces
        from stable_baselines3.common.buffers import RolloutBuffer
    except ImportError:
        return {}
    T, N = rewards.shape
    box, discrete = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)
    buffer = RolloutBuffer(T, box, discrete, "cpu", gae_lambda=LAMBDA, gamma=GAMMA, n_envs=N)
    buffer.rewards[:], buffer.values[:] = rewards.numpy(), values.numpy()
    buffer.episode_starts[1:] = terminated[:-1].numpy()
    last = terminated[-1].numpy()

    def arm() -> None:
        buffer.compute_returns_and_advantage(next_value, last)

    arm()
    check("stable-baselines3", torch.from_numpy(buffer.advantages), expected)
    return {"stable-baselines3": arm}


def torchrl_arms(
    rewards: Tensor, values: Tensor, next_value: Tensor, terminated: Tensor, expected: Tensor
) -> dict[str, Callable[[], object]]:
    try:
        from torchrl.objectives.value import functional
    except ImportError:
        return {}
    following = torch.cat((values[1:], next_value[None]))
    rows = (values, following, rewards, terminated, terminated)
    batch = [x.t().unsqueeze(-1).contiguous() for x in rows]  # [N, T, 1]
    arms: dict[str, Callable[[], object]] = {}
    for name in ("generalized_advantage_estimate", "vec_generalized_advantage_estimate"):
        estimate = getattr(functional, name)
        check(f"torchrl {name}", estimate(GAMMA, LAMBDA, *batch)[0].squeeze(-1).t(), expected)
        arms[f"torchrl {name}"] = partial(estimate, GAMMA, LAMBDA, *batch)
    return arms


def our_arms(
    rewards: Tensor, values: Tensor, next_value: Tensor, terminated: Tensor, expected: Tensor
) -> dict[str, Callable[[], object]]:
    T, N = rewards.shape
    truncated, bootstrap = torch.rand(T, N) < 0.01, torch.randn(T, N)
    # An autoreset row after each end, as Gymnasium's NEXT_STEP makes.
    mask = torch.cat((torch.ones(1, N, dtype=torch.bool), ~terminated[:-1]))
    rows: tuple[Any, ...] = rewards, values, next_value, terminated
    turned = tuple(x.t().contiguous().t() if x.ndim == 2 else x for x in rows)
    packed = (*(x.t().reshape(-1) for x in rows), torch.arange(N + 1) * T)
    with_truncated = (*rows, truncated, bootstrap)
    with_mask = (*rows, None, None, mask)

    check("gae", gae(*rows, **HYPER)[0], expected)
    check("gae, [B, T].t()", gae(*turned, **HYPER)[0], expected)
    check("gae_packed", gae_packed(*packed, **HYPER)[0].view(N, T).t(), expected)
    for arguments in (with_truncated, with_mask):
        check("gae, options", gae(*arguments, **HYPER)[0], expected_advantages(*arguments))
    return {
        "gae": lambda: gae(*rows, **HYPER),
        "gae, truncated": lambda: gae(*with_truncated, **HYPER),
        "gae, mask": lambda: gae(*with_mask, **HYPER),
        "gae, [B, T].t()": lambda: gae(*turned, **HYPER),
        "gae_packed": lambda: gae_packed(*packed, **HYPER),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write a file under results/")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    rows = []
    for T, N in SHAPES:
        rewards, values = torch.randn(2, T, N)
        next_value, terminated = torch.randn(N), torch.rand(T, N) < 0.01
        expected = expected_advantages(rewards, values, next_value, terminated)
        batch = (rewards, values, next_value, terminated, expected)
        arms = our_arms(*batch) | stable_baselines3_arm(*batch) | torchrl_arms(*batch)
        timings = compare(arms, rounds=arguments.rounds)
        found = timing_rows(timings, "gae", shape=f"[{T}, {N}]")
        for peer in ("stable-baselines3", "torchrl"):
            if not any(peer in name for name in arms):
                found.append({"shape": f"[{T}, {N}]", "case": f"{peer}: absent"})
        print_table(found, f"T={T}, N={N}, CPU, {arguments.threads} threads")
        rows += found
    if arguments.json:
        name = "gae" if arguments.threads == 1 else f"gae_{arguments.threads}_threads"
        print(f"\nwrote {write_results(name, rows)}")


if __name__ == "__main__":
    main()
