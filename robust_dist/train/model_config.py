"""The section "model" of a recipe, and the classifier that it builds."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from robust_dist.own_code import check_form, is_name
from robust_dist.train.keys import NAMES_CODE

# What the run itself gives a model's constructor.
_GIVEN = {
    **dict.fromkeys(("pretrained", "weights", "pretrained_cfg", "checkpoint_path"), "model.weights says it"),
    **dict.fromkeys(("num_classes", "in_channels", "in_chans"), "it follows from the data"),
    "name": "model.name says it",
    "model_name": "model.name says it",
}


@dataclass
class ModelConfig:
    """The classifier.

    Attributes:
        name: resnet8/20/32/44/56/110, resnet18_cifar, resnet34_cifar, a torchvision model or timm/NAME; or your own
            class, or function of the number of classes, as MODULE:NAME.
        options: Further keyword arguments of the model's constructor.
        weights: What a new run begins with: DEFAULT or a name of torchvision's or timm's weights of this model; or a
            path: a run's folder, an export, a checkpoint, a .safetensors or .pt file of a state dict. Where their
            classes are others the head is a new one. null draws all weights by the seed.
        channels_last: Keep images, and weights that no engine shards, in torch.channels_last.
        sync_batchnorm: Normalise over the batches of all ranks (torch.nn.SyncBatchNorm; GPUs only).
    """

    name: str = field(default="resnet20", metadata=NAMES_CODE)
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    channels_last: bool = False
    sync_batchnorm: bool = False

    def __post_init__(self) -> None:
        if is_name(self.name):
            check_form("model.name", self.name)

    def build(self, num_classes: int, channels: int, *, seed: int, contiguous: bool = False) -> nn.Module:
        """The model, with the same initial weights on every rank; `weights` are loaded into it later (`pretrained`).

        Args:
            num_classes: Outputs.
            channels: Channels of the images.
            seed: Of the weights.
            contiguous: Whether the engine takes contiguous weights alone; then images alone are channels_last.

        Raises:
            ValueError: An unknown model, options that it does not take, or batch normalisation over ranks on a CPU.
        """
        from robust_dist.models import build_model
        from robust_dist.models.weights import implied_options

        self._check_options()
        options = implied_options(self.name, self.weights) | self.options
        torch.manual_seed(seed)
        model = build_model(self.name, num_classes, in_channels=channels, **options)
        if self.sync_batchnorm:
            if not torch.cuda.is_available():
                raise ValueError("model.sync_batchnorm=True needs GPUs (torch.nn.SyncBatchNorm); set it to false")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.channels_last and not contiguous:
            return model.to(memory_format=torch.channels_last)
        return model

    def _check_options(self) -> None:
        """Refuse options that the run itself gives to the model."""
        refused = [
            f"model.options.{name}={value!r} cannot be set: {_GIVEN[name]}"
            for name, value in self.options.items()
            if name in _GIVEN
        ]
        if refused:
            raise ValueError("; ".join(refused) + "; leave it out")
