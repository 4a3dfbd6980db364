// Rows of weights times vectors: what every product of decode.c is made of.
//
// A matrix holds numbers of type `weight`, float32 or bfloat16 (-DBF16), or codes of 8 bits with a scale for each row.
// What is read from memory once serves up to four vectors; the order of additions is the same for any number of them.

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

#define LANES 16
#define AHEAD 4096  // weights are fetched so many before they are needed: half the time of a step, measured
#define CODES_AHEAD 4096  // the same for codes
#define LATENTS_AHEAD 4096  // and for the cache
typedef float lanes __attribute__((vector_size(LANES * 4), aligned(4)));
typedef float lanes8 __attribute__((vector_size(LANES * 2)));
typedef float lanes4 __attribute__((vector_size(LANES)));
typedef uint16_t half_lanes __attribute__((vector_size(LANES * 2), aligned(2)));
typedef uint32_t whole_lanes __attribute__((vector_size(LANES * 4)));
typedef int8_t code_lanes __attribute__((vector_size(LANES), aligned(1)));
typedef int32_t whole_code_lanes __attribute__((vector_size(LANES * 4)));
#define INLINE static inline __attribute__((always_inline))

// A matrix (O, I), row after row. Where there are scales (O,), row o is scales[o] times its codes of 8 bits.
typedef struct {
  const void *rows;
  const float *scales;
} Matrix;

#define ROWS 8  // of a matrix at a time
typedef struct {
  const void *at[ROWS];
  float scale[ROWS];
  int coded;
} Rows;

// A vector; and where it meets codes, the same in fixed point, see `to_fixed`.
typedef struct {
  const float *x;
  const int16_t *fixed;
  float step;
} Vector;

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

INLINE lanes load_codes(const int8_t *w) {
#ifdef __AVX512F__
  return (lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
#else
  return __builtin_convertvector(__builtin_convertvector(*(const code_lanes *)w, whole_code_lanes), lanes);
#endif
}

// Part i of a row of either kind.
INLINE lanes load_part(const int coded, const void *row, int64_t i) {
  return coded ? load_codes((const int8_t *)row + i) : load((const weight *)row + i);
}
INLINE float get_part(const int coded, const void *row, int64_t i) {
  return coded ? ((const int8_t *)row)[i] : get((const weight *)row + i);
}
INLINE const void *row_of(Matrix m, int64_t o, int64_t n) {
  return (const char *)m.rows + o * n * (int64_t)(m.scales ? 1 : sizeof(weight));
}
INLINE Matrix from_row(Matrix m, int64_t o, int64_t n) {
  return (Matrix){row_of(m, o, n), m.scales ? m.scales + o : NULL};
}
INLINE void set_row(Rows *rows, int r, Matrix m, int64_t o, int64_t n) {
  rows->at[r] = row_of(m, o, n), rows->scale[r] = m.scales ? m.scales[o] : 1, rows->coded = m.scales != NULL;
}

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

#ifdef __clang__
#define SHUFFLE __builtin_shufflevector
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (whole_lanes){__VA_ARGS__})
#endif
#define UNROLL _Pragma("GCC unroll 8")  // or sums would live in memory

// The sums of four vectors at once, each added up in the order of `total`.
INLINE void four_totals(lanes a, lanes b, lanes c, lanes d, float *out, int64_t stride) {
#ifdef __AVX512F__
  lanes ab = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  lanes cd = SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  lanes all = SHUFFLE(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
              SHUFFLE(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  all += SHUFFLE(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  all += SHUFFLE(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  for (int r = 0; r < 4; r++) out[r * stride] = all[4 * r];
#else
  out[0] = total(a), out[stride] = total(b), out[2 * stride] = total(c), out[3 * stride] = total(d);
#endif
}

// out[r][c] = w[r] . x[c] for R rows of a matrix and C vectors: each is read once for all of the other. The order of
// additions is the same for every R and C: a token's numbers do not depend on the tokens beside it.
INLINE void tile(const int R, const int C, const int coded, const void *const *w, const Vector *x, int64_t n,
                 float out[][4]) {
  lanes sum[8][4];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) sum[r][c] = (lanes){0};
  int64_t i = 0;
#if defined(BF16) && defined(__AVX512BF16__)
  // Vectors are rounded to bfloat16 too, as in PyTorch's products; sums stay float32. Twice the products an instruction.
  for (; !coded && i + 2 * LANES <= n; i += 2 * LANES) {
    __m512bh column[4];
    UNROLL for (int c = 0; c < C; c++)
      column[c] = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x[c].x + i + LANES), _mm512_loadu_ps(x[c].x + i));
    UNROLL for (int r = 0; r < R; r++) {
      __m512bh row = (__m512bh)_mm512_loadu_si512((const weight *)w[r] + i);
      __builtin_prefetch((const weight *)w[r] + AHEAD + i);
      UNROLL for (int c = 0; c < C; c++) sum[r][c] = (lanes)_mm512_dpbf16_ps((__m512)sum[r][c], row, column[c]);
    }
  }
#elif defined(BF16) && defined(__AVX512F__)
  // Two neighbours as one number of 32 bits: shifted it is the first, masked the second. So one load and two simple
  // operations give 32 weights; the vectors are parted in the same way, once for all rows.
  for (; !coded && i + 2 * LANES <= n; i += 2 * LANES) {
    lanes even[4], odd[4];
    UNROLL for (int c = 0; c < C; c++) {
      lanes a = *(const lanes *)(x[c].x + i), b = *(const lanes *)(x[c].x + i + LANES);
      even[c] = SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      odd[c] = SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
    UNROLL for (int r = 0; r < R; r++) {
      whole_lanes two = (whole_lanes)_mm512_loadu_si512((const weight *)w[r] + i);
      lanes first = (lanes)(two << 16), second = (lanes)(two & 0xffff0000u);
      __builtin_prefetch((const weight *)w[r] + AHEAD + i);
      UNROLL for (int c = 0; c < C; c++) sum[r][c] += first * even[c];
      UNROLL for (int c = 0; c < C; c++) sum[r][c] += second * odd[c];
    }
  }
#endif
  for (; i + LANES <= n; i += LANES) {
    lanes column[4];
    UNROLL for (int c = 0; c < C; c++) column[c] = *(const lanes *)(x[c].x + i);
    UNROLL for (int r = 0; r < R; r++) {
      lanes row = load_part(coded, w[r], i);
      __builtin_prefetch((const char *)w[r] + (AHEAD + i) * (int64_t)(coded ? 1 : sizeof(weight)));
      UNROLL for (int c = 0; c < C; c++) sum[r][c] += row * column[c];
    }
  }
  UNROLL for (int c = 0; c < C; c++)
    UNROLL for (int r = 0; r < R; r += 4)
      four_totals(sum[r][c], sum[r + 1][c], sum[r + 2][c], sum[r + 3][c], &out[r][c], 4);
  for (; i < n; i++)
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) out[r][c] += get_part(coded, w[r], i) * x[c].x[i];
}

// Codes times vectors in fixed point, where the processor multiplies whole numbers of 16 bits by the pair: a third of
// the instructions that unfolding the codes to float32 takes, and sums that are exact.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define FIXED
#ifdef BF16
#define PARTS 1  // 16 bits: finer than what bfloat16 leaves of a vector
#else
#define PARTS 2  // 31 bits: finer than float32
#endif
#define PAIRS 32    // codes at a time
#define EXACT 8192  // so many products of 8 and 16 bits, 2 in each of 16 sums at a time, fit into 32 bits
#define PADDED(n) (((n) + PAIRS - 1) / PAIRS * PAIRS)

// x = step * (parts[0] + parts[1] / 2^15), with |parts[0]| up to 32767. to: PARTS * PADDED(n), zeros at the end.
static void to_fixed(Vector *v, int64_t n, int16_t *to) {
  __m512i most = _mm512_setzero_si512();  // as whole numbers magnitudes have their order, and NaN is above them all
  for (int64_t i = 0; i < n; i += LANES) {
    __mmask16 inside = n - i < LANES ? (1u << (n - i)) - 1 : 0xffff;
    __m512i magnitude = _mm512_and_si512(_mm512_maskz_loadu_epi32(inside, v->x + i), _mm512_set1_epi32(0x7fffffff));
    most = _mm512_max_epu32(most, magnitude);
  }
  uint32_t bits = _mm512_reduce_max_epu32(most);
  float largest;
  memcpy(&largest, &bits, 4);
  v->fixed = to, v->step = largest / 32767;
  lanes by = (lanes){0} + (largest > 1e-30f ? 32767 / largest : 0);
  for (int64_t i = 0; i < PADDED(n); i += LANES) {
    __mmask16 inside = i >= n ? 0 : n - i < LANES ? (1u << (n - i)) - 1 : 0xffff;
    lanes scaled = (lanes)_mm512_maskz_loadu_ps(inside, v->x + i) * by;
    __m512i whole = _mm512_cvtps_epi32((__m512)scaled);
    _mm256_storeu_si256((__m256i *)(to + i), _mm512_cvtepi32_epi16(whole));
#if PARTS == 2
    lanes rest = (scaled - (lanes)_mm512_cvtepi32_ps(whole)) * 32768;
    _mm256_storeu_si256((__m256i *)(to + PADDED(n) + i), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)rest)));
#endif
  }
}

INLINE __m512i add_pairs(__m512i sum, __m512i a, __m512i b) {
#ifdef __AVX512VNNI__
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

// Codes i .. i + PAIRS of each row times those of the vectors; of the last ones, those that are `inside`.
INLINE void add_codes(const int R, const int C, const int last, __mmask32 inside, __m512i sum[8][4 * PARTS],
                      const void *const *w, const Vector *x, int64_t apart, int64_t i) {
  __m512i column[4 * PARTS];
  UNROLL for (int c = 0; c < C * PARTS; c++)
    column[c] = _mm512_loadu_si512(x[c / PARTS].fixed + c % PARTS * apart + i);
  UNROLL for (int r = 0; r < R; r++) {
    const int8_t *codes = (const int8_t *)w[r] + i;
    __m512i row = _mm512_cvtepi8_epi16(last ? _mm256_maskz_loadu_epi8(inside, codes)
                                            : _mm256_loadu_si256((const __m256i *)codes));
    UNROLL for (int c = 0; c < C * PARTS; c++) sum[r][c] = add_pairs(sum[r][c], row, column[c]);
  }
}

// out[r][c] = codes w[r] . x[c] / step[c].
INLINE void fixed_tile(const int R, const int C, const void *const *w, const Vector *x, int64_t n, float out[][4]) {
  for (int64_t first = 0; first < n; first += EXACT) {
    int64_t i = first, end = first + EXACT < n ? first + EXACT : n;
    __m512i sum[8][4 * PARTS];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int c = 0; c < C * PARTS; c++) sum[r][c] = _mm512_setzero_si512();
    for (; i + 2 * PAIRS <= end; i += 2 * PAIRS) {
      UNROLL for (int r = 0; r < R; r++) __builtin_prefetch((const int8_t *)w[r] + CODES_AHEAD + i);
      add_codes(R, C, 0, 0, sum, w, x, PADDED(n), i);
      add_codes(R, C, 0, 0, sum, w, x, PADDED(n), i + PAIRS);
    }
    for (; i < end; i += PAIRS)
      add_codes(R, C, 1, end - i < PAIRS ? (1u << (end - i)) - 1 : 0xffffffff, sum, w, x, PADDED(n), i);
    UNROLL for (int c = 0; c < C; c++) {
      lanes value[8];
      float part[8][4];
      UNROLL for (int r = 0; r < R; r++) {
        value[r] = (lanes)_mm512_cvtepi32_ps(sum[r][c * PARTS]);
        if (PARTS == 2) value[r] += (lanes)_mm512_cvtepi32_ps(sum[r][c * PARTS + PARTS - 1]) * (1.0f / 32768);
      }
      UNROLL for (int r = 0; r < R; r += 4) {
        four_totals(value[r], value[r + 1], value[r + 2], value[r + 3], part[r], 1);
        for (int k = 0; k < 4; k++) out[r + k][c] = part[r][k] + (first ? out[r + k][c] : 0);
      }
    }
  }
}
#endif

// Vectors (count, n), made ready to meet a matrix. room: 2 * count * (n + 31) numbers, used where that has codes.
static void vectors(Vector *v, const float *x, int64_t count, int64_t n, Matrix to_meet, int16_t *room) {
  for (int64_t c = 0; c < count; c++) {
    v[c] = (Vector){x + c * n, NULL, 1};
#ifdef FIXED
    if (to_meet.scales) to_fixed(v + c, n, room + c * PARTS * PADDED(n));
#endif
  }
}

typedef float four[4];
INLINE four *from_column(four *out, int c) { return (four *)&out[0][c]; }

// ROWS rows by up to four vectors, as many at a time as there are registers. Not inlined: it is compiled once.
static void __attribute__((noinline)) rows_by_vectors(int count, const Rows *rows, const Vector *x, int64_t n,
                                                      float out[ROWS][4]) {
  const void *const *w = rows->at;
  if (!rows->coded) {
    if (count == 1) tile(8, 1, 0, w, x, n, out);
    else if (count == 2) tile(8, 2, 0, w, x, n, out);
    else if (count == 3) tile(4, 3, 0, w, x, n, out), tile(4, 3, 0, w + 4, x, n, out + 4);
    else tile(4, 4, 0, w, x, n, out), tile(4, 4, 0, w + 4, x, n, out + 4);
    return;
  }
#ifdef FIXED
#if PARTS == 1
  if (count == 1) fixed_tile(8, 1, w, x, n, out);
  else if (count == 2) fixed_tile(8, 2, w, x, n, out);
  else if (count == 3) fixed_tile(8, 3, w, x, n, out);
  else fixed_tile(4, 4, w, x, n, out), fixed_tile(4, 4, w + 4, x, n, out + 4);
#else
  for (int c = 0; c < count; c += 2)
    if (c + 1 == count) fixed_tile(8, 1, w, x + c, n, from_column(out, c));
    else
      fixed_tile(4, 2, w, x + c, n, from_column(out, c)), fixed_tile(4, 2, w + 4, x + c, n, from_column(out + 4, c));
#endif
#else
  for (int c = 0; c < count; c += 2)
    for (int r = 0; r < ROWS; r += 4)
      if (c + 1 == count) tile(4, 1, 1, w + r, x + c, n, from_column(out + r, c));
      else tile(4, 2, 1, w + r, x + c, n, from_column(out + r, c));
#endif
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < count; c++) out[r][c] *= rows->scale[r] * x[c].step;
}

static float dot(const float *a, const float *b, int64_t n) {
  lanes sum = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += *(const lanes *)(a + i) * *(const lanes *)(b + i);
  float result = total(sum);
  for (; i < n; i++) result += a[i] * b[i];
  return result;
}

#define HEADS 4  // of attention, that share what is read of the cache; the sums of each are the same beside any others

// out[h * apart + r]: dot products of H neighbouring rows of a with four of x, all n wide.
INLINE void dots(const int H, float *out, int64_t apart, const float *a, const float *x, int64_t n) {
  lanes sum[H][4];
  UNROLL for (int h = 0; h < H; h++)
    UNROLL for (int r = 0; r < 4; r++) sum[h][r] = (lanes){0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    UNROLL for (int r = 0; r < 4; r++) {
      lanes part = *(const lanes *)(x + r * n + i);
      __builtin_prefetch(x + r * n + i + LATENTS_AHEAD);
      UNROLL for (int h = 0; h < H; h++) sum[h][r] += *(const lanes *)(a + h * n + i) * part;
    }
  for (int h = 0; h < H; h++)
    for (int r = 0; r < 4; r++) {
      out[h * apart + r] = total(sum[h][r]);
      for (int64_t k = i; k < n; k++) out[h * apart + r] += a[h * n + k] * x[r * n + k];
    }
}

// out (H, n): for each h the sum of by[h * apart + p] * x[p] over `count` rows of x, which are `stride` apart.
INLINE void weighted_sums(const int H, float *out, const float *by, int64_t apart, const float *x, int64_t stride,
                          int64_t count, int64_t n) {
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    lanes sum[H][4];
    UNROLL for (int h = 0; h < H; h++)
      UNROLL for (int k = 0; k < 4; k++) sum[h][k] = (lanes){0};
    for (int64_t p = 0; p < count; p++)
      UNROLL for (int k = 0; k < 4; k++) {
        lanes part = *(const lanes *)(x + p * stride + i + k * LANES);
        UNROLL for (int h = 0; h < H; h++) sum[h][k] += by[h * apart + p] * part;
      }
    for (int h = 0; h < H; h++)
      for (int k = 0; k < 4; k++) *(lanes *)(out + h * n + i + k * LANES) = sum[h][k];
  }
  for (int h = 0; h < H; h++)
    for (int64_t k = i; k < n; k++) {
      float sum = 0;
      for (int64_t p = 0; p < count; p++) sum += by[h * apart + p] * x[p * stride + k];
      out[h * n + k] = sum;
    }
}

// out (n,) += sum over R neighbouring rows of by[r] * row.
INLINE void add_some(const int R, const int coded, float *out, const float *by, const void *rows, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    lanes sum = *(const lanes *)(out + i);
    UNROLL for (int r = 0; r < R; r++) sum += by[r] * load_part(coded, rows, r * n + i);
    *(lanes *)(out + i) = sum;
  }
  for (; i < n; i++)
    for (int r = 0; r < R; r++) out[i] += by[r] * get_part(coded, rows, r * n + i);
}

// out (n,) += by (count,) times the first rows of a matrix (count, n).
static void add_rows(float *out, const float *by, Matrix m, int64_t count, int64_t n) {
  int64_t o = 0;
  for (; o + 4 <= count; o += 4) {
    float scaled[4] = {by[o], by[o + 1], by[o + 2], by[o + 3]};
    for (int r = 0; r < 4 && m.scales; r++) scaled[r] *= m.scales[o + r];
    if (m.scales) add_some(4, 1, out, scaled, row_of(m, o, n), n);
    else add_some(4, 0, out, scaled, row_of(m, o, n), n);
  }
  for (; o < count; o++) {
    float scaled = by[o] * (m.scales ? m.scales[o] : 1);
    if (m.scales) add_some(1, 1, out, &scaled, row_of(m, o, n), n);
    else add_some(1, 0, out, &scaled, row_of(m, o, n), n);
  }
}
