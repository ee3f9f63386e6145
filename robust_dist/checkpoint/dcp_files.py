"""Writing a `torch.distributed.checkpoint` (DCP) folder, and reading one without running what it holds."""

import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from robust_dist.checkpoint.store import CheckpointError
from robust_dist.ranks.talk import by_rank, has_group

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
    """The contents of a DCP folder, after every file that it names was found there in full.

    No code of the file is run.

    Raises:
        CheckpointError: There is no `.metadata`, it is torn, names anything but torch's own records, or a file outside
            the folder; or a file is missing or short.
    """
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing: the folder was not written to its end")
    metadata = _unpickled(path)
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size < end:
            raise CheckpointError(f"{file}: missing or short (wanted {end} bytes)")
    return metadata


def _unpickled(path: Path) -> Metadata:
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


class _PlainReader(FileSystemReader):
    """torch's reader, which would unpickle `.metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _unpickled(Path(self.path) / METADATA)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainPlanner(DefaultLoadPlanner):
    """torch's planner, which would unpickle values that are no tensors."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        found = torch.load(value, map_location="cpu", weights_only=True)
        if self.flatten_state_dict:
            value.seek(0)
            super().load_bytes(read_item, value)
        else:
            self.state_dict[read_item.dest_index.fqn] = found


def load_into(folder: Path, state: dict[str, Any], *, alone: bool = False, flatten: bool = True) -> None:
    """Fill a state dict from a DCP folder in place; no code of the files is run.

    Args:
        folder: The folder.
        state: What is wanted: tensors of the right shapes, sharded or not, and values to be replaced.
        alone: This process reads for itself, whatever ranks there are.
        flatten: Whether `state` is nested; False: its keys are those of the file.

    Raises:
        CheckpointError: A value is missing, damaged, or holds more than tensors and plain values.
    """
    # Flattening drops FSDP1's tensors that have no shard on this rank, and DCP then takes the file for an old one.
    planner = _PlainPlanner(flatten_state_dict=flatten, flatten_sharded_tensors=False)
    with torch.no_grad(), plain_failures(folder):
        _call(load, state, alone=alone, storage_reader=_PlainReader(folder), planner=planner)


def save_into(
    folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None, *, alone: bool = False
) -> None:
    """Write a state dict as a DCP folder.

    Args:
        folder: An empty folder, the same on every rank.
        state: Tensors, sharded or not, and plain values.
        group: The ranks that write; None is the default group.
        alone: This process writes everything, whatever ranks there are.

    Raises:
        CheckpointError: A file could not be written; an OSError where the system said why.
    """
    with plain_failures(folder):
        where = {} if group is None else {"process_group": group}
        _call(save, state, alone=alone, storage_writer=FileSystemWriter(folder), **where)


def _call(function: Callable[..., Any], state: dict[str, Any], *, alone: bool, **how: Any) -> None:
    """DCP's `load` or `save`, told where no other rank takes part; torch 2.6 has no keyword for that."""
    if alone or not has_group():
        if "no_dist" in inspect.signature(function).parameters:
            how["no_dist"] = True
        elif alone:
            # There only the deprecated functions leave the other ranks out.
            old: dict[Any, Any] = {load: state_dict_loader.load_state_dict, save: state_dict_saver.save_state_dict}
            function, how["no_dist"] = old[function], True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*_state_dict` is deprecated")
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)|TypedStorage")
        warnings.filterwarnings("ignore", message=".*single process.*")
        function(state, **how)


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
        said = by_rank({rank: (str(one) or type(one).__name__).splitlines()[0] for rank, one in causes.items()})
        raise CheckpointError(f"{folder}: " + "; ".join(said)) from None
