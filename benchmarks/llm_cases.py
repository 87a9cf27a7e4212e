"""What `bench_llm.py` compares: arms, and the models, prompts and responses of each case."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

PAD, EOS = 0, 1


class Arm(NamedTuple):
    name: str
    module: str
    """under peers/, with `build`"""
    options: dict[str, Any]
    """keyword arguments of `build`"""


OURS = "ppo_fast"
ARMS = {
    "ours": Arm(OURS, "ours_llm", {}),
    "ours-8": Arm(f"{OURS}, 8 rows at once", "ours_llm", {"micro_batch_size": 8}),
    "trl": Arm("TRL-1.10-style", "trl_ppo_style", {}),
    "trl-8": Arm("TRL-1.10-style, 8 rows at once", "trl_ppo_style", {"micro_batch_size": 8}),
}


class Case(NamedTuple):
    label: str
    """in words, for tables"""
    model: dict[str, Any]
    """arguments of the transformers config, and its `model_type`"""
    batch: int
    prompt_lengths: tuple[int, int]
    """shortest and longest"""
    response_length: int
    """tokens at most"""
    eos_probability: float
    """at every position; 0: no response ends early"""
    config: dict[str, Any]
    """hyper-parameters of every arm, by our names"""
    arms: tuple[str, ...] = ("ours", "ours-8", "trl", "trl-8")
    """the first is what the others are set against"""
    dtype: str = "float32"
    device: str = "cpu"


# TRL 1.10's defaults, and the temperature 1 that our default is.
CONFIG = {
    "learning_rate": 3e-6,
    "adam_eps": 1e-5,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "update_epochs": 4,
    "num_minibatches": 1,
    "clip_coef": 0.2,
    "vf_coef": 0.1,
    "vf_clip_coef": 0.2,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "whiten_rewards": False,
    "missing_eos_penalty": None,
    "temperature": 1.0,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
QWEN_HALF_B = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
"""Qwen2.5-0.5B's config."""

CASES = {
    "full": Case(
        "V = 4,096, 32 x (16 + 32) tokens, no padding anywhere",
        {**LLAMA, "vocab_size": 4096},
        32,
        (16, 16),
        32,
        0.0,
        CONFIG,
    ),
    "small": Case(
        "V = 4,096, 32 x (8..16 + 1..32) tokens",
        {**LLAMA, "vocab_size": 4096},
        32,
        (8, 16),
        32,
        0.05,
        CONFIG,
    ),
    "v50k": Case(
        "V = 50,257, 32 x (8..16 + 1..32) tokens",
        {**LLAMA, "vocab_size": 50_257},
        32,
        (8, 16),
        32,
        0.05,
        CONFIG,
    ),
    "qwen": Case(
        "Qwen2.5-0.5B's shape, bf16, V = 151,936, 64 x (64..128 + 1..256) tokens",
        QWEN_HALF_B,
        64,
        (64, 128),
        256,
        0.006,
        CONFIG,
        dtype="bfloat16",
        device="cuda",
    ),
}


class Models(NamedTuple):
    policy: nn.Module
    ref: nn.Module
    value: nn.Module
    reward: nn.Module


def make_prompts(case: Case, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    shortest, longest = case.prompt_lengths
    vocabulary = case.model["vocab_size"]
    return [
        [draw.randrange(2, vocabulary) for _ in range(draw.randint(shortest, longest))]
        for _ in range(case.batch)
    ]


def make_responses(case: Case, seed: int) -> list[list[int]]:
    """Responses with lengths as the policy draws them, EOS at the end of those that end."""
    draw = random.Random(f"responses {seed}")
    vocabulary = case.model["vocab_size"]
    found = []
    for _ in range(case.batch):
        response: list[int] = []
        while len(response) < case.response_length and EOS not in response:
            ends = draw.random() < case.eos_probability
            response.append(EOS if ends else draw.randrange(2, vocabulary))
        found.append(response)
    return found


def make_models(case: Case, seed: int = 0) -> Models:
    """Policy, an equal reference, value and reward model; the policy ends responses as the case says."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    torch.manual_seed(seed)
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    fields = {**case.model, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    config = AutoConfig.for_model(**fields)
    one_label = AutoConfig.for_model(**fields, num_labels=1)
    policy = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    set_eos_probability(policy, case.eos_probability)
    ref = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    ref.load_state_dict(policy.state_dict())
    classifiers = [
        AutoModelForSequenceClassification.from_config(one_label, dtype=dtype).to(device)
        for _ in range(2)
    ]
    models = Models(policy, ref, *classifiers)
    for frozen in (models.ref, models.reward):
        frozen.requires_grad_(False)
    return models


def set_eos_probability(policy: nn.Module, probability: float) -> None:
    """Make EOS about as probable as said at every position, and padding never drawn, in place.

    Channel 0 of the residual stream is given the same value at every token, and no layer adds to it;
    the head's rows of the two then get what it takes there.
    """
    import torch

    with torch.no_grad():
        policy.get_input_embeddings().weight[:, 0] = 0.2
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        head = policy.get_output_embeddings().weight
        head[[PAD, EOS], 1:] = 0
        tokens = torch.randint(2, len(head), (4, 16), device=head.device)
        common = policy.model(tokens).last_hidden_state[..., 0].float().mean()
        head[PAD, 0] = -30 / common
        logits = policy(tokens).logits.float()
        logits[..., EOS] = -torch.inf
        others = logits.logsumexp(-1).mean()
        if probability == 0:
            head[EOS, 0] = -30 / common
        else:
            odds = torch.tensor(probability / (1 - probability), device=head.device)
            head[EOS, 0] = (others + odds.log()) / common


def teacher_forced(
    policy: nn.Module, prompts: list[list[int]], responses: list[list[int]], width: int
) -> Tensor:
    """Logits [B, width, V] of the positions that predict response tokens, 0 beyond a response."""
    import torch

    found = None
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        device = next(policy.parameters()).device
        tokens = torch.tensor([prompt + response], device=device)
        with torch.no_grad():
            logits = policy(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
        if found is None:
            found = logits.new_zeros(len(prompts), width, logits.shape[-1])
        found[row, : len(response)] = logits
    assert found is not None
    return found
