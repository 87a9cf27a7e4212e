"""Hidden states and logits of response tokens through any Hugging Face causal LM.

Two layouts: packed (see `attention.py`), and right-padded rows for models whose attention is
something else. `choose_layout` holds the chosen one against the model's own forward once, before
anything expensive begins.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppo_fast.llm import attention
from ppo_fast.llm.packing import Packed, pack

log = logging.getLogger("ppo_fast")

LAYOUTS = ("auto", "packed", "padded")

# Noise of routers, in training mode only.
NOISE = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")

# Largest difference of a logit from the model's own, relative to the largest logit.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a peft model (whose adapters stay active), or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def trunk_of(model: nn.Module) -> Any:
    """The model without its head.

    Raises:
        ValueError: a peft model that puts trained tokens before the prompt, which no layout has.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{type(model).__name__} learns a prompt; expected LoRA or another adapter inside the "
            "layers"
        )
    base = unwrapped(model)
    # Some families name their trunk otherwise than their class says.
    return getattr(base, "model", base) if base.base_model is base else base.base_model


def disable_dropout(model: nn.Module) -> None:
    """Set every probability of dropout, of units or of whole layers, and routers' noise to 0.

    Ratios of probabilities mean nothing where each forward draws its own network; and gradient
    checkpointing runs in training mode only, so `eval()` is no way out.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name in NOISE):
                setattr(module, name, 0.0)


def hidden_states(trunk: nn.Module, packed: Packed, layout: str) -> Tensor:
    """[M, D]: the last hidden states that predict response tokens."""
    if layout == "packed":
        hidden = trunk(
            input_ids=packed.tokens[None],
            position_ids=packed.position_ids[None],
            # Four dimensions: taken as it is, where None would have a dense [L, L] mask built.
            attention_mask=packed.tokens.new_zeros((1, 1, 1, 1)),
            use_cache=False,
            packed=packed,
        ).last_hidden_state[0]
        return hidden.index_select(0, packed.predict)
    shape = (len(packed.lengths), packed.max_length)
    real = torch.zeros(shape, dtype=torch.int64, device=packed.tokens.device)
    real.view(-1)[packed.slots] = 1
    hidden = trunk(
        input_ids=packed.tokens[packed.sources].view(shape),
        position_ids=packed.position_ids[packed.sources].view(shape),
        attention_mask=real,
        use_cache=False,
    ).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, packed.slots[packed.predict])


class LinearHead(NamedTuple):
    """A head that is one matrix product, with what its family does to the logits afterwards."""

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def linear_head(model: nn.Module) -> LinearHead | None:
    """The head of a causal LM as numbers; None where it is more than a linear layer (LoRA, hooks)."""
    base = unwrapped(model)
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head) or head._forward_hooks:
        return None
    scaling = getattr(base.config, "logits_scaling", None) or 1.0
    scale = getattr(base.config, "logit_scale", None) or 1.0
    cap = getattr(base.config, "final_logit_softcapping", None)
    return LinearHead(head.weight, head.bias, scale / scaling, cap)


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """[M, V]: the head of a causal LM, with the scales and caps of its family."""
    base = unwrapped(model)
    logits = base.get_output_embeddings()(hidden)
    config = base.config
    scaling = getattr(config, "logits_scaling", None)  # Granite
    if scaling is not None:
        logits = logits / scaling
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is not None:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def choose_layout(model: nn.Module, layout: str = "auto") -> str:
    """Set a model up for a layout, and hold it against the model's own forward.

    Compared are the logits of a causal LM, or the hidden states of a model without a head. Besides,
    gradients say which tokens a hidden state depends on: those before it in its sequence, no other.
    That is exact also where an error hides in the rounding of 16 bits or behind small weights.

    Args:
        model: its dropout is switched off, and its attention implementation becomes "ppo_fast" where
            the layout is packed.
        layout: "packed", "padded", or "auto" for packed if the model can.

    Returns:
        The layout, "packed" or "padded".

    Raises:
        ValueError: another word; or a model that computes something else than is known here, looks
            ahead, or differs in training mode.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}; expected one of {', '.join(LAYOUTS)}")
    disable_dropout(model)
    base = unwrapped(model)
    name = type(base).__name__
    before = base.config._attn_implementation
    if layout in ("auto", "packed"):
        why, error = f"its attention is {before}", None
        if before in ("sdpa", "eager", attention.NAME):
            attention.register()
            base.set_attn_implementation(attention.NAME)
            if base.config._attn_implementation == attention.NAME:
                why, error = _objection(model, "packed")
                if not why:
                    return "packed"
                base.set_attn_implementation(before)
            else:
                why = "its attention cannot be replaced"
        if layout == "packed":
            raise ValueError(
                f"layout = 'packed' does not fit {name}: {why}; use layout = 'padded'"
            ) from error
        log.info("sequences are padded: %s cannot pack them: %s", name, why)
    why, error = _objection(model, "padded")
    if why:
        raise ValueError(
            f"{name} computes its outputs in a way that is not known here: {why}"
        ) from error
    return "padded"


def _objection(model: nn.Module, layout: str) -> tuple[str, Exception | None]:
    """What is wrong with a layout, empty if nothing is, and the error that said so."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    try:
        # A router may draw in training mode, which is what the check is to find out.
        with torch.random.fork_rng(devices=devices):
            return _difference(model, layout) or _leak(model, layout), None
    except Exception as error:  # A layer that takes no packed sequences may raise anything.
        return f"{type(error).__name__}: {error}", error
    finally:
        for module, training in modes:
            module.training = training


def _example(model: nn.Module) -> Packed:
    """Two short sequences; small ids exist in every vocabulary, and 0 may be padding."""
    size = unwrapped(model).get_input_embeddings().weight.shape[0]
    sequences = [[1 + (i * i + k) % (size - 1) for i in range(n)] for n, k in ((7, 3), (4, 5))]
    device = next(model.parameters()).device
    return pack([s[:1] for s in sequences], [s[1:] for s in sequences], device)


@torch.no_grad()
def _difference(model: nn.Module, layout: str) -> str:
    """What is wrong with the numbers of a layout; empty if nothing is."""
    base = unwrapped(model)
    headless = base.get_output_embeddings() is None
    packed = _example(model)

    def outputs() -> Tensor:
        hidden = hidden_states(trunk_of(model), packed, layout)
        return hidden if headless else logits_of(model, hidden)

    model.eval()
    ours = outputs()
    found = [
        model(input_ids=ids[None], use_cache=False) for ids in packed.tokens.split(packed.lengths)
    ]
    own = torch.cat([out.last_hidden_state[0] if headless else out.logits[0] for out in found])
    model.train()
    state = _random_state(ours.device)
    trained = outputs()
    if not torch.equal(state, _random_state(ours.device)):
        return "in training mode it draws random numbers, with its dropout at 0"
    what = "hidden states" if headless else "logits"
    for other, whose in ((own, "the model's own"), (trained, "those in training mode")):
        if ours.shape != other.shape:
            return f"{what} are {list(ours.shape)}, {whose} {list(other.shape)}"
        # A head may forbid tokens by -inf, which has no difference from itself.
        apart = torch.where(ours == other, 0.0, ours.double() - other.double())
        scale = torch.where(other.isinf(), 0.0, other.double()).abs().amax().clamp(min=1e-6)
        difference = float(apart.abs().amax() / scale)
        if not difference <= TOLERANCE.get(other.dtype, 1e-4):
            return f"{what} differ from {whose} by {difference:.1e} of the largest"
    return ""


def _random_state(device: torch.device) -> Tensor:
    """Of the generator that layers on a device draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@torch.enable_grad()
def _leak(model: nn.Module, layout: str) -> str:
    """Whether a hidden state has a gradient to a token it must not see; empty if none has."""
    packed = _example(model)
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1] * 1  # not a leaf: models may scale it in place

    model.eval()
    hook = unwrapped(model).get_input_embeddings().register_forward_hook(keep)
    try:
        hidden = hidden_states(trunk_of(model), packed, layout)
    finally:
        hook.remove()
    # Every row predicts, so rows of `hidden` are places in L. A sum over features would not do: a
    # norm at the end makes it, and the sum of squares, constant.
    direction = torch.arange(hidden.shape[1], device=hidden.device).cos().to(hidden.dtype)
    first = packed.lengths[0]
    for row, seen in ((first // 2, range(first // 2 + 1)), (first, [first])):
        (grad,) = torch.autograd.grad(hidden[row] @ direction, embedded, retain_graph=True)
        reached = (grad.flatten(0, -2) != 0).any(-1).nonzero().flatten().tolist()
        places = list(seen) if layout == "packed" else packed.slots[list(seen)].tolist()
        if not set(reached) <= set(places):
            return f"token {row} of the layout depends on tokens {reached}; expected {places}"
        if not reached:
            return f"token {row} of the layout depends on no token"
    return ""
