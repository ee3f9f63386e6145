"""CutMix with torchvision's call: a box and a partner for every sample of a batch, its soft label, its mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torchvision import tv_tensors
from torchvision.transforms import v2

from robust_dist.augment import cutmix
from robust_dist.augment.checks import readable, validate_labels
from robust_dist.augment.keys import random_keys
from robust_dist.augment.masks import check_masks, paste, paste_masks, restore
from robust_dist.augment.v2.pixels import is_pixels


class _HeldMask(tv_tensors.TVTensor):
    """A mask on its way through torchvision's `forward`, which refuses `tv_tensors.Mask`."""


class CutMix(v2.CutMix):
    """torchvision's CutMix with a box and a partner for every sample, for integer masks too.

    What differs from torchvision: each sample draws its own box, and a partner that is not itself, in its own block of
    the batch; mode="batch" has one box a batch, as torchvision. Integer masks [B, H, W] or [B, 1, H, W] get the same
    boxes. Boxes, key points and floating masks are refused: an object may be half covered.

    Args:
        alpha: Of the Beta distribution, above 0.
        num_classes: Number of classes C; not needed for labels that are shares of classes.
        labels_getter: As torchvision's: finds the labels in the sample.
        p: See `robust_dist.CutMix`.
        mode: See `robust_dist.CutMix`.
        block: See `robust_dist.CutMix`.

    Raises:
        TypeError: For arguments of a wrong type.
        ValueError: For arguments out of range. In a call, for what cannot be mixed and for labels that do not belong to
            the images.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        num_classes: int | None = None,
        labels_getter: Callable[[Any], Any] | str | None = "default",
        p: float = 1.0,
        mode: str = "elem",
        block: int = 8,
    ) -> None:
        super().__init__(alpha=alpha, num_classes=num_classes, labels_getter=labels_getter)
        self.mixing = cutmix.CutMix(num_classes or 1, alpha=alpha, p=p, mode=mode, block=block)

    def forward(self, *inputs: Any) -> Any:
        """Mix a batch: images and labels as two arguments, or any structure that holds them.

        Returns:
            The same structure, with labels as shares of classes, float32 [B, C].
        """
        return super().forward(tree_map(self._hold, inputs if len(inputs) > 1 else inputs[0]))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw for the images among the leaves of a batch that are transformed."""
        images = next((leaf for leaf in flat_inputs if is_pixels(leaf)), None)
        if images is None:
            raise TypeError(f"{type(self).__name__}() found no images in the batch")
        keys = random_keys(images.shape[0], device=images.device)
        return {"plan": self.mixing.plan(keys, images.shape[-2], images.shape[-1])}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One leaf of the batch by what `make_params` drew."""
        plan, is_labels = params["plan"], inpt is params["labels"]
        if not is_labels and not isinstance(inpt, _HeldMask):
            return self._paste_images(inpt, plan, params["batch_size"])
        if inpt.shape[0] != plan.partner.shape[0]:
            raise ValueError(
                f"masks and labels must be as many as the images, {plan.partner.shape[0]}: {inpt.shape[0]}"
            )
        if is_labels:
            return self._mix_labels(inpt, plan)
        mask = inpt.as_subclass(tv_tensors.Mask)
        return restore(paste_masks(self.mixing, check_masks(mask, 0), plan), mask)

    def _hold(self, leaf: Any) -> Any:
        if not isinstance(leaf, tv_tensors.Mask):
            return leaf
        if leaf.is_floating_point():
            name = type(self).__name__
            raise ValueError(f"{name}() does not support PIL images, bounding boxes, keypoints and floating masks")
        return leaf.as_subclass(_HeldMask)

    def _mix_labels(self, labels: Tensor, plan: cutmix.CutMixPlan) -> Tensor:
        other = labels.index_select(0, plan.partner)
        if labels.dim() == 2:
            lam = plan.lam.unsqueeze(1)
            return torch.lerp(other.float(), labels.float(), lam)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels of shape (batch_size,) must be integer class numbers, got {labels.dtype}")
        if readable(labels):
            validate_labels(labels, self.mixing.num_classes)
        return cutmix.soft_targets(labels, self.mixing.num_classes, other, plan.lam)

    def _paste_images(self, images: Tensor, plan: cutmix.CutMixPlan, batch: int) -> Tensor:
        dims = 5 if isinstance(images, tv_tensors.Video) else 4
        if images.dim() != dims:
            raise ValueError(f"Expected a batched input with {dims} dims, but got {images.dim()} dimensions instead.")
        if images.shape[0] != batch:
            raise ValueError(
                f"The batch size of the images does not match the batch size of the labels: {images.shape[0]}"
            )
        flat = images.as_subclass(Tensor).flatten(1, -3)
        out = paste(self.mixing, flat, plan).reshape(images.shape)
        return tv_tensors.wrap(out, like=images) if isinstance(images, tv_tensors.TVTensor) else out
