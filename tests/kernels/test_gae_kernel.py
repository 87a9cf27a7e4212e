"""The `gae` kernels against the reference and the definition."""

import pytest
from calls import assert_agrees, assert_as_exact_as_torch
from cases_gae import CASES


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


@pytest.mark.parametrize("name", ["columns, all options", "rows, all options", "packed"])
def test_the_error_is_no_more_than_twice_pytorchs(name):
    assert_as_exact_as_torch(CASES[name]())
