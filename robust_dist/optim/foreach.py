"""Steps lists of tensors with torch's foreach operations; on the CPU in blocks that fit its cache."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from robust_dist.optim.coefficients import Coefficients, device_coefficients, either, host_coefficients
from robust_dist.optim.rounding import Rounder
from robust_dist.optim.settings import Hyper
from robust_dist.optim.tensors import TensorLists, can_flatten

# Elements. Larger with several threads: every operation ends in a barrier, which is expensive on busy cores.
CPU_BLOCK = 1 << 18
THREADED_CPU_BLOCK = 1 << 21


def _as(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return tensors if tensors[0].dtype == dtype else [t.to(dtype) for t in tensors]


def _true_grads(batch: TensorLists, h: Hyper) -> list[Tensor]:
    grads = _as(batch.grads, batch.exp_avg_sqs[0].dtype)
    if batch.inverse_scale is not None:
        grads = list(torch._foreach_mul(grads, batch.inverse_scale.to(grads[0].device)))
    return list(torch._foreach_neg(grads)) if h.maximize else grads


def _advance_moments(grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], h: Hyper) -> None:
    belief = torch._foreach_sub(grads, exp_avgs)
    torch._foreach_lerp_(exp_avgs, grads, 1.0 - h.beta1)
    torch._foreach_mul_(exp_avg_sqs, h.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, belief, belief, (1.0 - h.beta2) * h.beta1 * h.beta1)
    if h.added_eps != 0.0:
        torch._foreach_add_(exp_avg_sqs, h.added_eps)


def _move(params: list[Tensor], m: list[Tensor], v: list[Tensor], c: Coefficients) -> None:
    if c.decay != 1.0:
        torch._foreach_mul_(params, c.decay)
    if not c.rectified:
        torch._foreach_add_(params, m, alpha=-float(c.step_size))
        return
    denominators = torch._foreach_add(v, c.inner) if c.inner else v
    denominators = torch._foreach_sqrt(denominators)
    if c.outer:
        torch._foreach_add_(denominators, c.outer)
    torch._foreach_addcdiv_(params, m, denominators, -float(c.step_size))


def _average(
    ys: list[Tensor], zs: list[Tensor], updates: list[Tensor], fade: Any, mix: list[Any], push: list[Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """The new y and z of averaging.py, from updates that include the step size."""
    moves = torch._foreach_add(updates, torch._foreach_mul(ys, fade))
    to_z = torch._foreach_mul(torch._foreach_sub(zs, ys), mix)
    return (
        list(torch._foreach_add(torch._foreach_add(ys, to_z), torch._foreach_mul(moves, push))),
        list(torch._foreach_sub(zs, moves)),
    )


def _average_on_host(ys: list[Tensor], batch: TensorLists, grads: list[Tensor], c: Coefficients) -> None:
    updates = torch._foreach_mul(grads, float(c.step_size))
    if c.rectified:
        roots = torch._foreach_sqrt(torch._foreach_add(batch.exp_avg_sqs, c.inner))
        torch._foreach_add_(roots, c.outer)
        torch._foreach_div_(updates, roots)
    count = len(ys)
    new = _average(ys, batch.zs, list(updates), float(c.fade), [c.mix] * count, [c.push] * count)
    torch._foreach_copy_(ys, new[0])
    torch._foreach_copy_(batch.zs, new[1])


def _host_step(batch: TensorLists, h: Hyper, step: float) -> None:
    dtype, rounder = batch.exp_avg_sqs[0].dtype, Rounder(batch, h)
    m = _as(batch.exp_avgs, dtype)
    grads = _true_grads(batch, h)
    _advance_moments(grads, m, batch.exp_avg_sqs, h)
    if m is not batch.exp_avgs:
        torch._foreach_copy_(batch.exp_avgs, [rounder.exp_avg(i, t) for i, t in enumerate(m)])
    lr = float(h.lr)
    if lr == 0.0:
        return
    params = _as(batch.masters or batch.params, dtype)
    c = host_coefficients(step, h, lr, float(h.weight_decay))
    if h.averaging:
        _average_on_host(params, batch, grads, c)
    else:
        _move(params, m, batch.exp_avg_sqs, c)
    if params is not batch.params:
        torch._foreach_copy_(batch.params, [rounder.param(i, t) for i, t in enumerate(params)])


def _commit(old: list[Tensor], new: list[Tensor], keep: Tensor | None) -> None:
    if keep is not None:
        new = [torch.where(keep, o, n.to(o.dtype)) for o, n in zip(old, new, strict=True)]
    torch._foreach_copy_(old, new)


def _device_step(batch: TensorLists, h: Hyper) -> None:
    dtype, rounder = batch.exp_avg_sqs[0].dtype, Rounder(batch, h)
    c = device_coefficients(batch.steps, h, dtype)
    skipped = None if batch.found_inf is None else batch.found_inf != 0
    m, v = _as(batch.exp_avgs, dtype), batch.exp_avg_sqs
    if skipped is not None:
        m, v = [t.clone() for t in m], [t.clone() for t in v]
    grads = _true_grads(batch, h)
    _advance_moments(grads, m, v, h)
    denominators = torch._foreach_add(v, list(c.inner))
    torch._foreach_sqrt_(denominators)
    torch._foreach_mul_(denominators, list(c.slope))
    torch._foreach_add_(denominators, list(c.offset))
    idle = either(c.idle, skipped)
    old = [p.to(dtype) for p in batch.masters or batch.params]
    if h.averaging:
        updates = list(torch._foreach_neg(torch._foreach_div(grads, denominators)))
        params, zs = _average(old, batch.zs, updates, c.fade, list(c.mix), list(c.push))
        _commit(batch.zs, zs, idle)
    else:
        params = list(torch._foreach_mul(old, c.decay))
        torch._foreach_addcdiv_(params, m, denominators)
    if batch.masters:
        _commit(batch.masters, params, idle)
    _commit(batch.params, [rounder.param(i, t) for i, t in enumerate(params)], idle)
    if skipped is not None or batch.exp_avgs[0].dtype != dtype:
        _commit(batch.exp_avgs, [rounder.exp_avg(i, t) for i, t in enumerate(m)], skipped)
    if skipped is not None:
        _commit(batch.exp_avg_sqs, v, skipped)


def _pieces(tensors: tuple[Tensor, ...], size: int) -> Iterable[tuple[Tensor, ...]]:
    if not can_flatten(tensors):
        return [tensors]
    flat = [t.as_strided((t.numel(),), (1,)) for t in tensors]
    return zip(*(t.split(size) for t in flat), strict=True)


def blocks(batch: TensorLists, size: int) -> Iterator[TensorLists]:
    """Split a batch into batches of about `size` elements; large dense tensors are split into views."""
    block: list[tuple[Tensor, ...]] = []
    origins: list[tuple[int, int]] = []
    elements = 0
    for index, row in enumerate(zip(*batch.columns, strict=True)):
        place, first = batch.origins[index] if batch.origins else (0, 0)
        for piece in [row] if row[0].numel() <= size else _pieces(row, size):
            block.append(piece)
            origins.append((place, first))
            first += piece[0].numel()
            elements += piece[0].numel()
            if elements >= size:
                yield batch.like(list(zip(*block, strict=True)), origins)
                block, origins, elements = [], [], 0
    if block:
        yield batch.like(list(zip(*block, strict=True)), origins)


def foreach(batch: TensorLists, h: Hyper) -> None:
    """Step the batch with foreach operations."""
    if batch.step is None:
        _device_step(batch, h)
    elif batch.params[0].device.type == "cpu":
        for block in blocks(batch, CPU_BLOCK if torch.get_num_threads() == 1 else THREADED_CPU_BLOCK):
            _host_step(block, h, batch.step)
    else:
        _host_step(batch, h, batch.step)
