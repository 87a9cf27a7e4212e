"""Errors that kernels leave on the device."""

import pytest
import torch

from ppo_fast.device_errors import ERRORS, _marks, mark_of, raise_device_errors

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def clean():
    _marks.clear()
    yield
    _marks.clear()


def test_nothing_met_raises_nothing():
    raise_device_errors()
    mark_of(CPU)
    raise_device_errors()


@pytest.mark.parametrize("code", ERRORS)
def test_a_mark_is_raised_once_in_its_own_words(code):
    mark_of(CPU).fill_(code)
    with pytest.raises(IndexError) as error:
        raise_device_errors()
    assert str(error.value) == ERRORS[code]
    raise_device_errors()


def test_a_device_has_one_mark():
    assert mark_of(CPU) is mark_of(CPU)


def test_a_mark_made_in_inference_mode_can_be_cleared():
    with torch.inference_mode():
        mark_of(CPU).fill_(1)
    with pytest.raises(IndexError):
        raise_device_errors()
    raise_device_errors()


def test_tensors_without_memory_leave_no_mark():
    mark_of(torch.device("meta"))
    raise_device_errors()
    assert not _marks
