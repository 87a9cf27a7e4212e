"""The PPO update: epochs of shuffled minibatches, one optimizer step each. The only copy.

Nothing here reads a tensor as a Python number on a GPU: the target-KL stop, the adaptive learning
rate and the guard against non-finite gradients are decided by tensors, and all statistics leave in
one vector. On a CPU, where reading is free, the stop also ends the loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ppo_fast.capture import may_read
from ppo_fast.config import PPOConfig
from ppo_fast.functional.adam import clipped_adam_
from ppo_fast.profiling import span
from ppo_fast.results import PPO_STATS, PPOLoss
from ppo_fast.rollout import Batch

Scalar = Tensor | float

APPROX_KL = PPO_STATS.index("approx_kl")

Samples = TypeVar("Samples", bound=Sized)

ONE = torch.ones(())
"""Adding a Python number to a small tensor takes twice as long."""

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
        critic: those of the parameters that learn at `critic_factor` times `lr`.
        critic_factor: a language model's critic often starts further from its goal than the policy.

    Raises:
        ValueError: no trainable parameter, or parameters on several devices.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        eps: float = 1e-5,
        max_grad_norm: float = 0.5,
        critic: Iterable[nn.Parameter] = (),
        critic_factor: float = 1.0,
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
        self.eps = eps
        apart = set() if critic_factor == 1.0 else {id(p) for p in critic}
        kinds = [(p.dtype, critic_factor if id(p) in apart else 1.0) for p in trainable]
        self._groups = [
            _Group.of([p for p, own in zip(trainable, kinds, strict=True) if own == kind], kind[1])
            for kind in dict.fromkeys(kinds)
        ]

    def flat(self, parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """The flat parameters [P] and gradients [P], if they hold exactly these, in this order.

        Raises:
            ValueError: they do not.
        """
        offset, group = 0, self._groups[0]
        for parameter in parameters:
            if parameter.data_ptr() != group.parameters[offset:].data_ptr():
                raise ValueError(
                    "FlatAdam: its buffer does not hold these parameters in this order"
                )
            offset += parameter.numel()
        if offset != group.parameters.numel() or len(self._groups) > 1:
            raise ValueError("FlatAdam: its buffers hold more than these parameters")
        return group.parameters, group.gradients

    def gradients(self) -> list[Tensor]:
        """The flat gradients, [P] each, of all parameters."""
        return [group.gradients for group in self._groups]

    def zero_grad(self) -> None:
        """Zero all gradients."""
        for group in self._groups:
            group.gradients.zero_()

    def step(
        self,
        loss: Tensor | None,
        veto: Tensor | None = None,
        square_sums: Tensor | None = None,
    ) -> tuple[Scalar, Scalar]:
        """Clip and step, unless the loss or a gradient is not finite, or `veto` forbids it.

        A NaN loss may leave finite gradients, of the rows that were well; so it is asked too.

        Args:
            loss: 0-d, or None where it need not be asked.
            veto: 0-d bool.
            square_sums: [B], adding up to the sum of squares of all gradients, if it is known.

        Returns:
            The gradient's global norm before clipping, and whether loss and gradient were finite:
            0-d tensors, or numbers on a CPU.
        """
        group = self._groups[0]
        if not may_read(self.device) and len(self._groups) == 1 and group.lr_factor == 1.0:
            norm, finite = clipped_adam_(
                group.parameters,
                group.gradients,
                group.exp_avg,
                group.exp_avg_sq,
                group.steps,
                self.lr,
                max_grad_norm=self.max_grad_norm,
                eps=self.eps,
                loss=loss,
                veto=veto,
                square_sums=square_sums,
            )
            return norm, finite.bool()
        norms = [_norm(group.gradients) for group in self._groups]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        if may_read(self.device):
            return self._step_by_numbers(float(norm), 0.0 if loss is None else float(loss), veto)
        # False for NaN too.
        finite = (norm if loss is None else norm + loss.abs()) < math.inf
        forbidden = (~finite if veto is None else ~finite | veto).float()
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0)
        for group in self._groups:
            group.gradients.mul_(scale.to(group.gradients.dtype))
            group.steps.add_(1 - forbidden)
            self._adam(group, forbidden)
        return norm, finite

    def _step_by_numbers(self, norm: float, loss: float, veto: Tensor | None) -> tuple[float, bool]:
        """The same with numbers, which are free to read on a CPU and spare ten operations a step."""
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite and not (veto is not None and veto):
            for group in self._groups:
                if norm + 1e-6 > self.max_grad_norm:
                    group.gradients.mul_(self.max_grad_norm / (norm + 1e-6))
                group.steps.add_(ONE)
                self._adam(group, None)
        return norm, finite

    def _adam(self, group: _Group, forbidden: Tensor | None) -> None:
        # torch.optim.Adam(fused=True) without its bookkeeping, which takes three times as long as
        # the arithmetic on a small network. The kernel does nothing where found_inf is 1.
        torch._fused_adam_(
            [group.parameters],
            [group.gradients],
            [group.exp_avg],
            [group.exp_avg_sq],
            [],
            [group.steps],
            amsgrad=False,
            lr=self.lr if group.lr_factor == 1.0 else self.lr * group.lr_factor,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
            grad_scale=None,
            found_inf=forbidden,
        )

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The live state, by checkpoint name: copy into these to restore."""
        state = {f"{prefix}.lr": self.lr}
        for index, group in enumerate(self._groups):
            state[f"{prefix}.{index}.step"] = group.steps
            state[f"{prefix}.{index}.exp_avg"] = group.exp_avg
            state[f"{prefix}.{index}.exp_avg_sq"] = group.exp_avg_sq
        return state


class _Group(NamedTuple):
    """Flat buffers of the parameters of one dtype and rate, and Adam's state of them."""

    parameters: Tensor
    gradients: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    """0-d float32"""
    lr_factor: float

    @classmethod
    def of(cls, parameters: list[nn.Parameter], lr_factor: float) -> _Group:
        """Make the parameters and their gradients views into new flat buffers."""
        flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        gradients = torch.zeros_like(flat)
        offset = 0
        for parameter in parameters:
            end = offset + parameter.numel()
            parameter.data = flat[offset:end].view(parameter.shape)
            parameter.grad = gradients[offset:end].view(parameter.shape)
            offset = end
        steps = torch.zeros((), device=flat.device)
        moments = (torch.zeros_like(flat), torch.zeros_like(flat))
        return cls(flat, gradients, *moments, steps, lr_factor)


def _norm(gradient: Tensor) -> Tensor:
    # Half precision would overflow in the squares; double may not be narrowed on the way.
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dtype=dtype).float()


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


class Minibatches(Protocol):
    """Computes the gradients of an update's minibatches, one after another."""

    def begin(self, epoch: int, order: Tensor) -> None:
        """Cut the samples, in the order `order` [M] int64, into the minibatches of an epoch."""

    def run(self, number: int) -> Tensor | None:
        """Leave the gradient of a minibatch, numbered over all epochs, in the parameters' `grad`.

        Returns its loss, or None where a loss that is not finite always shows in the gradient.
        """

    def approx_kl(self) -> Tensor:
        """Of the minibatch run last, 0-d."""

    def square_sums(self) -> Tensor | None:
        """[B], adding up to the sum of squares of the gradients left last, if it is known."""

    def stats(self) -> Tensor:
        """[S, len(PPO_STATS)] of all that were run."""


class Gathered:
    """Minibatches that a loss function gets as batches of their own."""

    def __init__(
        self, loss: Callable[[Batch], PPOLoss], optimizer: FlatAdam, batch: Batch, number: int
    ) -> None:
        self._loss, self._optimizer, self._batch, self._number = loss, optimizer, batch, number
        self._order: tuple[Tensor, ...] = ()
        self._stats: list[Tensor] = []

    def begin(self, epoch: int, order: Tensor) -> None:
        """See `Minibatches`."""
        self._order = order.tensor_split(self._number)

    def run(self, number: int) -> Tensor:
        """See `Minibatches`."""
        self._optimizer.zero_grad()
        result = self._loss(self._batch.take(self._order[number % self._number]))
        if result.loss.requires_grad:
            result.loss.backward()
        self._stats.append(result.stats)
        return result.loss.detach()

    def approx_kl(self) -> Tensor:
        """See `Minibatches`."""
        return self._stats[-1][APPROX_KL]

    def square_sums(self) -> None:
        """See `Minibatches`."""

    def stats(self) -> Tensor:
        """See `Minibatches`."""
        return torch.stack(self._stats)


def ppo_update(
    loss: Callable[[Samples], PPOLoss],
    optimizer: FlatAdam,
    batch: Samples,
    config: PPOConfig,
    generator: torch.Generator,
) -> UpdateStats:
    """Run `update_epochs` passes of `num_minibatches` steps over a batch.

    Args:
        loss: the loss of a minibatch: one whose gradient flows to the optimizer's parameters, or a
            detached one whose gradient is in the parameters' `grad` already. Its attribute
            `minibatches(batch, config) -> Minibatches`, where it has one, is used instead.
        optimizer: steps once per minibatch.
        batch: M samples; they are cut into minibatches of equal size, up to one row. A `Batch`, unless
            the loss has minibatches of its own.
        config: `update_epochs`, `num_minibatches`, `target_kl`, `adaptive_lr_kl`.
        generator: draws a new permutation for every epoch, on the batch's device.

    Schulman et al. 2017 (arXiv:1707.06347), algorithm 1. With `target_kl`, the minibatch whose
    approx_kl exceeds it is not stepped on, nor is any after it.
    """
    can_stop = may_read(optimizer.device)
    per_epoch = config.num_minibatches
    if hasattr(loss, "minibatches"):
        minibatches: Minibatches = loss.minibatches(batch, config)
    else:
        assert isinstance(batch, Batch)
        minibatches = Gathered(loss, optimizer, batch, per_epoch)  # type: ignore[arg-type]
    stopped: Tensor | None = None
    if config.target_kl is not None:
        stopped = torch.zeros((), dtype=torch.bool, device=optimizer.device)
    # One entry a minibatch; summed up once, after the last.
    norms: list[Scalar] = []
    stepped: list[Scalar] = []
    going: list[Tensor] = []
    for number in range(config.update_epochs * per_epoch):
        if number % per_epoch == 0:
            order = torch.randperm(len(batch), generator=generator, device=optimizer.device)
            minibatches.begin(number // per_epoch, order)
        with span("update/minibatch"):
            value = minibatches.run(number)
            if stopped is not None and config.target_kl is not None:
                stopped = stopped | (minibatches.approx_kl() > config.target_kl)
            if config.adaptive_lr_kl is not None:
                _adapt_learning_rate(optimizer.lr, minibatches.approx_kl(), config.adaptive_lr_kl)
            norm, finite = optimizer.step(value, stopped, minibatches.square_sums())
            norms.append(norm)
            if stopped is not None:
                going.append(~stopped)
                finite = going[-1] & finite
            stepped.append(finite)
        if can_stop and stopped is not None and stopped:
            break
    return _summarise(minibatches.stats(), norms, stepped, going, per_epoch, stopped)


def _summarise(
    rows: Tensor,
    norms: list[Scalar],
    stepped: list[Scalar],
    going: list[Tensor],
    per_epoch: int,
    stopped: Tensor | None,
) -> UpdateStats:
    used = _column(stepped, rows.device)
    # Selected, not multiplied: a skipped minibatch's NaN must not hide what the others did.
    rows_used = torch.where(used.unsqueeze(1), rows, 0.0)
    steps = used.sum().float()
    at_least_one = steps.clamp(min=1)
    epoch = torch.arange(len(stepped), device=used.device) // per_epoch
    last = used & (epoch == torch.where(used, epoch, -1).amax())
    kls = torch.where(last, rows[:, APPROX_KL], 0.0)
    return UpdateStats(
        means=rows_used.sum(0) / at_least_one,
        first=rows[0],
        last_kl=kls.sum() / last.sum().clamp(min=1),
        grad_norm=torch.where(used, _column(norms, rows.device), 0.0).sum() / at_least_one,
        steps=steps,
        skipped=(torch.stack(going).sum() if going else len(stepped)) - steps,
        stopped=torch.zeros_like(steps) if stopped is None else stopped.float(),
    )


def _column(entries: list[Scalar], device: torch.device) -> Tensor:
    tensors = [entry for entry in entries if isinstance(entry, Tensor)]
    return torch.stack(tensors) if tensors else torch.tensor(entries, device=device)


def _adapt_learning_rate(lr: Tensor, kl: Tensor, desired: float) -> None:
    factor = torch.where(kl > 2 * desired, 1 / 1.5, torch.where(kl < desired / 2, 1.5, 1.0))
    # At the first minibatch the KL is 0 because nothing has moved yet, not because steps are small.
    factor = torch.where(kl > 0, factor, 1.0)
    lr.mul_(factor).clamp_(ADAPTIVE_LR_MIN, ADAPTIVE_LR_MAX)
