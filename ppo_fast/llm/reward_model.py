"""A reward model: a transformer with a scalar head, trained on preferences by Bradley-Terry."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ppo_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_fast.extras import require
from ppo_fast.llm.forward import choose_layout, disable_dropout, hidden_states, trunk_of
from ppo_fast.llm.models import new_head
from ppo_fast.llm.packing import micro_batches, pack
from ppo_fast.llm.sft import Callback, check_sequences, minimise, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "reward_model.safetensors"
KIND = "reward_model"
BINS = 10


class TokenPair(NamedTuple):
    """Two token sequences, prompt included, of which the first is preferred.

    Attributes:
        chosen, rejected: token ids.
        margin: by how much the score of the chosen one should be higher (Touvron et al. 2023,
            section 3.2.2, arXiv:2307.09288).
    """

    chosen: Sequence[int]
    rejected: Sequence[int]
    margin: float = 0.0


class RewardModel(nn.Module):
    """The score of a sequence, read at its last token.

        logits(sequences) = head(hidden state of the last token)
        model(sequences)  = gain * logits(sequences) + bias

    Which token is last follows from the length of the list, never from its id. A score depends on
    its own sequence alone, to rounding, whatever is scored along with it.

    Make one with `from_causal_lm`, `from_sequence_classifier` or `from_pretrained`.

    Args:
        trunk: a transformers model without head; its dropout is switched off.
        head: D -> 1.

    Attributes:
        trunk, head: as given.
        gain, bias: 0-d float32 buffers set by `normalise`; 1 and 0 at first.
        layout: "packed" or "padded", how sequences go through the trunk.
        vocab_size: token ids are below it.
    """

    trunk: Any
    gain: Tensor
    bias: Tensor

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        if head.out_features != 1:
            raise ValueError(
                f"RewardModel: the head has {head.out_features} outputs; expected 1, a reward"
            )
        disable_dropout(trunk)
        self.trunk = trunk
        # Scores are float32 whatever the trunk's dtype: their differences are what is learnt.
        self.head = head.float()
        self.register_buffer("gain", torch.ones((), device=head.weight.device))
        self.register_buffer("bias", torch.zeros((), device=head.weight.device))
        self.layout = choose_layout(trunk)
        self.vocab_size: int = self.trunk.get_input_embeddings().weight.shape[0]

    @classmethod
    def from_causal_lm(cls, model: nn.Module, seed: int = 0) -> Self:
        """Copy the trunk of a causal LM and put a new head on it.

        The head's weights have standard deviation 1 / sqrt(D + 1), its bias is 0 (Stiennon et al.
        2020, arXiv:2009.01325).

        Args:
            model: a transformers causal LM; it is not changed.
            seed: of the head.

        Raises:
            TypeError: something else, or a peft model, whose adapters a reward model cannot save.
        """
        _refuse_adapters("from_causal_lm", model)
        is_lm = hasattr(model, "get_output_embeddings")
        embeddings: Any = model.get_output_embeddings() if is_lm else None  # type: ignore[operator]
        if embeddings is None:
            raise TypeError(
                f"RewardModel.from_causal_lm: model is a {type(model).__name__}; expected a causal LM "
                "of transformers, with a head over the vocabulary"
            )
        # All of it is to be trained, where the original may be a frozen reference.
        trunk = copy.deepcopy(trunk_of(model)).requires_grad_(True)
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = new_head(embeddings.weight.shape[1])
        return cls(trunk, head.to(device))

    @classmethod
    def from_sequence_classifier(cls, model: nn.Module, share: bool = False) -> Self:
        """Make one of a transformers `...ForSequenceClassification` with `num_labels=1`.

        Args:
            model: the classifier.
            share: take its trunk itself, which saves the memory of a copy; else it is not changed.

        Raises:
            TypeError: it has no linear layer `score`, as a classifier on a causal LM does.
            ValueError: it has another number of labels.
        """
        _refuse_adapters("from_sequence_classifier", model)
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear):
            raise TypeError(
                f"RewardModel.from_sequence_classifier: model is a {type(model).__name__}; expected a "
                "sequence classifier made from a causal LM, with a linear layer 'score'"
            )
        head = nn.Linear(score.in_features, score.out_features).to(score.weight.device)
        with torch.no_grad():
            head.weight.copy_(score.weight)
            head.bias.zero_() if score.bias is None else head.bias.copy_(score.bias)
        if share:
            return cls(trunk_of(model), head)
        return cls(copy.deepcopy(trunk_of(model)).requires_grad_(True), head)

    def logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[B] float32 scores before `gain` and `bias`, in one differentiable forward."""
        check_sequences("RewardModel", "sequences", sequences, self.trunk)
        return self._logits(sequences)

    @torch.no_grad()
    def forward(self, sequences: Sequence[Sequence[int]], *, token_budget: int = 16_384) -> Tensor:
        """[B] float32 scores without gradient.

        Args:
            sequences: token ids, prompt and response, none empty; any order of lengths.
            token_budget: tokens a forward, see `micro_batches`; bounds the memory.

        Raises:
            ValueError: no sequences, an empty one, an id outside the vocabulary, one longer than
                the context.
        """
        check_sequences("RewardModel", "sequences", sequences, self.trunk)
        return self.gain * self._inferred(sequences, token_budget) + self.bias

    def normalise(
        self, sequences: Sequence[Sequence[int]], *, scale: bool = True, token_budget: int = 16_384
    ) -> None:
        """Set `gain` and `bias` so that the scores of reference responses have mean 0 and std 1.

        Preferences fix scores up to a constant, which a policy would take for a reward of every
        response (Ziegler et al. 2019, section 2.1, arXiv:1909.08593).

        Args:
            sequences: prompts with responses of the policy to be trained, as it is before.
            scale: False leaves the spread as it is, and only moves the mean.
            token_budget: see `forward`.

        Raises:
            ValueError: fewer than two sequences, or scores that do not differ or are not finite.
        """
        if len(sequences) < 2:
            raise ValueError(
                f"RewardModel.normalise: {len(sequences)} sequences; expected at least 2, better 200"
            )
        check_sequences("RewardModel.normalise", "sequences", sequences, self.trunk)
        with torch.no_grad():
            scores = self._inferred(sequences, token_budget).double()
        mean, std = float(scores.mean()), float(scores.std(correction=0))
        if not (math.isfinite(mean) and std > 1e-6 * max(1.0, abs(mean))):
            raise ValueError(
                f"RewardModel.normalise: the scores have mean {mean:.3g} and standard deviation "
                f"{std:.3g}; expected finite scores that differ. Train the reward model first, and "
                "give responses that differ"
            )
        gain = 1 / std if scale else 1.0
        self.gain.fill_(gain)
        self.bias.fill_(-mean * gain)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer with ids that this model does not know.

        A model may have more rows than its tokenizer has tokens, never fewer.

        Raises:
            ValueError: the tokenizer is larger than the vocabulary.
        """
        if len(tokenizer) > self.vocab_size:
            raise ValueError(
                f"RewardModel: the tokenizer has {len(tokenizer)} tokens, the reward model a "
                f"vocabulary of {self.vocab_size}; expected the tokenizer it was trained with"
            )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, config, gain and bias into one file of `folder`, replaced atomically.

        Raises:
            CheckpointError: it cannot be written; what was there is intact.
            ValueError: the trunk is of a class that transformers does not have.
        """
        transformers = require("transformers", "llm", "a reward model")
        kind = self.trunk.config.model_type
        known = transformers.CONFIG_MAPPING
        if kind not in known or type(self.trunk) not in _classes(transformers, known[kind]):
            raise ValueError(
                f"RewardModel.save_pretrained: the trunk is a {type(self.trunk).__name__} of model "
                f"type {kind!r}, which transformers.AutoModel cannot make anew; expected a class of "
                "transformers"
            )
        config = json.loads(self.trunk.config.to_json_string(use_diff=False))
        tensors = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        save_checkpoint(Path(folder) / FILE, tensors, {"kind": KIND, "config": config})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what `save_pretrained` wrote, or a sequence classifier saved by transformers.

        No code of the folder runs: weights are safetensors, classes are those of transformers.

        Raises:
            FileNotFoundError: the folder holds neither.
            CheckpointError: the file is corrupt, or a checkpoint of something else.
            TypeError, ValueError: see `from_sequence_classifier`.
        """
        transformers = require("transformers", "llm", "a reward model")
        path = Path(folder) / FILE
        if path.exists():
            tensors, meta = load_checkpoint(path)
            if meta.get("kind") != KIND:
                raise CheckpointError(
                    f"{path} is a checkpoint of {meta.get('kind')!r}; expected a reward model"
                )
            settings = dict(meta["config"])
            config = transformers.CONFIG_MAPPING[settings.pop("model_type")].from_dict(settings)
            model = cls(
                transformers.AutoModel.from_config(config),
                nn.Linear(tensors["head.weight"].shape[1], 1),
            )
            model.load_state_dict(tensors, assign=True)
            return model.eval()
        if not (Path(folder) / "config.json").exists():
            raise FileNotFoundError(
                f"{folder} holds no {FILE} and no config.json; expected a folder that "
                "RewardModel.save_pretrained or transformers wrote"
            )
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        return cls.from_sequence_classifier(classifier).eval()

    def _logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        hidden = _last_hidden(self.trunk, sequences, self.layout)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()

    def _inferred(self, sequences: Sequence[Sequence[int]], token_budget: int) -> Tensor:
        """`_logits` in micro-batches of like lengths, in the order given."""
        groups = micro_batches([len(sequence) for sequence in sequences], token_budget)
        scores = torch.cat([self._logits([sequences[i] for i in group]) for group in groups])
        places = torch.tensor([index for group in groups for index in group])
        return torch.empty_like(scores).index_copy_(0, places.to(scores.device), scores)


def as_reward_model(model: nn.Module) -> RewardModel:
    """A `RewardModel` as it is, or one that shares a sequence classifier's trunk.

    Raises:
        TypeError, ValueError: see `RewardModel.from_sequence_classifier`.
    """
    if isinstance(model, RewardModel):
        return model
    return RewardModel.from_sequence_classifier(model, share=True)


def train_reward_model(
    model: RewardModel,
    pairs: Sequence[TokenPair | tuple[Any, ...]],
    *,
    epochs: float = 1.0,
    steps: int | None = None,
    batch_size: int = 32,
    token_budget: int = 16_384,
    learning_rate: float = 1e-5,
    warmup: float = 0.05,
    schedule: str = "linear",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    center_rewards_coefficient: float = 0.0,
    held_out: float | Sequence[TokenPair | tuple[Any, ...]] = 0.1,
    seed: int = 0,
    log_every: int = 50,
    callback: Callback | None = None,
) -> dict[str, float]:
    """Train a reward model on preferences.

        loss = mean( -log sigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2 )

    The first term is Bradley and Terry's likelihood (Ouyang et al. 2022, eq. 1, arXiv:2203.02155),
    the second keeps scores around 0 (Eisenstein et al. 2023, arXiv:2312.09244). `r` are `logits`;
    a `gain` and `bias` of before are reset. Both sequences of a pair go through the same forward.

    Args:
        model: trained in place, on its device.
        pairs: `TokenPair`s or tuples alike.
        center_rewards_coefficient: c, TRL's name; 0.01 is common.
        held_out: a share of `pairs`, or other pairs, to report on. Pairs that have a response in
            common belong on the same side: pass those to be held out.
        epochs, steps, batch_size, token_budget, learning_rate, warmup, schedule, weight_decay,
            max_grad_norm, seed, log_every, callback: see `train_sft`; a batch counts pairs.

    Returns:
        `loss` (mean over the last tenth of the steps), `steps`, `seconds`, and where pairs were
        held out what `evaluate_reward_model` returns.

    Raises:
        ValueError: no pairs, a pair of equal sequences, a margin that is not finite, token ids of
            another vocabulary, a setting out of range.
        FloatingPointError: a loss or gradient is not finite; the model is as before that step.
    """
    name = "train_reward_model"
    checked = _checked_pairs(name, "pairs", pairs, model)
    if not (math.isfinite(center_rewards_coefficient) and center_rewards_coefficient >= 0):
        raise ValueError(
            f"{name}: center_rewards_coefficient is {center_rewards_coefficient}; expected a number "
            ">= 0"
        )
    if isinstance(held_out, int | float):
        train, aside = split(name, len(checked), held_out, seed)
        test = [checked[index] for index in aside]
    else:
        train = list(range(len(checked)))
        test = _checked_pairs(name, "held_out", held_out, model) if len(held_out) else []

    def loss_of(batch: list[int], denominator: int) -> Tensor:
        some = [checked[index] for index in batch]
        scores = model._logits([pair.chosen for pair in some] + [pair.rejected for pair in some])
        margins = scores.new_tensor([pair.margin for pair in some])
        chosen, rejected = scores.chunk(2)
        losses = preference_losses(chosen, rejected, margins, center_rewards_coefficient)
        return losses.sum() / denominator

    model.gain.fill_(1.0)
    model.bias.fill_(0.0)
    metrics = minimise(
        name,
        model,
        loss_of,
        indices=train,
        lengths=[2 * max(len(pair.chosen), len(pair.rejected)) for pair in checked],
        weights=[1] * len(checked),
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        token_budget=token_budget,
        learning_rate=learning_rate,
        warmup=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        log_every=log_every,
        callback=callback,
    )
    del metrics["weight"]
    return metrics | (evaluate_reward_model(model, test, token_budget=token_budget) if test else {})


@torch.no_grad()
def evaluate_reward_model(
    model: RewardModel,
    pairs: Sequence[TokenPair | tuple[Any, ...]],
    *,
    token_budget: int = 16_384,
) -> dict[str, float]:
    """How well a reward model predicts preferences; arguments and errors as in training.

    Returns:
        `eval_loss` (Bradley-Terry, without centering), `eval_accuracy` (a tie counts half),
        `eval_margin` (mean r_chosen - r_rejected), `eval_calibration_error` of its confidence
        sigmoid(|r_chosen - r_rejected|), `eval_mean_score` and `eval_score_std` over both sides.
    """
    checked = _checked_pairs("evaluate_reward_model", "pairs", pairs, model)
    sequences = [pair.chosen for pair in checked] + [pair.rejected for pair in checked]
    scores = model._inferred(sequences, token_budget).double().cpu()
    chosen, rejected = scores.chunk(2)
    difference = chosen - rejected
    margins = difference.new_tensor([pair.margin for pair in checked])
    right = (difference.sign() + 1) / 2
    return {
        "eval_loss": float(preference_losses(chosen, rejected, margins).mean()),
        "eval_accuracy": float(right.mean()),
        "eval_margin": float(difference.mean()),
        "eval_calibration_error": expected_calibration_error(difference.abs().sigmoid(), right),
        "eval_mean_score": float(scores.mean()),
        "eval_score_std": float(scores.std(correction=0)),
    }


def preference_losses(
    chosen: Tensor, rejected: Tensor, margins: Tensor, center_rewards_coefficient: float = 0.0
) -> Tensor:
    """[B] of `train_reward_model`'s loss, from scores [B] of both sides and margins [B]."""
    losses = -logsigmoid(chosen - rejected - margins)
    if center_rewards_coefficient:
        losses = losses + center_rewards_coefficient * (chosen + rejected).square()
    return losses


def expected_calibration_error(probabilities: Tensor, outcomes: Tensor, bins: int = BINS) -> float:
    """Mean gap between predicted probability and frequency (Guo et al. 2017, arXiv:1706.04599).

        sum_b n_b / n |mean probability in b - mean outcome in b|,   b: equal parts of [0, 1]

    Args:
        probabilities: [n] in [0, 1].
        outcomes: [n] in [0, 1]; 1 where the event happened.
        bins: number of parts.

    Raises:
        ValueError: shapes differ, n is 0, or a probability is outside [0, 1].
    """
    if probabilities.shape != outcomes.shape or probabilities.ndim != 1 or not len(outcomes):
        raise ValueError(
            f"expected_calibration_error: probabilities {list(probabilities.shape)} and outcomes "
            f"{list(outcomes.shape)}; expected the same [n], n > 0"
        )
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError("expected_calibration_error: a probability is outside [0, 1] or NaN")
    place = (probabilities * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(
        0, place.cpu(), (probabilities - outcomes).double().cpu()
    )
    return float(gaps.abs().sum()) / len(outcomes)


def _last_hidden(trunk: nn.Module, sequences: Sequence[Sequence[int]], layout: str) -> Tensor:
    """[B, D]: the hidden state of the last token of each sequence."""
    # Packed, a sequence's hidden states are those that predict its response: here one token more,
    # whose id nothing reads.
    device = next(trunk.parameters()).device
    return hidden_states(trunk, pack(sequences, [[0]] * len(sequences), device), layout)


def _classes(transformers: Any, config_class: type) -> tuple[type, ...]:
    """What `AutoModel.from_config` makes of a config."""
    found = transformers.MODEL_MAPPING.get(config_class, ())
    return found if isinstance(found, tuple) else (found,)


def _refuse_adapters(name: str, model: nn.Module) -> None:
    if hasattr(model, "get_base_model"):
        raise TypeError(
            f"RewardModel.{name}: model is a {type(model).__name__}; expected a transformers model "
            "without adapters, use model.merge_and_unload()"
        )


def _checked_pairs(
    name: str,
    argument: str,
    pairs: Sequence[TokenPair | tuple[Any, ...]],
    model: RewardModel,
) -> list[TokenPair]:
    if not len(pairs):
        raise ValueError(f"{name}: {argument} is empty; expected at least one preference")
    checked = [TokenPair(*pair) for pair in pairs]
    check_sequences(name, f"{argument} (chosen)", [p.chosen for p in checked], model.trunk)
    check_sequences(name, f"{argument} (rejected)", [p.rejected for p in checked], model.trunk)
    for index, pair in enumerate(checked):
        if list(pair.chosen) == list(pair.rejected):
            raise ValueError(
                f"{name}: chosen and rejected of {argument}[{index}] are equal; expected two answers "
                "that differ. Leave the pair out: it teaches nothing"
            )
        if not math.isfinite(pair.margin):
            raise ValueError(
                f"{name}: the margin of {argument}[{index}] is {pair.margin}; expected a finite "
                "number"
            )
    return checked
