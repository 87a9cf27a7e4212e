"""The PPO loss, forward and backward on the CPU, against its peers: `python bench_ppo_loss.py`.

The peers' formulas are written out as their training loops run them, diagnostics included; torchrl's
own `ClipPPOLoss` runs if installed. `autograd` is the leanest formula: no `torch.distributions` and
no diagnostics. Every arm's loss and gradients are checked against float64 first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import compare, print_table, timing_rows, write_results
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal

from ppo_fast.functional.ppo_loss import ppo_loss, ppo_loss_from_gaussian, ppo_loss_from_logits

CLIP, ENT, VF = 0.2, 0.01, 0.5
Rows = dict[str, Tensor]
Arm = Callable[[Rows], Tensor]
INPUTS = ("logits", "mean", "log_std", "log_probs", "values")
"""The inputs that get a gradient."""


def whitened(advantages: Tensor) -> Tensor:
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def clipped(advantages: Tensor, ratio: Tensor) -> Tensor:
    return torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - CLIP, 1 + CLIP))


def value_loss(r: Rows) -> Tensor:
    """CleanRL's, with value clipping."""
    near = r["old_values"] + torch.clamp(r["values"] - r["old_values"], -CLIP, CLIP)
    squares = torch.max((r["values"] - r["returns"]) ** 2, (near - r["returns"]) ** 2)
    return 0.5 * squares.mean()


def policy_of(r: Rows) -> Any:
    if "logits" in r:
        return Categorical(logits=r["logits"])
    return Independent(Normal(r["mean"], r["log_std"].expand_as(r["mean"]).exp()), 1)


def cleanrl(r: Rows) -> Tensor:
    policy = policy_of(r)
    log_ratio = policy.log_prob(r["actions"]) - r["old_log_probs"]
    ratio = log_ratio.exp()
    with torch.no_grad():
        old_approx_kl = (-log_ratio).mean()  # noqa: F841
        approx_kl = ((ratio - 1) - log_ratio).mean()  # noqa: F841
        ((ratio - 1.0).abs() > CLIP).float().mean().item()
    pg_loss = clipped(whitened(r["advantages"]), ratio).mean()
    return pg_loss - ENT * policy.entropy().mean() + value_loss(r) * VF


def sb3(r: Rows) -> Tensor:
    """`PPO.train`, with its five reads to the host; the value loss is CleanRL's, to be comparable."""
    policy = policy_of(r)
    log_prob, entropy = policy.log_prob(r["actions"]), policy.entropy()
    advantages = whitened(r["advantages"])
    ratio = torch.exp(log_prob - r["old_log_probs"])
    first = advantages * ratio
    policy_loss = -torch.min(first, advantages * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)).mean()
    policy_loss.item()
    torch.mean((torch.abs(ratio - 1) > CLIP).float()).item()
    values = value_loss(r)
    values.item()
    entropy_loss = -torch.mean(entropy)
    entropy_loss.item()
    with torch.no_grad():
        log_ratio = log_prob - r["old_log_probs"]
        torch.mean((torch.exp(log_ratio) - 1) - log_ratio).cpu().numpy()
    return policy_loss + ENT * entropy_loss + VF * values


def lean(r: Rows) -> Tensor:
    if "logits" in r:
        log_p = torch.log_softmax(r["logits"], -1)
        log_probs = log_p.gather(1, r["actions"].unsqueeze(1)).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
    else:
        z = (r["actions"] - r["mean"]) * (-r["log_std"]).exp()
        size = r["mean"].shape[-1]
        log_probs = -0.5 * z.square().sum(-1) - r["log_std"].sum() - size * 0.9189385332046727
        entropy = r["log_std"].sum() + size * 1.4189385332046727
    ratio = (log_probs - r["old_log_probs"]).exp()
    pg_loss = clipped(whitened(r["advantages"]), ratio).mean()
    return pg_loss - ENT * entropy + value_loss(r) * VF


def ours(r: Rows) -> Tensor:
    op = ppo_loss_from_logits if "logits" in r else ppo_loss_from_gaussian
    return op(**r, clip_coef=CLIP, vf_clip_coef=CLIP, ent_coef=ENT, vf_coef=VF, norm_adv=True).loss


def torchrl_arm(r: Rows) -> dict[str, Arm]:
    """`ClipPPOLoss` behind networks that only hand on what they are given."""
    try:
        from tensordict import TensorDict
        from tensordict.nn import TensorDictModule
        from torchrl.modules import OneHotCategorical, ProbabilisticActor
        from torchrl.objectives import ClipPPOLoss
    except ImportError:
        return {}
    hand_on = torch.nn.Identity
    actor = ProbabilisticActor(
        TensorDictModule(hand_on(), in_keys=["given_logits"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )
    critic = TensorDictModule(hand_on(), in_keys=["given_values"], out_keys=["state_value"])
    module = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=CLIP,
        entropy_coeff=ENT,
        critic_coeff=VF / 2,
        loss_critic_type="l2",
        normalize_advantage=True,
        clip_value=CLIP,
    )
    one_hot = torch.nn.functional.one_hot(r["actions"], r["logits"].shape[-1])

    def arm(r: Rows) -> Tensor:
        column = {name: row.unsqueeze(-1) for name, row in r.items() if name != "logits"}
        data = TensorDict(
            {
                "given_logits": r["logits"],
                "given_values": column["values"],
                "action": one_hot,
                "action_log_prob": r["old_log_probs"],
                "advantage": column["advantages"],
                "value_target": column["returns"],
                "state_value": column["old_values"],
            },
            batch_size=r["actions"].shape,
        )
        out = module(data)
        return out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]

    return {"torchrl ClipPPOLoss": arm}


def tokens_ours(r: Rows) -> Tensor:
    return ppo_loss(**r, clip_coef=CLIP, vf_clip_coef=CLIP, vf_coef=VF).loss


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def tokens_trl(r: Rows) -> Tensor:
    """`PPOTrainer` of TRL: two masked means, and the statistics it takes from a minibatch."""
    mask = r["mask"]
    log_ratio = r["log_probs"] - r["old_log_probs"]
    ratio = torch.exp(log_ratio)
    pg_losses, pg_losses2 = (
        -r["advantages"] * ratio,
        -r["advantages"] * torch.clamp(ratio, 1 - CLIP, 1 + CLIP),
    )
    pg_loss = masked_mean(torch.max(pg_losses, pg_losses2), mask)
    near = torch.clamp(r["values"], r["old_values"] - CLIP, r["old_values"] + CLIP)
    vf_losses1 = torch.square(r["values"] - r["returns"])
    vf_losses2 = torch.square(near - r["returns"])
    vf_loss = 0.5 * masked_mean(torch.max(vf_losses1, vf_losses2), mask)
    with torch.no_grad():
        masked_mean((pg_losses2 > pg_losses).float(), mask)
        masked_mean((vf_losses2 > vf_losses1).float(), mask)
        (0.5 * (log_ratio**2).mean(), ratio.mean())
    return pg_loss + VF * vf_loss


def batch(M: int, A: int, kind: str) -> Rows:
    r = {"advantages": torch.randn(M), "values": torch.randn(M), "returns": torch.randn(M)}
    r["old_values"] = r["values"] + 0.3 * torch.randn(M)
    if kind == "tokens":
        r["log_probs"] = -torch.randn(M).abs()
        r["old_log_probs"] = r["log_probs"] + 0.2 * torch.randn(M)
        r["mask"] = torch.rand(M) > 0.2
        return r
    if kind == "logits":
        r["logits"], r["actions"] = torch.randn(M, A), torch.randint(A, (M,))
    else:
        r["mean"], r["log_std"] = torch.randn(M, A), 0.1 * torch.randn(A)
        r["actions"] = r["mean"] + torch.randn(M, A)
    r["old_log_probs"] = policy_of(r).log_prob(r["actions"]) + 0.2 * torch.randn(M)
    return r


def step(arm: Arm, r: Rows) -> tuple[Tensor, ...]:
    loss = arm(r)
    return loss, *torch.autograd.grad(loss, [r[name] for name in INPUTS if name in r])


def check(name: str, arm: Arm, truth: Arm, r: Rows) -> None:
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in r.items()}
    for x in INPUTS:
        if x in exact:
            exact[x].requires_grad_()
    for got, want in zip(step(arm, r), step(truth, exact), strict=True):
        error = float((got.detach().double() - want.detach()).abs().max() / want.abs().max())
        # An element whose ratio meets the clip edge may fall on either side in fp32.
        if not error < 1e-4:
            raise SystemExit(f"{name}: off by {error:.3g} of the largest entry; not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write a file under results/")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    control: dict[str, Arm] = {"cleanrl": cleanrl, "stable-baselines3": sb3, "autograd": lean}
    cases = [
        *(
            ("logits", *shape)
            for shape in ((256, 4), (4096, 4), (4096, 18), (65536, 4), (512, 32000))
        ),
        *(("gaussian", *shape) for shape in ((64, 6), (4096, 6))),
        *(("tokens", M, 1) for M in (8192, 131072)),
    ]
    rows = []
    for kind, M, A in cases:
        r = batch(M, A, kind)
        for name in INPUTS:
            if name in r:
                r[name].requires_grad_()
        arms: dict[str, Arm] = {"ppo_fast": tokens_ours, "trl": tokens_trl}
        if kind != "tokens":
            arms = {"ppo_fast": ours} | control
        if kind == "logits":
            arms |= torchrl_arm(r)
        truth = tokens_trl if kind == "tokens" else lean
        for name, arm in arms.items():
            check(name, arm, truth, r)
        timings = compare({n: partial(step, arm, r) for n, arm in arms.items()}, arguments.rounds)
        shape = f"[{M}, {A}]" if kind != "tokens" else f"[{M}]"
        found = timing_rows(timings, "ppo_fast", input=kind, shape=shape, threads=arguments.threads)
        if kind == "logits" and "torchrl ClipPPOLoss" not in arms:
            found.append({"input": kind, "shape": shape, "case": "torchrl: absent"})
        print_table(found, f"{kind} {shape} float32, forward + backward, CPU")
        rows += found
    if arguments.json:
        print(f"\nwrote {write_results('ppo_loss', rows)}")


if __name__ == "__main__":
    main()
