/* Everything that is compiled once per instruction set: ISA(name) is the name, TARGET the attribute.
 *
 * MULTIPLY_ADD is a fused multiply-add, rounded once. Adding and taking away NEAREST rounds a float half to even, for
 * sizes below 2^22.
 */

#include "load.h"
#include "levels.h"
#include "warp.h"

/* Columns [x, x + n) of row y of a sharpened view. */
TARGET static void ISA(render_sharp)(const job *j, const view *v, int64_t y, int64_t x, int64_t n, uint8_t *const *to)
{
    const int64_t width = j->width, at = y * width + x;
    for (int64_t c = 0; c < j->channels; c++) {
        const uint8_t *from = v->plane[c] + at;
        if (y == 0 || y == j->height - 1) {
            memcpy(to[c], from, (size_t)n);
            continue;
        }
        ISA(sharpen)(from - width, from, from + width, to[c], n, j->factors[2 * v->of->row + 1]);
        if (x == 0) /* the border stays */
            to[c][0] = from[0];
        if (x + n == width)
            to[c][n - 1] = from[n - 1];
    }
}

/* n pixels from pixel `at` on, of a view whose pixels do not look at their neighbours. */
TARGET static void ISA(render_levels)(const job *j, const view *v, int64_t at, int64_t n, uint8_t *const *to)
{
    const sample *s = v->of;
    uint8_t *const *p = v->plane;
    if (s->kind == GREYED) {
        const float *factors = j->factors + 2 * s->row;
        ISA(color)(p[0] + at, p[1] + at, p[2] + at, to[0], to[1], to[2], n, factors[0], factors[1]);
        return;
    }
    for (int64_t c = 0; c < j->channels; c++)
        if (s->kind == NOTHING)
            memcpy(to[c], p[c] + at, (size_t)n);
        else
            ISA(look_up)(s->kind == LEVELS ? j->luts + 256 * s->row : s->lut[c], p[c] + at, to[c], n);
}

/* Columns [x, x + n) of row y of what becomes of a view; or `rows` whole rows, one behind the other. */
TARGET static void ISA(render)(const job *j, const view *v, int64_t y, int64_t rows, int64_t x, int64_t n, scratch *w,
                               uint8_t *const *to)
{
    if (v->of->kind != WARP && v->of->kind != SHARPENED) {
        ISA(render_levels)(j, v, y * j->width + x, rows * n, to);
        return;
    }
    for (int64_t r = 0; r < rows; r++) {
        uint8_t *row[MAX_CHANNELS];
        for (int64_t c = 0; c < j->channels; c++)
            row[c] = to[c] + r * n;
        if (v->of->kind == SHARPENED)
            ISA(render_sharp)(j, v, y + r, x, n, row);
        else if (j->bilinear)
            ISA(read_bilinear)(j, v, y + r, x, n, w, row);
        else
            ISA(read_nearest)(j, v, y + r, x, n, w, row);
    }
}

/* Bring the rows [y1, y2) of a sample, or all that its operation needs for them, into a view. */
TARGET static void ISA(look_at)(const job *j, const sample *s, view *v, int64_t y1, int64_t y2)
{
    v->of = s;
    if (s->kind == WARP) {
        ISA(load)(j, v, 0, j->height);
        ISA(find_grid)(j, v);
        ISA(zip)(j, v);
        return;
    }
    const int around = s->kind == SHARPENED;
    ISA(load)(j, v, y1 - (around && y1 > 0), y2 + (around && y2 < j->height));
}

/* Draw for position i and find the table of levels where the whole image decides. */
TARGET static void ISA(prepare)(const job *j, int64_t i, sample *all, scratch *w)
{
    sample *s = all + i;
    draw(j, i, s);
    if (s->kind <= LEVELS)
        return;
    ISA(look_at)(j, s, &w->own, 0, j->height);
    ISA(find_lut)(j, &w->own, s);
}

/* The partner's part of row y of the band that starts at row y0, from columns that fill whole registers. */
TARGET static void ISA(paste)(const job *j, const sample *s, int64_t y, int64_t y0, scratch *w, uint8_t *const *band)
{
    const int64_t x1 = s->box[0], x2 = s->box[2], start = x1 / 16 * 16, stop = (x2 + 15) / 16 * 16;
    ISA(render)(j, &w->other, y, 1, start, (stop < j->width ? stop : j->width) - start, w, w->pasted);
    for (int64_t c = 0; c < j->channels; c++)
        memcpy(band[c] + (y - y0) * j->width + x1, w->pasted[c] + x1 - start, (size_t)(x2 - x1));
}

/* Rows [y1, y2) of position i to the output; `direct` where levels lie there as here. */
TARGET static void ISA(write_band)(const job *j, int64_t i, int64_t y1, int64_t y2, int boxed, int direct,
                                   const sample *s, scratch *w)
{
    const int64_t channels = j->channels, pixels = j->height * j->width, at = y1 * j->width;
    const int64_t n = (y2 - y1) * j->width;
    uint8_t *band[MAX_CHANNELS];
    for (int64_t c = 0; c < channels; c++)
        band[c] = direct ? (uint8_t *)j->out + (i * channels + c) * pixels + at : w->band[c];
    ISA(render)(j, &w->own, y1, y2 - y1, 0, j->width, w, band);
    if (boxed)
        for (int64_t y = y1 > s->box[1] ? y1 : s->box[1]; y < y2 && y < s->box[3]; y++)
            ISA(paste)(j, s, y, y1, w, band);
    for (int64_t c = 0; c < channels && !direct; c++) {
        const int64_t place = i * channels * pixels + (j->out_last ? at * channels + c : c * pixels + at);
        ISA(store)(j, c, band[c], place, n, j->out_last ? channels : 1);
    }
}

/* Write position i: its own pixels, and its partner's in the box. */
TARGET static void ISA(finish)(const job *j, int64_t i, const sample *all, scratch *w)
{
    const sample *s = all + i;
    const int boxed = s->box[0] < s->box[2] && s->box[1] < s->box[3] && s->partner != i;
    ISA(look_at)(j, s, &w->own, 0, j->height);
    if (boxed)
        ISA(look_at)(j, all + s->partner, &w->other, s->box[1], s->box[3]);
    const int64_t rows = band_rows(j);
    const int direct = !j->scale;
    for (int64_t y = 0; y < j->height; y += rows)
        ISA(write_band)(j, i, y, y + rows < j->height ? y + rows : j->height, boxed, direct, s, w);
    if (j->targets)
        write_targets(j, i, s);
}
