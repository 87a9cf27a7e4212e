"""TRL 1.10's `PPOConfig`, whose field names and defaults become an `RLHFConfig`."""

from __future__ import annotations

import logging

from ppo_fast.distributed import world_size
from ppo_fast.llm.config import RLHFConfig

log = logging.getLogger("ppo_fast")

TRL_NAMES = {
    "num_ppo_epochs": "update_epochs",
    "num_mini_batches": "num_minibatches",
    "cliprange": "clip_coef",
    "cliprange_value": "vf_clip_coef",
    "lam": "gae_lambda",
    "output_dir": "run_dir",
    "adam_epsilon": "adam_eps",
    "num_train_epochs": "num_epochs",
}
"""Fields that have another name here."""

TRL_IGNORED = {
    "dataset_num_proc": "prompts are tokenised in this process",
    "logging_steps": "every update is logged",
    "report_to": "metrics.csv and TensorBoard are always written to run_dir",
    "num_sample_generations": "use eval_every",
    "local_rollout_forward_batch_size": "forwards are cut by token_budget",
    "ds3_gather_for_generation": "DeepSpeed is not supported",
    "exp_name": "name the run by output_dir",
    "remove_unused_columns": "columns go to the reward functions that name them",
}
"""Fields that change nothing here, and why."""


def PPOConfig(**fields: object) -> RLHFConfig:
    """Build an `RLHFConfig` from the field names and defaults of TRL 1.10's `PPOConfig`.

    Fields of ours are taken under their own names too. `per_device_train_batch_size` times
    `gradient_accumulation_steps` becomes `rollout_batch_size` (times the number of processes).

    Raises:
        TypeError: a field that neither has, or one whose meaning cannot be kept.
    """
    ours: dict[str, object] = {"temperature": 0.7, "adam_eps": 1e-8, "num_epochs": 3.0, "seed": 42}
    known = set(RLHFConfig.__dataclass_fields__)
    batch, accumulation = 8, 1
    for name, value in fields.items():
        if name in TRL_IGNORED:
            log.info("PPOConfig: %s has no effect: %s", name, TRL_IGNORED[name])
            continue
        if name == "per_device_train_batch_size":
            batch = int(value)  # type: ignore[call-overload]
        elif name == "gradient_accumulation_steps":
            accumulation = int(value)  # type: ignore[call-overload]
        elif name == "bf16":
            ours["precision"] = "bf16" if value else "fp32"
        elif name == "stop_token":
            if value not in (None, "eos"):
                raise TypeError(
                    f"stop_token = {value!r}; expected 'eos' or None (or stop_token_id)"
                )
        elif name == "stop_token_id":
            if value is not None:
                ours["stop_token_ids"] = (int(value),)  # type: ignore[call-overload]
        elif name == "lr_scheduler_type":
            if value not in ("linear", "constant"):
                raise TypeError(f"lr_scheduler_type = {value!r}; expected 'linear' or 'constant'")
            ours["anneal_lr"] = value == "linear"
        elif name in TRL_NAMES or name in known:
            ours[TRL_NAMES.get(name, name)] = value
        else:
            raise TypeError(
                f"PPOConfig: {name} is neither a field of TRL's PPOConfig that has a meaning here nor "
                "one of RLHFConfig; docs/from_trl.md lists them"
            )
    ours.setdefault("rollout_batch_size", batch * accumulation * world_size())
    return RLHFConfig(**ours)  # type: ignore[arg-type]
