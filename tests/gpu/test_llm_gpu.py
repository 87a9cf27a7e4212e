"""Training a language model on a GPU: the same numbers as on the CPU, recorded sampling, bf16.

Dry runs (TRITON_INTERPRET=1) do it on the CPU with the ops' references.
"""

import os

import pytest
import torch

from ppo_fast.dispatch import backend

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_fast.llm import PPOTrainer, RLHFConfig

DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
PROMPTS = [[1, 5, 7], [1, 6], [1, 8, 9, 10], [1, 11, 12, 13, 14]]
EOS = 2


@pytest.fixture(autouse=True)
def on_the_device():
    """In place of the folder's default device: a trainer places what it makes by itself."""
    torch.manual_seed(0)
    # The interpreter is there for kernels, which tests/kernels runs; here it would take minutes.
    with backend("reference" if DRY else "auto"):
        yield


def llama(vocab_size=96):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def trainer(model, device=DEVICE, **settings):
    options = {
        "rollout_batch_size": 16,
        "response_length": 12,
        "total_episodes": 16 * 4,
        "update_epochs": 2,
        "num_minibatches": 2,
        "learning_rate": 1e-3,
        "device": str(device),
    }
    return PPOTrainer(
        RLHFConfig(**(options | settings)),
        model=model,
        ref_model="copy",
        train_dataset=PROMPTS * 4,
        reward_fn=lambda completion_ids: [sum(i < 48 for i in ids) / 12 for ids in completion_ids],
    )


def test_a_run_learns_and_its_first_ratio_is_one():
    own = trainer(llama(), total_episodes=16 * 12, update_epochs=4)
    scores = []
    own.learn(lambda t: scores.append(t.metrics["objective/scores"]))
    assert own.metrics["diag/ratio_dev_first"] < 1e-4
    assert own.metrics["val/optimizer_steps"] == 8
    assert sum(scores[-3:]) > sum(scores[:3])


def test_log_probs_and_advantages_are_the_cpus():
    here, there = trainer(llama()), trainer(llama(), torch.device("cpu"))
    prompts = there.next_prompts()
    responses = there.sample(prompts)
    rollouts = []
    for own in (here, there):
        rollout = own.score(prompts, responses)
        rollouts.append([rollout.log_probs.cpu(), rollout.advantages.cpu(), rollout.returns.cpu()])
    for one, other in zip(*rollouts, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_a_rollout_is_the_same_with_and_without_recorded_steps():
    own = trainer(llama())
    prompts = own.next_prompts()
    first = own.sample(prompts)
    for _ in range(4):  # eager runs, recording, replays
        again = own.sample(prompts)
    assert torch.equal(first.tokens, again.tokens)
    torch.testing.assert_close(first.log_probs, again.log_probs, rtol=1e-4, atol=1e-4)
    assert own.metrics == {}


def test_bf16_trains_with_float32_log_probs():
    own = trainer(llama(), precision="bf16", num_minibatches=1)
    own.learn()
    assert all(torch.isfinite(p).all() for p in own.policy.model.parameters())
    assert own.metrics["diag/ratio_dev_first"] < 0.2
    rollout = own.score(own.prompts, own.responses)
    assert rollout.log_probs.dtype == torch.float32


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_large_vocabulary_trains_in_either_layout(layout):
    own = trainer(
        llama(vocab_size=1000 if DRY else 151_936),
        layout=layout,
        total_episodes=16,
        logits_mb=1,
        token_budget=64,
        gradient_checkpointing=True,
    )
    own.learn()
    assert own.metrics["val/skipped_steps"] == 0
    assert own.metrics["diag/ratio_dev_first"] < 1e-3
