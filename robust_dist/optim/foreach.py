"""Lists of tensors at once, with torch's foreach operations; on the CPU in pieces that stay in its cache."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from robust_dist.optim.backend import Batch
from robust_dist.optim.coefficients import device_coefficients, either, host_coefficients
from robust_dist.optim.settings import Hyper

# elements; with several threads every operation ends in a barrier, which is dear on busy cores, so fewer and larger
CPU_BLOCK = 1 << 18
THREADED_CPU_BLOCK = 1 << 21


def _true_grads(batch: Batch, h: Hyper) -> list[Tensor]:
    dtype = batch.exp_avgs[0].dtype
    grads = batch.grads if batch.grads[0].dtype == dtype else [g.to(dtype) for g in batch.grads]
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


def _host_step(batch: Batch, h: Hyper, step: float) -> None:
    _advance_moments(_true_grads(batch, h), batch.exp_avgs, batch.exp_avg_sqs, h)
    lr = float(h.lr)
    if lr == 0.0:
        return
    c = host_coefficients(step, h, lr, float(h.weight_decay))
    dtype = batch.exp_avgs[0].dtype
    exact = batch.params[0].dtype == dtype
    params = batch.params if exact else [p.to(dtype) for p in batch.params]
    if c.decay != 1.0:
        torch._foreach_mul_(params, c.decay)
    if c.rectified:
        denominators = torch._foreach_add(batch.exp_avg_sqs, c.inner) if c.inner else batch.exp_avg_sqs
        denominators = torch._foreach_sqrt(denominators)
        if c.outer:
            torch._foreach_add_(denominators, c.outer)
        torch._foreach_addcdiv_(params, batch.exp_avgs, denominators, -float(c.step_size))
    else:
        torch._foreach_add_(params, batch.exp_avgs, alpha=-float(c.step_size))
    if not exact:
        torch._foreach_copy_(batch.params, params)


def _commit(old: list[Tensor], new: list[Tensor], keep: Tensor | None) -> None:
    if keep is not None:
        new = [torch.where(keep, o, n.to(o.dtype)) for o, n in zip(old, new, strict=True)]
    torch._foreach_copy_(old, new)


def _device_step(batch: Batch, h: Hyper) -> None:
    dtype = batch.exp_avgs[0].dtype
    c = device_coefficients(batch.steps, h, dtype)
    skipped = None if batch.found_inf is None else batch.found_inf != 0
    m, v = batch.exp_avgs, batch.exp_avg_sqs
    if skipped is not None:
        m, v = [t.clone() for t in m], [t.clone() for t in v]
    _advance_moments(_true_grads(batch, h), m, v, h)
    denominators = torch._foreach_add(v, list(c.inner))
    torch._foreach_sqrt_(denominators)
    torch._foreach_mul_(denominators, list(c.slope))
    torch._foreach_add_(denominators, list(c.offset))
    params = list(torch._foreach_mul([p.to(dtype) for p in batch.params], c.decay))
    torch._foreach_addcdiv_(params, m, denominators)
    _commit(batch.params, params, either(c.idle, skipped))
    if skipped is not None:
        _commit(batch.exp_avgs, m, skipped)
        _commit(batch.exp_avg_sqs, v, skipped)


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def can_flatten(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the tensors lie in memory without gaps and in the same order, so that they can be walked as arrays."""
    return _is_dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors)


def _pieces(tensors: tuple[Tensor, ...], size: int) -> Iterable[tuple[Tensor, ...]]:
    if not can_flatten(tensors):
        return [tensors]
    flat = [t.as_strided((t.numel(),), (1,)) for t in tensors]
    return zip(*(t.split(size) for t in flat), strict=True)


def blocks(batch: Batch, size: int) -> Iterator[Batch]:
    """Cut a batch into batches of about `size` elements; large dense tensors are cut through, as views."""
    block: list[tuple[Tensor, ...]] = []
    elements = 0
    for row in zip(batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, strict=True):
        for piece in [row] if row[0].numel() <= size else _pieces(row, size):
            block.append(piece)
            elements += piece[0].numel()
            if elements >= size:
                yield batch.like(*map(list, zip(*block, strict=True)))
                block, elements = [], 0
    if block:
        yield batch.like(*map(list, zip(*block, strict=True)))


def foreach(batch: Batch, h: Hyper) -> None:
    """Step the batch with foreach operations."""
    if batch.step is None:
        _device_step(batch, h)
    elif batch.params[0].device.type == "cpu":
        for block in blocks(batch, CPU_BLOCK if torch.get_num_threads() == 1 else THREADED_CPU_BLOCK):
            _host_step(block, h, batch.step)
    else:
        _host_step(batch, h, batch.step)
