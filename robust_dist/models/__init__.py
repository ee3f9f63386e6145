"""Classifiers by name."""

from robust_dist.models.cifar_resnet import CifarResNet
from robust_dist.models.registry import MODELS, ModelInfo, build_model, model_names

__all__ = ["CifarResNet", "MODELS", "ModelInfo", "build_model", "model_names"]
