// Causal attention of prefill on CPU, from what the projections give to what `o_proj` takes: the queries' rotation,
// scores, softmax and weighted sum block by block (FlashAttention, Dao et al. 2022), so that no score leaves the cache
// and no key is copied for every chunk of queries. Only where the processor has dot products of bfloat16 pairs.
//
// Queries, keys, values and probabilities are bfloat16, as in PyTorch's products; scores, sums and the softmax float32.
// A head of a row is one task, computed in a fixed order: the same input gives the same bits on any number of threads.

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#include <omp.h>

typedef uint16_t number;  // bfloat16
typedef uint32_t pair;    // two of them, neighbours along the axis that a product sums over

#define LANES 16
#define ROWS 6       // queries of a tile: with four vectors of keys or values 24 sums, which live in registers
#define GROUPS 4     // tiles of queries that meet a block of keys while it lies in the nearest cache
#define AHEAD 16     // rows of a head are fetched so many before they are needed
#define BLOCK 256    // keys of a block; more than a block of queries and LANES
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

INLINE __m512 widened(__m256i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
INLINE __mmask16 first_lanes(int64_t many) { return many >= LANES ? 0xffff : (1 << many) - 1; }
INLINE int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t whole(int64_t x, int64_t of) { return (x + of - 1) / of * of; }

// Rows of one head lie a whole token apart, further than the processor looks ahead by itself.
INLINE void fetch(const number *x, int64_t many) {
  for (int64_t i = 0; i < many; i += 32) __builtin_prefetch(x + i);
}

// 2^x of numbers that are not above 0: 2^n e^(r ln 2) with |r| <= 1/2, by its Taylor series to r^5, within 3e-6.
INLINE __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-1e4f), x);  // of -inf nothing could be taken; NaN passes
  __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
  return _mm512_scalef_ps(p, n);
}

// out[r][..] += a[r] . b over `many` pairs, for ROWS rows of a, `apart` pairs from each other, and C vectors of columns:
// b + c * column holds vector c of the first pair, `next` further that of the second.
INLINE void tile(const int C, float *out, int64_t width, const pair *a, int64_t apart, const pair *b, int64_t column,
                 int64_t next, int64_t many, const int from_zero) {
  __m512 sum[ROWS][4];
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int c = 0; c < C; c++)
      sum[r][c] = from_zero ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * width + c * LANES);
  for (int64_t i = 0; i < many; i++) {
    __m512bh columns[4];
    UNROLL for (int c = 0; c < C; c++) columns[c] = (__m512bh)_mm512_loadu_si512(b + i * next + c * column);
    UNROLL for (int r = 0; r < ROWS; r++) {
      __m512bh row = (__m512bh)_mm512_set1_epi32(a[r * apart + i]);
      UNROLL for (int c = 0; c < C; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], row, columns[c]);
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int c = 0; c < C; c++) _mm512_storeu_ps(out + r * width + c * LANES, sum[r][c]);
}

// The same for any number of vectors of columns.
#define TILES(vectors, out, width, a, apart, b, column, next, many, from_zero)                                        \
  for (int64_t c = 0; c < (vectors); c += 4) {                                                                        \
    float *to = (out) + c * LANES;                                                                                    \
    const pair *columns = (b) + c * (column);                                                                         \
    switch (lower((vectors) - c, 4)) {                                                                                \
      case 4: tile(4, to, width, a, apart, columns, column, next, many, from_zero); break;                            \
      case 3: tile(3, to, width, a, apart, columns, column, next, many, from_zero); break;                            \
      case 2: tile(2, to, width, a, apart, columns, column, next, many, from_zero); break;                            \
      default: tile(1, to, width, a, apart, columns, column, next, many, from_zero);                                  \
    }                                                                                                                 \
  }
static void __attribute__((noinline)) score(float *out, const pair *q, const pair *k, int64_t pairs, int64_t vectors) {
  TILES(vectors, out, BLOCK, q, pairs, k, pairs * LANES, LANES, pairs, 1)
}
static void __attribute__((noinline)) mix(float *out, const pair *p, const pair *v, int64_t vectors, int64_t pairs) {
  TILES(vectors, out, vectors * LANES, p, BLOCK / 2, v, LANES, vectors * LANES, pairs, 0)
}

// to (pairs, 16) = the transpose of 16 keys' pairs: rows i and i + 8 interleaved, four times.
static void pack_keys(pair *to, const number *keys, int64_t pairs) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int64_t i = 0; i < pairs; i += LANES) {
    __m512i rows[LANES], turned[LANES];
    UNROLL for (int r = 0; r < LANES; r++) rows[r] = _mm512_loadu_si512((const pair *)keys + r * pairs + i);
    UNROLL for (int times = 0; times < 4; times++) {
      UNROLL for (int r = 0; r < 8; r++) {
        turned[2 * r] = _mm512_permutex2var_epi32(rows[r], low, rows[r + 8]);
        turned[2 * r + 1] = _mm512_permutex2var_epi32(rows[r], high, rows[r + 8]);
      }
      memcpy(rows, turned, sizeof rows);
    }
    UNROLL for (int r = 0; r < LANES; r++) _mm512_storeu_si512(to + (i + r) * LANES, rows[r]);
  }
}

// Of ROWS rows of scores the first `keys` numbers become 2^((s - top) factor) in bfloat16, `top` the largest so far;
// what was summed with another top before is scaled to the new one. Row r sees the keys from[r] <= i < to[r].
static void soften(number *p, float *scores, int64_t keys, const int64_t *from, const int64_t *to, float factor,
                   float *top, float *sum, float *out, int64_t width) {
  __m512 most[ROWS], less[ROWS], total[ROWS], by = _mm512_set1_ps(factor);
  for (int r = 0; r < ROWS; r++) {
    for (int64_t i = 0; i < lower(from[r], keys); i++) scores[r * BLOCK + i] = -INFINITY;
    for (int64_t i = to[r] < 0 ? 0 : to[r]; i < keys; i++) scores[r * BLOCK + i] = -INFINITY;
  }
  UNROLL for (int r = 0; r < ROWS; r++) most[r] = _mm512_set1_ps(top[r]);
  for (int64_t i = 0; i < keys; i += LANES)
    UNROLL for (int r = 0; r < ROWS; r++) most[r] = _mm512_max_ps(most[r], _mm512_loadu_ps(scores + r * BLOCK + i));
  UNROLL for (int r = 0; r < ROWS; r++) {
    float now = _mm512_reduce_max_ps(most[r]);
    less[r] = _mm512_set1_ps(now * factor);
    total[r] = _mm512_setzero_ps();
    if (now == top[r]) continue;
    __m512 old = power_of_two(_mm512_set1_ps((top[r] - now) * factor));
    for (int64_t i = 0; i < width; i += LANES)
      _mm512_storeu_ps(out + r * width + i, _mm512_mul_ps(_mm512_loadu_ps(out + r * width + i), old));
    sum[r] *= _mm512_cvtss_f32(old);
    top[r] = now;
  }
  for (int64_t i = 0; i < keys; i += LANES)
    UNROLL for (int r = 0; r < ROWS; r++) {
      __m512 value = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + r * BLOCK + i), by, less[r]));
      total[r] = _mm512_add_ps(total[r], value);
      _mm256_storeu_si256((__m256i *)(p + r * BLOCK + i), (__m256i)_mm512_cvtneps_pbh(value));
    }
  UNROLL for (int r = 0; r < ROWS; r++) sum[r] += _mm512_reduce_add_ps(total[r]);
}

// A query as its head has it, the second part turned by its angles (pairs of cos and sin), zeros up to `width`.
static void rotated(number *to, const number *q, const float *angle, int64_t nope, int64_t rope, int64_t width) {
  memcpy(to, q, nope * sizeof(number));
  for (int64_t i = 0; i < rope; i += LANES) {
    __mmask16 here = first_lanes(rope - i);
    __m512 x = widened(_mm256_maskz_loadu_epi16(here, q + nope + i)), a = _mm512_maskz_loadu_ps(here, angle + i);
    __m512 other = _mm512_mul_ps(_mm512_permute_ps(x, 0xb1), _mm512_movehdup_ps(a));
    __m512 turned = _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(a), other);
    _mm256_mask_storeu_epi16(to + nope + i, here, (__m256i)_mm512_cvtneps_pbh(turned));
  }
  memset(to + nope + rope, 0, (width - nope - rope) * sizeof(number));
}

// out (rows, time, heads, value): softmax(q k^T * scale) v for the last `time` of `held` positions.
//   q (rows, time, heads, nope + rope), not rotated; angles (1 or rows, time, rope / 2, 2), `angle_rows` apart
//   kv (rows, held, heads, nope + value): [k_nope | v]; k_rope: rotated, the same for all heads, positions `apart`
//   padding (rows,) or NULL: positions on the left that only they themselves see
//   room: for each thread whole(held, 16) * (whole(nope + rope, 32) + whole(value, 16)) numbers
void attend(number *out, const number *q, const number *kv, const number *k_rope, const float *angles,
            const int64_t *padding, number *room, int64_t rows, int64_t time, int64_t held, int64_t heads, int64_t nope,
            int64_t rope, int64_t value, int64_t apart, int64_t angle_rows, float scale, int threads) {
  const int64_t keys = whole(held, LANES), pairs = whole(nope + rope, 32) / 2, vectors = whole(value, LANES) / LANES;
  const int64_t width = vectors * LANES, past = held - time, each = keys * (2 * pairs + width);
  const float factor = scale * 1.44269504f;
#pragma omp parallel num_threads(threads)
  {
    number *mine = room + omp_get_thread_num() * each;
    pair *k = (pair *)mine, *v = (pair *)(mine + keys * 2 * pairs);
    number some_keys[LANES * 2 * pairs] __attribute__((aligned(64))), p[ROWS * BLOCK] __attribute__((aligned(64)));
    number queries[GROUPS * ROWS * 2 * pairs] __attribute__((aligned(64)));
    float scores[ROWS * BLOCK] __attribute__((aligned(64))), mixed[GROUPS * ROWS * width] __attribute__((aligned(64)));
    float top[GROUPS * ROWS], sum[GROUPS * ROWS];
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < rows * heads; task++) {
      const int64_t b = task / heads, h = task % heads, step = heads * (nope + value), pad = padding ? padding[b] : 0;
      const number *head = kv + b * held * step + h * (nope + value);
      for (int64_t j = 0; j < keys; j += LANES) {
        memset(some_keys, 0, sizeof some_keys);
        for (int64_t i = j; i < lower(j + LANES, held); i++) {
          fetch(head + (i + AHEAD) * step, nope + value);
          memcpy(some_keys + (i - j) * 2 * pairs, head + i * step, nope * sizeof(number));
          memcpy(some_keys + (i - j) * 2 * pairs + nope, k_rope + (b * held + i) * apart, rope * sizeof(number));
        }
        pack_keys(k + j * pairs, some_keys, pairs);
      }
      for (int64_t j = 0; j < keys; j += 2)
        for (int64_t i = 0; i < width; i += LANES) {
          __mmask16 here = first_lanes(value - i);
          const number *one = head + j * step + nope + i;
          __m256i a = _mm256_maskz_loadu_epi16(j < held ? here : 0, one);
          __m256i z = _mm256_maskz_loadu_epi16(j + 1 < held ? here : 0, one + step);
          __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(z), 16));
          _mm512_storeu_si512(v + j / 2 * width + i, both);
        }
      for (int64_t t = 0; t < time; t += GROUPS * ROWS) {
        const int64_t here = lower(GROUPS * ROWS, time - t), first = past + t, last = first + here - 1;
        for (int64_t r = 0; r < here; r++) {
          const number *query = q + (((b * time + t + r) * heads) + h) * (nope + rope);
          fetch(query + AHEAD * heads * (nope + rope), nope + rope);
          rotated(queries + r * 2 * pairs, query, angles + b * angle_rows + (t + r) * rope, nope, rope, 2 * pairs);
        }
        memset(queries + here * 2 * pairs, 0, (GROUPS * ROWS - here) * 2 * pairs * sizeof(number));
        memset(mixed, 0, sizeof mixed);
        for (int r = 0; r < GROUPS * ROWS; r++) top[r] = -INFINITY, sum[r] = 0;
        for (int64_t j = lower(pad, first) / LANES * LANES; j <= last; j += BLOCK)
          for (int64_t g = 0; g < here; g += ROWS) {
            const int64_t seen = lower(whole(first + g + ROWS - j, LANES), lower(BLOCK, keys - j));
            int64_t from[ROWS], to[ROWS];
            if (seen <= 0) continue;
            for (int r = 0; r < ROWS; r++) {
              to[r] = first + g + r + 1 - j;
              from[r] = lower(pad, first + g + r) - j;
            }
            score(scores, (const pair *)queries + g * pairs, k + j * pairs, pairs, seen / LANES);
            soften(p, scores, seen, from, to, factor, top + g, sum + g, mixed + g * width, width);
            mix(mixed + g * width, (const pair *)p, v + j / 2 * width, vectors, seen / 2);
          }
        for (int64_t r = 0; r < here; r++)
          for (int64_t i = 0; i < width; i += LANES) {
            __m512 mean = _mm512_div_ps(_mm512_loadu_ps(mixed + r * width + i), _mm512_set1_ps(sum[r]));
            number *to = out + (((b * time + t + r) * heads) + h) * value + i;
            _mm256_mask_storeu_epi16(to, first_lanes(value - i), (__m256i)_mm512_cvtneps_pbh(mean));
          }
      }
    }
  }
}
#endif
