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

TARGET static void ISA(widen)(const void *from, int kind, float *restrict to, int64_t n)
{
    const uint16_t *restrict half = from;
    if (kind == BF16)
        for (int64_t i = 0; i < n; i++)
            to[i] = as_float((uint32_t)half[i] << 16);
    else
        for (int64_t i = 0; i < n; i++)
            to[i] = from_half(half[i]);
}

TARGET static void ISA(narrow)(const float *restrict from, void *to, int kind, int64_t n)
{
    uint16_t *restrict half = to;
    if (kind == BF16)
        for (int64_t i = 0; i < n; i++)
            half[i] = to_bfloat(from[i]);
    else
        for (int64_t i = 0; i < n; i++)
            half[i] = to_half(from[i]);
}

/* A run of one tensor's elements, in pieces that stay in the first cache where a type must be converted. */
TARGET static void ISA(run)(const tensors *t, int64_t which, int64_t first, int64_t n, const scalars *c)
{
    void *param = t->params[which], *exp_avg = t->exp_avgs[which], *exp_avg_sq = t->exp_avg_sqs[which];
    const void *grad = t->grads[which];
    if (t->param_kind == F64) {
        ISA(step_f64)((double *)param + first, (const double *)grad + first, (double *)exp_avg + first,
                      (double *)exp_avg_sq + first, n, c);
        return;
    }
    float *m = (float *)exp_avg + first, *v = (float *)exp_avg_sq + first;
    const int wide_param = t->param_kind == F32, wide_grad = t->grad_kind == F32;
    if (wide_param && wide_grad) {
        ISA(step_f32)((float *)param + first, (const float *)grad + first, m, v, n, c);
        return;
    }
    float params[PIECE], grads[PIECE];
    for (int64_t at = 0; at < n; at += PIECE) {
        const int64_t count = n - at < PIECE ? n - at : PIECE, place = first + at;
        if (!wide_param)
            ISA(widen)((const uint16_t *)param + place, t->param_kind, params, count);
        if (!wide_grad)
            ISA(widen)((const uint16_t *)grad + place, t->grad_kind, grads, count);
        float *p = wide_param ? (float *)param + place : params;
        const float *g = wide_grad ? (const float *)grad + place : grads;
        ISA(step_f32)(p, g, m + at, v + at, count, c);
        if (!wide_param && c->kind != KEEP)
            ISA(narrow)(params, (uint16_t *)param + place, t->param_kind, count);
    }
}
