"""RAdaBeliefW, the paper's optimizer, as a torch.optim.Optimizer."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from robust_dist.optim.averaging import average_of, trained_of
from robust_dist.optim.backends import Backend, Groups, check_fused, choose, counts_on_device, on_host
from robust_dist.optim.counting import advanced, count_of, increments, value_of
from robust_dist.optim.groups import check_sharded, gather_anew
from robust_dist.optim.rate import Measured, Ranks, check_one_rate
from robust_dist.optim.record import Found, Records
from robust_dist.optim.settings import (
    DEFAULTS,
    OPTIONS,
    TRAINS,
    Hyper,
    check_constant,
    check_group,
    hyper,
    make_plain,
    option,
    telling_of_switches,
)
from robust_dist.optim.single import differentiable_step
from robust_dist.optim.state import (
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    STEP,
    Z,
    complete,
    completed,
    first_index,
    has_master,
    load_exactly,
    local,
    own_steps,
)
from robust_dist.optim.tensors import TensorLists, inverse


def _is_capturing() -> bool:
    # not is_available(), which queries the driver at every call
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _has_listeners(optimizer: Optimizer) -> bool:
    """Whether a hook or a profiler observes the optimizer's steps."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


def _check_group_can_step(group: Mapping[str, Any]) -> None:
    for param in group["params"]:
        grad = param.grad
        # Only plain tensors are checked: a DTensor is never sparse, and its `layout` is slow.
        if type(grad) is Tensor and grad.layout != torch.strided:
            raise RuntimeError(
                f"RAdaBeliefW does not support sparse gradients, got one with layout {grad.layout};"
                " use sparse=False in the layer that creates it"
            )
    if not torch.compiler.is_compiling() and not group["capturable"] and _is_capturing():
        raise RuntimeError("RAdaBeliefW.step() is being captured in a CUDA graph: this needs capturable=True")


def _hyper(group: Mapping[str, Any], rates: Mapping[int, float | Tensor]) -> Hyper:
    # torch.compile cannot trace id(), and a compiled step measures no rate
    return hyper(group, rates.get(id(group))) if rates else hyper(group)


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
    rho_t > 4, so it is read that way. With b2 = 0.999 it first holds at t = 5; with b2 <= 0.6 never.

    eps is added at every step, so v^ contains eps / (1 - b2): with the defaults sqrt(v^) is never below
    3.16e-3. Where |g - m| is much smaller than that, the method is momentum SGD with the learning rate
    lr / 3.16e-3. This is AdaBelief's most disputed point; `accumulate_eps=False` turns it off.

    State of a parameter: `step` (0-d float32, on the CPU unless capturable or fused on a CUDA device), `exp_avg` (m)
    and `exp_avg_sq` (v, including eps, as in eq. 16). The moments of bfloat16 and float16 parameters are float32; such
    parameters are computed in float32 and rounded once. `step` is replaced by a new tensor at each step, except on an
    accelerator and inside torch.compile, where it is incremented in place. With lr = 0 parameters keep their bits.

    Past 2^24 steps the value of `step` moves to the next float32 at each step, so it exceeds the number of steps; the
    update and the rounding still know the exact count (counting.py).

    If a parameter's dtype changes between two steps (`model.double()`, `model.bfloat16()`), its state follows at the
    next step, exactly when widened; a widened parameter takes the value of its master.

    Sharded parameters (DTensor) are stepped on their local tensors; their state has the same placements. Under
    FakeTensorMode a step uses the single-tensor backend, or foreach if it is requested, and reads no values.

    Args:
        params: Parameters, named parameters, or param groups; every setting can be set per group.
        lr: Learning rate eta, a finite number of at least 0, or a tensor of 1 element.
        betas: (b1, b2), each in [0, 1).
        eps: A finite number of at least 0.
        weight_decay: lambda, decoupled and multiplied by lr; may be a tensor, like lr.
        foreach: True requires torch's foreach operations, False one tensor at a time; None chooses the fastest backend.
        fused: None uses a fused backend if there is one, else foreach: C on the CPU, if it was built; Triton on a CUDA
            device, if it runs there, without synchronising. True requires a fused backend, False excludes it.
        maximize: Ascend instead of descend; gradients are not written to.
        capturable: Keep `step` on the parameter's device, and read lr and weight_decay, if they are 0-d tensors
            there, at every step without synchronising; for CUDA graphs and torch.compile.
        differentiable: Let autograd differentiate through the step.
        rectify_threshold: The update is rectified if rho_t is greater; the paper uses 4, the code of RAdam and
            AdaBelief 5.
        eps_placement: "inside" the root as in eq. 19; "outside", sqrt(v^) + eps, as in AdaBelief's paper;
            "outside_uncorrected", (sqrt(v) + eps) / sqrt(1 - b2^t), as in timm and adabelief-pytorch when rectified.
        accumulate_eps: Whether eq. 16 adds eps at every step.
        master_weights: Keep a float32 copy of every bfloat16 or float16 parameter in its state (`master`), created at
            its first step; steps update the copy and write it, rounded, to the parameter. Weights loaded into the
            model later are overwritten, unless the state is also loaded or cleared.
        exp_avg_dtype: torch.bfloat16, or its name, stores m in bfloat16, except for float64 and complex parameters;
            None in float32. Groups hold the name, because torch's full state dicts and JSON reject a dtype. v is always
            at least float32. Rounded to nearest, m falls short of a constant gradient by up to a fraction
            2^-8 / (1 - b1); with stochastic_rounding it does not.
        stochastic_rounding: Round bfloat16 values (m, and parameters without a master) randomly up or down instead of
            to nearest, so that steps smaller than half the spacing are not lost. The random bits are a hash of
            (seed, step, parameter, element): the same on every backend, after a resume, and, within the limits
            given in rounding.py, under sharding.
        seed: Seed of this hash, an int in [0, 2**63).
        averaging: "schedule_free" averages the weights (averaging.py): call `train()` before a training epoch and
            `eval()` before an evaluation or an export, as with the schedulefree package. Keep the learning rate
            constant, and recompute batch normalisation statistics after `eval()`.
        rate_guard: k: measure the learning rate during the run (rate.py) and keep it within this factor of lr; 1
            ignores lr, None measures nothing. Call `observe(loss)` before every step.
        rate_constant: c of rate.py, the factor of the measured rate.
        decay_by_rate: Whether weight_decay is multiplied by the learning rate; if False, it is the fraction of the
            weights removed per step.

    master_weights and the settings after it are in a param group only if they differ from the default, so that
    checkpoints of older releases fit.

    Raises:
        ValueError: A setting is out of range, two settings exclude each other, or fused=True is not available.
        TypeError: A setting has the wrong type.
        RuntimeError: In step(), before anything changes: a sparse gradient, a CUDA graph capture without
            capturable=True, or a parameter that has changed between real and complex since its last step.
    """

    # GradScaler passes grad_scale and found_inf instead of unscaling; a class attribute, as pickle drops instance ones
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
        averaging: str | None = None,
        rate_guard: float | None = None,
        rate_constant: float = 4.0,
        decay_by_rate: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
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
        options: dict[str, Any] = {
            "master_weights": master_weights,
            "exp_avg_dtype": exp_avg_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "averaging": averaging,
            "rate_guard": rate_guard,
            "rate_constant": rate_constant,
            "decay_by_rate": decay_by_rate,
        }
        check_group({**defaults, **options})
        defaults |= {name: value for name, value in options.items() if value != OPTIONS[name]}
        make_plain(defaults)
        super().__init__(params, defaults)
        check_constant(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        make_plain(self.defaults)
        for group in self.param_groups:
            for key, default in DEFAULTS.items():
                group.setdefault(key, default)
            make_plain(group)
            own_steps(self.state, group["params"], group["capturable"])
        if "_measured" in self.__dict__:
            self._measured.restore(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        self._save_measured()
        state: dict[str, Any] = super().__getstate__()
        return state

    def state_dict(self) -> dict[str, Any]:
        """The state, including the measurements of `rate_guard`."""
        self._save_measured()
        return super().state_dict()

    def _save_measured(self) -> None:
        if "_measured" in self.__dict__:
            self._measured.save(self.param_groups)

    @property
    def _rate(self) -> Measured:
        """The measurements of `rate_guard`; not created in __init__, which pickle does not call."""
        measured: Measured | None = self.__dict__.get("_measured")
        if measured is None:
            self._measured = measured = Measured(self.param_groups)
        return measured

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; its settings are checked first, as in the constructor.

        Raises:
            ValueError: As in the constructor, or for unsharded parameters of FSDP2, which a step would not train;
                `model.parameters()` returns them after an evaluation.
            TypeError: As in the constructor.
        """
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group})
            make_plain(param_group)
        super().add_param_group(param_group)
        try:
            check_fused(self.param_groups[-1])
            check_sharded(self.param_groups[-1]["params"])
            check_one_rate(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    def backend_in_use(self) -> str | None:
        """The backend that steps the parameters in their present form (README.md in this folder lists the backends).

        Returns:
            "fused_triton", "fused_cpu", "foreach", "single" or the name of a registered backend; joined by " + " if
            groups differ; None if no group has a parameter, as under ZeRO-3 between two steps.
        """
        names = [choose(group).name for group in self.param_groups if group["params"]]
        return " + ".join(dict.fromkeys(names)) or None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; the moments of bfloat16 and float16 parameters stay float32 (torch would cast them).

        As with torch's optimizers, it sets the groups' settings. If that changes `averaging` or `rate_guard`, a warning
        says so.
        """
        self.__dict__.pop("_records", None)  # it would keep the old state alive until the next step
        with telling_of_switches(self):
            load_exactly(self, state_dict, super().load_state_dict)

    @property
    def measures_rate(self) -> bool:
        """Whether a group has `rate_guard`, so that every step needs `observe`."""
        return any(option(group, "rate_guard") is not None for group in self.param_groups)

    @property
    def averages_weights(self) -> bool:
        """Whether a group has `averaging`, so that `eval()` changes weights."""
        return any(option(group, "averaging") is not None for group in self.param_groups)

    @property
    def measured_rate(self) -> float | None:
        """The learning rate of the last step in the first group with `rate_guard`; waits for the device."""
        guarded = next((group for group in self.param_groups if option(group, "rate_guard") is not None), None)
        return None if guarded is None else self._rate.rate_of(guarded)

    def observe(self, loss: float | Tensor, *, automatic: bool = False) -> None:
        """Pass the loss of the next step to `rate_guard`; does nothing without it.

        Args:
            loss: A number, or a real tensor of 1 element on any device, not yet divided or scaled: the mean over a
                micro-batch, minus the entropy of its targets (label smoothing, mixed labels). The mean over the calls
                before a step, and over all ranks, is used. A DTensor is gathered: all its ranks must call this.
            automatic: For engines: the loss is already divided by the number of micro-batches. The sum over the calls
                is used; it is ignored if the program itself calls `observe` for this step.

        Raises:
            TypeError: The loss is not a real number.
            ValueError: The loss does not have exactly one element.
        """
        if self.measures_rate:
            self._rate.observe(loss, automatic=automatic)

    @torch.no_grad()
    def observe_gradients(
        self, scale: float = 1.0, gradients: Iterable[Tensor] | None = None, *, automatic: bool = False
    ) -> None:
        """Let `rate_guard` measure the gradients before they are clipped; does nothing without it.

        Args:
            scale: The factor by which the gradients are still scaled.
            gradients: The gradients of all param groups, if an engine does not keep them in the parameters' `grad`.
            automatic: For engines: only the first such call before a step counts, and it is ignored if the program
                itself observes the gradients.

        Raises:
            ValueError: `scale` is not a finite number above 0.
        """
        if not self.measures_rate:
            return
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale={scale!r} must be a finite number above 0")
        if gradients is None:
            self._rate.observe_gradients(self.param_groups, 1.0 / scale, automatic=automatic)
        else:
            self._rate.add_gradients(((grad, grad) for grad in gradients), 1.0 / scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Like torch's; also discards what an engine observed of these gradients."""
        super().zero_grad(set_to_none)
        if "_measured" in self.__dict__:
            self._measured.forget_automatic()

    def forget_observed(self) -> None:
        """Discard what was observed for a step that is not taken; does nothing without `rate_guard`."""
        if self.measures_rate:
            self._rate.forget()

    def restore_measured(self) -> None:
        """Read the measurements of `rate_guard` from the param groups, if `load_state_dict` did not write them."""
        if self.measures_rate:
            self._rate.restore(self.param_groups)

    def measure_over(self, process_group: Any = None, *, copies: int | None = None) -> None:
        """Set the ranks over which `rate_guard` measures.

        Args:
            process_group: The ranks that train together; None for all.
            copies: How many of them hold the same elements of a parameter that is not a DTensor: 1 under FSDP1 and
                ZeRO (with HSDP the number of replicas); None if all do, as under DDP.
        """
        self._rate.ranks = Ranks(process_group, copies)

    def keep_weights_in(
        self, masters: Callable[[], Iterable[tuple[dict[str, Any], Tensor]]], publish: Callable[[], None]
    ) -> None:
        """Set where an engine keeps the weights that `train()` and `eval()` change.

        Args:
            masters: Returns pairs of a param group and one of its parameters, for all parameters that may have state.
            publish: Copies their values into the model; called after a change, on every rank.
        """
        self._kept = masters, publish

    @property
    def engine_keeps_weights(self) -> bool:
        """Whether an engine has called `keep_weights_in`."""
        return "_kept" in self.__dict__

    def train(self) -> None:
        """Switch the parameters to the weights used for training; no effect if they hold them, or without averaging."""
        self._hold(trained=True)

    def eval(self) -> None:
        """Switch the parameters to the average used for evaluation; no effect if they hold it, or without averaging."""
        self._hold(trained=False)

    @torch.no_grad()
    def _hold(self, *, trained: bool) -> None:
        turning = [
            group
            for group in self.param_groups
            if option(group, "averaging") is not None and group.get(TRAINS, True) is not trained
        ]
        if not turning:
            return
        turn = trained_of if trained else average_of
        masters, publish = self.__dict__.get("_kept", (self.parameters_by_group, None))
        for group, param in masters():
            if any(group is one for one in turning):
                self._turn(group, param, turn)
        for group in turning:
            group[TRAINS] = trained
        if publish is not None:
            publish()
        else:
            gather_anew([param for group in turning for param in group["params"]])

    def parameters_by_group(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Pairs of a param group and one of its parameters, for all parameters."""
        return ((group, param) for group in self.param_groups for param in group["params"])

    def _turn(self, group: dict[str, Any], param: Any, turn: Callable[[Tensor, Tensor, float], None]) -> None:
        state = self.state.get(param, {})
        if Z not in state:
            return
        param, z, *master = map(local, (param, state[Z], *([state[MASTER]] if MASTER in state else [])))
        held = master[0] if master else param.to(z.dtype)
        turn(held, z, group["betas"][0])
        if held is not param:
            param.copy_(held)

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Like torch's, but skipped if there is no hook or profiler: it takes a fifth of a steady step."""
        hooked = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or _has_listeners(self):
                return hooked(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step; returns the closure's loss, if there is one.

        Args:
            closure: Reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = self._recorded()
        rates = self._rates(found)
        if found is None or not self._step_again(found, rates):
            self._step_anew(rates)
        return loss

    def _rates(self, found: Found | None) -> dict[int, float | Tensor]:
        """The measured rates by the ids of their groups."""
        # Engines create state with a step whose learning rate is 0.
        if any(group.get(TRAINS) is False and float(group["lr"]) != 0.0 for group in self.param_groups):
            raise RuntimeError("averaging: the parameters hold their average; call optimizer.train() before step()")
        if not self.measures_rate:
            return {}
        if torch.compiler.is_compiling():
            raise RuntimeError("rate_guard cannot be compiled; compile the model, and call step() outside of it")
        return self._rate.rates(self.param_groups, self._inverse_scale(), getattr(self, "found_inf", None), found)

    def _recorded(self) -> Found | None:
        """A valid record of an earlier step (record.py), or None."""
        records: Records | None = self.__dict__.get("_records")
        if records is None or torch.compiler.is_compiling() or _is_capturing():
            return None
        return records.find(self)

    def _step_again(self, found: Found, rates: dict[int, float | Tensor]) -> bool:
        hypers = [_hyper(group, rates) for group in self.param_groups]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return bool(self.__dict__["_records"].step(found, hypers, grad_scale, found_inf))

    def _step_anew(self, rates: dict[int, float | Tensor]) -> None:
        for group in self.param_groups:
            _check_group_can_step(group)
        chosen = [(group, choose(group)) for group in self.param_groups]
        on_device = [(group, backend) for group, backend in chosen if backend.step_on_device]
        others = [(group, backend) for group, backend in chosen if not backend.step_on_device]
        if self._overflow_on_host(group for group, _ in others):
            others = [(group, backend) for group, backend in others if not on_host(group)]
        # Collect everything before any parameter moves: state that does not fit must fail the whole step.
        counted = [(self._gather_counted_in_place(group), _hyper(group, rates)) for group, _ in on_device]
        gathered = [(self._gather(group), _hyper(group, rates)) for group, _ in others]
        if on_device:
            self._step_on_device([backend for _, backend in on_device], counted)
        for (group, backend), (lists, h) in zip(others, gathered, strict=True):
            with torch.set_grad_enabled(group["differentiable"]):
                self._step_group(group, backend, lists, h)
        if not torch.compiler.is_compiling():
            self._remember([backend for _, backend in chosen], counted + gathered)

    @torch.no_grad()
    def _step_on_device(self, chosen: list[Backend], groups: Groups) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for backend in {id(backend): backend for backend in chosen}.values():
            its = [one for one, other in zip(groups, chosen, strict=True) if other is backend]
            assert backend.step_on_device is not None
            backend.step_on_device(self._memory(backend), its, grad_scale, found_inf)

    def _memory(self, backend: Backend) -> dict[Any, Any]:
        """What a backend keeps between steps; not created in __init__, which pickle does not call."""
        memories: dict[str, dict[Any, Any]] = self.__dict__.setdefault("_memories", {})
        return memories.setdefault(backend.name, {})

    def _remember(self, chosen: list[Backend], groups: Groups) -> None:
        """Keep a record of the step just taken, if a single backend took it and can prepare the next."""
        if len(groups) == len(chosen) and len({id(backend) for backend in chosen}) == 1 and chosen[0].prepare:
            records: Records = self.__dict__.setdefault("_records", Records())
            records.add(self, chosen[0], self._memory(chosen[0]), groups)

    def _gather_counted_in_place(self, group: dict[str, Any]) -> TensorLists:
        lists = self._gather(group)
        if len(set(map(id, lists.steps))) < len(lists.steps):  # a shared one would be incremented several times
            lists.steps = [step.clone() for step in lists.steps]
            self._replace_steps(lists.params, lists.steps)
        return lists

    def _overflow_on_host(self, groups: Iterable[dict[str, Any]]) -> bool:
        # one synchronisation, only if the host must decide; GradScaler does the same for other optimizers
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or not any(on_host(group) for group in groups):
            return False
        return float(found_inf) != 0.0

    def _gather(self, group: dict[str, Any]) -> TensorLists:
        found = TensorLists()
        places: list[int] = []
        firsts: list[int] = []
        lists = found.params, found.grads, found.exp_avgs, found.exp_avg_sqs, found.steps, found.masters, found.zs
        with torch.set_grad_enabled(group["differentiable"]):
            self._init_group(group, *lists, places, firsts)
        found.origins = list(zip(places, firsts, strict=True))
        return found

    def _step_group(self, group: dict[str, Any], backend: Backend, lists: TensorLists, h: Hyper) -> None:
        if not lists.params:
            return
        if group["differentiable"]:
            self._step_differentiably(lists, h)
        elif on_host(group):
            counts, lists.steps = advanced(lists.steps)
            self._replace_steps(lists.params, lists.steps)
            self._run(backend, h, lists.local().batches(counts), None)
        else:
            found_inf = getattr(self, "found_inf", None)
            lists.steps = self._advance_on_device(lists, found_inf)
            self._run(backend, h, lists.local().batches([None] * len(lists.steps)), found_inf)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        masters: list[Tensor],
        zs: list[Tensor],
        places: list[int],
        firsts: list[int],
    ) -> None:
        # torch.compile runs a method of this name eagerly, so lazy state costs no recompilation
        found = [(param, grad) for param in group["params"] if (grad := param.grad) is not None]
        if not found:
            return
        on_device = counts_on_device(group)
        with_grad, their_grads = zip(*found, strict=True)
        states = list(map(self.state.__getitem__, with_grad))
        columns = None
        if not any(name in group for name in OPTIONS):
            columns = completed(states, with_grad, on_device)
        if columns is None:
            make_plain(group)
            for state, param in zip(states, with_grad, strict=True):
                complete(state, param, group, on_device)
            columns = [[state[key] for state in states] for key in (STEP, EXP_AVG, EXP_AVG_SQ)]
        params.extend(with_grad)
        grads.extend(their_grads)
        for filled, column in zip((steps, exp_avgs, exp_avg_sqs), columns, strict=True):
            filled.extend(column)
        if option(group, "master_weights"):
            masters.extend(self.state[p][MASTER] if has_master(p, group) else p for p in params)
        if option(group, "averaging") is not None:
            zs.extend(state[Z] for state in states)
        if option(group, "stochastic_rounding"):
            places.extend(self._places(group))
            firsts.extend(map(first_index, params))

    def _places(self, group: dict[str, Any]) -> Iterator[int]:
        """The positions, among all parameters, of this group's parameters with a gradient."""
        place = 0
        for other in self.param_groups:
            for param in other["params"]:
                if other is group and param.grad is not None:
                    yield place
                place += 1

    def _inverse_scale(self) -> Tensor | None:
        return inverse(getattr(self, "grad_scale", None))

    def _run(self, backend: Backend, h: Hyper, found: list[TensorLists], found_inf: Tensor | None) -> None:
        inverse_scale = self._inverse_scale()
        for batch in found:
            device = batch.params[0].device
            batch.inverse_scale = None if inverse_scale is None else inverse_scale.to(device)
            batch.found_inf = None if found_inf is None else found_inf.reshape(()).to(device)
            backend.step(batch, h)

    def _replace_steps(self, params: Iterable[Tensor], steps: Iterable[Tensor]) -> None:
        for state, step in zip(map(self.state.__getitem__, params), steps, strict=True):
            state[STEP] = step

    def _advance_on_device(self, g: TensorLists, found_inf: Tensor | None) -> list[Tensor]:
        ones = increments(g.steps)
        if found_inf is not None:
            ones = [torch.where(found_inf.reshape(()).to(one.device) == 0, one, 0.0) for one in ones]
        if torch.compiler.is_compiling() or g.steps[0].device.type != "cpu":
            torch._foreach_add_(g.steps, ones)
            return g.steps
        steps = list(torch._foreach_add(g.steps, ones))
        self._replace_steps(g.params, steps)
        return steps

    def _step_differentiably(self, g: TensorLists, h: Hyper) -> None:
        inverse_scale = self._inverse_scale()
        for param, grad in zip(g.params, g.grads, strict=True):
            state = self.state[param]
            count = count_of(state[STEP].item()) + 1.0
            state[STEP] = torch.tensor(value_of(count), dtype=torch.float32, device=state[STEP].device)
            state[EXP_AVG], state[EXP_AVG_SQ] = differentiable_step(
                param,
                grad if inverse_scale is None else grad * inverse_scale.to(grad.device),
                state[EXP_AVG],
                state[EXP_AVG_SQ],
                count,
                h,
            )
