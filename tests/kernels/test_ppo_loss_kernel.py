"""The `ppo_loss` kernels against the reference."""

import pytest
import torch
from calls import assert_agrees, assert_as_exact_as_torch, run
from cases_ppo_loss import CASES, loss

from ppo_fast.dispatch import backend


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


@pytest.mark.parametrize("name", ["everything, masked", "everything, bf16"])
def test_the_error_is_no_more_than_twice_pytorchs(name):
    assert_as_exact_as_torch(CASES[name]())
