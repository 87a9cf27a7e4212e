"""Observations are one tensor, or a flat dict of tensors; these few functions treat both alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Tree = Tensor | dict[str, Tensor]
"""One leaf, or leaves by path ("camera", "pose/0")."""

A = TypeVar("A")
B = TypeVar("B")


def tree_map(change: Callable[[A], B], tree: A | dict[str, A]) -> B | dict[str, B]:
    """Apply `change` to every leaf."""
    if isinstance(tree, dict):
        return {name: change(leaf) for name, leaf in tree.items()}
    return change(tree)


def tree_leaves(tree: A | dict[str, A]) -> Iterator[tuple[str, A]]:
    """Yield (path, leaf); the path of a lone leaf is empty."""
    if isinstance(tree, dict):
        yield from tree.items()
    else:
        yield "", tree


def tree_rows(tree: Tree, rows: slice) -> Tree:
    """The given rows of every leaf, as views."""
    return tree_map(lambda leaf: leaf[rows], tree)


def tree_cat(trees: Sequence[Tree]) -> Tree:
    """Concatenate like trees along their first dimension."""
    first = trees[0]
    if isinstance(first, dict):
        return {name: torch.cat([dict(tree_leaves(t))[name] for t in trees]) for name in first}
    return torch.cat([t for t in trees if not isinstance(t, dict)])
