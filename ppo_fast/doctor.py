"""`ppo-fast doctor`: versions, devices, which backend serves each op and why, and a self-check."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast import functional
from ppo_fast.dispatch import Accelerated, current_backend
from ppo_fast.results import ActorCriticSpec

PACKAGES = ("torch", "triton", "numpy", "gymnasium", "nvtx", "safetensors", "tyro", "tensorboard")


def versions() -> dict[str, str]:
    """Installed version of each package the project touches, or "not installed"."""
    found = {"python": platform.python_version()}
    for package in ("ppo-fast", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> list[str]:
    """The CPU and every GPU torch sees, in words."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cpu, {torch.get_num_threads()} threads", *gpus]


def ops() -> dict[str, Callable[..., Any]]:
    """Every op of `ppo_fast.functional`, by name."""
    return {name: getattr(functional, name) for name in functional.__all__}


def served_by(op: Callable[..., Any], device: torch.device) -> tuple[str, str]:
    """The backend of an op, and why."""
    if isinstance(op, Accelerated):
        return op.explain(device)
    # Walks rows or tiles of logits; on a GPU rows, by the kernels of this op.
    inner: Any = functional.log_probs_from_logits
    return inner.explain(device)[0], f"as {inner.__name__}"


def self_checks(device: torch.device) -> dict[str, Callable[[], float]]:
    """A check per op: each returns its error against a definition in float64 written out here."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    def error(got: Tensor, want: Tensor) -> float:
        return float(((got.double() - want).abs() / (1 + want.abs())).max())

    logits, ref = randn(33, 17), randn(33, 17)
    index = torch.randint(17, (33,), generator=draw).to(device)
    old, advantages = randn(33), randn(33)
    log_p, log_q = logits.double().log_softmax(-1), ref.double().log_softmax(-1)
    taken = log_p.gather(-1, index[:, None]).squeeze(-1)
    surrogate = _surrogate(taken - old.double(), advantages.double())

    def check_gae() -> float:
        rewards, values, last = randn(9, 5), randn(9, 5), randn(5)
        terminated = torch.rand(9, 5, generator=draw).to(device) < 0.3
        got, _ = functional.gae(rewards, values, last, terminated, gamma=0.9, gae_lambda=0.8)
        want = torch.zeros(10, 5, dtype=torch.float64, device=device)
        following = torch.cat([values[1:], last[None]]).double()
        for t in reversed(range(9)):
            going = 1 - terminated[t].double()
            delta = rewards[t] + 0.9 * going * following[t] - values[t]
            want[t] = delta + 0.9 * 0.8 * going * want[t + 1]
        return error(got, want[:-1])

    def check_packed() -> float:
        rewards, values = randn(7), randn(7)
        ends = torch.zeros(7, dtype=torch.bool, device=device)
        bounds = torch.tensor([0, 3, 7], device=device)
        got, _ = functional.gae_packed(
            rewards, values, randn(2) * 0, ends, bounds, gamma=1.0, gae_lambda=1.0
        )
        sums = torch.cat(
            [part.flip(0).cumsum(0).flip(0) for part in rewards.double().split([3, 4])]
        )
        return error(got, sums - values)

    def check_gaussian() -> float:
        mean, log_std, actions = randn(33, 3), randn(3) * 0.1, randn(33, 3)
        normal = torch.distributions.Normal(mean.double(), log_std.double().exp())
        log_ratio = normal.log_prob(actions.double()).sum(-1) - old.double()
        got = functional.ppo_loss_from_gaussian(
            mean, log_std, actions, old, advantages, clip_coef=0.2
        )
        return error(got.policy_loss, _surrogate(log_ratio, advantages.double()))

    def check_gaussian_log_probs() -> float:
        mean, log_std, actions = randn(33, 3), randn(3) * 0.1, randn(33, 3)
        normal = torch.distributions.Normal(mean.double(), log_std.double().exp())
        got = functional.log_probs_from_gaussian(mean, log_std, actions)
        assert isinstance(got, Tensor)
        return error(got, normal.log_prob(actions.double()).sum(-1))

    def check_sample() -> float:
        torch_generator = torch.Generator(device).manual_seed(0)
        sample = functional.sample_from_logits(logits, generator=torch_generator)
        want = log_p.gather(-1, sample.actions[:, None]).squeeze(-1)
        return error(sample.log_probs, want)

    def check_loss() -> float:
        got = functional.ppo_loss(taken.float(), old, advantages, clip_coef=0.2)
        return error(got.policy_loss, surrogate)

    def check_loss_from_logits() -> float:
        got = functional.ppo_loss_from_logits(logits, index, old, advantages, clip_coef=0.2)
        return error(got.policy_loss, surrogate)

    def check_log_probs() -> float:
        got = functional.log_probs_from_logits(logits, index)
        assert isinstance(got, Tensor)
        return error(got, taken)

    def check_whiten() -> float:
        want = (old.double() - old.double().mean()) / (old.double().std() + 1e-8)
        return error(functional.masked_whiten(old), want)

    def check_actor_critic() -> float:
        spec = ActorCriticSpec(5, (), (16,), (16,), 4, "tanh", (4,))
        parameters, obs = 0.3 * randn(spec.num_parameters), randn(33, 5)
        actions = index % 4
        gradients = torch.empty_like(parameters)
        got = functional.actor_critic_loss_and_grads(
            *(parameters, gradients, spec, obs, actions, old - 1, advantages, old, old),
            clip_coef=0.2,
            ent_coef=0.01,
        )
        exact = parameters.double().requires_grad_()
        parts = exact.split([80, 16, 64, 4, 80, 16, 16, 1])
        logits, values = (
            (obs.double() @ w1.view(16, 5).t() + b1).tanh() @ w2.view(-1, 16).t() + b2
            for w1, b1, w2, b2 in (parts[:4], parts[4:])
        )
        log_p = logits.log_softmax(-1)
        taken = log_p.gather(-1, actions[:, None]).squeeze(-1)
        loss = _surrogate(taken - old.double() + 1, advantages.double())
        loss = loss + 0.25 * (values.squeeze(-1) - old.double()).square().mean()
        loss = loss + 0.01 * (log_p.exp() * log_p).sum(-1).mean()
        want = torch.cat((torch.autograd.grad(loss, exact)[0], loss.detach().reshape(1)))
        return error(torch.cat((gradients, got.loss.reshape(1))), want)

    def check_adam() -> float:
        ours, gradient = randn(33), randn(33)
        theirs = torch.nn.Parameter(ours.double())
        theirs.grad = gradient.double()
        norm = torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        torch.optim.Adam([theirs], lr=0.1, eps=1e-5).step()
        first, second, steps = (torch.zeros_like(ours[:size]) for size in (33, 33, 1))
        got = functional.clipped_adam_(
            *(ours, gradient, first, second, steps.squeeze(0), 0.1), max_grad_norm=0.5
        )
        return error(torch.cat((ours, got[:1])), torch.cat((theirs.detach(), norm.reshape(1))))

    def check_hidden() -> float:
        own = functional.log_probs_from_hidden(states, words, index)
        assert isinstance(own, Tensor)
        return error(own, of_words)

    def check_loss_from_hidden() -> float:
        got = functional.ppo_loss_from_hidden(states, words, index, old, advantages, clip_coef=0.2)
        return error(got.policy_loss, _surrogate(of_words - old.double(), advantages.double()))

    states, words = randn(33, 8), randn(logits.shape[1], 8)
    of_words = (states.double() @ words.double().t()).log_softmax(-1)
    of_words = of_words.gather(-1, index[:, None]).squeeze(-1)
    return {
        "log_probs_from_hidden": check_hidden,
        "ppo_loss_from_hidden": check_loss_from_hidden,
        "actor_critic_loss_and_grads": check_actor_critic,
        "clipped_adam_": check_adam,
        "gae": check_gae,
        "gae_packed": check_packed,
        "ppo_loss": check_loss,
        "ppo_loss_from_logits": check_loss_from_logits,
        "ppo_loss_from_gaussian": check_gaussian,
        "log_probs_from_gaussian": check_gaussian_log_probs,
        "log_probs_from_logits": check_log_probs,
        "kl_from_logits": lambda: error(
            functional.kl_from_logits(logits, ref), (log_p.exp() * (log_p - log_q)).sum(-1)
        ),
        "approx_kl": lambda: error(
            functional.approx_kl(taken.float(), old),
            (old.double() - taken).exp() - 1 - (old.double() - taken),
        ),
        "masked_whiten": check_whiten,
        "sample_from_logits": check_sample,
    }


def _surrogate(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    ratio = log_ratio.exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()


def report() -> tuple[str, bool]:
    """Everything as text, and whether all is well."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = ["versions"]
    lines += [f"  {name:14} {version}" for name, version in versions().items()]
    lines += ["devices", *(f"  {name}" for name in devices())]
    lines += [
        f"ops on {device} (backend {current_backend()}; largest relative error against float64)"
    ]
    well = True
    checks = self_checks(device)
    for name, op in ops().items():
        served, why = served_by(op, device)
        try:
            deviation = checks[name]()
            fine = deviation < 1e-4
            verdict = f"{'ok' if fine else 'WRONG'} {deviation:.1e}"
        except Exception as failure:
            why_not = str(failure).partition("\n")[0]
            fine, verdict = False, f"FAILED {type(failure).__name__}: {why_not}"
        well = well and fine
        lines.append(f"  {name:28} {served:10} {verdict:14} ({why})")
    lines.append("all is well" if well else "something is wrong: see the lines marked above")
    return "\n".join(lines), well
