"""Data sets that lie on the device, and how an epoch is cut between ranks."""

from robust_dist.data.batch import Batch
from robust_dist.data.errors import DataError
from robust_dist.data.image_set import ImageSet
from robust_dist.data.loader import DeviceLoader, evaluation_batches
from robust_dist.data.registry import DATASETS, DatasetInfo, dataset_info, load_dataset

__all__ = [
    "Batch",
    "DATASETS",
    "DataError",
    "DatasetInfo",
    "DeviceLoader",
    "ImageSet",
    "dataset_info",
    "evaluation_batches",
    "load_dataset",
]
