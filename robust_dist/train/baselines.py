"""The paper's baseline optimizers, as its equations define them, Mechanic and ScheduleFree+."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.reference import one_minus_power, rectification


class _Foreach(Optimizer):
    """Steps lists of tensors at once; a subclass defines the names of its state and the arithmetic."""

    NAMES: tuple[str, ...] = ()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin(loss)
        for group in self.param_groups:
            for step, params in self._by_step(group["params"]).items():
                grads = [p.grad for p in params]
                moments = [[self.state[p][name] for p in params] for name in self.NAMES]
                self._update(group, step, params, grads, *moments)
        return loss

    def _begin(self, loss: float | None) -> None:
        """Runs before the parameters move; `loss` is the closure's value, if any."""

    def _by_step(self, params: Iterable[Tensor]) -> dict[int, list[Tensor]]:
        """Parameters with gradients by their step number, which is incremented here."""
        found: dict[int, list[Tensor]] = defaultdict(list)
        for param in params:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["step"] = torch.tensor(0.0)
                state.update({name: torch.zeros_like(param) for name in self.NAMES})
            # Out of place: a load may share one tensor between parameters.
            state["step"] = state["step"] + 1
            found[int(state["step"])].append(param)
        return found

    def _update(self, group: dict[str, Any], step: int, params: list[Tensor], grads: list[Any], *moments: Any) -> None:
        raise NotImplementedError


class NAG(_Foreach):
    r"""Nesterov's accelerated gradient as in the paper (eq. 3 to 5).

    With d_0 = 0, momentum mu and learning rate eta::

        phi_t = theta_t - mu d_t                                  the look-ahead point (5)
        d_{t+1} = mu d_t + (1 - mu) eta g(phi_t),   theta_{t+1} = theta_t - d_{t+1}   (3, 4)

    The parameters, also in evaluation, are the phi: phi -= (1 - mu) eta g + mu d_{t+1}. At a constant rate this is
    torch's SGD(lr=(1 - mu) eta, momentum=mu, nesterov=True), so the paper's eta = 0.1 is torch's 0.01; when the rate
    changes, torch's momentum uses the new rate at once and eq. 3 keeps the old ones. The paper does not say how NAG
    applies weight
    decay: here, as usual for SGD, it is added to the gradient.

    Args:
        params: Parameters or param groups.
        lr: eta, after the schedule.
        momentum: mu.
        weight_decay: lambda.
    """

    NAMES = ("momentum_buffer",)

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], step: int, params: list[Tensor], grads: list[Any], *moments: Any) -> None:
        (velocities,) = moments
        mu, eta = group["momentum"], group["lr"]
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        torch._foreach_mul_(velocities, mu)
        torch._foreach_add_(velocities, grads, alpha=(1 - mu) * eta)
        torch._foreach_add_(params, grads, alpha=-(1 - mu) * eta)
        torch._foreach_add_(params, velocities, alpha=-mu)


class PaperAdam(_Foreach):
    r"""Adam, AdamW, RAdam and AdaBelief as in the paper, all with eps inside the root.

    With m and v of eq. 6 and 7, bias corrections of eq. 8 and 9::

        theta -= eta (gamma m^ / sqrt(v^ + eps) + lambda theta)

    gamma is 1, or eq. 13's with `rectify`; there theta -= eta (m^ + lambda theta) until rho_t > 4 (RAdam, eq. 14, 15;
    torch waits for rho_t > 5). With `belief`, v is eq. 16's: of (g - m)^2, with eps added at every step. lambda = 0 is
    Adam (eq. 10), lambda > 0 AdamW. torch's own optimizers have eps outside the root.

    Args:
        params: Parameters or param groups.
        lr: eta, after the schedule.
        betas: (b1, b2).
        eps: Added under the root.
        weight_decay: lambda, decoupled.
        belief: AdaBelief's second moment.
        rectify: RAdam's rectification.
    """

    NAMES = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        belief: bool = False,
        rectify: bool = False,
    ) -> None:
        settings = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | {"belief": belief, "rectify": rectify})

    def _update(self, group: dict[str, Any], step: int, params: list[Tensor], grads: list[Any], *moments: Any) -> None:
        exp_avgs, exp_avg_sqs = moments
        (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        deviations = torch._foreach_sub(grads, exp_avgs) if group["belief"] else grads
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, deviations, deviations, value=1 - beta2)
        if group["belief"]:
            torch._foreach_add_(exp_avg_sqs, eps)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        rate = lr / one_minus_power(beta1, step)
        gamma = rectification(step, beta2) if group["rectify"] else 1.0
        if gamma is None:
            torch._foreach_add_(params, exp_avgs, alpha=-rate)
            return
        roots = torch._foreach_div(exp_avg_sqs, one_minus_power(beta2, step))
        torch._foreach_add_(roots, eps)
        torch._foreach_sqrt_(roots)
        torch._foreach_addcdiv_(params, exp_avgs, roots, value=-rate * gamma)


def _dot(these: list[Tensor], others: list[Tensor]) -> float:
    return float(torch.stack([(a * b).sum() for a, b in zip(these, others, strict=True)]).sum())


class Mechanic(RAdaBeliefW):
    r"""Mechanic (Cutkosky, Defazio and Mehta 2023, algorithm 1) around RAdaBeliefW: learns the scale of its updates.

    With D the sum of RAdaBeliefW's updates since theta_0, S the sum of the six s, one for each discount beta::

        h = <g + decay S |g| theta / |theta|, D>                                  over all parameters
        m = max(beta m, |h|),   v = beta^2 v + h^2,   r = max(beta r - s h, 0)
        s = (s_init m / 6 + r) / (sqrt(v) + 1e-8),   D = D + move,   theta = theta_0 + S D

    State: theta_0 (`start`) and D (`moves`) per parameter, and the discounts' numbers in the param groups.

    Args:
        params: Parameters or param groups.
        lr: RAdaBeliefW's; multiplied by S.
        s_init: The initial scale.
        mechanic_decay: The decay in h.
        settings: Further settings of RAdaBeliefW.
    """

    DISCOUNTS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)

    def __init__(
        self, params: Any, lr: float = 1.0, *, s_init: float = 1e-8, mechanic_decay: float = 1e-2, **settings: Any
    ) -> None:
        super().__init__(params, lr, **settings)
        numbers = {f"mechanic_{name}": [0.0] * len(self.DISCOUNTS) for name in "smvr"}
        for group in self.param_groups:
            group.update({"s_init": s_init, "mechanic_decay": mechanic_decay, **numbers})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for state, p in ((self.state[p], p) for p in params):
            if "moves" not in state:
                state |= {"start": p.clone(), "moves": torch.zeros_like(p)}
        scale = self._learn(params)
        before = [p.clone() for p in params]
        super().step()
        for p, old in zip(params, before, strict=True):
            moves = self.state[p]["moves"].add_(p - old)
            p.copy_(self.state[p]["start"] + scale * moves)
        return loss

    def _learn(self, params: list[Tensor]) -> float:
        """S after this step."""
        group = self.param_groups[0]
        grads, moves = [p.grad for p in params if p.grad is not None], [self.state[p]["moves"] for p in params]
        product, pull = _dot(grads, moves), _dot(params, moves)
        of_grads, of_params = (math.sqrt(_dot(some, some)) for some in (grads, params))
        scales = group["mechanic_s"]
        h = product + group["mechanic_decay"] * sum(scales) * of_grads * pull / (of_params or 1.0)
        found: dict[str, list[float]] = {name: [] for name in "smvr"}
        kept = zip(self.DISCOUNTS, scales, *(group[f"mechanic_{name}"] for name in "mvr"), strict=True)
        for beta, s, m, v, r in kept:
            m, v, r = max(beta * m, abs(h)), beta**2 * v + h**2, max(beta * r - s * h, 0.0)
            s = (group["s_init"] * m / len(scales) + r) / (math.sqrt(v) + 1e-8)
            for name, value in zip("smvr", (s, m, v, r), strict=True):
                found[name].append(value)
        for one in self.param_groups:
            one.update({f"mechanic_{name}": values for name, values in found.items()})
        return sum(found["s"])


class ScheduleFreePlus(_Foreach):
    r"""ScheduleFree+ (Defazio 2026, arXiv 2605.19095): Schedule-Free AdamW with Polyak steps in the L1 norm.

    With y the trained weights, z the fast ones, x the average, gamma the schedule's factor, F the observed loss, and
    sums over all parameters::

        e <- b_p e + (1 - b_p) sqrt(pi/2) sum|g|,   alpha = gamma max(0, F + b <g, z - x>) / (e / (1 - b_p^t))
        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        z <- z - alpha^2 lambda y - alpha (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
        w = (max alpha)^2,   c = w / sum w,   x <- (1 - c) x + c z,   y <- b x + (1 - b) z

    The paper also anneals b and weights w by t^r in long runs; those parts are omitted. The parameters hold y; `eval()`
    turns them into x, and `train()` back into y. F is the loss minus the entropy of its targets if the loop provides
    that.

    Args:
        params: Parameters or param groups.
        lr: gamma, after the schedule; the paper uses 1.
        betas: (b1, b2).
        eps: Added to the root.
        weight_decay: lambda, in the paper's unit: 20 to 50 where AdamW uses 0.1.
        average: b.
        polyak_beta: b_p.
    """

    NAMES = ("exp_avg", "exp_avg_sq")
    measures_rate = True

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        average: float = 0.9,
        polyak_beta: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "average": average}
        kept = {"polyak_beta": polyak_beta, "l1": 0.0, "largest": 0.0, "sum": 0.0, "rate": 0.0, "trains": True}
        super().__init__(params, settings | kept)
        self._losses: list[Tensor] = []

    @property
    def measured_rate(self) -> float:
        """The rate alpha of the last step of the first group."""
        return float(self.param_groups[0]["rate"])

    def observe(self, loss: Tensor) -> None:
        """Add a micro-batch's loss, 0-d; the next step uses the mean of them."""
        self._losses.append(loss.detach().double())

    def _begin(self, loss: float | None) -> None:
        if loss is not None:
            self._losses = [torch.as_tensor(loss).double()]
        if not self._losses:
            raise RuntimeError("ScheduleFreePlus needs the loss of every step: call observe(loss) before step()")
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in params:
            if "z" not in self.state[p]:
                # _Foreach creates the rest if a parameter has no state.
                self.state[p] = {"step": torch.tensor(0.0), "z": p.clone()}
                self.state[p] |= {name: torch.zeros_like(p) for name in self.NAMES}
        self._polyak = self._polyak_step(params)

    def _polyak_step(self, params: list[Tensor]) -> float:
        """max(0, F + b <g, z - x>) / e."""
        group = self.param_groups[0]
        value = torch.stack(self._losses).mean()
        self._losses = []
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(value)
            value /= dist.get_world_size()
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            return 0.0
        # z - x = (z - y) / b
        correction = _dot(grads, [self.state[p]["z"] - p for p in params])
        beta = group["polyak_beta"]
        l1 = float(torch.stack([grad.abs().sum(dtype=torch.float64) for grad in grads]).sum()) * math.sqrt(math.pi / 2)
        for one in self.param_groups:
            one["l1"] = beta * one["l1"] + (1 - beta) * l1
        step = 1 + int(self.state[params[0]]["step"])
        mean = group["l1"] / one_minus_power(beta, step)
        return max(0.0, float(value) + correction) / mean if mean else 0.0

    def _update(self, group: dict[str, Any], step: int, params: list[Tensor], grads: list[Any], *moments: Any) -> None:
        exp_avgs, exp_avg_sqs = moments
        zs = [self.state[p]["z"] for p in params]
        (beta1, beta2), b = group["betas"], group["average"]
        rate = group["rate"] = float(group["lr"]) * self._polyak
        group["largest"] = max(group["largest"], rate)
        weight = group["largest"] ** 2
        group["sum"] += weight
        share = weight / group["sum"] if group["sum"] else 0.0
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
        roots = torch._foreach_div(exp_avg_sqs, one_minus_power(beta2, step))
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        averages = torch._foreach_sub(params, torch._foreach_mul(zs, 1 - b))
        torch._foreach_div_(averages, b)
        if group["weight_decay"]:
            torch._foreach_add_(zs, params, alpha=-(rate**2) * group["weight_decay"])
        torch._foreach_addcdiv_(zs, exp_avgs, roots, value=-rate / one_minus_power(beta1, step))
        torch._foreach_lerp_(averages, zs, share)
        torch._foreach_copy_(params, averages)
        torch._foreach_lerp_(params, zs, 1 - b)

    @torch.no_grad()
    def train(self) -> None:
        """Make the parameters y, if they are not."""
        self._turn(True)

    @torch.no_grad()
    def eval(self) -> None:
        """Make the parameters x, if they are not."""
        self._turn(False)

    def _turn(self, trains: bool) -> None:
        for group in self.param_groups:
            if group["trains"] is trains:
                continue
            group["trains"] = trains
            for p in (p for p in group["params"] if "z" in self.state[p]):
                p.lerp_(self.state[p]["z"], 1 - group["average"] if trains else 1 - 1 / group["average"])
