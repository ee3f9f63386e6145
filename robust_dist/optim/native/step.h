/* One step of n consecutive elements, included once per element type and instruction set.
 *
 * Defines ROW(name)(p, g, m, v, n, c) for REAL; see `scalars` in fused.c. Every element goes through the same IEEE
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

TARGET static void ROW(step)(REAL *p, const REAL *g, REAL *m, REAL *v, int64_t n, const scalars *c)
{
    if (c->kind == KEEP)
        ROW(moments)(g, m, v, n, c);
    else if (c->kind == RECTIFIED)
        ROW(rectified)(p, g, m, v, n, c);
    else
        ROW(unrectified)(p, g, m, v, n, c);
}
