"""What this machine can do at most: a large copy and a large matrix product, timed as the arms are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def _median(call: Callable[[], object], repeats: int) -> float:
    """Seconds a call takes: device time on a GPU."""
    samples = []
    for _ in range(repeats + 3):  # the first three warm up
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e-3)
        else:
            began = time.perf_counter()
            call()
            samples.append(time.perf_counter() - began)
    return statistics.median(samples[3:])


def _copy(elements: int) -> tuple[int, float]:
    """Bytes read and written, and seconds, of the largest copy up to this that memory holds."""
    try:
        source = torch.empty(elements, dtype=torch.uint8).random_()
        target = torch.empty_like(source)
    except torch.OutOfMemoryError:
        return _copy(elements // 2)
    return 2 * elements, _median(lambda: target.copy_(source), 20)


def _matmul(side: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, dtype=dtype) for _ in range(2))
    return _median(lambda: a @ b, 20)


def measure() -> dict[str, Any]:
    """Copy bandwidth, counting bytes read and written, and matrix rate on random data."""
    on_gpu = torch.cuda.is_available()
    moved, copied = _copy(1 << 32 if on_gpu else 1 << 22)
    side, dtype = (8192, torch.bfloat16) if on_gpu else (256, torch.float32)
    multiplied = _matmul(side, dtype)
    found: dict[str, Any] = {
        "copy_bytes_per_s": moved / copied,
        "copy_bytes": moved,
        "matmul_flops_per_s": 2 * side**3 / multiplied,
        "matmul": f"{side} x {side} x {side} {dtype}",
        "l2_bytes": None,
    }
    if on_gpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["l2_bytes"] = properties.L2_cache_size
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
    return found
