"""Scores of whole responses, their shaping, and the reward of every token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.functional.kl import approx_kl
from ppo_fast.functional.whiten import masked_whiten

RewardFunction = Callable[..., Any]
RewardModel = Callable[[list[list[int]], list[int]], Tensor]

TEXTS = ("prompts", "completions")
IDS = ("prompt_ids", "completion_ids")
ESTIMATORS = ("k1", "k2", "k3")


class RewardError(RuntimeError):
    """A reward function or model that failed or returned no B finite numbers; names which."""


class Scores(NamedTuple):
    """Scores of B responses."""

    total: Tensor
    """[B] float32 on the CPU, the weighted sum of the parts"""
    parts: dict[str, Tensor]
    """[B] float32 on the CPU by function, before its weight"""


class _Call(NamedTuple):
    """How a reward function takes its arguments."""

    name: str
    function: RewardFunction
    positional: tuple[str, ...]
    keywords: tuple[str, ...]


class Reward:
    """Reward functions and a reward model, weighted, behind one call.

    A reward function scores the whole batch: it returns B numbers as a list, an array or a tensor.
    It gets, by keyword, what its parameters name:

        prompts, completions        lists of B strings, special tokens left out
        prompt_ids, completion_ids  lists of B lists of token ids, EOS included
        any column of the data      a list of B entries

    or all of them if it takes `**kwargs`, as TRL's reward functions do. A function whose parameters
    have other names gets the completions if one of them is required, the prompts and completions if
    two are. Every function has lists of its own, which it may change. No gradients are recorded.

    Args:
        reward_fn: a function or several.
        reward_model: `(sequences, prompt_lengths) -> [B]`, called with prompt and response of each
            as one list of token ids.
        weights: one for every function and, last, for the model; 1 by default.
        tokenizer: decodes; needed for texts.
        columns: names of the data's columns.

    Attributes:
        names: of the parts, in the order of the weights.
        columns: of the data, those that the functions take.

    Raises:
        TypeError: a function that is not callable, is a coroutine or an `nn.Module`, or parameters
            that cannot be served.
        ValueError: neither function nor model, weights of another number or not finite, or texts
            asked for without a tokenizer.
    """

    def __init__(
        self,
        reward_fn: RewardFunction | Sequence[RewardFunction] | None = None,
        reward_model: RewardModel | None = None,
        *,
        weights: Sequence[float] | None = None,
        tokenizer: Any = None,
        columns: Collection[str] = (),
    ) -> None:
        functions = _listed(reward_fn)
        if not functions and reward_model is None:
            raise ValueError("Reward: neither reward_fn nor reward_model; expected one or both")
        if reward_model is not None and not callable(reward_model):
            raise TypeError(
                f"Reward: reward_model is a {type(reward_model).__name__}; expected a callable "
                "(sequences, prompt_lengths) -> [B]"
            )
        shadowed = sorted({*TEXTS, *IDS} & set(columns))
        if shadowed:
            raise ValueError(
                f"Reward: the data's column {shadowed[0]!r} has the name of an argument of reward "
                "functions; rename the column"
            )
        self.names = _distinct([_name_of(function) for function in functions])
        self._calls = [
            _resolve(name, function, columns)
            for name, function in zip(self.names, functions, strict=True)
        ]
        if reward_model is not None:
            self.names = _distinct([*self.names, "reward_model"])
        self._model = reward_model
        self._tokenizer = tokenizer
        self._wanted = {name for call in self._calls for name in call.positional + call.keywords}
        self.columns = self._wanted & set(columns)
        if tokenizer is None and self._wanted & set(TEXTS):
            raise ValueError(
                "Reward: the reward functions take texts and tokenizer is None; expected the "
                "tokenizer that decodes them"
            )
        self.weights = _checked_weights(weights, len(self.names))

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        *,
        prompts: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Scores:
        """Score B responses.

        Args:
            prompt_ids, response_ids: B lists of token ids without padding; responses with their
                EOS where they ended.
            prompts: B texts as the user wrote them; decoded from prompt_ids by default.
            columns: B entries for each column named at construction.

        Raises:
            RewardError: a function or the model raised, or did not return B finite numbers.
            ValueError: the arguments are not B each, or a column is missing.
        """
        columns = columns or {}
        size = len(prompt_ids)
        _check_sizes(size, response_ids, prompts, columns)
        given: dict[str, Sequence[Any]] = {name: columns[name] for name in columns}
        given["prompt_ids"] = prompt_ids
        given["completion_ids"] = response_ids
        if "completions" in self._wanted:
            given["completions"] = self._decoded(response_ids)
        if "prompts" in self._wanted:
            given["prompts"] = self._decoded(prompt_ids) if prompts is None else prompts
        missing = sorted(self._wanted - given.keys())
        if missing:
            raise ValueError(
                f"Reward: the column {missing[0]!r} was named at construction and is not in this "
                f"call's {sorted(columns)}"
            )

        def text_of(index: int) -> str:
            return self._decoded([response_ids[index]])[0] if self._tokenizer else "not decoded"

        parts = {}
        for name, function, positional, keywords in self._calls:
            result = _called(
                name,
                function,
                *[_own(given[key]) for key in positional],
                **{key: _own(given[key]) for key in keywords},
            )
            parts[name] = _checked_scores(name, result, size, text_of)
        if self._model is not None:
            name = self.names[-1]
            sequences = [[*p, *r] for p, r in zip(prompt_ids, response_ids, strict=True)]
            result = _called(name, self._model, sequences, [len(prompt) for prompt in prompt_ids])
            parts[name] = _checked_scores(name, result, size, text_of)

        stacked = torch.stack(list(parts.values())).double()
        total = (stacked * torch.tensor(self.weights, dtype=torch.float64)[:, None]).sum(0).float()
        return Scores(_checked_scores("the weighted sum", total, size, text_of), parts)

    def _decoded(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self._tokenizer.batch_decode([list(row) for row in ids], skip_special_tokens=True)


def shape_scores(
    scores: Tensor,
    ended: Sequence[bool] | Tensor,
    *,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
    clip: float | None = None,
    whiten: bool = False,
) -> Tensor:
    """Scores as PPO takes them: first the missing EOS, then the clip, then whitening.

    With data parallelism, whitening is over this batch only: give it the scores of all ranks.

    Args:
        scores: [B] floating, one for each response.
        ended: B bools, whether the response's last token is its EOS.
        missing_eos_penalty: subtracted where a response did not end (TRL); >= 0.
        missing_eos_score: the score of a response that did not end, in place of its own
            (lm-human-preferences, Ziegler et al. 2019, arXiv:1909.08593, with -1).
        clip: scores are held in [-clip, clip]; > 0.
        whiten: mean 0 and unbiased standard deviation 1 over the batch; one score stays as it is.

    Returns:
        [B] float32, a new tensor.

    Raises:
        ValueError: shapes do not fit, both ways to treat a missing EOS, or a number out of range.
    """
    name = "shape_scores"
    if scores.ndim != 1 or not scores.is_floating_point():
        raise ValueError(
            f"{name}: scores is {list(scores.shape)} {scores.dtype}; expected [B] floating"
        )
    ended = torch.as_tensor(ended, device=scores.device)
    if ended.shape != scores.shape or ended.dtype != torch.bool:
        raise ValueError(
            f"{name}: ended is {list(ended.shape)} {ended.dtype}; expected {list(scores.shape)} "
            "torch.bool"
        )
    if missing_eos_penalty is not None and missing_eos_score is not None:
        raise ValueError(
            f"{name}: missing_eos_penalty is {missing_eos_penalty} and missing_eos_score "
            f"{missing_eos_score}; expected one of them, the score replaces what a penalty would "
            "lower"
        )
    if missing_eos_penalty is not None and not 0 <= missing_eos_penalty < math.inf:
        raise ValueError(
            f"{name}: missing_eos_penalty is {missing_eos_penalty}; expected a finite number >= 0, "
            "it is subtracted"
        )
    if missing_eos_score is not None and not math.isfinite(missing_eos_score):
        raise ValueError(
            f"{name}: missing_eos_score is {missing_eos_score}; expected a finite number"
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"{name}: clip is {clip}; expected a number > 0, or None for no clip")
    shaped = scores.float()
    if missing_eos_penalty is not None:
        shaped = torch.where(ended, shaped, shaped - missing_eos_penalty)
    if missing_eos_score is not None:
        shaped = shaped.masked_fill(~ended, missing_eos_score)
    if clip is not None:
        shaped = shaped.clamp(-clip, clip)
    if whiten:
        shaped = masked_whiten(shaped)
    return shaped.clone() if shaped is scores else shaped


def token_rewards(
    scores: Tensor,
    kl: Tensor | None,
    response_lengths: Sequence[int],
    *,
    kl_coef: float | Tensor = 0.0,
) -> Tensor:
    """Rewards of the M tokens of B responses, laid end to end.

        r_t = -kl_coef kl_t + score [t is the last token of its response]

    There are no masked tokens, so none can take a score.

    Args:
        scores: [B] floating, a constant; on any device.
        kl: [M] floating, a constant: an estimate (`kl_per_token`) or the exact KL of every token, in
            nats; None if the KL is in the loss or off.
        response_lengths: B lengths >= 1 that sum to M.
        kl_coef: float, or a 0-d tensor on the device of kl.

    Returns:
        [M] on the device of kl, or of scores without it; float32, or float64 where either is.

    Raises:
        ValueError: shapes or lengths do not fit, an empty response, a gradient would be dropped, or
            a coefficient without kl.
    """
    name = "token_rewards"
    if scores.ndim != 1 or not scores.is_floating_point():
        raise ValueError(
            f"{name}: scores is {list(scores.shape)} {scores.dtype}; expected [B] floating"
        )
    if len(response_lengths) != scores.shape[0] or not response_lengths:
        raise ValueError(
            f"{name}: {len(response_lengths)} response_lengths for {scores.shape[0]} scores; "
            "expected as many, at least one"
        )
    for index, length in enumerate(response_lengths):
        if length < 1:
            raise ValueError(
                f"{name}: response {index} has length {length}; expected >= 1, a response without "
                "tokens has none to take its score"
            )
    ends = list(accumulate(response_lengths))
    if kl is not None and (kl.shape != (ends[-1],) or not kl.is_floating_point()):
        raise ValueError(
            f"{name}: kl is {list(kl.shape)} {kl.dtype}; expected [{ends[-1]}] floating, the sum of "
            "response_lengths"
        )
    if kl is None and not (isinstance(kl_coef, float | int) and kl_coef == 0):
        raise ValueError(
            f"{name}: kl is None with kl_coef {kl_coef}; expected kl, or kl_coef 0 where there is no "
            "KL in the reward"
        )
    for what, tensor in (("scores", scores), ("kl", kl)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {what} requires a gradient; expected a constant, use {what}.detach()"
            )
    doubles = any(t is not None and t.dtype is torch.float64 for t in (scores, kl))
    dtype = torch.float64 if doubles else torch.float32
    rewards = scores.new_zeros(ends[-1], dtype=dtype)
    if kl is not None:
        rewards = rewards.to(kl.device) - kl.to(dtype) * kl_coef
    last = torch.tensor([end - 1 for end in ends]).to(rewards.device, non_blocking=True)
    # One token an index: an addition without accumulation, and the same in every run.
    rewards[last] += scores.to(rewards.device, dtype)
    return rewards


def whiten_rewards(rewards: Tensor, moments: Tensor | None = None) -> Tensor:
    """Give token rewards standard deviation 1 and leave their mean, as TRL's `whiten_rewards`.

    Args:
        rewards: [M] floating, a constant.
        moments: [3], those of a batch that this is a part of; see `masked_whiten`.

    Returns:
        [M] float32; one reward stays as it is.

    Raises:
        ValueError: rewards is not 1-D, or what `masked_whiten` raises.
    """
    if rewards.ndim != 1:
        raise ValueError(f"whiten_rewards: rewards is {list(rewards.shape)}; expected [M]")
    return masked_whiten(rewards, shift_mean=False, moments=moments)


def kl_per_token(log_probs: Tensor, ref_log_probs: Tensor, estimator: str = "k1") -> Tensor:
    """KL of the policy from the reference, estimated at every response token; see `approx_kl`.

    Only "k1" in the reward has the gradient of the sequence's KL; "k2" and "k3" are less noisy
    numbers to look at. The exact KL needs logits: `kl_from_logits`.

    Args:
        log_probs, ref_log_probs: [M] floating, of the response tokens, at one temperature.
        estimator: "k1", "k2" or "k3".

    Returns:
        [M] float32 in nats, a constant.

    Raises:
        ValueError: shapes or dtypes do not fit, or estimator is another word.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"kl_per_token: estimator is {estimator!r}; expected one of {', '.join(ESTIMATORS)}; the "
            "exact KL comes from logits, by kl_from_logits"
        )
    return approx_kl(log_probs.detach(), ref_log_probs.detach(), estimator=estimator).float()


def _listed(reward_fn: Any) -> list[RewardFunction]:
    if reward_fn is None:
        return []
    functions = list(reward_fn) if isinstance(reward_fn, list | tuple) else [reward_fn]
    for index, function in enumerate(functions):
        if isinstance(function, torch.nn.Module):
            raise TypeError(
                f"Reward: reward_fn {index} is the module {type(function).__name__}; expected a "
                "function of texts or token ids; give a model as reward_model"
            )
        if not callable(function):
            raise TypeError(
                f"Reward: reward_fn {index} is a {type(function).__name__}; expected a callable or "
                "a list of them"
            )
        call = function if inspect.isroutine(function) else type(function).__call__
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):
            raise TypeError(
                f"Reward: reward_fn {index} is a coroutine; expected a plain function, wrap it: "
                "lambda completions: asyncio.run(f(completions))"
            )
    return functions


def _name_of(function: Any) -> str:
    while hasattr(function, "func"):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "reward_fn" if name == "<lambda>" else name


def _distinct(names: list[str]) -> list[str]:
    """Names, with _2, _3, ... where one comes again."""
    found: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in found:
            number += 1
            candidate = f"{name}_{number}"
        found.append(candidate)
    return found


def _resolve(name: str, function: RewardFunction, columns: Collection[str]) -> _Call:
    known = (*TEXTS, *IDS, *columns)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Reward: the parameters of {name} cannot be seen; expected a Python function, wrap it: "
            "lambda completions: f(completions)"
        ) from error
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    fixed = [p for p in parameters if p.kind not in variable]
    positional_only = inspect.Parameter.POSITIONAL_ONLY
    named = [p.name for p in fixed if p.name in known and p.kind is not positional_only]
    others = [p for p in fixed if p.name not in named and p.default is inspect.Parameter.empty]
    if not others and (named or takes_all):
        return _Call(name, function, (), known if takes_all else tuple(named))
    by_position = all(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in others)
    if not named and by_position and len(others) in (1, 2):
        positional = TEXTS[2 - len(others) :]
        return _Call(name, function, positional, known if takes_all else ())
    asked = ", ".join(repr(p.name) for p in others) or "none by name"
    raise TypeError(
        f"Reward: {name} takes {asked} beside {named or 'none'} of {', '.join(known)}; expected "
        "parameters of these names, or **kwargs, or one parameter for the completions, or two for "
        "prompts and completions; give others a default or bind them with functools.partial"
    )


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ValueError(
            f"Reward: {len(weights)} weights for {count} rewards; expected one for each function "
            "and, last, for the reward model"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"Reward: weights are {list(weights)}; expected finite numbers")
    return [float(weight) for weight in weights]


def _check_sizes(
    size: int,
    response_ids: Sequence[Any],
    prompts: Sequence[str] | None,
    columns: Mapping[str, Sequence[Any]],
) -> None:
    lengths = {"response_ids": len(response_ids)}
    if prompts is not None:
        lengths["prompts"] = len(prompts)
    lengths |= {f"the column {name!r}": len(column) for name, column in columns.items()}
    for what, length in lengths.items():
        if length != size:
            raise ValueError(f"Reward: {size} prompt_ids and {length} of {what}; expected as many")
    if size == 0:
        raise ValueError("Reward: no responses; expected at least one")


def _own(values: Sequence[Any]) -> list[Any]:
    """A copy that a reward function may change without harm to the next."""
    return [list(value) if isinstance(value, list) else value for value in values]


def _called(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        with torch.no_grad():
            return function(*args, **kwargs)
    except Exception as error:
        raise RewardError(f"{name} raised {type(error).__name__}: {error}") from error


def _checked_scores(name: str, result: Any, size: int, text_of: Callable[[int], str]) -> Tensor:
    """[B] float32 on the CPU, or the error that says what came instead."""
    if isinstance(result, bool | int | float) or result is None:
        raise RewardError(
            f"{name} returned {result!r} for {size} responses; expected {size} numbers: it is "
            "called once for the whole batch, as in lambda completions: [f(c) for c in completions]"
        )
    if isinstance(result, list | tuple):
        for index, value in enumerate(result):
            if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
                raise RewardError(
                    f"{name} returned {value!r} at {index}; expected a number for every response"
                )
    try:
        if isinstance(result, list | tuple):
            result = [float(value) for value in result]
        scores = torch.as_tensor(result)
        if scores.is_complex():
            raise TypeError("complex numbers")
    except Exception as error:
        raise RewardError(
            f"{name} returned a {type(result).__name__} that is no list, array or tensor of "
            f"{size} numbers: {error}"
        ) from error
    if scores.shape != (size,):
        raise RewardError(
            f"{name} returned {list(scores.shape)} for {size} responses; expected [{size}], one "
            "number for each"
        )
    scores = scores.detach().to("cpu", torch.float32, copy=True)
    finite = torch.isfinite(scores).tolist()
    if not all(finite):
        index = finite.index(False)
        raise RewardError(
            f"{name} returned {scores[index].item()} for response {index} ({text_of(index)!r}); "
            "expected a finite number within float32"
        )
    return scores
