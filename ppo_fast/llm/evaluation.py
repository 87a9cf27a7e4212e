"""What the policies of a pipeline are worth on held-out prompts: a table, samples, pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ppo_fast.checkpoint import atomic_write_text

if TYPE_CHECKING:
    from ppo_fast.llm.pipeline import Pipeline
    from ppo_fast.llm.prompts import Prompts

RESULTS, TABLE, SAMPLES = "results.json", "results.md", "samples.jsonl"
SHOWN = 5
# A stream of random numbers that no step of the pipeline draws from.
STREAM = 4 << 36

COLUMNS = {
    "score": "reward model",
    "gold": "gold reward",
    "kl": "KL, nats",
    "eos_rate": "ended by EOS",
    "length": "tokens",
}


class Sampled(NamedTuple):
    """A response to each held-out prompt; lists of one length."""

    texts: list[str]
    scores: list[float]
    kl: list[float]
    """log(policy / first policy) of a response; the mean estimates the KL"""
    gold: list[float] | None
    ended: list[bool]
    lengths: list[int]


def compare(settings: Pipeline, out: Path) -> dict[str, dict[str, float]]:
    """Sample from every policy of a pipeline's folder and write what comes of it.

    Args:
        settings: resolved.
        out: a folder in which all steps are done; gets results.json, results.md, samples.jsonl,
            training.png and overoptimization.png.

    Returns:
        `summary` by policy.
    """
    from ppo_fast.llm.commands import load_causal_lm, load_reward_model
    from ppo_fast.llm.pipeline import RUNS
    from ppo_fast.llm.pipeline_steps import HELD_OUT, REWARD_MODEL, SFT, device_of, first_policy
    from ppo_fast.llm.plots import plot_overoptimization, plot_training
    from ppo_fast.llm.prompts import tokenize_prompts

    first = first_policy(settings, out)
    trained = {with_kl: out / policy for with_kl, (_, policy) in RUNS.items()}
    trained = {with_kl: folder for with_kl, folder in trained.items() if folder.exists()}
    titles = {SFT: "SFT" if first == str(out / SFT) else "before PPO"}
    titles |= {f.name: "PPO" if kl else "PPO without KL penalty" for kl, f in trained.items()}
    scorer = load_reward_model(out / REWARD_MODEL).to(device_of(settings))
    reference, tokenizer = load_causal_lm(first)
    reference.to(device_of(settings))
    prompts = tokenize_prompts(out / HELD_OUT, tokenizer)
    sampled = {SFT: _sample(settings, reference, reference, scorer, tokenizer, prompts)}
    for folder in trained.values():
        policy = load_causal_lm(folder)[0].to(device_of(settings))
        sampled[folder.name] = _sample(settings, policy, reference, scorer, tokenizer, prompts)
    found = {name: summary(of) for name, of in sampled.items()}

    steps = _steps(out)
    record = {"policies": found, "steps": steps, "held_out_prompts": len(prompts)}
    atomic_write_text(out / RESULTS, json.dumps(record, indent=2) + "\n")
    rows = [
        {
            "policy": name,
            "prompt": prompt,
            "response": of.texts[k],
            "score": round(of.scores[k], 4),
            **({} if of.gold is None else {"gold": of.gold[k]}),
        }
        for k, prompt in enumerate(prompts.texts)
        for name, of in sampled.items()
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    atomic_write_text(out / SAMPLES, "".join(lines))
    runs = {
        "with KL penalty" if with_kl else "without KL penalty": out / RUNS[with_kl][0]
        for with_kl in trained
    }
    plot_training(runs, out / "training.png", kl_target=settings.kl_target)
    plot_overoptimization(runs, found[SFT], out / "overoptimization.png")
    text = table(found, titles)
    page = [
        f"# RLHF on {settings.model or 'generated stories'}, seed {settings.seed}",
        "",
        f"Means over a sample for each of {len(prompts)} held-out prompts. The reward model's scores "
        "have mean 0 and standard deviation 1 over samples of the model before PPO; the KL is that "
        "of whole responses from this model.",
        "",
        text,
        "",
        "![training](training.png)",
        "",
        "![overoptimization](overoptimization.png)",
        "",
        *_page_of_samples(prompts.texts, sampled, titles),
        "## Steps",
        "",
        *_page_of_steps(steps),
    ]
    atomic_write_text(out / TABLE, "\n".join(page) + "\n")
    print(f"\n{text}\n\n{out}: {', '.join(sorted(p.name for p in out.iterdir()))}", flush=True)
    return found


def _sample(
    settings: Pipeline, policy: Any, reference: Any, scorer: Any, tokenizer: Any, prompts: Prompts
) -> Sampled:
    from ppo_fast.llm.models import Policy
    from ppo_fast.llm.pipeline import ppo_config
    from ppo_fast.llm.pipeline_steps import sample_ids
    from ppo_fast.llm.rollout import Sequences
    from ppo_fast.llm.scoring import evaluate_tokens
    from ppo_fast.llm.stories import gold_reward_fn

    ids, ended = sample_ids(settings, policy, tokenizer, prompts.ids, STREAM)
    lengths = [len(row) for row in ids]
    both = Policy(policy), Policy(reference)
    sequences = Sequences(prompts.ids, ids, both[0].device)
    tokens = evaluate_tokens(both[0], None, both[1], sequences, ppo_config(settings, None, True))
    assert tokens.kl is not None
    gold = gold_reward_fn(tokenizer)(prompts.ids, ids) if settings.model is None else None
    return Sampled(
        tokenizer.batch_decode(ids),
        scorer([p + r for p, r in zip(prompts.ids, ids, strict=True)]).tolist(),
        [float(part.sum()) for part in tokens.kl.cpu().split(lengths)],
        gold,
        ended,
        lengths,
    )


def summary(sampled: Sampled) -> dict[str, float]:
    """Means by the keys of `COLUMNS`, and `score_std`, `gold_std` over responses."""
    found = {
        "score": statistics.fmean(sampled.scores),
        "score_std": statistics.pstdev(sampled.scores),
        "kl": statistics.fmean(sampled.kl),
        "eos_rate": statistics.fmean(sampled.ended),
        "length": statistics.fmean(sampled.lengths),
    }
    if sampled.gold is not None:
        found["gold"] = statistics.fmean(sampled.gold)
        found["gold_std"] = statistics.pstdev(sampled.gold)
    return found


def table(found: dict[str, dict[str, float]], titles: dict[str, str]) -> str:
    """A row for each policy, as Markdown that also reads well as it is."""
    columns = [name for name in COLUMNS if all(name in row for row in found.values())]
    cells = [["", *(COLUMNS[name] for name in columns)]]
    for policy, row in found.items():
        numbers = [f"{row[c]:.3f}" if c == "eos_rate" else f"{row[c]:.2f}" for c in columns]
        cells.append([titles[policy], *numbers])
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = [
        f"| {row[0]:<{widths[0]}} | "
        + " | ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        + " |"
        for row in cells
    ]
    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (w + 1)}:|" for w in widths[1:])
    return "\n".join([lines[0], rule, *lines[1:]])


def _page_of_samples(
    prompts: Sequence[str], sampled: dict[str, Sampled], titles: dict[str, str]
) -> list[str]:
    lines = ["## Samples", ""]
    for k, prompt in enumerate(prompts[:SHOWN]):
        lines += [f"**{_inline(prompt)}**", ""]
        for name, of in sampled.items():
            worth = f"{of.scores[k]:.2f}" + ("" if of.gold is None else f", gold {of.gold[k]:g}")
            lines.append(f"- {titles[name]} ({worth}): {_inline(of.texts[k])}")
        lines.append("")
    return lines


def _inline(text: str) -> str:
    """Text as Markdown leaves it: one line, no tags."""
    return " ".join(text.split()).replace("<", "\\<")


def _steps(out: Path) -> dict[str, dict[str, float]]:
    """What every trained model's folder says of its training."""
    from ppo_fast.llm.pipeline import RUNS
    from ppo_fast.llm.pipeline_steps import REWARD_MODEL, SFT, TRAINING

    names = [SFT, REWARD_MODEL, *(policy for _, policy in RUNS.values())]
    return {
        name: json.loads((out / name / TRAINING).read_text(encoding="utf-8"))
        for name in names
        if (out / name / TRAINING).exists()
    }


def _page_of_steps(steps: dict[str, dict[str, float]]) -> list[str]:
    return [
        f"- {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        for name, metrics in steps.items()
    ]
