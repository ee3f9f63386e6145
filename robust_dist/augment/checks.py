"""Input checks for all augmentations; they never wait for a device."""

import torch
from torch import Tensor


def readable(tensor: Tensor) -> bool:
    """Whether values can be read without a device synchronisation or a graph break: on the CPU, not compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_images(images: Tensor) -> None:
    """Check that images are uint8 or floating-point NCHW."""
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating-point, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images must be NCHW, got shape {list(images.shape)}")


def check_vector(name: str, tensor: Tensor, images: Tensor, dtype: torch.dtype = torch.int64) -> None:
    """Check that a tensor has one `dtype` value per image, on the images' device."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.dim() != 1 or tensor.shape[0] != images.shape[0]:
        raise ValueError(f"{name} must have shape [{images.shape[0]}] for these images, got {list(tensor.shape)}")
    if tensor.device != images.device:
        raise ValueError(f"{name} are on {tensor.device}, the images on {images.device}: move one to the other")


def _extremes(tensor: Tensor) -> tuple[int, int]:
    lowest, highest = tensor.aminmax()
    return int(lowest), int(highest)


def check_range(name: str, tensor: Tensor, high: int) -> None:
    """Check that a readable integer tensor is within [0, high)."""
    if not readable(tensor) or tensor.numel() == 0:
        return
    lowest, highest = _extremes(tensor)
    if lowest < 0 or highest >= high:
        raise ValueError(f"{name} must lie in [0, {high}), got {lowest} to {highest}")


def check_index(index: Tensor, images: Tensor) -> None:
    """Check that an index is int64 [B] on the images' device and, if readable, within the images."""
    if index.dtype != torch.int64:
        raise TypeError(f"index must be torch.int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index must have one dimension, got shape {list(index.shape)}")
    if index.device != images.device:
        raise ValueError(f"index is on {index.device}, the images on {images.device}: move one to the other")
    check_range("index", index, images.shape[0])


def check_labels(labels: Tensor, images: Tensor, num_classes: int) -> None:
    """Check that labels are one integer per image and, if readable, valid classes."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer class numbers, got {labels.dtype}")
    check_vector("labels", labels, images, labels.dtype)
    if readable(labels):
        validate_labels(labels, num_classes)


def validate_labels(labels: Tensor, num_classes: int) -> None:
    """Check the labels of a whole dataset once; training on a device does not, as that would synchronise.

    Args:
        labels: Integers of any shape, on any device; reading them synchronises.
        num_classes: Number of classes C.

    Raises:
        ValueError: If a label is outside [0, C); names the first one and its position.
    """
    lowest, highest = _extremes(labels) if labels.numel() else (0, 0)
    if lowest < 0 or highest >= num_classes:
        place = ((labels < 0) | (labels >= num_classes)).nonzero()[0].tolist()
        raise ValueError(
            f"labels must lie in [0, num_classes) = [0, {num_classes}), got {int(labels[tuple(place)])} at position "
            f"{place[0] if len(place) == 1 else place}"
        )
