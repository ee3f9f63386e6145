"""CutMix (Yun et al. 2019) on batches: a box per batch as its authors have it, or a box and a partner per sample."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dist.augment.backends import check_backend, choose_stage
from robust_dist.augment.checks import check_images, check_labels, check_range, check_vector, readable
from robust_dist.augment.keys import Stream, bits, bits_of_each, random_keys, to_int, to_uniform
from robust_dist.augment.layout import Stage, bits_of, choose, keep_bits, memory_format
from robust_dist.validate import one_of, real_number, whole_number

_CELLS = 4096
_WIDEST = 60.0  # log-odds beyond which a share is below 1e-26 and cuts no pixel


def _log_density(odds: Tensor, alpha: float) -> Tensor:
    """The log-density of a Beta(alpha, alpha) draw's log-odds, up to a constant: -2 alpha log(2 cosh(odds / 2))."""
    half = odds.abs() / 2
    return -2 * alpha * (half + torch.log1p(torch.exp(-2 * half)))


def beta_table(alpha: float) -> Tensor:
    """Knots of the distribution function: float64 [2, 8193], probabilities and their shares.

    From Simpson's rule over the log-odds, whose density is smooth for every alpha; to be interpolated linearly.
    """
    peak = -2 * alpha * math.log(2)
    reach = min(_WIDEST, 2 * math.acosh(math.exp(min(40 / alpha, 80) / 2)))
    odds = torch.linspace(-reach, reach, 4 * _CELLS + 1, dtype=torch.float64)
    density = torch.exp(_log_density(odds, alpha) - peak)
    step = odds[2] - odds[0]
    mass = step / 6 * (density[:-2:2] + 4 * density[1::2] + density[2::2])
    tail = density[:1] / alpha
    total = torch.cat([tail, mass, tail]).cumsum(0)
    probability = total[:-1] / total[-1]
    share = torch.sigmoid(odds[::2])
    probability[0], probability[-1] = 0.0, 1.0
    share[0], share[-1] = 0.0, 1.0
    return torch.stack([probability, share])


def beta_share(u: Tensor, table: Tensor) -> Tensor:
    """The quantile function: the shares for probabilities u in [0, 1), float64 like u."""
    probability, share = table.unbind(0)
    right = torch.searchsorted(probability, u, right=True).clamp(1, probability.shape[0] - 1)
    p_left, p_right = probability[right - 1], probability[right]
    s_left, s_right = share[right - 1], share[right]
    return s_left + (s_right - s_left) * ((u - p_left) / (p_right - p_left))


@dataclass(frozen=True, eq=False)
class CutMixPlan:
    """The box of another sample that is pasted into each sample of a batch, on the images' device.

    Attributes:
        partner: Position in the batch of the sample from which the box is cut, int64 [B].
        box: Columns and rows [x1, x2) x [y1, y2) as (x1, y1, x2, y2), clipped to the image, int64 [B, 4].
        lam: The weight of the sample's own label, exactly the fraction of pixels outside the box; float32 [B].
    """

    partner: Tensor
    box: Tensor
    lam: Tensor


def soft_targets(
    labels: Tensor, num_classes: int, partner_labels: Tensor | None = None, lam: Tensor | None = None
) -> Tensor:
    """Soft targets, float32 [B, C]: lam for the first label, 1 - lam for the second; rows sum to 1.

    Args:
        labels: int64 [B].
        num_classes: C.
        partner_labels: int64 [B]; without them, rows are one-hot.
        lam: float32 [B], required with `partner_labels`.
    """
    own = labels.long().unsqueeze(1)
    targets = torch.zeros(labels.shape[0], num_classes, dtype=torch.float32, device=labels.device)
    if partner_labels is None or lam is None:
        return targets.scatter_(1, own, 1.0)
    other, share = partner_labels.long().unsqueeze(1), lam.unsqueeze(1)
    rest = torch.where(own == other, 1.0, 1 - share)
    return targets.scatter_(1, own, share).scatter_(1, other, rest)


class CutMix(Stage):
    """Paste a box of another sample into each sample, and mix the labels in proportion to the pixels.

    The box covers a fraction 1 - lam of the image, with lam ~ Beta(alpha, alpha) and a uniform centre; it is clipped at
    the image's edges, and lam is adjusted to the remaining pixels, as in the authors' code. Nothing waits for a device,
    shapes are static, and `torch.compile(fullgraph=True)` captures it.

    Args:
        num_classes: Number of classes C, at least 1.
        alpha: Parameter of the Beta distribution, above 0; 1.0 is uniform.
        p: Probability of mixing the batch or, in mode "elem", each sample.
        mode: "batch": one box, drawn with the first sample's key, and a random permutation as partners; both depend
            on the batch and hence on the world size. "elem": each sample draws its own box and a partner in its block,
            so that pairs do not depend on how whole blocks are distributed over ranks.
        block: In mode "elem", the number of consecutive positions that mix with each other, at least 1. A sample is
            never its own partner unless its block has only one sample; in mode "batch" it may be.
        backend: The backend for pasting, see `RobustAugment`.

    Raises:
        TypeError: For arguments of a wrong type.
        ValueError: For arguments out of range.
        RuntimeError: For an explicit backend that is not available; the message gives the reason.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: float = 1.0,
        p: float = 1.0,
        mode: str = "batch",
        block: int = 8,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = check_backend(backend)
        self.num_classes = whole_number("num_classes", num_classes, 1)
        self.alpha = real_number("alpha", alpha, 0)
        if self.alpha == 0:
            raise ValueError("alpha=0 is out of range; it must be above 0")
        self.p = real_number("p", p, 0, 1)
        self.mode = one_of("mode", mode, ("batch", "elem"))
        self.block = whole_number("block", block, 1)
        if self.alpha != 1:
            keep_bits(self, "_beta", beta_table(self.alpha))

    def plan(self, keys: Tensor, height: int, width: int) -> CutMixPlan:
        """Draw partners and boxes for keys, int64 [B], and images of height x width pixels."""
        drawing = keys if self.mode == "elem" else keys[:1]
        drawn = bits_of_each(drawing, Stream.CUTMIX_APPLY, Stream.CUTMIX_PARTNER)
        box = self._boxes(drawn[1], drawn[2:4].t(), height, width)
        partner = self._partners(keys, drawn[4])
        if self.p < 1:
            mixed = to_uniform(drawn[0]) < self.p
            box = torch.where(mixed.unsqueeze(1), box, 0)
            partner = torch.where(mixed, partner, torch.arange(keys.shape[0], device=keys.device))
        x1, y1, x2, y2 = box.unbind(1)
        own = height * width - (x2 - x1) * (y2 - y1)
        lam = (own / max(height * width, 1)).float()
        if self.mode == "batch":
            box, lam = box.expand(keys.shape[0], 4).contiguous(), lam.expand(keys.shape[0]).contiguous()
        return CutMixPlan(partner=partner, box=box, lam=lam)

    def mix(self, images: Tensor, labels: Tensor, plan: CutMixPlan) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Paste the boxes, and return the labels as a triple.

        Args:
            images: uint8 or floating-point, [B, C, H, W].
            labels: Class numbers, integers [B] on the images' device.
            plan: The plan for B samples of that size.

        Returns:
            New images of the same shape, dtype and memory format, and (labels, partners' labels, lam), each [B].

        Raises:
            TypeError: For wrong dtypes.
            ValueError: For wrong shapes or devices; on the CPU, uncompiled, also for labels outside [0, C) and
                partners outside the batch. On a device this check would synchronise: see `validate_labels`.
        """
        check_images(images)
        check_labels(labels, images, self.num_classes)
        check_vector("plan.partner", plan.partner, images)
        check_range("plan.partner", plan.partner, images.shape[0])
        if plan.box.shape != (images.shape[0], 4):
            raise ValueError(f"plan.box must have shape [{images.shape[0]}, 4], got {list(plan.box.shape)}")
        return self._paste(images, labels, plan)

    def apply(  # type: ignore[override]
        self, images: Tensor, labels: Tensor | None = None, plan: CutMixPlan | None = None
    ) -> tuple[Tensor, Tensor]:
        """Like `mix`, with soft targets, float32 [B, num_classes], instead of the triple."""
        if labels is None or plan is None:
            return self._visit(images)
        mixed, (own, other, lam) = self.mix(images, labels, plan)
        return mixed, soft_targets(own, self.num_classes, other, lam)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        keys: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`apply` with a plan drawn from the keys; if no keys are given, they are drawn from the generator.

        A single sample is its own partner and is unchanged; an empty batch has targets [0, C].
        """
        check_images(images)
        check_labels(labels, images, self.num_classes)
        if keys is None:
            keys = random_keys(images.shape[0], generator, images.device)
        check_vector("keys", keys, images)
        plan = self.plan(keys, images.shape[2], images.shape[3])
        mixed, (own, other, lam) = self._paste(images, labels, plan)
        return mixed, soft_targets(own, self.num_classes, other, lam)

    def backend_for(self, device: torch.device | str) -> str:
        """The backend that pastes boxes on `device`: "torch", "native" or "triton"."""
        return choose_stage(self.backend, torch.device(device), "mix")[0]

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.num_classes}, alpha={self.alpha}, p={self.p}, mode={self.mode!r}, block={self.block}"

    def _partners(self, keys: Tensor, drawn: Tensor) -> Tensor:
        if self.mode == "batch":
            return torch.argsort(bits(keys, Stream.CUTMIX_PARTNER), stable=True)
        here = torch.arange(keys.shape[0], device=keys.device)
        place = here % self.block
        start = here - place
        if readable(keys) and keys.shape[0] % self.block == 0:
            return (place + 1 + to_int(drawn, max(1, self.block - 1))) % self.block + start
        size = (keys.shape[0] - start).clamp(max=self.block)
        return (place + 1 + to_int(drawn, (size - 1).clamp(min=1))) % size + start

    def _boxes(self, share: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
        """The authors' boxes, with even side lengths before clipping, from bits [B] and [B, 2]: int64 [B, 4]."""
        cut = to_uniform(share)
        if self.alpha != 1:
            cut = beta_share(cut, bits_of(self, "_beta", torch.float64, cut.device))
        size = width + (height - width) * torch.arange(2, device=cut.device)
        half = (cut.sqrt().unsqueeze(1) * size).long() >> 1
        middle = to_int(centre, size)
        corners = torch.stack([middle - half, middle + half], 1)
        return corners.clamp(min=0).minimum(size).flatten(1)

    def _paste(self, images: Tensor, labels: Tensor, plan: CutMixPlan) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        partner_labels = labels.index_select(0, plan.partner)
        _, paste = choose_stage(self.backend, images.device, "mix")
        mixed = self._select(images, plan) if paste is None or images.requires_grad else paste(images, plan)
        return mixed.contiguous(memory_format=memory_format(images)), (labels, partner_labels, plan.lam)

    def _select(self, images: Tensor, plan: CutMixPlan) -> Tensor:
        height, width = images.shape[2:]
        side = max(height, width)
        place = torch.arange(side + 1, device=images.device)
        # Row k marks the positions before k: four lookups cost less than comparisons for every sample.
        before = place[:side] < place.unsqueeze(1)
        edges = before.index_select(0, plan.box.clamp(0, side).flatten()).view(-1, 4, side)
        columns, rows = (edges[:, 2:] > edges[:, :2]).unbind(1)
        inside = (rows[:, None, :height, None], columns[:, None, None, :width])
        return choose(inside, images.index_select(0, plan.partner), images)
