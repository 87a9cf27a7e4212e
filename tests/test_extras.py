"""Optional packages: imported where used, and named with the remedy where missing."""

import sys
from types import ModuleType

import pytest

from ppo_fast.extras import require


def test_an_installed_module_is_returned():
    assert require("json.decoder", "train") is sys.modules["json.decoder"]


def test_a_missing_package_is_named_with_the_extra():
    with pytest.raises(
        ImportError,
        match=r"^video needs no_such_pkg; install it with pip install 'ppo-fast\[video\]'$",
    ) as caught:
        require("no_such_pkg.part", "video", "video")
    assert caught.value.name == "no_such_pkg"
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_package_that_fails_to_import_is_told_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError,
        match=r"half_there, which is installed but does not import \(No module named 'no_such_dep",
    ):
        require("half_there", "train")


def test_an_error_other_than_import_error_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "raises.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        require("raises", "train")


def test_a_blocked_package_counts_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "blocked", None)
    with pytest.raises(ImportError, match="this feature needs blocked; install"):
        require("blocked", "train")
    monkeypatch.setitem(sys.modules, "blocked", ModuleType("blocked"))
    assert require("blocked", "train").__name__ == "blocked"
