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
#define AHEAD 12288  // bytes: what comes from memory is fetched so far before it is needed, into the second cache
#define LINE 64     // bytes of memory that are fetched at once
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

#define ROWS 8  // of a matrix at a time, or four neighbours of each of two
typedef struct {
  const void *at[ROWS];
  float scale[ROWS];
  int coded;
  int64_t part, parts;  // these rows meet this one of so many groups of vectors
} Rows;

// A vector, and the same in 16 bits as what it meets wants it: in fixed point for codes, see `to_fixed`, in bfloat16 for
// such weights where the processor multiplies them.
typedef struct {
  const float *x;
  const int16_t *short_x;
  float step;
} Vector;
#if defined(BF16) && defined(__AVX512BF16__)
#define HALVES
#endif

// bfloat16, where it is: one number, and LANES of them.
INLINE float get_half(const uint16_t *x) {
  uint32_t bits = (uint32_t)*x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE lanes load_half(const uint16_t *x) {
#ifdef __AVX512F__  // two instructions; compilers make six of what is below
  return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
#else
  return (lanes)(__builtin_convertvector(*(const half_lanes *)x, whole_lanes) << 16);
#endif
}
// The nearest of bfloat16, of two equally near the even one.
INLINE void to_half(uint16_t *to, const float *x, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + LANES <= n; i += LANES) *(half_lanes *)(to + i) = (half_lanes)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
#endif
  for (; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    to[i] = x[i] == x[i] ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
  }
}

#ifdef BF16
INLINE float get(const weight *w) { return get_half(w); }
INLINE lanes load(const weight *w) { return load_half(w); }
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

// out[r * 4 + c] = total(sum[r][c]) of R rows and C columns, up to 4: each is added up in the order of `total`.
INLINE void totals(const int R, const int C, lanes sum[][4], float *out) {
#ifdef __AVX512F__
  const lanes none = {0};
  UNROLL for (int r = 0; r < R; r += 4) {
    __m512 four[4], two[2];  // of column c: in its quarter r what is left of row r
    UNROLL for (int c = 0; c < 4; c++) {
      __m512 v[4];
      UNROLL for (int k = 0; k < 4; k++) v[k] = (__m512)(c < C && r + k < R ? sum[r + k][c] : none);
      __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
      __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
      four[c] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    }
    UNROLL for (int k = 0; k < 2; k++) {
      __m512d a = (__m512d)four[2 * k], b = (__m512d)four[2 * k + 1];
      two[k] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    lanes all = (lanes)_mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
    __mmask16 these = 0x1111 * ((1 << C) - 1) & (R - r < 4 ? (1 << 4 * (R - r)) - 1 : 0xffff);
    _mm512_mask_storeu_ps(out + r * 4, these, (__m512)all);
  }
#else
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) out[r * 4 + c] = total(sum[r][c]);
#endif
}

// e^x of 16 numbers, to about two units in the last place: 2^n times a polynomial in the rest (Cephes' coefficients).
INLINE lanes exp_of(lanes x) {
#ifdef __AVX512F__  // of a NaN and a bound these two return what stands second
  x = (lanes)_mm512_min_ps(_mm512_set1_ps(88), _mm512_max_ps(_mm512_set1_ps(-87), (__m512)x));
#else
  whole_lanes low = (whole_lanes)(x < -87), high = (whole_lanes)(x > 88);
  x = (lanes)(((whole_lanes)x & ~(low | high)) | ((whole_lanes)((lanes){0} - 87) & low) |
              ((whole_lanes)((lanes){0} + 88) & high));
#endif
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

// Fetching the rows behind these while R of them, of `bytes` bytes each, are read in steps of LINE bytes: line after line
// in the order of memory. A processor goes on by itself where it sees that, and gives half of its bandwidth where eight
// rows are fetched at once (docs/lab-log.md, entry 69). Rows that meet several groups of vectors leave a part to each.
typedef struct {
  const char *first, *second;  // behind the first four rows, and behind the other four, less what came before
  int64_t at, turn, wait, parts;
} Fetch;
INLINE Fetch fetching(const int R, const int shared, const Rows *rows, int from, int64_t bytes) {
  int64_t before = (shared ? rows->part * (ROWS / R) + from / R : from / R) * ((bytes + LINE - 1) / LINE);
  int64_t at = shared ? (before + rows->parts - 1) / rows->parts : before;
  const char *first = (const char *)rows->at[0] + AHEAD, *second = (const char *)rows->at[4] + AHEAD - 4 * bytes;
  return (Fetch){first, second, at * R * LINE, 4 * bytes, at * rows->parts - before, rows->parts};
}
INLINE void fetch(const int R, const int shared, Fetch *f) {
  if (shared && f->wait--) return;
  const char *next = (f->at < f->turn ? f->first : f->second) + f->at;
  UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(next + r * LINE, 0, 2);
  f->at += R * LINE;
  if (shared) f->wait = f->parts - 1;
}

// out[r][c] = w[r] . x[c] for R rows of a matrix and C vectors: each is read once for all of the other. The order of
// additions is the same for every R and C: a token's numbers do not depend on the tokens beside it.
INLINE void tile(const int R, const int C, const int coded, const int shared, const Rows *rows, int from,
                 const Vector *x, int64_t n, float out[][4]) {
  const void *const *w = rows->at + from;
  Fetch ahead = fetching(R, shared, rows, from, n * (coded ? 1 : sizeof(weight)));
  lanes sum[8][4];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) sum[r][c] = (lanes){0};
  int64_t i = 0;
#ifdef HALVES
  // Vectors are rounded to bfloat16 too, as in PyTorch's products; sums stay float32. Twice the products an instruction.
  for (; !coded && i + 2 * LANES <= n; i += 2 * LANES) {
    __m512bh column[4];
    UNROLL for (int c = 0; c < C; c++) column[c] = (__m512bh)_mm512_loadu_si512(x[c].short_x + i);
    fetch(R, shared, &ahead);
    UNROLL for (int r = 0; r < R; r++) {
      __m512bh row = (__m512bh)_mm512_loadu_si512((const weight *)w[r] + i);
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
    fetch(R, shared, &ahead);
    UNROLL for (int r = 0; r < R; r++) {
      whole_lanes two = (whole_lanes)_mm512_loadu_si512((const weight *)w[r] + i);
      lanes first = (lanes)(two << 16), second = (lanes)(two & 0xffff0000u);
      UNROLL for (int c = 0; c < C; c++) sum[r][c] += first * even[c];
      UNROLL for (int c = 0; c < C; c++) sum[r][c] += second * odd[c];
    }
  }
#endif
  for (; i + LANES <= n; i += LANES) {
    lanes column[4];
    UNROLL for (int c = 0; c < C; c++) column[c] = *(const lanes *)(x[c].x + i);
    if (i * (coded ? 1 : sizeof(weight)) % LINE == 0) fetch(R, shared, &ahead);
    UNROLL for (int r = 0; r < R; r++) {
      lanes row = load_part(coded, w[r], i);
      UNROLL for (int c = 0; c < C; c++) sum[r][c] += row * column[c];
    }
  }
  totals(R, C, sum, out[0]);
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
  v->short_x = to, v->step = largest / 32767;
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
    column[c] = _mm512_loadu_si512(x[c / PARTS].short_x + c % PARTS * apart + i);
  UNROLL for (int r = 0; r < R; r++) {
    const int8_t *codes = (const int8_t *)w[r] + i;
    __m512i row = _mm512_cvtepi8_epi16(last ? _mm256_maskz_loadu_epi8(inside, codes)
                                            : _mm256_loadu_si256((const __m256i *)codes));
    UNROLL for (int c = 0; c < C * PARTS; c++) sum[r][c] = add_pairs(sum[r][c], row, column[c]);
  }
}

// out[r][c] = codes w[r] . x[c] / step[c].
INLINE void fixed_tile(const int R, const int C, const int shared, const Rows *rows, int from, const Vector *x,
                       int64_t n, float out[][4]) {
  const void *const *w = rows->at + from;
  Fetch ahead = fetching(R, shared, rows, from, n);
  for (int64_t first = 0; first < n; first += EXACT) {
    int64_t i = first, end = first + EXACT < n ? first + EXACT : n;
    __m512i sum[8][4 * PARTS];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int c = 0; c < C * PARTS; c++) sum[r][c] = _mm512_setzero_si512();
    for (; i + 2 * PAIRS <= end; i += 2 * PAIRS) {
      fetch(R, shared, &ahead);
      add_codes(R, C, 0, 0, sum, w, x, PADDED(n), i);
      add_codes(R, C, 0, 0, sum, w, x, PADDED(n), i + PAIRS);
    }
    for (; i < end; i += PAIRS)
      add_codes(R, C, 1, end - i < PAIRS ? (1u << (end - i)) - 1 : 0xffffffff, sum, w, x, PADDED(n), i);
    lanes value[8][4];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int c = 0; c < C; c++) {
        value[r][c] = (lanes)_mm512_cvtepi32_ps(sum[r][c * PARTS]);
        if (PARTS == 2) value[r][c] += (lanes)_mm512_cvtepi32_ps(sum[r][c * PARTS + PARTS - 1]) * (1.0f / 32768);
      }
    float part[8][4];
    totals(R, C, value, part[0]);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) out[r][c] = part[r][c] + (first ? out[r][c] : 0);
  }
}
#endif

// Vectors (count, n), made ready to meet a matrix. room: 2 * count * (n + 31) numbers.
static void vectors(Vector *v, const float *x, int64_t count, int64_t n, Matrix to_meet, int16_t *room) {
  for (int64_t c = 0; c < count; c++) {
    v[c] = (Vector){x + c * n, NULL, 1};
#ifdef FIXED
    if (to_meet.scales) to_fixed(v + c, n, room + c * PARTS * PADDED(n));
#endif
#ifdef HALVES
    if (!to_meet.scales) to_half((uint16_t *)room + c * n, v[c].x, n), v[c].short_x = room + c * n;
#endif
  }
}

typedef float four[4];
INLINE four *from_column(four *out, int c) { return (four *)&out[0][c]; }

// ROWS rows by up to four vectors, as many at a time as there are registers.
INLINE void rows_by_some(const int shared, int count, const Rows *rows, const Vector *x, int64_t n, float out[ROWS][4]) {
  if (!rows->coded) {
    if (count == 1) tile(8, 1, 0, shared, rows, 0, x, n, out);
    else if (count == 2) tile(8, 2, 0, shared, rows, 0, x, n, out);
    else if (count == 3) tile(4, 3, 0, shared, rows, 0, x, n, out), tile(4, 3, 0, shared, rows, 4, x, n, out + 4);
    else tile(4, 4, 0, shared, rows, 0, x, n, out), tile(4, 4, 0, shared, rows, 4, x, n, out + 4);
    return;
  }
#ifdef FIXED
#if PARTS == 1
  if (count == 1) fixed_tile(8, 1, shared, rows, 0, x, n, out);
  else if (count == 2) fixed_tile(8, 2, shared, rows, 0, x, n, out);
  else if (count == 3) fixed_tile(8, 3, shared, rows, 0, x, n, out);
  else fixed_tile(4, 4, shared, rows, 0, x, n, out), fixed_tile(4, 4, shared, rows, 4, x, n, out + 4);
#else
  for (int c = 0; c < count; c += 2)
    if (c + 1 == count) fixed_tile(8, 1, shared, rows, 0, x + c, n, from_column(out, c));
    else {
      fixed_tile(4, 2, shared, rows, 0, x + c, n, from_column(out, c));
      fixed_tile(4, 2, shared, rows, 4, x + c, n, from_column(out + 4, c));
    }
#endif
#else
  for (int c = 0; c < count; c += 2)
    for (int r = 0; r < ROWS; r += 4)
      if (c + 1 == count) tile(4, 1, 1, shared, rows, r, x + c, n, from_column(out + r, c));
      else tile(4, 2, 1, shared, rows, r, x + c, n, from_column(out + r, c));
#endif
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < count; c++) out[r][c] *= rows->scale[r] * x[c].step;
}

// Not inlined: it is compiled once.
static void __attribute__((noinline)) rows_by_vectors(int count, const Rows *rows, const Vector *x, int64_t n,
                                                      float out[ROWS][4]) {
  if (rows->parts > 1) rows_by_some(1, count, rows, x, n, out);
  else rows_by_some(0, count, rows, x, n, out);
}

static float dot(const float *a, const float *b, int64_t n) {
  lanes sum = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += *(const lanes *)(a + i) * *(const lanes *)(b + i);
  float result = total(sum);
  for (; i < n; i++) result += a[i] * b[i];
  return result;
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
