// One decoding step of the layers on CPU: a few new tokens against the latent cache, with the absorbed form of MLA.
//
// Decoding is bound by reading the weights once and by the cost of starting each small product; here a step is one call.
// Weights are read where they are, float32 or bfloat16 (-DBF16), those of norms and routers perhaps float32 beside
// bfloat16 ones (-DFLOAT_NORMS); all arithmetic is float32. The same mathematics as mla.py, moe.py and layer.py, which
// say what each line is; tests hold the two equal.
//
// N tokens = rows * time; token n is row n / time, at position held[n / time] + n % time of the cache.

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef BF16
typedef uint16_t weight;
#else
typedef float weight;
#endif
#ifdef FLOAT_NORMS
typedef float fine;
#else
typedef weight fine;
#endif

typedef struct {
  int64_t hidden, heads, nope, rope, value, rank, q_rank, dense_inner, shared_inner;
  int64_t experts, expert_inner, top_k, groups, top_groups, normalise;
  float eps, scale, routed_scale;
} Shape;

typedef struct {
  const fine *input_norm, *q_a_norm, *kv_a_norm, *post_norm, *router;  // router is NULL in a dense layer
  const weight *q_a, *q_a_bias, *q_b, *kv_a, *kv_a_bias, *kv_b, *o, *o_bias;  // q_a is NULL without query compression
  const weight *gate, *up, *down;                // dense layer, or shared experts; NULL when none
  const weight *gate_up_experts, *down_experts;
  const float *router_bias;
  float *cache;  // (rows, capacity, rank + rope): [c^KV after its norm ; k^R after RoPE]
} Layer;

typedef struct {
  float *normed, *q_a, *q, *kv, *attended, *inner, *affinity, *choice_weight, *choice_inner, *scores;
  int64_t *choice, *token_of, *first_of;
} Scratch;

#define LANES 16
#define AHEAD 4096  // weights are fetched so many before they are needed: half the time of a step, measured
typedef float lanes __attribute__((vector_size(LANES * 4), aligned(4)));
typedef float lanes8 __attribute__((vector_size(LANES * 2)));
typedef float lanes4 __attribute__((vector_size(LANES)));
typedef uint16_t half_lanes __attribute__((vector_size(LANES * 2), aligned(2)));
typedef uint32_t whole_lanes __attribute__((vector_size(LANES * 4)));
#define INLINE static inline __attribute__((always_inline))

#ifdef BF16
INLINE float get(const weight *w) {
  uint32_t bits = (uint32_t)*w << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE lanes load(const weight *w) {
#ifdef __AVX512F__  // two instructions; compilers make six of what is below
  return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)w)), 16);
#else
  return (lanes)(__builtin_convertvector(*(const half_lanes *)w, whole_lanes) << 16);
#endif
}
#else
INLINE float get(const weight *w) { return *w; }
INLINE lanes load(const weight *w) { return *(const lanes *)w; }
#endif

#ifdef FLOAT_NORMS
INLINE float get_fine(const fine *w) { return *w; }
#else
INLINE float get_fine(const fine *w) { return get(w); }
#endif

// By halves: adding up one after the other would take as long as the product of a short row.
INLINE float total(lanes v) {
  lanes8 low, high;
  lanes4 left, right;
  memcpy(&low, &v, sizeof low);
  memcpy(&high, (char *)&v + sizeof low, sizeof high);
  low += high;
  memcpy(&left, &low, sizeof left);
  memcpy(&right, (char *)&low + sizeof left, sizeof right);
  left += right;
  return (left[0] + left[2]) + (left[1] + left[3]);
}

// out[r][c] = w[r] . x[c] for R rows of a matrix and C vectors: each is read once for all of the other.
INLINE void tile(const int R, const int C, const weight *const *w, const float *const *x, int64_t n, float out[4][4]) {
  lanes sum[4][4];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sum[r][c] = (lanes){0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    lanes column[4];
    for (int c = 0; c < C; c++) column[c] = *(const lanes *)(x[c] + i);
    for (int r = 0; r < R; r++) {
      lanes row = load(w[r] + i);
      __builtin_prefetch(w[r] + AHEAD + i);
      for (int c = 0; c < C; c++) sum[r][c] += row * column[c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) {
      out[r][c] = total(sum[r][c]);
      for (int64_t j = i; j < n; j++) out[r][c] += get(w[r] + j) * x[c][j];
    }
}

// The same for up to four vectors.
INLINE void rows_by_vectors(const int R, int count, const weight *const *w, const float *const *x, int64_t n,
                            float out[4][4]) {
  if (count == 4) tile(R, 4, w, x, n, out);
  else if (count == 3) tile(R, 3, w, x, n, out);
  else if (count == 2) tile(R, 2, w, x, n, out);
  else tile(R, 1, w, x, n, out);
}

static float dot(const float *a, const float *b, int64_t n) {
  lanes sum = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += *(const lanes *)(a + i) * *(const lanes *)(b + i);
  float result = total(sum);
  for (; i < n; i++) result += a[i] * b[i];
  return result;
}

// Dot products of a with four neighbouring rows of x, `stride` numbers apart.
static void four_dots(float *out, const float *a, const float *x, int64_t stride, int64_t n) {
  lanes sum[4] = {{0}, {0}, {0}, {0}};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int r = 0; r < 4; r++) sum[r] += *(const lanes *)(a + i) * *(const lanes *)(x + r * stride + i);
  for (int r = 0; r < 4; r++) out[r] = total(sum[r]);
  for (; i < n; i++)
    for (int r = 0; r < 4; r++) out[r] += a[i] * x[r * stride + i];
}

static void rms_norm(float *out, const float *x, const fine *w, int64_t n, float eps) {
  float by = 1 / sqrtf(dot(x, x, n) / n + eps);
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * by * get_fine(w + i);
}

static void rotate(float *x, const float *angle, int64_t n) {  // angle: n/2 pairs (cos, sin)
  for (int64_t i = 0; i < n; i += 2) {
    float even = x[i], odd = x[i + 1], c = angle[i], s = angle[i + 1];
    x[i] = even * c - odd * s;
    x[i + 1] = odd * c + even * s;
  }
}

static float silu(float x) { return x / (1 + expf(-x)); }

// The functions below are called by all threads together; `omp for` shares the work, and waits unless `nowait`.

// out (N, O) = x (N, I) w^T + bias, or added to what out holds.
static void product(float *out, const float *x, const weight *w, const weight *bias, int64_t N, int64_t O, int64_t I,
                    int add) {
#pragma omp for schedule(static) nowait
  for (int64_t o4 = 0; o4 < (O + 3) / 4; o4++) {
    const weight *rows[4];
    for (int r = 0; r < 4; r++) rows[r] = w + (o4 * 4 + r < O ? o4 * 4 + r : O - 1) * I;
    for (int64_t n = 0; n < N; n += 4) {
      int count = N - n < 4 ? N - n : 4;
      const float *vectors[4];
      float result[4][4];
      for (int c = 0; c < count; c++) vectors[c] = x + (n + c) * I;
      rows_by_vectors(4, count, rows, vectors, I, result);
      for (int r = 0; r < 4 && o4 * 4 + r < O; r++)
        for (int c = 0; c < count; c++) {
          float *to = out + (n + c) * O + o4 * 4 + r;
          *to = result[r][c] + (bias ? get(bias + o4 * 4 + r) : 0) + (add ? *to : 0);
        }
    }
  }
}

// out[c] = silu(gate x[c]) * (up x[c]) * scale[c], vectors given by pointers; gate and up are (O, I).
static void swiglu(float *const *out, const float *const *x, const float *scale, const weight *gate, const weight *up,
                   int64_t N, int64_t O, int64_t I) {
#pragma omp for schedule(static) nowait
  for (int64_t o2 = 0; o2 < (O + 1) / 2; o2++) {
    int64_t a = o2 * 2, b = a + 1 < O ? a + 1 : a;
    const weight *rows[4] = {gate + a * I, up + a * I, gate + b * I, up + b * I};
    for (int64_t n = 0; n < N; n += 4) {
      int count = N - n < 4 ? N - n : 4;
      float result[4][4];
      rows_by_vectors(4, count, rows, x + n, I, result);
      for (int c = 0; c < count; c++) {
        float by = scale ? scale[n + c] : 1;
        out[n + c][a] = silu(result[0][c]) * result[1][c] * by;
        out[n + c][b] = silu(result[2][c]) * result[3][c] * by;
      }
    }
  }
}

// One head of one token: absorbed MLA over the positions first .. last of its row's latents.
static void attend(const Shape *s, const Layer *layer, float *q, const float *angle, const float *latents, int64_t head,
                   int64_t first, int64_t last, float *scores, float *out) {
  int64_t width = s->rank + s->rope, p;
  float query[width], mixed[s->rank];  // [q W^UK ; q^R], as a latent is [c^KV ; k^R]
  const weight *w_uk = layer->kv_b + head * (s->nope + s->value) * s->rank, *w_uv = w_uk + s->nope * s->rank;
  rotate(q + s->nope, angle, s->rope);
  memset(query, 0, s->rank * sizeof(float));
  for (int64_t d = 0; d < s->nope; d++)
    for (int64_t i = 0; i < s->rank; i++) query[i] += q[d] * get(w_uk + d * s->rank + i);
  memcpy(query + s->rank, q + s->nope, s->rope * sizeof(float));
  for (p = first; p + 4 <= last + 1; p += 4) four_dots(scores + p, query, latents + p * width, width, width);
  for (; p <= last; p++) scores[p] = dot(query, latents + p * width, width);
  float most = -INFINITY, sum = 0;
  for (p = first; p <= last; p++) {
    scores[p] *= s->scale;
    if (scores[p] > most) most = scores[p];
  }
  for (p = first; p <= last; p++) sum += scores[p] = expf(scores[p] - most);
  memset(mixed, 0, sizeof mixed);
  for (p = first; p + 4 <= last + 1; p += 4) {
    const float *l = latents + p * width, *by = scores + p;
    for (int64_t i = 0; i < s->rank; i++)
      mixed[i] += by[0] * l[i] + by[1] * l[width + i] + by[2] * l[2 * width + i] + by[3] * l[3 * width + i];
  }
  for (; p <= last; p++)
    for (int64_t i = 0; i < s->rank; i++) mixed[i] += scores[p] * latents[p * width + i];
  for (int64_t i = 0; i < s->rank; i++) mixed[i] /= sum;
  const float *vector = mixed;
  for (int64_t d = 0; d < s->value; d += 4) {
    const weight *rows[4];
    float result[4][4];
    for (int r = 0; r < 4; r++) rows[r] = w_uv + (d + r < s->value ? d + r : d) * s->rank;
    tile(4, 1, rows, &vector, s->rank, result);
    for (int r = 0; r < 4 && d + r < s->value; r++) out[d + r] = result[r][0];
  }
}

// Group-limited top-k on s + b; the weights are s alone, normalised and scaled.
static void choose(const Shape *s, const float *logits, const float *bias, float *affinity, int64_t *choice,
                   float *weights) {
  int64_t size = s->experts / s->groups;
  float biased[s->experts], group_score[s->groups];
  for (int64_t e = 0; e < s->experts; e++) {
    affinity[e] = 1 / (1 + expf(-logits[e]));
    biased[e] = affinity[e] + bias[e];
  }
  if (s->top_groups < s->groups) {
    for (int64_t g = 0; g < s->groups; g++) {
      float first = -INFINITY, second = -INFINITY;
      for (int64_t e = g * size; e < (g + 1) * size; e++) {
        if (biased[e] > first) second = first, first = biased[e];
        else if (biased[e] > second) second = biased[e];
      }
      group_score[g] = first + second;
    }
    char kept[s->groups];  // at least one group always
    memset(kept, 0, sizeof kept);
    for (int64_t k = 0; k < s->top_groups; k++) {
      int64_t best = -1;
      for (int64_t g = 0; g < s->groups; g++)
        if (!kept[g] && (best < 0 || group_score[g] > group_score[best])) best = g;
      kept[best] = 1;
    }
    for (int64_t e = 0; e < s->experts; e++)
      if (!kept[e / size]) biased[e] = -INFINITY;
  }
  float sum = 1e-20f;
  for (int64_t k = 0; k < s->top_k; k++) {
    int64_t best = 0;
    for (int64_t e = 1; e < s->experts; e++)
      if (biased[e] > biased[best]) best = e;
    choice[k] = best;
    weights[k] = affinity[best];
    sum += affinity[best];
    biased[best] = -INFINITY;
  }
  for (int64_t k = 0; k < s->top_k; k++) weights[k] *= s->routed_scale / (s->normalise ? sum : 1);
}

// x (N, hidden) += attention of the normed x.
static void attention(const Shape *s, const Layer *layer, Scratch *t, float *x, const float *angles, const int64_t *padding,
                      int64_t rows, int64_t time, const int64_t *held, int64_t capacity, float *scores) {
  int64_t N = rows * time, width = s->rank + s->rope, qk = s->nope + s->rope, heads = s->heads;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < N; n++) rms_norm(t->normed + n * s->hidden, x + n * s->hidden, layer->input_norm, s->hidden, s->eps);
  if (layer->q_a) product(t->q_a, t->normed, layer->q_a, layer->q_a_bias, N, s->q_rank, s->hidden, 0);
  else product(t->q, t->normed, layer->q_b, NULL, N, heads * qk, s->hidden, 0);
  product(t->kv, t->normed, layer->kv_a, layer->kv_a_bias, N, width, s->hidden, 0);
#pragma omp barrier
#pragma omp for schedule(static)
  for (int64_t n = 0; n < N; n++) {
    float *latent = layer->cache + ((n / time) * capacity + held[n / time] + n % time) * width, *kv = t->kv + n * width;
    if (layer->q_a) rms_norm(t->q_a + n * s->q_rank, t->q_a + n * s->q_rank, layer->q_a_norm, s->q_rank, 1e-6f);
    rms_norm(latent, kv, layer->kv_a_norm, s->rank, 1e-6f);
    rotate(kv + s->rank, angles + n * s->rope, s->rope);
    memcpy(latent + s->rank, kv + s->rank, s->rope * sizeof(float));
  }
  if (layer->q_a) {
    product(t->q, t->q_a, layer->q_b, NULL, N, heads * qk, s->q_rank, 0);
#pragma omp barrier
  }
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < N * heads; i++) {
    int64_t n = i / heads, row = n / time, last = held[row] + n % time;
    int64_t first = padding && padding[row] < last ? padding[row] : padding ? last : 0;  // a padding position sees itself
    attend(s, layer, t->q + i * qk, angles + n * s->rope, layer->cache + row * capacity * width, i % heads, first, last,
           scores, t->attended + i * s->value);
  }
  product(x, t->attended, layer->o, layer->o_bias, N, s->hidden, heads * s->value, 1);
#pragma omp barrier
}

// x (N, hidden) += SwiGLU of the normed x, dense or shared, `inner` wide. Its halves are apart: experts come between.
static void dense_inner(const Shape *s, const Layer *layer, Scratch *t, int64_t N, int64_t inner) {
  const float *from[N];
  float *to[N];
  for (int64_t n = 0; n < N; n++) from[n] = t->normed + n * s->hidden, to[n] = t->inner + n * inner;
  swiglu(to, from, NULL, layer->gate, layer->up, N, inner, s->hidden);
}

// x (N, hidden) += the chosen experts of each token. Tokens are grouped by expert, so that each is read once.
static void experts(const Shape *s, const Layer *layer, Scratch *t, float *x, int64_t N) {
  int64_t I = s->expert_inner, D = s->hidden, K = s->top_k;
#pragma omp for schedule(static) nowait
  for (int64_t e = 0; e < s->experts; e++) {
    float row[D];
    for (int64_t i = 0; i < D; i++) row[i] = get_fine(layer->router + e * D + i);
    for (int64_t n = 0; n < N; n++) t->affinity[n * s->experts + e] = dot(t->normed + n * D, row, D);
  }
#pragma omp barrier
#pragma omp for schedule(static)
  for (int64_t n = 0; n < N; n++)
    choose(s, t->affinity + n * s->experts, layer->router_bias, t->affinity + n * s->experts, t->choice + n * K,
           t->choice_weight + n * K);
#pragma omp single
  {
    int64_t place = 0;
    for (int64_t e = 0; e < s->experts; e++) {
      t->first_of[e] = place;
      for (int64_t c = 0; c < N * K; c++)
        if (t->choice[c] == e) t->token_of[place++] = c;
    }
    t->first_of[s->experts] = place;
  }
  if (layer->gate) dense_inner(s, layer, t, N, s->shared_inner);
  for (int64_t e = 0; e < s->experts; e++) {
    int64_t first = t->first_of[e], count = t->first_of[e + 1] - first;
    if (!count) continue;
    const float *from[count];
    float *to[count], scale[count];
    for (int64_t c = 0; c < count; c++) {
      int64_t choice = t->token_of[first + c];
      from[c] = t->normed + choice / K * D, to[c] = t->choice_inner + choice * I, scale[c] = t->choice_weight[choice];
    }
    const weight *gate = layer->gate_up_experts + e * 2 * I * D;
    swiglu(to, from, scale, gate, gate + I * D, count, I, D);
  }
#pragma omp barrier
#pragma omp for schedule(static)
  for (int64_t d4 = 0; d4 < (D + 3) / 4; d4++)
    for (int64_t e = 0; e < s->experts; e++) {
      int64_t first = t->first_of[e], last = t->first_of[e + 1];
      const weight *rows[4];
      for (int r = 0; r < 4; r++) rows[r] = layer->down_experts + (e * D + (d4 * 4 + r < D ? d4 * 4 + r : D - 1)) * I;
      for (int64_t c = first; c < last; c += 4) {
        int count = last - c < 4 ? last - c : 4;
        const float *vectors[4];
        float result[4][4];
        for (int v = 0; v < count; v++) vectors[v] = t->choice_inner + t->token_of[c + v] * I;
        rows_by_vectors(4, count, rows, vectors, I, result);
        for (int v = 0; v < count; v++)
          for (int r = 0; r < 4 && d4 * 4 + r < D; r++) x[t->token_of[c + v] / K * D + d4 * 4 + r] += result[r][v];
      }
    }
}

// Run `layers` layers over x (rows * time, hidden), in place. angles: (N, rope/2, 2); padding: (rows,) or NULL;
// held: (rows,) positions before the new ones.
// scratch.scores holds capacity numbers for each thread.
void decode(const Shape *s, const Layer *layers, int64_t count, const Scratch *scratch, float *x, const float *angles,
            const int64_t *padding, const int64_t *held, int64_t rows, int64_t time, int64_t capacity, int threads) {
  int64_t N = rows * time;
#pragma omp parallel num_threads(threads)
  {
    Scratch t = *scratch;
    int thread = 0;
#ifdef _OPENMP
    extern int omp_get_thread_num(void);
    thread = omp_get_thread_num();
#endif
    for (int64_t l = 0; l < count; l++) {
      const Layer *layer = layers + l;
      attention(s, layer, &t, x, angles, padding, rows, time, held, capacity, t.scores + thread * capacity);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < N; n++)
        rms_norm(t.normed + n * s->hidden, x + n * s->hidden, layer->post_norm, s->hidden, s->eps);
      int64_t inner = layer->router ? s->shared_inner : s->dense_inner;
      if (layer->router) experts(s, layer, &t, x, N);
      else {
        dense_inner(s, layer, &t, N, inner);
#pragma omp barrier
      }
      if (layer->gate) product(x, t.inner, layer->down, NULL, N, s->hidden, inner, 1);
#pragma omp barrier
    }
  }
}

// out (N, O) = x (N, I) w^T: the output head.
void project(float *out, const float *x, const weight *w, int64_t N, int64_t O, int64_t I, int threads) {
#pragma omp parallel num_threads(threads)
  product(out, x, w, NULL, N, O, I, 0);
}
