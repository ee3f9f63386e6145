/* RAdaBeliefW's step on the CPU: one pass over all tensors of a batch, in chunks dealt to OpenMP's threads.
 *
 * A plain C library without Python's or torch's headers, called through ctypes. No flag of its build may change the
 * arithmetic of the process (no -ffast-math). The equations are those of robust_dist/optim/reference.py.
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

/* Elements of a chunk. Long ones keep the processor's prefetching going, short ones share few elements evenly. */
#define LEAST 32768
#define MOST 262144
#define PER_THREAD 8
#define PIECE 256
#define SUMMED 131072 /* elements whose absolute values are summed at a time */

enum { F32, F64, BF16, F16 };
enum { KEEP, UNRECTIFIED, RECTIFIED };

typedef struct {
    double rate;       /* 1 - beta1 */
    double beta2;
    double share;      /* (1 - beta2) beta1^2 */
    double added_eps;
    double grad_scale; /* unscales the gradient and turns its sign */
    double decay, step_size, inner, outer;
    double fade, mix, push; /* of averaging: 1 - decay, and the factors of z - y and of the move in the new y */
    int32_t kind;
    int32_t threads;
} scalars;

typedef struct {
    void *const *params;
    void *const *grads;
    void *const *exp_avgs;
    void *const *exp_avg_sqs;
    void *const *masters; /* NULL where there are none */
    void *const *zs;      /* NULL without averaging */
    const int64_t *numels;
    const uint64_t *keys;  /* of rounding.py, as are the indices of the first elements; NULL rounds to the nearest */
    const int64_t *firsts;
    int64_t count;
    int32_t param_kind, grad_kind, exp_avg_kind;
} tensors;

/* Where the random bits of a run of elements come from. */
typedef struct {
    uint64_t key;
    int64_t index; /* of the run's first element; the run does not cross a multiple of 2^32 */
    int shift;     /* 0 for a parameter, 16 for an exp_avg */
} source;

static inline float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t to_bfloat(float value)
{
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t nan = (bits & 0x7fffffff) > 0x7f800000;
    return (uint16_t)(nan ? 0x7fc0 : rounded);
}

/* Up or down by 16 random bits; what is not finite stays. */
static inline uint16_t to_bfloat_by(float value, uint32_t random)
{
    const uint32_t bits = as_bits(value), size = bits & 0x7fffffff;
    const uint32_t special = size > 0x7f800000 ? 0x7fc0 : bits >> 16;
    return (uint16_t)(size < 0x7f800000 ? (bits + random) >> 16 : special);
}

static inline float from_half(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
    const float normal = as_float(rest + (112u << 23));
    const float small = as_float(rest + (113u << 23)) - as_float(113u << 23); /* subnormal halves */
    const float special = as_float(rest | 0x7f800000);
    const float size = rest < (1u << 23) ? small : rest >= (31u << 23) ? special : normal;
    return as_float(as_bits(size) | sign);
}

static inline uint16_t to_half(float value)
{
    const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    /* Below 2^-14 the sum's own rounding places the subnormal's bits. */
    const uint32_t small = as_bits(as_float(size) + 0.5f) - as_bits(0.5f);
    const uint32_t normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    const uint32_t special = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t found = size >= 0x47800000 ? special : size < (113u << 23) ? small : normal;
    return (uint16_t)(found | sign);
}

#define TARGET
#define ISA(name) name##_portable
#include "isa.h"
#undef TARGET
#undef ISA

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86 1
#define TARGET __attribute__((target("avx2,fma")))
#define ISA(name) name##_avx2
#include "isa.h"
#undef TARGET
#undef ISA
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define ISA(name) name##_avx512
#include "isa.h"
#undef TARGET
#undef ISA
#endif

typedef void (*runner)(const tensors *, int64_t, int64_t, int64_t, const scalars *);

/* 0: portable C, 1: AVX2, 2: AVX-512. */
int robust_dist_widest(void)
{
#ifdef HAS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

static runner choose(int isa)
{
#ifdef HAS_X86
    if (isa == 2)
        return run_avx512;
    if (isa == 1)
        return run_avx2;
#endif
    return run_portable;
}

typedef double (*summer)(const void *, int, int64_t);

static summer choose_sum(int isa)
{
#ifdef HAS_X86
    if (isa == 2)
        return sum_abs_avx512;
    if (isa == 1)
        return sum_abs_avx2;
#endif
    return sum_abs_portable;
}

static pid_t loaded_by;

__attribute__((constructor)) static void note_process(void)
{
    loaded_by = getpid();
}

static int64_t chunk_size(int64_t elements, int threads)
{
    const int64_t fair = elements / (PER_THREAD * (threads > 1 ? threads : 1)) / PIECE * PIECE;
    return fair < LEAST ? LEAST : fair > MOST ? MOST : fair;
}

static int64_t chunks_of(int64_t numel, int64_t size)
{
    return (numel + size - 1) / size;
}

typedef struct {
    int64_t tensor, before; /* a tensor, and the chunks of those before it */
} cursor;

/* Find a chunk that does not lie before the cursor's tensor; returns its number of elements. */
static int64_t find(const int64_t *numels, int64_t size, int64_t chunk, cursor *at, int64_t *first)
{
    while (chunk - at->before >= chunks_of(numels[at->tensor], size))
        at->before += chunks_of(numels[at->tensor++], size);
    *first = (chunk - at->before) * size;
    const int64_t left = numels[at->tensor] - *first;
    return left < size ? left : size;
}

static int64_t total(const int64_t *numels, int64_t count)
{
    int64_t elements = 0;
    for (int64_t i = 0; i < count; i++)
        elements += numels[i];
    return elements;
}

/* Into how many chunks tensors of these sizes are cut. */
int64_t robust_dist_chunks(const int64_t *numels, int64_t count, int threads)
{
    const int64_t size = chunk_size(total(numels, count), threads);
    int64_t chunks = 0;
    for (int64_t i = 0; i < count; i++)
        chunks += chunks_of(numels[i], size);
    return chunks;
}

/* Write a chunk's tensor, its first element and its number of elements to `found`. */
void robust_dist_chunk(const int64_t *numels, int64_t count, int threads, int64_t chunk, int64_t *found)
{
    cursor at = {0, 0};
    found[2] = find(numels, chunk_size(total(numels, count), threads), chunk, &at, &found[1]);
    found[0] = at.tensor;
}

/* Step one chunk, and write to `found` which one it was. */
void robust_dist_step_chunk(const tensors *t, const scalars *c, int isa, int64_t chunk, int64_t *found)
{
    robust_dist_chunk(t->numels, t->count, c->threads, chunk, found);
    choose(isa)(t, found[0], found[1], found[2], c);
}

/* Step all tensors; `isa` must not be above robust_dist_widest(). */
void robust_dist_step(const tensors *t, const scalars *c, int isa)
{
    const runner run = choose(isa);
    const int64_t elements = total(t->numels, t->count), size = chunk_size(elements, c->threads);
    const int64_t chunks = robust_dist_chunks(t->numels, t->count, c->threads);
    int64_t next = 0;
    /* A forked child has none of its parent's OpenMP threads and would wait for them. */
    const int alone = getpid() != loaded_by || elements <= LEAST || c->threads < 2;
#pragma omp parallel num_threads(c->threads) if (!alone)
    {
        cursor at = {0, 0};
        for (;;) {
            int64_t mine, first;
#pragma omp atomic capture
            mine = next++;
            if (mine >= chunks)
                break;
            const int64_t n = find(t->numels, size, mine, &at, &first);
            run(t, at.tensor, first, n, c);
        }
    }
}

/* The sum of the absolute values of all elements, added in one order whatever the number of threads. */
double robust_dist_sum_abs(void *const *from, const int64_t *numels, int64_t count, int kind, int threads, int isa)
{
    static const int64_t sizes[] = {4, 8, 2, 2};
    const summer sum = choose_sum(isa);
    const int alone = getpid() != loaded_by || threads < 2 || total(numels, count) <= SUMMED;
    int64_t chunks = 0;
    for (int64_t i = 0; i < count; i++)
        chunks += chunks_of(numels[i], SUMMED);
    double sums[1024], found = 0; /* chunks by the thousand, so that their sums lie on the stack */
    for (int64_t start = 0; start < chunks; start += 1024) {
        const int64_t end = chunks - start < 1024 ? chunks : start + 1024;
#pragma omp parallel num_threads(threads) if (!alone)
        {
            cursor at = {0, 0};
#pragma omp for schedule(static)
            for (int64_t chunk = start; chunk < end; chunk++) {
                int64_t first;
                const int64_t n = find(numels, SUMMED, chunk, &at, &first);
                sums[chunk - start] = sum((const char *)from[at.tensor] + first * sizes[kind], kind, n);
            }
        }
        for (int64_t chunk = start; chunk < end; chunk++)
            found += sums[chunk - start];
    }
    return found;
}
