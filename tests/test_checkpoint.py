"""Checkpoints: what goes in comes out, and a failure never costs the file that was there."""

import errno
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from ppo_fast import checkpoint
from ppo_fast.checkpoint import (
    CheckpointError,
    atomic_write_text,
    load_checkpoint,
    save_checkpoint,
)

pytest.importorskip("safetensors")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "checkpoint.safetensors"


@pytest.fixture
def saved(path):
    """A checkpoint of step 1, there before the test begins."""
    save_checkpoint(path, {"w": torch.ones(3)}, {"step": 1})
    return path


def assert_still_step_1(path) -> None:
    tensors, meta = load_checkpoint(path)
    assert meta == {"step": 1}
    assert torch.equal(tensors["w"], torch.ones(3))
    assert os.listdir(path.parent) == [path.name]


# What goes in comes out.


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
        torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64,
    ],
)  # fmt: skip
def test_every_dtype_survives(path, dtype):
    tensor = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 4.0]]).to(dtype)
    save_checkpoint(path, {"x": tensor}, {})
    loaded = load_checkpoint(path)[0]["x"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor) if dtype != torch.float8_e4m3fn else True
    assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))


def test_views_shared_storage_scalars_and_empty_tensors_survive(path):
    x = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "x": x,
        "again": x,
        "transposed": x.t(),
        "strided": x[1:, ::2],
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "conj": torch.complex(x, x).conj(),
        "parameter": torch.nn.Parameter(x),
    }
    save_checkpoint(path, tensors, {})
    loaded, _ = load_checkpoint(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].shape == tensor.shape, name
        assert torch.equal(loaded[name], tensor), name


def test_nan_payloads_and_signed_zeros_survive_bit_for_bit(path):
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 0x00000001], dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    save_checkpoint(path, {"x": x}, {})
    assert torch.equal(load_checkpoint(path)[0]["x"].view(torch.int32), x.view(torch.int32))


def test_meta_survives(path):
    meta = {
        "pcg64": 2**128 - 159,
        "negative": -(2**70),
        "floats": [0.1, 1e-320, -0.0, math.inf, -math.inf],
        "text": 'é "quoted" \n \U0001f600 \ud800',
        "nested": {"a": [None, True, {"b": []}]},
        "order": {"z": 1, "a": 2},
    }
    save_checkpoint(path, {}, meta)
    loaded = load_checkpoint(path)[1]
    assert loaded == meta
    assert list(loaded["order"]) == ["z", "a"]
    assert math.copysign(1, loaded["floats"][2]) == -1


def test_nan_in_meta_survives_and_tuples_become_lists(path):
    save_checkpoint(path, {}, {"nan": math.nan, "sizes": (64, 64)})
    meta = load_checkpoint(path)[1]
    assert math.isnan(meta["nan"])
    assert meta["sizes"] == [64, 64]


def test_generator_states_survive(path):
    generator = torch.Generator().manual_seed(1)
    rng = random.Random(1)
    save_checkpoint(path, {"torch": generator.get_state()}, {"random": rng.getstate()})
    expected = torch.rand(4, generator=generator)
    tensors, _ = load_checkpoint(path)
    assert torch.equal(
        torch.rand(4, generator=torch.Generator().set_state(tensors["torch"])), expected
    )


def test_loaded_tensors_do_not_follow_the_file(saved):
    tensors, _ = load_checkpoint(saved)
    with open(saved, "r+b") as file:
        file.seek(-12, os.SEEK_END)
        file.write(b"\0" * 12)
    assert torch.equal(tensors["w"], torch.ones(3))


def test_the_file_is_plain_safetensors_that_others_can_read(saved):
    from safetensors.torch import load_file

    assert torch.equal(load_file(saved)["w"], torch.ones(3))


def test_a_link_is_followed_not_replaced(saved, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(saved)
    save_checkpoint(link, {"w": torch.ones(3)}, {"step": 2})
    assert link.is_symlink()
    assert load_checkpoint(saved)[1] == {"step": 2}


# Refused before anything is written.


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"env": object()}, r"meta\['env'\] is a object, expected JSON data"),
        ({"a": [1, {"b": {2, 3}}]}, r"meta\['a'\]\[1\]\['b'\] is a set"),
        ({"a": {1: 2}}, r"meta\['a'\] has the key 1, expected a str"),
        ({"x": torch.ones(2)}, r"meta\['x'\] is a Tensor.*store arrays as tensors"),
    ],
)
def test_meta_that_json_would_change_is_refused(saved, meta, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(saved, {}, meta)
    assert_still_step_1(saved)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": [1.0]}, "tensor 'x' is a list, expected a dense tensor"),
        ({"x": torch.eye(2).to_sparse()}, "'x' is a torch.sparse_coo, expected a dense tensor"),
        ({"x": torch.empty(2, device="meta")}, "'x' is a .*, expected a dense tensor with data"),
        ({"__metadata__": torch.ones(1)}, "'__metadata__' cannot name a tensor"),
        ({3: torch.ones(1)}, "3 cannot name a tensor"),
        ({"x": torch.ones(1, dtype=torch.complex128)}, "cannot be stored: .*complex128"),
    ],
)
def test_tensors_the_format_lacks_are_refused(saved, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(saved, tensors, {})
    assert_still_step_1(saved)


# A failure while writing.


def test_a_full_disk_says_what_was_needed_and_keeps_the_old_file(saved, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"no space for its 4,\d\d\d bytes.*the previous file is intact"
    ):
        save_checkpoint(saved, {"w": torch.zeros(1000)}, {"step": 2})
    monkeypatch.undo()
    assert_still_step_1(saved)


def test_a_file_size_limit_keeps_the_old_file(saved):
    code = """
        import resource, sys, torch
        from ppo_fast.checkpoint import CheckpointError, save_checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_checkpoint(sys.argv[1], {"w": torch.zeros(10000)}, {"step": 2})
        except CheckpointError as error:
            print(error)
    """
    pytest.importorskip("resource")
    message = run_script(code, saved).stdout
    assert "no space for its 40," in message
    assert "the previous file is intact" in message
    assert_still_step_1(saved)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_ctrl_c_while_writing_keeps_the_old_file(saved, monkeypatch, step):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, {"w": torch.zeros(3)}, {"step": 2})
    monkeypatch.undo()
    assert_still_step_1(saved)


def test_a_first_save_that_fails_leaves_nothing(path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CheckpointError, match=r"Input/output error.*nothing was left behind"):
        save_checkpoint(path, {}, {})
    assert os.listdir(path.parent) == []


def test_a_path_below_a_file_is_named(saved):
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors/x cannot be written: "):
        save_checkpoint(saved / "x", {}, {})
    assert_still_step_1(saved)


def test_a_folder_as_path_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be written: .*directory"):
        save_checkpoint(tmp_path, {}, {})
    assert not list(tmp_path.parent.glob("*.tmp-*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_stage_leaves_the_old_or_the_new_checkpoint_whole(saved):
    # One process imports torch; a fork of it dies at each stage of a save.
    code = """
        import os, signal, sys, torch
        from ppo_fast.checkpoint import save_checkpoint

        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        def die_after(call):
            return lambda *args: (call(*args), die())

        fsync, replace = os.fsync, os.replace
        stages = {
            "written": ("fsync", die),
            "synced": ("fsync", die_after(fsync)),
            "renaming": ("replace", die),
            "renamed": ("replace", die_after(replace)),
        }
        torch.set_num_threads(1)
        for stage, (name, call) in stages.items():
            child = os.fork()
            if not child:
                setattr(os, name, call)
                save_checkpoint(sys.argv[1], {"w": torch.full((3,), 2.0)}, {"step": 2})
                os._exit(3)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL, stage
            print(stage, open(sys.argv[1], "rb").read().hex())
    """
    steps = {}
    probe = saved.with_name("probe")
    for line in run_script(code, saved).stdout.splitlines():
        stage, content = line.split()
        probe.write_bytes(bytes.fromhex(content))
        steps[stage] = load_checkpoint(probe)[1]["step"]
    assert steps == {"written": 1, "synced": 1, "renaming": 1, "renamed": 2}


def test_a_kill_at_a_random_moment_leaves_a_whole_checkpoint(path):
    code = """
        import sys, torch
        from ppo_fast.checkpoint import save_checkpoint
        step = 0
        while True:
            step += 1
            save_checkpoint(sys.argv[1], {"w": torch.full((500_000,), float(step))}, {"step": step})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), path], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tensors, meta = load_checkpoint(path)
    assert (tensors["w"] == meta["step"]).all()


def run_script(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )


# Files that cannot be loaded.


def test_a_missing_file_is_named(path):
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors: there is no such file"):
        load_checkpoint(path)


def test_a_folder_is_answered_with_the_checkpoint_in_it(saved):
    with pytest.raises(CheckpointError, match=r"is a folder.*did you mean .*t.safetensors\?"):
        load_checkpoint(saved.parent)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder, expected a checkpoint file"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"bytes\) is truncated, corrupt or not a checkpoint"):
        load_checkpoint(saved)


def test_a_file_of_noise_is_refused(saved):
    saved.write_bytes(random.Random(0).randbytes(1000))
    with pytest.raises(CheckpointError, match="truncated, corrupt or not a checkpoint"):
        load_checkpoint(saved)


def test_a_pickle_is_refused_without_being_run(saved):
    class Bomb:
        def __reduce__(self):
            return (os.unlink, (str(saved),))

    torch.save({"bomb": Bomb()}, saved)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(saved)
    assert saved.exists()


@pytest.mark.parametrize("where", ["tensor", "meta"])
def test_one_flipped_bit_is_noticed(saved, where):
    data = bytearray(saved.read_bytes())
    # The digit of {"step": 1}, turned into another digit: still JSON.
    position = -1 if where == "tensor" else data.index(b'step\\": 1') + len(b'step\\": 1') - 1
    data[position] ^= 4
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        load_checkpoint(saved)


def test_a_safetensors_file_of_another_program_is_refused(saved):
    from safetensors.torch import save_file

    for metadata in (None, {"format": "pt"}):
        save_file({"w": torch.ones(3)}, saved, metadata=metadata)
        with pytest.raises(CheckpointError, match="that ppo_fast did not write"):
            load_checkpoint(saved)


def test_a_newer_format_asks_for_an_upgrade(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    save_checkpoint(path, {}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 2, this ppo_fast reads up to 1; upgrade"):
        load_checkpoint(path)


def test_a_header_that_lies_about_its_length_is_refused(saved):
    data = saved.read_bytes()
    saved.write_bytes(struct.pack("<Q", 2**60) + data[8:])
    with pytest.raises(CheckpointError, match="truncated, corrupt"):
        load_checkpoint(saved)


def test_without_safetensors_the_error_names_the_extra(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    expected = r"a checkpoint needs safetensors; install it with pip install 'ppo-fast\[train\]'"
    with pytest.raises(ImportError, match=expected):
        load_checkpoint(saved)
    with pytest.raises(ImportError, match=expected):
        save_checkpoint(saved, {}, {})


# Text files.


def test_text_is_replaced_whole(tmp_path):
    file = tmp_path / "run" / "config.json"
    atomic_write_text(file, json.dumps({"a": 1}))
    atomic_write_text(file, json.dumps({"a": "é"}, ensure_ascii=False))
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": "é"}
    assert os.listdir(file.parent) == ["config.json"]


def test_text_that_finds_no_space_keeps_the_old(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    atomic_write_text(file, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"config.json cannot be written: no space for its 3 bytes"):
        atomic_write_text(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]
