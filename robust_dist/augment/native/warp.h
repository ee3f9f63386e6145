/* Shear, translation and rotation with the coordinates of robust_dist/augment/warp.py; once per instruction set. */

/* warp.grid_terms for one sample. */
TARGET static void ISA(find_grid)(const job *j, view *v)
{
    const double *m = j->matrices + 8 * v->of->row, size[2] = {(double)j->width, (double)j->height};
    const double shift[2] = {m[4] * (size[1] / 2) - m[6], m[5] * (size[0] / 2) - m[7]};
    for (int axis = 0; axis < 2; axis++) {
        const double half = size[axis] / 2;
        const float by_column = (float)((double)(float)m[2 * axis] / half);
        const float by_row = (float)((double)(float)m[2 * axis + 1] / half);
        for (int64_t x = 0; x < j->width; x++)
            v->across[axis][x] = (float)((double)by_column * ((double)x - (size[0] - 1) / 2));
        for (int64_t y = 0; y < j->height; y++)
            v->down[axis][y] = (float)((double)by_row * ((double)y - (size[1] - 1) / 2));
        v->offset[axis] = (float)((double)(float)shift[axis] / half);
    }
}

/* A view's levels, and the fill behind them, a whole pixel at a time: one read finds all channels. */
TARGET static void ISA(zip)(const job *j, const view *v)
{
    const int64_t pixels = j->height * j->width;
    uint32_t *restrict to = v->pixel;
    const uint8_t *restrict red = v->plane[0];
    if (j->channels == 1) {
        for (int64_t i = 0; i < pixels; i++)
            to[i] = red[i];
        to[pixels] = j->fill[0];
        return;
    }
    const uint8_t *restrict green = v->plane[1], *restrict blue = v->plane[2];
    for (int64_t i = 0; i < pixels; i++)
        to[i] = red[i] | (uint32_t)green[i] << 8 | (uint32_t)blue[i] << 16;
    to[pixels] = j->fill[0] | (uint32_t)j->fill[1] << 8 | (uint32_t)j->fill[2] << 16;
}

/* to[i] = pixel[place[i]] */
TARGET static void ISA(pick)(const uint32_t *restrict pixel, const int32_t *restrict place, uint32_t *restrict to,
                             int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = pixel[place[i]];
}

/* One channel of picked pixels. */
TARGET static void ISA(unzip)(const uint32_t *restrict from, uint8_t *restrict to, int64_t n, int64_t channel)
{
    const int shift = 8 * (int)channel;
    for (int64_t i = 0; i < n; i++)
        to[i] = (uint8_t)(from[i] >> shift);
}

/* warp.coordinates of one axis, kept within two pixels around the image, where all is fill. */
TARGET static inline float ISA(coordinate)(float across, float down, float offset, float half)
{
    const float pixel = (((across + down) + offset) + 1.0f) * half - 0.5f;
    const float above = pixel > -2.0f ? pixel : -2.0f;
    return above < 2 * half + 1 ? above : 2 * half + 1;
}

/* Where a whole coordinate lies in a plane; the fill lies behind the pixels. */
TARGET static inline int32_t ISA(placed)(int32_t x, int32_t y, int32_t width, int32_t height)
{
    const int inside = (x >= 0) & (x < width) & (y >= 0) & (y < height);
    return inside ? y * width + x : width * height;
}

TARGET static void ISA(nearest_places)(const view *v, int64_t y, int64_t x, int64_t n, int32_t width, int32_t height,
                                       int32_t *restrict place)
{
    const float *restrict across_x = v->across[0] + x, *restrict across_y = v->across[1] + x;
    const float down_x = v->down[0][y], down_y = v->down[1][y], offset_x = v->offset[0], offset_y = v->offset[1];
    const float half_x = (float)width / 2, half_y = (float)height / 2;
    for (int64_t i = 0; i < n; i++) {
        const float from_x = ISA(coordinate)(across_x[i], down_x, offset_x, half_x);
        const float from_y = ISA(coordinate)(across_y[i], down_y, offset_y, half_y);
        const int32_t column = (int32_t)((from_x + NEAREST) - NEAREST), line = (int32_t)((from_y + NEAREST) - NEAREST);
        place[i] = ISA(placed)(column, line, width, height);
    }
}

TARGET static void ISA(read_nearest)(const job *j, const view *v, int64_t y, int64_t x, int64_t n, scratch *w,
                                     uint8_t *const *to)
{
    ISA(nearest_places)(v, y, x, n, (int32_t)j->width, (int32_t)j->height, w->place);
    ISA(pick)(v->pixel, w->place, w->corner[0], n);
    for (int64_t c = 0; c < j->channels; c++)
        ISA(unzip)(w->corner[0], to[c], n, c);
}

/* One axis of a row's coordinates: the whole ones to the left of them, and the rest. */
TARGET static void ISA(split)(const float *restrict across, float down, float offset, float half,
                              int32_t *restrict whole, float *restrict rest, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const float from = ISA(coordinate)(across[i], down, offset, half), left = floorf(from);
        whole[i] = (int32_t)left;
        rest[i] = from - left;
    }
}

TARGET static void ISA(places)(const int32_t *restrict column, const int32_t *restrict line, int32_t right, int32_t low,
                               int32_t width, int32_t height, int32_t *restrict place, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        place[i] = ISA(placed)(column[i] + right, line[i] + low, width, height);
}

TARGET static inline int32_t ISA(channel_of)(uint32_t pixel, int shift)
{
    return (int32_t)(pixel >> shift & 255);
}

TARGET static void ISA(blend_corners)(uint32_t *const *corner, const float *restrict right, const float *restrict low,
                                      uint8_t *restrict to, int64_t n, int64_t channel)
{
    const uint32_t *restrict p00 = corner[0], *restrict p10 = corner[1];
    const uint32_t *restrict p01 = corner[2], *restrict p11 = corner[3];
    const int s = 8 * (int)channel;
    for (int64_t i = 0; i < n; i++) {
        const int32_t a = ISA(channel_of)(p00[i], s), b = ISA(channel_of)(p10[i], s);
        const int32_t c = ISA(channel_of)(p01[i], s), d = ISA(channel_of)(p11[i], s);
        const double upper = (double)a + (double)(b - a) * (double)right[i];
        const double lower = (double)c + (double)(d - c) * (double)right[i];
        to[i] = (uint8_t)(int32_t)((upper + (lower - upper) * (double)low[i] + NEAREST_DOUBLE) - NEAREST_DOUBLE);
    }
}

/* warp.read_bilinear */
TARGET static void ISA(read_bilinear)(const job *j, const view *v, int64_t y, int64_t x, int64_t n, scratch *w,
                                      uint8_t *const *to)
{
    const int32_t width = (int32_t)j->width, height = (int32_t)j->height, size[2] = {width, height};
    for (int axis = 0; axis < 2; axis++)
        ISA(split)(v->across[axis] + x, v->down[axis][y], v->offset[axis], (float)size[axis] / 2, w->whole[axis],
                   w->rest[axis], n);
    for (int k = 0; k < 4; k++) {
        ISA(places)(w->whole[0], w->whole[1], k % 2, k / 2, width, height, w->place, n);
        ISA(pick)(v->pixel, w->place, w->corner[k], n);
    }
    for (int64_t c = 0; c < j->channels; c++)
        ISA(blend_corners)(w->corner, w->rest[0], w->rest[1], to[c], n, c);
}
