"""The loss of a batch."""

from torch import Tensor, nn


def summed_loss(logits: Tensor, targets: Tensor, weights: Tensor | None, label_smoothing: float) -> Tensor:
    """The summed cross-entropy, 0-d float32, of logits [B, C] and targets: soft ones [B, C], or classes [B].

    Args:
        logits: Of any floating dtype.
        targets: Floating, each row of sum 1, or int64 classes.
        weights: float32 [B], what a sample's loss is multiplied by; None where all count.
        label_smoothing: Share of a target spread over all classes.
    """
    logits = logits.float()
    if weights is None:
        return nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    each = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return (each * weights).sum()
