/* The loops over bytes in plain C, included once per instruction set that has none of its own (vbmi.h). */

/* to[i] = table[from[i]] */
TARGET static void ISA(look_up)(const uint8_t *restrict table, const uint8_t *restrict from, uint8_t *restrict to,
                                int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = table[from[i]];
}

/* to[x] = from[x + left] within a row, mirrored with flip, and fill where that is outside. */
TARGET static void ISA(shift_row)(const uint8_t *restrict from, uint8_t *restrict to, int64_t width, int64_t left,
                                  int flip, int fill)
{
    const int64_t start = left < 0 ? -left : 0, stop = left > 0 ? width - left : width;
    if (start >= stop) {
        memset(to, fill, (size_t)width);
        return;
    }
    const int64_t count = stop - start, before = flip ? width - stop : start, behind = width - count - before;
    const uint8_t *first = from + start + left;
    if (before)
        memset(to, fill, (size_t)before);
    if (behind)
        memset(to + before + count, fill, (size_t)behind);
    if (!flip)
        memcpy(to + before, first, (size_t)count);
    else
        for (int64_t x = 0; x < count; x++)
            to[before + x] = first[count - 1 - x];
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
STORE(uint8_t)
STORE(uint16_t)
STORE(uint32_t)
STORE(uint64_t)
#undef STORE

/* What `scale` has for n levels of channel c, from element `at` of the output on, `step` elements apart. */
TARGET static void ISA(store)(const job *j, int64_t c, const uint8_t *from, int64_t at, int64_t n, int64_t step)
{
    const void *scale = (const char *)j->scale + 256 * c * j->bytes;
    if (j->bytes == 1)
        ISA(store_uint8_t)(scale, from, (uint8_t *)j->out + at, n, step);
    else if (j->bytes == 2)
        ISA(store_uint16_t)(scale, from, (uint16_t *)j->out + at, n, step);
    else if (j->bytes == 4)
        ISA(store_uint32_t)(scale, from, (uint32_t *)j->out + at, n, step);
    else
        ISA(store_uint64_t)(scale, from, (uint64_t *)j->out + at, n, step);
}
