"""What only a GPU can show. `make gpu` runs it; anywhere else these tests are skipped.

Under TRITON_INTERPRET=1 they run dry, on the CPU: fewer repetitions and small sizes, and what cannot
be done without a GPU says so.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"
ROOT = Path(__file__).resolve().parent.parent.parent

# Calls and cases of the interpreter's tests, problems of the benchmarks.
for folder in ("tests/kernels", "benchmarks"):
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))


def pytest_collection_modifyitems(items):
    if DRY or torch.cuda.is_available():
        return
    reason = "needs a CUDA GPU, or TRITON_INTERPRET=1 for a dry run"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def on_the_device(request):
    """Make tensors where the kernels run, and the same ones each time."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


@pytest.fixture
def gpu():
    """Skip a dry run."""
    if DRY:
        pytest.skip("only a GPU can show this")
