"""Each kernel with one fault in it fails on the case named beside the fault."""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
from calls import Call, Mutant, assert_agrees

from ppo_fast.device_errors import raise_device_errors
from ppo_fast.dispatch import Accelerated

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
MODULES = [importlib.import_module(path.stem) for path in sorted(HERE.glob("cases_*.py"))]
MUTANTS = [
    pytest.param(module.CASES, mutant, id=f"{mutant.file}-{number}")
    for module in MODULES
    for number, mutant in enumerate(getattr(module, "MUTANTS", ()))
]


def with_kernels_of(package: str, call: Call) -> Call:
    """The call with its kernel taken from a copy of kernels/."""
    file = call.op.__module__.rpartition(".")[2]
    twin = getattr(importlib.import_module(f"{package}.{file}"), call.op.__name__)
    options = {"validate": call.op.validate, "mutates": call.op.mutates}
    return call._replace(op=Accelerated(call.op.reference, twin, **options))


@pytest.mark.parametrize(("cases", "mutant"), MUTANTS)
def test_the_fault_is_caught(cases, mutant: Mutant, tmp_path, monkeypatch, request):
    text = (KERNELS / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.old!r} is there {text.count(mutant.old)} times"
    package = "mutant_" + "".join(filter(str.isalnum, request.node.callspec.id))
    folder = tmp_path / package
    folder.mkdir()
    for path in KERNELS.glob("*.py"):
        text = path.read_text()
        if path.name == mutant.file:
            text = text.replace(mutant.old, mutant.new)
        (folder / path.name).write_text(text.replace("ppo_fast.kernels", package))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        call = with_kernels_of(package, cases[mutant.case]())
        with pytest.raises(AssertionError, match="kernel"):
            assert_agrees(call)
    finally:
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]
        # A faulty kernel may take a good index for a bad one; the next test must not hear of it.
        with contextlib.suppress(IndexError):
            raise_device_errors()


def test_an_unchanged_copy_passes(tmp_path, monkeypatch):
    folder = tmp_path / "unchanged"
    folder.mkdir()
    for path in KERNELS.glob("*.py"):
        (folder / path.name).write_text(path.read_text().replace("ppo_fast.kernels", "unchanged"))
    monkeypatch.syspath_prepend(tmp_path)
    call = next(m for m in MODULES if m.__name__ == "cases_gae").CASES["columns"]()
    assert_agrees(with_kernels_of("unchanged", call))


def test_every_kernel_file_has_mutants():
    touched = {mutant.file for module in MODULES for mutant in getattr(module, "MUTANTS", ())}
    kernels = {path.name for path in KERNELS.glob("*.py")} - {"_launch.py", "_library.py"}
    assert kernels <= touched
