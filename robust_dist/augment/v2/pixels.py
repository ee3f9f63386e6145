"""PIL images, tensors, `tv_tensors.Image` and `Video` as uint8 or floating batches, and back."""

from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

_MODES = ("L", "RGB")


@dataclass(frozen=True)
class Pixels:
    """The pixels of one image, of a batch of them, or of videos.

    Attributes:
        images: uint8 or floating [B T, C, H, W], frames of one video after each other.
        lead: The dimensions before those of one image or video: () for a single one, else they hold B samples.
        frames: T, the frames of a video; 1 for an image.
    """

    images: Tensor
    lead: tuple[int, ...]
    frames: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[-2], self.images.shape[-1]

    @property
    def batch(self) -> int:
        """B, the number of images or videos."""
        return self.images.shape[0] // max(self.frames, 1)


def is_pixels(value: Any) -> bool:
    """Whether torchvision takes a value for an image or a video."""
    return isinstance(value, (tv_tensors.Image, tv_tensors.Video, PIL.Image.Image)) or (
        isinstance(value, Tensor) and not isinstance(value, tv_tensors.TVTensor)
    )


def read(value: Any) -> Pixels:
    """The pixels of an image or video.

    Raises:
        ValueError: For PIL images in other modes than L and RGB, and for tensors of too few dimensions.
    """
    if isinstance(value, PIL.Image.Image):
        if value.mode not in _MODES:
            raise ValueError(
                f"PIL images must have one of the modes {', '.join(_MODES)}, got {value.mode}: convert them"
            )
        return Pixels(F.pil_to_tensor(value).unsqueeze(0), (), 1)
    tensor, dims = value.as_subclass(Tensor), 4 if isinstance(value, tv_tensors.Video) else 3
    if tensor.dim() < dims:
        raise ValueError(f"{type(value).__name__} must have at least {dims} dimensions, got {list(tensor.shape)}")
    frames = tensor.shape[-4] if dims == 4 else 1
    return Pixels(tensor.reshape(-1, *tensor.shape[-3:]), tuple(tensor.shape[:-dims]), frames)


def write(images: Tensor, value: Any) -> Any:
    """New pixels in the class, shape and dtype of the image or video that was read."""
    if isinstance(value, PIL.Image.Image):
        return F.to_pil_image(images.squeeze(0))
    out = images.reshape(value.shape)
    return tv_tensors.wrap(out, like=value) if isinstance(value, tv_tensors.TVTensor) else out


def device_of(value: Any) -> torch.device:
    """The device of an image; PIL images are on the CPU."""
    return value.device if isinstance(value, Tensor) else torch.device("cpu")
