// The products of many experts with few rows each, in training on CPU: one call for all experts, shared out among the
// threads by expert and columns. A library's product for each would spend its time on being called and on arranging a
// matrix that few rows meet.
//
// Rows are bfloat16 (-DBF16), weights float32 as the optimiser holds them: each is rounded while it is brought into the
// order that products read, in the processor's cache. Sums are float32, and their order does not depend on the threads.
// ends (experts,): one past the last row of each, all multiples of TILE. Features are multiples of 2 * LANES.

#include "tiles.h"

#if defined(BF16) && defined(__AVX512BF16__)
#include <omp.h>

#define COLUMNS 128         // of the result that one task computes
#define PANEL (2 * LANES)   // of them at a time: what they read stays in the first cache
#define DEPTH (128 * PAIR)  // rows at a time that a gradient sums over
#define LINE 64             // bytes

// 4-byte numbers of scratch memory for each thread.
int64_t scratch(int64_t out, int64_t in) {
  int64_t widest = out > in ? out : in, product = PANEL * widest / PAIR;
  int64_t gradient = (COLUMNS + 3 * LANES) * DEPTH / PAIR;
  return product > gradient ? product : gradient;
}

INLINE __m512i rounded(const float *low, const float *high) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low));
}

// to (depth, PANEL) units = rows of w (PANEL, 2 depth), which become columns: 16 x 16 units are turned at a time.
static void turn(unit *to, const float *w, int64_t step, int64_t depth) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int64_t j = 0; j < PANEL; j += LANES)
    for (int64_t k = 0; k < depth; k += LANES) {
      __m512i rows[LANES], turned[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) {
        const float *from = w + (j + r) * step + k * PAIR;
        rows[r] = rounded(from, from + LANES);
      }
#pragma GCC unroll 4
      for (int times = 0; times < 4; times++) {
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
          turned[2 * r] = _mm512_permutex2var_epi32(rows[r], low, rows[r + 8]);
          turned[2 * r + 1] = _mm512_permutex2var_epi32(rows[r], high, rows[r + 8]);
        }
        memcpy(rows, turned, sizeof rows);
      }
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) _mm512_storeu_si512(to + (k + r) * PANEL + j, rows[r]);
    }
}

// to (depth, PANEL) units = columns of w (2 depth, PANEL), two rows side by side.
static void join(unit *to, const float *w, int64_t step, int64_t depth) {
  for (int64_t k = 0; k < depth; k++)
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const float *from = w + k * PAIR * step + j;
      __m512i one = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
      __m512i two = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + step)));
      _mm512_storeu_si512(to + k * PANEL + j, _mm512_or_si512(one, _mm512_slli_epi32(two, 16)));
    }
}

// Weights that the next task will read: `runs` of `run` lines, `step` bytes apart. They come into the second cache while
// this one multiplies.
typedef struct {
  const char *at;
  int64_t runs, run, step, left;
} Fetch;

// sums (TILE, PANEL) = TILE rows of a times a panel, both `depth` units deep; the first `lines` of them fetch a line each.
static void multiply(float *sums, const unit *a, const unit *panel, int64_t depth, Fetch *next, int64_t lines) {
  lanes sum[TILE][2];
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++) sum[r][0] = sum[r][1] = all(0);
  for (int64_t k = 0; k < depth; k++) {
    units left = *(const units *)(panel + k * PANEL), right = *(const units *)(panel + k * PANEL + LANES);
    if (k < lines && next->runs) {
      __builtin_prefetch(next->at, 0, 2);
      next->at += LINE;
      if (!--next->left) next->at += next->step - next->run * LINE, next->left = next->run, next->runs--;
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++) {
      units row = (units){0} + a[r * depth + k];
      sum[r][0] = dot(row, left, sum[r][0]), sum[r][1] = dot(row, right, sum[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++) *(lanes *)(sums + r * PANEL) = sum[r][0], *(lanes *)(sums + r * PANEL + LANES) = sum[r][1];
}

// What a task of `grouped_product` computes: columns start .. until of one expert's rows.
typedef struct {
  int64_t expert, from, to, start, until;
} Task;

// The next task that has rows, or one of no expert. `taken` is shared by the threads.
static Task next_task(int64_t *taken, const int64_t *ends, int64_t experts, int64_t wide) {
  const int64_t parts = (wide + COLUMNS - 1) / COLUMNS;
  for (;;) {
    int64_t number = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED), e = number / parts, start = number % parts * COLUMNS;
    if (e >= experts) return (Task){-1, 0, 0, 0, 0};
    int64_t from = e ? ends[e - 1] : 0;
    if (from < ends[e]) return (Task){e, from, ends[e], start, start + COLUMNS < wide ? start + COLUMNS : wide};
  }
}

// out (R, O) = x (R, I) w_e^T for each expert's rows; or with `back` out (R, I) = x (R, O) w_e. w (experts, O, I).
void grouped_product(number *out, const number *x, const float *w, const int64_t *ends, int64_t experts, int64_t O,
                     int64_t I, int back, float *memory, int threads) {
  const int64_t depth = (back ? O : I) / PAIR, wide = back ? I : O, row = I * (int64_t)sizeof(float);
  int64_t taken = 0;
#pragma omp parallel num_threads(threads)
  {
    unit *panel = (unit *)(memory + omp_get_thread_num() * scratch(O, I));
    for (Task now = next_task(&taken, ends, experts, wide), then; now.expert >= 0; now = then) {
      then = next_task(&taken, ends, experts, wide);
      const float *matrix = w + now.expert * O * I;
      const int64_t calls = (now.to - now.from) / TILE * ((now.until - now.start) / PANEL), width = then.until - then.start;
      Fetch next = {NULL, 0, 1, 0, 1};
      if (then.expert >= 0 && back)
        next = (Fetch){(const char *)(w + then.expert * O * I + then.start), O, width * 4 / LINE, row, width * 4 / LINE};
      else if (then.expert >= 0)
        next = (Fetch){(const char *)(w + (then.expert * O + then.start) * I), width, row / LINE, row, row / LINE};
      const int64_t lines = (next.runs * next.run + calls - 1) / calls;
      for (int64_t j = now.start; j < now.until; j += PANEL) {
        if (back) join(panel, matrix + j, I, depth);
        else turn(panel, matrix + j * I, I, depth);
        for (int64_t r = now.from; r < now.to; r += TILE) {
          float sums[TILE * PANEL] __attribute__((aligned(64)));
          multiply(sums, (const unit *)(x + r * depth * PAIR), panel, depth, &next, lines);
#pragma GCC unroll 8
          for (int i = 0; i < TILE; i++)
            for (int k = 0; k < PANEL; k += LANES)
              store(out + (r + i) * wide + j + k, *(const lanes *)(sums + i * PANEL + k));
        }
      }
    }
  }
}

// to (experts, O, I) = grad^T x over each expert's rows, 0 where it has none. grad (R, O); x (R, I).
void grouped_gradient(float *to, const number *grad, const number *x, const int64_t *ends, int64_t experts, int64_t O,
                      int64_t I, float *memory, int threads) {
  const int64_t tasks = (O + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < experts * tasks; task++) {
    const int64_t e = task / tasks, start = task % tasks * COLUMNS, first = e ? ends[e - 1] : 0;
    const int64_t until = start + COLUMNS < O ? start + COLUMNS : O;
    unit *left = (unit *)(memory + omp_get_thread_num() * scratch(O, I)), *right = left + COLUMNS * DEPTH / PAIR;
    float *place = to + e * O * I;
    // Written once, past the cache: lines that are overwritten as a whole need not be read before.
    const int once = ends[e] - first <= DEPTH && (uintptr_t)place % 64 == 0 && I % LANES == 0;
    if (first == ends[e]) memset(place + start * I, 0, (until - start) * I * sizeof(float));
    for (int64_t row = first; row < ends[e]; row += DEPTH) {
      const int64_t many = ends[e] - row < DEPTH ? ends[e] - row : DEPTH, depth = many / PAIR;
      for (int64_t o = start; o < until; o += LANES)
        side_by_side(left + (o - start) * depth, LANES, grad + row * O + o, O, many, LANES);
      for (int64_t i = 0; i < I;) {
        const int columns = I - i >= 3 * LANES && I - i != 4 * LANES ? 3 : I - i >= 2 * LANES ? 2 : 1;
        side_by_side(right, columns * LANES, x + row * I + i, I, many, columns * LANES);
        for (int64_t o = start; o < until; o += TILE) {
          const unit *a = left + (o - start) / LANES * LANES * depth + (o - start) % LANES;
          float *result = place + o * I + i, sums[TILE * 3 * LANES] __attribute__((aligned(64)));
          float *to_tile = once ? sums : result;
          const int64_t step = once ? columns * LANES : I;
          if (columns == 3) tile(3, to_tile, step, a, 1, LANES, right, 3 * LANES, depth, row > first);
          else if (columns == 2) tile(2, to_tile, step, a, 1, LANES, right, 2 * LANES, depth, row > first);
          else tile(1, to_tile, step, a, 1, LANES, right, LANES, depth, row > first);
          for (int r = 0; r < TILE && once; r++)
            for (int c = 0; c < columns * LANES; c += LANES)
              _mm512_stream_ps(result + r * I + c, _mm512_load_ps(sums + r * step + c));
        }
        i += columns * LANES;
      }
    }
  }
}
#endif
