/* Brightness to Equalize, with the roundings of robust_dist/augment/levels.py; included once per instruction set. */

TARGET static inline int32_t ISA(to_level)(float x)
{
    const float above = x > 0.0f ? x : 0.0f;
    return (int32_t)(above < 255.0f ? above : 255.0f);
}

TARGET static inline int32_t ISA(luma)(int32_t red, int32_t green, int32_t blue)
{
    return (int32_t)MULTIPLY_ADD((float)blue, 0.114f, MULTIPLY_ADD((float)green, 0.587f, (float)red * 0.2989f));
}

/* levels.color: columns [x, x + n) of one row. */
TARGET static void ISA(color)(const uint8_t *restrict r, const uint8_t *restrict g, const uint8_t *restrict b,
                              uint8_t *restrict to_r, uint8_t *restrict to_g, uint8_t *restrict to_b, int64_t n,
                              float f, float rest)
{
    for (int64_t x = 0; x < n; x++) {
        const float grey = (float)ISA(luma)(r[x], g[x], b[x]);
        to_r[x] = (uint8_t)ISA(to_level)(MULTIPLY_ADD(grey, rest, (float)r[x] * f));
        to_g[x] = (uint8_t)ISA(to_level)(MULTIPLY_ADD(grey, rest, (float)g[x] * f));
        to_b[x] = (uint8_t)ISA(to_level)(MULTIPLY_ADD(grey, rest, (float)b[x] * f));
    }
}

/* levels.sharpness: n pixels of one row, with those above and below; every row can be read one pixel further. */
TARGET static void ISA(sharpen)(const uint8_t *restrict above, const uint8_t *restrict here,
                                const uint8_t *restrict below, uint8_t *restrict to, int64_t n, float rest)
{
    const float thirteenth = (float)(1.0 / 13);
    for (int64_t x = 0; x < n; x++) {
        const int32_t left = above[x - 1] + here[x - 1] + below[x - 1];
        const int32_t right = above[x + 1] + here[x + 1] + below[x + 1];
        const int32_t total = left + right + above[x] + 5 * here[x] + below[x];
        const float blurred = ((float)total * thirteenth + NEAREST) - NEAREST, inner = (float)here[x];
        to[x] = (uint8_t)ISA(to_level)(MULTIPLY_ADD(blurred - inner, rest, inner));
    }
}

/* The sum of the grey levels of an image. */
TARGET static int64_t ISA(grey_sum)(const job *j, const view *v)
{
    const int64_t pixels = j->height * j->width;
    const uint8_t *r = v->plane[0], *g = v->plane[1], *b = v->plane[2];
    int64_t sum = 0;
    for (int64_t start = 0; start < pixels; start += 65536) {
        const int64_t stop = pixels - start < 65536 ? pixels : start + 65536;
        int32_t part = 0;
        if (j->channels == 1)
            for (int64_t x = start; x < stop; x++)
                part += r[x];
        else
            for (int64_t x = start; x < stop; x++)
                part += ISA(luma)(r[x], g[x], b[x]);
        sum += part;
    }
    return sum;
}

TARGET static void ISA(contrast_lut)(const job *j, const view *v, sample *s)
{
    const float mean = (float)((double)ISA(grey_sum)(j, v) / (double)(j->height * j->width));
    const float f = j->factors[2 * s->row], rest = j->factors[2 * s->row + 1];
    for (int level = 0; level < 256; level++)
        s->lut[0][level] = (uint8_t)ISA(to_level)(fmaf(mean, rest, (float)level * f));
    for (int64_t c = 1; c < j->channels; c++)
        memcpy(s->lut[c], s->lut[0], 256);
}

TARGET static void ISA(autocontrast_lut)(const uint8_t *restrict plane, int64_t pixels, uint8_t *restrict lut)
{
    int low = 255, high = 0;
    for (int64_t x = 0; x < pixels; x++) {
        low = plane[x] < low ? plane[x] : low;
        high = plane[x] > high ? plane[x] : high;
    }
    const float scale = (float)(high - low) * (float)(1.0 / 255);
    for (int level = 0; level < 256; level++)
        lut[level] = (uint8_t)(high > low ? ISA(to_level)((float)(level - low) / scale) : level);
}

TARGET static void ISA(equalize_lut)(const uint8_t *restrict plane, int64_t pixels, uint8_t *restrict lut)
{
    int32_t counts[4][256] = {{0}}; /* equal neighbours would wait for each other in one */
    int64_t x = 0;
    for (; x + 4 <= pixels; x += 4)
        for (int k = 0; k < 4; k++)
            counts[k][plane[x + k]]++;
    for (; x < pixels; x++)
        counts[0][plane[x]]++;
    int32_t before[256], sum = 0, last = 0;
    for (int level = 0; level < 256; level++) {
        const int32_t count = counts[0][level] + counts[1][level] + counts[2][level] + counts[3][level];
        before[level] = sum;
        sum += count;
        last = count ? count : last;
    }
    const int32_t step = (int32_t)(pixels - last) / 255;
    for (int level = 0; level < 256; level++) {
        const int32_t spread = step ? (int32_t)((double)(before[level] + step / 2) / (double)step) : level;
        lut[level] = (uint8_t)(spread < 255 ? spread : 255);
    }
}

/* The table of a kind that looks at the whole image. */
TARGET static void ISA(find_lut)(const job *j, const view *v, sample *s)
{
    const int64_t pixels = j->height * j->width;
    if (s->kind == CONTRASTED)
        ISA(contrast_lut)(j, v, s);
    for (int64_t c = 0; c < j->channels; c++)
        if (s->kind == STRETCHED)
            ISA(autocontrast_lut)(v->plane[c], pixels, s->lut[c]);
        else if (s->kind == EQUALIZED)
            ISA(equalize_lut)(v->plane[c], pixels, s->lut[c]);
}
