# ruff: noqa: ANN001, ANN201, ANN202 -- annotations have their own meaning in Triton.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The Triton kernels of fused_triton.py, which imports this file at first use.

`advance` increments the step counts of all tensors and computes their scalars in float64 in device memory;
`step` then makes one pass over all elements of the tensors of one combination of dtypes. bfloat16 is read and written
as uint16 bits, so that every architecture rounds it identically, also stochastically. The equations are those of
robust_dist/optim/reference.py, with the operations and the order of native/step.h.
"""

import triton
import triton.language as tl

from robust_dist.optim import counting, fused_triton_table
from robust_dist.triton_launch import Kernel

SETTINGS = tl.constexpr(fused_triton_table.SETTINGS)
RATE_MASK = tl.constexpr(fused_triton_table.RATE_MASK)
EXACT = tl.constexpr(counting.EXACT)
EXACT_BITS = tl.constexpr(counting.EXACT_BITS)

# The table's columns: addresses and numbers from the host ...
PARAM, EXP_AVG, EXP_AVG_SQ, MASTER, STEP, NUMEL, GROUP, PLACE, FIRST_INDEX, LENGTH = map(tl.constexpr, range(10))
# ... then integers and float64 scalars from `advance`.
KIND, KEY, RATE, BETA2, SHARE, ADDED_EPS, SCALE, DECAY, STEP_SIZE, INNER, OUTER = map(tl.constexpr, range(10, 21))
# With averaging (averaging.py): an address, then scalars from `advance`.
Z, FADE, MIX, PUSH = map(tl.constexpr, range(21, 25))
KEEP, UNRECTIFIED, RECTIFIED, SKIP = map(tl.constexpr, range(4))

# The settings' columns; RUN and the averages' two addresses and length are integers.
LR, DECAY_RATE, BETA1, LOG_BETA1, GROUP_BETA2, LOG_BETA2, GROUP_EPS = map(tl.constexpr, range(7))
EPS_INSIDE, EPS_OUTSIDE, EPS_UNCORRECTED, THRESHOLD, LONGEST, GAIN, SIGN, RUN = map(tl.constexpr, range(7, 15))
BY_RATE, WEIGHTS, SUMS, KNOWN = map(tl.constexpr, range(15, 19))

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(x):
    """splitmix64's output function on uint64."""
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def _one_minus_exp(x):
    """1 - e^-x for x > 0, without cancellation."""
    power = tl.exp(-x)
    # Kahan: the errors of e^-x and of its logarithm cancel.
    near = (power > 0.5) & (power < 1.0)
    safe = tl.where(near, power, 0.5)
    precise = (safe - 1.0) * x / tl.log(safe)
    return tl.where(near, precise, tl.where(power < 1.0, 1.0 - power, x))


@triton.jit
def _one_minus_ratio(x):
    """1 - x / (e^x - 1) for x > 0, by its Bernoulli series where this would cancel."""
    square = x * x
    series = x / 2.0 - square * (1.0 / 12.0 - square * (1.0 / 720.0 - square * (1.0 / 30240.0 - square / 1209600.0)))
    power = tl.exp(-x)
    ratio = x * power / tl.where(x < 0.25, 1.0, 1.0 - power)
    return tl.where(x < 0.25, series, 1.0 - ratio)


@triton.jit
def _gamma(x, rate, threshold, longest, gain):
    """Eq. 13 for x = t * rate, rate = -log(beta2), and whether the step is rectified."""
    length = (longest - 2.0 / rate) + (2.0 / rate) * _one_minus_ratio(x)
    rectified = length > threshold
    length = tl.where(rectified, length, 5.0)
    return tl.sqrt(tl.where(rectified, (length - 4.0) * (length - 2.0) / length * gain, 1.0)), rectified


@triton.jit
def _setting(settings, group, column, inside):
    return tl.load(settings + group * SETTINGS + column, mask=inside, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _whole(settings, group, column, inside):
    return tl.load(settings + group * SETTINGS + column, mask=inside, other=0)


@triton.jit
def _share(settings, group, turns, inside):
    """c_t of averaging.py for t = `turns`, and whether the group uses averaging; c_t is 0 if not."""
    weights, sums = _whole(settings, group, WEIGHTS, inside), _whole(settings, group, SUMS, inside)
    averages = weights != 0
    last = tl.minimum(turns, tl.where(averages, _whole(settings, group, KNOWN, inside), 1)) - 1
    weight = tl.load(weights.to(tl.pointer_type(tl.float64)) + last, mask=averages, other=0.0)
    known = tl.load(sums.to(tl.pointer_type(tl.float64)) + last, mask=averages, other=0.0)
    total = known + (turns - (last + 1)).to(tl.float64)
    return tl.where(averages & (total > 0.0), weight / tl.where(total > 0.0, total, 1.0), 0.0), averages


@triton.jit
def _put(table, count, row, column, value, inside):
    tl.store(table + count * column + row, value.to(tl.float64).to(tl.int64, bitcast=True), mask=inside)


@triton.jit
def _given(group, first, second, third, fourth):
    """The group's float64 setting among the bits in a launch's arguments."""
    word = tl.where(group == 0, first, tl.where(group == 1, second, tl.where(group == 2, third, fourth)))
    return (word.to(tl.int64) ^ RATE_MASK).to(tl.float64, bitcast=True)


@Kernel
@triton.jit(do_not_specialize=["count", "lr_0", "wd_0", "lr_1", "wd_1", "lr_2", "wd_2", "lr_3", "wd_3"])
def advance(
    table,
    settings,
    found_inf,
    grad_scale,
    count,
    lr_0,
    wd_0,
    lr_1,
    wd_1,
    lr_2,
    wd_2,
    lr_3,
    wd_3,
    FOUND_INF: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
    RATES: tl.constexpr,
    AVERAGES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Increment the step counts of `ROWS` tensors per program, and write their scalars into the table.

    Args:
        table: int64 [COLUMNS, count].
        settings: int64 [groups, SETTINGS].
        found_inf: 0-d float32, not 0 if nothing may change; read if `FOUND_INF`.
        grad_scale: 0-d float32, the factor by which gradients are scaled; read if `GRAD_SCALE`.
        count: Number of rows of the table.
        lr_0: Learning rate of group 0 if `RATES`: the bits of a float64, XORed with RATE_MASK, as int64.
        wd_0: Weight decay of group 0, encoded like `lr_0`, as are the following.
        lr_1: Learning rate of group 1.
        wd_1: Weight decay of group 1.
        lr_2: Learning rate of group 2.
        wd_2: Weight decay of group 2.
        lr_3: Learning rate of group 3.
        wd_3: Weight decay of group 3.
        FOUND_INF: Whether there is a found_inf.
        GRAD_SCALE: Whether there is a grad_scale.
        RATES: Whether learning rates and decays are in these arguments; else they are in the settings.
        AVERAGES: Whether a group uses averaging, for which the table has additional columns.
        ROWS: Tensors per program.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    group = tl.load(table + count * GROUP + row, mask=inside, other=0)
    address = tl.load(table + count * STEP + row, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(address, mask=inside, other=0.0)
    # counting.py: from 2^24 on, increment the bits
    t = tl.where(t < EXACT, t + 1.0, (t.to(tl.uint32, bitcast=True) + 1).to(tl.float32, bitcast=True))
    turns = tl.where(t < EXACT, t.to(tl.int64), t.to(tl.uint32, bitcast=True).to(tl.int64) + (EXACT - EXACT_BITS))
    steps = inside
    if FOUND_INF:
        overflow = tl.load(found_inf) != 0.0
        steps = tl.where(overflow, row < 0, inside)
    tl.store(address, t, mask=steps)
    scale = _setting(settings, group, SIGN, inside)
    if GRAD_SCALE:
        scale = scale * (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32).to(tl.float64)

    if RATES:
        lr, weight_decay = _given(group, lr_0, lr_1, lr_2, lr_3), _given(group, wd_0, wd_1, wd_2, wd_3)
    else:
        lr = _setting(settings, group, LR, inside)
        weight_decay = _setting(settings, group, DECAY_RATE, inside)
    beta1 = _setting(settings, group, BETA1, inside)
    beta2 = _setting(settings, group, GROUP_BETA2, inside)
    # Outside the table, a value that avoids a division by zero.
    rate = tl.where(inside, -_setting(settings, group, LOG_BETA2, inside), 1.0)
    time = tl.where(inside, turns, 1).to(tl.float64)
    bias1 = _one_minus_exp(tl.where(inside, -time * _setting(settings, group, LOG_BETA1, inside), 1.0))
    if AVERAGES:
        mix, averages = _share(settings, group, turns, inside)
        bias1 = tl.where(averages, 1.0, bias1)
    bias2 = _one_minus_exp(time * rate)
    root = tl.sqrt(bias2)
    gamma, rectified = _gamma(
        time * rate,
        rate,
        _setting(settings, group, THRESHOLD, inside),
        _setting(settings, group, LONGEST, inside),
        _setting(settings, group, GAIN, inside),
    )
    outer = _setting(settings, group, EPS_OUTSIDE, inside) * root + _setting(settings, group, EPS_UNCORRECTED, inside)
    kind = tl.where(rectified, RECTIFIED, UNRECTIFIED)
    fade = tl.where(_setting(settings, group, BY_RATE, inside) != 0.0, lr * weight_decay, weight_decay)
    kind = tl.where(steps, tl.where(lr == 0.0, KEEP, kind), SKIP)
    tl.store(table + count * KIND + row, kind.to(tl.int64), mask=inside)
    _put(table, count, row, RATE, 1.0 - beta1, inside)
    _put(table, count, row, BETA2, beta2, inside)
    _put(table, count, row, SHARE, (1.0 - beta2) * beta1 * beta1, inside)
    _put(table, count, row, ADDED_EPS, _setting(settings, group, GROUP_EPS, inside), inside)
    _put(table, count, row, SCALE, scale, inside)
    _put(table, count, row, DECAY, 1.0 - fade, inside)
    _put(table, count, row, STEP_SIZE, lr * (tl.where(rectified, gamma * root, 1.0) / bias1), inside)
    _put(table, count, row, INNER, _setting(settings, group, EPS_INSIDE, inside) * bias2, inside)
    _put(table, count, row, OUTER, outer, inside)
    if AVERAGES:
        _put(table, count, row, FADE, fade, inside)
        _put(table, count, row, MIX, mix, inside)
        _put(table, count, row, PUSH, beta1 * (1.0 - mix) - 1.0, inside)

    run = tl.load(settings + group * SETTINGS + RUN, mask=inside, other=0).to(tl.uint64, bitcast=True)
    turn = _mix(run + turns.to(tl.uint64, bitcast=True) * GOLDEN)
    place = tl.load(table + count * PLACE + row, mask=inside, other=0).to(tl.uint64, bitcast=True)
    tl.store(table + count * KEY + row, _mix(turn + place * GOLDEN).to(tl.int64, bitcast=True), mask=inside)


@triton.jit
def _integer(table, count, row, column):
    return tl.load(table + count * column + row)


@triton.jit
def _scalar(table, count, row, column, TYPE: tl.constexpr):
    return tl.load(table + count * column + row).to(tl.float64, bitcast=True).to(TYPE)


@triton.jit
def _array(address, first, TYPE: tl.constexpr, MASKED: tl.constexpr):
    start = address.to(tl.pointer_type(TYPE))
    return start + first if MASKED else tl.multiple_of(start, 16) + first


@triton.jit
def _load(array, place, mask, TYPE: tl.constexpr):
    found = tl.load(array + place, mask=mask)
    if found.dtype == tl.uint16:
        return (found.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(TYPE)
    else:
        return found.to(TYPE)


@triton.jit
def _bfloat16(value, noise, STOCHASTIC: tl.constexpr):
    """A float32 rounded to bfloat16 bits: stochastically with 16 bits of noise, or to nearest, ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    if STOCHASTIC:
        rounded = tl.where(size < 0x7F800000, (bits + noise) >> 16, rounded)
    return tl.where(size > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def _store(array, place, value, mask, noise, STOCHASTIC: tl.constexpr):
    if array.dtype.element_ty == tl.uint16:
        tl.store(array + place, _bfloat16(value, noise, STOCHASTIC), mask=mask)
    else:
        tl.store(array + place, value.to(array.dtype.element_ty), mask=mask)


@triton.jit
def _noise(key, index):
    """32 random bits per element, from its uint64 index and its tensor's uint64 key; see rounding.py."""
    x = index.to(tl.uint32) + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (key >> 32).to(tl.uint32) ^ ((index >> 32).to(tl.uint32) * 0x9E3779B9)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _divided(m, v, inner, outer):
    """The quotient m / (sqrt(v + inner) + outer), with every operation rounded as in IEEE 754."""
    if m.dtype == tl.float64:
        return m / (tl.sqrt(v + inner) + outer)
    else:  # without it, the compiler would also type the code after the return
        return tl.div_rn(m, tl.sqrt_rn(v + inner) + outer)


@Kernel
@triton.jit(do_not_specialize=["count"])
def step(
    table,
    grads,
    chunks,
    count,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    EXP_AVG_TYPE: tl.constexpr,
    TYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    AVERAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step the elements of one chunk per program.

    Args:
        table: int64 [COLUMNS, count], with the scalars of `advance`.
        grads: int64 [count], addresses of the gradients.
        chunks: int64 [programs, 2], see fused_triton_table.py.
        count: Number of rows of the table.
        PARAM_TYPE: Type of the parameters; here and in the next two, uint16 means bfloat16.
        GRAD_TYPE: Type of the gradients.
        EXP_AVG_TYPE: Type of the first moments.
        TYPE: Type of the second moments, the masters and the arithmetic.
        HAS_MASTER: Whether there are masters.
        STOCHASTIC: Whether bfloat16 values without a master are rounded stochastically.
        AVERAGES: Whether the fast weights of averaging.py, of type `TYPE`, are stepped, too.
        BLOCK: Elements in registers at a time; a chunk's length is a multiple of it.
    """
    row = tl.load(chunks + 2 * tl.program_id(0))
    length = _integer(table, count, row, LENGTH)
    # Tell the compiler about the alignment.
    first = tl.multiple_of(tl.load(chunks + 2 * tl.program_id(0) + 1) * length, BLOCK)
    kind = _integer(table, count, row, KIND)
    size = tl.minimum(_integer(table, count, row, NUMEL) - first, length).to(tl.int32)
    size = tl.where(kind == SKIP, 0, size)
    param = _integer(table, count, row, PARAM)
    grad = tl.load(grads + row)
    exp_avg = _integer(table, count, row, EXP_AVG)
    exp_avg_sq = _integer(table, count, row, EXP_AVG_SQ)
    master = _integer(table, count, row, MASTER)
    # Whole blocks of aligned tensors need no masks and use 16-byte accesses. DDP's buckets and FSDP's shards misalign
    # only gradients: then only their loads are narrow.
    places = param | exp_avg | exp_avg_sq | master
    if AVERAGES:
        z = _integer(table, count, row, Z)
        places = places | z
        fade = _scalar(table, count, row, FADE, TYPE)
        mix = _scalar(table, count, row, MIX, TYPE)
        push = _scalar(table, count, row, PUSH, TYPE)
    whole = tl.where((places & 15) == 0, size // BLOCK, 0)
    odd = (grad & 15) != 0
    blocks = (size + (BLOCK - 1)) // BLOCK

    rate = _scalar(table, count, row, RATE, TYPE)
    beta2 = _scalar(table, count, row, BETA2, TYPE)
    share = _scalar(table, count, row, SHARE, TYPE)
    added_eps = _scalar(table, count, row, ADDED_EPS, TYPE)
    scale = _scalar(table, count, row, SCALE, TYPE)
    decay = _scalar(table, count, row, DECAY, TYPE)
    step_size = _scalar(table, count, row, STEP_SIZE, TYPE)
    inner = _scalar(table, count, row, INNER, TYPE)
    outer = _scalar(table, count, row, OUTER, TYPE)
    key = _integer(table, count, row, KEY).to(tl.uint64, bitcast=True)
    index = _integer(table, count, row, FIRST_INDEX) + first

    for MASKED in tl.static_range(2):
        params = _array(param, first, PARAM_TYPE, MASKED)
        gradients = _array(grad, first, GRAD_TYPE, MASKED)
        odd_gradients = _array(grad, first, GRAD_TYPE, True)
        exp_avgs = _array(exp_avg, first, EXP_AVG_TYPE, MASKED)
        exp_avg_sqs = _array(exp_avg_sq, first, TYPE, MASKED)
        masters = _array(master, first, TYPE, MASKED)
        if AVERAGES:
            zs = _array(z, first, TYPE, MASKED)
        for block in range(whole if MASKED else 0, blocks if MASKED else whole):
            place = block * BLOCK + tl.arange(0, BLOCK)
            mask = place < size if MASKED else None
            moves = (place < size) & (kind != KEEP) if MASKED else kind != KEEP
            p = _load(masters if HAS_MASTER else params, place, mask, TYPE)
            m = _load(exp_avgs, place, mask, TYPE)
            v = _load(exp_avg_sqs, place, mask, TYPE)
            if MASKED:
                g = _load(gradients, place, mask, TYPE)
            else:  # one of the two, by a predicate
                narrow = _load(odd_gradients, place, odd, TYPE)
                g = tl.where(odd, narrow, _load(gradients, place, odd == 0, TYPE))
            belief = g * scale - m
            m = m + rate * belief  # eq. 6
            v = beta2 * v + share * belief * belief + added_eps  # eq. 16
            if AVERAGES:
                gradient = g * scale
                update = tl.where(kind == RECTIFIED, _divided(gradient, v, inner, outer), gradient)
                move = step_size * update + fade * p
                fast = _load(zs, place, mask, TYPE)
                p = p + mix * (fast - p) + push * move
                _store(zs, place, fast - move, moves, place.to(tl.uint32), False)
            else:
                update = tl.where(kind == RECTIFIED, _divided(m, v, inner, outer), m)
                p = p * decay - step_size * update  # eq. 19 or 20
            noise = _noise(key, (index + place).to(tl.uint64)) if STOCHASTIC else place.to(tl.uint32)
            _store(exp_avgs, place, m, mask, noise >> 16, STOCHASTIC)
            _store(exp_avg_sqs, place, v, mask, noise, False)
            _store(params, place, p, moves, noise & 0xFFFF, STOCHASTIC and not HAS_MASTER)
            if HAS_MASTER:
                _store(masters, place, p, moves, noise, False)
