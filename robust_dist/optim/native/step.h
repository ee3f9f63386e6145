/* One step of n consecutive elements, included once per element type and instruction set.
 *
 * Defines ROW(name)(p, g, m, v, z, n, c) for REAL; see `scalars` in fused.c. Every element goes through the same IEEE
 * operations whatever the vector's width (-ffp-contract=off), so that a tensor cut in pieces gives the same bits.
 */
TARGET static void ROW(moments)(const REAL *restrict g, REAL *restrict m, REAL *restrict v, int64_t n, const scalars *c)
{
    const REAL rate = (REAL)c->rate, beta2 = (REAL)c->beta2, share = (REAL)c->share, eps = (REAL)c->added_eps;
    const REAL scale = (REAL)c->grad_scale;
    for (int64_t i = 0; i < n; i++) {
        const REAL belief = g[i] * scale - m[i];
        m[i] = m[i] + rate * belief;                     /* eq. 6 */
        v[i] = beta2 * v[i] + share * belief * belief + eps; /* eq. 16 */
    }
}

TARGET static void ROW(rectified)(REAL *restrict p, const REAL *restrict g, REAL *restrict m, REAL *restrict v,
                                  int64_t n, const scalars *c)
{
    const REAL rate = (REAL)c->rate, beta2 = (REAL)c->beta2, share = (REAL)c->share, eps = (REAL)c->added_eps;
    const REAL scale = (REAL)c->grad_scale, decay = (REAL)c->decay, size = (REAL)c->step_size;
    const REAL inner = (REAL)c->inner, outer = (REAL)c->outer;
    for (int64_t i = 0; i < n; i++) {
        const REAL belief = g[i] * scale - m[i];
        const REAL mean = m[i] + rate * belief;
        const REAL variance = beta2 * v[i] + share * belief * belief + eps;
        m[i] = mean;
        v[i] = variance;
        p[i] = p[i] * decay - size * (mean / (ROOT(variance + inner) + outer)); /* eq. 19 */
    }
}

TARGET static void ROW(unrectified)(REAL *restrict p, const REAL *restrict g, REAL *restrict m, REAL *restrict v,
                                    int64_t n, const scalars *c)
{
    const REAL rate = (REAL)c->rate, beta2 = (REAL)c->beta2, share = (REAL)c->share, eps = (REAL)c->added_eps;
    const REAL scale = (REAL)c->grad_scale, decay = (REAL)c->decay, size = (REAL)c->step_size;
    for (int64_t i = 0; i < n; i++) {
        const REAL belief = g[i] * scale - m[i];
        const REAL mean = m[i] + rate * belief;
        m[i] = mean;
        v[i] = beta2 * v[i] + share * belief * belief + eps;
        p[i] = p[i] * decay - size * mean; /* eq. 20 */
    }
}

/* Schedule-free averaging, as robust_dist/optim/averaging.py has it. */
TARGET static void ROW(averaged)(REAL *restrict p, const REAL *restrict g, REAL *restrict m, REAL *restrict v,
                                 REAL *restrict z, int64_t n, const scalars *c)
{
    const REAL rate = (REAL)c->rate, beta2 = (REAL)c->beta2, share = (REAL)c->share, eps = (REAL)c->added_eps;
    const REAL scale = (REAL)c->grad_scale, size = (REAL)c->step_size, inner = (REAL)c->inner, outer = (REAL)c->outer;
    const REAL fade = (REAL)c->fade, mix = (REAL)c->mix, push = (REAL)c->push;
    const int divides = c->kind == RECTIFIED;
    for (int64_t i = 0; i < n; i++) {
        const REAL gradient = g[i] * scale, belief = gradient - m[i];
        const REAL variance = beta2 * v[i] + share * belief * belief + eps;
        m[i] = m[i] + rate * belief;
        v[i] = variance;
        const REAL root = divides ? ROOT(variance + inner) + outer : (REAL)1;
        const REAL move = size * (gradient / root) + fade * p[i];
        p[i] = p[i] + mix * (z[i] - p[i]) + push * move;
        z[i] = z[i] - move;
    }
}

/* Six runs side by side: one alone waits for the memory. */
TARGET static double ROW(sum_abs)(const REAL *g, int64_t n)
{
    double lanes[16] = {0}, total = 0;
    const int64_t run = n / 96 * 16;
    int64_t i = 0;
    for (; i < run; i += 16)
        for (int which = 0; which < 6; which++)
            for (int lane = 0; lane < 16; lane++)
                lanes[lane] += fabs((double)g[which * run + i + lane]);
    for (i = 6 * run; i + 16 <= n; i += 16)
        for (int lane = 0; lane < 16; lane++)
            lanes[lane] += fabs((double)g[i + lane]);
    for (; i < n; i++)
        total += fabs((double)g[i]);
    for (int lane = 0; lane < 16; lane++)
        total += lanes[lane];
    return total;
}

TARGET static void ROW(step)(REAL *p, const REAL *g, REAL *m, REAL *v, REAL *z, int64_t n, const scalars *c)
{
    if (c->kind == KEEP)
        ROW(moments)(g, m, v, n, c);
    else if (z)
        ROW(averaged)(p, g, m, v, z, n, c);
    else if (c->kind == RECTIFIED)
        ROW(rectified)(p, g, m, v, n, c);
    else
        ROW(unrectified)(p, g, m, v, n, c);
}
