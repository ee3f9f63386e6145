"""Image sets from the Hugging Face Hub and in its formats on disk, through `datasets`; a set's code is never run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robust_dist.data.classes import check_count
from robust_dist.data.columns import (
    class_labels,
    find_columns,
    image_bytes,
    is_class_label,
    is_image_feature,
    path_of,
    plain_labels,
)
from robust_dist.data.errors import DataError
from robust_dist.data.identity import Stretch, fingerprint
from robust_dist.data.parquet import check_whole, is_remote, open_parquet
from robust_dist.data.source import ImageSource, Upright, check_index, turns_upright
from robust_dist.extras import require

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]
CONVERTED = "refs/convert/parquet"
SPOOL = "robust_dist-row-groups"


class TableSource:
    """Samples of a `datasets.Dataset` with a memory-mapped Arrow file; see `open_hub` and `ImageSource`.

    Attributes:
        revision: the commit of a Hub set; None for others.
    """

    def __init__(
        self,
        images: Any,
        labels: np.ndarray,
        classes: tuple[str, ...],
        name: str,
        *,
        beside: Sequence[str] = (),
        upright: bool = True,
        rows: Sequence[Stretch] = (),
        revision: str | None = None,
    ) -> None:
        self.name = name
        self.revision = revision
        self._rows = tuple(rows)
        self.classes = classes
        self.group_sizes: tuple[int, ...] = (len(labels),)
        self._images = images
        self._labels = labels
        self._beside = tuple(beside)
        self._kind = Upright if upright else bytes

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[bytes, int]:
        """See `ImageSource.read`."""
        check_index(index, self)
        (value,) = self._images[index].values()
        return self._kind(image_bytes(value, self._beside)), int(self._labels[index])

    def where(self, index: int) -> str:
        """The set and the row; and the file, if the row only names one."""
        (value,) = self._images[index].values()
        path = path_of(value)
        return f"{self.name}, row {index}" + (f" ({path})" if path else "")

    def fingerprint(self) -> str:
        """A hash of the labels and of every image's size in bytes."""
        return fingerprint(self._labels, _sizes(self._images))

    def stretches(self) -> list[Stretch]:
        """The rows of the splits, see `shared_images`."""
        return list(self._rows)


def open_hub(
    path: str,
    split: str,
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    streaming: bool = False,
    revision: str | None = None,
    data_files: DataFiles | None = None,
    cache_dir: str | None = None,
    download: bool = True,
    classes: tuple[str, ...] | None = None,
    spool_dir: str | Path | None = None,
    exif: str = "auto",
) -> ImageSource:
    """One split of an image set that `datasets` can load, from the Hub or from files on disk.

    Images stay encoded. Without streaming, `datasets` first puts a set into its cache (for local parquet files a second
    copy, as one Arrow file), but uses a `save_to_disk` folder in place. With streaming, only the footers of parquet
    files are read, and each row group when its samples are needed: once per node, into a temporary file.

    Args:
        path: a set's name on the Hub, a folder of parquet or other files that `datasets` knows, a `save_to_disk`
            folder, or with `data_files` a format: "parquet", "imagefolder".
        split: "train", "validation", ...; without streaming also a slice such as "train[:10%]". A `save_to_disk` folder
            with one unnamed split accepts any name.
        config_name: the set's configuration ("subset"), if it has several.
        image_column: the image column; by default the only one with an image type.
        label_column: the label column (a ClassLabel, whole numbers from 0, or strings); by default the only ClassLabel.
        num_classes: number of classes, if labels are numbers and not all of them occur.
        streaming: read parquet row groups on demand from their location.
        revision: a branch, tag or commit of the set on the Hub.
        data_files: see `datasets.load_dataset`.
        cache_dir: see `datasets.load_dataset`.
        download: if False, a set that is not in the cache of `datasets` is an error, unless its files are local; the
            Hub is still asked for the version of `revision` (not with HF_HUB_OFFLINE=1 in the environment, when the
            latest in the cache is used). Streaming always fetches what it needs.
        classes: of the training split, which this one must match.
        spool_dir: for streaming, a folder on this node's own disk, in which a subfolder is created, see `Spool`.
        exif: "auto" and "on" turn images upright by their EXIF orientation, as `datasets` does; "off" leaves them.

    Raises:
        DataError: the set, configuration or split does not exist, streaming is asked of files other than parquet, or
            columns or labels do not fit; says what there is.
        ImportError: `datasets` is not installed.
    """
    name = f"{path} ({', '.join(part for part in (config_name, split) if part)})"
    path = os.path.expanduser(path)
    upright = turns_upright(exif, auto=True)
    words = {"name": config_name, "data_files": data_files, "revision": revision, "cache_dir": cache_dir}
    with _as_data_errors(name, path):
        if streaming:
            urls, features, revision = _parquet_files(path, split, words)
            source = open_parquet(
                urls,
                name=name,
                image_column=image_column,
                label_column=label_column,
                num_classes=num_classes,
                classes=classes,
                features=features,
                # Only our own folder: the oldest tables in it are removed, other files of the user's must not be.
                spool_dir=None if spool_dir is None else Path(spool_dir, SPOOL),
                upright=upright,
            )
            source.revision = revision
            return source
        found = _saved(path, split) if _is_saved(path) else _loaded(path, split, words, download)
        columns = find_columns(found.table.features, image_column, label_column, name)
        images, labels, classes = _from_table(found.table, columns, classes, name, num_classes)
        return TableSource(
            images,
            labels,
            classes,
            name,
            beside=found.beside,
            upright=upright,
            rows=found.rows,
            revision=found.revision,
        )


class _Found(NamedTuple):
    """A split's table, the rows of which splits it is, the folders of its local files, a Hub set's commit."""

    table: Any
    rows: list[Stretch]
    beside: list[str]
    revision: str | None = None


def _from_table(
    table: Any, columns: tuple[str, str], classes: tuple[str, ...] | None, name: str, num_classes: int | None
) -> tuple[Any, np.ndarray, tuple[str, ...]]:
    """The table's images alone, as stored, the labels int32 [N], and the classes."""
    if not len(table):
        raise DataError(f"{name} has no rows")
    image, label = columns
    column = table.select_columns([label]).with_format("arrow")[:].column(0)
    if is_class_label(table.features[label]):
        label_of, classes = class_labels(table.features[label], classes, name)
        check_count(classes, num_classes, name)
        labels = label_of[plain_labels(column, tuple(table.features[label].names), name)[0]]
    else:
        labels, classes = plain_labels(column, classes, name, num_classes)
    images = table.select_columns([image])
    if is_image_feature(table.features[image]):
        images = images.cast_column(image, _datasets().Image(decode=False))
    return images.with_format(None), labels, classes


def _loaded(path: str, split: str, words: dict[str, Any], download: bool) -> _Found:
    """A split from the cache of `datasets`, which downloads it first if allowed."""
    builder = _datasets().load_dataset_builder(path, **words)
    of_splits = {
        str(key): [str(file) for file in of_split] for key, of_split in (builder.config.data_files or {}).items()
    }
    files = [file for of_split in of_splits.values() for file in of_split]
    local = builder.repo_id is None and not any(is_remote(file) for file in files)
    if not (download or local or Path(builder.cache_dir, "dataset_info.json").is_file()):
        raise DataError(f"{path} is not in the cache of `datasets` ({builder.cache_dir}): set download=True")
    builder.download_and_prepare()
    table = builder.as_dataset(split=split)
    counts = {str(key): one.num_examples for key, one in builder.info.splits.items()}
    rows = [
        Stretch((builder.cache_dir, name), start, stop, f"{path} ({name})")
        for name, start, stop in _slices(split, counts)
    ]
    own = [file for name in _names(split) for file in of_splits.get(name, []) if not is_remote(file)]
    beside = dict.fromkeys(os.path.dirname(file.removeprefix("file://")) for file in own)
    return _Found(table, rows, list(beside), None if builder.repo_id is None else builder.hash)


def _parquet_files(path: str, split: str, words: dict[str, Any]) -> tuple[list[str], Any, str | None]:
    """Addresses of a split's parquet files, the features in the set's description, the Hub's commit."""
    if _is_saved(path):
        raise DataError(f"{path} is a save_to_disk folder, which needs no streaming: set streaming=False")
    builder = _datasets().load_dataset_builder(path, **words)
    files = dict(builder.config.data_files or {})
    if split not in files:
        raise DataError(f"there is no split {split!r} to stream; there are: {', '.join(map(str, files)) or 'none'}")
    urls = [str(file) for file in files[split]]
    other = next((url for url in urls if not url.split("?")[0].endswith((".parquet", ".parq", ".pq"))), None)
    if other:
        raise DataError(
            f"only parquet files can be streamed, not {other}: set streaming=False, or for a Hub set "
            f"revision={CONVERTED!r}, where the Hub keeps a copy in parquet"
        )
    return urls, builder.info.features, None if builder.repo_id is None else builder.hash


def _is_saved(path: str) -> bool:
    return any(Path(path, name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(path: str, split: str) -> _Found:
    """A split of a `save_to_disk` folder, or slices of splits; a folder with one unnamed split accepts any name."""
    loaded = _datasets().load_from_disk(path)
    unnamed = not isinstance(loaded, dict) and loaded.split is None
    if isinstance(loaded, dict):
        tables = {str(key): table for key, table in loaded.items()}
    else:
        tables = dict.fromkeys(_names(split) if unnamed else [str(loaded.split)], loaded)
    unknown = [name for name in _names(split) if name not in tables]
    if unknown:
        raise DataError(f"there is no split {unknown[0]!r} in {path}; there are: {', '.join(tables)}")
    slices = _slices(split, {name: len(table) for name, table in tables.items()})
    place = os.path.realpath(path)
    rows = [
        Stretch((place, "" if unnamed else name), start, stop, path if unnamed else f"{path} ({name})")
        for name, start, stop in slices
    ]
    parts = [tables[name].select(range(start, stop)) for name, start, stop in slices]
    table = parts[0] if len(parts) == 1 else _datasets().concatenate_datasets(parts)
    return _Found(table, rows, [path])


def _slices(split: str, counts: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The rows selected by "train[:80%]+test": split, first row, one past the last."""
    if split in counts:
        return [(split, 0, counts[split])]
    found = _datasets().ReadInstruction.from_spec(split).to_absolute(counts)
    return [(str(one.splitname), one.from_, max(one.from_, one.to)) for one in found]


def _names(split: str) -> list[str]:
    """The splits' names in "train[:80%]+test"."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def _sizes(images: Any) -> np.ndarray:
    """Each image's size in bytes, int64 [N]; -1 if the column does not hold the image. Pixels are not read."""
    compute, types = (require(f"pyarrow.{one}", extra="data", purpose="tables") for one in ("compute", "types"))
    column = images.with_format("arrow")[:].column(0)
    if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = compute.struct_field(column, "bytes")
    if not (types.is_binary(column.type) or types.is_large_binary(column.type)):
        return np.zeros(0, dtype=np.int64)
    return compute.fill_null(compute.binary_length(column), -1).to_numpy().astype(np.int64)


@contextmanager
def _as_data_errors(name: str, path: str) -> Iterator[None]:
    errors = require("datasets.exceptions", extra="data", purpose="sets of the Hub or its formats")
    try:
        yield
    except DataError:
        raise
    except (errors.DatasetsError, OSError, ValueError, RuntimeError) as error:
        # The error of `datasets` for a torn file does not name it.
        check_whole(path, name)
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"{name}: {error}{cause}") from error


def _datasets() -> Any:
    return require("datasets", extra="data", purpose="sets of the Hub or its formats")
