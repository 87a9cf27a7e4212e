"""What the kernels cost, read off the compiler's output: no GPU needed. `python aot.py` writes docs.

`launches` records the launches of a call instead of running them, so what is compiled here is what
ships: the same tiles, warps and argument types, for the same shapes.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ppo_fast.dispatch import Accelerated
from ppo_fast.kernels._launch import Launch, recorded

SM90 = GPUTarget("cuda", 90, 32)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": SM90,
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Loop(NamedTuple):
    """Instructions between a label and the branch back to it; no other loop inside."""

    opcodes: collections.Counter[str]

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    def count(self, *prefixes: str) -> int:
        """How many opcodes begin with one of the prefixes."""
        return sum(n for op, n in self.opcodes.items() if op.startswith(prefixes))


class Compiled(NamedTuple):
    """One kernel in one configuration for one NVIDIA target."""

    kernel: str
    registers: int
    stack: int
    local: int
    shared: int
    opcodes: collections.Counter[str]
    loops: list[Loop]

    def count(self, *prefixes: str) -> int:
        return sum(n for op, n in self.opcodes.items() if op.startswith(prefixes))

    @property
    def hot_loop(self) -> Loop | None:
        """The longest innermost loop, of those with 128-bit loads if there are any; or None."""
        wide = [loop for loop in self.loops if loop.count("LDG.E.128")]
        return max(wide or self.loops, key=lambda loop: loop.instructions, default=None)


def launches(op: Accelerated, *args: Any, **kwargs: Any) -> list[Launch]:
    """The kernel launches of one forward and, where an input requires grad, one backward call.

    The tensors may be on the CPU or have no memory at all; nothing runs. Not under
    TRITON_INTERPRET=1, which leaves no kernels to compile.
    """
    assert op.kernel is not None
    with recorded() as found, torch.enable_grad():
        result = op.kernel(*args, **kwargs)
        outputs = result if isinstance(result, tuple) else (result,)
        roots = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(x) for x in roots])
    return list(found)


def _argument(value: Any, specialise: bool) -> tuple[str, bool]:
    """A value's type in a kernel's signature, and whether it is known to be a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], specialise and value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        wide = not -(2**31) <= value < 2**31
        return "i64" if wide else "i32", specialise and value % 16 == 0
    return "fp32", False


def _typed(
    value: Any, specialise: bool, key: Any, path: tuple[int, ...], constants: dict, attributes: dict
) -> str:
    """A value's type; what is known of it beyond that goes into `constants` and `attributes`."""
    is_one = isinstance(value, int) and not isinstance(value, bool) and value == 1
    if value is None or (is_one and specialise):
        constants[key] = value
        return "constexpr"
    name, divisible = _argument(value, specialise)
    if divisible:
        attributes[path] = [["tt.divisibility", 16]]
    return name


def source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for a launch: its typed source and its options."""
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    options = {k: v for k, v in launch.meta.items() if k in OPTIONS}
    by_name = {k: v for k, v in launch.meta.items() if k not in OPTIONS}
    by_name |= dict(zip(kernel.arg_names, launch.args, strict=False))
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        value = by_name.get(name, parameter.default)
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, tuple):
            types = []
            for place, part in enumerate(value):
                path = (position, place)
                types.append(_typed(part, specialise, path, path, constants, attributes))
            signature[name] = type(value)(*types)
        else:
            signature[name] = _typed(value, specialise, name, (position,), constants, attributes)
    return ASTSource(kernel, signature, constants, attributes), options


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """Compile a recorded launch; raises what the compiler raises."""
    typed, options = source(launch)
    return triton.compile(typed, target=target, options=options)


def key(launch: Launch) -> str:
    """Equal for launches that compile to the same code."""
    typed, options = source(launch)
    parts = (typed.name, typed.signature, typed.constants, typed.attrs, options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def inspect(launch: Launch, target: GPUTarget = SM90) -> Compiled:
    """Compile a recorded launch for an NVIDIA target and read its resources and machine code."""
    compiled = compile_for(launch, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("--dump-resource-usage", file.name)
        listing = _tool("-sass", file.name)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = [
        # Without the eviction policy, which stands in the middle: LDG.E.EF.128.
        (int(address, 16), re.sub(r"\.E[FL](?=\.|$)", "", opcode), rest)
        for address, opcode, rest in re.findall(
            r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", listing
        )
    ]
    while code and code[-1][1] in ("NOP", "BRA"):
        code.pop()  # padding behind the end
    return Compiled(
        launch.kernel.__name__,
        found["REG"],
        found["STACK"],
        found["LOCAL"],
        compiled.metadata.shared,
        collections.Counter(opcode for _, opcode, _ in code),
        _loops(code),
    )


def _tool(*arguments: str) -> str:
    command = [str(TOOLS / "cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loops(code: list[tuple[int, str, str]]) -> list[Loop]:
    """Innermost loops: ranges from a branch's target to the branch back to it."""
    ranges = []
    for address, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode.startswith("BRA") and target and int(target.group(1), 16) <= address:
            ranges.append((int(target.group(1), 16), address))
    innermost = [
        (start, end)
        for start, end in ranges
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in ranges)
    ]
    return [
        Loop(collections.Counter(op for address, op, _ in code if start <= address <= end))
        for start, end in innermost
    ]


ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "kernels"
PAGE = ROOT / "docs" / "kernels.md"


@functools.cache
def case_modules() -> list[ModuleType]:
    """The files that list the calls of each op, beside the kernels' tests."""
    if str(CASES) not in sys.path:
        sys.path.insert(0, str(CASES))
    return [importlib.import_module(path.stem) for path in sorted(CASES.glob("cases_*.py"))]


def op_file(module: ModuleType) -> str:
    """Which file's ops a list of calls is about."""
    return module.__name__.removeprefix("cases_")


@functools.cache
def shipped_cases() -> dict[str, Callable[[], Any]]:
    """Calls that between them pick every configuration a kernel is launched in."""
    return {
        f"{op_file(module)}: {name}": case
        for module in case_modules()
        for name, case in module.AOT_CASES.items()
    }


@functools.cache
def launches_of(name: str) -> list[Launch]:
    """The launches of a shipped case, its tensors without memory."""
    with torch.device("meta"):
        call = shipped_cases()[name]()
        return launches(call.op, *call.args, **call.kwargs)


_inspected: dict[str, Compiled] = {}


def inspected(name: str) -> list[Compiled]:
    """The compiled kernels of a shipped case, on sm_90; each configuration is compiled once."""
    found = []
    for launch in launches_of(name):
        identity = key(launch)
        if identity not in _inspected:
            _inspected[identity] = inspect(launch)
        found.append(_inspected[identity])
    return found


@functools.cache
def first_launches() -> dict[str, Launch]:
    """One launch of each kernel: its default configuration."""
    first: dict[str, Launch] = {}
    for name in shipped_cases():
        for launch in launches_of(name):
            first.setdefault(launch.kernel.__name__, launch)
    return first


def page() -> str:
    """The text of docs/kernels.md."""
    budgets = {
        (f"{op_file(module)}: {b.case}", b.kernel): b
        for module in case_modules()
        for b in module.BUDGETS
        if b.elements
    }
    lines = [
        "# What the kernels compile to",
        "",
        "Written by `python benchmarks/aot.py`: every configuration that ships, compiled ahead of time "
        f"for sm_90 (H100, H200) by triton {triton.__version__}, read from its machine code. No stack "
        "frame is larger than 8 bytes. `tests/test_aot.py` holds each to its budget and "
        "compiles the kernels for sm_80, sm_100 and gfx942 too.",
        "",
        "The hot loop is the innermost loop with the most instructions, of those with 128-bit loads if "
        "there are any; instructions an element count "
        "its loads, stores and addresses. How long a kernel takes: see the README; what no GPU run has "
        "shown is not yet measured.",
        "",
        "| call | kernel | registers | shared bytes | 128-bit loads | hot loop: instructions | barriers, "
        "shuffles in it | instructions an element |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seen = set()
    for name in shipped_cases():
        for launch, found in zip(launches_of(name), inspected(name), strict=True):
            if (key(launch), name) in seen:
                continue
            seen.add((key(launch), name))
            loop = found.hot_loop
            budget = budgets.get((name, found.kernel))
            cells = [
                name,
                f"`{found.kernel}`",
                found.registers,
                found.shared,
                found.count("LDG.E.128"),
            ]
            cells += [loop.instructions if loop else "-"]
            cells += [f"{loop.count('BAR')}, {loop.count('SHFL')}" if loop else "-"]
            cells += [f"{loop.instructions / budget.elements:.1f}" if loop and budget else "-"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
