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


def tree_copy(to: Tree, tree: Tree) -> None:
    """Copy every leaf into that of the same path."""
    if isinstance(to, Tensor):
        assert isinstance(tree, Tensor)
        to.copy_(tree)
        return
    for name, leaf in tree_leaves(tree):
        to[name].copy_(leaf)


def tree_rows(tree: Tree, rows: slice | Tensor) -> Tree:
    """The given rows of every leaf; of a slice, as views."""
    return tree_map(lambda leaf: leaf[rows], tree)


def tree_unbind(tree: Tree) -> list[Tree]:
    """Every row of the leaves as a tree of its own, views."""
    if isinstance(tree, Tensor):
        return list(tree.unbind(0))
    rows = zip(*(leaf.unbind(0) for leaf in tree.values()), strict=True)
    return [dict(zip(tree, row, strict=True)) for row in rows]


def tree_cat(trees: Sequence[Tree]) -> Tree:
    """Concatenate like trees along their first dimension."""
    first = trees[0]
    if isinstance(first, dict):
        return {name: torch.cat([dict(tree_leaves(t))[name] for t in trees]) for name in first}
    return torch.cat([t for t in trees if not isinstance(t, dict)])
