"""What a trainer is given, checked and set up before anything expensive begins."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from ppo_fast.distributed import world_size
from ppo_fast.functional.liger_head import available
from ppo_fast.llm.config import RLHFConfig
from ppo_fast.llm.models import Policy, make_reference, share_parameters, unwrapped
from ppo_fast.llm.prompts import (
    Prompts,
    check_tokenizer,
    tokenize_prompts,
    vocabulary_size,
)
from ppo_fast.llm.rewards import Reward, RewardModel
from ppo_fast.llm.sampler import context_of

if TYPE_CHECKING:
    from ppo_fast.llm.ppo_trainer import PPOTrainer


def check_fields(overrides: dict[str, Any]) -> None:
    """Refuse keyword arguments that are neither the trainer's nor fields of `RLHFConfig`."""
    unknown = sorted(set(overrides) - set(RLHFConfig.__dataclass_fields__))
    if unknown:
        raise TypeError(
            f"PPOTrainer: unknown setting {', '.join(unknown)}; expected fields of RLHFConfig"
        )


def check_no_optimizers(optimizers: Any) -> None:
    """Refuse an optimizer or scheduler of the user's own."""
    if any(given is not None for given in optimizers or ()):
        raise TypeError(
            "PPOTrainer: optimizers is not None; expected (None, None): the optimizer is Adam over one "
            "flat buffer, set by learning_rate, critic_learning_rate, adam_eps and anneal_lr"
        )


def chosen_head(model: nn.Module, config: RLHFConfig) -> str:
    """The `head` of the policy: on a CPU the fused ops compute in float32, where bf16 is faster.

    Raises:
        ValueError: head is "liger" and its kernel cannot run.
    """
    if config.head == "liger":
        why = available(next(model.parameters()).device)
        if config.precision != "bf16" or config.head_fp32:
            why = why or "the kernel is of bfloat16; set precision = 'bf16' without head_fp32"
        if why:
            raise ValueError(f"head = 'liger': {why}")
    if config.head == "auto" and config.precision == "bf16":
        on_cpu = next(model.parameters()).device.type == "cpu"
        return "logits" if on_cpu else "auto"
    return config.head


def checked_reference(
    policy: Policy, ref_model: nn.Module | str | None, config: RLHFConfig
) -> Policy | None:
    """The reference of the KL, or None where there is no KL and no adapters to switch off."""
    if isinstance(ref_model, str):
        if ref_model != "copy":
            raise ValueError(f"ref_model = {ref_model!r}; expected a model, 'copy' or None")
        return make_reference(policy, copy.deepcopy(policy.model), config.layout)
    if ref_model is None and not hasattr(policy.model, "disable_adapter"):
        if config.kl_coef > 0:
            raise ValueError(
                f"ref_model is None, but kl_coef = {config.kl_coef} penalises the KL to it; pass a "
                "model, ref_model='copy' for the policy as it is now, or kl_coef=0"
            )
        return None
    if isinstance(ref_model, nn.Module):
        ref_model = ref_model.to(policy.device)
    return make_reference(policy, ref_model, config.layout)


def special_tokens(
    config: RLHFConfig, tokenizer: Any, policy: Policy
) -> tuple[int, tuple[int, ...]]:
    """The id that fills rows up, and those that end a response."""
    stops = config.stop_token_ids
    pad = None
    if tokenizer is not None:
        pad, eos = check_tokenizer(tokenizer, stops[0] if stops else None)
        stops = (eos,) if stops is None else stops
    elif stops is None:
        eos = unwrapped(policy.model).config.eos_token_id
        stops = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if any(not 0 <= stop < policy.vocab_size for stop in stops):
        raise ValueError(f"stop_token_ids = {stops}; expected ids below {policy.vocab_size}")
    if pad is None:
        pad = stops[0] if stops else 0
    return pad, stops


def checked_prompts(
    name: str,
    data: Any,
    tokenizer: Any,
    policy: Policy,
    trunks: dict[str, Any],
    response_length: int,
) -> Prompts:
    """Tokenised prompts that fit the vocabulary and every model's context.

    Args:
        name: of the argument, for errors.
        data, tokenizer: see `tokenize_prompts`.
        policy: in training.
        trunks: further transformers models by argument; None where there is none.
        response_length: most tokens of a response.
    """
    limit = context_of(unwrapped(policy.model))
    room = None if limit is None else limit - response_length
    if room is not None and room < 1:
        raise ValueError(
            f"response_length = {response_length} leaves no room for a prompt in the model's context "
            f"of {limit} tokens"
        )
    prompts = tokenize_prompts(data, tokenizer, max_length=room)
    highest = max(map(max, prompts.ids))
    if highest >= policy.vocab_size:
        raise ValueError(
            f"{name} holds the token id {highest}; the model's vocabulary has {policy.vocab_size}: is "
            "it of another tokenizer?"
        )
    for role, trunk in trunks.items():
        _check_context(role, trunk, prompts, response_length)
    return prompts


def checked_reward_model(
    reward_model: Any, trainer: PPOTrainer, response_length: int
) -> RewardModel | None:
    """A callable on sequences; a module is set up as one, its vocabulary and context checked."""
    if not isinstance(reward_model, nn.Module):
        return reward_model
    from ppo_fast.llm.reward_model import RewardModel as Scorer
    from ppo_fast.llm.reward_model import as_reward_model

    policy, prompts = trainer.policy, trainer.prompts_data
    reward_model = reward_model.to(policy.device)
    trained = [policy.model, trainer.critic]
    if not any(share_parameters(reward_model, other) for other in trained):
        model = as_reward_model(reward_model)
    elif isinstance(reward_model, Scorer):
        raise ValueError(
            "reward_model shares parameters with model or value_model, and would be trained; pass a "
            "copy"
        )
    else:
        # A classifier given for both: the critic is trained in place, the reward stays.
        model = Scorer.from_sequence_classifier(reward_model)
    _check_context("reward_model", model.trunk, prompts, response_length)
    embedded = model.trunk.get_input_embeddings().weight.shape[0]
    # Rows beyond the tokenizer's ids are padding of the matrix, and may differ.
    needed = policy.vocab_size
    if trainer.tokenizer is not None:
        highest = max(*map(max, prompts.ids), *trainer.stop_token_ids)
        needed = max(vocabulary_size(trainer.tokenizer), highest + 1)
    if embedded < needed:
        raise ValueError(
            f"reward_model has a vocabulary of {embedded}, the policy of {policy.vocab_size}; expected "
            "a reward model of the same tokenizer"
        )
    return lambda sequences, _: model(sequences)


def _check_context(role: str, model: Any, prompts: Prompts, response_length: int) -> None:
    limit = None if model is None else context_of(model)
    needed = max(map(len, prompts.ids)) + response_length
    if limit is not None and limit < needed:
        raise ValueError(
            f"{role} has a context of {limit} tokens; the longest prompt with a response of "
            f"{response_length} has {needed}: shorten prompts or response_length"
        )


def check_eval_columns(reward: Reward, eval_data: Prompts | None) -> None:
    """Refuse eval prompts without a column that the reward functions take."""
    missing = sorted(reward.columns - set(eval_data.columns)) if eval_data is not None else []
    if missing:
        raise ValueError(
            f"eval_dataset has no column {missing[0]!r}, which the reward functions take from "
            "train_dataset"
        )


def check_shares(config: RLHFConfig) -> None:
    """Refuse a rollout that does not divide over processes and minibatches."""
    share, rest = divmod(config.rollout_batch_size, world_size())
    if rest:
        raise ValueError(
            f"rollout_batch_size = {config.rollout_batch_size} does not divide over {world_size()} "
            "processes"
        )
    if share < config.num_minibatches:
        raise ValueError(
            f"num_minibatches = {config.num_minibatches}; expected at most the {share} responses of a "
            "process"
        )
