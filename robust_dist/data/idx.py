"""Files in the IDX format of MNIST (big-endian header, then uint8 values), plain or gzipped."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from robust_dist.data.errors import DataError

UINT8_CODE = 0x08


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read a uint8 IDX file of `ndim` dimensions.

    Nothing but the content counts: the magic number and the number of values are checked, no checksum is, since a
    recompressed .gz has another one.

    Raises:
        DataError: no uint8 IDX file of so many dimensions, or fewer or more values than its header says.
    """
    content = _content(path)
    shape = _shape(path, content, ndim)
    header = 4 + 4 * ndim
    found, wanted = len(content) - header, math.prod(shape)
    if found != wanted:
        raise DataError(f"{path} is torn: its header says {wanted:,} values, it holds {found:,}. {_mend(path)}")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}). {_mend(path)}") from error


def _shape(path: Path, content: bytes, ndim: int) -> tuple[int, ...]:
    header = 4 + 4 * ndim
    magic = content[:4]
    if len(content) < header or magic != bytes((0, 0, UINT8_CODE, ndim)):
        raise DataError(
            f"{path} is no IDX file of {ndim}-dimensional uint8 data: it begins with {magic.hex() or 'nothing'}, "
            f"not 0000{UINT8_CODE:02x}{ndim:02x}. {_mend(path)}"
        )
    return struct.unpack(f">{ndim}I", content[4:header])


def _mend(path: Path) -> str:
    return f"Delete {path.name} in {path.parent} and start again (or reinstall the package that it came with)."
