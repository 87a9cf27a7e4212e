"""One-file checkpoints: tensors and JSON in the safetensors format, replaced atomically.

Loading never runs code from the file. A reader sees the previous checkpoint or the new one, whole,
whatever happens to the writer: the bytes go to a temporary file in the same folder, reach the disk,
and only then take the name.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ppo_fast.extras import require

FORMAT = "ppo_fast"
FORMAT_VERSION = 1

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

PathLike = str | os.PathLike[str]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the text says which, why and what to do."""


def save_checkpoint(path: PathLike, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a checkpoint, replacing the file at `path` only once the new one is on the disk.

    Missing parent folders are made. About twice the checkpoint's size of host memory is used.

    Args:
        path: the file; a link is followed.
        tensors: any dense tensors by name: any device, strides, dtype safetensors has. Views and
            shared storage are saved as separate tensors.
        meta: JSON data. Floats come back exactly, NaN and infinities included, integers at any
            size; tuples come back as lists.

    Raises:
        CheckpointError: `meta` or a tensor cannot be stored, the disk is full, or the path cannot
            be written. What was at `path` is then untouched.
        ImportError: safetensors is missing.
    """
    safetensors = require("safetensors.torch", "train", "a checkpoint")
    path = os.path.realpath(path)
    _assert_json(path, "meta", meta)
    # Copies: safetensors refuses views, and tensors that share storage.
    dense = {name: _dense(path, name, tensor) for name, tensor in tensors.items()}
    text = json.dumps(meta)
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "meta": text,
        "crc32": _checksum(dense, text),
    }
    try:
        data = safetensors.save(dense, metadata=metadata)
    except Exception as error:
        raise CheckpointError(f"{path}: these tensors cannot be stored: {error}") from error
    try:
        _write_atomically(path, data)
    except OSError as error:
        raise CheckpointError(error.strerror) from error


def load_checkpoint(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote: `(tensors, meta)`, the tensors on the CPU.

    Raises:
        CheckpointError: no such file, a folder, a truncated or corrupt file, a safetensors file of
            another program, or one written by a newer version.
        ImportError: safetensors is missing.
    """
    safetensors = require("safetensors", "train", "a checkpoint")
    path = os.fspath(path)
    if os.path.isdir(path):
        inside = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
        raise CheckpointError(
            f"{path} is a folder, expected a checkpoint file; "
            + (f"did you mean {os.path.join(path, inside[0])}?" if inside else "it holds none")
        )
    if not os.path.exists(path):
        raise CheckpointError(
            f"{path}: there is no such file; expected a checkpoint, "
            "the .safetensors file in a run folder"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # The file is mapped into memory: clones outlive it and cannot change under us.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        raise _corrupt(path, str(error)) from error
    if metadata.get("format") != FORMAT or "version" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file that ppo_fast did not write (format "
            f"{metadata.get('format')!r}, expected {FORMAT!r}); give a file written by save()"
        )
    if not metadata["version"].isdigit() or int(metadata["version"]) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {metadata['version']}, this ppo_fast reads up to "
            f"{FORMAT_VERSION}; upgrade with pip install -U ppo-fast"
        )
    text = metadata.get("meta", "")
    if metadata.get("crc32") != _checksum(tensors, text):
        raise _corrupt(path, "its checksum does not match its content")
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise _corrupt(path, f"its meta is not JSON: {error}") from error
    return tensors, meta


def atomic_write_text(path: PathLike, text: str) -> None:
    """Replace the file at `path` by `text` in UTF-8: readers see the old or the new, whole.

    Missing parent folders are made.

    Raises:
        OSError: it cannot be written; what was at `path` is untouched.
    """
    _write_atomically(os.path.realpath(path), text.encode())


def _write_atomically(path: str, data: bytes) -> None:
    temporary = f"{path}.tmp-{os.getpid()}"
    kept = "the previous file is intact" if os.path.exists(path) else "nothing was left behind"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        if error.errno in _NO_SPACE:
            why = f"no space for its {len(data):,} bytes; free some or choose another folder"
        else:
            why = str(error)
        raise OSError(error.errno, f"{path} cannot be written: {why}; {kept}") from error
    _sync_folder(os.path.dirname(path))


def _sync_folder(folder: str) -> None:
    """Bring a rename to the disk, where the system can sync a folder (Windows cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot either; the file itself is whole and in place.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _dense(path: str, name: Any, tensor: Any) -> Tensor:
    if not isinstance(name, str) or name == "__metadata__":
        raise CheckpointError(
            f"{path}: {name!r} cannot name a tensor; expected a str other than '__metadata__'"
        )
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{path}: tensor {name!r} is a {getattr(tensor, 'layout', type(tensor).__name__)}, "
            "expected a dense tensor with data"
        )
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """CRC-32 of the text and of every tensor's name and bytes: the format itself has none."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        if tensors[name].numel():
            crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _corrupt(path: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} ({os.path.getsize(path):,} bytes) is truncated, corrupt or not a checkpoint: "
        f"{why}; use another checkpoint or train anew"
    )


def _assert_json(path: str, where: str, value: Any) -> None:
    """Refuse what JSON would drop or change in silence, naming the place in `meta`."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{path}: {where} has the key {key!r}, expected a str")
            _assert_json(path, f"{where}[{key!r}]", entry)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _assert_json(path, f"{where}[{index}]", entry)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise CheckpointError(
            f"{path}: {where} is a {type(value).__name__}, expected JSON data "
            "(None, bool, int, float, str, list, dict); store arrays as tensors"
        )
