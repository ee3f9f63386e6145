/* Everything that is compiled once per instruction set: ISA(name) is the name, TARGET the attribute. */
#define REAL float
#define ROOT sqrtf
#define ROW(name) ISA(name##_f32)
#include "step.h"
#undef REAL
#undef ROOT
#undef ROW
#define REAL double
#define ROOT sqrt
#define ROW(name) ISA(name##_f64)
#include "step.h"
#undef REAL
#undef ROOT
#undef ROW

TARGET static void ISA(widen)(const uint16_t *restrict half, int kind, float *restrict to, int64_t n)
{
    if (kind == BF16)
        for (int64_t i = 0; i < n; i++)
            to[i] = as_float((uint32_t)half[i] << 16);
    else
        for (int64_t i = 0; i < n; i++)
            to[i] = from_half(half[i]);
}

TARGET static void ISA(narrow)(const float *restrict from, uint16_t *restrict half, int kind, int64_t n)
{
    if (kind == BF16)
        for (int64_t i = 0; i < n; i++)
            half[i] = to_bfloat(from[i]);
    else
        for (int64_t i = 0; i < n; i++)
            half[i] = to_half(from[i]);
}

/* To bfloat16, rounded by chance; the bits are those of robust_dist/optim/rounding.py. */
TARGET static void ISA(narrow_by)(const float *restrict from, uint16_t *restrict to, int64_t n, source by)
{
    const uint32_t low = (uint32_t)by.index + (uint32_t)by.key;
    const uint32_t high = (uint32_t)(by.key >> 32) ^ (uint32_t)((uint64_t)by.index >> 32) * 0x9e3779b9u;
    for (int64_t i = 0; i < n; i++) {
        uint32_t x = low + (uint32_t)i;
        x = (x ^ (x >> 16)) * 0x7feb352du ^ high;
        x = (x ^ (x >> 15)) * 0x846ca68bu;
        x ^= x >> 16;
        to[i] = to_bfloat_by(from[i], x >> by.shift & 0xffff);
    }
}

/* A run of one tensor's elements, in pieces that stay in the first cache, for types that must be converted. */
TARGET static void ISA(run_narrow)(const tensors *t, int64_t which, int64_t first, int64_t n, const scalars *c)
{
    const int wide_param = t->param_kind == F32, wide_grad = t->grad_kind == F32, wide_m = t->exp_avg_kind == F32;
    float *master = t->masters ? t->masters[which] : NULL;
    float *exp_avg_sq = t->exp_avg_sqs[which], *z = t->zs ? t->zs[which] : NULL;
    float params[PIECE], grads[PIECE], means[PIECE];
    int64_t count;
    for (int64_t place = first; place < first + n; place += count) {
        const int64_t index = t->keys ? t->firsts[which] + place : 0;
        const int64_t same_high = ((int64_t)1 << 32) - (index & 0xffffffff), left = first + n - place;
        count = left < PIECE ? left : PIECE;
        count = count < same_high ? count : same_high;
        const uint16_t *grad = (const uint16_t *)t->grads[which] + place;
        uint16_t *param = (uint16_t *)t->params[which] + place, *exp_avg = (uint16_t *)t->exp_avgs[which] + place;
        float *p = master ? master + place : wide_param ? (float *)t->params[which] + place : params;
        const float *g = wide_grad ? (const float *)t->grads[which] + place : grads;
        float *m = wide_m ? (float *)t->exp_avgs[which] + place : means;
        if (p == params)
            ISA(widen)(param, t->param_kind, params, count);
        if (!wide_grad)
            ISA(widen)(grad, t->grad_kind, grads, count);
        if (!wide_m)
            ISA(widen)(exp_avg, t->exp_avg_kind, means, count);
        ISA(step_f32)(p, g, m, exp_avg_sq + place, z ? z + place : NULL, count, c);
        if (!wide_m && t->keys)
            ISA(narrow_by)(means, exp_avg, count, (source){t->keys[which], index, 16});
        else if (!wide_m)
            ISA(narrow)(means, exp_avg, t->exp_avg_kind, count);
        if (wide_param || c->kind == KEEP)
            continue;
        if (t->keys && !master && t->param_kind == BF16)
            ISA(narrow_by)(params, param, count, (source){t->keys[which], index, 0});
        else
            ISA(narrow)(p, param, t->param_kind, count);
    }
}

/* A run of one tensor's elements. */
TARGET static void ISA(run)(const tensors *t, int64_t which, int64_t first, int64_t n, const scalars *c)
{
    void *param = t->params[which], *exp_avg = t->exp_avgs[which], *exp_avg_sq = t->exp_avg_sqs[which];
    const void *grad = t->grads[which];
    void *z = t->zs ? t->zs[which] : NULL;
    if (t->param_kind == F64)
        ISA(step_f64)((double *)param + first, (const double *)grad + first, (double *)exp_avg + first,
                      (double *)exp_avg_sq + first, z ? (double *)z + first : NULL, n, c);
    else if (t->param_kind == F32 && t->grad_kind == F32 && t->exp_avg_kind == F32)
        ISA(step_f32)((float *)param + first, (const float *)grad + first, (float *)exp_avg + first,
                      (float *)exp_avg_sq + first, z ? (float *)z + first : NULL, n, c);
    else
        ISA(run_narrow)(t, which, first, n, c);
}

/* The sum of the absolute values of n elements. */
TARGET static double ISA(sum_abs)(const void *from, int kind, int64_t n)
{
    if (kind == F64)
        return ISA(sum_abs_f64)(from, n);
    if (kind == F32)
        return ISA(sum_abs_f32)(from, n);
    float piece[PIECE];
    double total = 0;
    for (int64_t place = 0; place < n; place += PIECE) {
        const int64_t count = n - place < PIECE ? n - place : PIECE;
        ISA(widen)((const uint16_t *)from + place, kind, piece, count);
        total += ISA(sum_abs_f32)(piece, count);
    }
    return total;
}
