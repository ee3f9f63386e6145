"""Labelled image sets, and how an epoch is divided among ranks."""

from robust_dist.data.batches import Batch
from robust_dist.data.errors import DataError
from robust_dist.data.image_set import HostSet, ImageSet
from robust_dist.data.loader import DeviceLoader, evaluation_batches
from robust_dist.data.registry import DATASETS, DatasetInfo, dataset_info, load_dataset

__all__ = [
    "Batch",
    "DATASETS",
    "DataError",
    "DatasetInfo",
    "DeviceLoader",
    "HostSet",
    "ImageSet",
    "dataset_info",
    "evaluation_batches",
    "load_dataset",
]
