"""`PPOTrainer`: PPO on a causal language model, from prompts to a better policy."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppo_fast.checkpoint import atomic_write_text
from ppo_fast.device_errors import raise_device_errors
from ppo_fast.distributed import (
    all_moments,
    all_sum_,
    broadcast_,
    failing_together,
    rank,
    world_size,
)
from ppo_fast.extras import require
from ppo_fast.functional.explained_variance import explained_variance
from ppo_fast.functional.whiten import masked_whiten, moments
from ppo_fast.interrupt import DeferredInterrupt
from ppo_fast.kl_control import KLController
from ppo_fast.llm.config import RLHFConfig
from ppo_fast.llm.given import (
    check_eval_columns,
    check_fields,
    check_no_optimizers,
    check_shares,
    checked_prompts,
    checked_reference,
    checked_reward_model,
    chosen_head,
    special_tokens,
)
from ppo_fast.llm.loss import TokenLoss
from ppo_fast.llm.models import Policy, make_critic, share_parameters, unwrapped
from ppo_fast.llm.prompts import Prompts
from ppo_fast.llm.reports import rollout_metrics, update_metrics
from ppo_fast.llm.rewards import Reward, Scores, shape_scores
from ppo_fast.llm.rollout import Sequences, TokenRollout, check_responses
from ppo_fast.llm.sampler import Responses, Sampler, make_sampler, response_ids, stream
from ppo_fast.llm.saving import load_trainer, save_trainer
from ppo_fast.llm.scoring import evaluate_tokens, make_rollout
from ppo_fast.profiling import StageTimer
from ppo_fast.run_folder import RunFolder
from ppo_fast.update import FlatAdam, UpdateStats, ppo_update

log = logging.getLogger("ppo_fast")

Callback = Callable[["PPOTrainer"], bool | None]


class PPOTrainer:
    """PPO from a learned or programmed reward (Ziegler et al. 2019, Stiennon et al. 2020).

        trainer = PPOTrainer(
            RLHFConfig(total_episodes=10_000, run_dir="runs/story"),
            processing_class=tokenizer, model=policy, ref_model="copy",
            reward_model=reward_model, train_dataset=prompts,
        )
        trainer.learn()
        trainer.save_model("story-ppo")

    The constructor's names are those of TRL 1.10's `PPOTrainer`; docs/from_trl.md says what is
    different.

    Args:
        args: the settings.
        processing_class: the tokenizer. None where prompts are token ids and rewards take ids.
        model: a causal LM of transformers, or a peft model of one. It is trained in place.
        ref_model: the KL's reference: a causal LM, or "copy" for the model as it is now (twice the
            memory). None means the model without its adapters where it has some, else no reference.
        reward_model: a sequence classifier with one label, or a callable
            `(sequences, prompt_lengths) -> [B]`.
        train_dataset: prompts; see `tokenize_prompts`.
        value_model: the critic: a sequence classifier with one label, or a causal LM, trained in
            place; None is a scalar head on the model's own trunk.
        data_collator: not needed, as prompts are not padded; taken so that TRL's calls fit.
        eval_dataset: prompts for `evaluate`.
        optimizers: there so that TRL's calls fit; Adam it is, by the config.
        callbacks: functions of the trainer, called after every update; one returning False ends
            `learn`.
        peft_config: wraps the model in adapters, which are trained.
        reward_fn: one or several functions; see `Reward`.
        reward_weights: of the reward functions in order, then of the reward model. A weight of 0
            only reports.
        sampler: generates responses in place of the shipped ones, see `Sampler`; or one of the words
            of `RLHFConfig.sampler`.
        **overrides: fields of `RLHFConfig`.

    Attributes:
        config: the settings in force.
        policy, critic, reference: the roles; reference may be None.
        metrics: the last update's, floats by name.
        prompts, responses, scores: of the last rollout.
        num_episodes: responses trained on so far, over all processes.
        sources: JSON data that says where models and prompts came from; goes into config.json.

    Raises:
        TypeError, ValueError: what cannot be trained on, before anything expensive.
    """

    def __init__(
        self,
        args: RLHFConfig | None = None,
        processing_class: Any = None,
        model: nn.Module | None = None,
        ref_model: nn.Module | str | None = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: nn.Module | None = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: Any = (None, None),
        callbacks: Sequence[Callback] | None = None,
        peft_config: Any = None,
        *,
        reward_fn: Any = None,
        reward_weights: Sequence[float] | None = None,
        sampler: Sampler | str | None = None,
        **overrides: Any,
    ) -> None:
        if args is not None and not isinstance(args, RLHFConfig):
            raise TypeError(
                f"PPOTrainer: args is a {type(args).__name__}; expected an RLHFConfig "
                "(ppo_fast.llm.PPOConfig takes TRL's fields)"
            )
        if isinstance(sampler, str):
            overrides["sampler"], sampler = sampler, None
        check_fields(overrides)
        check_no_optimizers(optimizers)
        self.config = config = dataclasses.replace(args or RLHFConfig(), **overrides)
        if model is None:
            raise ValueError("PPOTrainer: model is None; expected a causal LM")
        if train_dataset is None:
            raise ValueError("PPOTrainer: train_dataset is None; expected prompts")
        self.tokenizer = processing_class
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            if peft_config is not None:
                model = require("peft", "llm", "peft_config").get_peft_model(model, peft_config)
            if config.device != "auto":
                model = model.to(config.device)
            self.policy = Policy(model, config.layout, config.head_fp32, chosen_head(model, config))
            self.device = self.policy.device
            self.reference = checked_reference(self.policy, ref_model, config)
            if value_model is not None:
                value_model = value_model.to(self.device)
            self.critic = make_critic(self.policy, value_model, config.layout)
        if self.reference is not None and share_parameters(self.reference.model, self.critic):
            raise ValueError(
                "value_model shares parameters with ref_model, and would train it; pass a copy"
            )
        self.pad_token_id, self.stop_token_ids = special_tokens(config, self.tokenizer, self.policy)
        self.prompts_data = self._tokenized("train_dataset", train_dataset)
        self.eval_data = (
            None if eval_dataset is None else self._tokenized("eval_dataset", eval_dataset)
        )
        self.reward = Reward(
            reward_fn,
            checked_reward_model(reward_model, self, config.response_length),
            weights=reward_weights,
            tokenizer=self.tokenizer,
            columns=self.prompts_data.columns,
        )
        check_eval_columns(self.reward, self.eval_data)
        check_shares(config)
        if config.gradient_checkpointing:
            for trained in (unwrapped(model), self.critic.trunk):
                if trained is not None:
                    trained.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
                    trained.train()
        log.info(
            "sequences are %s, log-probs come %s",
            self.policy.layout,
            "through logits" if self.policy.fused is None else "from hidden states",
        )
        broadcast_(p.data for p in [*model.parameters(), *self.critic.parameters()])
        own = [p for p in self.critic.parameters() if p.requires_grad]
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("PPOTrainer: no parameter of model requires a gradient")
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in trained):
            log.warning(
                "parameters in training are %s, where steps of learning_rate %g may be rounded away; "
                "load the model with dtype=torch.float32, and compute in bf16 by precision='bf16'",
                *(trained[0].dtype, config.learning_rate),
            )
        rate = config.critic_learning_rate or config.learning_rate
        self.optimizer = FlatAdam(
            [*trained, *own],
            config.learning_rate,
            config.adam_eps,
            config.max_grad_norm,
            critic=own,
            critic_factor=rate / config.learning_rate,
        )
        self.sampler: Sampler = sampler or make_sampler(
            model,
            self.stop_token_ids,
            self.pad_token_id,
            kind=config.sampler,
            batch_size=config.sample_batch_size,
        )
        self.kl_controller = KLController(
            config.kl_coef,
            target=config.kl_target,
            rule=config.kl_controller,
            unit=config.kl_unit,
            horizon=config.kl_horizon,
        )
        self.generator = torch.Generator(self.device)
        self.callbacks = list(callbacks or ())
        self.timer = StageTimer()
        self.metrics: dict[str, float] = {}
        self.num_episodes = 0
        self.iteration = 0
        self.sources: dict[str, Any] = {}
        self.prompts: Prompts | None = None
        self.responses: Responses | None = None
        self.scores: Scores | None = None
        self._folder: RunFolder | None = None
        self._own_folder: Path | None = None
        self._clip = (config.clip_coef, config.clip_coef_high)
        self._ent_coef = config.ent_coef
        self._loss = TokenLoss(
            self.policy,
            self.critic,
            self.optimizer,
            self.reference,
            config,
            self._loss_options,
            lambda: self.kl_controller.coef,
        )

    def _tokenized(self, name: str, data: Any) -> Prompts:
        trunks = {
            "ref_model": None if self.reference is None else unwrapped(self.reference.model),
            "value_model": self.critic.trunk,
        }
        return checked_prompts(
            name, data, self.tokenizer, self.policy, trunks, self.config.response_length
        )

    @property
    def total_episodes(self) -> int:
        """Responses that `learn` trains on in all, rounded up to whole updates."""
        passes = math.ceil(self.config.num_epochs * len(self.prompts_data))
        total = self.config.total_episodes or passes
        size = self.config.rollout_batch_size
        return -(-total // size) * size

    def learn(self, callback: Callback | None = None) -> PPOTrainer:
        """Train until `total_episodes`, from where the trainer stands.

        Raises:
            RewardError: a reward failed. With a run_dir, everything before is in its checkpoint.
            FloatingPointError: no minibatch of an update had a finite loss and gradient.
            KeyboardInterrupt: Ctrl-C; the update is finished and a checkpoint saved first.
        """
        callbacks = [*self.callbacks, *([callback] if callback else [])]
        self._open_folder()
        bar = self._progress_bar()
        threads = torch.get_num_threads()
        if self.config.torch_threads is not None:
            torch.set_num_threads(self.config.torch_threads)
        interrupt = DeferredInterrupt()
        try:
            with interrupt:
                while self.num_episodes < self.total_episodes:
                    self._iterate(interrupt)
                    if bar is not None:
                        bar.update(self.config.rollout_batch_size)
                        bar.set_postfix_str(
                            f"score {self.metrics['objective/scores']:.2f}", refresh=False
                        )
                    answers = [callback(self) for callback in callbacks]
                    stop = any(answer is False for answer in answers)
                    last = stop or self.num_episodes >= self.total_episodes
                    due = self.iteration % self.config.save_every == 0
                    if self._folder is not None and (last or due or interrupt.requested):
                        self.save(self._folder.checkpoint)
                    if interrupt.requested:
                        interrupt.deliver()
                    if stop:
                        break
        finally:
            torch.set_num_threads(threads)
            if bar is not None:
                bar.close()
            if self._folder is not None:
                self._folder.close(draw=not interrupt.insisted)
                self._folder = None
        return self

    def train(self, resume_from_checkpoint: bool | str | None = None) -> PPOTrainer:
        """`learn` under transformers' name; True resumes from `run_dir`, a path from there."""
        if resume_from_checkpoint:
            path = self.config.run_dir if resume_from_checkpoint is True else resume_from_checkpoint
            if path is None:
                raise ValueError("resume_from_checkpoint=True needs a run_dir")
            self.load(path)
        return self.learn()

    def _iterate(self, interrupt: DeferredInterrupt) -> None:
        started = time.perf_counter()
        self._anneal()
        with self._state_kept(interrupt):
            with self.timer.stage("sample"):
                prompts = self.next_prompts()
                responses = self.sample(prompts)
            with self.timer.stage("score"):
                rollout = self.score(prompts, responses)
        with self.timer.stage("update"):
            stats = self.update(rollout)
        with self.timer.stage("log"):
            self._report(rollout, stats, started)
        try:
            if self.eval_data is not None and self.iteration % self.config.eval_every == 0:
                with self.timer.stage("eval"), self._state_kept(interrupt):
                    self.metrics.update(self.evaluate())
        finally:
            if self._folder is not None:
                self._folder.log(self.num_episodes, self.metrics)

    @contextmanager
    def _state_kept(self, interrupt: DeferredInterrupt) -> Iterator[None]:
        """Save the state between two updates if the block fails, which trains nothing."""
        try:
            yield
        except BaseException:
            if self._folder is not None and not interrupt.insisted:
                self.save(self._folder.checkpoint)
                log.error("training stopped; %s is the state before it", self._folder.checkpoint)
            raise

    def _anneal(self) -> None:
        config = self.config
        remaining = 1 - self.num_episodes / self.total_episodes
        if config.anneal_lr:
            self.optimizer.lr.fill_(config.learning_rate * remaining)
        if config.anneal_clip:
            high = config.clip_coef_high
            self._clip = (
                config.clip_coef * remaining,
                None if high is None else high * remaining,
            )
        if config.anneal_ent:
            self._ent_coef = config.ent_coef * remaining

    def _loss_options(self) -> dict[str, Any]:
        config = self.config
        in_loss = config.kl_in == "loss" and config.kl_estimator != "full"
        return {
            "clip_coef": self._clip[0],
            "clip_coef_high": self._clip[1],
            "dual_clip": config.dual_clip,
            "vf_coef": config.vf_coef,
            "vf_clip_coef": config.vf_clip_coef,
            "vf_clip": config.vf_clip,
            "ent_coef": self._ent_coef,
            "kl_coef": self.kl_controller.coef if in_loss else 0.0,
            "kl_estimator": "k3" if config.kl_estimator == "full" else config.kl_estimator,
            "temperature": config.temperature,
        }

    def next_prompts(self) -> Prompts:
        """This process's share of the next update's prompts, in an order drawn for every epoch."""
        size = self.config.rollout_batch_size
        number = len(self.prompts_data)
        first = self.num_episodes + rank()
        chosen: list[int] = []
        orders: dict[int, list[int]] = {}
        for episode in range(first, self.num_episodes + size, world_size()):
            epoch, place = divmod(episode, number)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(self.config.seed + 7919 * epoch)
                orders[epoch] = torch.randperm(number, generator=generator).tolist()
            chosen.append(orders[epoch][place])
        return self.prompts_data.take(chosen)

    def sample(self, prompts: Prompts, seed: int | None = None) -> Responses:
        """Generate a response to every prompt; seeds come from the episode's number."""
        seed = self.config.seed if seed is None else seed
        first = self.num_episodes + rank()
        # A seed of its own for every episode, whatever batch it is generated in.
        seeds = [stream(seed, first + world_size() * k) for k in range(len(prompts))]
        return self._sampled(prompts, seeds)

    def _sampled(self, prompts: Prompts, seeds: list[int]) -> Responses:
        self.sampler.load_policy(self.policy.model)
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            responses = self.sampler(
                prompts.ids,
                max_new_tokens=self.config.response_length,
                temperature=self.config.temperature,
                seeds=seeds,
            )
        check_responses(responses, len(prompts), self.config.response_length)
        return responses

    def score(self, prompts: Prompts, responses: Responses) -> TokenRollout:
        """Rewards, log-probs, values and KL of responses, and the advantages that follow."""
        config = self.config
        ids = response_ids(responses)
        highest = max(map(max, ids))
        if highest >= self.policy.vocab_size:
            raise ValueError(
                f"the sampler gave the token id {highest}; the model's vocabulary has "
                f"{self.policy.vocab_size}"
            )
        with failing_together(self.device):
            scores = self.reward(
                prompts.ids, ids, prompts=self._texts(prompts), columns=prompts.columns
            )
        shaped = shape_scores(
            scores.total,
            torch.tensor(responses.ended),
            missing_eos_penalty=config.missing_eos_penalty,
            missing_eos_score=config.missing_eos_score,
            clip=config.clip_scores,
        )
        if config.whiten_scores:
            shaped = masked_whiten(shaped, moments=all_moments(moments(shaped)))
        sequences = Sequences(prompts.ids, ids, self.device)
        evaluation = evaluate_tokens(self.policy, self.critic, self.reference, sequences, config)
        in_reward = self.kl_controller.coef if config.kl_in == "reward" else 0.0
        sampled = torch.cat(
            [
                row[:length]
                for row, length in zip(responses.log_probs, responses.lengths, strict=True)
            ]
        )
        sampled = sampled.to(self.device)
        rollout = make_rollout(sequences, evaluation, shaped, in_reward, sampled, config)
        self.prompts, self.responses, self.scores = prompts, responses, scores
        self._of_rollout = rollout_metrics(
            evaluation, scores, shaped, responses, sampled, in_reward
        )
        return rollout

    def _texts(self, prompts: Prompts) -> list[str] | None:
        return None if self.tokenizer is None else prompts.texts

    def update(self, rollout: TokenRollout) -> UpdateStats:
        """Epochs of minibatches over a rollout."""
        # Of every update and process its own, so that nothing of it needs saving.
        order = stream(self.config.seed, self.iteration * world_size() + rank())
        self.generator.manual_seed(order)
        return ppo_update(self._loss, self.optimizer, rollout, self.config, self.generator)

    def _report(self, rollout: TokenRollout, stats: UpdateStats, started: float) -> None:
        """Count and summarise an update, with one copy from the device."""
        config = self.config
        variance = explained_variance(rollout.values, rollout.returns, None)
        names, numbers = zip(*{**self._of_rollout.items}.items(), strict=True)
        # In float64, or the standard deviation of scores far from 0 would be rounding.
        sums = torch.stack([number.double() for number in numbers])
        all_sum_([sums])
        of_update = update_metrics(stats, self.optimizer.lr, variance)
        together = torch.cat([sums, torch.stack(list(of_update.values()))]).tolist()
        raise_device_errors()
        found = self._of_rollout.means(dict(zip(names, together, strict=False)))
        trained = dict(zip(of_update, together[len(names) :], strict=True))
        if trained["val/optimizer_steps"] == 0 and trained["val/skipped_steps"] > 0:
            raise FloatingPointError(
                f"update {self.iteration + 1}: no minibatch had a finite loss and gradient, nothing "
                "was learnt; lower learning_rate, or check the models' outputs"
            )
        kl = found.get(f"objective/kl_per_{config.kl_unit}")
        coefficient = self.kl_controller.coef
        if config.kl_controller != "fixed" and kl is not None:
            self.kl_controller.update(kl, config.rollout_batch_size)
        self.iteration += 1
        self.num_episodes += config.rollout_batch_size
        seconds = self.timer.take()
        elapsed = time.perf_counter() - started
        self.metrics = {
            **found,
            **trained,
            "episode": float(self.num_episodes),
            "objective/kl_coef": coefficient,
            "eps": config.rollout_batch_size / elapsed,
            "time/response_tokens_per_second": found["val/response_tokens"] / elapsed,
            **{f"time/{name}_seconds": spent for name, spent in seconds.items()},
        }

    def evaluate(self, prompts: Any = None, seed: int = 10_000) -> dict[str, float]:
        """Score sampled responses to prompts; those to `eval_dataset` also go to run_dir as samples.

        Args:
            prompts: see `tokenize_prompts`; None means `eval_dataset`.
            seed: of the responses.

        Returns:
            Means by name: eval/scores, eval/kl (per response), eval/eos_rate, eval/length, and
            every part of the reward.
        """
        data = self.eval_data if prompts is None else self._tokenized("prompts", prompts)
        if data is None:
            raise ValueError("evaluate: there is no eval_dataset; pass prompts")
        responses = self._sampled(data, [stream(seed, k) for k in range(len(data))])
        ids = response_ids(responses)
        scores = self.reward(data.ids, ids, prompts=self._texts(data), columns=data.columns)
        found = {
            "eval/scores": float(scores.total.mean()),
            "eval/eos_rate": sum(responses.ended) / len(data),
            "eval/length": sum(responses.lengths) / len(data),
        }
        found |= {f"eval/scores/{name}": float(part.mean()) for name, part in scores.parts.items()}
        if self.reference is not None:
            sequences = Sequences(data.ids, ids, self.device)
            kl = evaluate_tokens(self.policy, None, self.reference, sequences, self.config).kl
            assert kl is not None
            found["eval/kl"] = float(kl.sum()) / len(data)
        if prompts is None and self._folder is not None:
            self._write_samples(data, ids, scores)
        return found

    def _write_samples(self, prompts: Prompts, ids: list[list[int]], scores: Scores) -> None:
        """One JSON line an eval prompt, in a file of its own for every evaluation."""
        assert self._folder is not None
        asked: Sequence[Any] = prompts.texts
        texts: Sequence[Any] = ids
        if self.tokenizer is None:
            asked = prompts.ids
        else:
            texts = self.tokenizer.batch_decode(ids)
        lines = [
            json.dumps({"prompt": prompt, "response": text, "score": round(float(score), 4)})
            for prompt, text, score in zip(asked, texts, scores.total, strict=True)
        ]
        path = self._folder.path / "samples" / f"update-{self.iteration:06d}.jsonl"
        atomic_write_text(path, "\n".join(lines) + "\n")

    def _progress_bar(self) -> Any:
        if not self.config.progress_bar or rank():
            return None
        tqdm = require("tqdm.auto", "train", "progress_bar=True").tqdm
        return tqdm(
            total=self.total_episodes, initial=self.num_episodes, unit=" episodes", disable=None
        )

    def _open_folder(self) -> None:
        if self.config.run_dir is None or rank():
            return
        path = Path(self.config.run_dir).resolve()
        resume = self.num_episodes if path == self._own_folder else None
        from ppo_fast.llm.plots import plot_run

        self._folder = RunFolder(
            self.config.run_dir, resume, plot_run, "trainer.load('{folder}'); trainer.learn()"
        )
        self._own_folder = path
        self._folder.write_config(
            {"model": type(unwrapped(self.policy.model)).__name__, "sources": self.sources},
            self.config,
            require("transformers", "llm", "PPO for language models"),
        )
        self.save(self._folder.checkpoint)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint from which training resumes exactly; replaces the file atomically.

        It holds what is trained and the optimizer, not the models' frozen weights.
        """
        if not rank():
            save_trainer(self, path)

    def load(self, path: str | os.PathLike[str]) -> PPOTrainer:
        """Go on from a checkpoint, or the one in a run folder, into the models given at the start.

        The trainer has to be made with the same initial models, prompts and settings as the run's.

        Raises:
            CheckpointError: a missing, truncated or foreign file.
            ValueError: a checkpoint of other models.
        """
        self._own_folder = load_trainer(self, path)
        return self

    def save_model(self, folder: str | os.PathLike[str]) -> None:
        """Write the policy (for LoRA its adapters) and the tokenizer as transformers reads them."""
        if rank():
            return
        # What is trained are views into one buffer, which safetensors would take for shared weights.
        model: Any = self.policy.model
        state = {
            name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            for name, tensor in model.state_dict().items()
        }
        model.save_pretrained(folder, state_dict=state)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def generate(self, prompts: Any, seed: int = 0) -> list[str] | list[list[int]]:
        """Sample a response to each prompt: texts, or token ids without a tokenizer."""
        data = self._tokenized("prompts", prompts)
        responses = self._sampled(data, [stream(seed, k) for k in range(len(data))])
        ids = response_ids(responses)
        if self.tokenizer is None:
            return ids
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)
