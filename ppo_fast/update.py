"""The PPO update: epochs of shuffled minibatches, one optimizer step each. The only copy.

Nothing here reads a tensor as a Python number on a GPU: the target-KL stop, the adaptive learning
rate and the guard against non-finite gradients are decided by tensors, and all statistics leave in
one vector. On a CPU, where reading is free, the stop also ends the loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppo_fast.config import PPOConfig
from ppo_fast.results import PPO_STATS, PPOLoss
from ppo_fast.rollout import Batch

APPROX_KL = PPO_STATS.index("approx_kl")

# rsl_rl's bounds for the KL-adaptive learning rate.
ADAPTIVE_LR_MIN, ADAPTIVE_LR_MAX = 1e-5, 1e-2


class FlatAdam:
    """Adam over one flat buffer per dtype, with clipping and steps that a tensor can veto.

    Parameters and gradients become views into flat buffers, so zeroing, the global norm, clipping
    and Adam are one operation each, whatever the number of parameters. The parameters stay the
    module's own; load new values into them with `copy_` (as `load_state_dict` does).

    Args:
        parameters: the module's; those that need no gradient are left alone.
        learning_rate: kept as the 0-d float32 tensor `lr`, which may be changed in place.
        eps: Adam's epsilon.
        max_grad_norm: gradients are scaled down to this global norm.

    Raises:
        ValueError: no trainable parameter, or parameters on several devices.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        eps: float = 1e-5,
        max_grad_norm: float = 0.5,
    ) -> None:
        trainable = [p for p in parameters if p.requires_grad]
        if not trainable:
            raise ValueError("FlatAdam: the policy has no parameter that requires a gradient")
        devices = {p.device for p in trainable}
        if len(devices) > 1:
            raise ValueError(
                f"FlatAdam: parameters are on {sorted(map(str, devices))}; expected one device"
            )
        self.device = devices.pop()
        self.max_grad_norm = max_grad_norm
        self.lr = torch.tensor(learning_rate, dtype=torch.float32, device=self.device)
        self._flat = [
            _flatten([p for p in trainable if p.dtype == dtype])
            for dtype in dict.fromkeys(p.dtype for p in trainable)
        ]
        self._adam = torch.optim.Adam(self._flat, lr=self.lr, eps=eps, fused=True)
        # GradScaler's protocol: Adam's fused kernel leaves everything alone where found_inf is 1.
        self._adam.grad_scale = None  # type: ignore[attr-defined]
        self._create_state()

    def _create_state(self) -> None:
        # A vetoed step at zero gradients makes Adam allocate its moments without moving anything.
        self._adam.found_inf = torch.ones((), device=self.device)  # type: ignore[attr-defined]
        self._adam.step()

    def zero_grad(self) -> None:
        """Zero all gradients."""
        for flat in self._flat:
            assert flat.grad is not None
            flat.grad.zero_()

    def step(self, veto: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and step, unless `veto` (0-d bool) or a non-finite gradient forbids it.

        Returns:
            The gradient's global norm before clipping, 0-d float32, and whether it was finite,
            0-d bool.
        """
        gradients = [flat.grad for flat in self._flat]
        norms = [_norm(g) for g in gradients if g is not None]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        finite = norm.isfinite()
        if self.max_grad_norm != float("inf"):
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0)
            for gradient in gradients:
                assert gradient is not None
                gradient.mul_(scale.to(gradient.dtype))
        self._adam.found_inf = (~finite | veto).float()  # type: ignore[attr-defined]
        self._adam.step()
        return norm, finite

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The live state, by checkpoint name: copy into these to restore."""
        state = {f"{prefix}.lr": self.lr}
        for index, flat in enumerate(self._flat):
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state[f"{prefix}.{index}.{name}"] = self._adam.state[flat][name]
        return state


def _norm(gradient: Tensor) -> Tensor:
    # Half precision would overflow in the squares; double may not be narrowed on the way.
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dtype=dtype).float()


def _flatten(parameters: list[nn.Parameter]) -> nn.Parameter:
    flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    offset = 0
    for parameter in parameters:
        end = offset + parameter.numel()
        parameter.data = flat.data[offset:end].view(parameter.shape)
        parameter.grad = flat.grad[offset:end].view(parameter.shape)
        offset = end
    return flat


class UpdateStats(NamedTuple):
    """What an update reports; tensors on the update's device."""

    means: Tensor
    """[len(PPO_STATS)] means over the minibatches that were used"""
    first: Tensor
    """[len(PPO_STATS)] of the first minibatch, where the ratio is 1"""
    last_kl: Tensor
    """0-d, mean approx_kl of the last epoch that ran"""
    grad_norm: Tensor
    """0-d, mean gradient norm before clipping, of finite gradients"""
    steps: Tensor
    """0-d, optimizer steps taken"""
    skipped: Tensor
    """0-d, minibatches whose loss or gradient was not finite, and which were skipped"""
    stopped: Tensor
    """0-d, 1 if target_kl ended the update early"""


def ppo_update(
    loss: Callable[[Batch], PPOLoss],
    optimizer: FlatAdam,
    batch: Batch,
    config: PPOConfig,
    generator: torch.Generator,
) -> UpdateStats:
    """Run `update_epochs` passes of `num_minibatches` steps over a batch.

    Args:
        loss: the loss of a minibatch; its gradient flows to the optimizer's parameters.
        optimizer: steps once per minibatch.
        batch: M samples, M divisible by `num_minibatches`.
        config: `update_epochs`, `num_minibatches`, `target_kl`, `adaptive_lr_kl`.
        generator: draws a new permutation for every epoch, on the batch's device.

    Schulman et al. 2017 (arXiv:1707.06347), algorithm 1. With `target_kl`, the minibatch whose
    approx_kl exceeds it is not stepped on, nor is any after it.
    """
    device = optimizer.device
    zero = torch.zeros((), device=device)
    stopped = torch.zeros((), dtype=torch.bool, device=device)
    per_epoch = torch.zeros(config.update_epochs, len(PPO_STATS), device=device)
    used = torch.zeros(config.update_epochs, device=device)
    grad_norm, steps, skipped = zero.clone(), zero.clone(), zero.clone()
    first: Tensor | None = None
    for epoch in range(config.update_epochs):
        for minibatch in batch.minibatches(config.num_minibatches, generator):
            optimizer.zero_grad()
            result = loss(minibatch)
            result.loss.backward()
            stats = result.stats
            if first is None:
                first = stats
            if config.target_kl is not None:
                stopped = stopped | (stats[APPROX_KL] > config.target_kl)
            if config.adaptive_lr_kl is not None:
                _adapt_learning_rate(optimizer.lr, stats[APPROX_KL], config.adaptive_lr_kl)
            # A NaN loss may leave finite gradients, of the rows that were well.
            known = result.loss.detach().isfinite()
            norm, finite = optimizer.step(stopped | ~known)
            finite = finite & known
            going = (~stopped).float()
            stepped = going * finite
            # A skipped minibatch's NaN must not hide what the others did.
            per_epoch[epoch] += torch.where(stepped > 0, stats, zero)
            used[epoch] += stepped
            grad_norm += torch.where(finite, norm, zero) * going
            steps += stepped
            skipped += going - stepped
            if stopped.device.type == "cpu" and stopped:
                break
        if stopped.device.type == "cpu" and stopped:
            break
    assert first is not None
    ran = (used > 0).sum().clamp(min=1) - 1
    means = per_epoch.sum(0) / used.sum().clamp(min=1)
    last_kl = (per_epoch[:, APPROX_KL] / used.clamp(min=1)).gather(0, ran.reshape(1)).squeeze(0)
    return UpdateStats(
        means=means,
        first=first,
        last_kl=last_kl,
        grad_norm=grad_norm / steps.clamp(min=1),
        steps=steps,
        skipped=skipped,
        stopped=stopped.float(),
    )


def _adapt_learning_rate(lr: Tensor, kl: Tensor, desired: float) -> None:
    factor = torch.where(kl > 2 * desired, 1 / 1.5, torch.where(kl < desired / 2, 1.5, 1.0))
    # At the first minibatch the KL is 0 because nothing has moved yet, not because steps are small.
    factor = torch.where(kl > 0, factor, 1.0)
    lr.mul_(factor).clamp_(ADAPTIVE_LR_MIN, ADAPTIVE_LR_MAX)
