"""`TrivialAugmentWide` and `CutMix` for a `torchvision.transforms.v2.Compose`: torchvision's calls, a draw per sample.

Both take torchvision's place by their import alone. Draws come from torch's default generator, as torchvision's do, so
`torch.manual_seed` governs; draws by key are made by `TrivialAugment` and `CutMix` of `robust_dist`. Needs torchvision.
"""

from robust_dist.augment.v2.mixing import CutMix
from robust_dist.augment.v2.trivial import TrivialAugmentWide

__all__ = ["CutMix", "TrivialAugmentWide"]
