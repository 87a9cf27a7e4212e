"""The kernels against their references: on a GPU if there is one, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so without a GPU these tests have a process
of their own: `TRITON_INTERPRET=1 pytest tests/kernels`. Any other run leaves them out.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

if DEVICE == "cpu" and not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what `torch.empty` returns with NaN: an output element a kernel leaves out then shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def on_the_device():
    """Make tensors where the kernels run, and the same ones each time."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield
