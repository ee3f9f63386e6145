/* Crop and flip: rows of a stored image to planes, included once per instruction set. */

/* One row of a plane; `step` is the distance of its pixels in the stored image. */
TARGET static void ISA(load_row)(const uint8_t *restrict from, int64_t step, uint8_t *restrict to, int64_t width,
                                 int64_t left, int flip, int fill)
{
    const int64_t start = left < 0 ? -left : 0, stop = left > 0 ? width - left : width;
    if (start >= stop) {
        memset(to, fill, (size_t)width);
        return;
    }
    const int64_t count = stop - start, before = flip ? width - stop : start;
    const uint8_t *first = from + (start + left) * step;
    if (before)
        memset(to, fill, (size_t)before);
    if (before + count < width)
        memset(to + before + count, fill, (size_t)(width - before - count));
    uint8_t *middle = to + before;
    if (!flip && step == 1)
        memcpy(middle, first, (size_t)count);
    else if (step == 1)
        for (int64_t x = 0; x < count; x++)
            middle[x] = first[count - 1 - x];
    else if (!flip)
        for (int64_t x = 0; x < count; x++)
            middle[x] = first[x * step];
    else
        for (int64_t x = 0; x < count; x++)
            middle[x] = first[(count - 1 - x) * step];
}

/* Rows [y1, y2) of the sample's image after crop and flip. */
TARGET static void ISA(load)(const job *j, const view *v, int64_t y1, int64_t y2)
{
    const sample *s = v->of;
    const int64_t width = j->width, height = j->height, channels = j->channels, pixels = height * width;
    const uint8_t *image = j->images + s->place * pixels * channels;
    const int64_t step = j->images_last ? channels : 1, next = j->images_last ? 1 : pixels;
    for (int64_t c = 0; c < channels; c++) {
        if (step == 1 && !s->top && !s->left && !s->flip) {
            memcpy(v->plane[c] + y1 * width, image + c * next + y1 * width, (size_t)((y2 - y1) * width));
            continue;
        }
        for (int64_t y = y1; y < y2; y++) {
            uint8_t *to = v->plane[c] + y * width;
            const int64_t row = y + s->top;
            if (row < 0 || row >= height)
                memset(to, j->padding_fill, (size_t)width);
            else
                ISA(load_row)(image + c * next + row * width * step, step, to, width, s->left, s->flip,
                              j->padding_fill);
        }
    }
}
