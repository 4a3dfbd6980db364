// The inner loop of matrix products: a tile of the result stays in registers. For causal.c and products.c.

#include "lanes.h"

#define TILE 8      // rows of a product kept in registers
#ifdef BF16
#define PAIR 2
#else
#define PAIR 1
#endif
typedef int32_t unit __attribute__((may_alias));  // PAIR numbers that are neighbours along what a product sums over: one float32 or two bfloat16
typedef int32_t units __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE int64_t up_to(int64_t n, int64_t block) { return (n + block - 1) / block * block; }

// sum + a b, over the PAIR numbers of each unit.
INLINE lanes dot(units a, units b, lanes sum) {
#if defined(BF16) && defined(__AVX512BF16__)
  return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#elif defined(BF16)
  sum += (lanes)(a << 16) * (lanes)(b << 16);
  return sum + (lanes)(a & (int32_t)0xffff0000) * (lanes)(b & (int32_t)0xffff0000);
#else
  return sum + (lanes)a * (lanes)b;
#endif
}

// TILE rows and `columns` * LANES columns of a product.
INLINE void tile(const int columns, float *out, int64_t out_step, const unit *a, int64_t a_row, int64_t a_unit,
                 const unit *b, int64_t b_step, int64_t depth, int more) {
  lanes sum[TILE][3];
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++)
#pragma GCC unroll 3
    for (int c = 0; c < columns; c++) sum[r][c] = more ? *(const lanes *)(out + r * out_step + c * LANES) : all(0);
  for (int64_t k = 0; k < depth; k++) {
    units right[3];
#pragma GCC unroll 3
    for (int c = 0; c < columns; c++) right[c] = *(const units *)(b + k * b_step + c * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++) {
      units left = (units){0} + a[r * a_row + k * a_unit];
#pragma GCC unroll 3
      for (int c = 0; c < columns; c++) sum[r][c] = dot(left, right[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++)
#pragma GCC unroll 3
    for (int c = 0; c < columns; c++) *(lanes *)(out + r * out_step + c * LANES) = sum[r][c];
}

// to[(r / PAIR) * step + j] = number j of the PAIR rows from r on; a row that is not there is 0. n: a multiple of LANES.
static void side_by_side(unit *to, int64_t step, const number *x, int64_t x_step, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; r += PAIR)
    for (int64_t j = 0; j < n; j += LANES) {
      units *place = (units *)(to + r / PAIR * step + j);
#ifdef BF16
      units both = __builtin_convertvector(*(const half_lanes *)(x + r * x_step + j), units);
      if (r + 1 < rows) both |= __builtin_convertvector(*(const half_lanes *)(x + (r + 1) * x_step + j), units) << 16;
      *place = both;
#else
      *place = *(const units *)(x + r * x_step + j);
#endif
    }
}

// to[k * step + r] = unit k of row r: rows of x become columns.
static void transposed(unit *to, int64_t step, const number *x, int64_t x_step, int64_t rows, int64_t n) {
  for (int64_t start = 0; start < rows; start += LANES)
    for (int64_t k = 0; k < n / PAIR; k++)
      for (int64_t r = start; r < start + LANES && r < rows; r++) memcpy(to + k * step + r, x + r * x_step + k * PAIR, 4);
}
