// One decoding step of the layers on CPU: a few new tokens against the latent cache, with the absorbed form of MLA.
//
// Decoding is bound by reading the weights once and by the cost of starting each small product; here a step is one call.
// Weights are read where they are, float32 or bfloat16 (-DBF16), those of norms and routers perhaps float32 beside
// bfloat16 ones (-DFLOAT_NORMS), matrices also in 8 bits (rows.h). Arithmetic is float32, but where the processor
// multiplies bfloat16, what meets a bfloat16 matrix is rounded to it as PyTorch's products do. The same mathematics as
// mla.py, moe.py and layer.py, which say what each line is; tests hold the two equal.
//
// N tokens = rows * time; token n is row n / time, at position held[n / time] + n % time of the cache.

#include "rows.h"

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
  float *cache;  // (rows, capacity, rank + rope): [c^KV after its norm ; k^R after RoPE]
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
  float *normed, *q_a, *q, *kv, *attended, *inner, *affinity, *choice_weight, *choice_inner, *joined, *angles, *scores;
  int16_t *fixed;  // a thread's vectors in fixed point, `fixed_size` numbers for each
  int64_t *choice, *token_of, *first_of, fixed_size;
} Scratch;

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

// e^x of 16 numbers, to about two units in the last place: 2^n times a polynomial in the rest (Cephes' coefficients).
INLINE lanes exp_of(lanes x) {
  whole_lanes low = (whole_lanes)(x < -87), high = (whole_lanes)(x > 88);
  x = (lanes)(((whole_lanes)x & ~(low | high)) | ((whole_lanes)((lanes){0} - 87) & low) |
              ((whole_lanes)((lanes){0} + 88) & high));
  lanes shifted = x * 1.44269504f + 12582912;  // 1.5 * 2^23: the integer next to it stands in the low bits
  lanes n = shifted - 12582912, r = x - n * 0.693359375f + n * 2.12194440e-4f;
  lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  return p * (lanes)(((whole_lanes)shifted - 0x4b400000u + 127u) << 23);
}

// x[i] = e^(x[i] - most); returns the sum of all.
static float exponentials(float *x, int64_t n, float most) {
  lanes sum = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += *(lanes *)(x + i) = exp_of(*(const lanes *)(x + i) - most);
  lanes rest = {0};
  memcpy(&rest, x + i, (n - i) * sizeof(float));
  rest = exp_of(rest - most);
  memcpy(x + i, &rest, (n - i) * sizeof(float));
  float result = total(sum);
  for (; i < n; i++) result += x[i];
  return result;
}

// The functions below are called by all threads together; `omp for` shares the work, and waits unless `nowait`.

// out (N, O) = x (N, I) w^T + bias, or added to what out holds.
static void product(float *out, const Vector *x, Matrix w, const weight *bias, int64_t N, int64_t O, int64_t I, int add) {
#pragma omp for schedule(static) nowait
  for (int64_t o = 0; o < O; o += ROWS) {
    Rows rows;
    for (int r = 0; r < ROWS; r++) set_row(&rows, r, w, o + r < O ? o + r : O - 1, I);
    for (int64_t n = 0; n < N; n += 4) {
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
    Rows rows;
    for (int r = 0; r < ROWS / 2; r++) {
      int64_t at = o + r < O ? o + r : O - 1;
      set_row(&rows, r, gate, at, I), set_row(&rows, ROWS / 2 + r, up, at, I);
    }
    for (int64_t n = 0; n < N; n += 4) {
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

// Some heads of one token, up to HEADS: absorbed MLA over the positions first .. last of its row's latents.
static void attend(const Shape *s, const Layer *layer, const Scratch *t, float *q, const float *angle,
                   const float *latents, int64_t head, int64_t count, int64_t first, int64_t last, float *out) {
  int64_t width = s->rank + s->rope, seen = last + 1 - first, p = 0;
  // [q W^UK ; q^R] of each head, as a latent is [c^KV ; k^R].
  float query[count * width], mixed[count * s->rank], *scores = t->scores;
  Matrix w_uk[HEADS], w_uv[HEADS];
  latents += first * width;
  for (int64_t h = 0; h < count; h++) {
    float *own = q + h * (s->nope + s->rope);
    w_uk[h] = from_row(layer->kv_b, (head + h) * (s->nope + s->value), s->rank);
    w_uv[h] = from_row(w_uk[h], s->nope, s->rank);
    rotate(own + s->nope, angle, s->rope);
    memset(query + h * width, 0, s->rank * sizeof(float));
    add_rows(query + h * width, own, w_uk[h], s->nope, s->rank);
    memcpy(query + h * width + s->rank, own + s->nope, s->rope * sizeof(float));
  }
  for (; p + 4 <= seen; p += 4) {
    const float *four = latents + p * width;
    if (count == HEADS) dots(HEADS, scores + p, seen, query, four, width);
    else for (int64_t h = 0; h < count; h++) dots(1, scores + h * seen + p, seen, query + h * width, four, width);
  }
  for (; p < seen; p++)
    for (int64_t h = 0; h < count; h++) scores[h * seen + p] = dot(query + h * width, latents + p * width, width);
  float sum[HEADS];
  for (int64_t h = 0; h < count; h++) {
    float most = -INFINITY, *own = scores + h * seen;
    for (p = 0; p < seen; p++) {
      own[p] *= s->scale;
      if (own[p] > most) most = own[p];
    }
    sum[h] = exponentials(own, seen, most);
  }
  if (count == HEADS) weighted_sums(HEADS, mixed, scores, seen, latents, width, seen, s->rank);
  else for (int64_t h = 0; h < count; h++)
    weighted_sums(1, mixed + h * s->rank, scores + h * seen, seen, latents, width, seen, s->rank);
  for (int64_t h = 0; h < count; h++) {
    Vector vector;
    for (int64_t i = 0; i < s->rank; i++) mixed[h * s->rank + i] /= sum[h];
    vectors(&vector, mixed + h * s->rank, 1, s->rank, w_uv[h], t->fixed);
    for (int64_t d = 0; d < s->value; d += ROWS) {
      Rows rows;
      float result[ROWS][4];
      for (int r = 0; r < ROWS; r++) set_row(&rows, r, w_uv[h], d + r < s->value ? d + r : d, s->rank);
      rows_by_vectors(1, &rows, &vector, s->rank, result);
      for (int r = 0; r < ROWS && d + r < s->value; r++) out[h * s->value + d + r] = result[r][0];
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
    float *latent = layer->cache + ((n / time) * capacity + held[n / time] + n % time) * width, *kv = t->kv + n * width;
    if (layer->q_a.rows) rms_norm(t->q_a + n * s->q_rank, t->q_a + n * s->q_rank, layer->q_a_norm, s->q_rank, 1e-6f);
    rms_norm(latent, kv, layer->kv_a_norm, s->rank, 1e-6f);
    rotate(kv + s->rank, angles + n * s->rope, s->rope);
    memcpy(latent + s->rank, kv + s->rank, s->rope * sizeof(float));
  }
  if (layer->q_a.rows) {
    vectors(vector, t->q_a, N, s->q_rank, layer->q_b, t->fixed);
    product(t->q, vector, layer->q_b, NULL, N, heads * qk, s->q_rank, 0);
#pragma omp barrier
  }
  // Heads go together where there is work enough for all threads even so.
  int64_t together = N * (heads / HEADS) >= workers() ? HEADS : 1, groups = (heads + together - 1) / together;
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < N * groups; i++) {
    int64_t n = i / groups, row = n / time, last = held[row] + n % time, head = i % groups * together;
    int64_t count = heads - head < together ? heads - head : together;
    int64_t first = padding && padding[row] < last ? padding[row] : padding ? last : 0;  // a padding position sees itself
    attend(s, layer, t, t->q + (n * heads + head) * qk, angles + n * s->rope, layer->cache + row * capacity * width, head,
           count, first, last, t->attended + (n * heads + head) * s->value);
  }
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
#pragma omp for schedule(static)
  for (int64_t d = 0; d < D; d += ROWS)
    for (int64_t e = 0; e < s->experts; e++) {
      int64_t first = t->first_of[e], last = t->first_of[e + 1];
      Rows rows;
      for (int r = 0; r < ROWS; r++) set_row(&rows, r, layer->down_experts, e * D + (d + r < D ? d + r : D - 1), I);
      for (int64_t c = first; c < last; c += 4) {
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

// What a thread works in: the rooms of its own are those of its number.
static Scratch own(const Scratch *scratch, int64_t capacity) {
  Scratch t = *scratch;
#ifdef _OPENMP
  extern int omp_get_thread_num(void);
  t.scores += omp_get_thread_num() * HEADS * capacity;
  t.fixed += omp_get_thread_num() * t.fixed_size;
#endif
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

// The layers alone. padding: (rows,) or NULL; held: (rows,) positions before the new ones; scratch.scores holds
// HEADS * capacity numbers for each thread.
void decode(const Shape *s, const Layer *layers, int64_t count, const Scratch *scratch, float *x, const float *angles,
            const int64_t *padding, const int64_t *held, int64_t rows, int64_t time, int64_t capacity, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch t = own(scratch, capacity);
    run(s, layers, count, &t, x, angles, padding, held, rows, time, capacity);
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
// `state` (N, hidden). padding and scores as in `decode`.
void step(const Shape *s, const Layer *layers, int64_t count, const Scratch *scratch, const Ends *ends,
          const int64_t *tokens, const float *state, float *x, float *logits, int64_t *choice, float *confidence,
          const int64_t *padding, const int64_t *held, int64_t rows, int64_t time, int64_t last, int64_t capacity,
          int threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch t = own(scratch, capacity);
    whole(s, layers, count, &t, ends, tokens, state, x, logits, choice, confidence, padding, held, rows, time, last,
          capacity);
  }
}

// What a pass of speculative decoding works on. states, logits and choice have most + 1 rows, x twice as many.
typedef struct {
  const Shape *shape;
  const Scratch *scratch;
  const Layer *layers, *mtp;  // of the main model, and its one MTP layer
  int64_t count, most, capacity;  // of main layers; of drafts; of the cache
  const Ends *ends, *mtp_ends;
  int64_t *line;  // all tokens; drafts, then what takes their place, are written behind those that are known
  float *states, *x, *logits, *confidence;
  int64_t *choice;
  float likely;  // a draft is continued while all of it comes true with this probability, by its own estimate
  int32_t threads;
} Speculation;

// One greedy pass: up to `most` drafts of the MTP layer, all but the first from its own state and draft, and the main
// model's reading of the last token and the drafts. The first `known` tokens of the line are known, the main model has
// read all but one, and `states` holds what it made of the last `fresh` of those it has read, which the MTP layer has
// not. Returns how many tokens are known then, and in *drafted how many drafts there were; line and states are as the
// next pass wants them.
int64_t speculate(const Speculation *p, int64_t known, int64_t fresh, int64_t *drafted) {
  const Shape *s = p->shape;
  int64_t drafts = 0, kept = 0;
#pragma omp parallel num_threads(p->threads)
  {
    Scratch t = own(p->scratch, p->capacity);
    int64_t held = known - 1 - fresh, time = fresh, made = 0;
    const float *state = p->states;
    float likely = 1;
    while (made < p->most && likely >= p->likely) {
      // The state of this draft must outlive its turn as an input: two places take turns behind the fresh ones.
      float *x = p->x + (made % 2) * (p->most + 1) * s->hidden;
      whole(s, p->mtp, 1, &t, p->mtp_ends, p->line + held + 1, state, x, p->logits, p->choice, p->confidence, NULL, &held,
            1, time, 1, p->capacity);
#pragma omp single
      p->line[known + made] = *p->choice;
      likely *= *p->confidence;
      state = x + (time - 1) * s->hidden, held += time, time = 1, made++;
#pragma omp barrier
    }
    held = known - 1;
    whole(s, p->layers, p->count, &t, p->ends, p->line + held, NULL, p->states, p->logits, p->choice, NULL, NULL,
          &held, 1, made + 1, made + 1, p->capacity);
#pragma omp single
    {
      while (kept < made && p->line[known + kept] == p->choice[kept]) kept++;
      p->line[known + kept] = p->choice[kept];
      drafts = made;
    }
  }
  *drafted = drafts;
  return known + kept + 1;
}

// out (N, O) = x (N, I) w^T: the output head. scales: NULL, or those of its codes (O,); room: `vectors` for each thread.
void project(float *out, const float *x, const void *w, const float *scales, int16_t *room, int64_t N, int64_t O,
             int64_t I, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch t = own(&(Scratch){.fixed = room, .fixed_size = 2 * N * (I + 31)}, 0);
    Vector vector[N];
    vectors(vector, x, N, I, (Matrix){w, scales}, t.fixed);
    product(out, vector, (Matrix){w, scales}, NULL, N, O, I, 0);
  }
}
