/* The engine's arithmetic for the rows of a step, one thread, sums in float32.
 *
 * A weight [I, J] rests in panels of 16 columns, [ceil(J/16)][I][16], zeros beyond J. In bfloat16 two neighbours
 * of a column share 32 bits: [ceil(J/16)][ceil(I/2)][16][2]. A panel is read once for all rows; a row's sums go
 * over I from first to last whatever rows are beside it, so that an answer never depends on them.
 */
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
INLINE uint16_t narrow(float f) { /* to the nearest, ties to even */
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

INLINE vec exponential(vec x) { /* Cephes' expf, 2 ulp; within float32's range */
    const vec zero = {0}, low = zero - 87.0f, high = zero + 88.0f;
    x = pick(x < low, low, pick(x > high, high, x));
    vec t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f; /* the nearest integer, in t's last bits too */
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * (vec)(((ivec)t - 0x4b400000 + 127) << 23);
}

/* Rows in memory: row i is `at + (which ? which[i] : i) * ld`. */
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

/* A function for each size: compiled one by one, in a fraction of the time that one with all of them takes. */
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

/* y = first + x @ w, for x [n, I] and y [n, J]; nothing is added where first.at is NULL. */
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

/* The k of e groups with the highest logit + bias, best first, and their softmax over all or those chosen. */
static void choose(const float *logits, const float *bias, int e, int k, int over_all, int *index, float *weight) {
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
    for (int i = 0; i < (over_all ? e : k); i++) most = fmaxf(most, logits[over_all ? i : index[i]]);
    for (int i = 0; i < (over_all ? e : k); i++) sum += expf(logits[over_all ? i : index[i]] - most);
    for (int i = 0; i < k; i++) weight[i] = expf(logits[index[i]] - most) / sum;
}

/* `order`: the n entries of `group` [n] sorted by it, in their order within one; `start` [groups + 1]. */
static void sort(const int *group, int n, int groups, int *order, int *start) {
    memset(start, 0, sizeof(int) * (groups + 1));
    for (int i = 0; i < n; i++) start[group[i] + 1]++;
    for (int g = 0; g < groups; g++) start[g + 1] += start[g];
    for (int i = 0; i < n; i++) order[start[group[i]]++] = i;
    for (int g = groups; g > 0; g--) start[g] = start[g - 1];
    start[0] = 0;
}

/* Pieces of one allocation: with base NULL `take` only counts. */
typedef struct { char *base; size_t used; } Scratch;
static void *take(Scratch *s, size_t bytes) {
    char *at = s->base ? s->base + s->used : NULL;
    s->used += (bytes + 63) / 64 * 64;
    return at;
}

typedef struct {
    int d, f, w, k, half;
    int heads, kv_heads, head_dim, clusters, per_token;
    float scale;
} Shape;

typedef struct {
    int e;
    const float *router, *bias;              /* [D, e] in panels, [e] */
    const char *gate, *up, *down;            /* [D, F], [D, F], [F, D] */
    const char *first, *gate_out, *up_out;   /* e of [D, 2W], [W, F], [W, F] */
    const char *down_in, *down_out;          /* e of [F, W], [W, D] */
    size_t first_step, out_step, down_in_step, down_out_step; /* bytes from one expert to the next */
} Cluster;

typedef struct { float *x, *a, *b, *ga, *gb, *hidden, *y, *logits, *weight, *narrow; int *index, *order, *start, *which; } Room;

static Room lay_out(const Shape *s, int n, int e, Scratch *scratch) {
    size_t f = 4 * (size_t)n * up16(s->f), pairs = (size_t)n * s->k, d = 4 * (size_t)n * s->d;
    Room r;
    r.x = take(scratch, d), r.y = take(scratch, d);
    r.a = take(scratch, f), r.b = take(scratch, f), r.hidden = take(scratch, f);
    r.ga = take(scratch, f), r.gb = take(scratch, f);
    r.logits = take(scratch, 4 * (size_t)n * e), r.narrow = take(scratch, 8 * (size_t)n * s->w);
    r.weight = take(scratch, 4 * pairs), r.index = take(scratch, 4 * pairs), r.order = take(scratch, 4 * pairs);
    r.which = take(scratch, 4 * pairs), r.start = take(scratch, 4 * (size_t)(e + 1));
    return r;
}

/* out = silu(a) * b * scale, 16 lanes at a time: buffers end at a multiple of them. */
INLINE void gated(const float *a, const float *b, float scale, int f, float *out) {
    for (int i = 0; i < f; i += LANES) {
        vec g = load(a + i);
        store(out + i, g * load(b + i) / (exponential(-g) + 1.0f) * scale);
    }
}

static void answer(const Shape *s, const Cluster *c, const void *rows, int n, void *out, Room r) {
    const int d = s->d, f = s->f, w = s->w, half = s->half, fp = up16(f), k = s->k < c->e ? s->k : c->e;
    if (w && !c->e) {
        memset(out, 0, (half ? 2 : 4) * (size_t)n * d);
        return;
    }
    Rows x = {r.x, d, NULL}, hidden = {r.hidden, fp, NULL}, y = {r.y, d, NULL};
    read_rows(half, rows, (size_t)n * d, r.x);
    product(half, c->gate, d, f, n, x, NOTHING, (Rows){r.a, fp, NULL});
    product(half, c->up, d, f, n, x, NOTHING, (Rows){r.b, fp, NULL});
    if (!w) {
        for (int i = 0; i < n; i++) gated(r.a + (size_t)i * fp, r.b + (size_t)i * fp, 1, f, r.hidden + (size_t)i * fp);
        product(half, c->down, f, d, n, hidden, NOTHING, y);
        write_rows(half, r.y, (size_t)n * d, out);
        return;
    }
    product(0, c->router, d, c->e, n, x, NOTHING, (Rows){r.logits, c->e, NULL});
    for (int i = 0; i < n; i++)
        choose(r.logits + (size_t)i * c->e, c->bias, c->e, k, s->k == 1, r.index + i * k, r.weight + i * k);
    sort(r.index, n * k, c->e, r.order, r.start);
    memset(r.hidden, 0, 4 * (size_t)n * fp);
    memset(r.y, 0, 4 * (size_t)n * d);
    for (int i = 0; i < n * k; i++) r.which[i] = r.order[i] / k;
    for (int e = 0; e < c->e; e++) { /* in their order: a row's sums do not depend on its neighbours' choices */
        int at = r.start[e], m = r.start[e + 1] - at;
        const int *which = r.which + at;
        if (!m) continue;
        product(half, c->first + e * c->first_step, d, 2 * w, m, (Rows){r.x, d, which}, NOTHING, (Rows){r.narrow, 2 * w, NULL});
        product(half, c->gate_out + e * c->out_step, w, f, m, (Rows){r.narrow, 2 * w, NULL}, (Rows){r.a, fp, which}, (Rows){r.ga, fp, NULL});
        product(half, c->up_out + e * c->out_step, w, f, m, (Rows){r.narrow + w, 2 * w, NULL}, (Rows){r.b, fp, which}, (Rows){r.gb, fp, NULL});
        for (int i = 0; i < m; i++) {
            float *h = r.ga + (size_t)i * fp, *sum = r.hidden + (size_t)which[i] * fp;
            gated(h, r.gb + (size_t)i * fp, r.weight[r.order[at + i]], f, h);
            for (int j = 0; j < f; j += LANES) store(sum + j, load(sum + j) + load(h + j));
        }
        product(half, c->down_in + e * c->down_in_step, f, w, m, (Rows){r.ga, fp, NULL}, NOTHING, (Rows){r.narrow, 2 * w, NULL});
        product(half, c->down_out + e * c->down_out_step, w, d, m, (Rows){r.narrow, 2 * w, NULL}, (Rows){r.y, d, which}, (Rows){r.y, d, which});
    }
    product(half, c->down, f, d, n, hidden, y, y);
    write_rows(half, r.y, (size_t)n * d, out);
}

/* What clusters of one layer say to their rows [n, D], in the weights' type. Nonzero: no memory. */
int experts(const Shape *s, int clusters, const Cluster *const *c, const void *const *rows, const int *n, void *const *out) {
    int most = 0, e = 0;
    for (int i = 0; i < clusters; i++) {
        most = n[i] > most ? n[i] : most;
        e = c[i]->e > e ? c[i]->e : e;
    }
    Scratch scratch = {0};
    lay_out(s, most, e, &scratch);
    char *memory = aligned_alloc(64, scratch.used);
    if (!memory) return 1;
    scratch = (Scratch){memory, 0};
    Room room = lay_out(s, most, e, &scratch);
    for (int i = 0; i < clusters; i++) answer(s, c[i], rows[i], n[i], out[i], room);
    free(memory);
    return 0;
}

typedef struct {
    const float *attention_norm, *ffn_norm, *router, *bias; /* [D], [D], [D, C] in panels, [C] */
    const char *qkv, *output;
} Layer;

/* Rows of a step; row i is at `position[i]` of the request `owner[i]`, whose blocks are in that row of `table`. */
typedef struct {
    int n, block, width;                   /* rows; tokens in a block; blocks in a row of the table */
    const int64_t *position, *owner, *table;
    const float *cos, *sin;                /* [length, head_dim / 2] */
    char *keys, *values;                   /* [layers, slots, kv_heads, head_dim] */
    size_t layer_bytes;
    float *x;                              /* [n, D] the residual stream */
    int *order, *start;                    /* out: (row, choice) by cluster [n · P]; where each begins [C + 1] */
    float *weight;                         /* out: [n, P] */
    char *rows;                            /* out: [n · P, D] by cluster, in the weights' type */
} Step;

INLINE size_t slot(const Step *t, int i, int64_t position) {
    return t->table[t->owner[i] * t->width + position / t->block] * t->block + position % t->block;
}

INLINE float dot(int half, const float *q, const char *key, int n) {
    vec sum = {0};
    float rest = 0;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        sum += load(q + i) * (half ? load_half((const uint16_t *)key + i) : load((const float *)key + i));
    for (; i < n; i++) rest += q[i] * (half ? widen(((const uint16_t *)key)[i]) : ((const float *)key)[i]);
    return total(sum) + rest;
}

/* out [16·V] = Σ p[j] value_j, value_j at `values + at[j]`. */
INLINE void mix(const int V, int half, const float *p, const char *values, const size_t *at, int n, float *out) {
    vec sum[4] = {{0}, {0}, {0}, {0}};
    for (int j = 0; j < n; j++) {
        const char *value = values + at[j];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            sum[v] += p[j] * (half ? load_half((const uint16_t *)value + LANES * v) : load((const float *)value + LANES * v));
    }
    for (int v = 0; v < V; v++) store(out + LANES * v, sum[v]);
}

/* Row i's attention over the keys up to its own: q and out [heads, head_dim]; p and at [keys, in 16s]. */
INLINE void attend_row(const Shape *s, const Step *t, const int half, int i, const char *keys, const char *values,
                       const float *q, float *out, float *p, size_t *at) {
    const int n = t->position[i] + 1, hd = s->head_dim, shared = s->heads / s->kv_heads, size = half ? 2 : 4;
    const float scale = 1 / sqrtf(hd);
    for (int j = 0; j < n; j++) at[j] = slot(t, i, j) * s->kv_heads * hd * size;
    for (int h = 0; h < s->heads; h++, q += hd, out += hd) {
        size_t head = (size_t)(h / shared) * hd * size;
        float most = -INFINITY, sum = 0;
        for (int j = 0; j < n; j++) {
            p[j] = scale * dot(half, q, keys + head + at[j], hd);
            most = p[j] > most ? p[j] : most;
        }
        for (int j = n; j < up16(n); j++) p[j] = -INFINITY;
        for (int j = 0; j < n; j += LANES) store(p + j, exponential(load(p + j) - most));
        for (int j = 0; j < n; j++) sum += p[j];
        for (int j = 0; j < n; j++) p[j] /= sum;
        int k = 0;
        for (; k + 4 * LANES <= hd; k += 4 * LANES) mix(4, half, p, values + head + (size_t)k * size, at, n, out + k);
        for (; k + LANES <= hd; k += LANES) mix(1, half, p, values + head + (size_t)k * size, at, n, out + k);
        for (; k < hd; k++) {
            out[k] = 0;
            for (int j = 0; j < n; j++) {
                const char *value = values + head + at[j];
                out[k] += p[j] * (half ? widen(((const uint16_t *)value)[k]) : ((const float *)value)[k]);
            }
        }
    }
}

static void turn(float *x, const float *cos, const float *sin, int half_dim) {
    for (int j = 0; j < half_dim; j++) {
        float a = x[j], b = x[j + half_dim];
        x[j] = a * cos[j] - b * sin[j];
        x[j + half_dim] = b * cos[j] + a * sin[j];
    }
}

/* Attention of layer `number`, added to the stream, and stage 1: which clusters each row goes to. Nonzero: no memory. */
int attend(const Shape *s, const Layer *l, int number, const Step *t) {
    const int n = t->n, d = s->d, hd = s->head_dim, half = s->half, size = half ? 2 : 4, pairs = n * s->per_token;
    const int wide = (s->heads + 2 * s->kv_heads) * hd, kv = s->kv_heads * hd, c = s->clusters;
    int keys_most = t->width * t->block + LANES;
    size_t sizes[] = {(size_t)n * d, (size_t)n * wide, (size_t)n * s->heads * hd, (size_t)n * c, keys_most, 2 * (size_t)keys_most, pairs};
    float *room[7];
    char *memory = NULL;
    for (int pass = 0; pass < 2; pass++) { /* first only to count */
        Scratch scratch = {memory, 0};
        for (int i = 0; i < 7; i++) room[i] = take(&scratch, 4 * sizes[i]);
        if (!pass && !(memory = aligned_alloc(64, scratch.used))) return 1;
    }
    float *xn = room[0], *qkv = room[1], *mixed = room[2], *logits = room[3], *p = room[4];
    size_t *at = (size_t *)room[5];
    int *index = (int *)room[6];
    char *keys = t->keys + number * t->layer_bytes, *values = t->values + number * t->layer_bytes;
    Rows x = {t->x, d, NULL}, normed = {xn, d, NULL};

    for (int i = 0; i < n; i++) norm(t->x + (size_t)i * d, l->attention_norm, d, xn + (size_t)i * d);
    product(half, l->qkv, d, wide, n, normed, NOTHING, (Rows){qkv, wide, NULL});
    for (int i = 0; i < n; i++) {
        float *q = qkv + (size_t)i * wide, *key = q + s->heads * hd;
        const size_t turned = t->position[i] * (hd / 2), place = slot(t, i, t->position[i]) * kv * size;
        for (int h = 0; h < s->heads + s->kv_heads; h++) turn(q + h * hd, t->cos + turned, t->sin + turned, hd / 2);
        write_rows(half, key, kv, keys + place);
        write_rows(half, key + kv, kv, values + place);
    }
    for (int i = 0; i < n; i++) {
        float *q = qkv + (size_t)i * wide, *out = mixed + (size_t)i * s->heads * hd;
        if (half) attend_row(s, t, 1, i, keys, values, q, out, p, at);
        else attend_row(s, t, 0, i, keys, values, q, out, p, at);
    }
    product(half, l->output, s->heads * hd, d, n, (Rows){mixed, s->heads * hd, NULL}, x, x);

    for (int i = 0; i < n; i++) norm(t->x + (size_t)i * d, l->ffn_norm, d, xn + (size_t)i * d);
    product(0, l->router, d, c, n, normed, NOTHING, (Rows){logits, c, NULL});
    for (int i = 0; i < n; i++) {
        float *weight = t->weight + i * s->per_token;
        choose(logits + (size_t)i * c, l->bias, c, s->per_token, 1, index + i * s->per_token, weight);
        for (int j = 0; j < s->per_token; j++) weight[j] *= s->scale;
    }
    sort(index, pairs, c, t->order, t->start);
    for (int i = 0; i < pairs; i++)
        write_rows(half, xn + (size_t)(t->order[i] / s->per_token) * d, d, t->rows + (size_t)i * d * size);
    free(memory);
    return 0;
}

/* Add the clusters' answers, by cluster, to the stream; NULL for a cluster without rows. */
void add(const Shape *s, const Step *t, const char *const *answers) {
    const int d = s->d, size = s->half ? 2 : 4;
    for (int c = 0; c < s->clusters; c++)
        for (int i = t->start[c]; i < t->start[c + 1]; i++) {
            float *x = t->x + (size_t)(t->order[i] / s->per_token) * d, weight = t->weight[t->order[i]];
            const char *y = answers[c] + (size_t)(i - t->start[c]) * d * size;
            if (s->half) for (int j = 0; j < d; j++) x[j] += weight * widen(((const uint16_t *)y)[j]);
            else for (int j = 0; j < d; j++) x[j] += weight * ((const float *)y)[j];
        }
}

/* Logits [n, V] of the stream's rows `which` [n]. Nonzero: no memory. */
int head(const Shape *s, const float *final_norm, const void *weight, int vocabulary, const float *x, int n,
         const int64_t *which, float *logits) {
    float *normed = malloc(4 * (size_t)n * s->d + 1);
    if (!normed) return 1;
    for (int i = 0; i < n; i++) norm(x + which[i] * s->d, final_norm, s->d, normed + (size_t)i * s->d);
    product(s->half, weight, s->d, vocabulary, n, (Rows){normed, s->d, NULL}, NOTHING, (Rows){logits, vocabulary, NULL});
    free(normed);
    return 0;
}
