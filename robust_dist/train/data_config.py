"""The section "data" of a recipe: sets by name, and the sources of image files that it can name.

An installed package adds a source by an entry point of the group "robust_dist.sources" whose value is a `SourceChoice`
(robust_dist/data/README.md); recipes and studies can then use its name.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from robust_dist import own_code
from robust_dist.data.registry import CHECKED, DATASETS, SOURCES
from robust_dist.extras import added
from robust_dist.private import hidden
from robust_dist.train.keys import COSTLY, FREE, NAMES_CODE, default_of, only_for, require, require_number, synonyms

if TYPE_CHECKING:
    from robust_dist.data.source import ImageSource

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Metadata of a key used by all sources of image files, but not by sets by name.
FOR_FILES: dict[str, Any] = {"for_files": True}
_DECODE = synonyms(cpu="exact")
Classes = tuple[str, ...] | None


@dataclass
class DataConfig:
    """The training and evaluation images, and how they reach the ranks.

    The keys from `train` on are for image files: imagefolder, hub, webdataset and the sources of installed packages.
    Workers read the images during training; images of one size may be decoded once and kept in memory, like sets by
    name (see `crop_scale` and `keep_on`).

    Attributes:
        name: A data set by name, kept on the device: digits, cifar10, cifar100 or fashion_mnist; or a source of image
            files: imagefolder, hub (the Hub's sets, parquet and whatever else `datasets` reads), webdataset, or one
                added
            by an installed package; or your own, as MODULE:NAME: a Dataset class or function of train (bool), whose
            images are read once and kept in memory, or a SourceChoice.
        root: The folder of the data files; existing files are used. For imagefolder, the folder that contains those of
            `train` and `eval`; for webdataset, the folder that shard paths are relative to. Not used by hub.
        download: Download missing files (one process per host does, the others wait).
        own_files: cifar10, cifar100: accept files that differ from the published ones; by default they are rejected.
            They are pickles, which can run any code.
        block: Samples per block; ranks get whole blocks, and CutMix in mode "elem" pairs samples within one.
        drop_last: Drop an epoch's last global batch if it is short.
        keep_on: Where a set in memory lies: device; host, from which batches are copied one step ahead; auto uses the
            device if the set needs at most half of its free memory, otherwise the host. For image files, device and
            host keep the set in memory; with auto, crop_scale null does.
        eval_batch_size: Images that one rank evaluates at a time.
        train: The training images: a folder below root (imagefolder; default train), a split (hub; default train) or
            shards, with braces or wildcards (webdataset).
        eval: The evaluation images, likewise (default: val for imagefolder, validation for hub).
        eval_share: imagefolder: class folders lie directly below root, and about this fraction of each class's images
            is for evaluation, selected by a hash of the file name. Adding a file moves no image to the other part.
        split_seed: imagefolder, with eval_share: another number selects other images.
        path: hub: a set's name on the Hub, a folder, or with data_files a format such as parquet.
        config: hub: the set's configuration ("subset"), if it has several.
        revision: hub: a branch, tag or commit; set it so that the set cannot change under a run.
        data_files: hub: split to files, as for `datasets.load_dataset`.
        image_column: hub: the image column; null finds it by type.
        label_column: hub: the label column; null finds it by type.
        streaming: hub: read parquet row groups on demand, without copying everything first.
        spool_dir: hub, with streaming: the folder on each host's own disk where row groups are kept once for all its
            ranks; null uses the system's temporary folder.
        image_keys: webdataset: endings of the image member; a sample's first match is used; null uses the usual ones.
        label_key: webdataset: ending of the member that holds the label, or json.KEY.
        num_classes: hub, webdataset: the number of classes, if labels are numbers and not all of them occur.
        allow_torn: webdataset: train without the samples after a shard's tear; by default a torn shard is an error.
        index_dir: webdataset: the folder for the shards' index, if their own is not writable.
        size: Height and width of training images, after a random resized crop; in memory, those of the files.
        eval_size: Height and width of evaluation images, after a central crop; null uses size.
        eval_resize: Their shorter side before that crop; null uses eval_size * 256 / 224.
        crop_scale: Lowest and highest fraction of an image's area that the random crop takes. null leaves images as
            stored, all of one size: they are decoded once and kept in memory (keep_on).
        crop_ratio: Lowest and highest width / height of that crop.
        mean: Per channel, on the scale 0 to 1; null uses ImageNet's.
        std: Per channel, likewise.
        workers: Processes per rank that read and decode; 0 does it between the steps.
        prefetch: Batches that each worker reads ahead.
        decode: The decoder during training: exact, workers with Pillow; fast, workers, JPEGs only as large as their
            crop needs (pixels differ by a few levels); cuda, torchvision on the GPU, JPEGs only (likewise); auto, the
            GPU if possible, otherwise fast, and for a resumed run the decoder recorded in its folder. Crops are the
            same. cpu is a synonym of exact.
        cache: disk keeps decoded images, shrunk to what their crops need, for later epochs and runs; off keeps none.
        cache_dir: The folder for them on each host's own disk, shared by its ranks; it may be deleted; null uses one in
            the system's temporary folder.
        cache_gib: Its maximum size in GiB.
        max_bad_share: The largest fraction of an epoch's images that may be unreadable; more is an error.
        shuffle_window: Minimum number of images shuffled together, if they lie in shards or row groups; larger mixes
            better, smaller reads fewer groups at a time.
        exif: Turn images upright by their EXIF orientation: on, off, or auto, which does so only for hub, like
            `datasets`; imagefolder and webdataset leave images as stored.
        options: Settings of your own data, or of a source added by an installed package.
    """

    name: str = field(default="digits", metadata=COSTLY | NAMES_CODE)
    root: str = field(default="data", metadata=FREE)
    download: bool = field(default=True, metadata=FREE)
    own_files: bool = field(default=False, metadata=FREE)
    block: int = 8
    drop_last: bool = False
    keep_on: Literal["auto", "device", "host"] = field(default="auto", metadata=FREE)
    eval_batch_size: int = 500
    train: str | list[str] | None = field(default=None, metadata=FOR_FILES)
    eval: str | list[str] | None = field(default=None, metadata=FOR_FILES)
    eval_share: float | None = field(default=None, metadata=only_for("imagefolder"))
    split_seed: int = field(default=0, metadata=only_for("imagefolder"))
    path: str | None = field(default=None, metadata=only_for("hub"))
    config: str | None = field(default=None, metadata=only_for("hub"))
    revision: str | None = field(default=None, metadata=only_for("hub"))
    data_files: dict[str, Any] = field(default_factory=dict, metadata=only_for("hub"))
    image_column: str | None = field(default=None, metadata=only_for("hub"))
    label_column: str | None = field(default=None, metadata=only_for("hub"))
    streaming: bool = field(default=False, metadata=only_for("hub"))
    spool_dir: str | None = field(default=None, metadata=only_for("hub") | FREE)
    image_keys: list[str] | None = field(default=None, metadata=only_for("webdataset"))
    label_key: str = field(default="cls", metadata=only_for("webdataset"))
    num_classes: int | None = field(default=None, metadata=only_for("hub", "webdataset"))
    allow_torn: bool = field(default=False, metadata=only_for("webdataset"))
    index_dir: str | None = field(default=None, metadata=only_for("webdataset") | FREE)
    size: int = field(default=224, metadata=FOR_FILES | COSTLY)
    eval_size: int | None = field(default=None, metadata=FOR_FILES | COSTLY)
    eval_resize: int | None = field(default=None, metadata=FOR_FILES)
    crop_scale: tuple[float, float] | None = field(default=(0.08, 1.0), metadata=FOR_FILES)
    crop_ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), metadata=FOR_FILES)
    mean: tuple[float, float, float] | None = field(default=None, metadata=FOR_FILES)
    std: tuple[float, float, float] | None = field(default=None, metadata=FOR_FILES)
    workers: int = field(default=4, metadata=FOR_FILES | FREE)
    prefetch: int = field(default=2, metadata=FOR_FILES | FREE)
    decode: Literal["auto", "exact", "fast", "cuda", "cpu"] = field(default="exact", metadata=FOR_FILES | _DECODE)
    cache: Literal["off", "disk"] | bool = field(default="off", metadata=FOR_FILES)
    cache_dir: str | None = field(default=None, metadata=FOR_FILES | FREE)
    cache_gib: float = field(default=64.0, metadata=FOR_FILES | FREE)
    max_bad_share: float = field(default=0.01, metadata=FOR_FILES | FREE)
    shuffle_window: int = field(default=16_384, metadata=FOR_FILES)
    exif: Literal["auto", "on", "off"] | bool = field(default="auto", metadata=FOR_FILES)
    options: dict[str, Any] = field(default_factory=dict, metadata=FOR_FILES)

    def __post_init__(self) -> None:
        if isinstance(self.exif, bool):
            # YAML reads a plain on or off as a boolean.
            self.exif = "on" if self.exif else "off"
        if isinstance(self.cache, bool):
            self.cache = "disk" if self.cache else "off"
        require(0 < self.cache_gib < math.inf, "data.cache_gib", self.cache_gib, "a finite number above 0")
        if self.cache == "disk":
            decodes = "exact, fast or auto: data.cache=disk keeps what workers decoded"
            require(self.decode != "cuda", "data.decode", self.decode, decodes)
        if self.decode == "cpu":
            self.decode = "exact"
        require_number("data.block", self.block, 1)
        require_number("data.eval_batch_size", self.eval_batch_size, 1)
        if own_code.is_name(self.name):
            own_code.check_form("data.name", self.name)
        else:
            self.check_keys()
        self._check_sizes()
        require_number("data.workers", self.workers, 0, 4096)
        for key in ("prefetch", "shuffle_window"):
            require_number(f"data.{key}", getattr(self, key), 1)
        share = self.max_bad_share
        require(0 <= share < 1, "data.max_bad_share", share, "in [0, 1)")
        if self.num_classes is not None:
            require_number("data.num_classes", self.num_classes, 1)
        self._check_split()
        if self.image_keys is not None:
            named = bool(self.image_keys) and all(key.strip(".") for key in self.image_keys)
            require(named, "data.image_keys", self.image_keys, "endings of image members, such as [jpg, png]")

    @property
    def source(self) -> "SourceChoice | None":
        """The source of image files that the section names; None if it names none."""
        return source_choice(self.name)

    @property
    def title(self) -> str:
        """A readable name of the images: the path of a Hub set, the folder of files, or the set's name."""
        return self.path or (self.name if own_code.is_name(self.name) or self.source is None else self.root)

    @property
    def streamed(self) -> bool:
        """Whether workers read the images during training."""
        return self.source is not None and not self.in_memory

    @property
    def in_memory(self) -> bool:
        """Whether files are decoded once and kept in memory like a set by name."""
        return self.source is not None and (self.keep_on != "auto" or self.crop_scale is None)

    @property
    def own_keys(self) -> dict[str, Any]:
        """Values of the keys that belong to this source only, by name."""
        return {of.name: getattr(self, of.name) for of in fields(self) if self.name in of.metadata.get("only_for", ())}

    def part(self, part: str) -> Any:
        """`train` or `eval`, or the source's default if it is null."""
        return getattr(self, part) or getattr(self.source, part)

    @property
    def eval_sides(self) -> tuple[int, int]:
        """Evaluation images' size, and their shorter side before the central crop."""
        size = self.eval_size or self.size
        return size, self.eval_resize or round(size * 256 / 224)

    def check_keys(self) -> None:
        """Reject keys that the set does not use, and require those it needs."""
        defaults = {of.name: default_of(of) for of in fields(self)}
        if self.in_memory:
            self._check_in_memory(defaults)
        for of in fields(self):
            owners, value = of.metadata.get("only_for", ()), getattr(self, of.name)
            if of.name == "options" and own_code.is_name(self.name):
                continue
            if of.metadata.get("for_files") and self.source is None:
                owners = (*_OWN, *sorted(entry_points(group=SOURCES).names))
            if owners and self.name not in owners and value != defaults[of.name]:
                raise ValueError(
                    f"data.{of.name}={hidden(value)!r} is for data.name={' or '.join(owners)}, but data.name is "
                    f"{self.name!r}: leave data.{of.name} out, or change data.name"
                )
        if self.own_files:
            require(self.name in CHECKED, "data.own_files", True, f"false, unless data.name is {' or '.join(CHECKED)}")
        if self.name == "hub":
            require(self.path is not None, "data.path", self.path, "a set's name on the Hub, or a folder")
        if self.source is not None:
            self._check_source(self.source)

    def _check_split(self) -> None:
        """Reject a share that leaves nothing, and parts with a folder each."""
        require_number("data.split_seed", self.split_seed, 0, 2**63 - 1)
        if self.eval_share is None:
            require(self.split_seed == 0, "data.split_seed", self.split_seed, "left out without data.eval_share")
            return
        require(0 < self.eval_share < 1, "data.eval_share", self.eval_share, "above 0 and below 1, or null")
        for part in ("train", "eval"):
            wanted = "left out: with data.eval_share both parts come from data.root"
            require(getattr(self, part) is None, f"data.{part}", getattr(self, part), wanted)

    def _check_in_memory(self, defaults: dict[str, Any]) -> None:
        """Reject crops for a set whose images are kept as stored."""
        why = "data.crop_scale=null" if self.crop_scale is None else f"data.keep_on={self.keep_on}"
        for key in ("crop_scale", "crop_ratio", "eval_resize"):
            value = getattr(self, key)
            wanted = f"left out: {why} keeps images in memory as stored; augment.crop crops on the device"
            require(value is None or value == defaults[key], f"data.{key}", value, wanted)
        require(self.cache == "off", "data.cache", self.cache, f"off: with {why} each image is decoded once")
        require(self.decode == "exact", "data.decode", self.decode, f"exact: with {why} each image is decoded once")
        # One spelling: data.keep_on may change when a run resumes, the preparation of images may not.
        self.crop_scale = None

    def _check_source(self, source: "SourceChoice") -> None:
        for part in ("train", "eval"):
            value, is_there = getattr(self, part), bool(self.part(part))
            fits = (
                is_there if source.takes_lists else is_there and (value is None or (isinstance(value, str) and value))
            )
            require(bool(fits), f"data.{part}", value, source.wanted)
        try:
            inspect.signature(source.open).bind(self, "train", None, False, **self.options)
        except TypeError as error:
            given = hidden(self.options)
            raise ValueError(f"data.options={given} do not suit data.name={self.name!r}: {error}") from error

    def _check_sizes(self) -> None:
        for key in ("size", "eval_size", "eval_resize"):
            if getattr(self, key) is not None:
                require_number(f"data.{key}", getattr(self, key), 1, 65_536)
        size, resize = self.eval_sides
        require(resize >= size, "data.eval_resize", resize, f"at least the evaluation images' size, {size}")
        low, high = self.crop_scale or (1.0, 1.0)
        require(0 < low <= high <= 1, "data.crop_scale", self.crop_scale, "two shares in (0, 1], the lower one first")
        low, high = self.crop_ratio
        fits = 0 < low <= high < math.inf
        require(fits, "data.crop_ratio", self.crop_ratio, "two finite numbers above 0, the lower one first")
        for number in self.mean or ():
            require(0 <= number <= 1, "data.mean", self.mean, "three numbers in [0, 1]")
        for number in self.std or ():
            require(0 < number < math.inf, "data.std", self.std, "three finite numbers above 0")


@dataclass(frozen=True, kw_only=True)
class SourceChoice:
    """A source of image files that a recipe can name.

    Attributes:
        open: Called with the section, "train" or "eval", the training part's classes (None for the training part
            itself), whether missing files may be downloaded, and `data.options` as keywords; returns an `ImageSource`.
        train: Default of `data.train`; None if it must be given.
        eval: Default of `data.eval`, likewise.
        wanted: What `data.train` and `data.eval` must be, for error messages.
        takes_lists: Whether they may be lists.
    """

    open: "Callable[..., ImageSource]"
    train: str | None = "train"
    eval: str | None = "val"
    wanted: str = "the name of a part of the set"
    takes_lists: bool = False


@cache
def source_choice(name: str) -> SourceChoice | None:
    """The source with this name: ours, an entry point's, or the user's own; None if there is none."""
    if own_code.is_name(name):
        found = own_code.load("data.name", name)
        return found if isinstance(found, SourceChoice) else None
    return _OWN.get(name) or (None if name in DATASETS else added(SOURCES, name, SourceChoice))


def _folder(data: DataConfig, part: str, classes: Classes, download: bool) -> "ImageSource":
    from robust_dist.data.errors import DataError
    from robust_dist.data.folder import Split, open_image_folder

    root, upright = Path(data.root).expanduser(), str(data.exif)
    if data.eval_share is None:
        try:
            return open_image_folder(root / data.part(part), classes=classes, exif=upright)
        except DataError as error:
            hint = _flat_hint(root, root / data.part(part))
            raise DataError(f"{error}{hint}") from None
    split = Split(data.eval_share, data.split_seed)
    return open_image_folder(root, classes=classes, exif=upright).part(split, evaluation=part == "eval")


def _flat_hint(root: Path, missing: Path) -> str:
    """What to do if a part has no folder, and class folders lie in its place."""
    from robust_dist.data.folder import EXTENSIONS

    images = (path for path in root.glob("*/*") if path.suffix.lower() in EXTENSIONS)
    if missing.exists() or next(images, None) is None:
        return ""
    return (
        f". The sub-folders of {root} have images directly: data.eval_share=0.2 holds out part of them for evaluation"
    )


def _hub(data: DataConfig, part: str, classes: Classes, download: bool) -> "ImageSource":
    from robust_dist.data.hub import open_hub

    own = data.own_keys
    own |= {
        "data_files": data.data_files or None,
        "spool_dir": None if data.spool_dir is None else Path(data.spool_dir).expanduser(),
        "config_name": own.pop("config"),
    }
    return open_hub(own.pop("path"), data.part(part), **own, download=download, classes=classes, exif=str(data.exif))


def _shards(data: DataConfig, part: str, classes: Classes, download: bool) -> "ImageSource":
    from robust_dist.data.shards import IMAGE_KEYS, open_webdataset

    return open_webdataset(
        data.part(part),
        root=data.root,
        classes=classes,
        exif=str(data.exif),
        **data.own_keys | {"image_keys": data.image_keys or IMAGE_KEYS},
    )


_OWN = {
    "imagefolder": SourceChoice(open=_folder, wanted="a folder below data.root"),
    "hub": SourceChoice(open=_hub, eval="validation", wanted="the name of a split"),
    "webdataset": SourceChoice(
        open=_shards,
        train=None,
        eval=None,
        wanted="paths of shards, such as 'train-{000..146}.tar'",
        takes_lists=True,
    ),
}
