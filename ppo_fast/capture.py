"""Phases of training as CUDA graphs: recorded once, replayed with one launch.

A phase is a function of no arguments that reads and writes tensors at fixed addresses and never asks
the device for a number. On a GPU it runs eagerly first, is then recorded, and from there on replayed:
Python no longer takes part, so whatever may change between runs (learning rate, clip range,
coefficients) has to lie in a tensor. On a CPU a phase is just called.

Tests rehearse the same phases on a CPU with a recorder of their own (tests/rehearsal.py).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

import torch

log = logging.getLogger("ppo_fast")

R = TypeVar("R")

EAGER_RUNS = 2
"""Before recording: kernels are compiled, libraries opened and workspaces allocated by then."""


class Recorder(Protocol):
    """Runs a function once while recording it."""

    def __call__(
        self, function: Callable[[], R], generators: Sequence[torch.Generator]
    ) -> tuple[Callable[[], Any], R]:
        """Return what replays the recording, and the function's result, which replays overwrite."""


_rehearsing: Recorder | None = None


def may_read(device: torch.device) -> bool:
    """Whether reading a tensor on `device` as a Python number is free."""
    return device.type == "cpu" and _rehearsing is None


@contextmanager
def rehearsal(recorder: Recorder) -> Iterator[None]:
    """Within the block, treat the CPU like a GPU and record phases with `recorder`."""
    global _rehearsing
    before, _rehearsing = _rehearsing, recorder
    try:
        yield
    finally:
        _rehearsing = before


class Phase(Generic[R]):
    """A function that is recorded and replayed where that is possible.

    Args:
        name: for the log.
        function: see the module's text.
        device: where it works.
        generators: every one it draws from.

    Attributes:
        recorded: whether calls are replays.
        why_eager: why it could not be recorded; None if it could, or was not tried yet.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[], R],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.name = name
        self.function = function
        self.device = device
        self.generators = generators
        self.why_eager: str | None = None
        self._runs = 0
        self._replay: Callable[[], Any] | None = None
        self._result: R | None = None

    @property
    def recorded(self) -> bool:
        """Whether calls are replays."""
        return self._replay is not None

    def __call__(self) -> R:
        """Run the function; its result is overwritten by the next call."""
        recorder = _rehearsing
        if recorder is None and self.device.type == "cuda":
            recorder = record_cuda_graph
        if recorder is None or self.why_eager is not None:
            return self.function()
        self._runs += 1
        if self._runs <= EAGER_RUNS:
            return self._eagerly()
        if self._replay is None:
            try:
                self._replay, self._result = recorder(self.function, self.generators)
            except Exception as error:  # whatever a user's module does
                # Ending a broken recording fails, too; what broke it came first.
                cause = error.__context__ or error
                self.why_eager = str(cause).strip().splitlines()[0] if str(cause) else repr(cause)
                log.warning(
                    "%s runs without a CUDA graph, which could not record it: %s",
                    self.name,
                    self.why_eager,
                )
                return self.function()
            if self.device.type != "cuda":
                return self._result  # type: ignore[return-value]  # run as it was recorded
        assert self._replay is not None
        self._replay()
        return self._result  # type: ignore[return-value]

    def _eagerly(self) -> R:
        if self.device.type != "cuda":
            return self.function()
        # On a stream of its own, as recording will be: what is set up per stream is set up now.
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            result = self.function()
        torch.cuda.current_stream(self.device).wait_stream(side)
        return result


def record_cuda_graph(
    function: Callable[[], R], generators: Sequence[torch.Generator]
) -> tuple[Callable[[], Any], R]:
    """Record a function into a CUDA graph; the function's work is not done until a replay.

    It is recorded twice. A recording that breaks leaves generators behind that wait for its end, and
    with them every graph that draws from them; the first one, thrown away, has copies of them.

    Raises:
        RuntimeError: it did something a graph cannot hold, such as reading a tensor's value.
    """
    tensor_device = _device_of(generators)
    with torch.cuda.device(tensor_device), _without_collecting_garbage():
        # torch.cuda.graph's own stream is that of the device it was first used on.
        stream = torch.cuda.Stream()
        _try_recording(function, generators, stream)
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=stream):
            result = function()
    return graph.replay, result


def _device_of(generators: Sequence[torch.Generator]) -> torch.device | int:
    return generators[0].device if generators else torch.cuda.current_device()


@contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    """A graph in a cycle of garbage must not be destroyed while another one is recorded."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _try_recording(
    function: Callable[[], Any], generators: Sequence[torch.Generator], stream: torch.cuda.Stream
) -> None:
    """Record and throw away; whatever happens, leave torch as it was found."""
    device, current = torch.cuda.current_device(), torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle()
    # Every recording registers the default generator by itself.
    drawn_from = [*generators, torch.cuda.default_generators[device]]
    states = [generator.graphsafe_get_state() for generator in drawn_from]
    for generator in drawn_from:
        generator.graphsafe_set_state(generator.clone_state())
    graph = torch.cuda.CUDAGraph()
    try:
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            function()
    except Exception:
        torch.cuda.set_stream(current)
        with suppress(RuntimeError):  # where the recording could be ended, its pool is closed
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise
    finally:
        for generator, state in zip(drawn_from, states, strict=True):
            generator.graphsafe_set_state(state)
