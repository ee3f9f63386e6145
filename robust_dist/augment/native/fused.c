/* The training augmentation on the CPU: gather, crop, flip, TrivialAugment, CutMix, normalise and cast in one pass.
 *
 * A plain C library without Python's or torch's headers, called through ctypes; OpenMP's threads take samples. Every
 * result has the bits of the operations of torch in robust_dist/augment/: no flag of the build may change arithmetic
 * (no -ffast-math, -ffp-contract=off), and what rounds once is a MULTIPLY_ADD.
 */
#define _DEFAULT_SOURCE
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#include "draws.h"

#define NEAREST 12582912.0f /* 3 * 2^22 */
#define NEAREST_DOUBLE 6755399441055744.0 /* 3 * 2^51 */
#define MANY 65536          /* output values from which threads are worth their start */
#define LARGE (32u << 20)   /* bytes that glibc maps, and unmaps, for one array alone */
#define BAND 4096           /* pixels that are written at a time, where a row has fewer */

static int64_t band_rows(const job *j)
{
    const int64_t rows = BAND / j->width;
    return rows < 1 ? 1 : rows < j->height ? rows : j->height;
}

#define TARGET
#define ISA(name) name##_portable
#ifdef __FP_FAST_FMAF
#define MULTIPLY_ADD(a, b, c) fmaf(a, b, c)
#else /* with levels and factors the sum in double is exact */
#define MULTIPLY_ADD(a, b, c) ((float)((double)(a) * (double)(b) + (double)(c)))
#endif
#include "loops.h"
#include "isa.h"
#undef TARGET
#undef ISA
#undef MULTIPLY_ADD

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86 1
#define MULTIPLY_ADD(a, b, c) fmaf(a, b, c)
#define TARGET __attribute__((target("avx2,fma")))
#define ISA(name) name##_avx2
#include "loops.h"
#include "isa.h"
#undef TARGET
#undef ISA
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define ISA(name) name##_avx512
#include "loops.h"
#include "isa.h"
#undef TARGET
#undef ISA
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,prefer-vector-width=512")))
#define ISA(name) name##_vbmi
#include "vbmi.h"
#include "isa.h"
#undef TARGET
#undef ISA
#endif

typedef struct {
    void (*prepare)(const job *, int64_t, sample *, scratch *);
    void (*finish)(const job *, int64_t, const sample *, scratch *);
} passes;

/* 0: portable C, 1: AVX2, 2: AVX-512, 3: AVX-512 with VBMI. */
int robust_dist_widest(void)
{
#ifdef HAS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512vbmi") ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

static passes choose(int isa)
{
#ifdef HAS_X86
    if (isa == 3)
        return (passes){prepare_vbmi, finish_vbmi};
    if (isa == 2)
        return (passes){prepare_avx512, finish_avx512};
    if (isa == 1)
        return (passes){prepare_avx2, finish_avx2};
#endif
    return (passes){prepare_portable, finish_portable};
}

static pid_t loaded_by;

__attribute__((constructor)) static void note_process(void)
{
    loaded_by = getpid();
#ifdef HAS_X86
    fill_orders();
#endif
}

/* A forked child has none of its parent's OpenMP threads and would wait for them. */
static int threads_for(int64_t values, int32_t wanted)
{
    return getpid() != loaded_by || values <= MANY || wanted < 1 ? 1 : wanted;
}

static void *take(uintptr_t *from, int64_t bytes)
{
    const uintptr_t taken = *from;
    *from += (uintptr_t)(bytes + 63) / 64 * 64;
    return (void *)taken;
}

static void place_view(const job *j, view *v, uintptr_t *from)
{
    for (int64_t c = 0; c < j->channels; c++) {
        take(from, 64);
        v->plane[c] = take(from, j->height * j->width + 64);
    }
    v->pixel = take(from, j->trivial ? 4 * (j->height * j->width + 1) : 0);
    v->apart = take(from, j->width);
    for (int axis = 0; axis < 2; axis++) {
        v->across[axis] = take(from, 4 * j->width);
        v->down[axis] = take(from, 4 * j->height);
    }
}

/* Lay a thread's scratch out from `from` on; returns where it ends. */
static uintptr_t place_scratch(const job *j, scratch *w, uintptr_t from)
{
    memset(w, 0, sizeof *w);
    place_view(j, &w->own, &from);
    place_view(j, &w->other, &from);
    for (int64_t c = 0; c < j->channels; c++) {
        w->band[c] = take(&from, band_rows(j) * j->width);
        w->pasted[c] = take(&from, j->width);
    }
    w->place = take(&from, 4 * j->width);
    for (int k = 0; k < 4; k++)
        w->corner[k] = take(&from, 4 * j->width);
    for (int k = 0; k < 2; k++) {
        w->whole[k] = take(&from, 4 * j->width);
        w->rest[k] = take(&from, 4 * j->width);
    }
    return from;
}

/* Memory so large was mapped for this output alone: huge pages spare hundreds of faults an image. */
static void use_huge_pages(const job *j)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t bytes = (uintptr_t)(j->batch * j->channels * j->height * j->width * j->bytes);
    const uintptr_t out = (uintptr_t)j->out, start = (out + page - 1) / page * page, stop = (out + bytes) / page * page;
    if (bytes > LARGE)
        madvise((void *)start, stop - start, MADV_HUGEPAGE);
#endif
}

/* Deal the samples to threads, whose scratch of `each` bytes lies in `memory`. */
static void run_all(const job *j, passes run, int threads, sample *all, char *memory, size_t each)
{
    /* Threads write far from each other: on one new page both would wait for the kernel to clear it. */
    const int64_t share = j->batch / (8 * threads), run_length = share > 1 ? share : 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        scratch mine;
        place_scratch(j, &mine, (uintptr_t)(memory + each * (size_t)omp_get_thread_num()));
#pragma omp for schedule(dynamic, run_length)
        for (int64_t i = 0; i < j->batch; i++)
            run.prepare(j, i, all, &mine);
#pragma omp for schedule(dynamic, run_length) nowait
        for (int64_t i = 0; i < j->batch; i++)
            run.finish(j, i, all, &mine);
    }
}

/* Augment a batch; 0, or 1 where there is no memory. `isa` must not be above robust_dist_widest(). */
int robust_dist_augment(const job *j, int isa)
{
    const int threads = threads_for(j->batch * j->channels * j->height * j->width, j->threads);
    scratch sized;
    const size_t each = place_scratch(j, &sized, 0);
    sample *all = malloc((size_t)j->batch * sizeof *all);
    char *memory = aligned_alloc(64, each * (size_t)threads);
    if (all && memory) {
        use_huge_pages(j);
        run_all(j, choose(isa), threads, all, memory, each);
    }
    const int failed = !all || !memory;
    free(all);
    free(memory);
    return failed;
}

static int64_t clamped(int64_t value, int64_t high)
{
    return value < 0 ? 0 : value > high ? high : value;
}

static void paste_one(const pasting *p, int64_t i)
{
    const int64_t line = p->width * p->pixel, plane = p->height * line, image = p->planes * plane;
    const int64_t *box = p->box + 4 * i;
    const int64_t x1 = clamped(box[0], p->width), x2 = clamped(box[2], p->width);
    const int64_t y1 = clamped(box[1], p->height), y2 = clamped(box[3], p->height);
    const char *own = (const char *)p->images + i * image, *other = (const char *)p->images + p->partner[i] * image;
    char *out = (char *)p->out + i * image;
    memcpy(out, own, (size_t)image);
    if (x1 >= x2)
        return;
    for (int64_t k = 0; k < p->planes; k++)
        for (int64_t y = y1; y < y2; y++) {
            const int64_t at = k * plane + y * line + x1 * p->pixel;
            memcpy(out + at, other + at, (size_t)((x2 - x1) * p->pixel));
        }
}

/* CutMix of ready images of any type: [B, planes, H, W] pixels of p->pixel bytes. */
void robust_dist_paste(const pasting *p)
{
    const int threads = threads_for(p->batch * p->planes * p->height * p->width * p->pixel, p->threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < p->batch; i++)
        paste_one(p, i);
}
