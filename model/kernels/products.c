// Products of experts in float32, into place, and gradients of weights on CPU: grad^T x summed in float32 and written as float32, where the optimiser reads it. Libraries
// are at their slowest here, since both matrices are summed over along their rows (docs/lab-log.md).
//
// Numbers are float32, or bfloat16 (-DBF16). Every thread computes some rows of the result, summing over the tokens in
// the same order whatever the number of threads.

#include "tiles.h"

#define DEPTH (128 * PAIR)  // tokens at a time: what is read again and again fits into the first cache
#define PANEL (3 * LANES)   // columns at a time

// 4-byte numbers of scratch memory for each thread.
int64_t scratch(int64_t out, int threads) { return 128 * (up_to(out, LANES * threads) / threads + LANES + PANEL); }

// to (out, in) = grad^T x, or += with `more`. grad (tokens, out): rows grad_step apart; x (tokens, in): rows x_step apart. out and in are
// multiples of LANES.
void weight_gradient(float *to, const number *grad, int64_t grad_step, const number *x, int64_t x_step, int64_t tokens,
                     int64_t out, int64_t in, int more, float *memory, int threads) {
  int64_t each = scratch(out, threads), blocks = out / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; t++) {
    int64_t from = blocks * t / threads * LANES, until = blocks * (t + 1) / threads * LANES;
    unit *left = (unit *)(memory + t * each), *right = left + 128 * (until - from);
    for (int64_t start = 0; start < tokens; start += DEPTH) {
      int64_t many = tokens - start < DEPTH ? tokens - start : DEPTH, depth = up_to(many, PAIR) / PAIR;
      for (int64_t o = from; o < until; o += LANES)
        side_by_side(left + (o - from) * depth, LANES, grad + start * grad_step + o, grad_step, many, LANES);
      for (int64_t i = 0; i < in;) {
        int64_t rest = in - i;
        int columns = rest >= 3 * LANES && rest != 4 * LANES ? 3 : rest >= 2 * LANES ? 2 : 1;
        side_by_side(right, columns * LANES, x + start * x_step + i, x_step, many, columns * LANES);
        for (int64_t o = from; o < until; o += TILE) {
          float *place = to + o * in + i;
          const unit *a = left + (o - from) / LANES * LANES * depth + (o - from) % LANES;
          if (columns == 3) tile(3, place, in, a, 1, LANES, right, 3 * LANES, depth, more || start);
          if (columns == 2) tile(2, place, in, a, 1, LANES, right, 2 * LANES, depth, more || start);
          if (columns == 1) tile(1, place, in, a, 1, LANES, right, 1 * LANES, depth, more || start);
        }
        i += columns * LANES;
      }
    }
  }
}

// out (m, n) = a (m, k) b; b (k, n), or with `turned` (n, k). Rows of a and out follow each other at once. m is a multiple
// of TILE, k and n of LANES. memory: k * n units, shared by the threads.
void multiply(float *out, const number *a, const number *b, int turned, int64_t m, int64_t k, int64_t n, float *memory,
              int threads) {
  unit *panels = (unit *)memory;
  int64_t depth = k / PAIR;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < n; j += 2 * LANES) {  // each panel's rows follow each other
      int64_t wide = n - j < 2 * LANES ? n - j : 2 * LANES;
      unit *to = panels + j * depth;
      if (turned)
        transposed(to, wide, b + j * k, k, wide, k);
      else
        side_by_side(to, wide, b + j, n, k, wide);
    }
#pragma omp for schedule(static)
    for (int64_t rows = 0; rows < m; rows += 8 * TILE)
      for (int64_t j = 0; j < n; j += 2 * LANES)
        for (int64_t i = rows; i < m && i < rows + 8 * TILE; i += TILE) {
          const unit *left = (const unit *)(a + i * k), *right = panels + j * depth;
          if (n - j < 2 * LANES)
            tile(1, out + i * n + j, n, left, depth, 1, right, LANES, depth, 0);
          else
            tile(2, out + i * n + j, n, left, depth, 1, right, 2 * LANES, depth, 0);
        }
  }
}
