"""What DeepSpeed hides from RAdaBeliefW: the gradients of all groups before clipping, and its float32 weights.

Its wrappers unscale and clip a group's gradient just before they step that group, so `rate_guard` gets all gradients
when the wrapper's own step begins; if a step is skipped for an overflow, they are discarded. `averaging` changes the
wrapper's float32 weights, which are then copied into the model as after a step.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust_dist.engines.deepspeed.config import check_options_json
from robust_dist.optim import RAdaBeliefW
from robust_dist.ranks.talk import rank

Masters = Iterable[tuple[dict[str, Any], Tensor]]


@dataclass(frozen=True)
class Wrapper:
    """How one of DeepSpeed's wrappers keeps gradients and weights.

    Attributes:
        gradients: This rank's gradients, averaged over ranks and micro-batches, still scaled, not yet clipped.
        publish: Copies the float32 weights into the model, on all ranks.
        masters: The float32 weights that it steps, each with its param group.
        sharded: Whether the ranks hold different elements; padding consists of zeros.
    """

    gradients: Callable[[Any], Iterable[Tensor]]
    publish: Callable[[Any], None]
    masters: Callable[[Any], Masters]
    sharded: bool = True


def _in_groups(wrapper: Any) -> Masters:
    return ((group, param) for group in wrapper.optimizer.param_groups for param in group["params"])


def _gradients_of_copies(wrapper: Any) -> Iterator[Tensor]:
    return (param.grad for group in wrapper.fp16_groups for param in group if param.grad is not None)


def _publish_copies(wrapper: Any) -> None:
    for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        torch._foreach_copy_([param.data for param in low], [param.data for param in high])


def _gradients_of_1_and_2(wrapper: Any) -> Iterable[Tensor]:
    if wrapper.cpu_offload:
        _wait_for_copies()
        return [partition.grad for partition in wrapper.single_partition_of_fp32_groups]
    return (grad for gradients in wrapper.averaged_gradients.values() for grad in gradients or ())


def _gradients_of_3(wrapper: Any) -> Iterable[Tensor]:
    if wrapper.offload_optimizer:
        _wait_for_copies()
        return [partition.grad for partition in wrapper.fp32_partitioned_groups_flat]
    return (grad for gradients in wrapper.averaged_gradients.values() for grad in gradients or ())


def _wait_for_copies() -> None:
    """Wait for gradients that are copied to the host asynchronously."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def _masters_of_3(wrapper: Any) -> Masters:
    # Its param groups are empty between steps.
    groups, partitions = wrapper.optimizer.param_groups, wrapper.fp32_partitioned_groups_flat
    return ((groups[wrapper.sub_group_to_group_id[index]], part) for index, part in enumerate(partitions))


def _publish_3(wrapper: Any) -> None:
    # Small parameters stay gathered, and those of the last forward pass may be, too.
    wrapper.checkpoint_event_prologue()
    for low, high in zip(wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat, strict=True):
        low.data.copy_(high.data)
    wrapper.checkpoint_event_epilogue()


# By name, to recognise them without importing DeepSpeed.
WRAPPERS = {
    "FP16_UnfusedOptimizer": Wrapper(_gradients_of_copies, _publish_copies, _in_groups, sharded=False),
    "BF16_Optimizer": Wrapper(
        lambda wrapper: wrapper.fp32_groups_gradient_flat_partition,
        lambda wrapper: wrapper.update_lp_params(),
        _in_groups,
    ),
    "DeepSpeedZeroOptimizer": Wrapper(_gradients_of_1_and_2, lambda wrapper: wrapper.update_lp_params(), _in_groups),
    "DeepSpeedZeroOptimizer_Stage3": Wrapper(_gradients_of_3, _publish_3, _masters_of_3),
}


def show(engine: Any) -> None:
    """Give RAdaBeliefW access to what the engine hides, after the engine has wrapped it; no effect for others.

    Raises:
        ValueError: As in `check_options`.
    """
    base = getattr(engine, "basic_optimizer", None)
    if not isinstance(base, RAdaBeliefW):
        return
    wrapper = engine.optimizer
    check_options(engine)
    found = WRAPPERS.get(type(wrapper).__name__)
    if wrapper is base:
        base.keep_weights_in(base.parameters_by_group, lambda: None)
    elif found is not None:
        base.keep_weights_in(lambda: found.masters(wrapper), lambda: found.publish(wrapper))
        if found.sharded:
            base.measure_over(getattr(wrapper, "dp_process_group", None), copies=1)


def check_options(engine: Any) -> None:
    """Reject `averaging` and `rate_guard` if the engine does more than data parallelism in memory.

    Raises:
        ValueError: Names the option, what it does not support, and the remedy.
    """
    base = engine.basic_optimizer
    for name, used in (("averaging", base.averages_weights), ("rate_guard", base.measures_rate)):
        against = _against(engine) if used else None
        if against is not None:
            raise ValueError(
                f"rank {rank()}: RAdaBeliefW's {name} does not run under DeepSpeed with {against}: leave that out, or "
                f"leave {name} out (in a recipe, give optimizer.lr as a number)"
            )
    check_options_json(engine, base)


def _against(engine: Any) -> str | None:
    """The engine's feature, of those that its JSON does not tell, that the options do not support, or None."""
    wrapper = engine.optimizer
    if type(engine).__name__ == "PipelineEngine":
        return "pipeline parallelism"
    if getattr(engine, "has_moe_layers", False):
        return "experts in parallel"
    for size in ("mp_world_size", "sequence_parallel_size"):
        if getattr(engine, size, 1) not in (None, 1):
            return f"{size}={getattr(engine, size)}"
    if wrapper is not engine.basic_optimizer and type(wrapper).__name__ not in WRAPPERS:
        return f"its {type(wrapper).__name__}"
    return None


def with_what_is_hidden(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DeepSpeedEngine._configure_optimizer` that ends with `show`."""

    def configure(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        show(self)
        return result

    return configure


def with_measured_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper's `step` that passes the gradients to `rate_guard` first, and discards those of a skipped step."""

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        base, found = self.optimizer, WRAPPERS.get(type(self).__name__)
        if found is None or not isinstance(base, RAdaBeliefW) or not base.measures_rate:
            return original(self, *args, **kwargs)
        base.observe_gradients(float(getattr(self, "loss_scale", 1.0)), found.gradients(self))
        result = original(self, *args, **kwargs)
        if getattr(self, "overflow", False):
            base.forget_observed()
        return result

    return step


def with_unclipped_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DeepSpeedEngine.clip_fp32_gradients` (stage 0, float32) that passes the gradients to `rate_guard` first."""

    def clip(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.optimizer, RAdaBeliefW):
            self.optimizer.observe_gradients(automatic=True)
        return original(self, *args, **kwargs)

    return clip
