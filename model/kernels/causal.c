// Causal attention of MLA on CPU, forward and backward: some queries at a time, scores and weights never leave the cache
// (Dao et al. 2022, FlashAttention), and heads are read and written where the projections have them.
//
//   q (batch, queries, heads, nope + rope), kv (batch, keys, heads, nope + value), k_rope (batch, keys, rope), one for all
//   heads and rotated; angles (batch or 1, queries, rope / 2, 2) = cos, sin that turn q's last `rope` numbers here.
//
// Numbers are float32, or bfloat16 (-DBF16) whose products are summed in float32. Every head is computed by one thread
// alone, so the same input gives the same bits. nope, rope and value are multiples of LANES.

#include <stdlib.h>

#include "tiles.h"

#define QUERIES 64  // at a time
typedef struct {
  int64_t batch, queries, keys, heads, nope, rope, value, k_rope_stride, k_rope_batch, angles_batch;
  float scale;
} Sizes;

// out (m, n) = a b, or += with `more`. Unit k of row r of a: a[r * a_row + k * a_unit]; b (depth, n). m is a multiple of
// TILE, n of LANES.
static void product(float *out, int64_t out_step, const unit *a, int64_t a_row, int64_t a_unit, const unit *b,
                    int64_t b_step, int64_t m, int64_t n, int64_t depth, int more) {
  for (int64_t j = 0; j < n;) {
    int columns = n % (3 * LANES) == 0 ? 3 : n - j >= 2 * LANES ? 2 : 1;
    for (int64_t i = 0; i < m; i += TILE) {
      float *place = out + i * out_step + j;
      const unit *left = a + i * a_row, *right = b + j;
      if (columns == 3) tile(3, place, out_step, left, a_row, a_unit, right, b_step, depth, more);
      if (columns == 2) tile(2, place, out_step, left, a_row, a_unit, right, b_step, depth, more);
      if (columns == 1) tile(1, place, out_step, left, a_row, a_unit, right, b_step, depth, more);
    }
    j += columns * LANES;
  }
}

#ifdef BF16  // units of the numbers of two rows
INLINE units both_halves(lanes low, lanes high) {
  half_lanes halves[2];
  store((number *)halves, low);
  store((number *)(halves + 1), high);
  return __builtin_convertvector(halves[0], units) | __builtin_convertvector(halves[1], units) << 16;
}
#endif

// Eight pairs of numbers turned by their angles, (cos, sin) of each; `sign` -1: back.
INLINE lanes turned_by(lanes x, const float *angles, float sign) {
  const whole_lanes other = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
  const whole_lanes even = {0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14};
  const lanes signs = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
  lanes angle = *(const lanes *)angles;
  lanes sine = __builtin_shuffle(angle, even + 1) * signs * sign;
  return x * __builtin_shuffle(angle, even) + __builtin_shuffle(x, other) * sine;
}

typedef struct {
  unit *k_columns, *k_pairs, *v_columns, *v_pairs;  // (qk / PAIR, keys), (keys / PAIR, qk), the same of v
  unit *q_rows, *q_pairs, *grad_rows, *grad_pairs, *weight_pairs;
  float *scores, *grads, *out, *to_k, *to_v;
  int64_t keys, wide;
} Place;

// Cuts scratch memory into what a head needs; returns how many numbers of 4 bytes that is.
static int64_t cut(Place *place, float *memory, const Sizes *s, int back) {
  int64_t keys = up_to(s->keys + QUERIES, 2 * LANES), qk = s->nope + s->rope, value = s->value, used = 0;
  int64_t wide = keys + LANES;  // rows of scores do not all begin at the same place of the cache
  place->keys = keys, place->wide = wide;
#define TAKE(name, count) place->name = (void *)(memory + used), used += up_to(count, LANES)
  TAKE(k_columns, qk / PAIR * keys);
  TAKE(v_pairs, keys / PAIR * value);
  TAKE(q_rows, QUERIES * qk / PAIR);
  TAKE(scores, QUERIES * wide);
  TAKE(out, QUERIES * (qk > value ? qk : value));
  if (back) {
    TAKE(k_pairs, keys / PAIR * qk);
    TAKE(v_columns, value / PAIR * keys);
    TAKE(q_pairs, QUERIES / PAIR * qk);
    TAKE(grad_rows, QUERIES * value / PAIR);
    TAKE(grad_pairs, QUERIES / PAIR * value);
    TAKE(weight_pairs, QUERIES * wide / PAIR);
    TAKE(grads, QUERIES * wide);
    TAKE(to_k, keys * qk);
    TAKE(to_v, keys * value);
  }
  return used;
}

int64_t scratch(const Sizes *s, int back) {
  Place place;
  return cut(&place, NULL, s, back);
}

// Rows of queries of one head, turned, zeros behind them up to a whole tile. x: the first.
static void load_queries(Place *place, const Sizes *s, const number *x, const float *angles, int64_t many) {
  int64_t qk = s->nope + s->rope;
  number *rows = (number *)place->q_rows;
  for (int64_t r = 0; r < many; r++) {
    memcpy(rows + r * qk, x + r * s->heads * qk, qk * sizeof(number));
    for (int64_t i = 0; i < s->rope; i += LANES) {
      number *place = rows + r * qk + s->nope + i;
      store(place, turned_by(load(place), angles + r * s->rope + i, 1));
    }
  }
  memset(rows + many * qk, 0, (up_to(many, TILE) - many) * qk * sizeof(number));
}

// out (batch, queries, heads, value) and the logarithm of each query's sum of exponentials, (batch, heads, queries).
void attend(number *out, float *log_sum, const number *q, const number *kv, const number *k_rope, const float *angles,
            float *memory, const Sizes *sizes, int threads) {
  const Sizes s = *sizes;
  int64_t qk = s.nope + s.rope, heads = s.heads, kv_step = heads * (s.nope + s.value), past = s.keys - s.queries;
  int64_t each = scratch(sizes, 0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; t++) {
    Place p;
    cut(&p, memory + t * each, &s, 0);
    memset(p.k_columns, 0, qk / PAIR * p.keys * 4);
    memset(p.v_pairs, 0, p.keys / PAIR * s.value * 4);
    for (int64_t task = s.batch * heads * t / threads; task < s.batch * heads * (t + 1) / threads; task++) {
      int64_t b = task / heads, h = task % heads;
      const number *k = kv + b * s.keys * kv_step + h * (s.nope + s.value);
      transposed(p.k_columns, p.keys, k, kv_step, s.keys, s.nope);
      transposed(p.k_columns + s.nope / PAIR * p.keys, p.keys, k_rope + b * s.k_rope_batch, s.k_rope_stride, s.keys, s.rope);
      side_by_side(p.v_pairs, s.value, k + s.nope, kv_step, s.keys, s.value);
      for (int64_t start = 0; start < s.queries; start += QUERIES) {
        int64_t many = s.queries - start < QUERIES ? s.queries - start : QUERIES, rows = up_to(many, TILE);
        int64_t end = up_to(past + start + many, 2 * LANES), first = b * s.queries + start;
        load_queries(&p, &s, q + (first * heads + h) * qk, angles + b * s.angles_batch + start * s.rope, many);
        product(p.scores, p.wide, p.q_rows, qk / PAIR, 1, p.k_columns, p.keys, rows, end, qk / PAIR, 0);
        float inverse[QUERIES];
        for (int64_t r = 0; r < rows; r++) {
          float *row = p.scores + r * p.wide;
          int64_t seen = past + start + r + 1;
          lanes most = all(-INFINITY), sum = all(0);
          int64_t last = (seen - 1) / LANES * LANES;  // the only lanes of which a part is hidden
          lanes *edge = (lanes *)(row + last);
          *edge = choose(within(seen - last), *edge, all(-INFINITY));
          for (int64_t i = 0; i <= last; i += LANES) {
            lanes v = *(lanes *)(row + i);
            most = choose(v > most, v, most);
          }
          float top = largest(most);
          for (int64_t i = 0; i <= last; i += LANES) {
            lanes v = exp_lanes((*(lanes *)(row + i) - top) * s.scale);
            if (i == last) v = choose(within(seen - last), v, all(0));
            sum += v;
            store((number *)row + i, v);  // in place: never ahead of what is read
          }
          for (int64_t i = last + LANES; i < end; i += LANES) store((number *)row + i, all(0));
          float whole = total(sum);
          inverse[r] = 1 / whole;
          if (r < many) log_sum[(b * heads + h) * s.queries + start + r] = top * s.scale + logf(whole);
        }
        product(p.out, s.value, (unit *)p.scores, p.wide, 1, p.v_pairs, s.value, rows, s.value, end / PAIR, 0);
        for (int64_t r = 0; r < many; r++)
          for (int64_t i = 0; i < s.value; i += LANES)
            store(out + ((first + r) * heads + h) * s.value + i, *(lanes *)(p.out + r * s.value + i) * inverse[r]);
      }
    }
  }
}

// The gradients of q, of kv, and of k_rope head by head: to_k_rope (batch, keys, heads, rope). grad: of out.
void attend_back(number *to_q, number *to_kv, number *to_k_rope, const number *grad, const float *log_sum,
                 const number *q, const number *kv, const number *k_rope, const float *angles, float *memory,
                 const Sizes *sizes, int threads) {
  const Sizes s = *sizes;
  int64_t qk = s.nope + s.rope, value = s.value, heads = s.heads, kv_step = heads * (s.nope + value);
  int64_t past = s.keys - s.queries, each = scratch(sizes, 1);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; t++) {
    Place p;
    memset(memory + t * each, 0, each * 4);
    cut(&p, memory + t * each, &s, 1);
    for (int64_t task = s.batch * heads * t / threads; task < s.batch * heads * (t + 1) / threads; task++) {
      int64_t b = task / heads, h = task % heads;
      const number *k = kv + b * s.keys * kv_step + h * (s.nope + value), *turned = k_rope + b * s.k_rope_batch;
      transposed(p.k_columns, p.keys, k, kv_step, s.keys, s.nope);
      transposed(p.k_columns + s.nope / PAIR * p.keys, p.keys, turned, s.k_rope_stride, s.keys, s.rope);
      side_by_side(p.k_pairs, qk, k, kv_step, s.keys, s.nope);
      side_by_side(p.k_pairs + s.nope, qk, turned, s.k_rope_stride, s.keys, s.rope);
      transposed(p.v_columns, p.keys, k + s.nope, kv_step, s.keys, value);
      memset(p.to_k, 0, p.keys * qk * 4);
      memset(p.to_v, 0, p.keys * value * 4);
      for (int64_t start = 0; start < s.queries; start += QUERIES) {
        int64_t many = s.queries - start < QUERIES ? s.queries - start : QUERIES, rows = up_to(many, TILE);
        int64_t end = up_to(past + start + many, 2 * LANES), first = b * s.queries + start;
        const float *log_sums = log_sum + (b * heads + h) * s.queries + start;
        load_queries(&p, &s, q + (first * heads + h) * qk, angles + b * s.angles_batch + start * s.rope, many);
        number *grads = (number *)p.grad_rows;
        for (int64_t r = 0; r < rows; r++)
          if (r < many)
            memcpy(grads + r * value, grad + ((first + r) * heads + h) * value, value * sizeof(number));
          else
            memset(grads + r * value, 0, value * sizeof(number));
        side_by_side(p.q_pairs, qk, (number *)p.q_rows, qk, rows, qk);
        side_by_side(p.grad_pairs, value, grads, value, rows, value);
        product(p.scores, p.wide, p.q_rows, qk / PAIR, 1, p.k_columns, p.keys, rows, end, qk / PAIR, 0);
        product(p.grads, p.wide, p.grad_rows, value / PAIR, 1, p.v_columns, p.keys, rows, end, value / PAIR, 0);
        for (int64_t r = 0; r < rows; r++) {
          float *row = p.scores + r * p.wide, *to = p.grads + r * p.wide;
          int64_t seen = r < many ? past + start + r + 1 : 0;
          lanes sum = all(0);
          for (int64_t i = 0; i < end; i += LANES) {
            lanes v = all(0);
            if (i < seen) v = exp_lanes(*(lanes *)(row + i) * s.scale - log_sums[r]);
            if (i + LANES > seen) v = choose(within(seen - i), v, all(0));
            sum += v * *(lanes *)(to + i);
            *(lanes *)(row + i) = v;
          }
          float share = total(sum);
          for (int64_t i = 0; i < end; i += LANES)
            *(lanes *)(to + i) = *(lanes *)(row + i) * (*(lanes *)(to + i) - share) * s.scale;
        }
        const unit *weights = (unit *)p.scores, *wrong = (unit *)p.grads;  // as pairs of rows
#ifdef BF16
        for (int64_t r = 0; r < rows; r += 2)
          for (int64_t i = 0; i < end; i += LANES) {
            lanes *v = (lanes *)(p.scores + r * p.wide + i), *w = (lanes *)(p.scores + (r + 1) * p.wide + i);
            *(units *)(p.scores + r / 2 * p.wide + i) = both_halves(*v, *w);  // rows before r are done with
            lanes x = *(lanes *)(p.grads + r * p.wide + i), y = *(lanes *)(p.grads + (r + 1) * p.wide + i);
            *(units *)(p.weight_pairs + r / 2 * p.wide + i) = both_halves(x, y);
            store((number *)(p.grads + r * p.wide) + i, x);
            store((number *)(p.grads + (r + 1) * p.wide) + i, y);
          }
        wrong = p.weight_pairs;
#endif
        product(p.to_v, value, weights, 1, p.wide, p.grad_pairs, value, end, value, rows / PAIR, 1);
        product(p.to_k, qk, wrong, 1, p.wide, p.q_pairs, qk, end, qk, rows / PAIR, 1);
        product(p.out, qk, (unit *)p.grads, p.wide, 1, p.k_pairs, qk, rows, qk, end / PAIR, 0);
        for (int64_t r = 0; r < many; r++) {
          number *to = to_q + ((first + r) * heads + h) * qk;
          float *row = p.out + r * qk;
          const float *angle = angles + b * s.angles_batch + (start + r) * s.rope;
          for (int64_t i = 0; i < s.nope; i += LANES) store(to + i, *(lanes *)(row + i));
          for (int64_t i = 0; i < s.rope; i += LANES)
            store(to + s.nope + i, turned_by(*(lanes *)(row + s.nope + i), angle + i, -1));
        }
      }
      for (int64_t r = 0; r < s.keys; r++) {
        number *to = to_kv + (b * s.keys + r) * kv_step + h * (s.nope + value);
        for (int64_t i = 0; i < s.nope; i += LANES) store(to + i, *(lanes *)(p.to_k + r * qk + i));
        for (int64_t i = 0; i < value; i += LANES) store(to + s.nope + i, *(lanes *)(p.to_v + r * value + i));
        number *turned = to_k_rope + ((b * s.keys + r) * heads + h) * s.rope;
        for (int64_t i = 0; i < s.rope; i += LANES) store(turned + i, *(lanes *)(p.to_k + r * qk + s.nope + i));
      }
    }
  }
}
