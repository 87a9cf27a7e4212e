"""Checkpoints of a language model's training: a run that was cut goes on to the last bit."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ppo_fast import PPO
from ppo_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_fast.llm.ppo_trainer import PPOTrainer
from ppo_fast.llm.saving import live_tensors

V, END = 23, 3
PROMPTS = [[5], [6, 7], [8, 9, 10], [11, 4], [12, 5, 6, 7, 8], [13]]


def llama(seed=0, kind=LlamaForCausalLM, **options):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "num_labels": 1,
        "eos_token_id": END,
        "pad_token_id": 0,
    }
    return kind(LlamaConfig(**(shape | options))).eval()


def fives(completion_ids):
    return [float(ids.count(5)) - 0.1 * len(ids) for ids in completion_ids]


def make(**options):
    settings = {
        "model": llama(),
        "ref_model": "copy",
        "train_dataset": PROMPTS,
        "reward_fn": fives,
        "rollout_batch_size": 8,
        "total_episodes": 40,
        "response_length": 6,
        "num_minibatches": 2,
        "update_epochs": 2,
        "learning_rate": 1e-3,
    }
    return PPOTrainer(**(settings | options))


def lora():
    return pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def untimed(metrics):
    return {n: x for n, x in metrics.items() if not n.startswith("time/") and n != "eps"}


def assert_equal(one, other):
    first, second = live_tensors(one), live_tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert untimed(one.metrics) == untimed(other.metrics)
    assert (one.num_episodes, one.iteration) == (other.num_episodes, other.iteration)
    assert one.kl_controller.coef == other.kl_controller.coef


RUNS = {
    "plain": dict,
    "critic": lambda: {
        "value_model": llama(7, LlamaForSequenceClassification),
        "critic_learning_rate": 3e-3,
    },
    "lora": lambda: {"ref_model": None, "peft_config": lora()},
    "adaptive": lambda: {
        "ref_model": llama(1),
        "kl_controller": "proportional",
        "kl_target": 0.05,
        "kl_horizon": 50,
        "anneal_clip": True,
        "ent_coef": 0.01,
        "anneal_ent": True,
    },
    "exact KL": lambda: {"kl_estimator": "full", "ref_model": llama(1), "anneal_lr": False},
    "padded, checkpointing": lambda: {"layout": "padded", "gradient_checkpointing": True},
    "tied": lambda: {"model": llama(tie_word_embeddings=True)},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("after", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run, after, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    whole = make(**RUNS[run]())
    if after == 0:
        whole.save(path)
    whole.learn(lambda t: t.save(path) if t.iteration == after else None)
    resumed = make(**RUNS[run]()).load(path)
    assert (resumed.iteration, resumed.num_episodes) == (after, 8 * after)
    resumed.learn()
    assert_equal(whole, resumed)


SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_llm_saving as here

calls = []

def fatal(completion_ids):
    calls.append(1)
    if sys.argv[3] == "die" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return here.fives(completion_ids)

fatal.__name__ = "fives"
trainer = here.make(reward_fn=fatal, run_dir=sys.argv[2], save_every=1)
if sys.argv[3] == "go on":
    trainer.load(sys.argv[2])
    assert trainer.iteration == 2
trainer.learn()
"""


def test_a_killed_process_goes_on_to_the_last_bit(tmp_path):
    def run(what):
        arguments = [os.path.dirname(__file__), str(tmp_path / "run"), what]
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run("die").returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["iteration"] == 2
    finished = run("go on")
    assert finished.returncode == 0, finished.stderr
    whole = make(run_dir=str(tmp_path / "whole")).learn()
    assert_equal(whole, make().load(tmp_path / "run"))

    def rows(name):
        found = csv.DictReader((tmp_path / name / "metrics.csv").open())
        return [untimed(row) for row in found]

    assert rows("run") == rows("whole")
    assert len(rows("run")) == 5


def test_an_interrupt_finishes_the_update_and_saves(tmp_path):
    calls = []

    def interrupting(completion_ids):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return fives(completion_ids)

    trainer = make(reward_fn=interrupting, run_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        trainer.learn()
    assert trainer.iteration == 2
    resumed = make(run_dir=str(tmp_path / "run"))
    resumed.train(resume_from_checkpoint=True)
    assert_equal(make().learn(), resumed)


def test_a_finished_run_goes_on_with_more_episodes(tmp_path):
    folder = str(tmp_path / "run")
    settings = {"anneal_lr": False}
    make(total_episodes=16, run_dir=folder, **settings).learn()
    longer = make(total_episodes=40, run_dir=folder, **settings).load(folder).learn()
    assert_equal(make(**settings).learn(), longer)
    longer.learn()
    assert longer.num_episodes == 40


def test_a_folder_with_a_run_is_not_written_over(tmp_path):
    folder = str(tmp_path / "run")
    make(total_episodes=8, run_dir=folder).learn()
    with pytest.raises(FileExistsError, match="holds a finished or interrupted run"):
        make(run_dir=folder).learn()
    with pytest.raises(ValueError, match="needs a run_dir"):
        make().train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "checkpoint.safetensors"
    make(total_episodes=8, ref_model=llama(1)).learn().save(path)
    return path


OTHERS = {
    "narrower": (lambda: {"model": llama(hidden_size=8), "ref_model": llama(1)}, "other models"),
    "deeper": (lambda: {"model": llama(num_hidden_layers=3)}, "other models"),
    "of another dtype": (
        lambda: {"model": llama().double(), "ref_model": llama(1).double()},
        "other models",
    ),
    "with adapters": (lambda: {"peft_config": lora()}, "other models"),
    "with a critic of its own": (
        lambda: {"value_model": llama(7, LlamaForSequenceClassification)},
        "other models",
    ),
    "with another reference": (lambda: {"ref_model": llama(2)}, "another reference"),
    "with a copy as reference": (lambda: {"ref_model": "copy"}, "another reference"),
    "with another rate": (lambda: {"learning_rate": 2e-3}, "learning_rate = 0.001, now 0.002"),
    "with another KL": (lambda: {"kl_coef": 0.1, "gamma": 0.9}, "gamma = 1.0, now 0.9, kl_coef"),
    "with stop tokens": (lambda: {"stop_token_ids": (4,)}, "stop_token_ids"),
    "with fewer prompts": (lambda: {"train_dataset": PROMPTS[:5]}, "6 prompts"),
    "with other prompts": (
        lambda: {"train_dataset": [*PROMPTS[:5], [14]]},
        "other prompts",
    ),
    "with prompts in another order": (lambda: {"train_dataset": PROMPTS[::-1]}, "another order"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_trainer_of_another_kind_refuses_the_checkpoint_and_stays_as_it_is(other, checkpoint):
    options, message = OTHERS[other]
    trainer = make(**({"ref_model": llama(1)} | options()))
    before = {name: tensor.clone() for name, tensor in live_tensors(trainer).items()}
    with pytest.raises(ValueError) as error:
        trainer.load(checkpoint)
    assert message in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in live_tensors(trainer).items())
    assert trainer.num_episodes == 0


FREE = {
    "total_episodes": 80,
    "save_every": 1,
    "eval_every": 3,
    "token_budget": 100,
    "logits_mb": 1,
    "sample_batch_size": 2,
    "device": "cpu",
    "torch_threads": 1,
}


def test_what_does_not_change_the_result_may_change(checkpoint):
    trainer = make(ref_model=llama(1), gradient_checkpointing=True, **FREE).load(checkpoint)
    assert trainer.num_episodes == 8


def test_sums_of_frozen_weights_may_differ_by_the_order_of_additions(checkpoint, tmp_path):
    tensors, meta = load_checkpoint(checkpoint)
    for factor, fits in ((1 + 1e-13, True), (1 + 1e-4, False)):
        path = tmp_path / "checkpoint.safetensors"
        frozen = [x * factor for x in meta["frozen"]]
        save_checkpoint(path, tensors, {**meta, "frozen": frozen})
        trainer = make(ref_model=llama(1))
        if fits:
            assert trainer.load(path).num_episodes == 8
        else:
            with pytest.raises(ValueError, match="another reference"):
                trainer.load(path)


def test_foreign_files_are_refused(checkpoint, tmp_path):
    control = tmp_path / "control.safetensors"
    PPO("CartPole-v1", num_envs=2, num_steps=8).save(control)
    with pytest.raises(CheckpointError, match="no checkpoint of PPO for language models"):
        make().load(control)
    with pytest.raises(CheckpointError, match="no such file"):
        make().load(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError):
        make().load(tmp_path)
    data = checkpoint.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        make().load(cut)


def test_a_checkpoint_of_lora_holds_no_base_weights(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    make(ref_model=None, peft_config=lora()).save(path)
    tensors, meta = load_checkpoint(path)
    policy = [name for name in tensors if name.startswith("policy.")]
    assert len(policy) == 8
    assert all("lora_" in name for name in policy)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="other frozen weights"):
        make(model=other, ref_model=None, peft_config=lora()).load(path)
    assert json.dumps(meta)
