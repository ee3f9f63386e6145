"""The recipe's data keys: sets that lie on the device, and sets whose images are read while training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from robust_dist.data.registry import CHECKED
from robust_dist.train.keys import COSTLY, FREE, default_of, only_for
from robust_dist.train.settings import require, require_number

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Sets of image files; other names are sets that are whole in memory.
FORMATS = ("imagefolder", "hub", "webdataset")


@dataclass
class DataConfig:
    """The training and evaluation images, and their way to the ranks.

    The keys from `train` on are for imagefolder, hub and webdataset. Workers read their images while training; images
    of one size may be decoded once and lie whole in memory, as sets by name do (see `crop_scale` and `keep_on`).

    Attributes:
        name: A data set that lies on the device, by name: digits, cifar10, cifar100 or fashion_mnist; or a format:
            imagefolder, hub (the Hub's sets, parquet and what else `datasets` reads) or webdataset.
        root: The folder of the data files; files that are there already are used. Of imagefolder, the folder that
            holds those of `train` and `eval`; of webdataset, the folder that shards' paths are relative to. Not used by
            hub.
        download: Fetch missing files (one process a host does it, the others wait).
        own_files: cifar10, cifar100: take files that differ from the published ones as they are; otherwise they are
            refused. They are pickles, which can run any code.
        block: Samples in a block; ranks get whole blocks, and CutMix in mode "elem" pairs inside one.
        drop_last: Leave out the last global batch of an epoch where it is short.
        keep_on: Where a set lies that is whole in memory: device; host, from which batches are copied a step ahead;
            auto takes the device where the set needs at most half of its free memory, else the host. Of imagefolder,
            hub and webdataset, device and host keep the set whole in memory; with auto, crop_scale null does.
        eval_batch_size: Images that one rank evaluates at a time.
        train: The training images: a folder below root (imagefolder; default train), a split (hub; default train) or
            shards, with braces or wildcards (webdataset).
        eval: The evaluation images, likewise (defaults: val for imagefolder, validation for hub).
        path: hub: a set's name on the Hub, a folder, or with data_files a format such as parquet.
        config: hub: the set's configuration ("subset"), where it has several.
        revision: hub: a branch, tag or commit; name one, so that the set cannot change under a run.
        data_files: hub: split to files, as `datasets.load_dataset` takes them.
        image_column: hub: the column of images; found by its type where null.
        label_column: hub: the column of labels; found by its type where null.
        streaming: hub: read parquet row groups when they are needed, and copy nothing before.
        spool_dir: hub, with streaming: the folder on each host's own disk where row groups are kept once for all its
            ranks; null takes the system's temporary one.
        image_keys: webdataset: endings of the member that is the image, of which the first that a sample has counts;
            the usual ones where null.
        label_key: webdataset: ending of the member that holds the label, or json.KEY.
        num_classes: hub, webdataset: how many classes there are, where labels are numbers and not all of them occur.
        allow_torn: webdataset: train without what lies behind a shard's tear; else a torn shard is an error.
        index_dir: webdataset: the folder for the shards' index, where their own cannot be written.
        size: Height and width of training images, after a random resized crop; in memory, that of the files.
        eval_size: Height and width of evaluation images, after a central crop; size where null.
        eval_resize: Their shorter side before that crop; null takes eval_size * 256 / 224.
        crop_scale: Lowest and highest share of an image's area that the random crop takes. null leaves images as they
            are stored, all of one size: they are decoded once and lie whole in memory (keep_on).
        crop_ratio: Lowest and highest width / height of that crop.
        mean: Of each channel, on the scale 0 to 1; ImageNet's where null.
        std: Likewise.
        workers: Processes a rank that read and decode; 0 does it between the steps.
        prefetch: Batches that each worker reads ahead.
        max_bad_share: The largest share of an epoch's images that may be unreadable; more is an error.
        shuffle_window: Images that are shuffled among each other, at least, where they lie in shards or row groups;
            larger mixes better, smaller reads fewer groups at a time.
        exif: Turn images upright by their EXIF orientation: on, off, or auto, which does so for hub alone, as
            `datasets` does; imagefolder and webdataset leave images as they are stored.
    """

    name: str = field(default="digits", metadata=COSTLY)
    root: str = field(default="data", metadata=FREE)
    download: bool = field(default=True, metadata=FREE)
    own_files: bool = field(default=False, metadata=FREE)
    block: int = 8
    drop_last: bool = False
    keep_on: Literal["auto", "device", "host"] = field(default="auto", metadata=FREE)
    eval_batch_size: int = 500
    train: str | list[str] | None = field(default=None, metadata=only_for(*FORMATS))
    eval: str | list[str] | None = field(default=None, metadata=only_for(*FORMATS))
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
    size: int = field(default=224, metadata=only_for(*FORMATS) | COSTLY)
    eval_size: int | None = field(default=None, metadata=only_for(*FORMATS) | COSTLY)
    eval_resize: int | None = field(default=None, metadata=only_for(*FORMATS))
    crop_scale: tuple[float, float] | None = field(default=(0.08, 1.0), metadata=only_for(*FORMATS))
    crop_ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), metadata=only_for(*FORMATS))
    mean: tuple[float, float, float] | None = field(default=None, metadata=only_for(*FORMATS))
    std: tuple[float, float, float] | None = field(default=None, metadata=only_for(*FORMATS))
    workers: int = field(default=4, metadata=only_for(*FORMATS) | FREE)
    prefetch: int = field(default=2, metadata=only_for(*FORMATS) | FREE)
    max_bad_share: float = field(default=0.01, metadata=only_for(*FORMATS) | FREE)
    shuffle_window: int = field(default=16_384, metadata=only_for(*FORMATS))
    exif: Literal["auto", "on", "off"] | bool = field(default="auto", metadata=only_for(*FORMATS))

    def __post_init__(self) -> None:
        if isinstance(self.exif, bool):
            # YAML reads a plain on or off so.
            self.exif = "on" if self.exif else "off"
        require_number("data.block", self.block, 1)
        require_number("data.eval_batch_size", self.eval_batch_size, 1)
        self._check_keys()
        self._check_sizes()
        require_number("data.workers", self.workers, 0, 4096)
        for key in ("prefetch", "shuffle_window"):
            require_number(f"data.{key}", getattr(self, key), 1)
        share = self.max_bad_share
        require(0 <= share < 1, "data.max_bad_share", share, "in [0, 1)")
        if self.num_classes is not None:
            require_number("data.num_classes", self.num_classes, 1)
        if self.image_keys is not None:
            named = bool(self.image_keys) and all(key.strip(".") for key in self.image_keys)
            require(named, "data.image_keys", self.image_keys, "endings of image members, such as [jpg, png]")

    @property
    def streamed(self) -> bool:
        """Whether workers read the images while training."""
        return self.name in FORMATS and not self.in_memory

    @property
    def in_memory(self) -> bool:
        """Whether files are decoded once, and lie whole in memory as a set by name does."""
        return self.name in FORMATS and (self.keep_on != "auto" or self.crop_scale is None)

    @property
    def own_keys(self) -> dict[str, Any]:
        """Values of the keys that belong to this format and not to all of them, by name."""
        mine = [of for of in fields(self) if self.name in of.metadata.get("only_for", ())]
        return {of.name: getattr(self, of.name) for of in mine if of.metadata["only_for"] != FORMATS}

    @property
    def eval_sides(self) -> tuple[int, int]:
        """Evaluation images' size, and their shorter side before the central crop."""
        size = self.eval_size or self.size
        return size, self.eval_resize or round(size * 256 / 224)

    def _check_keys(self) -> None:
        """Refuse what the set would not look at, and ask for what it cannot do without."""
        defaults = {of.name: default_of(of) for of in fields(self)}
        if self.in_memory:
            self._check_in_memory(defaults)
        for of in fields(self):
            owners, value = of.metadata.get("only_for", ()), getattr(self, of.name)
            if owners and self.name not in owners and value != defaults[of.name]:
                raise ValueError(
                    f"data.{of.name}={value!r} is for data.name={' or '.join(owners)}, and data.name is {self.name!r}: "
                    f"leave data.{of.name} out, or change data.name"
                )
        if self.own_files:
            require(self.name in CHECKED, "data.own_files", True, f"false, unless data.name is {' or '.join(CHECKED)}")
        if self.name == "hub":
            require(self.path is not None, "data.path", self.path, "a set's name on the Hub, or a folder")
        for key in ("train", "eval"):
            self._check_part(key, getattr(self, key))

    def _check_in_memory(self, defaults: dict[str, Any]) -> None:
        """Refuse crops of a set whose images stay as they are stored."""
        why = "data.crop_scale=null" if self.crop_scale is None else f"data.keep_on={self.keep_on}"
        for key in ("crop_scale", "crop_ratio", "eval_resize"):
            value = getattr(self, key)
            wanted = (
                f"left out: {why} keeps images whole in memory, as they are stored; augment.crop crops on the device"
            )
            require(value is None or value == defaults[key], f"data.{key}", value, wanted)
        # One way to say it: data.keep_on may change when a run goes on, what is done to images may not.
        self.crop_scale = None

    def _check_part(self, key: str, value: str | Sequence[str] | None) -> None:
        if self.name == "webdataset":
            require(bool(value), f"data.{key}", value, "paths of shards, such as 'train-{000..146}.tar'")
        elif value is not None:
            wanted = "a folder below data.root" if self.name == "imagefolder" else "the name of a split"
            require(isinstance(value, str) and bool(value), f"data.{key}", value, wanted)

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
