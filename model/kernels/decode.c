// One decoding step of the layers on CPU: a few new tokens against the latent cache, with the absorbed form of MLA.
//
// Decoding is bound by reading the weights once and by the cost of starting each small product; here a step is one call.
// Weights are read where they are, float32 or bfloat16 (-DBF16), those of norms and routers perhaps float32 beside
// bfloat16 ones (-DFLOAT_NORMS), matrices also in 8 bits (rows.h). Arithmetic is float32, but where the processor
// multiplies bfloat16, what meets a bfloat16 matrix is rounded to it as PyTorch's products do. The same mathematics as
// mla.py, moe.py and layer.py, which say what each line is; tests hold the two equal.
//
// N tokens = rows * time; token n is row n / time, at position held[n / time] + n % time of the cache.

#include "latents.h"

typedef struct {
  int64_t hidden, heads, nope, rope, value, rank, q_rank, dense_inner, shared_inner;
  int64_t experts, expert_inner, top_k, groups, top_groups, normalise;
  float eps, scale, routed_scale;
} Shape;

typedef struct {
  const fine *input_norm, *q_a_norm, *kv_a_norm, *post_norm, *router;  // router is NULL in a dense layer
  Matrix q_a, q_b, kv_a, kv_b, o;          // q_a is NULL without query compression
  const weight *q_a_bias, *kv_a_bias, *o_bias;
  Matrix gate, up, down;                   // dense layer, or shared experts; NULL when none
  Matrix gate_up_experts, down_experts;    // those of all experts, one below the other
  const float *router_bias;
  latent *cache;  // (rows, capacity, rank + rope): [c^KV after its norm ; k^R after RoPE]
} Layer;

// What is before and after the layers. enorm, hnorm, eh_proj: an MTP layer's; NULL for the main model.
typedef struct {
  int64_t vocab;
  const weight *embedding;
  Matrix head, eh_proj;
  const fine *enorm, *hnorm, *norm;
  const float *angles;  // (positions, rope/2, 2): cos and sin
} Ends;

typedef struct {
  float *normed, *q_a, *q, *kv, *attended, *inner, *affinity, *choice_weight, *choice_inner, *joined, *angles, *mixed;
  float *scores;
  query *queries;
  int16_t *fixed;  // a thread's vectors in fixed point, `fixed_size` numbers for each
  int64_t *choice, *token_of, *first_of, fixed_size;
} Scratch;

#define ROOM(count, width) (2 * (count) * ((width) + 31))  // numbers of 16 bits that so many vectors take, at most

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

// The functions below are called by all threads together; `omp for` shares the work, and waits unless `nowait`.

// out (N, O) = x (N, I) w^T + bias, or added to what out holds.
static void product(float *out, const Vector *x, Matrix w, const weight *bias, int64_t N, int64_t O, int64_t I, int add) {
#pragma omp for schedule(static) nowait
  for (int64_t o = 0; o < O; o += ROWS) {
    Rows rows = {.parts = (N + 3) / 4};
    for (int r = 0; r < ROWS; r++) set_row(&rows, r, w, o + r < O ? o + r : O - 1, I);
    for (int64_t n = 0; n < N; n += 4, rows.part++) {
      int count = N - n < 4 ? N - n : 4;
      float result[ROWS][4];
      rows_by_vectors(count, &rows, x + n, I, result);
      for (int c = 0; c < count; c++)
        for (int r = 0; r < ROWS && o + r < O; r++) {
          float *to = out + (n + c) * O + o + r;
          *to = result[r][c] + (bias ? get(bias + o + r) : 0) + (add ? *to : 0);
        }
    }
  }
}

// out[c] = silu(gate x[c]) * (up x[c]) * scale[c], results given by pointers; gate and up are (O, I).
static void swiglu(float *const *out, const Vector *x, const float *scale, Matrix gate, Matrix up, int64_t N, int64_t O,
                   int64_t I) {
#pragma omp for schedule(static) nowait
  for (int64_t o = 0; o < O; o += ROWS / 2) {
    Rows rows = {.parts = (N + 3) / 4};
    for (int r = 0; r < ROWS / 2; r++) {
      int64_t at = o + r < O ? o + r : O - 1;
      set_row(&rows, r, gate, at, I), set_row(&rows, ROWS / 2 + r, up, at, I);
    }
    for (int64_t n = 0; n < N; n += 4, rows.part++) {
      int count = N - n < 4 ? N - n : 4;
      float result[ROWS][4] = {{0}};
      rows_by_vectors(count, &rows, x + n, I, result);
      lanes *g = (lanes *)result[0], *u = (lanes *)result[ROWS / 2];  // four rows of four vectors are 16 numbers
      *g = *g / (1 + exp_of(-*g)) * *u;
      for (int c = 0; c < count; c++)
        for (int r = 0; r < ROWS / 2 && o + r < O; r++) out[n + c][o + r] = result[r][c] * (scale ? scale[n + c] : 1);
    }
  }
}

// Absorbed MLA in three parts. First a head's queries of all tokens: [q W^UK ; q^R], as a latent is [c^KV ; k^R].
static void absorb(const Shape *s, const Layer *layer, const Scratch *t, const float *angles, int64_t head, int64_t N) {
  int64_t width = s->rank + s->rope, qk = s->nope + s->rope, places = WHOLE(s->heads, HEADS);
  Matrix w_uk = from_row(layer->kv_b, head * (s->nope + s->value), s->rank);
  float asked[width];
  for (int64_t n = 0; n < N; n++) {
    query *to = t->queries + (n * places + head) * width;
    if (head >= s->heads) memset(to, 0, width * sizeof(query));  // HEADS go together
    if (head >= s->heads) continue;
    float *own = t->q + (n * s->heads + head) * qk;
    memset(asked, 0, s->rank * sizeof(float));
    add_rows(asked, own, w_uk, s->nope, s->rank);
    memcpy(asked + s->rank, own + s->nope, s->rope * sizeof(float));
    rotate(asked + s->rank, angles + n * s->rope, s->rope);
    put_query(to, asked, width);
  }
}

// Then for HEADS heads of one token the weighted means of the latents at positions first .. last: mixed (heads, N, rank).
static void attend(const Shape *s, const Scratch *t, const latent *latents, int64_t n, int64_t head, int64_t first,
                   int64_t last, int64_t N, int distant) {
  int64_t width = s->rank + s->rope, seen = last + 1 - first, places = WHOLE(s->heads, HEADS);
  float mixed[HEADS * s->rank], sum[HEADS];
  latents += first * width;
  scores_of(t->scores, t->queries + (n * places + head) * width, latents, seen, width, distant);
  soften(t->scores, seen, s->scale, sum);
  mix(mixed, t->scores, latents, seen, width, s->rank);
  for (int64_t h = 0; h < HEADS && head + h < s->heads; h++)
    for (int64_t i = 0; i < s->rank; i++)
      t->mixed[((head + h) * N + n) * s->rank + i] = mixed[h * s->rank + i] / sum[h];
}

// Last a head's values of all tokens: W^UV times these means.
static void unfold(const Shape *s, const Layer *layer, const Scratch *t, int64_t head, int64_t N) {
  Matrix w_uv = from_row(layer->kv_b, head * (s->nope + s->value) + s->nope, s->rank);
  Vector mixed[N];
  vectors(mixed, t->mixed + head * N * s->rank, N, s->rank, w_uv, t->fixed);
  for (int64_t d = 0; d < s->value; d += ROWS) {
    Rows rows = {.parts = (N + 3) / 4};
    for (int r = 0; r < ROWS; r++) set_row(&rows, r, w_uv, d + r < s->value ? d + r : s->value - 1, s->rank);
    for (int64_t n = 0; n < N; n += 4, rows.part++) {
      int count = N - n < 4 ? N - n : 4;
      float result[ROWS][4];
      rows_by_vectors(count, &rows, mixed + n, s->rank, result);
      for (int c = 0; c < count; c++)
        for (int r = 0; r < ROWS && d + r < s->value; r++)
          t->attended[((n + c) * s->heads + head) * s->value + d + r] = result[r][c];
    }
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

static int workers(void) {
#ifdef _OPENMP
  extern int omp_get_num_threads(void);
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// x (N, hidden) += attention of the normed x.
static void attention(const Shape *s, const Layer *layer, Scratch *t, float *x, const float *angles, const int64_t *padding,
                      int64_t rows, int64_t time, const int64_t *held, int64_t capacity) {
  Vector vector[rows * time];
  int64_t N = rows * time, width = s->rank + s->rope, qk = s->nope + s->rope, heads = s->heads;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < N; n++) rms_norm(t->normed + n * s->hidden, x + n * s->hidden, layer->input_norm, s->hidden, s->eps);
  vectors(vector, t->normed, N, s->hidden, layer->kv_a, t->fixed);
  if (layer->q_a.rows) product(t->q_a, vector, layer->q_a, layer->q_a_bias, N, s->q_rank, s->hidden, 0);
  else product(t->q, vector, layer->q_b, NULL, N, heads * qk, s->hidden, 0);
  product(t->kv, vector, layer->kv_a, layer->kv_a_bias, N, width, s->hidden, 0);
#pragma omp barrier
#pragma omp for schedule(static)
  for (int64_t n = 0; n < N; n++) {
    float *kv = t->kv + n * width;
    if (layer->q_a.rows) rms_norm(t->q_a + n * s->q_rank, t->q_a + n * s->q_rank, layer->q_a_norm, s->q_rank, 1e-6f);
    rms_norm(kv, kv, layer->kv_a_norm, s->rank, 1e-6f);
    rotate(kv + s->rank, angles + n * s->rope, s->rope);
    put_latents(layer->cache + ((n / time) * capacity + held[n / time] + n % time) * width, kv, width);
  }
  if (layer->q_a.rows) {
    vectors(vector, t->q_a, N, s->q_rank, layer->q_b, t->fixed);
    product(t->q, vector, layer->q_b, NULL, N, heads * qk, s->q_rank, 0);
#pragma omp barrier
  }
#pragma omp for schedule(static)
  for (int64_t head = 0; head < WHOLE(heads, HEADS); head++) absorb(s, layer, t, angles, head, N);
  // With tokens enough for all threads one takes all heads of a token, and finds the latents in its cache again.
  int64_t groups = WHOLE(heads, HEADS) / HEADS, together = N >= 2 * workers() ? groups : 1, parts = groups / together;
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < N * parts; i++) {
    int64_t n = i / parts, row = n / time, last = held[row] + n % time, start = i % parts * together;
    int64_t first = padding ? (padding[row] < last ? padding[row] : last) : 0;  // a padding position sees itself
    for (int64_t group = start; group < start + together; group++)
      attend(s, t, layer->cache + row * capacity * width, n, group * HEADS, first, last, N, group == start);
  }
#pragma omp for schedule(static)
  for (int64_t head = 0; head < heads; head++) unfold(s, layer, t, head, N);
  vectors(vector, t->attended, N, heads * s->value, layer->o, t->fixed);
  product(x, vector, layer->o, layer->o_bias, N, s->hidden, heads * s->value, 1);
#pragma omp barrier
}

// x (N, hidden) += SwiGLU of the normed x, dense or shared, `inner` wide. Its halves are apart: experts come between.
static void dense_inner(const Shape *s, const Layer *layer, Scratch *t, const Vector *normed, int64_t N, int64_t inner) {
  float *to[N];
  for (int64_t n = 0; n < N; n++) to[n] = t->inner + n * inner;
  swiglu(to, normed, NULL, layer->gate, layer->up, N, inner, s->hidden);
}

// x (N, hidden) += the chosen experts of each token. Tokens are grouped by expert, so that each is read once.
static void experts(const Shape *s, const Layer *layer, Scratch *t, const Vector *normed, float *x, int64_t N) {
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
  if (layer->gate.rows) dense_inner(s, layer, t, normed, N, s->shared_inner);
  for (int64_t e = 0; e < s->experts; e++) {
    int64_t first = t->first_of[e], count = t->first_of[e + 1] - first;
    if (!count) continue;
    Vector from[count];
    float *to[count], scale[count];
    for (int64_t c = 0; c < count; c++) {
      int64_t choice = t->token_of[first + c];
      from[c] = normed[choice / K], to[c] = t->choice_inner + choice * I, scale[c] = t->choice_weight[choice];
    }
    Matrix gate = from_row(layer->gate_up_experts, e * 2 * I, D);
    swiglu(to, from, scale, gate, from_row(gate, I, D), count, I, D);
  }
#pragma omp barrier
  Vector inner[N * K];
  vectors(inner, t->choice_inner, N * K, I, layer->down_experts, t->fixed);
  for (int64_t e = 0; e < s->experts; e++) {
    int64_t first = t->first_of[e], last = t->first_of[e + 1];
    if (first == last) continue;
#pragma omp for schedule(static) nowait
    for (int64_t d = 0; d < D; d += ROWS) {  // a thread has the same rows of every expert, so sums have one writer
      Rows rows = {.parts = (last - first + 3) / 4};
      for (int r = 0; r < ROWS; r++) set_row(&rows, r, layer->down_experts, e * D + (d + r < D ? d + r : D - 1), I);
      for (int64_t c = first; c < last; c += 4, rows.part++) {
        int count = last - c < 4 ? last - c : 4;
        Vector from[4];
        float result[ROWS][4];
        for (int v = 0; v < count; v++) from[v] = inner[t->token_of[c + v]];
        rows_by_vectors(count, &rows, from, I, result);
        for (int v = 0; v < count; v++)
          for (int r = 0; r < ROWS && d + r < D; r++) x[t->token_of[c + v] / K * D + d + r] += result[r][v];
      }
    }
  }
#pragma omp barrier
}

// Cuts scratch memory into its parts for N tokens; returns how many bytes that is.
static int64_t cut(Scratch *t, char *memory, const Shape *s, int64_t N, int64_t capacity, int threads) {
  int64_t used = 0, choices = N * s->top_k, width = s->rank + s->rope, values = s->heads * s->value;
  int64_t inner = s->dense_inner > s->shared_inner ? s->dense_inner : s->shared_inner;
  int64_t widths[] = {2 * s->hidden, s->q_rank, s->rank, values, inner};
  t->fixed_size = ROOM(choices, s->expert_inner);
  for (int i = 0; i < 5; i++)
    if (t->fixed_size < ROOM(N, widths[i])) t->fixed_size = ROOM(N, widths[i]);
#define TAKE(name, count) t->name = (void *)(memory + used), used += WHOLE((count) * (int64_t)sizeof *t->name, 64)
  TAKE(normed, N * s->hidden);
  TAKE(q_a, N * s->q_rank);
  TAKE(q, N * s->heads * (s->nope + s->rope));
  TAKE(kv, N * width);
  TAKE(attended, N * values);
  TAKE(inner, N * inner);
  TAKE(affinity, N * s->experts);
  TAKE(choice_weight, choices);
  TAKE(choice_inner, choices * s->expert_inner);
  TAKE(joined, N * 2 * s->hidden);
  TAKE(angles, N * s->rope);
  TAKE(mixed, N * s->heads * s->rank);
  TAKE(scores, HEADS * (capacity + 3) * threads);
  TAKE(queries, N * WHOLE(s->heads, HEADS) * width);
  TAKE(fixed, t->fixed_size * threads);
  TAKE(choice, choices);
  TAKE(token_of, choices);
  TAKE(first_of, s->experts + 1);
  return used;
}

int64_t scratch(const Shape *s, int64_t N, int64_t capacity, int threads) {
  Scratch t;
  return cut(&t, NULL, s, N, capacity, threads);
}

static int thread(void) {
#ifdef _OPENMP
  extern int omp_get_thread_num(void);
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// What a thread works in: some parts are its own.
static Scratch own(char *memory, const Shape *s, int64_t N, int64_t capacity, int threads) {
  Scratch t;
  cut(&t, memory, s, N, capacity, threads);
  t.scores += thread() * HEADS * (capacity + 3);
  t.fixed += thread() * t.fixed_size;
  return t;
}

// Run `count` layers over x (rows * time, hidden), in place, all threads together. angles: (N, rope/2, 2).
static void run(const Shape *s, const Layer *layers, int64_t count, Scratch *t, float *x, const float *angles,
                const int64_t *padding, const int64_t *held, int64_t rows, int64_t time, int64_t capacity) {
  int64_t N = rows * time;
  Vector vector[N];
  for (int64_t l = 0; l < count; l++) {
    const Layer *layer = layers + l;
    attention(s, layer, t, x, angles, padding, rows, time, held, capacity);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n++)
      rms_norm(t->normed + n * s->hidden, x + n * s->hidden, layer->post_norm, s->hidden, s->eps);
    int64_t inner = layer->router ? s->shared_inner : s->dense_inner;
    vectors(vector, t->normed, N, s->hidden, layer->router ? layer->gate_up_experts : layer->gate, t->fixed);
    if (layer->router) experts(s, layer, t, vector, x, N);
    else {
      dense_inner(s, layer, t, vector, N, inner);
#pragma omp barrier
    }
    if (layer->gate.rows) {
      vectors(vector, t->inner, N, inner, layer->down, t->fixed);
      product(x, vector, layer->down, NULL, N, s->hidden, inner, 1);
    }
#pragma omp barrier
  }
}

// x (N, hidden) = the tokens' embeddings, or in an MTP layer what they are joined with: M_k [embedding ; state].
static void begin(const Shape *s, const Ends *ends, Scratch *t, const int64_t *tokens, const float *state, float *x,
                  const int64_t *padding, const int64_t *held, int64_t rows, int64_t time) {
  int64_t N = rows * time, D = s->hidden;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < N; n++) {
    int64_t position = held[n / time] + n % time - (padding ? padding[n / time] : 0);
    memcpy(t->angles + n * s->rope, ends->angles + (position < 0 ? 0 : position) * s->rope, s->rope * sizeof(float));
    const weight *embedding = ends->embedding + tokens[n] * D;
    float *to = ends->eh_proj.rows ? t->joined + n * 2 * D : x + n * D;
    for (int64_t i = 0; i < D; i++) to[i] = get(embedding + i);
    if (!ends->eh_proj.rows) continue;
    rms_norm(to, to, ends->enorm, D, s->eps);
    rms_norm(to + D, state + n * D, ends->hnorm, D, s->eps);
  }
  if (ends->eh_proj.rows) {
    Vector joined[N];
    vectors(joined, t->joined, N, 2 * D, ends->eh_proj, t->fixed);
    product(x, joined, ends->eh_proj, NULL, N, D, 2 * D, 0);
#pragma omp barrier
  }
}

// The likeliest token (the first of equals), and how likely it is unless confidence is NULL.
static void pick(const float *logits, int64_t count, int64_t *choice, float *confidence) {
  int64_t best = 0, i;
  lanes most = (lanes){0} - INFINITY, sums = {0};
  for (i = 0; i + LANES <= count; i += LANES) {
    lanes x = *(const lanes *)(logits + i);
    whole_lanes more = (whole_lanes)(x > most);
    most = (lanes)(((whole_lanes)x & more) | ((whole_lanes)most & ~more));
  }
  float top = -INFINITY;
  for (int lane = 0; lane < LANES; lane++)
    if (most[lane] > top) top = most[lane];
  for (; i < count; i++)
    if (logits[i] > top) top = logits[i];
  while (best < count && logits[best] != top) best++;
  if (best == count) best = 0;  // no number at all
  *choice = best;
  if (!confidence) return;
  for (i = 0; i + LANES <= count; i += LANES) sums += exp_of(*(const lanes *)(logits + i) - logits[best]);
  float sum = total(sums);
  for (; i < count; i++) sum += expf(logits[i] - logits[best]);
  *confidence = 1 / sum;
}

// `step` below, by all threads together.
static void whole(const Shape *s, const Layer *layers, int64_t count, Scratch *t, const Ends *ends, const int64_t *tokens,
                  const float *state, float *x, float *logits, int64_t *choice, float *confidence,
                  const int64_t *padding, const int64_t *held, int64_t rows, int64_t time, int64_t last,
                  int64_t capacity) {
  begin(s, ends, t, tokens, state, x, padding, held, rows, time);
  run(s, layers, count, t, x, t->angles, padding, held, rows, time, capacity);
#pragma omp for schedule(static)
  for (int64_t n = 0; n < rows * last; n++)
    rms_norm(t->normed + n * s->hidden, x + (n / last * time + time - last + n % last) * s->hidden, ends->norm, s->hidden,
             s->eps);
  Vector normed[rows * last];
  vectors(normed, t->normed, rows * last, s->hidden, ends->head, t->fixed);
  product(logits, normed, ends->head, NULL, rows * last, ends->vocab, s->hidden, 0);
#pragma omp barrier
#pragma omp for schedule(static)
  for (int64_t n = 0; n < rows * last; n++)
    pick(logits + n * ends->vocab, ends->vocab, choice + n, confidence ? confidence + n : NULL);
}

// From tokens (rows * time,) to logits (rows * last, vocab) of each row's last positions, the likeliest tokens and
// their probabilities (rows * last,), and in x (N, hidden) all states before the final norm. An MTP layer also reads
// `state` (N, hidden). padding: (rows,) or NULL; held: (rows,) positions before the new ones; memory: as
// many bytes as `scratch` says.
void step(const Shape *s, const Layer *layers, int64_t count, char *memory, const Ends *ends,
          const int64_t *tokens, const float *state, float *x, float *logits, int64_t *choice, float *confidence,
          const int64_t *padding, const int64_t *held, int64_t rows, int64_t time, int64_t last, int64_t capacity,
          int threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch t = own(memory, s, rows * time, capacity, threads);
    whole(s, layers, count, &t, ends, tokens, state, x, logits, choice, confidence, padding, held, rows, time, last,
          capacity);
  }
}

// One greedy pass of speculative decoding: up to `most` drafts of the MTP layer, all but the first from its own state and
// draft, and the reading of the last token and the drafts by the `count` main layers. Drafts go on while all of them come
// true with the probability `least`, by their own estimate. The first `known` tokens of the line are known, the main model
// has read all but one, and `states` holds what it made of the last `fresh` of those it has read, which the MTP layer has
// not. Returns how many tokens are known then, and in *drafted how many drafts there were; line and states are as the
// next pass wants them. memory: see `scratch`, for most + 1 tokens; so many rows have states, logits and choice, x twice.
int64_t speculate(const Shape *s, char *memory, const Layer *layers, int64_t count, const Ends *ends, const Layer *mtp,
                  const Ends *mtp_ends, int64_t *line, float *states, float *x, float *logits, float *confidence,
                  int64_t *choice, int64_t most, int64_t capacity, float least, int threads, int64_t known,
                  int64_t fresh, int64_t *drafted) {
  int64_t drafts = 0, kept = 0;
#pragma omp parallel num_threads(threads)
  {
    Scratch t = own(memory, s, most + 1, capacity, threads);
    int64_t held = known - 1 - fresh, time = fresh, made = 0;
    const float *state = states;
    float likely = 1;
    while (made < most && likely >= least) {
      // The state of this draft must outlive its turn as an input: two places take turns behind the fresh ones.
      float *to = x + (made % 2) * (most + 1) * s->hidden;
      whole(s, mtp, 1, &t, mtp_ends, line + held + 1, state, to, logits, choice, confidence, NULL, &held, 1, time, 1,
            capacity);
#pragma omp single
      line[known + made] = *choice;
      likely *= *confidence;
      state = to + (time - 1) * s->hidden, held += time, time = 1, made++;
#pragma omp barrier
    }
    held = known - 1;
    whole(s, layers, count, &t, ends, line + held, NULL, states, logits, choice, NULL, NULL, &held, 1, made + 1, made + 1,
          capacity);
#pragma omp single
    {
      while (kept < made && line[known + kept] == choice[kept]) kept++;
      line[known + kept] = choice[kept];
      drafts = made;
    }
  }
  *drafted = drafts;
  return known + kept + 1;
}

// out (N, O) = x (N, I) w^T: the output head. scales: NULL, or those of its codes (O,); room: ROOM for each thread.
void project(float *out, const float *x, const void *w, const float *scales, int16_t *room, int64_t N, int64_t O,
             int64_t I, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Vector vector[N];
    vectors(vector, x, N, I, (Matrix){w, scales}, room + thread() * ROOM(N, I));
    product(out, vector, (Matrix){w, scales}, NULL, N, O, I, 0);
  }
}
