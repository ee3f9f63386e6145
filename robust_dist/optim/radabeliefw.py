"""RAdaBeliefW, the paper's optimizer, as a torch.optim.Optimizer."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from robust_dist.optim.backend import Batch
from robust_dist.optim.choose import check_fused, choose, fused_on_device, on_host
from robust_dist.optim.fused_triton import FusedTriton, rows_by_device
from robust_dist.optim.gather import Gathered
from robust_dist.optim.groups import check_sharded
from robust_dist.optim.settings import DEFAULTS, MEMORY_DEFAULTS, as_dtype, check_group, hyper, option
from robust_dist.optim.single import differentiable_step
from robust_dist.optim.state import (
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    STEP,
    complete,
    complete_memory,
    completed,
    has_master,
    load_exactly,
    own_steps,
)


def _is_capturing() -> bool:
    # is_available() asks the driver every time
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _check_group_can_step(group: Mapping[str, Any]) -> None:
    for param in group["params"]:
        grad = param.grad
        # Asked of plain tensors alone: a DTensor is never sparse, and slow to answer.
        if type(grad) is Tensor and grad.layout != torch.strided:
            raise RuntimeError(
                f"RAdaBeliefW does not support sparse gradients, got one of layout {grad.layout};"
                " use sparse=False in the layer that makes it"
            )
    if not torch.compiler.is_compiling() and not group["capturable"] and _is_capturing():
        raise RuntimeError("RAdaBeliefW.step() is being captured in a CUDA graph: it needs capturable=True")


def _as_steps(counts: list[float]) -> list[Tensor]:
    """New `step` tensors on the CPU, at a fraction of the price of foreach's addition, which is slow for 0-d ones."""
    return list(torch.frombuffer(array("f", counts), dtype=torch.float32).unbind())


class RAdaBeliefW(Optimizer):
    r"""AdamW's decay, RAdam's rectification and AdaBelief's second moment in one optimizer.

    Source: Noguchi and Yamauchi, "Proposal of a robust and accurate deep learning method for
    hyperparameters". Per element, for step t = 1, 2, ... with gradient g, learning rate eta (after the
    schedule) and decay lambda::

        m_t   = b1 m_{t-1} + (1 - b1) g_t                                          (6)
        v_t   = b2 v_{t-1} + (1 - b2) (g_t - m_t)^2 + eps                          (16)
        m^    = m_t / (1 - b1^t),   v^ = v_t / (1 - b2^t)                          (8, 9)
        rho_t = rho_inf - 2 t b2^t / (1 - b2^t),   rho_inf = 2 / (1 - b2) - 1      (11, 12)
        gamma = sqrt((rho_t-4) (rho_t-2) rho_inf / ((rho_inf-4) (rho_inf-2) rho_t))    (13)
        theta -= eta (gamma m^ / sqrt(v^ + eps) + lambda theta)   if rho_t > 4     (19)
        theta -= eta (m^ + lambda theta)                          otherwise        (20)

    The paper prints the condition as "gamma_t > 4"; gamma never exceeds 1, and eq. 13 is real only for
    rho_t > 4, so that is how it is read. With b2 = 0.999 it first holds at t = 5; with b2 <= 0.6 never.

    eps is added at every step, so v^ carries eps / (1 - b2): at the defaults sqrt(v^) is never below
    3.16e-3. Where g - m is much smaller than that, the method is momentum SGD with the learning rate
    lr / 3.16e-3. That is AdaBelief's most disputed point; `accumulate_eps=False` turns it off.

    State of a parameter: `step` (0-d float32, on the CPU unless capturable or fused on a CUDA device), `exp_avg` (m)
    and `exp_avg_sq` (v, eps included, as in eq. 16), in float32 for bfloat16 and float16 parameters, which are computed
    in float32 and rounded once. `step` is replaced, not counted up in place, except on an accelerator and inside
    torch.compile, where a captured graph owns its memory. With lr = 0 parameters keep their bits.

    Sharded parameters (DTensor) are stepped on the local tensor; their state has their placement.

    Args:
        params: Parameters, named parameters, or param groups; any setting can be given per group.
        lr: Learning rate eta, a finite number of at least 0, or a tensor of 1 element.
        betas: (b1, b2), each in [0, 1).
        eps: A finite number of at least 0.
        weight_decay: lambda, decoupled and multiplied by lr; like lr, perhaps a tensor.
        foreach: True demands torch's foreach operations, False one tensor at a time, None the fastest there is.
        fused: None takes one pass over every byte where there is one, else foreach: in C on the CPU where it was built,
            in Triton on a CUDA device where Triton runs, without synchronising. True demands it, False goes without.
        maximize: Ascend instead of descend; gradients are not written to.
        capturable: Keep `step` on the parameter's device and read lr and weight_decay, where they are 0-d
            tensors on it, at every step without synchronising, for CUDA graphs and torch.compile.
        differentiable: Let autograd run through the step.
        rectify_threshold: The update is rectified where rho_t is greater; 4 is the paper's, 5 that of RAdam's
            and AdaBelief's code.
        eps_placement: "inside" the root as in eq. 19; "outside", sqrt(v^) + eps, as AdaBelief's paper;
            "outside_uncorrected", (sqrt(v) + eps) / sqrt(1 - b2^t), as timm and adabelief-pytorch when rectified.
        accumulate_eps: Whether eq. 16 adds eps at every step.
        master_weights: Keep a float32 copy of every bfloat16 or float16 parameter in its state (`master`), made from
            it at its first step; steps work on the copy and write the parameter, rounded. Weights that are loaded
            into the model later are overwritten, unless the state is loaded, too, or cleared.
        exp_avg_dtype: torch.bfloat16 (or "bfloat16") keeps m so, but not of float64 or complex parameters; None in
            float32. v is never kept in less. To the nearest, m stops short of a steady gradient, by up to a share
            2^-8 / (1 - b1) of it; with stochastic_rounding it does not.
        stochastic_rounding: What is kept in bfloat16, m and parameters without master, is rounded up or down by
            chance, so that steps smaller than half its spacing are not lost, instead of to the nearest. The chance is
            a hash of (seed, step, parameter, element): the same on every backend, after a resume, and, where
            rounding.py says so, under sharding.
        seed: Of that hash, an int in [0, 2**63).

    These four are in a param group only where they are not the default, so that checkpoints of older releases fit.

    Raises:
        ValueError: A setting is out of range, two of them exclude each other, or fused=True where it is not there.
        TypeError: A setting has the wrong type.
        RuntimeError: In step(): a sparse gradient, or a CUDA graph capture without capturable=True.
    """

    # GradScaler hands over grad_scale and found_inf instead of unscaling; on the class, as pickle drops attributes
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        rectify_threshold: float = 4.0,
        eps_placement: str = "inside",
        accumulate_eps: bool = True,
        master_weights: bool = False,
        exp_avg_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rectify_threshold": rectify_threshold,
            "eps_placement": eps_placement,
            "accumulate_eps": accumulate_eps,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        memory = {
            "master_weights": master_weights,
            "exp_avg_dtype": as_dtype(exp_avg_dtype),
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        check_group({**defaults, **memory})
        defaults |= {name: value for name, value in memory.items() if value != MEMORY_DEFAULTS[name]}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, default in DEFAULTS.items():
                group.setdefault(key, default)
            group["betas"] = tuple(group["betas"])
            own_steps(self.state, group["params"], group["capturable"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; its settings are checked as the constructor's are, before anything is added.

        After an evaluation under FSDP2, `model.parameters()` has parameters that no step would train: an error, too.
        """
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group})
            if "betas" in param_group:
                param_group["betas"] = tuple(param_group["betas"])
            if "exp_avg_dtype" in param_group:
                param_group["exp_avg_dtype"] = as_dtype(param_group["exp_avg_dtype"])
        super().add_param_group(param_group)
        try:
            check_fused(self.param_groups[-1])
            check_sharded(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; that of bfloat16 and float16 parameters stays float32, which torch alone would cast."""
        load_exactly(self, state_dict, super().load_state_dict)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one optimization step; returns the closure's loss, if there is one.

        Args:
            closure: Reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_group_can_step(group)
        left = self.param_groups if torch.compiler.is_compiling() else self._step_fused_on_device()
        overflow = self._overflow_on_host(left)
        for group in left:
            if not (overflow and on_host(group)):
                with torch.set_grad_enabled(group["differentiable"]):
                    self._step_group(group)
        return loss

    def _step_fused_on_device(self) -> list[dict[str, Any]]:
        """Step the groups that the Triton backend takes, all together; returns the others."""
        groups = [group for group in self.param_groups if fused_on_device(group)]
        if not groups:
            return self.param_groups
        memory = self.__dict__.setdefault("_fused_triton", {})  # not in __init__, which pickle does not call
        with torch.no_grad():
            gathered = [(self._gather_counted_in_place(group), hyper(group)) for group in groups]
            for device, rows in rows_by_device(gathered).items():
                fused = memory.setdefault(device, FusedTriton())
                fused.step(rows, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return [group for group in self.param_groups if all(group is not other for other in groups)]

    def _gather_counted_in_place(self, group: dict[str, Any]) -> Gathered:
        g = self._gather(group)
        if len(set(map(id, g.steps))) < len(g.steps):  # one for all would be counted up once for each
            g.steps = [step.clone() for step in g.steps]
            self._replace_steps(g.params, g.steps)
        return g

    def _overflow_on_host(self, groups: Iterable[dict[str, Any]]) -> bool:
        # one synchronisation, and only where the host must decide; GradScaler does the same for other optimizers
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or not any(on_host(group) for group in groups):
            return False
        return float(found_inf) != 0.0

    def _gather(self, group: dict[str, Any]) -> Gathered:
        g = Gathered()
        self._init_group(group, g.params, g.grads, g.exp_avgs, g.exp_avg_sqs, g.steps, g.masters, g.places)
        return g

    def _step_group(self, group: dict[str, Any]) -> None:
        g = self._gather(group)
        if not g.params:
            return
        if group["differentiable"]:
            self._step_differentiably(group, g)
        elif on_host(group):
            counts = [count + 1.0 for count in map(Tensor.item, g.steps)]
            steps = _as_steps(counts)
            self._replace_steps(g.params, steps)
            self._run(group, g.params, g.batches(steps, counts), None)
        else:
            found_inf = getattr(self, "found_inf", None)
            steps = self._advance_on_device(g, found_inf)
            self._run(group, g.params, g.batches(steps, [None] * len(steps)), found_inf)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        masters: list[Tensor],
        places: list[int],
    ) -> None:
        # the name is torch's: torch.compile runs a method of this name eagerly, so lazy state costs no recompilation
        found = [(param, grad) for param in group["params"] if (grad := param.grad) is not None]
        if not found:
            return
        on_device = group["capturable"] or fused_on_device(group)
        with_grad, their_grads = zip(*found, strict=True)
        states = list(map(self.state.__getitem__, with_grad))
        columns = None
        if not any(name in group for name in MEMORY_DEFAULTS):
            columns = completed(states, with_grad, on_device)
        if columns is None:
            for state, param in zip(states, with_grad, strict=True):
                complete(state, param, on_device)
                complete_memory(state, param, group)
            columns = [[state[key] for state in states] for key in (STEP, EXP_AVG, EXP_AVG_SQ)]
        params.extend(with_grad)
        grads.extend(their_grads)
        for filled, column in zip((steps, exp_avgs, exp_avg_sqs), columns, strict=True):
            filled.extend(column)
        if option(group, "master_weights"):
            masters.extend(self.state[p][MASTER] if has_master(p, group) else p for p in params)
        if option(group, "stochastic_rounding"):
            places.extend(self._places(group))

    def _places(self, group: dict[str, Any]) -> Iterator[int]:
        """The places, among all parameters, of this group's that have a gradient."""
        place = 0
        for other in self.param_groups:
            for param in other["params"]:
                if other is group and param.grad is not None:
                    yield place
                place += 1

    def _inverse_scale(self) -> Tensor | None:
        scale = getattr(self, "grad_scale", None)
        return None if scale is None else scale.reshape(()).double().reciprocal().float()

    def _run(self, group: dict[str, Any], params: list[Tensor], found: list[Batch], found_inf: Tensor | None) -> None:
        backend, h, inverse_scale = choose(group, params), hyper(group), self._inverse_scale()
        for batch in found:
            device = batch.params[0].device
            batch.inverse_scale = None if inverse_scale is None else inverse_scale.to(device)
            batch.found_inf = None if found_inf is None else found_inf.reshape(()).to(device)
            backend(batch, h)

    def _replace_steps(self, params: Iterable[Tensor], steps: Iterable[Tensor]) -> None:
        for state, step in zip(map(self.state.__getitem__, params), steps, strict=True):
            state[STEP] = step

    def _advance_on_device(self, g: Gathered, found_inf: Tensor | None) -> list[Tensor]:
        ones = [torch.ones((), device=step.device) for step in g.steps]
        if found_inf is not None:
            ones = [(found_inf.reshape(()) == 0).to(one) for one in ones]
        if torch.compiler.is_compiling() or g.steps[0].device.type != "cpu":
            torch._foreach_add_(g.steps, ones)
            return g.steps
        steps = list(torch._foreach_add(g.steps, ones))
        self._replace_steps(g.params, steps)
        return steps

    def _step_differentiably(self, group: dict[str, Any], g: Gathered) -> None:
        h, inverse_scale = hyper(group), self._inverse_scale()
        for param, grad in zip(g.params, g.grads, strict=True):
            state = self.state[param]
            state[STEP] = state[STEP] + 1.0
            state[EXP_AVG], state[EXP_AVG_SQ] = differentiable_step(
                param,
                grad if inverse_scale is None else grad * inverse_scale.to(grad.device),
                state[EXP_AVG],
                state[EXP_AVG_SQ],
                state[STEP].item(),
                h,
            )
