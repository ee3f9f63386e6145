"""A model's arithmetic per image, counted by torch on tensors without data."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def training_flops(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Floating-point operations of one image's forward and backward pass; a multiply-add counts as two.

    Only matrix products and convolutions count, as is usual for MFU; recomputation and augmentation do not. The
    model runs on "meta" copies of its weights, so nothing is computed, and the model is left as it was.

    Args:
        model: The whole model, before an engine shards it.
        image_shape: [C, H, W].

    Raises:
        Exception: Whatever a model raises that cannot run on the meta device.
    """
    weights = {
        name: weight.detach().to("meta").requires_grad_(weight.requires_grad)
        for name, weight in model.named_parameters()
    }
    buffers = {name: buffer.to("meta") for name, buffer in model.named_buffers()}
    images = torch.empty(1, *image_shape, device="meta", dtype=next(model.parameters()).dtype)
    modes = {module: module.training for module in model.modules()}
    # In evaluation mode one image is enough for batch normalisation; the products are the same.
    model.eval()
    try:
        # On the meta device attention is made of plain matrix products, which all have a formula.
        with FlopCounterMode(display=False) as counter:
            functional_call(model, weights | buffers, (images,)).sum().backward()
    finally:
        for module, training in modes.items():
            module.training = training
    return int(counter.get_total_flops())
