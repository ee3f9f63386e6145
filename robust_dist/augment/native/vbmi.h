/* The loops over bytes with AVX-512 VBMI, 64 bytes at a time: four registers hold a table of 256 bytes. */
#include <immintrin.h>

typedef struct {
    __m512i part[4];
} table;

static uint8_t backwards[64];     /* 63 ... 0 */
static uint8_t by_bytes[2][64];   /* zip the bytes of two registers to pairs: the lower ones and the upper ones */
static uint16_t by_pairs[2][32];  /* the same of pairs */

static void fill_orders(void)
{
    for (int k = 0; k < 64; k++) {
        backwards[k] = (uint8_t)(63 - k);
        by_bytes[0][k] = (uint8_t)(k / 2 + k % 2 * 64);
        by_bytes[1][k] = (uint8_t)(32 + k / 2 + k % 2 * 64);
        by_pairs[0][k / 2] = (uint16_t)(k / 4 + k / 2 % 2 * 32);
        by_pairs[1][k / 2] = (uint16_t)(16 + k / 4 + k / 2 % 2 * 32);
    }
}

static inline uint64_t first_lanes(int64_t n)
{
    return n >= 64 ? ~(uint64_t)0 : n > 0 ? ((uint64_t)1 << n) - 1 : 0;
}

TARGET static inline table ISA(read_table)(const uint8_t *from)
{
    table t;
    for (int k = 0; k < 4; k++)
        t.part[k] = _mm512_loadu_si512(from + 64 * k);
    return t;
}

TARGET static inline __m512i ISA(look)(const table *t, __m512i levels)
{
    const __m512i dark = _mm512_permutex2var_epi8(t->part[0], levels, t->part[1]);
    const __m512i light = _mm512_permutex2var_epi8(t->part[2], levels, t->part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(levels), dark, light);
}

TARGET static void ISA(look_up)(const uint8_t *levels, const uint8_t *from, uint8_t *to, int64_t n)
{
    const table t = ISA(read_table)(levels);
    for (int64_t i = 0; i < n; i += 64) {
        const uint64_t lanes = first_lanes(n - i);
        _mm512_mask_storeu_epi8(to + i, lanes, ISA(look)(&t, _mm512_maskz_loadu_epi8(lanes, from + i)));
    }
}

TARGET static void ISA(shift_row)(const uint8_t *from, uint8_t *to, int64_t width, int64_t left, int flip, int fill)
{
    const __m512i around = _mm512_set1_epi8((char)fill), order = _mm512_loadu_si512(backwards);
    for (int64_t x = 0; x < width; x += 64) {
        const int64_t start = left + (flip ? width - 64 - x : x);
        const uint64_t inside = first_lanes(width - start) & ~first_lanes(-start);
        const __m512i read = _mm512_mask_loadu_epi8(around, inside, from + start);
        const __m512i turned = flip ? _mm512_permutexvar_epi8(order, read) : read;
        _mm512_mask_storeu_epi8(to + x, first_lanes(width - x), turned);
    }
}

/* `scale` of elements of 2 bytes, whose lower bytes are one table and whose upper bytes are another. */
TARGET static void ISA(store_pairs)(const uint8_t *scale, const uint8_t *from, uint16_t *to, int64_t n)
{
    const table low = ISA(read_table)(scale), high = ISA(read_table)(scale + 256);
    const __m512i order[2] = {_mm512_loadu_si512(by_bytes[0]), _mm512_loadu_si512(by_bytes[1])};
    for (int64_t i = 0; i < n; i += 64) {
        const uint64_t lanes = first_lanes(n - i);
        const __m512i levels = _mm512_maskz_loadu_epi8(lanes, from + i);
        const __m512i a = ISA(look)(&low, levels), b = ISA(look)(&high, levels);
        for (int k = 0; k < 2; k++)
            _mm512_mask_storeu_epi16(to + i + 32 * k, (uint32_t)(lanes >> (32 * k)),
                                     _mm512_permutex2var_epi8(a, order[k], b));
    }
}

/* As store_pairs, of elements of 4 bytes. */
TARGET static void ISA(store_quads)(const uint8_t *scale, const uint8_t *from, uint32_t *to, int64_t n)
{
    table part[4];
    for (int k = 0; k < 4; k++)
        part[k] = ISA(read_table)(scale + 256 * k);
    const __m512i bytes[2] = {_mm512_loadu_si512(by_bytes[0]), _mm512_loadu_si512(by_bytes[1])};
    const __m512i pairs[2] = {_mm512_loadu_si512(by_pairs[0]), _mm512_loadu_si512(by_pairs[1])};
    for (int64_t i = 0; i < n; i += 64) {
        const uint64_t lanes = first_lanes(n - i);
        const __m512i levels = _mm512_maskz_loadu_epi8(lanes, from + i);
        const __m512i a = ISA(look)(part, levels), b = ISA(look)(part + 1, levels);
        const __m512i c = ISA(look)(part + 2, levels), d = ISA(look)(part + 3, levels);
        for (int k = 0; k < 4; k++) {
            const __m512i lower = _mm512_permutex2var_epi8(a, bytes[k / 2], b);
            const __m512i upper = _mm512_permutex2var_epi8(c, bytes[k / 2], d);
            _mm512_mask_storeu_epi32(to + i + 16 * k, (uint16_t)(lanes >> (16 * k)),
                                     _mm512_permutex2var_epi16(lower, pairs[k % 2], upper));
        }
    }
}

TARGET static void ISA(store)(const job *j, int64_t c, const uint8_t *from, int64_t at, int64_t n, int64_t step)
{
    const uint8_t *scale = j->scale_bytes + 256 * c * j->bytes;
    if (step == 1 && j->bytes == 4)
        ISA(store_quads)(scale, from, (uint32_t *)j->out + at, n);
    else if (step == 1 && j->bytes == 2)
        ISA(store_pairs)(scale, from, (uint16_t *)j->out + at, n);
    else
        store_avx512(j, c, from, at, n, step);
}
