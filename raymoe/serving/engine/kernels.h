/* Vector operations, matrix products and row operations of the native kernels. One thread, sums in float32.
 *
 * A weight [I, J] is stored in panels of 16 columns, [ceil(J/16)][I][16], zeros beyond J. In bfloat16 two neighbors
 * of a column share 32 bits: [ceil(J/16)][ceil(I/2)][16][2]. A panel is read once for all rows. The sum of a row
 * runs over I from first to last regardless of the other rows: outputs do not depend on them.
 */
#ifndef RAYMOE_KERNELS_H
#define RAYMOE_KERNELS_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define MOST 8 /* rows of a tile: with 2 panels they leave half of the registers */
#else
#define MOST 4
#endif

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

INLINE int up16(int n) { return (n + LANES - 1) / LANES * LANES; }
INLINE vec load(const float *at) { vec v; memcpy(&v, at, sizeof v); return v; }
INLINE void store(float *at, vec v) { memcpy(at, &v, sizeof v); }
INLINE float widen(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE vec load_half(const uint16_t *at) {
    hvec h;
    memcpy(&h, at, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}
INLINE uint16_t narrow(float f) { /* round to nearest, ties to even */
    uint32_t u;
    memcpy(&u, &f, 4);
    return f == f ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : 0x7fc0;
}
INLINE vec pick(ivec yes, vec a, vec b) { return (vec)((yes & (ivec)a) | (~yes & (ivec)b)); }
INLINE float total(vec v) {
    vec8 a, b;
    memcpy(&a, &v, 32);
    memcpy(&b, (char *)&v + 32, 32);
    a += b;
    vec4 c, d;
    memcpy(&c, &a, 16);
    memcpy(&d, (char *)&a + 16, 16);
    c += d;
    return (c[0] + c[2]) + (c[1] + c[3]);
}

INLINE vec exponential(vec x) { /* Cephes' expf, 2 ulp, clamped to the range of float32 */
    const vec zero = {0}, low = zero - 87.0f, high = zero + 88.0f;
    x = pick(x < low, low, pick(x > high, high, x));
    vec t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f; /* the nearest integer, also in the last bits of t */
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * (vec)(((ivec)t - 0x4b400000 + 127) << 23);
}

/* Rows in memory: row i is at `at + (which ? which[i] : i) * ld`. */
typedef struct { float *at; int ld; const int *which; } Rows;
INLINE float *row(Rows r, int i) { return r.at + (size_t)(r.which ? r.which[i] : i) * r.ld; }

/* M rows times V panels. */
INLINE void tile(const int M, const int V, int half, const char *w, size_t panel, int I, int J, int i0, Rows x,
                 Rows first, Rows y) {
    vec acc[MOST][4];
    const float *in[MOST];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        in[m] = row(x, i0 + m);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            acc[m][v] = (vec){0};
            int n = J - LANES * v;
            if (first.at) memcpy(&acc[m][v], row(first, i0 + m) + LANES * v, 4 * (n < LANES ? n : LANES));
        }
    }
    if (half) {
        for (int k = 0; k + 1 < I; k += 2) {
            uvec pair[4];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) pair[v] = *(const uvec *)(w + v * panel + 32 * k);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) {
                    acc[m][v] += (vec)(pair[v] << 16) * in[m][k];
                    acc[m][v] += (vec)(pair[v] & 0xffff0000) * in[m][k + 1];
                }
            }
        }
        if (I & 1)
            for (int m = 0; m < M; m++)
                for (int v = 0; v < V; v++)
                    acc[m][v] += (vec)(*(const uvec *)(w + v * panel + 32 * (I - 1)) << 16) * in[m][I - 1];
    } else {
        for (int k = 0; k < I; k++) {
            vec column[4];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) column[v] = *(const vec *)(w + v * panel + 64 * (size_t)k);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) acc[m][v] += column[v] * in[m][k];
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            int n = J - LANES * v;
            memcpy(row(y, i0 + m) + LANES * v, &acc[m][v], 4 * (n < LANES ? n : LANES));
        }
    }
}

/* One function per size: they compile in a fraction of the time of one function with all sizes. */
#define TILE(M, V, HALF) \
    static __attribute__((noinline)) void tile_##M##_##V##_##HALF( \
        const char *w, size_t panel, int I, int J, int i0, Rows x, Rows first, Rows y) { \
        tile(M, V, HALF, w, panel, I, J, i0, x, first, y); \
    }
#define NAME(M, V, HALF) [M][V][HALF] = tile_##M##_##V##_##HALF,
#define BOTH(DO, M, V) DO(M, V, 0) DO(M, V, 1)
#define FEW(DO, V) BOTH(DO, 1, V) BOTH(DO, 2, V) BOTH(DO, 3, V) BOTH(DO, 4, V)
#if MOST == 8
#define MORE(DO) BOTH(DO, 5, 2) BOTH(DO, 6, 2) BOTH(DO, 7, 2) BOTH(DO, 8, 2)
#else
#define MORE(DO)
#endif
#define ALL(DO) FEW(DO, 1) FEW(DO, 2) FEW(DO, 4) MORE(DO)
ALL(TILE)
static void (*const tiles[MOST + 1][5][2])(const char *, size_t, int, int, int, Rows, Rows, Rows) = {ALL(NAME)};

/* y = first + x @ w, for x [n, I] and y [n, J]; first.at NULL stands for zeros. */
static void product(int half, const void *weight, int I, int J, int n, Rows x, Rows first, Rows y) {
    const char *w = weight;
    size_t panel = half ? (size_t)(I + 1) / 2 * 64 : (size_t)I * 64;
    for (int j = 0; j < J;) {
        int left = (J - j + LANES - 1) / LANES, V = n <= 4 && left >= 4 ? 4 : left >= 2 ? 2 : 1;
        for (int i = 0; i < n;) {
            int rest = n - i, most = V == 2 ? MOST : 4, blocks = (rest + most - 1) / most, M = (rest + blocks - 1) / blocks;
            tiles[M][V][half](w, panel, I, J - j, i, x, first, y);
            i += M;
        }
        j += V * LANES, w += V * panel;
        first.at = first.at ? first.at + V * LANES : NULL;
        y.at += V * LANES;
    }
}

static const Rows NOTHING = {0};

static void norm(const float *x, const float *weight, int d, float *y) {
    vec squares = {0};
    float sum = 0;
    int i = 0;
    for (; i + LANES <= d; i += LANES) squares += load(x + i) * load(x + i);
    for (int j = i; j < d; j++) sum += x[j] * x[j];
    float scale = 1 / sqrtf((total(squares) + sum) / d + 1e-6f);
    for (int j = 0; j < d; j++) y[j] = x[j] * scale * weight[j];
}

static void read_rows(int half, const void *rows, size_t n, float *out) {
    if (!half) memcpy(out, rows, 4 * n);
    else for (size_t i = 0; i < n; i++) out[i] = widen(((const uint16_t *)rows)[i]);
}

static void write_rows(int half, const float *rows, size_t n, void *out) {
    if (!half) memcpy(out, rows, 4 * n);
    else for (size_t i = 0; i < n; i++) ((uint16_t *)out)[i] = narrow(rows[i]);
}

/* Weights of the selected groups: softmax of the logits over the selected groups or over all; softmax over all of
 * logit + bias; sigmoid of the logit, normalized over several selected groups (`raymoe.model.router.Gate`). */
enum gate { OVER_SELECTED, OVER_ALL, BIASED, SIGMOID };

/* Select the k of e groups with the highest logit + bias, best first, and weight them. */
static void choose(const float *logits, const float *bias, int e, int k, enum gate gate, int *index, float *weight) {
    for (int i = 0; i < k; i++) {
        int best = -1;
        for (int g = 0; g < e; g++) {
            int taken = 0;
            for (int j = 0; j < i; j++) taken |= index[j] == g;
            if (!taken && (best < 0 || logits[g] + bias[g] > logits[best] + bias[best])) best = g;
        }
        index[i] = best;
    }
    float most = -INFINITY, sum = 0;
    if (gate == SIGMOID && k == 1) {
        weight[0] = 1 / (1 + expf(-logits[index[0]]));
        return;
    }
    if (gate == SIGMOID) { /* softmax of log sigmoid: sigmoid / sum, also where every sigmoid underflows */
        for (int i = 0; i < k; i++) {
            float logit = logits[index[i]];
            weight[i] = fminf(logit, 0) - log1pf(expf(-fabsf(logit)));
            most = fmaxf(most, weight[i]);
        }
        for (int i = 0; i < k; i++) sum += weight[i] = expf(weight[i] - most);
        for (int i = 0; i < k; i++) weight[i] /= sum;
        return;
    }
    if (gate == BIASED) { /* the selected groups have the highest logit + bias: the first has the maximum */
        most = logits[index[0]] + bias[index[0]];
        for (int i = 0; i < e; i++) sum += expf(logits[i] + bias[i] - most);
        for (int i = 0; i < k; i++) weight[i] = expf(logits[index[i]] + bias[index[i]] - most) / sum;
        return;
    }
    int over_all = gate == OVER_ALL;
    for (int i = 0; i < (over_all ? e : k); i++) most = fmaxf(most, logits[over_all ? i : index[i]]);
    for (int i = 0; i < (over_all ? e : k); i++) sum += expf(logits[over_all ? i : index[i]] - most);
    for (int i = 0; i < k; i++) weight[i] = expf(logits[index[i]] - most) / sum;
}

/* Stable sort of the n entries of `group` [n] into `order`; group g is order[start[g]] to order[start[g + 1]]. */
static void sort(const int *group, int n, int groups, int *order, int *start) {
    memset(start, 0, sizeof(int) * (groups + 1));
    for (int i = 0; i < n; i++) start[group[i] + 1]++;
    for (int g = 0; g < groups; g++) start[g + 1] += start[g];
    for (int i = 0; i < n; i++) order[start[group[i]]++] = i;
    for (int g = groups; g > 0; g--) start[g] = start[g - 1];
    start[0] = 0;
}

/* Parts of one allocation; with base NULL, `take` only counts bytes. */
typedef struct { char *base; size_t used; } Scratch;
static void *take(Scratch *s, size_t bytes) {
    char *at = s->base ? s->base + s->used : NULL;
    s->used += (bytes + 63) / 64 * 64;
    return at;
}

#endif
