/* Everything that is compiled once per instruction set: ISA(name) is the name, TARGET the attribute.
 *
 * MULTIPLY_ADD is a fused multiply-add, rounded once. Adding and taking away NEAREST rounds a float half to even, for
 * sizes below 2^22.
 */

/* to[i] = table[from[i]] */
TARGET static void ISA(look_up)(const uint8_t *restrict table, const uint8_t *restrict from, uint8_t *restrict to,
                                int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = table[from[i]];
}

/* to[i] = plane[place[i]] */
TARGET static void ISA(pick)(const uint8_t *restrict plane, const int32_t *restrict place, uint8_t *restrict to,
                             int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = plane[place[i]];
}

#include "load.h"
#include "levels.h"
#include "warp.h"

/* Columns [x, x + n) of row y of what becomes of a view. */
TARGET static void ISA(render)(const job *j, const view *v, int64_t y, int64_t x, int64_t n, scratch *w,
                               uint8_t *const *to)
{
    const sample *s = v->of;
    const int64_t width = j->width, at = y * width + x;
    const float *factors = j->factors + 2 * s->row;
    uint8_t *const *p = v->plane;
    if (s->kind == WARP && j->bilinear) {
        ISA(read_bilinear)(j, v, y, x, n, w, to);
        return;
    }
    if (s->kind == WARP) {
        ISA(read_nearest)(j, v, y, x, n, w, to);
        return;
    }
    if (s->kind == GREYED) {
        ISA(color)(p[0] + at, p[1] + at, p[2] + at, to[0], to[1], to[2], n, factors[0], factors[1]);
        return;
    }
    for (int64_t c = 0; c < j->channels; c++) {
        const uint8_t *from = p[c] + at;
        if (s->kind >= LEVELS) {
            ISA(look_up)(s->kind == LEVELS ? j->luts + 256 * s->row : s->lut[c], from, to[c], n);
            continue;
        }
        memcpy(to[c], from, (size_t)n);
        if (s->kind == SHARPENED && y > 0 && y < j->height - 1) {
            const int64_t first = x == 0, last = x + n == width;
            ISA(sharpen)(from + first - 1 - width, from + first - 1, from + first - 1 + width, to[c] + first,
                         n - first - last, factors[1]);
        }
    }
}

#define STORE(type)                                                                                                    \
    TARGET static void ISA(store_##type)(const type *restrict scale, const uint8_t *restrict from, type *restrict to,  \
                                         int64_t n, int64_t step)                                                      \
    {                                                                                                                  \
        if (step == 1)                                                                                                 \
            for (int64_t i = 0; i < n; i++)                                                                            \
                to[i] = scale[from[i]];                                                                                \
        else                                                                                                           \
            for (int64_t i = 0; i < n; i++)                                                                            \
                to[i * step] = scale[from[i]];                                                                         \
    }
STORE(uint16_t)
STORE(uint32_t)
STORE(uint64_t)
#undef STORE

/* One row of levels to the output, as `scale` has it. */
TARGET static void ISA(write)(const job *j, int64_t i, int64_t y, uint8_t *const *rows)
{
    const int64_t width = j->width, channels = j->channels, pixels = j->height * width;
    const int64_t step = j->out_last ? channels : 1;
    for (int64_t c = 0; c < channels; c++) {
        const int64_t at = i * channels * pixels + (j->out_last ? y * width * channels + c : c * pixels + y * width);
        if (j->bytes == 1) /* direct but for its order */
            for (int64_t x = 0; x < width; x++)
                ((uint8_t *)j->out + at)[x * step] = rows[c][x];
        else if (j->bytes == 2)
            ISA(store_uint16_t)((const uint16_t *)j->scale + 256 * c, rows[c], (uint16_t *)j->out + at, width, step);
        else if (j->bytes == 4)
            ISA(store_uint32_t)((const uint32_t *)j->scale + 256 * c, rows[c], (uint32_t *)j->out + at, width, step);
        else
            ISA(store_uint64_t)((const uint64_t *)j->scale + 256 * c, rows[c], (uint64_t *)j->out + at, width, step);
    }
}

/* Bring the rows [y1, y2) of a sample, or all that its operation needs for them, into a view. */
TARGET static void ISA(look)(const job *j, const sample *s, view *v, int64_t y1, int64_t y2)
{
    v->of = s;
    if (s->kind == WARP) {
        y1 = 0, y2 = j->height;
        ISA(find_grid)(j, v);
        for (int64_t c = 0; c < j->channels; c++)
            v->plane[c][j->height * j->width] = j->fill[c];
    } else if (s->kind == SHARPENED) {
        y1 -= y1 > 0, y2 += y2 < j->height;
    }
    ISA(load)(j, v, y1, y2);
}

/* Draw for position i and find the table of levels where the whole image decides. */
TARGET static void ISA(prepare)(const job *j, int64_t i, sample *all, scratch *w)
{
    sample *s = all + i;
    draw(j, i, s);
    if (s->kind <= LEVELS)
        return;
    ISA(look)(j, s, &w->own, 0, j->height);
    ISA(find_lut)(j, &w->own, s);
}

/* Write position i: its own pixels, and its partner's in the box. */
TARGET static void ISA(finish)(const job *j, int64_t i, const sample *all, scratch *w)
{
    const sample *s = all + i;
    const int64_t x1 = s->box[0], y1 = s->box[1], x2 = s->box[2], y2 = s->box[3];
    const int boxed = x1 < x2 && y1 < y2 && s->partner != i;
    ISA(look)(j, s, &w->own, 0, j->height);
    if (boxed)
        ISA(look)(j, all + s->partner, &w->other, y1, y2);
    const int direct = j->bytes == 1 && !j->out_last; /* levels go where they belong at once */
    for (int64_t y = 0; y < j->height; y++) {
        uint8_t *rows[MAX_CHANNELS], *inside[MAX_CHANNELS];
        for (int64_t c = 0; c < j->channels; c++) {
            rows[c] = direct ? (uint8_t *)j->out + ((i * j->channels + c) * j->height + y) * j->width : w->row[c];
            inside[c] = rows[c] + x1;
        }
        ISA(render)(j, &w->own, y, 0, j->width, w, rows);
        if (boxed && y >= y1 && y < y2)
            ISA(render)(j, &w->other, y, x1, x2 - x1, w, inside);
        if (!direct)
            ISA(write)(j, i, y, rows);
    }
    if (j->targets)
        write_targets(j, i, s);
}
