"""One decorator that lets a Triton twin stand in for a plain-PyTorch op.

`@accelerated` binds `ppo_fast.functional.<file>.<name>` to `ppo_fast.kernels.<file>.<name>`, if that
file exists and triton imports. Which of the two a call runs is decided by the backend in force:

| backend | runs |
|---|---|
| `auto` (default) | the twin iff every tensor is on a GPU and the twin supports the call |
| `reference` | the plain-PyTorch definition |
| `triton` | the twin, or an error saying why it cannot; CPU tensors need `TRITON_INTERPRET=1` |
| `check` | both, asserts that outputs and gradients agree, returns the twin's result |

The order of authority: `with ppo_fast.backend("...")`, then `PPO_FAST_BACKEND`, then `auto`.
A forced backend that cannot run raises, and an error inside a twin propagates: nothing falls back in
silence. A twin may carry `twin.unsupported(*args, **kwargs) -> str | None`, called with the op's own
arguments, to name what it does not handle.

Bad input is refused in one place for both: the op's `validate`, which the reference calls itself and
which runs here before the twin.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "triton", "reference", "check")

# Relative tolerance of `check`, by the coarsest dtype among a call's tensors and arguments.
CHECK_RTOL = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# A plain global rather than a ContextVar: torch.compile(fullgraph=True) traces it with a guard.
_forced: str | None = None


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


def current_backend() -> str:
    """Return the backend in force here: "auto", "triton", "reference" or "check".

    Raises:
        ValueError: `PPO_FAST_BACKEND` holds another word.
    """
    if _forced is not None:
        return _forced
    return _validated(os.environ.get("PPO_FAST_BACKEND", "auto"), "PPO_FAST_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for the calls inside the `with` block; blocks nest, the inner one wins.

    Raises:
        ValueError: `name` is not "auto", "triton", "reference" or "check".
    """
    global _forced
    before, _forced = _forced, _validated(name, "backend()")
    try:
        yield
    finally:
        _forced = before


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)


def _map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map_tensors(value, change) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_map_tensors(value, change) for value in tree)
    return tree


def _bind_twin(reference: Callable[..., Any]) -> tuple[Callable[..., Any] | None, str]:
    """Find the twin of a reference: `(twin, "")`, or `(None, why there is none)`."""
    file = reference.__module__.rpartition(".")[2]
    module_name = f"ppo_fast.kernels.{file}"
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    # The folder first: find_spec raises, rather than answer None, where the parent is missing.
    folder = importlib.util.find_spec("ppo_fast.kernels")
    if folder is None or importlib.util.find_spec(module_name) is None:
        return None, f"there is no kernel file kernels/{file}.py"
    twin = getattr(importlib.import_module(module_name), reference.__name__, None)
    if twin is None:
        return None, f"kernels/{file}.py has no function {reference.__name__}"
    return twin, ""


class Accelerated(Generic[P, R]):
    """An op with two implementations; call it like the function it wraps.

    Attributes:
        reference: the plain-PyTorch definition.
        kernel: its Triton twin, or None.
        no_kernel: why `kernel` is None; empty otherwise.
        validate: raises on arguments the op does not take; called before `kernel`.
        mutates: names of the tensors that the op writes to.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        kernel: Callable[P, R] | None,
        no_kernel: str = "",
        validate: Callable[..., None] | None = None,
        mutates: tuple[str, ...] = (),
    ) -> None:
        functools.update_wrapper(self, reference)
        self.__name__: str = reference.__name__
        self.reference = reference
        self.kernel = kernel
        self.no_kernel = no_kernel
        self.validate = validate
        self.mutates = mutates

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the implementation that the backend in force names; see the module's text."""
        mode = current_backend()
        if mode == "reference" or (mode == "auto" and self.kernel is None):
            return self.reference(*args, **kwargs)
        if mode == "auto" and not all(t.is_cuda for t in _tensors((args, kwargs))):
            return self.reference(*args, **kwargs)
        if self.validate is not None:
            self.validate(*args, **kwargs)
        why_not = self.why_not_kernel(*args, **kwargs)
        if mode == "auto":
            if why_not is not None:
                return self.reference(*args, **kwargs)
            _refuse_transforms(self.__name__)
            assert self.kernel is not None
            return self.kernel(*args, **kwargs)
        if why_not is not None:
            raise RuntimeError(
                f"{self.__name__}: backend {mode!r} was asked for, but {why_not}; "
                "use PPO_FAST_BACKEND=auto or reference"
            )
        assert self.kernel is not None
        _refuse_transforms(self.__name__)
        if mode == "check":
            _check(self.__name__, self.reference, self.kernel, args, kwargs, self.mutates)
        return self.kernel(*args, **kwargs)

    def why_not_kernel(self, *args: Any, **kwargs: Any) -> str | None:
        """Say why the twin cannot run this call, or None if it can."""
        if self.kernel is None:
            return self.no_kernel
        tensors = list(_tensors((args, kwargs)))
        if len({tensor.device for tensor in tensors}) > 1:
            return "its tensors are on different devices"
        if not torch.compiler.is_compiling() and any(tensor.is_neg() for tensor in tensors):
            return "a tensor is a lazily negated view; pass x.resolve_neg()"
        on_gpu = [tensor.is_cuda for tensor in tensors]
        if not all(on_gpu) and os.environ.get("TRITON_INTERPRET") != "1":
            if any(on_gpu):
                return "its tensors are on different devices, some on a GPU and some not"
            return "its tensors are on the CPU (set TRITON_INTERPRET=1 to interpret the kernel)"
        unsupported = getattr(self.kernel, "unsupported", None)
        return None if unsupported is None else unsupported(*args, **kwargs)

    def explain(self, device: torch.device | str) -> tuple[str, str]:
        """Say which implementation serves tensors on `device` now, and why: `(backend, reason)`."""
        mode = current_backend()
        if mode == "reference":
            return "reference", "forced"
        if self.kernel is None:
            return ("error" if mode != "auto" else "reference"), self.no_kernel
        on_gpu = torch.device(device).type == "cuda"
        if mode == "auto":
            return ("triton", "GPU tensors") if on_gpu else ("reference", "CPU tensors")
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            return "error", "CPU tensors need TRITON_INTERPRET=1"
        return mode, "forced"


@overload
def accelerated(reference: Callable[P, R], /) -> Accelerated[P, R]: ...


@overload
def accelerated(
    *, validate: Callable[..., None], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Accelerated[P, R]]: ...


def accelerated(
    reference: Callable[P, R] | None = None,
    /,
    *,
    validate: Callable[..., None] | None = None,
    mutates: tuple[str, ...] = (),
) -> Accelerated[P, R] | Callable[[Callable[P, R]], Accelerated[P, R]]:
    """Bind an op to its same-named Triton twin; see the module's text for the rules.

    The twin is looked up here, once: an import inside the op would break
    `torch.compile(fullgraph=True)`.

    Args:
        reference: the plain-PyTorch op; `@accelerated` stands bare above it.
        validate: called with the op's arguments before the twin; raises where they do not fit. The
            reference calls it too.
        mutates: names of the tensors that the op writes to.

    Raises:
        TypeError: the twin's signature differs from the reference's.
    """
    if reference is None:
        return functools.partial(_accelerate, validate=validate, mutates=mutates)
    return _accelerate(reference, validate=validate, mutates=mutates)


def _accelerate(
    reference: Callable[P, R], validate: Callable[..., None] | None, mutates: tuple[str, ...]
) -> Accelerated[P, R]:
    kernel, why = _bind_twin(reference)
    if kernel is not None:
        ours = [
            (p.name, p.kind, p.default) for p in inspect.signature(reference).parameters.values()
        ]
        twins = [(p.name, p.kind, p.default) for p in inspect.signature(kernel).parameters.values()]
        if ours != twins:
            raise TypeError(
                f"{reference.__name__}: the kernel's signature {inspect.signature(kernel)} differs "
                f"from the reference's {inspect.signature(reference)}"
            )
    return Accelerated(reference, kernel, why, validate, mutates)


def _refuse_transforms(name: str) -> None:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{name}: its kernel has no rule for torch.func transforms (vmap, grad, jvp); call it on "
            "the whole batch, or use ppo_fast.backend('reference')"
        )


def _check(
    name: str,
    reference: Callable[..., Any],
    kernel: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mutates: tuple[str, ...],
) -> None:
    """Run both implementations on detached inputs; assert equal outputs and input gradients.

    And equal contents of the tensors they write to, which are put back.
    """
    arguments = inspect.signature(reference).bind(*args, **kwargs).arguments
    floating = [t.dtype for t in _tensors((args, kwargs)) if t.is_floating_point()]
    floating += [dtype for dtype in arguments.values() if isinstance(dtype, torch.dtype)]
    rtol = max((CHECK_RTOL.get(dtype, 2e-5) for dtype in floating), default=0.0)
    written = [arguments[mutated].detach() for mutated in mutates]
    before = [tensor.clone() for tensor in written]

    def run(
        implementation: Callable[..., Any],
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        # Each side draws the same random numbers and the caller's stream stays where it was.
        states = [v.get_state() for v in _generators(kwargs)]
        devices = (
            [torch.cuda.current_device()]
            if any(t.is_cuda for t in _tensors((args, kwargs)))
            else []
        )
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            leaves: list[Tensor] = []

            # Not a clone, which would pack the strides that the twin has to cope with.
            def detach(tensor: Tensor) -> Tensor:
                new = tensor.detach().requires_grad_(tensor.requires_grad)
                if new.requires_grad:
                    leaves.append(new)
                return new

            result = implementation(*_map_tensors(args, detach), **_map_tensors(kwargs, detach))
            outputs = list(_tensors(result))
            roots = [out for out in outputs if out.requires_grad]
            gradients: list[Tensor | None] = [None] * len(leaves)
            if roots and leaves:
                seeds = [_cotangent(out) for out in roots]
                gradients = list(torch.autograd.grad(roots, leaves, seeds, allow_unused=True))
        for generator, state in zip(_generators(kwargs), states, strict=True):
            generator.set_state(state)
        contents = [tensor.clone() for tensor in written]
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(old)
        return outputs, gradients, contents

    expected, expected_grads, expected_contents = run(reference)
    actual, actual_grads, contents = run(kernel)
    if len(actual) != len(expected):
        raise AssertionError(
            f"{name}: the kernel returned {len(actual)} tensors, the reference {len(expected)}"
        )
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        # Outputs near 0 are often differences of numbers near 1, a mean advantage say.
        _assert_close(f"{name}: output {index}", got, want, rtol, floor=rtol)
    for mutated, got, want in zip(mutates, contents, expected_contents, strict=True):
        floor = torch.finfo(want.dtype).eps
        _assert_close(f"{name}: {mutated}, as the kernel left it", got, want, rtol, floor=floor)
    for index, (got_grad, want_grad) in enumerate(zip(actual_grads, expected_grads, strict=True)):
        if (got_grad is None) != (want_grad is None):
            raise AssertionError(
                f"{name}: gradient {index} is {'missing' if got_grad is None else 'present'} in the "
                f"kernel and {'missing' if want_grad is None else 'present'} in the reference"
            )
        if got_grad is not None and want_grad is not None:
            # Gradients of a mean are small throughout, 1/M: only rounding noise is let through.
            exact = torch.float64 if want_grad.dtype == torch.float64 else torch.float32
            floor = torch.finfo(exact).eps
            _assert_close(f"{name}: gradient {index}", got_grad, want_grad, rtol, floor=floor)


def _generators(kwargs: dict[str, Any]) -> list[torch.Generator]:
    return [value for value in kwargs.values() if isinstance(value, torch.Generator)]


def _cotangent(output: Tensor) -> Tensor:
    """A fixed, sign-changing upstream gradient: unlike all ones it catches mixed-up rows."""
    ramp = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
    return torch.cos(ramp + 0.5).reshape(output.shape).to(output.dtype)


def _assert_close(what: str, got: Tensor, want: Tensor, rtol: float, floor: float) -> None:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(
            f"{what}: the kernel gave {tuple(got.shape)} {got.dtype}, "
            f"the reference {tuple(want.shape)} {want.dtype}"
        )
    if not want.is_floating_point():
        if not torch.equal(got, want):
            raise AssertionError(f"{what}: kernel and reference differ")
        return
    finite = want.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
    # Errors scale with the largest entry a sum went through, so the largest sets the floor.
    atol = max(floor, rtol * float(finite.max()) if finite.numel() else 0.0)
    try:
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        raise AssertionError(f"{what}: kernel and reference differ. {error}") from None
