"""Reading a `torch.distributed.checkpoint` folder without running what it holds."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from robust_dist.checkpoint.store import CheckpointError

METADATA = ".metadata"
# What torch writes into `.metadata`, over all versions: classes of records, sizes, formats.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}


class _Unpickler(pickle.Unpickler):
    """Knows torch's records of a checkpoint alone."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib" or module.startswith("pathlib."):
            # Where it was written; a plain path means the same and does nothing.
            if name in ("PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath"):
                return PurePosixPath
        elif name in _KNOWN.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is nothing of a checkpoint, and was not run")


def read_metadata(folder: Path) -> Metadata:
    """What a DCP folder says it holds; no code of the file is run.

    Raises:
        CheckpointError: There is no `.metadata`, it is torn, names anything but torch's own records, or a file outside
            the folder.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            return _load(file)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: torn, or not of torch.distributed.checkpoint ({reason})") from None


def _load(file: BinaryIO) -> Metadata:
    metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError(f"it holds a {type(metadata).__name__}")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            raise ValueError(f"it describes {name!r} by a {type(entry).__name__}")
    for info in (metadata.storage_data or {}).values():
        inside, numbers = PurePosixPath(info.relative_path), (info.offset, info.length)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"it names {info.relative_path}, which is outside the folder")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"it has a part of {info.relative_path} at {numbers}")
    return metadata


class _Pickle:
    """In place of the module `pickle` where torch reads and writes `.metadata`."""

    dump, dumps, load = staticmethod(pickle.dump), staticmethod(pickle.dumps), staticmethod(_load)


@contextmanager
def plain_failures(folder: str | Path) -> Iterator[None]:
    """Inside, what DCP's `save` or `load` raises is an Exception: its own is none, and passes every `except Exception`.

    Args:
        folder: What is written or read, for the message.
    """
    try:
        yield
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        one = next((cause for cause in causes.values() if isinstance(cause, OSError)), None)
        if one is not None:
            raise one from None
        said = "; ".join(f"rank {rank}: {(str(x) or type(x).__name__).splitlines()[0]}" for rank, x in causes.items())
        raise CheckpointError(f"{folder}: {said}") from None


@contextmanager
def plain_reading() -> Iterator[None]:
    """Inside, torch's own readers of a DCP folder, whoever calls them, run no code of its files.

    Torch unpickles `.metadata` and every value that is no tensor; it has no option against that.
    """
    files: Any = filesystem
    planner: Any = DefaultLoadPlanner
    own = planner.load_bytes

    def load_bytes(self: Any, read_item: Any, value: Any) -> None:
        torch.load(value, map_location="cpu", weights_only=True)
        value.seek(0)
        own(self, read_item, value)

    files.pickle, planner.load_bytes = _Pickle, load_bytes
    try:
        yield
    finally:
        files.pickle, planner.load_bytes = pickle, own
