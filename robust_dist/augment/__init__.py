"""TrivialAugment, CutMix, crop and flip on batches, with keyed draws for every sample."""

from robust_dist.augment.checks import validate_labels
from robust_dist.augment.crop_flip import CropPlan, FlipPlan, RandomCrop, RandomHorizontalFlip
from robust_dist.augment.cutmix import CutMix, CutMixPlan, soft_targets
from robust_dist.augment.datasets import Augmented, Indexed
from robust_dist.augment.follow import augment_boxes, augment_masks
from robust_dist.augment.keys import Stream, permutation, random_keys, sample_keys
from robust_dist.augment.pipeline import RobustAugment
from robust_dist.augment.trivial import TrivialAugment, TrivialAugmentPlan

__all__ = [
    "Augmented",
    "CropPlan",
    "CutMix",
    "CutMixPlan",
    "FlipPlan",
    "Indexed",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RobustAugment",
    "Stream",
    "TrivialAugment",
    "TrivialAugmentPlan",
    "augment_boxes",
    "augment_masks",
    "permutation",
    "random_keys",
    "sample_keys",
    "soft_targets",
    "validate_labels",
]
