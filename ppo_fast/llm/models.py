"""The roles of RLHF around Hugging Face models: policy, reference and critic."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.llm.forward import (
    LinearHead,
    choose_layout,
    disable_dropout,
    hidden_states,
    linear_head,
    logits_of,
    trunk_of,
    unwrapped,
)
from ppo_fast.llm.packing import Packed

FUSED_FROM = 4096
"""Smallest vocabulary whose head is fused of itself: below, logits are as fast."""


class Policy:
    """A causal LM seen by its response tokens: hidden states first, logits of as many as one likes.

    Args:
        model: a transformers causal LM, or a peft model of one. Its dropout is switched off.
        layout: see `choose_layout`.
        head_fp32: compute the head's product in the dtype of its weights, float32 as a rule, also
            under autocast (it lifts the ceiling of long trainings, ScaleRL, arXiv:2510.13786).
        head: "logits", "fused" for ops that hold none, "liger" for those with Liger's kernel where no
            gradient is wanted, or "auto" for fused where it pays.

    Attributes:
        model, trunk: the model, and the part of it that makes hidden states.
        layout: the layout in use.
        fused: the head for the fused ops; None where logits are made.
        liger: whether Liger's kernel gives log-probs without gradient.
        vocab_size: V.

    Raises:
        ValueError: the model is none, or its logits cannot be computed here.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: str = "auto",
        head_fp32: bool = False,
        head: str = "auto",
    ) -> None:
        base = unwrapped(model)
        words = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if words is None:
            raise ValueError(
                f"model is a {type(model).__name__}; expected a causal LM of transformers, with a "
                "head over the vocabulary"
            )
        disable_dropout(model)
        self.model = model
        self.trunk = trunk_of(model)
        self.layout = choose_layout(model, layout)
        self.head_fp32 = head_fp32
        self.vocab_size = words.weight.shape[0]
        self.fused = self._choose_head(head)
        self.liger = head == "liger"

    def _choose_head(self, head: str) -> LinearHead | None:
        found = None if head == "logits" else linear_head(self.model)
        more = found is None or (head == "liger" and found[1:] != (None, 1.0, None))
        if head in ("fused", "liger") and more:
            raise ValueError(
                f"head = {head!r}: the head of {type(unwrapped(self.model)).__name__} is more than a "
                f"linear layer{' without bias' if head == 'liger' else ''}; use head = 'auto'"
            )
        return found if head != "auto" or self.vocab_size >= FUSED_FROM else None

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.model.parameters()).device

    def active(self) -> AbstractContextManager[Any]:
        """Nothing to do: the model as it is, is the policy."""
        return nullcontext()

    def hidden(self, packed: Packed) -> Tensor:
        """[M, D]: hidden states that predict the response tokens."""
        return hidden_states(self.trunk, packed, self.layout)

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, V] of hidden states."""
        if not self.head_fp32:
            return logits_of(self.model, hidden)
        weight = unwrapped(self.model).get_output_embeddings().weight
        with torch.autocast(hidden.device.type, enabled=False):
            return logits_of(self.model, hidden.to(weight.dtype))


class AdaptersOff(Policy):
    """The reference of a LoRA policy: the same model with its adapters switched off."""

    def __init__(self, policy: Policy) -> None:
        self.__dict__.update(policy.__dict__)

    def active(self) -> AbstractContextManager[Any]:
        """Adapters are off inside the block."""
        return self.model.disable_adapter()  # type: ignore[operator]


def make_reference(policy: Policy, ref_model: nn.Module | None, layout: str) -> Policy:
    """The frozen policy that the KL penalty measures from.

    Args:
        policy: in training.
        ref_model: a model of its own; None means the policy's with adapters off, or else a copy of
            the policy as it is now.
        layout: of the reference.

    Raises:
        ValueError: `ref_model` shares parameters with the policy, or has another vocabulary.
    """
    if ref_model is None:
        if hasattr(policy.model, "disable_adapter"):
            return AdaptersOff(policy)
        ref_model = copy.deepcopy(policy.model)
    if share_parameters(ref_model, policy.model):
        raise ValueError(
            "ref_model is model, or shares parameters with it, and would be trained with it; pass a "
            "model of its own, or 'copy'"
        )
    head = "liger" if policy.liger else "logits" if policy.fused is None else "fused"
    reference = Policy(freeze(ref_model), layout, policy.head_fp32, head)
    if reference.vocab_size != policy.vocab_size:
        raise ValueError(
            f"ref_model has a vocabulary of {reference.vocab_size}, model of {policy.vocab_size}; "
            "expected the same"
        )
    return reference


def share_parameters(one: nn.Module, other: nn.Module) -> bool:
    """Whether a parameter belongs to both."""
    return not {id(p) for p in one.parameters()}.isdisjoint(id(p) for p in other.parameters())


def freeze(model: nn.Module) -> nn.Module:
    """Let no parameter of the model require a gradient."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


class Critic(nn.Module):
    """V of the state before every response token: a scalar head on the policy's trunk or its own.

    Args:
        trunk: a transformers model without head; None shares the policy's hidden states.
        head: D -> 1.
        layout: of the trunk.
    """

    def __init__(self, trunk: nn.Module | None, head: nn.Linear, layout: str) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.layout = layout

    def forward(self, packed: Packed, policy_hidden: Tensor) -> Tensor:
        """[M] float32 values, from the policy's hidden states [M, D] where the trunk is shared."""
        if self.trunk is not None:
            policy_hidden = hidden_states(self.trunk, packed, self.layout)
        with torch.autocast(policy_hidden.device.type, enabled=False):
            values = self.head(policy_hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values if values.dtype is torch.float64 else values.float()


def make_critic(policy: Policy, value_model: nn.Module | None, layout: str) -> Critic:
    """A critic from what the user has.

    Args:
        policy: whose trunk is shared where `value_model` is None.
        value_model: a sequence classifier with one label (as a reward model is; its head goes on),
            a module with `trunk` and `head`, or a causal LM, which gets a new head. Trained; of a
            peft model what peft trains.
        layout: of its trunk, see `choose_layout`.

    Raises:
        ValueError: a module without a trunk or head, with another vocabulary or number of labels,
            that shares parameters with the policy, or whose trunk cannot be computed here.
    """
    if value_model is None:
        size = unwrapped(policy.model).get_output_embeddings().weight.shape[1]
        return Critic(None, new_head(size).to(policy.device), policy.layout)
    if share_parameters(value_model, policy.model):
        raise ValueError(
            "value_model is model, or shares parameters with it; pass a model of its own, or None for "
            "a head on the policy's own trunk"
        )
    disable_dropout(value_model)
    own = getattr(value_model, "trunk", None)
    trunk = own if isinstance(own, nn.Module) else _trunk_below_head(value_model)
    head = _scalar_head(value_model, trunk, isinstance(own, nn.Module))
    embedded = trunk.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if embedded != unwrapped(policy.model).get_input_embeddings().weight.shape[0]:
        raise ValueError(
            f"value_model has a vocabulary of {embedded}, model of {policy.vocab_size}; expected the "
            "same"
        )
    # Adapters say themselves what of them is trained.
    if not hasattr(value_model, "get_base_model"):
        value_model.requires_grad_(True)
    head.requires_grad_(True)
    _fold_scale(value_model, head)
    return Critic(trunk, head, choose_layout(trunk, layout))


def _trunk_below_head(value_model: nn.Module) -> nn.Module:
    """The trunk of a transformers model that has a head."""
    trunk = trunk_of(value_model) if hasattr(unwrapped(value_model), "base_model") else value_model
    if trunk is unwrapped(value_model):
        raise ValueError(
            f"value_model is a {type(value_model).__name__}; expected a sequence classifier with one "
            "label, a causal LM, or None for a head on the policy's own trunk"
        )
    return trunk


def _scalar_head(value_model: nn.Module, trunk: nn.Module, reward_model: bool) -> nn.Linear:
    """The head D -> 1 of a classifier or reward model; a new one for a causal LM."""
    base = unwrapped(value_model)
    words = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if words is not None:
        device = next(trunk.parameters()).device
        return new_head(words.weight.shape[1]).to(device)
    head: Any = getattr(base, "head" if reward_model else "score", None)
    # peft keeps a trained copy of a classifier's head, and the original.
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save[head.active_adapters[0]]
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"value_model is a {type(value_model).__name__} without a linear layer 'score'; expected a "
            "sequence classifier made from a causal LM, or a causal LM"
        )
    if head.out_features != 1:
        raise ValueError(f"value_model has {head.out_features} labels; expected num_labels=1")
    return head


@torch.no_grad()
def _fold_scale(value_model: nn.Module, head: nn.Linear) -> None:
    """Put a reward model's gain and bias into its head: values are then in the scores' unit."""
    gain, bias = getattr(value_model, "gain", None), getattr(value_model, "bias", None)
    if isinstance(gain, Tensor) and isinstance(bias, Tensor):
        head.weight.mul_(gain)
        head.bias.mul_(gain).add_(bias)
        gain.fill_(1.0)
        bias.zero_()


def new_head(hidden_size: int) -> nn.Linear:
    """D -> 1, weights of standard deviation 1 / sqrt(D + 1), bias 0 (Stiennon et al. 2020)."""
    head = nn.Linear(hidden_size, 1)
    nn.init.normal_(head.weight, std=1 / math.sqrt(hidden_size + 1))
    nn.init.zeros_(head.bias)
    return head
