// What attention reads of the latent cache: the scores of four heads, their softmax and their weighted sums.
//
// Latents are float32, or bfloat16 (-DHALF_CACHE). Four heads share each read, the queries of any that are missing are
// zero, and their scores lie side by side, (positions, HEADS), so that a vector holds those of four positions. Where the
// processor multiplies bfloat16 by the pair, queries and weights are rounded to it, as in PyTorch's products; sums are
// float32. A head's numbers are the same bits whichever heads and tokens stand beside it.

#include "rows.h"

#define HEADS 4
#define WHOLE(n, of) (((n) + (of) - 1) / (of) * (of))

#if defined(HALF_CACHE) && defined(__AVX512BF16__)
#define BY_PAIRS
#endif
#ifdef HALF_CACHE
typedef uint16_t latent;
INLINE lanes load_latents(const latent *x) { return load_half(x); }
INLINE float get_latent(const latent *x) { return get_half(x); }
INLINE void put_latents(latent *to, const float *x, int64_t n) { to_half(to, x, n); }
#else
typedef float latent;
INLINE lanes load_latents(const latent *x) { return *(const lanes *)x; }
INLINE float get_latent(const latent *x) { return *x; }
INLINE void put_latents(latent *to, const float *x, int64_t n) { memcpy(to, x, n * sizeof(float)); }
#endif

INLINE void fetch_latents(const int R, const latent *x) {
  UNROLL for (int r = 0; r < R; r++) __builtin_prefetch((const char *)x + AHEAD + r * LINE, 0, 2);
}

#ifdef BY_PAIRS
typedef uint16_t query;
INLINE void put_query(query *to, const float *x, int64_t n) { to_half(to, x, n); }

#define PAIR (2 * LANES)  // numbers that one instruction multiplies
INLINE __mmask32 inside(int64_t many) { return many >= PAIR ? 0xffffffff : many <= 0 ? 0 : (1u << many) - 1; }
INLINE __m512bh pairs(const uint16_t *x, __mmask32 these) {
  return (__m512bh)(these == 0xffffffff ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16(these, x));
}

INLINE void add_products(const int R, __mmask32 these, lanes sum[4][HEADS], const query *q, const latent *x,
                         int64_t n) {
  __m512bh part[4];
  UNROLL for (int r = 0; r < R; r++) part[r] = pairs(x + r * n, these);
  UNROLL for (int h = 0; h < HEADS; h++) {
    __m512bh own = pairs(q + h * n, these);
    UNROLL for (int r = 0; r < R; r++) sum[r][h] = (lanes)_mm512_dpbf16_ps((__m512)sum[r][h], own, part[r]);
  }
}

// out (R, HEADS): R latents, 1 or 4, times the queries (HEADS, n).
INLINE void score(const int R, const int distant, float *out, const query *q, const latent *x, int64_t n) {
  lanes sum[4][HEADS];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int h = 0; h < HEADS; h++) sum[r][h] = (lanes){0};
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR) {
    add_products(R, 0xffffffff, sum, q + i, x + i, n);
    if (distant) fetch_latents(R, x + R * i);
  }
  if (i < n) add_products(R, inside(n - i), sum, q + i, x + i, n);
  totals(R, HEADS, sum, out);
}

// Weights (seen, HEADS) become bfloat16 where they are, two positions in one number: (seen / 2, HEADS). Zeros end them.
static void pair_up(float *weights, int64_t seen) {
  const __m256i order = _mm256_setr_epi16(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  for (int64_t i = 0; i < seen * HEADS; i += LANES) {
    __m256i halves = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weights + i));
    _mm256_storeu_si256((__m256i *)(weights + i / 2), _mm256_permutexvar_epi16(order, halves));
  }
}

// out (HEADS, ..): the numbers `these` of the sums of weight * latent over `seen` latents, all but the last in pairs.
INLINE void mix_some(float *out, const float *weights, const latent *x, int64_t seen, int64_t width, int64_t n,
                     __mmask32 first, __mmask32 then) {
  const __mmask32 these[2] = {first, then};
  __m512 sum[HEADS][4];
  UNROLL for (int h = 0; h < HEADS; h++)
    UNROLL for (int k = 0; k < 4; k++) sum[h][k] = _mm512_setzero_ps();
  for (int64_t p = 0; p < seen; p += 2, x += 2 * width, weights += HEADS) {
    __m512bh both[4];  // neighbours are two positions' numbers; of each eight the first half, then the second
    UNROLL for (int k = 0; k < 2; k++) {
      __m512i a = (__m512i)pairs(x + k * PAIR, these[k]), b = _mm512_setzero_si512();
      if (p + 1 < seen) b = (__m512i)pairs(x + width + k * PAIR, these[k]);
      both[2 * k] = (__m512bh)_mm512_unpacklo_epi16(a, b), both[2 * k + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
    UNROLL for (int h = 0; h < HEADS; h++) {
      __m512bh by = (__m512bh)_mm512_castps_si512(_mm512_set1_ps(weights[h]));
      UNROLL for (int k = 0; k < 4; k++) sum[h][k] = _mm512_dpbf16_ps(sum[h][k], by, both[k]);
    }
  }
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  UNROLL for (int h = 0; h < HEADS; h++)
    UNROLL for (int k = 0; k < 2; k++) {
      float *to = out + h * n + k * PAIR;
      __m512 a = sum[h][2 * k], b = sum[h][2 * k + 1];
      _mm512_mask_storeu_ps(to, these[k], _mm512_permutex2var_ps(a, low, b));
      _mm512_mask_storeu_ps(to + LANES, these[k] >> LANES, _mm512_permutex2var_ps(a, high, b));
    }
}

// out (HEADS, n): the sums of weight * latent over `seen` latents, of which the first n of `width` numbers count.
static void mix(float *out, float *weights, const latent *x, int64_t seen, int64_t width, int64_t n) {
  int64_t i = 0;
  pair_up(weights, seen);
  for (; i + 2 * PAIR <= n; i += 2 * PAIR) mix_some(out + i, weights, x + i, seen, width, n, 0xffffffff, 0xffffffff);
  if (i < n) mix_some(out + i, weights, x + i, seen, width, n, inside(n - i), inside(n - i - PAIR));
}
#else
typedef float query;
INLINE void put_query(query *to, const float *x, int64_t n) { memcpy(to, x, n * sizeof(float)); }

INLINE void score(const int R, const int distant, float *out, const query *q, const latent *x, int64_t n) {
  lanes sum[4][HEADS];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int h = 0; h < HEADS; h++) sum[r][h] = (lanes){0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    UNROLL for (int r = 0; r < R; r++) {
      lanes part = load_latents(x + r * n + i);
      if (distant && r == 0) fetch_latents(R, x + R * i);
      UNROLL for (int h = 0; h < HEADS; h++) sum[r][h] += *(const lanes *)(q + h * n + i) * part;
    }
  totals(R, HEADS, sum, out);
  for (; i < n; i++)
    for (int r = 0; r < R; r++)
      for (int h = 0; h < HEADS; h++) out[r * HEADS + h] += q[h * n + i] * get_latent(x + r * n + i);
}

static void mix(float *out, float *weights, const latent *x, int64_t seen, int64_t width, int64_t n) {
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    lanes sum[HEADS][4];
    UNROLL for (int h = 0; h < HEADS; h++)
      UNROLL for (int k = 0; k < 4; k++) sum[h][k] = (lanes){0};
    for (int64_t p = 0; p < seen; p++)
      UNROLL for (int k = 0; k < 4; k++) {
        lanes part = load_latents(x + p * width + i + k * LANES);
        UNROLL for (int h = 0; h < HEADS; h++) sum[h][k] += weights[p * HEADS + h] * part;
      }
    UNROLL for (int h = 0; h < HEADS; h++)
      UNROLL for (int k = 0; k < 4; k++) *(lanes *)(out + h * n + i + k * LANES) = sum[h][k];
  }
  for (int h = 0; h < HEADS; h++)
    for (int64_t k = i; k < n; k++) {
      float sum = 0;
      for (int64_t p = 0; p < seen; p++) sum += weights[p * HEADS + h] * get_latent(x + p * width + k);
      out[h * n + k] = sum;
    }
}
#endif

// scores (seen, HEADS), with room for three more positions = queries (HEADS, n) times latents (seen, n), which are in
// memory (`distant`) or in the processor's cache.
static void scores_of(float *scores, const query *q, const latent *x, int64_t seen, int64_t n, int distant) {
  int64_t p = 0;
  if (distant)
    for (; p + 4 <= seen; p += 4) score(4, 1, scores + p * HEADS, q, x + p * n, n);
  for (; p + 4 <= seen; p += 4) score(4, 0, scores + p * HEADS, q, x + p * n, n);
  for (; p < seen; p++) score(1, 0, scores + p * HEADS, q, x + p * n, n);
}

// Scores (seen, HEADS) become e^(scale * (score - the head's largest)), then zeros up to a multiple of four positions;
// sums (HEADS,): of each head. scale is above 0.
static void soften(float *scores, int64_t seen, float scale, float *sums) {
  int64_t all = seen * HEADS, i;
  lanes most = (lanes){0} - INFINITY, sum = {0};
  for (i = all; i % LANES; i++) scores[i] = -INFINITY;
  for (i = 0; i < all; i += LANES) {
    lanes x = *(const lanes *)(scores + i);
    whole_lanes more = (whole_lanes)(x > most);
    most = (lanes)(((whole_lanes)x & more) | ((whole_lanes)most & ~more));
  }
  for (int k = 0; k < LANES; k++)
    for (int other = k % HEADS; other < LANES; other += HEADS)
      if (most[other] > most[k]) most[k] = most[other];
  for (i = 0; i < all; i += LANES) {
    lanes x = exp_of((*(const lanes *)(scores + i) - most) * scale);
    for (int64_t k = all - i; k < LANES; k++) x[k] = 0;
    *(lanes *)(scores + i) = x;
    sum += x;
  }
  for (int h = 0; h < HEADS; h++) sums[h] = (sum[h] + sum[2 * HEADS + h]) + (sum[HEADS + h] + sum[3 * HEADS + h]);
}
