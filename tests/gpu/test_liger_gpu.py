"""Liger's kernel against ours, on a Hopper GPU with liger-kernel installed."""

import pytest
import torch

from ppo_fast.functional.liger_head import available, liger_log_probs
from ppo_fast.functional.linear_head import log_probs_from_hidden


@pytest.fixture(autouse=True)
def ligers_kernel(gpu):
    reason = available()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("rows", "size", "width"), [(1, 1000, 64), (130, 32_003, 520), (1024, 151_936, 1024)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_its_log_probs_are_ours(rows, size, width, temperature):
    hidden = torch.randn(rows, width).bfloat16()
    weight = (torch.randn(size, width) * width**-0.5).bfloat16()
    index = torch.randint(size, (rows,))
    mask = torch.rand(rows) > 0.2
    given = {"temperature": temperature, "mask": mask, "with_entropy": True}
    log_probs, entropy = liger_log_probs(hidden, weight, index, **given)
    exact = log_probs_from_hidden(hidden.double(), weight.double(), index, **given)
    ours = log_probs_from_hidden(hidden, weight, index, **given)
    for own, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(own.double(), true, rtol=1e-4, atol=1e-4)
    # float16 logits below 8 in size, at a temperature; entropies in bfloat16.
    torch.testing.assert_close(log_probs.double(), exact[0], rtol=0.0, atol=2**-8 / temperature)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=2**-7, atol=1e-3)
    assert not log_probs[~mask].any()
    assert not entropy[~mask].any()


def test_an_index_out_of_range_is_refused():
    hidden, weight = torch.randn(4, 64).bfloat16(), torch.randn(100, 64).bfloat16()
    with pytest.raises(ValueError, match="outside"):
        liger_log_probs(hidden, weight, torch.tensor([0, 1, 100, 2]))
    with pytest.raises(ValueError, match="outside"):
        liger_log_probs(hidden, weight, torch.tensor([0, 1, -100, 2]))
