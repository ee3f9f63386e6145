"""Parquet files, local or remote: a row group is fetched when one of its samples is read, not before."""

import hashlib
import os
import pickle
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robust_dist.data.classes import NAMED, check_count
from robust_dist.data.columns import (
    BINARY,
    TEXT,
    WHOLE,
    class_labels,
    find_columns,
    image_bytes,
    is_class_label,
    plain_labels,
)
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.data.identity import Stretch, fingerprint, stretches_of_files
from robust_dist.data.source import Upright, check_index
from robust_dist.data.spool import Spool
from robust_dist.extras import require

READERS = 16
MAPPED_GROUPS = 8


class RowGroup(NamedTuple):
    """A row group: its file's path or address, a digest that identifies the file's version, its number, its rows.

    `content` is a digest of the footer alone, which a copy of the file shares.
    """

    url: str
    digest: str
    number: int
    rows: int
    content: str = ""


class ParquetSource:
    """Samples of parquet files, by row groups; see `open_parquet`, and `ImageSource` for its methods.

    A row group is fetched once for all processes of a node, see `Spool`; each keeps a few of them mapped.

    Attributes:
        revision: The commit of a Hub set; None for others.
    """

    revision: str | None = None

    def __init__(
        self,
        groups: Sequence[RowGroup],
        columns: tuple[str, str],
        classes: tuple[str, ...],
        *,
        labels: np.ndarray | None,
        label_of: np.ndarray | None,
        name: str,
        spool: Spool,
        upright: bool = True,
    ) -> None:
        self.name = name
        self.classes = classes
        self.group_sizes = tuple(group.rows for group in groups)
        self._groups = tuple(groups)
        self._starts = [0, *accumulate(self.group_sizes)]
        self._columns = columns
        self._labels = labels
        self._label_of = label_of
        self._spool = spool
        self._kind = Upright if upright else bytes
        self._cache: tuple[int, Callable[[int], Any]] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource.read`; a remote host's error is raised after the retries of `datasets`."""
        group, row = self._place(index)
        table = self._table(group)
        url = self._groups[group].url
        beside = () if is_remote(url) else (os.path.dirname(url.removeprefix("file://")),)
        content = image_bytes(table[self._columns[0]][row].as_py(), beside)
        return self._kind(content), self._label(index, table, row)

    def where(self, index: int) -> str:
        """The file, with the row group and the row in it."""
        group, row = self._place(index)
        return f"{self._groups[group].url}, row group {self._groups[group].number}, row {row}"

    def fingerprint(self) -> str:
        """A hash of the files' names and footers, and of the labels if they were read."""
        groups = [(os.path.basename(group.url), group.content, group.number) for group in self._groups]
        return fingerprint(groups, *([] if self._labels is None else [self._labels]))

    def stretches(self) -> list[Stretch]:
        """The files, see `shared_images`."""
        rows: dict[str, int] = {}
        for group in self._groups:
            rows[group.url] = rows.get(group.url, 0) + group.rows
        return stretches_of_files(rows.items())

    def _place(self, index: int) -> tuple[int, int]:
        check_index(index, self)
        group = bisect_right(self._starts, index) - 1
        return group, index - self._starts[group]

    def _table(self, group: int) -> Any:
        if self._cache is None or self._cache[0] != os.getpid():
            # A forked process must share neither an open file nor a connection with its parent.
            self._cache = os.getpid(), lru_cache(MAPPED_GROUPS)(self._load)
        return self._cache[1](group)

    def _load(self, number: int) -> Any:
        group = self._groups[number]
        stated = "\n".join([group.url, group.digest, str(group.number), *self._columns])
        return self._spool.table(hashlib.sha256(stated.encode()).hexdigest()[:32], lambda: self._fetch(group))

    def _fetch(self, group: RowGroup) -> Any:
        try:
            return read_columns(group.url, list(self._columns), group.number)
        except (_pyarrow().ArrowInvalid, OSError) as error:
            if is_remote(group.url) and isinstance(error, OSError):
                raise
            raise BadImageError(f"row group {group.number} of {group.url} cannot be read: {error}") from error

    def _label(self, index: int, table: Any, row: int) -> int:
        if self._labels is not None:
            return int(self._labels[index])
        assert self._label_of is not None
        number = table[self._columns[1]][row].as_py()
        if number is None or not 0 <= number < len(self._label_of):
            raise BadImageError(f"its label is {number}, outside the {len(self.classes)} classes")
        return int(self._label_of[number])


def open_parquet(
    urls: Sequence[str],
    *,
    name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    classes: tuple[str, ...] | None = None,
    features: Any = None,
    spool_dir: str | Path | None = None,
    upright: bool = True,
) -> ParquetSource:
    """Samples of parquet files in the given order; only the footers are read now.

    ClassLabel labels come with their row group; for a plain column of numbers or strings all labels (not images) are
    read now, since no footer gives the classes.

    Args:
        urls: local paths, file:// or any address that fsspec and `datasets` can open (hf://, https://, s3://).
        name: what error messages call the set.
        image_column: see `find_columns`.
        label_column: see `find_columns`.
        num_classes: see `number_classes`.
        classes: see `number_classes`.
        features: `datasets.Features`, if known from elsewhere.
        spool_dir: the folder of the `Spool`.
        upright: whether images are turned by their EXIF orientation.

    Raises:
        DataError: there are no rows, files are not parquet or have other columns than the first; also see
            `find_columns`, `plain_labels` and `class_labels`.
        OSError: a remote file cannot be reached.
    """
    with ThreadPoolExecutor(READERS) as pool:
        footers = _whole(list(pool.map(_footer, urls)), name)
        groups = [
            RowGroup(u, footer.digest, k, rows, footer.content)
            for u, footer in zip(urls, footers, strict=True)
            for k, rows in footer.groups
            if rows
        ]
        if not groups:
            raise DataError(f"{name} has no rows in its {len(urls)} parquet files")
        features = features or _features(footers[0].schema)
        columns = find_columns(features, image_column, label_column, name)
        _check_schemas(urls, footers, columns, name)
        labels = label_of = None
        if is_class_label(features[columns[1]]):
            label_of, classes = class_labels(features[columns[1]], classes, name)
            check_count(classes, num_classes, name)
        else:
            parts = list(pool.map(lambda group: read_columns(group.url, [columns[1]], group.number)[0], groups))
            labels, classes = plain_labels(_joined(parts), classes, name, num_classes)
    spool = Spool(spool_dir)
    return ParquetSource(
        groups, columns, classes, labels=labels, label_of=label_of, name=name, spool=spool, upright=upright
    )


def read_columns(url: str, columns: list[str], group: int) -> Any:
    """Some columns of one row group, as a `pyarrow.Table`; its file is opened only for this."""
    with _opened(url) as source:
        # One thread: this worker is already one of many.
        return _parquet(source).read_row_group(group, columns=columns, use_threads=False)


def is_remote(url: str) -> bool:
    """Whether reading `url` uses a network that can fail temporarily."""
    return "://" in url and not url.startswith("file://")


class _Footer(NamedTuple):
    content: str
    digest: str
    groups: list[tuple[int, int]]
    schema: Any


def _footer(url: str) -> _Footer | DataError:
    try:
        with _opened(url) as source:
            file = _parquet(source)
            metadata = file.metadata
            content = hashlib.sha256(pickle.dumps(metadata)).hexdigest()
            digest = hashlib.sha256((content + _identity(url, source)).encode()).hexdigest()
            groups = [(k, metadata.row_group(k).num_rows) for k in range(metadata.num_row_groups)]
            return _Footer(content, digest, groups, file.schema_arrow)
    except (_pyarrow().ArrowException, OSError, ValueError) as error:
        # An unreachable remote host says nothing about the file.
        if is_remote(url) and isinstance(error, OSError):
            raise
        return DataError(f"{url} is not a parquet file, or is truncated: {' '.join(str(error).split())}")


def _whole(footers: Sequence[_Footer | DataError], name: str) -> list[_Footer]:
    torn = [str(one) for one in footers if isinstance(one, DataError)]
    if torn:
        raise DataError(_listed(torn, name))
    return [one for one in footers if isinstance(one, _Footer)]


def check_whole(path: str | Path, name: str) -> None:
    """Check the footers of a local parquet file, or of a folder's.

    Raises:
        DataError: Names the files that are not parquet or are truncated.
    """
    root = Path(path)
    files = (
        sorted(root.rglob("*.parquet")) if root.is_dir() else [root] * (root.suffix == ".parquet" and root.is_file())
    )
    _whole([_footer(str(file)) for file in files], name)


def _listed(faults: Sequence[str], name: str) -> str:
    """What is wrong with the first few files, and the number of others."""
    more = f"; and {len(faults) - NAMED:,} more files" if len(faults) > NAMED else ""
    return f"{name}: " + "; ".join(faults[:NAMED]) + more


def _opened(url: str) -> Any:
    if not is_remote(url):
        return open(url.removeprefix("file://"), "rb")
    _leave_the_parents_loop()
    # With the retries and, for the Hub, the credentials of `datasets`' own streaming.
    return require("datasets.utils.file_utils", extra="data", purpose="remote parquet files").xopen(url, "rb")


def _leave_the_parents_loop() -> None:
    """Let fsspec start a thread in a forked process: 2025.3.0 waits for the parent's, which is not there."""
    asyn = sys.modules.get("fsspec.asyn")
    if asyn is not None and asyn.iothread[0] is not None and not asyn.iothread[0].is_alive():
        asyn.loop[0] = asyn.iothread[0] = None


def _parquet(source: Any) -> Any:
    parquet = require("pyarrow.parquet", extra="data", purpose="parquet files")
    return parquet.ParquetFile(source, pre_buffer=True)


def _identity(url: str, source: Any) -> str:
    """What distinguishes a file from a later one of its name: size and time, or the remote system's identifier."""
    if is_remote(url):
        return repr(getattr(source, "details", None))
    stat = os.fstat(source.fileno())
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _features(schema: Any) -> Any:
    return require("datasets", extra="data", purpose="parquet files").Features.from_arrow_schema(schema)


def _check_schemas(urls: Sequence[str], footers: Sequence[_Footer], columns: tuple[str, str], name: str) -> None:
    """Compare the files' columns with the first one's; widths of numbers, strings and offsets may differ."""
    first = footers[0].schema
    faults = []
    for url, footer in zip(urls, footers, strict=True):
        for column in columns:
            ours = footer.schema.field(column).type if column in footer.schema.names else None
            if _sort(ours) != _sort(first.field(column).type):
                has = "none of that name" if ours is None else str(ours)
                faults.append(
                    f"{url} has no column {column!r} of the type in {urls[0]}, {first.field(column).type}: it has {has}"
                )
    if faults:
        raise DataError(_listed(faults, name))


def _sort(arrow_type: Any) -> str:
    """A type regardless of width: "whole", "text" or "bytes", or the type itself."""
    if arrow_type is None:
        return ""
    types = _pyarrow().types
    if types.is_dictionary(arrow_type):
        return _sort(arrow_type.value_type)
    if types.is_struct(arrow_type):
        return str(sorted((one.name, _sort(one.type)) for one in arrow_type))
    sorts = {"whole": WHOLE, "text": TEXT, "bytes": BINARY}
    return next((name for name, known in sorts.items() if str(arrow_type) in known), str(arrow_type))


def _joined(parts: Sequence[Any]) -> Any:
    """The label columns of several files as one, with a type that fits all of them."""
    pyarrow = _pyarrow()
    if len({part.type for part in parts}) > 1:
        text = _sort(parts[0].type) == "text"
        try:
            parts = [part.cast(pyarrow.large_string() if text else pyarrow.int64()) for part in parts]
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"labels do not fit into 64 bits: {error}") from error
    return pyarrow.chunked_array([chunk for part in parts for chunk in part.chunks])


def _pyarrow() -> Any:
    return require("pyarrow", extra="data", purpose="parquet files")
