"""Liger's kernel as a source of log-probs: what it is asked, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from ppo_fast.functional import liger_head
from ppo_fast.functional.liger_head import available, liger_log_probs
from ppo_fast.functional.linear_head import log_probs_from_hidden


def case(rows=9, size=33, width=8):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).bfloat16()
    weight = torch.randn(size, width, generator=g).bfloat16()
    index = torch.randint(size, (rows,), generator=g)
    mask = torch.rand(rows, generator=g) > 0.3
    return hidden, weight, index, mask


class Fake:
    """What Liger documents its function to return, and what it was called with."""

    calls: list = []

    @classmethod
    def apply(cls, x, w, target, temperature=1.0, ignore=-100, tiles=1, entropy=False, ids=None):
        cls.calls.append((x, w, target, temperature, ignore, tiles, entropy, ids))
        valid = target != ignore
        if bool((((target < 0) | (target >= len(w))) & valid).any()):
            raise ValueError("target contains values outside")
        log_p = torch.log_softmax(x.float() @ w.float().t() / temperature, -1)
        safe = target.masked_fill(~valid, 0)
        nll = -log_p.gather(1, safe.unsqueeze(1)).squeeze(1).masked_fill(~valid, 0.0)
        # Rows left out hold anything, as nothing is said of them.
        h = -(log_p.exp() * log_p).sum(1).masked_fill(~valid, float("nan")).bfloat16()
        return (nll, h) if entropy else nll


@pytest.fixture
def fake(monkeypatch):
    module = types.ModuleType(liger_head.MODULE)
    setattr(module, liger_head.FUNCTION, Fake)
    monkeypatch.setitem(sys.modules, liger_head.MODULE, module)
    monkeypatch.setattr(liger_head, "available", lambda device: None)
    Fake.calls = []
    return Fake


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2])
def test_signs_and_temperature_are_ours(fake, temperature):
    hidden, weight, index, mask = case()
    given = hidden, weight, index
    expected = log_probs_from_hidden(*given, temperature=temperature, mask=mask, with_entropy=True)
    found = liger_log_probs(*given, temperature=temperature, mask=mask, with_entropy=True)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=2**-8, atol=0.0)
    alone = liger_log_probs(*given, temperature=temperature, mask=mask)
    torch.testing.assert_close(alone, found[0])
    assert found[0].dtype is found[1].dtype is torch.float32


def test_the_kernel_gets_rows_and_marks(fake):
    hidden, weight, index, mask = case(rows=6)
    mask[0], mask[1] = False, True
    shaped = hidden.view(2, 3, -1), weight, index.view(2, 3).int()
    out = liger_log_probs(*shaped, temperature=0.5, mask=mask.view(2, 3))
    ((x, w, target, temperature, ignore, tiles, entropy, ids),) = fake.calls
    assert out.shape == (2, 3)
    assert x.shape == hidden.shape
    assert w is weight
    assert target.dtype is torch.int64
    assert target.tolist() == index.masked_fill(~mask, -100).tolist()
    assert (temperature, ignore, tiles, entropy, ids) == (0.5, -100, 1, False, None)
    assert type(temperature) is float


def test_an_index_that_is_ligers_mark_is_refused(fake):
    hidden, weight, index, _ = case()
    index[3] = -100
    with pytest.raises(ValueError, match="outside"):
        liger_log_probs(hidden, weight, index)


def test_no_rows_need_no_kernel(fake):
    hidden, weight, index, _ = case(rows=0)
    log_probs, entropy = liger_log_probs(hidden, weight, index, with_entropy=True)
    assert log_probs.shape == entropy.shape == (0,)
    assert not fake.calls


def test_it_has_no_gradient_and_says_so(fake):
    hidden, weight, index, _ = case()
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="no_grad"):
        liger_log_probs(hidden, weight, index)
    with torch.no_grad():
        assert not liger_log_probs(hidden, weight, index).requires_grad


def test_a_cpu_is_told_so():
    hidden, weight, index, _ = case()
    assert "cpu" in available(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"on cpu.*Hopper.*log_probs_from_hidden"):
        liger_log_probs(hidden, weight, index)


def test_another_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    assert "A100 has compute capability (8, 0)" in available(torch.device("cuda"))


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    def missing(name):
        raise liger_head.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(liger_head, "_no_device", lambda device: None)
    monkeypatch.setattr(liger_head.metadata, "version", missing)
    assert "pip install 'liger-kernel[cutedsl]" in available()


@pytest.mark.parametrize("broken", [liger_head.MODULE, liger_head.KERNEL])
def test_a_release_without_the_kernel_is_named(monkeypatch, broken):
    def imported(name):
        if name == broken:
            raise ImportError(f"no {name}")
        return types.SimpleNamespace(**{liger_head.FUNCTION: Fake})

    monkeypatch.setattr(liger_head, "_no_device", lambda device: None)
    monkeypatch.setattr(liger_head.metadata, "version", lambda name: "0.5.0")
    monkeypatch.setattr(liger_head.importlib, "import_module", imported)
    assert f"liger-kernel 0.5.0 does not import {broken}" in available()
    monkeypatch.setattr(liger_head.importlib, "import_module", lambda name: types)
    assert f"has no {liger_head.FUNCTION}" in available()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(9, 8)}, "hidden is torch.float32; expected torch.bfloat16"),
        ({"weight": torch.zeros(33, 8)}, "weight is torch.float32; expected torch.bfloat16"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": torch.tensor(1.0)}, "expected a number"),
        ({"index": torch.zeros(9)}, "index is torch.float32"),
        ({"mask": torch.ones(9)}, "mask is"),
    ],
)
def test_bad_input_is_refused_before_the_kernel(fake, change, message):
    hidden, weight, index, _ = case()
    given = {"hidden": hidden, "weight": weight, "index": index} | change
    with pytest.raises(ValueError, match=message):
        liger_log_probs(**given)
    assert not fake.calls


def test_ligers_own_reference_agrees(monkeypatch):
    """Its PyTorch fallback, which needs neither Triton nor a GPU, stands in for the kernel."""
    spec = importlib.util.find_spec("liger_kernel")
    if spec is None:
        pytest.skip("liger-kernel is not installed")
    file = Path(spec.submodule_search_locations[0]) / "ops/fused_linear_scaled_cross_entropy.py"
    source = importlib.util.spec_from_file_location("ligers_head", file)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, liger_head.MODULE, module)
    monkeypatch.setattr(liger_head, "available", lambda device: None)
    hidden, weight, index, mask = case()
    given = {"temperature": 0.7, "mask": mask, "with_entropy": True}
    expected = log_probs_from_hidden(hidden, weight, index, **given)
    found = liger_log_probs(hidden, weight, index, **given)
    # Its logits are rounded to bfloat16.
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=4e-2)
    assert bool((found[0] < 0)[mask].all())
    index[mask.nonzero()[0]] = -100
    with pytest.raises(ValueError, match="outside"):
        liger_log_probs(hidden, weight, index, mask=mask)
