/* Experts, attention and head of the engine for the rows of one step. One thread, sums in float32. */
#include "kernels.h"

typedef struct {
    int d, f, w, k, half;  /* f: hidden width of a base, 0 without bases; w: width of an expert, 0 without experts */
    int private, gate;     /* whether experts are private networks; enum gate of stage 1 */
    int heads, kv_heads, head_dim, clusters, per_token;
    float scale;
} Shape;

typedef struct {
    int e;
    const float *router, *bias;              /* [D, e] in panels, [e] */
    const char *gate, *up, *down;            /* [D, F], [D, F], [F, D] */
    const char *first, *gate_out, *up_out;   /* e times [D, 2W], [W, F], [W, F]; private: first is [D, 2 up16(W)] */
    const char *down_in, *down_out;          /* e times [F, W], [W, D]; private: down_out alone */
    size_t first_step, out_step, down_in_step, down_out_step; /* bytes between two experts */
} Cluster;

typedef struct { float *x, *a, *b, *ga, *gb, *hidden, *y, *logits, *weight, *narrow; int *index, *order, *start, *which; } Room;

static Room lay_out(const Shape *s, int n, int e, Scratch *scratch) {
    size_t f = 4 * (size_t)n * up16(s->f), pairs = (size_t)n * s->k, d = 4 * (size_t)n * s->d;
    Room r;
    r.x = take(scratch, d), r.y = take(scratch, d);
    r.a = take(scratch, f), r.b = take(scratch, f), r.hidden = take(scratch, f);
    r.ga = take(scratch, f), r.gb = take(scratch, f);
    r.logits = take(scratch, 4 * (size_t)n * e), r.narrow = take(scratch, 8 * (size_t)n * up16(s->w));
    r.weight = take(scratch, 4 * pairs), r.index = take(scratch, 4 * pairs), r.order = take(scratch, 4 * pairs);
    r.which = take(scratch, 4 * pairs), r.start = take(scratch, 4 * (size_t)(e + 1));
    return r;
}

/* out = silu(a) * b * scale, 16 lanes at a time; buffers are padded to a multiple of 16. */
INLINE void gated(const float *a, const float *b, float scale, int f, float *out) {
    for (int i = 0; i < f; i += LANES) {
        vec g = load(a + i);
        store(out + i, g * load(b + i) / (exponential(-g) + 1.0f) * scale);
    }
}

/* Stage 2: choose the experts of the n rows and sort the (row, expert) pairs by expert. */
static void select_experts(const Shape *s, const Cluster *c, int n, Room r) {
    const int k = s->k < c->e ? s->k : c->e;
    product(0, c->router, s->d, c->e, n, (Rows){r.x, s->d, NULL}, NOTHING, (Rows){r.logits, c->e, NULL});
    for (int i = 0; i < n; i++)
        choose(r.logits + (size_t)i * c->e, c->bias, c->e, k, s->k == 1 ? OVER_ALL : OVER_SELECTED, r.index + i * k,
               r.weight + i * k);
    sort(r.index, n * k, c->e, r.order, r.start);
    for (int i = 0; i < n * k; i++) r.which[i] = r.order[i] / k;
}

/* Add the outputs of the private experts that the rows chose to y. Panels of the others are not read. */
static void add_private(const Shape *s, const Cluster *c, int n, Room r) {
    const int d = s->d, w = s->w, half = s->half, wp = up16(w);
    select_experts(s, c, n, r);
    for (int e = 0; e < c->e; e++) { /* in order of experts: the sum of a row does not depend on other rows */
        int at = r.start[e], m = r.start[e + 1] - at;
        const int *which = r.which + at;
        if (!m) continue;
        product(half, c->first + e * c->first_step, d, 2 * wp, m, (Rows){r.x, d, which}, NOTHING, (Rows){r.narrow, 2 * wp, NULL});
        for (int i = 0; i < m; i++) {
            float *h = r.narrow + (size_t)i * 2 * wp;
            gated(h, h + wp, r.weight[r.order[at + i]], w, h);
        }
        product(half, c->down_out + e * c->down_out_step, w, d, m, (Rows){r.narrow, 2 * wp, NULL}, (Rows){r.y, d, which}, (Rows){r.y, d, which});
    }
}

static void compute_cluster(const Shape *s, const Cluster *c, const void *rows, int n, void *out, Room r) {
    const int d = s->d, f = s->f, w = s->w, half = s->half, fp = up16(f);
    if (w && !c->e && !(s->private && f)) {
        memset(out, 0, (half ? 2 : 4) * (size_t)n * d);
        return;
    }
    Rows x = {r.x, d, NULL}, hidden = {r.hidden, fp, NULL}, y = {r.y, d, NULL};
    read_rows(half, rows, (size_t)n * d, r.x);
    product(half, c->gate, d, f, n, x, NOTHING, (Rows){r.a, fp, NULL});
    product(half, c->up, d, f, n, x, NOTHING, (Rows){r.b, fp, NULL});
    if (!w || s->private) {
        for (int i = 0; i < n; i++) gated(r.a + (size_t)i * fp, r.b + (size_t)i * fp, 1, f, r.hidden + (size_t)i * fp);
        product(half, c->down, f, d, n, hidden, NOTHING, y); /* zeros without a base */
        if (c->e) add_private(s, c, n, r);
        write_rows(half, r.y, (size_t)n * d, out);
        return;
    }
    select_experts(s, c, n, r);
    memset(r.hidden, 0, 4 * (size_t)n * fp);
    memset(r.y, 0, 4 * (size_t)n * d);
    for (int e = 0; e < c->e; e++) { /* in order of experts: the sum of a row does not depend on other rows */
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

/* Outputs of clusters of one layer for their rows [n, D], in the type of the weights. Returns 1 without memory. */
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
    for (int i = 0; i < clusters; i++) compute_cluster(s, c[i], rows[i], n[i], out[i], room);
    free(memory);
    return 0;
}

typedef struct {
    const float *attention_norm, *ffn_norm, *router, *bias; /* [D], [D], [D, C] in panels, [C] */
    const char *qkv, *output;
} Layer;

/* Rows of a step: row i is token `position[i]` of request `owner[i]`; row `owner[i]` of `table` has its blocks. */
typedef struct {
    int n, block, width;                   /* rows; tokens per block; blocks per row of the table */
    const int64_t *position, *owner, *table;
    const float *cos, *sin;                /* [length, head_dim / 2] */
    char *keys, *values;                   /* [layers, slots, kv_heads, head_dim] */
    size_t layer_bytes;
    float *x;                              /* [n, D] the residual stream */
    int *order, *start;                    /* out: (row, choice) by cluster [n * P]; start of each cluster [C + 1] */
    float *weight;                         /* out: [n, P] */
    char *rows;                            /* out: [n * P, D] by cluster, in the type of the weights */
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

/* out [16 * V] = sum of p[j] value_j, with value_j at `values + at[j]`. */
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

/* Attention of row i over the keys up to its own: q and out [heads, head_dim]; p and at [keys, padded to 16]. */
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

/* Add the attention of layer `number` to the stream and route its rows to clusters (stage 1). Returns 1 without memory. */
int attend(const Shape *s, const Layer *l, int number, const Step *t) {
    const int n = t->n, d = s->d, hd = s->head_dim, half = s->half, size = half ? 2 : 4, pairs = n * s->per_token;
    const int wide = (s->heads + 2 * s->kv_heads) * hd, kv = s->kv_heads * hd, c = s->clusters;
    int keys_most = t->width * t->block + LANES;
    size_t sizes[] = {(size_t)n * d, (size_t)n * wide, (size_t)n * s->heads * hd, (size_t)n * c, keys_most, 2 * (size_t)keys_most, pairs};
    float *room[7];
    char *memory = NULL;
    for (int pass = 0; pass < 2; pass++) { /* the first pass only counts */
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
        choose(logits + (size_t)i * c, l->bias, c, s->per_token, s->gate, index + i * s->per_token, weight);
        for (int j = 0; j < s->per_token; j++) weight[j] *= s->scale;
    }
    sort(index, pairs, c, t->order, t->start);
    for (int i = 0; i < pairs; i++)
        write_rows(half, xn + (size_t)(t->order[i] / s->per_token) * d, d, t->rows + (size_t)i * d * size);
    free(memory);
    return 0;
}

/* Add the outputs of the clusters to the stream; NULL for a cluster without rows. */
void add(const Shape *s, const Step *t, const char *const *outputs) {
    const int d = s->d, size = s->half ? 2 : 4;
    for (int c = 0; c < s->clusters; c++)
        for (int i = t->start[c]; i < t->start[c + 1]; i++) {
            float *x = t->x + (size_t)(t->order[i] / s->per_token) * d, weight = t->weight[t->order[i]];
            const char *y = outputs[c] + (size_t)(i - t->start[c]) * d * size;
            if (s->half) for (int j = 0; j < d; j++) x[j] += weight * widen(((const uint16_t *)y)[j]);
            else for (int j = 0; j < d; j++) x[j] += weight * ((const float *)y)[j];
        }
}

/* Logits [n, V] of rows `which` [n] of the stream. Returns 1 without memory. */
int head(const Shape *s, const float *final_norm, const void *weight, int vocabulary, const float *x, int n,
         const int64_t *which, float *logits) {
    float *normed = malloc(4 * (size_t)n * s->d + 1);
    if (!normed) return 1;
    for (int i = 0; i < n; i++) norm(x + which[i] * s->d, final_norm, s->d, normed + (size_t)i * s->d);
    product(s->half, weight, s->d, vocabulary, n, (Rows){normed, s->d, NULL}, NOTHING, (Rows){logits, vocabulary, NULL});
    free(normed);
    return 0;
}
