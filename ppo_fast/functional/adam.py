"""Clipping by the global norm and a step of Adam over one flat buffer, decided on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_fast.dispatch import accelerated
from ppo_fast.functional._rows import may_ask

Scalar = float | Tensor

OP = "clipped_adam_"


def _validate(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: Scalar,
    *,
    max_grad_norm: Scalar,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-5,
    loss: Tensor | None = None,
    veto: Tensor | None = None,
    square_sums: Tensor | None = None,
) -> None:
    if parameters.ndim != 1 or not parameters.is_floating_point():
        raise ValueError(
            f"{OP}: parameters is {list(parameters.shape)} {parameters.dtype}; expected [P] of a "
            "floating dtype"
        )
    buffers = {"gradients": gradients, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, x in {"parameters": parameters, **buffers}.items():
        if x.shape != parameters.shape or x.dtype != parameters.dtype or not x.is_contiguous():
            raise ValueError(
                f"{OP}: {name} is {list(x.shape)} {x.dtype}, of strides {x.stride()}; expected a "
                f"contiguous {list(parameters.shape)} {parameters.dtype}, as parameters"
            )
    if steps.ndim != 0 or steps.dtype != torch.float32:
        raise ValueError(
            f"{OP}: steps is {list(steps.shape)} {steps.dtype}; expected 0-d torch.float32"
        )
    scalars = {"lr": lr, "max_grad_norm": max_grad_norm, "loss": loss, "veto": veto}
    for name, scalar in scalars.items():
        if isinstance(scalar, Tensor) and scalar.ndim != 0:
            raise ValueError(f"{OP}: {name} is {list(scalar.shape)}; expected a 0-d tensor")
    if not isinstance(max_grad_norm, Tensor) and not max_grad_norm > 0:
        raise ValueError(f"{OP}: max_grad_norm is {max_grad_norm}; expected a number > 0")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{OP}: {name} is {beta}; expected a number in [0, 1)")
    if veto is not None and veto.dtype != torch.bool:
        raise ValueError(f"{OP}: veto is {veto.dtype}; expected torch.bool")
    if square_sums is not None and (
        square_sums.ndim != 1 or square_sums.dtype != torch.float32 or square_sums.numel() == 0
    ):
        raise ValueError(
            f"{OP}: square_sums is {list(square_sums.shape)} {square_sums.dtype}; expected [B] "
            "torch.float32 with B at least 1"
        )


@accelerated(
    validate=_validate, mutates=("parameters", "gradients", "exp_avg", "exp_avg_sq", "steps")
)
@torch.no_grad()
def clipped_adam_(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: Scalar,
    *,
    max_grad_norm: Scalar,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-5,
    loss: Tensor | None = None,
    veto: Tensor | None = None,
    square_sums: Tensor | None = None,
) -> Tensor:
    """Scale the gradients down to a global norm and take a step of Adam, or none.

    With g the gradients times min(1, max_grad_norm / (norm + 1e-6)) and t the step's number,

        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2,
        parameters -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    as `torch.nn.utils.clip_grad_norm_` and `torch.optim.Adam` do it (Kingma and Ba 2015,
    arXiv:1412.6980). Nothing is changed, `steps` included, unless the norm and the loss are finite
    and there is no veto. A NaN loss may leave finite gradients, of the rows that were well; so it is
    asked too. On a GPU nothing is read back.

    Args:
        parameters, exp_avg, exp_avg_sq: [P] of one floating dtype, contiguous; changed in place.
        gradients: [P], likewise; scaled in place where a step is taken.
        steps: 0-d float32, steps taken before; incremented.
        lr: a number or a 0-d tensor.
        max_grad_norm: a number or a 0-d tensor; infinity clips nothing.
        beta1, beta2, eps: Adam's.
        loss: 0-d, whose being finite is asked too.
        veto: 0-d bool, True to take no step.
        square_sums: [B] float32 that add up to the sum of squares of the gradients, if it is known:
            the kernel of `actor_critic_loss_and_grads` leaves it as `workspace.square_sums`.

    Returns:
        Tensor: [2] float32, the gradients' norm before clipping, and 1 if norm and loss were finite,
        else 0.

    Raises:
        ValueError: buffers that do not match, a dtype or a number out of place.
    """
    _validate(
        parameters,
        gradients,
        exp_avg,
        exp_avg_sq,
        steps,
        lr,
        max_grad_norm=max_grad_norm,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        loss=loss,
        veto=veto,
        square_sums=square_sums,
    )
    if square_sums is not None:
        norm = square_sums.sum().sqrt()
    else:
        # Half precision would overflow in the squares; double may not be narrowed on the way.
        wide = torch.promote_types(gradients.dtype, torch.float32)
        norm = torch.linalg.vector_norm(gradients, dtype=wide)
    forbidden: Tensor | None
    if may_ask(parameters):
        size, height = float(norm), 0.0 if loss is None else float(loss)
        is_finite = math.isfinite(size) and math.isfinite(height)
        if not is_finite or (veto is not None and veto):
            return torch.tensor([size, float(is_finite)])
        limit = float(max_grad_norm)
        if size + 1e-6 > limit:
            gradients.mul_(limit / (size + 1e-6))
        steps.add_(1.0)
        result, forbidden = torch.tensor([size, 1.0]), None
    else:
        # False for NaN too.
        finite = (norm if loss is None else norm + loss.abs()) < math.inf
        skip = ~finite if veto is None else ~finite | veto
        scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        gradients.mul_(torch.where(skip, 1.0, scale).to(gradients.dtype))
        forbidden = skip.float()
        steps.add_(1 - forbidden)
        result = torch.stack((norm.float(), finite.float()))
    # torch.optim.Adam(fused=True) without its bookkeeping, which takes three times as long as the
    # arithmetic on a small network. The kernel does nothing where found_inf is 1.
    torch._fused_adam_(
        [parameters],
        [gradients],
        [exp_avg],
        [exp_avg_sq],
        [],
        [steps],
        amsgrad=False,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
        grad_scale=None,
        found_inf=forbidden,
    )
    return result
