/* What one call is asked for, what is drawn for a sample, and where a thread keeps an image that it works on.
 *
 * Suffixes and letters as in Python: B samples, C channels, H rows, W columns. `job` and `pasting` are mirrored field
 * by field in fused_cpu.py.
 */
#ifndef ROBUST_DIST_JOB_H
#define ROBUST_DIST_JOB_H
#include <stdint.h>

enum { MAX_CHANNELS = 3 };

enum {
    IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS, COLOR, CONTRAST, SHARPNESS, POSTERIZE,
    SOLARIZE, AUTOCONTRAST, EQUALIZE
};

/* What computes an operation, as robust_dist/augment/trivial.py; from LEVELS on, a table from level to level does. */
enum { NOTHING, WARP, GREYED, SHARPENED, LEVELS, CONTRASTED, STRETCHED, EQUALIZED };

enum { NO_MIXING, OF_EACH, OF_BATCH };

typedef struct {
    const uint8_t *images;    /* [N, C, H, W], or [N, H, W, C] with images_last */
    const int64_t *index;     /* [B] samples of the batch; NULL: all in their order */
    const int64_t *labels;    /* [B] */
    const int64_t *keys;      /* [B]; NULL with `op` */
    const int64_t *partner;   /* [B] with OF_BATCH */
    const int64_t *op, *magnitude_bin;
    const uint8_t *negative;  /* a plan of TrivialAugment alone, each [B]; NULL: drawn by the keys */
    const uint8_t *luts;      /* tables.lut_table, [rows, 256] */
    const float *factors;     /* tables.factor_table, [rows, 2] */
    const double *matrices;   /* tables.matrix_table, [rows, 8] */
    const uint8_t *fill;      /* [C], outside of a warped image */
    const double *beta;       /* beta.beta_table, [2, knots]; NULL: uniform */
    const void *scale;        /* [C, 256], what is written for each level; NULL: the levels, in NCHW */
    const uint8_t *scale_bytes; /* [C, bytes, 256], the same a byte at a time */
    void *out;                /* [B, C, H, W], or [B, H, W, C] with out_last, of `bytes` an element */
    float *targets;           /* [B, classes]; NULL: none */
    double flip_p, cutmix_p;
    int64_t batch, channels, height, width, classes, block, knots, bins;
    int32_t images_last, out_last, bytes, threads;
    int32_t cropped, padding, padding_fill, flipped, trivial, bilinear, mixing;
} job;

typedef struct {
    int64_t place;          /* of the stored image in `images` */
    int64_t partner;        /* position in the batch */
    int64_t row;            /* in TrivialAugment's tables */
    int32_t kind;
    int32_t top, left;      /* what the crop adds to an output row and column */
    int32_t flip;
    int32_t box[4];         /* x1, y1, x2, y2 */
    uint8_t lut[MAX_CHANNELS][256]; /* of the kinds that look at the image */
} sample;

/* One sample's image after crop and flip, and, for a warp, its sampling grid. */
typedef struct {
    const sample *of;
    uint8_t *plane[MAX_CHANNELS]; /* H W levels; 64 bytes before and behind them can be read */
    uint32_t *pixel;              /* for a warp: all channels of a pixel, and behind the last one the fill */
    uint8_t *apart;               /* one row of one channel */
    float *across[2], *down[2], offset[2];
} view;

typedef struct {
    view own, other;
    uint8_t *band[MAX_CHANNELS], *pasted[MAX_CHANNELS];
    int32_t *place;      /* of a row's pixels in a view */
    uint32_t *corner[4]; /* those pixels; bilinear: the four around each */
    int32_t *whole[2];   /* bilinear: columns and rows of the upper left ones */
    float *rest[2];
} scratch;

typedef struct {
    const void *images;
    void *out;
    const int64_t *partner; /* [B] */
    const int64_t *box;     /* [B, 4] */
    int64_t batch, planes, height, width, pixel; /* pixel: bytes */
    int32_t threads;
} pasting;
#endif
