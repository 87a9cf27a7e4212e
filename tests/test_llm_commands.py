"""`ppo-fast rlhf`: every subcommand on a tiny model, and its errors as sentences."""

import json
import math
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tyro")
import tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

from ppo_fast.cli import main
from ppo_fast.llm.commands import load_causal_lm, load_reward_model, read_flags
from ppo_fast.llm.ppo_trainer import PPOTrainer
from ppo_fast.llm.preferences import label_pairs, read_preferences, tokenize_preferences
from ppo_fast.llm.prompts import tokenize_prompts
from ppo_fast.logger import read_metrics

QUESTIONS = [f"{a} {b}?" for a in ("who", "what", "why", "how") for b in ("is", "was", "are", "am")]


def byte_tokenizer():
    """One token a byte: "A" and "B" are verdicts of their own."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, prompts, and preferences that any judge of length could have made."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pairs = [
        {"prompt": q, "chosen": f"{q} {k}", "rejected": "no" * (k + 1)}
        for k, q in enumerate(QUESTIONS)
    ]
    return {
        "folder": folder,
        "NOWHERE": "/nowhere/at-all",
        "model": str(folder / "model"),
        "prompts": write_lines(folder / "prompts.jsonl", [{"prompt": q} for q in QUESTIONS]),
        "preferences": write_lines(folder / "preferences.jsonl", pairs),
        "texts": write_lines(
            folder / "texts.jsonl",
            [{"prompt": q, "completion": " ok"} for q in QUESTIONS] + [{"text": "who is ok"}],
        ),
    }


def rlhf(*arguments):
    main(["rlhf", *map(str, arguments)])


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_without_a_command_the_usage_is_shown(capsys):
    rlhf()
    shown = capsys.readouterr().out
    assert all(f"ppo-fast rlhf {name}" in shown for name in ("run", "sft", "judge", "generate"))
    with pytest.raises(SystemExit) as found:
        rlhf("tune")
    assert found.value.code == 2
    assert "unknown command 'tune'" in capsys.readouterr().err


def test_sft_leaves_a_model_that_says_what_it_was_shown(files, tmp_path, capsys):
    out = tmp_path / "sft"
    rlhf(
        *("sft", "--model", files["model"], "--data", files["texts"], "--out", out),
        *("--epochs", 60, "--batch-size", 8, "--learning-rate", 1e-2),
    )
    assert "loss" in capsys.readouterr().out
    rlhf("generate", "--model", out, "--prompts", files["prompts"], "--temperature", 0.05)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in said] == QUESTIONS
    assert sum(row["completion"] == " ok" for row in said) >= 12


def test_generate_depends_on_its_seed_alone(files, capsys):
    shown = []
    for seed in (1, 1, 2):
        rlhf(
            *("generate", "--model", files["model"], "--prompts", files["prompts"]),
            *("--response-length", 8, "--seed", seed),
        )
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


@pytest.fixture(scope="module")
def judged(files):
    path = files["folder"] / "judged.jsonl"
    rlhf(
        *("judge", "--model", files["model"], "--prompts", files["prompts"], "--out", path),
        *("--judge", files["model"], "--principle", "Shorter is better.", "--response-length", 12),
    )
    return path


def test_a_judge_that_is_a_language_model_writes_preferences(judged):
    found = read_preferences(judged)
    assert 0 < len(found) <= len(QUESTIONS)
    assert {p.prompt for p in found} <= set(QUESTIONS)
    assert all(0.5 <= p.p <= 1 for p in found)


def test_a_person_may_judge_instead(files, tmp_path, monkeypatch, capsys):
    answers = iter(["1", "2", "q"])
    given = {"input": lambda _: next(answers), "output": print}
    monkeypatch.setattr(label_pairs, "__kwdefaults__", given)
    out = tmp_path / "mine.jsonl"
    rlhf(
        *("judge", "--model", files["model"], "--prompts", files["prompts"], "--out", out),
        *("--human", "--response-length", 12),
    )
    assert "2 preferences in" in capsys.readouterr().out
    assert len(read_preferences(out)) == 2


@pytest.fixture(scope="module")
def reward_model(files):
    out = files["folder"] / "reward_model"
    rlhf(
        *("reward-model", "--model", files["model"], "--preferences", files["preferences"]),
        *("--out", out, "--epochs", 30, "--batch-size", 4, "--learning-rate", 3e-3),
    )
    return out


def test_the_reward_model_scores_what_was_chosen_higher(files, reward_model):
    scorer, tokenizer = load_reward_model(reward_model), byte_tokenizer()

    def score(text, prompt):
        return float(scorer([tokenizer(prompt + text)["input_ids"] + [tokenizer.eos_token_id]]))

    pairs = read_preferences(files["preferences"])
    right = [score(p.chosen, p.prompt) > score(p.rejected, p.prompt) for p in pairs]
    assert sum(right) >= 14
    assert scorer.gain != 1


def test_preferences_of_a_judge_train_a_reward_model(files, judged, tmp_path, capsys):
    rlhf(
        *("reward-model", "--model", files["model"], "--preferences", judged),
        *("--out", tmp_path / "rm"),
    )
    assert "eval_accuracy" in capsys.readouterr().out
    assert math.isfinite(float(load_reward_model(tmp_path / "rm")([[5, 6, 7]])))


def ppo_arguments(files, reward_model, run):
    return (
        *("ppo", "--model", files["model"], "--prompts", files["prompts"]),
        *("--reward-model", reward_model, "--run-dir", run, "--rollout-batch-size", 8),
        *("--total-episodes", 32, "--response-length", 6, "--learning-rate", 1e-3),
        *("--eval-prompts", files["prompts"], "--eval-every", 2, "--no-progress-bar"),
    )


@pytest.fixture(scope="module")
def trained(files, reward_model):
    run = files["folder"] / "run"
    rlhf(*ppo_arguments(files, reward_model, run))
    return run


def test_ppo_leaves_a_policy_and_the_run(files, trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "metrics.csv", "checkpoint.safetensors", "samples", "policy"} <= names
    assert read_metrics(trained)["step"] == [8, 16, 24, 32]
    assert not same(weights(trained / "policy"), weights(files["model"]))
    assert load_causal_lm(trained / "policy")[1].eos_token == "<eos>"
    flags = read_flags(trained)
    assert (flags.model, flags.total_episodes) == (files["model"], 32)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    files, reward_model, trained, tmp_path, monkeypatch, capsys
):
    sample = PPOTrainer.sample

    def stopped(self, prompts):
        if self.iteration == 2:
            raise KeyboardInterrupt
        return sample(self, prompts)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "sample", stopped)
        with pytest.raises(SystemExit) as found:
            rlhf(*ppo_arguments(files, reward_model, run))
    assert found.value.code == 130
    assert not (run / "policy").exists()
    rlhf("ppo", "--resume", run)
    assert "after 16 episodes" in capsys.readouterr().out
    assert same(weights(run / "policy"), weights(trained / "policy"))
    assert read_metrics(run)["step"] == [8, 16, 24, 32]


@pytest.mark.parametrize("critic", ["policy", "shared"])
def test_ppo_takes_other_critics_and_adapters(critic, files, reward_model, tmp_path):
    pytest.importorskip("peft")
    lora = ("--lora-rank", 2) if critic == "policy" else ()
    run = tmp_path / "run"
    rlhf(
        *ppo_arguments(files, reward_model, run),
        *("--total-episodes", 8, "--value-model", critic, *lora),
    )
    assert read_metrics(run)["step"] == [8]
    assert (run / "policy" / "adapter_config.json").exists() == bool(lora)


def test_run_on_a_model_with_a_judge_does_all_steps(files, tmp_path, capsys):
    out = tmp_path / "out"
    rlhf(
        *("run", "--out", out, "--model", files["model"], "--prompts", files["prompts"]),
        *("--judge", files["model"], "--pairs", 40, "--response-length", 8, "--updates", 2),
        *("--rollout-batch-size", 4, "--no-progress-bar"),
    )
    shown = capsys.readouterr().out
    assert "before PPO" in shown
    assert "gold" not in shown
    names = {path.name for path in out.iterdir()}
    assert {"preferences.jsonl", "reward_model", "ppo", "policy", "results.md"} <= names
    assert not names & {"sft", "policy-no-kl", "stories.jsonl"}


CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def test_run_keeps_conversations_as_conversations(files, tmp_path):
    shutil.copytree(files["model"], tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [[{"role": "user", "content": q}] for q in QUESTIONS]
    prompts = write_lines(tmp_path / "chats.jsonl", [{"prompt": chat} for chat in asked])
    out = tmp_path / "out"
    rlhf(
        *("run", "--out", out, "--model", tmp_path / "model", "--prompts", prompts),
        *("--judge", tmp_path / "model", "--pairs", 30, "--response-length", 8, "--updates", 1),
        *("--rollout-batch-size", 4, "--no-progress-bar"),
    )
    found = read_preferences(out / "preferences.jsonl")
    assert all(p.prompt in asked for p in found)
    assert all([m["role"] for m in p.chosen] == ["assistant"] for p in found)
    # What the reward model learns from begins as what the policy is asked.
    trained = tokenize_prompts(out / "prompts.jsonl", tokenizer)
    for pair, preference in zip(tokenize_preferences(found, tokenizer), found, strict=True):
        (text,) = (t for t in trained.texts if preference.prompt[0]["content"] in t)
        ids = trained.ids[trained.texts.index(text)]
        assert pair[0][: len(ids)] == pair[1][: len(ids)] == ids
        assert pair[0][-1] == tokenizer.eos_token_id


def test_run_on_a_model_takes_data_for_sft_and_preferences(files, tmp_path):
    out = tmp_path / "out"
    rlhf(
        *("run", "--out", out, "--model", files["model"], "--prompts", files["prompts"]),
        *("--preferences", files["preferences"], "--sft-data", files["texts"]),
        *("--response-length", 8, "--updates", 1, "--rollout-batch-size", 4),
        *("--without-kl", "True", "--processes", 1, "--no-progress-bar"),
    )
    names = {path.name for path in out.iterdir()}
    assert {"sft", "policy", "policy-no-kl", "overoptimization.png"} <= names
    assert "SFT" in (out / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sft --model NOWHERE --data texts --out new", "no model"),
        ("sft --model model --data NOWHERE --out new", "is no file"),
        ("sft --model model --data preferences --out new", "line 1"),
        ("generate --model model --prompts NOWHERE", "is no file"),
        ("judge --model model --prompts prompts --out new", "--human"),
        (
            "judge --model model --prompts prompts --out new --judge model --principle=",
            "principle is empty",
        ),
        ("reward-model --model model --preferences texts --out new", "lacks 'chosen'"),
        ("ppo --resume folder", "expected a run folder"),
        ("ppo --resume folder --seed 3", "no other flag"),
        ("ppo --model model --prompts prompts --reward-model NOWHERE", "holds no"),
        ("run --model model --prompts NOWHERE --judge model", "is no file"),
        ("run --model model --prompts prompts --judge NOWHERE", "no model"),
        ("run --model model --prompts prompts --preferences texts", "lacks 'chosen'"),
        (
            "run --model model --prompts prompts --judge model --response-length 1024",
            "the model's context of 1024 tokens",
        ),
        (
            "run --model model --prompts prompts --judge model --response-length 1017",
            "more than max_length 7",
        ),
        (
            "run --model model --prompts prompts --judge model --sft-data NOWHERE",
            "is no file",
        ),
    ],
)
def test_errors_are_sentences(arguments, message, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as found:
        rlhf(*(files.get(word, word) for word in arguments.split()))
    shown = capsys.readouterr().err
    assert found.value.code == 1
    assert message in shown
    assert "Traceback" not in shown
    # Nothing was begun.
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --prompts prompts", "model is not"),
        ("run --model model --prompts prompts", "either preferences"),
        ("run --hidden-size 30", "multiple of 8"),
        ("run --kl-target 0", "kl_target"),
        (
            "ppo --model model --prompts prompts --reward-model model "
            "--kl-controller proportional --kl-target=-1",
            "kl_target",
        ),
        ("sft --model model", "--data"),
    ],
)
def test_flags_that_do_not_fit_are_usage_errors(
    arguments, message, files, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as found:
        rlhf(*(files.get(word, word) for word in arguments.split()))
    assert found.value.code == 2
    # In a box, with line breaks.
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
