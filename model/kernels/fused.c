// What lies between the matrix products of training on CPU, each as one pass over memory, forward and backward: SwiGLU,
// RMSNorm, the softmax of causal attention, cross entropy, and AdamW. As PyTorch operations they are six passes and more.
//
// Numbers are float32, or bfloat16 (-DBF16); all arithmetic is float32. Rows are shared out among the threads in fixed
// parts, so the same input gives the same bits. Row lengths are multiples of LANES but for softmax's and cross entropy's.

#include "lanes.h"

INLINE lanes sigmoid(lanes x) { return 1 / (1 + exp_lanes(-x)); }

// out (rows, n) = silu(gate) * up * weight; gate and up: rows `stride` apart; weight: (rows,) or NULL.
void swiglu(number *out, const number *gate, const number *up, const number *weight, int64_t rows, int64_t n,
            int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    float by = weight ? get(weight + r) : 1;
    for (int64_t i = 0; i < n; i += LANES) {
      lanes g = load(gate + r * stride + i);
      store(out + r * n + i, g * sigmoid(g) * load(up + r * stride + i) * by);
    }
  }
}

// Its gradients: to_gate and to_up `to_stride` apart, to_weight (rows,) or NULL.
void swiglu_back(number *to_gate, number *to_up, number *to_weight, const number *grad, const number *gate,
                 const number *up, const number *weight, int64_t rows, int64_t n, int64_t stride, int64_t to_stride,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    float by = weight ? get(weight + r) : 1;
    lanes sum = {0};
    for (int64_t i = 0; i < n; i += LANES) {
      lanes g = load(gate + r * stride + i), u = load(up + r * stride + i), d = load(grad + r * n + i);
      lanes s = sigmoid(g), activated = g * s;
      sum += activated * u * d;
      store(to_up + r * to_stride + i, d * activated * by);
      store(to_gate + r * to_stride + i, d * u * s * (1 + g * (1 - s)) * by);
    }
    if (to_weight) {
      lanes value = all(total(sum));
      number rounded[LANES];
      store(rounded, value);
      to_weight[r] = rounded[0];
    }
  }
}

// out (count, n): the sum of the `many` rows of x that `places` (count, many) names for each.
void gather_sum(number *out, const number *x, const int64_t *places, int64_t count, int64_t many, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < count; r++)
    for (int64_t i = 0; i < n; i += LANES) {
      lanes sum = load(x + places[r * many] * n + i);
      for (int64_t k = 1; k < many; k++) sum += load(x + places[r * many + k] * n + i);
      store(out + r * n + i, sum);
    }
}

// out (rows, n) = x / sqrt(mean(x^2) + eps) * weight; x: rows `stride` apart; inverse (rows,): 1 / sqrt(...), kept.
void rms_norm(number *out, float *inverse, const number *x, const float *weight, int64_t rows, int64_t n, int64_t stride,
              float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const number *row = x + r * stride;
    lanes sum = {0};
    for (int64_t i = 0; i < n; i += LANES) sum += load(row + i) * load(row + i);
    float by = inverse[r] = 1 / sqrtf(total(sum) / n + eps);
    for (int64_t i = 0; i < n; i += LANES) store(out + r * n + i, load(row + i) * by * *(const lanes *)(weight + i));
  }
}

// Its gradients: to_x (rows, n), and to_weight (threads, n), the sum over the rows of each thread.
void rms_norm_back(number *to_x, float *to_weight, const number *grad, const number *x, const float *weight,
                   const float *inverse, int64_t rows, int64_t n, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < threads; t++) {
    float *mine = to_weight + t * n;
    memset(mine, 0, n * sizeof(float));
    for (int64_t r = rows * t / threads; r < rows * (t + 1) / threads; r++) {
      const number *row = x + r * stride, *d = grad + r * n;
      float by = inverse[r];
      lanes sum = {0};
      for (int64_t i = 0; i < n; i += LANES) {
        lanes value = load(row + i) * load(d + i);
        sum += value * *(const lanes *)(weight + i);
        *(lanes *)(mine + i) += value * by;
      }
      float share = total(sum) * by * by / n;
      for (int64_t i = 0; i < n; i += LANES)
        store(to_x + r * n + i, (load(d + i) * *(const lanes *)(weight + i) - load(row + i) * share) * by);
    }
  }
}

// The first `many` of a row, and zeros behind them: loads and stores that may end within LANES.
INLINE lanes load_some(const number *x, int64_t many, float other) {
  if (many >= LANES) return load(x);
  number part[LANES];
  memset(part, 0, sizeof part);
  memcpy(part, x, many * sizeof(number));
  lanes value = load(part);
  for (int64_t i = many; i < LANES; i++) value[i] = other;
  return value;
}
INLINE void store_some(number *to, lanes v, int64_t many) {
  if (many >= LANES) {
    store(to, v);
    return;
  }
  number part[LANES];
  store(part, v);
  memcpy(to, part, many * sizeof(number));
}

// In place: row r of a block of `queries` rows keeps softmax(scale * x) over its first `first` + r + 1 of n numbers, the
// keys that causality lets it see; the others become 0.
void causal_softmax(number *x, int64_t blocks, int64_t queries, int64_t n, int64_t first, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < blocks * queries; r++) {
    number *row = x + r * n;
    int64_t seen = first + r % queries + 1;
    lanes most = all(-INFINITY), sum = {0};
    for (int64_t i = 0; i < seen; i += LANES) {
      lanes v = load_some(row + i, seen - i, -INFINITY);
      most = choose(v > most, v, most);
    }
    float top = largest(most);
    float values[seen + LANES];
    for (int64_t i = 0; i < seen; i += LANES) {
      lanes v = exp_lanes((load_some(row + i, seen - i, -INFINITY) - top) * scale);
      *(lanes *)(values + i) = v;
      sum += v;
    }
    float by = 1 / total(sum);
    for (int64_t i = 0; i < seen; i += LANES) store_some(row + i, *(lanes *)(values + i) * by, seen - i);
    memset(row + seen, 0, (n - seen) * sizeof(number));
  }
}

// In place on the gradient: scale * p * (grad - sum(p * grad)), p the result of the softmax. n: the length of a row.
void softmax_back(number *grad, const number *p, int64_t rows, int64_t n, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    number *d = grad + r * n;
    const number *row = p + r * n;
    lanes sum = {0};
    for (int64_t i = 0; i < n; i += LANES) sum += load_some(d + i, n - i, 0) * load_some(row + i, n - i, 0);
    float share = total(sum);
    for (int64_t i = 0; i < n; i += LANES)
      store_some(d + i, (load_some(d + i, n - i, 0) - share) * load_some(row + i, n - i, 0) * scale, n - i);
  }
}

// nll (rows,) = -log softmax(x)[label]; and x (rows, n) becomes its gradient, softmax(x) - onehot(label). Where the label
// is negative both are 0.
void cross_entropy(number *x, float *nll, const int64_t *labels, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    number *row = x + r * n;
    if (labels[r] < 0) {
      memset(row, 0, n * sizeof(number));
      nll[r] = 0;
      continue;
    }
    lanes most = all(-INFINITY), sum = {0};
    for (int64_t i = 0; i < n; i += LANES) {
      lanes v = load_some(row + i, n - i, -INFINITY);
      most = choose(v > most, v, most);
    }
    float top = largest(most), wanted = get(row + labels[r]) - top;
    for (int64_t i = 0; i < n; i += LANES) sum += exp_lanes(load_some(row + i, n - i, -INFINITY) - top);
    float all_of_it = total(sum), by = 1 / all_of_it;
    for (int64_t i = 0; i < n; i += LANES)
      store_some(row + i, exp_lanes(load_some(row + i, n - i, -INFINITY) - top) * by, n - i);
    nll[r] = logf(all_of_it) - wanted;
    put(row + labels[r], expf(wanted) * by - 1);  // rounded as the difference that it is
  }
}

INLINE lanes root(lanes v) {
#ifdef __AVX512F__
  return (lanes)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < LANES; i++) v[i] = sqrtf(v[i]);
  return v;
#endif
}

// AdamW's update of n weights (Loshchilov and Hutter 2019) in one pass: w = keep * w - lr * m / (correction * sqrt(v) + eps)
// with the moved moments m and v, which are then rounded to `number`.
void adamw(float *w, const float *grad, number *first, number *second, int64_t n, float beta1, float beta2, float eps,
           float keep, float lr, float correction, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i += LANES) {
    lanes g = {0}, weight = {0}, m = load_some(first + i, n - i, 0), v = load_some(second + i, n - i, 0);
    int64_t bytes = (n - i < LANES ? n - i : LANES) * sizeof(float);
    memcpy(&g, grad + i, bytes);
    memcpy(&weight, w + i, bytes);
    m += (g - m) * (1 - beta1);
    v = v * beta2 + g * g * (1 - beta2);
    store_some(first + i, m, n - i);
    store_some(second + i, v, n - i);
    weight = weight * keep - m / (root(v) * correction + eps) * lr;
    memcpy(w + i, &weight, bytes);
  }
}

// The router of `count` tokens x (count, n): s = sigmoid(x . centroid), the top_k experts with the highest s + bias
// within the best groups (by the sum of their two best), and their weights from s alone. See moe.py.
//   centroids (n, wide): one column an expert, zeros behind the last; wide: experts, up to whole lanes
//   weights, choices (count, top_k): from the highest s + bias on
#define TOGETHER 8  // tokens that meet each row of centroids while it is in a register
void route(float *weights, int64_t *choices, const number *x, const float *centroids, const float *bias, int64_t count,
           int64_t n, int64_t experts, int64_t wide, int64_t top_k, int64_t groups, int64_t top_groups, int64_t normalise,
           float scale, int threads) {
  const int64_t size = experts / groups;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < count; first += TOGETHER) {
    int64_t here = count - first < TOGETHER ? count - first : TOGETHER;
    float rows[TOGETHER][n], affinity[TOGETHER][wide], biased[experts], group_score[groups];
    char lost[groups];
    for (int64_t t = 0; t < TOGETHER; t++)
      for (int64_t i = 0; i < n; i += LANES)
        *(lanes *)(rows[t] + i) = load(x + (first + (t < here ? t : here - 1)) * n + i);
    for (int64_t e = 0; e < wide; e += LANES) {
      lanes sum[TOGETHER] = {{0}};
      for (int64_t i = 0; i < n; i++)
        for (int64_t t = 0; t < TOGETHER; t++) sum[t] += rows[t][i] * *(const lanes *)(centroids + i * wide + e);
      for (int64_t t = 0; t < TOGETHER; t++) *(lanes *)(affinity[t] + e) = sigmoid(sum[t]);
    }
    for (int64_t t = 0; t < here; t++) {
      float *weight = weights + (first + t) * top_k, all_chosen = 1e-20f;
      for (int64_t e = 0; e < experts; e++) biased[e] = affinity[t][e] + bias[e];
      for (int64_t g = 0; g < groups; g++) {
        float best = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; e++) {
          float lower = biased[e] > best ? best : biased[e];
          best = biased[e] > best ? biased[e] : best;
          second = lower > second ? lower : second;
        }
        group_score[g] = best + second;
        lost[g] = 1;
      }
      for (int64_t k = 0; k < top_groups; k++) {
        int64_t best = 0;
        while (!lost[best]) best++;
        for (int64_t g = best + 1; g < groups; g++)
          if (lost[g] && group_score[g] > group_score[best]) best = g;
        lost[best] = 0;
      }
      for (int64_t e = 0; e < experts; e++) biased[e] = lost[e / size] ? -INFINITY : biased[e];
      for (int64_t k = 0; k < top_k; k++) {
        int64_t best = 0;
        for (int64_t e = 1; e < experts; e++) best = biased[e] > biased[best] ? e : best;
        choices[(first + t) * top_k + k] = best;
        weight[k] = affinity[t][best];
        all_chosen += weight[k];
        biased[best] = -INFINITY;
      }
      for (int64_t k = 0; k < top_k; k++) weight[k] = weight[k] / (normalise ? all_chosen : 1) * scale;
    }
  }
}
