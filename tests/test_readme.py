"""The README says what is true: its tree, its names and its functions exist."""

import dataclasses
import re
from pathlib import Path

import ppo_fast
from ppo_fast.config import ControlConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_path_of_the_tree_exists():
    tree = README.split("## Where things are")[1].split("```")[1]
    folder = ROOT
    seen = 0
    for line in filter(None, tree.splitlines()):
        if not line.startswith(" "):
            folder = ROOT / line.split()[0]
            assert folder.is_dir(), folder
            continue
        here = folder
        for name in re.findall(r"(?:^|\s)([a-z_]+(?:\.py|/))(?=[\s,]|$)", line):
            assert (here / name).exists(), f"{here.name}/{name}"
            here = here / name if name.endswith("/") else here  # the files named after a folder
            seen += 1
    assert seen >= 14


def test_every_file_of_the_package_is_in_the_tree():
    tree = README.split("## Where things are")[1].split("```")[1]
    unlisted = {"__init__.py", "__main__.py", "tree.py", "extras.py"}
    for file in (ROOT / "ppo_fast").glob("*.py"):
        assert file.name in tree or file.name in unlisted, file.name


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_functions_and_fields_named_exist():
    functions = README.split("**Functions on their own**:")[1].split(". Each")[0]
    for name in re.findall(r"`(\w+)`", functions):
        assert name in ppo_fast.__all__, name
    table = README.split("## Names")[1].split("## ")[0]
    fields = {field.name for field in dataclasses.fields(ControlConfig)}
    tensors = {"terminated", "truncated", "log_probs", "old_log_probs", "mask"}
    for row in table.splitlines():
        if row.startswith("| `"):
            for name in re.findall(r"`(\w+)`", row.split("|")[1]):
                assert name in fields | tensors, name


def test_everything_public_is_documented():
    for name in ppo_fast.__all__:
        if name != "PPO_STATS":
            assert (getattr(ppo_fast, name).__doc__ or "").strip(), name
