"""Observed properties of an augmentation: a draw per sample, torchvision's pixels, exact targets."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from robust_dist.bench.augment_peers import CLASSES, MEAN, PADDING, STD

_CALLS, _COPIES = 16, 64

Call = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Look:
    """What was found.

    Attributes:
        draws: Of the draws of operation and box, those that samples of a batch have of their own.
        equals: Share of the samples that came out as one of torchvision's outcomes, all of which were made; None where
            there is nothing to compare.
        exact: Share of the samples whose targets are the shares of their pixels; None where there is no mixing.
    """

    draws: frozenset[str] = frozenset()
    equals: float | None = None
    exact: float | None = None

    def __or__(self, other: "Look") -> "Look":
        """Both."""
        equals = self.equals if other.equals is None else other.equals
        exact = self.exact if other.exact is None else other.exact
        return Look(self.draws | other.draws, equals, exact)


def picture(side: int) -> Tensor:
    """uint8 [3, side, side] that every operation changes: a coloured slope with some noise."""
    slope = torch.arange(side).view(-1, 1) * 3 + torch.arange(side) * 2 + torch.tensor([0, 30, 60]).view(3, 1, 1)
    noise = torch.randint(0, 40, (3, side, side), generator=torch.Generator().manual_seed(1))
    return (slope + noise).clamp(0, 250).to(torch.uint8)


def shifted(image: Tensor) -> Tensor:
    """Every crop of the image padded by `PADDING` zeros, and its mirror image, uint8 [N, 3, H, W]."""
    height, width = image.shape[1:]
    padded = pad(image, [PADDING] * 4)
    places = range(2 * PADDING + 1)
    crops = [padded[:, top : top + height, left : left + width] for top in places for left in places]
    return torch.stack([one for crop in crops for one in (crop, crop.flip(2))])


def fingerprints(images: Tensor) -> list[int]:
    """A number of 64 bits for each of uint8 images [B, C, H, W]; different ones of a size have different numbers."""
    flat = images.cpu().flatten(1).long()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=generator)
    found: list[int] = (flat * weights).sum(1).tolist()
    return found


def torchvision_outcomes(pictures: Tensor) -> frozenset[int] | None:
    """Fingerprints of all that TrivialAugmentWide can make of uint8 pictures [N, 3, H, W].

    None where this version of torchvision does not let its operations be called one by one.
    """
    transform = importlib.import_module("torchvision.transforms.v2").TrivialAugmentWide()
    try:
        made = [fingerprints(image) for image in _every_operation(transform, pictures)]
    except AttributeError:
        return None
    return frozenset(number for numbers in made for number in numbers)


def _every_operation(transform: Any, pictures: Tensor) -> Iterator[Tensor]:
    height, width = pictures.shape[-2:]
    for name, (magnitudes_of, signed) in transform._AUGMENTATION_SPACE.items():
        bins = magnitudes_of(transform.num_magnitude_bins, height, width)
        magnitudes = [0.0] if bins is None else [float(magnitude) for magnitude in bins]
        for magnitude in dict.fromkeys(magnitudes + [-m for m in magnitudes if signed]):
            yield transform._apply_image_or_video_transform(
                pictures, name, magnitude, interpolation=transform.interpolation, fill=transform._fill
            )


def _levels(images: Tensor) -> Tensor:
    """Normalised images as the 256 levels that they come from; uint8 images as they are."""
    if images.dtype == torch.uint8:
        return images
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (MEAN, STD))
    return (images.float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)


def look_at_operations(call: Call, image: Tensor, outcomes: frozenset[int] | None) -> Look:
    """Call it on copies of one image.

    Args:
        call: From uint8 images to uint8 or normalised ones.
        image: uint8 [3, H, W], on the device where it works.
        outcomes: Fingerprints of what may come out.
    """
    batch = image.expand(_COPIES, -1, -1, -1).contiguous()
    labels = torch.arange(_COPIES, device=image.device) % CLASSES
    # Cloned, as it may give out the same memory again.
    made = [fingerprints(_levels(call(batch, labels)[0].clone())) for _ in range(_CALLS)]
    draws = frozenset({"operation"} if any(len(set(numbers)) > 1 for numbers in made) else ())
    if outcomes is None:
        return Look(draws)
    hits = [number in outcomes for numbers in made for number in numbers]
    return Look(draws, equals=sum(hits) / len(hits))


def look_at_mixing(call: Call, side: int, device: torch.device, *, normalised: bool = False) -> Look:
    """Call it on images whose pixels are their own number, so that what comes out says where it is from.

    Args:
        call: From uint8 images and labels to images and soft targets.
        side: Of the images, in pixels.
        device: Where it works.
        normalised: Whether images come out normalised.
    """
    labels = torch.arange(CLASSES, device=device)
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous()
    exact, own_boxes = [], False
    for _ in range(_CALLS):
        mixed, targets = call(images, labels)
        source = (_levels(mixed) if normalised else mixed)[:, 0].long().cpu()
        shares = one_hot(source.flatten(1), CLASSES).double().mean(1)
        exact.append((shares - targets.cpu()).abs().amax(1) < 1e-6)
        pasted = [(source[i] != i).numpy().tobytes() for i in range(CLASSES)]
        # Two of them: a sample that is its own partner shows no box.
        own_boxes |= len(set(pasted)) > 2
    draws = frozenset({"box"} if own_boxes else ())
    return Look(draws, exact=float(torch.cat(exact).double().mean()))
