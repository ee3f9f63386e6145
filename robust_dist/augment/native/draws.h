/* The draws of robust_dist/augment/keys.py, crop_flip.py, trivial.py and cutmix.py, in unsigned integers. */
#include <math.h>

#include "job.h"

#define GOLDEN 0x9E3779B97F4A7C15u

/* keys.Stream */
enum {
    OPERATION = 1, MAGNITUDE, SIGN, CROP_TOP, CROP_LEFT, FLIP, CUTMIX_APPLY, CUTMIX_SHARE, CUTMIX_X, CUTMIX_Y,
    CUTMIX_PARTNER
};

static inline uint64_t bits(int64_t key, int stream)
{
    uint64_t x = (uint64_t)key + ((uint64_t)stream + 1) * GOLDEN;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static inline int64_t to_int(uint64_t drawn, int64_t high)
{
    return (int64_t)(((drawn >> 32) * (uint64_t)high) >> 32);
}

static inline double to_uniform(uint64_t drawn)
{
    return (double)(int64_t)(drawn >> 11) * 0x1p-53;
}

/* beta.beta_share */
static double beta_share(double u, const double *table, int64_t knots)
{
    const double *probability = table, *share = table + knots;
    int64_t low = 0, high = knots; /* the first knot above u lies in [low, high] */
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (probability[middle] > u)
            high = middle;
        else
            low = middle + 1;
    }
    const int64_t right = low < 1 ? 1 : low > knots - 1 ? knots - 1 : low, left = right - 1;
    const double part = (u - probability[left]) / (probability[right] - probability[left]);
    return share[left] + (share[right] - share[left]) * part;
}

static void draw_box(const job *j, int64_t key, int32_t box[4])
{
    double cut = to_uniform(bits(key, CUTMIX_SHARE));
    if (j->beta)
        cut = beta_share(cut, j->beta, j->knots);
    for (int axis = 0; axis < 2; axis++) {
        const int64_t size = axis ? j->height : j->width;
        const int64_t half = (int64_t)(sqrt(cut) * (double)size) >> 1;
        const int64_t middle = to_int(bits(key, axis ? CUTMIX_Y : CUTMIX_X), size);
        box[axis] = (int32_t)(middle - half < 0 ? 0 : middle - half);
        box[axis + 2] = (int32_t)(middle + half > size ? size : middle + half);
    }
}

static void draw_mixing(const job *j, int64_t i, sample *s)
{
    const int64_t key = j->keys[j->mixing == OF_BATCH ? 0 : i];
    s->partner = i;
    if (j->cutmix_p < 1 && !(to_uniform(bits(key, CUTMIX_APPLY)) < j->cutmix_p))
        return;
    draw_box(j, key, s->box);
    if (j->mixing == OF_BATCH) {
        s->partner = j->partner[i];
        return;
    }
    const int64_t place = i % j->block, start = i - place;
    const int64_t size = j->batch - start < j->block ? j->batch - start : j->block;
    const int64_t ahead = to_int(bits(key, CUTMIX_PARTNER), size > 2 ? size - 1 : 1);
    s->partner = start + (place + 1 + ahead) % size;
}

static int32_t kind_of(const job *j, int64_t op)
{
    static const int32_t kinds[] = {NOTHING,    WARP,      WARP,   WARP,   WARP,      WARP,     LEVELS, GREYED,
                                    CONTRASTED, SHARPENED, LEVELS, LEVELS, STRETCHED, EQUALIZED};
    if ((op == COLOR && j->channels == 1) || (op == SHARPNESS && (j->height <= 2 || j->width <= 2)))
        return NOTHING;
    return kinds[op];
}

static void draw_operation(const job *j, int64_t i, sample *s)
{
    int64_t op, bin, negative;
    if (j->op) {
        op = j->op[i], bin = j->magnitude_bin[i], negative = j->negative[i] != 0;
    } else {
        op = to_int(bits(j->keys[i], OPERATION), 14);
        bin = to_int(bits(j->keys[i], MAGNITUDE), j->bins);
        negative = bits(j->keys[i], SIGN) >> 63;
    }
    s->row = (op * j->bins + bin) * 2 + negative;
    s->kind = kind_of(j, op);
}

/* All that is drawn for position i of the batch. */
static void draw(const job *j, int64_t i, sample *s)
{
    s->place = j->index ? j->index[i] : i;
    s->partner = i;
    s->row = 0;
    s->kind = NOTHING;
    s->top = s->left = s->flip = 0;
    s->box[0] = s->box[1] = s->box[2] = s->box[3] = 0;
    if (j->cropped) {
        s->top = (int32_t)(to_int(bits(j->keys[i], CROP_TOP), 2 * j->padding + 1) - j->padding);
        s->left = (int32_t)(to_int(bits(j->keys[i], CROP_LEFT), 2 * j->padding + 1) - j->padding);
    }
    if (j->flipped)
        s->flip = to_uniform(bits(j->keys[i], FLIP)) < j->flip_p;
    if (j->trivial)
        draw_operation(j, i, s);
    if (j->mixing)
        draw_mixing(j, i, s);
}

/* cutmix.soft_targets */
static void write_targets(const job *j, int64_t i, const sample *s)
{
    float *row = j->targets + i * j->classes;
    const int64_t own = j->labels[i], other = j->labels[s->partner];
    const int64_t pixels = j->height * j->width, box = (int64_t)(s->box[2] - s->box[0]) * (s->box[3] - s->box[1]);
    const float lam = (float)(pixels - box) / (float)pixels;
    for (int64_t k = 0; k < j->classes; k++)
        row[k] = 0;
    row[own] = lam;
    row[other] = own == other ? 1.0f : 1.0f - lam;
}
