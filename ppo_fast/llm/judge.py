"""Judges that compare two answers: a gold score in code, or a causal language model (RLAIF)."""

from __future__ import annotations

import inspect
import math
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

DEFAULT_TEMPLATE = """\
You compare two answers to a prompt by a principle.

Principle: {principle}

Prompt: {prompt}

Answer {verdict_1}: {first}

Answer {verdict_2}: {second}

By the principle, which answer is better, {verdict_1} or {verdict_2}?
Better answer:
"""
"""Ends in a line feed: no tokenizer joins one with the letter after it."""

FIELDS = ("principle", "prompt", "first", "second")
VERDICTS = ("verdict_1", "verdict_2")


class Judge(Protocol):
    """Compares pairs of answers."""

    def __call__(
        self, prompts: list[str], first: list[str], second: list[str], /
    ) -> Sequence[float]:
        """N probabilities in [0, 1] that the first answer is the better one."""
        ...


class FunctionJudge:
    """Bradley-Terry probabilities from a gold score.

        p = sigmoid((score(prompt, first) - score(prompt, second)) / temperature)

    Args:
        score: `(prompt, answer) -> number`, higher is better.
        temperature: > 0; small is certain, large is noisy.

    Raises:
        TypeError: score is not callable.
        ValueError: temperature is not a finite number > 0.
    """

    def __init__(self, score: Callable[[str, str], float], temperature: float = 1.0) -> None:
        if not callable(score):
            raise TypeError(
                f"FunctionJudge: score is a {type(score).__name__}; expected a callable "
                "(prompt, answer) -> number"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"FunctionJudge: temperature is {temperature}; expected a finite number > 0"
            )
        self.score = score
        self.temperature = temperature

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """Compare N pairs.

        Raises:
            ValueError: lists of different lengths, or a score that is not a finite number.
        """
        _check_sizes("FunctionJudge", prompts, first, second)
        probabilities = []
        for index, (prompt, *answers) in enumerate(zip(prompts, first, second, strict=True)):
            a, b = (self._finite(index, prompt, answer) for answer in answers)
            # tanh is odd and bounded: swapped answers give 1 - p, far scores no overflow.
            probabilities.append(0.5 + 0.5 * math.tanh((a - b) / self.temperature / 2))
        return probabilities

    def _finite(self, index: int, prompt: str, answer: str) -> float:
        score = float(self.score(prompt, answer))
        if not math.isfinite(score):
            raise ValueError(
                f"FunctionJudge: score is {score} for pair {index}, answer {answer!r}; expected a "
                "finite number"
            )
        return score


class CausalLMJudge:
    """A causal language model that compares two answers under a written principle.

    The model reads the filled template and is asked for nothing but the next token: p is the
    softmax over the two verdicts' log-probs there. Every pair is read in both orders and the two
    probabilities averaged, which takes out a preference for the first place (Lee et al. 2023,
    section 2.1, arXiv:2309.00267; principles: Bai et al. 2022, arXiv:2212.08073).

    Texts are batched by length and padded on the right, where no real token attends, so a verdict
    does not depend on its batch beyond rounding. Prompts are never cut.

    Args:
        model: a causal LM of transformers, or peft's wrapper of one; read in eval mode, on its
            device.
        tokenizer: its tokenizer; a pad token is not needed.
        principle: what makes an answer better, in words.
        template: with {principle}, {prompt}, {first} and {second}, and optionally {verdict_1} and
            {verdict_2}, the names of the answers.
        verdicts: what the model says if the first or the second shown is better; their first
            tokens after the template differ.
        chat: give the filled template as a user's message through the tokenizer's chat template,
            as models tuned for instructions expect.
        batch_size: texts in a forward; two for every pair.
        max_length: most tokens of a text; the model's context by default.

    Attributes:
        position_bias: of the last call: mean over pairs of the probability with which the answer
            shown first wins, less that with which the same answer wins shown second. In [-1, 1];
            0 is unbiased, NaN before a call.

    Raises:
        ValueError: a template without its fields or with others, an empty principle, verdicts that
            cannot be told apart by one token or merge with the template, a tokenizer with more
            tokens than the model, no chat template with `chat`, or a size < 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        principle: str,
        template: str = DEFAULT_TEMPLATE,
        verdicts: tuple[str, str] = ("A", "B"),
        *,
        chat: bool = False,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        _check_template(template)
        if not principle.strip():
            raise ValueError(
                "CausalLMJudge: principle is empty; expected a sentence that says what makes an "
                "answer better"
            )
        if len(verdicts) != 2:
            raise ValueError(f"CausalLMJudge: verdicts are {verdicts!r}; expected two strings")
        if batch_size < 1:
            raise ValueError(f"CausalLMJudge: batch_size is {batch_size}; expected >= 1")
        if chat and tokenizer.chat_template is None:
            raise ValueError(
                "CausalLMJudge: chat is True and the tokenizer has no chat template; set "
                "tokenizer.chat_template or chat=False"
            )
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise ValueError(
                f"CausalLMJudge: the tokenizer has {len(tokenizer)} tokens, the model's embedding "
                f"{rows} rows; expected a tokenizer of this model"
            )
        if max_length is None:
            max_length = getattr(model.config, "max_position_embeddings", None)
        if max_length is not None and max_length < 1:
            raise ValueError(f"CausalLMJudge: max_length is {max_length}; expected >= 1")
        self.model = model
        self.tokenizer = tokenizer
        self.principle = principle
        self.template = template
        self.verdicts = tuple(verdicts)
        self.chat = chat
        self.batch_size = batch_size
        self.max_length = max_length
        self.position_bias = math.nan
        self.verdict_ids = self._verdict_ids()
        unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._keeps_logits = "logits_to_keep" in inspect.signature(unwrapped.forward).parameters

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """Compare N pairs; no pairs give an empty list.

        Raises:
            ValueError: lists of different lengths, a text longer than the context (before the
                first forward), or a model whose verdict is not finite.
        """
        _check_sizes("CausalLMJudge", prompts, first, second)
        count = len(prompts)
        if count == 0:
            self.position_bias = math.nan
            return []
        texts = [self._text(*pair) for pair in zip(prompts, first, second, strict=True)]
        texts += [self._text(*pair) for pair in zip(prompts, second, first, strict=True)]
        ids = self._encoded(texts)
        for index, row in enumerate(ids):
            if self.max_length is not None and len(row) > self.max_length:
                raise ValueError(
                    f"CausalLMJudge: pair {index % count} takes {len(row)} tokens with its "
                    f"template, the context is {self.max_length}; drop it, shorten its answers, or "
                    "take a model with a longer context"
                )
        # Probability that the answer shown first wins, per text.
        shown_first = torch.sigmoid(self._margins(ids).double())
        if not torch.isfinite(shown_first).all():
            index = int((~torch.isfinite(shown_first)).nonzero()[0]) % count
            raise ValueError(
                f"CausalLMJudge: the model's verdict on pair {index} is not finite; check its "
                "weights and dtype (float16 overflows where bfloat16 does not)"
            )
        in_order, swapped = shown_first[:count], shown_first[count:]
        self.position_bias = float((in_order + swapped - 1).mean())
        probabilities: list[float] = (0.5 * (in_order + (1 - swapped))).tolist()
        return probabilities

    def _text(self, prompt: str, first: str, second: str) -> str:
        text = self.template.format(
            principle=self.principle,
            prompt=prompt,
            first=first,
            second=second,
            verdict_1=self.verdicts[0],
            verdict_2=self.verdicts[1],
        )
        if not self.chat:
            return text
        written: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return written

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        # A chat template brings its own special tokens.
        encoded = self.tokenizer(
            texts, add_special_tokens=not self.chat, padding=False, truncation=False
        )
        return [list(row) for row in encoded["input_ids"]]

    def _verdict_ids(self) -> tuple[int, int]:
        """The token each verdict begins with where it follows the template."""
        text = self._text("prompt", "first", "second")
        alone, *followed = self._encoded([text, *(text + verdict for verdict in self.verdicts)])
        found = []
        for verdict, ids in zip(self.verdicts, followed, strict=True):
            if ids[: len(alone)] != alone or len(ids) == len(alone):
                raise ValueError(
                    f"CausalLMJudge: verdict {verdict!r} does not begin a token of its own after "
                    f"the template, which ends in {text[-12:]!r}; end the template in a line feed, "
                    "begin the verdict with a space, or, if the tokenizer ends texts with EOS, set "
                    "tokenizer.add_eos_token = False"
                )
            found.append(ids[len(alone)])
        if found[0] == found[1]:
            raise ValueError(
                f"CausalLMJudge: verdicts {self.verdicts[0]!r} and {self.verdicts[1]!r} begin with "
                f"the same token (id {found[0]}); expected different first tokens, such as 'A' and "
                "'B'"
            )
        return found[0], found[1]

    @torch.no_grad()
    def _margins(self, ids: list[list[int]]) -> Tensor:
        """Log-odds of the first verdict against the second after each text: [N] float32, CPU."""
        device = next(self.model.parameters()).device
        # The longest first: what does not fit into memory fails at once.
        order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
        chosen = torch.tensor(self.verdict_ids, device=device)
        margins = []
        with _eval_mode(self.model):
            for start in range(0, len(order), self.batch_size):
                rows = [ids[index] for index in order[start : start + self.batch_size]]
                longest = len(rows[0])
                # Any token fills: behind the last real one it is seen by nothing that is read.
                tokens = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])
                mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
                ends = sorted({len(row) - 1 for row in rows})
                at = torch.tensor([ends.index(len(row) - 1) for row in rows], device=device)
                options: dict[str, Any] = {"use_cache": False}
                if self._keeps_logits:
                    options["logits_to_keep"] = torch.tensor(ends, device=device)
                logits = self.model(
                    input_ids=tokens.to(device), attention_mask=mask.to(device), **options
                ).logits
                if logits.shape[1] != len(ends):
                    at = torch.tensor([len(row) - 1 for row in rows], device=device)
                pairs = logits[torch.arange(len(rows), device=device), at][:, chosen].float()
                margins.append(pairs[:, 0] - pairs[:, 1])
        unsorted = torch.empty(len(ids))
        unsorted[torch.tensor(order)] = torch.cat(margins).cpu()
        return unsorted


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Every module in eval mode, and then each as it was: the judge may be a model in training."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_template(template: str) -> None:
    try:
        fields = [
            field for _, field, _, _ in string.Formatter().parse(template) if field is not None
        ]
    except ValueError as error:
        raise ValueError(
            f"CausalLMJudge: template is no format string ({error}); write braces as {{{{ and }}}}"
        ) from error
    missing = [field for field in FIELDS if field not in fields]
    unknown = [field for field in fields if field not in (*FIELDS, *VERDICTS)]
    if missing or unknown:
        problem = f"lacks {{{missing[0]}}}" if missing else f"has the field {{{unknown[0]}}}"
        raise ValueError(
            f"CausalLMJudge: template {problem}; expected the fields {', '.join(FIELDS)} and "
            f"optionally {', '.join(VERDICTS)}, and other braces doubled"
        )


def _check_sizes(
    name: str, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> None:
    if not len(prompts) == len(first) == len(second):
        raise ValueError(
            f"{name}: {len(prompts)} prompts, {len(first)} first and {len(second)} second answers; "
            "expected as many of each"
        )
