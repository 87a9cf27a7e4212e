"""What is shipped, where `kernels/` appears, and what imports without the optional packages."""

import importlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

from ppo_fast.dispatch import Accelerated

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONAL = sorted(path.stem for path in (ROOT / "ppo_fast" / "functional").glob("[!_]*.py"))
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    """What setup.py hands to setuptools."""
    given: dict = {}
    folder = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        try:
            os.chdir(ROOT)
            runpy.run_path("setup.py")
        finally:
            os.chdir(folder)
    return given


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_python(code: str, **options) -> str:
    return run(sys.executable, "-c", textwrap.dedent(code), **options)


def ops() -> list[Accelerated]:
    """Every `@accelerated` op of `ppo_fast.functional`, once."""
    found = {}
    for file in FUNCTIONAL:
        for value in vars(importlib.import_module(f"ppo_fast.functional.{file}")).values():
            if isinstance(value, Accelerated):
                found[value.__module__, value.__name__] = value
    return list(found.values())


# The three rules of kernels/.


def test_the_package_links_to_the_kernels_folder():
    link = ROOT / "ppo_fast" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")


def test_the_kernels_folder_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_setup_maps_the_kernels_folder_into_the_package(setup_arguments):
    assert setup_arguments["package_dir"] == {"ppo_fast.kernels": "kernels"}
    assert "ppo_fast.kernels" in setup_arguments["packages"]
    assert "kernels" not in setup_arguments["packages"]


def test_the_kernels_import_as_part_of_the_package():
    package = importlib.import_module("ppo_fast.kernels")
    assert (ROOT / "kernels").samefile(next(iter(package.__path__)))


def test_the_folder_does_not_shadow_a_package_called_kernels(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the hub library'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.name)"
    assert run_python(code, cwd=ROOT).strip() == "the hub library"


# Names.


def test_every_op_is_defined_in_the_file_its_kernel_is_looked_up_by():
    for op in ops():
        file = op.__module__.rpartition(".")[2]
        assert op.__module__ == f"ppo_fast.functional.{file}", op
        assert file in FUNCTIONAL, op
        assert getattr(importlib.import_module(op.__module__), op.__name__) is op


def test_every_kernel_file_has_a_reference_file():
    assert set(KERNELS) <= set(FUNCTIONAL)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_every_op_with_a_kernel_file_says_what_is_bound():
    for op in ops():
        file = op.__module__.rpartition(".")[2]
        if file not in KERNELS:
            assert op.kernel is None
            assert op.no_kernel == f"there is no kernel file kernels/{file}.py"
        elif op.kernel is not None:
            assert op.kernel.__module__ == f"ppo_fast.kernels.{file}"


# What is shipped.


def test_every_folder_of_python_files_is_a_package_of_setup(setup_arguments):
    folders = {path.parent for path in (ROOT / "ppo_fast").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names | {"ppo_fast.kernels"} == set(setup_arguments["packages"])


def test_the_command_points_to_a_function(setup_arguments):
    (command,) = setup_arguments["entry_points"]["console_scripts"]
    name, module, function = re.fullmatch(r"(\S+) = (\S+):(\S+)", command).groups()
    assert name == "ppo-fast"
    assert callable(getattr(importlib.import_module(module), function))


def test_the_pinned_versions_satisfy_what_setup_asks_for(setup_arguments):
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
            pins[pin.name.lower()] = str(pin.specifier).removeprefix("==")
    asked = setup_arguments["install_requires"] + setup_arguments["extras_require"]["test"]
    for requirement in map(Requirement, asked):
        assert pins[requirement.name] in requirement.specifier, requirement


def test_a_wheel_ships_the_kernels_inside_the_package_only(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ppo_fast", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    (source / "kernels" / "probe.py").write_text("here = True")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", tmp_path, source),
    )
    (wheel,) = tmp_path.glob("ppo_fast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()

    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ppo_fast"}
    code = {name for name in names if name.endswith(".py")}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ppo_fast").rglob("*.py")}
    kernels = {f"ppo_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    kernels.add("ppo_fast/kernels/probe.py")
    assert code == files | kernels
    assert "ppo_fast/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    found = run_python(
        "import ppo_fast.kernels.probe as p; print(p.__file__)",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert Path(found.strip()) == installed / "ppo_fast" / "kernels" / "probe.py"


# What imports without the optional packages.

TRAIN = ["tyro", "safetensors", "tqdm", "tensorboard", "matplotlib"]


def test_the_ops_import_and_run_with_torch_but_without_triton_and_the_train_extra():
    code = f"""
        import importlib, sys
        for name in {["triton", *TRAIN]}:
            sys.modules[name] = None
        import torch
        for file in {FUNCTIONAL}:
            importlib.import_module("ppo_fast.functional." + file)
        from ppo_fast.dispatch import accelerated
        @accelerated
        def double(x): return 2 * x
        assert double(torch.ones(1)) == 2
        print(double.no_kernel)
    """
    assert run_python(code, cwd=ROOT).strip() == "triton is not installed"


def test_every_module_imports_without_the_extras():
    code = f"""
        import importlib, pkgutil, sys
        for name in {[*TRAIN, "transformers", "tokenizers", "peft"]}:
            sys.modules[name] = None
        import ppo_fast
        # The last extends classes of transformers, and is imported where a cache is made.
        skip = (
            "ppo_fast.kernels",
            "ppo_fast.integrations",
            "ppo_fast.__main__",
            "ppo_fast.llm.kv_cache",
        )
        for module in pkgutil.walk_packages(ppo_fast.__path__, "ppo_fast."):
            if not module.name.startswith(skip):
                importlib.import_module(module.name)
    """
    run_python(code, cwd=ROOT)
