"""PPO for language models: prompts -> responses -> scores -> token rewards -> the one update.

`PPOTrainer` and `RLHFConfig` are the way in; `PPOConfig` takes TRL's field names.
"""

from ppo_fast.llm.config import RLHFConfig
from ppo_fast.llm.judge import CausalLMJudge, FunctionJudge, Judge
from ppo_fast.llm.ppo_trainer import PPOTrainer
from ppo_fast.llm.preferences import (
    Preference,
    collect_preferences,
    label_pairs,
    read_preferences,
    split_preferences,
    tokenize_preferences,
    write_preferences,
)
from ppo_fast.llm.reward_model import RewardModel, evaluate_reward_model, train_reward_model
from ppo_fast.llm.rewards import RewardError
from ppo_fast.llm.sampler import Responses, Sampler, make_sampler
from ppo_fast.llm.sft import evaluate_sft, train_sft
from ppo_fast.llm.trl_names import PPOConfig

__all__ = [
    "CausalLMJudge",
    "FunctionJudge",
    "Judge",
    "PPOConfig",
    "PPOTrainer",
    "Preference",
    "RLHFConfig",
    "Responses",
    "RewardError",
    "RewardModel",
    "Sampler",
    "collect_preferences",
    "evaluate_reward_model",
    "evaluate_sft",
    "label_pairs",
    "make_sampler",
    "read_preferences",
    "split_preferences",
    "tokenize_preferences",
    "train_reward_model",
    "train_sft",
    "write_preferences",
]
