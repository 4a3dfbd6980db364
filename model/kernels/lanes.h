// 16 float32 numbers at a time, read from and written as float32, or bfloat16 (-DBF16): what fused.c and causal.c stand on.

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
typedef float lanes __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t whole_lanes __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_lanes __attribute__((vector_size(LANES * 2), aligned(2)));
#define INLINE static inline __attribute__((always_inline))

#ifdef BF16
typedef uint16_t number;
INLINE lanes load(const number *x) {
  return (lanes)(__builtin_convertvector(*(const half_lanes *)x, whole_lanes) << 16);
}
INLINE void store(number *to, lanes v) {
#ifdef __AVX512BF16__
  *(half_lanes *)to = (half_lanes)_mm512_cvtneps_pbh((__m512)v);
#else
  whole_lanes bits = (whole_lanes)v;  // to the nearest, ties to even
  bits += 0x7fff + ((bits >> 16) & 1);
  *(half_lanes *)to = __builtin_convertvector((bits >> 16) & 0xffff, half_lanes);
#endif
}
INLINE float get(const number *x) {
  uint32_t bits = (uint32_t)*x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE void put(number *to, float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  *to = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}
#else
typedef float number;
INLINE lanes load(const number *x) { return *(const lanes *)x; }
INLINE void store(number *to, lanes v) { *(lanes *)to = v; }
INLINE float get(const number *x) { return *x; }
INLINE void put(number *to, float value) { *to = value; }
#endif

INLINE lanes all(float x) { return (lanes){0} + x; }
INLINE lanes choose(whole_lanes where, lanes yes, lanes no) {
  return (lanes)((where & (whole_lanes)yes) | (~where & (whole_lanes)no));
}
// Where the first `many` lanes are.
INLINE whole_lanes within(int64_t many) {
  const whole_lanes place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return place < (int32_t)(many < LANES ? many : LANES);
}
INLINE float total(lanes v) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
}
INLINE float largest(lanes v) {
  float most = v[0];
  for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
  return most;
}

// e^x = 2^n e^r with |r| <= ln 2 / 2, e^r by its Taylor series to r^6: within 3e-7 of the true value, relatively.
INLINE lanes exp_of_small(lanes r) {
  lanes p = all(1.f / 720);
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1;
  p = p * r + 1;
  return p;
}

#ifdef __AVX512F__
INLINE lanes exp_lanes(lanes x) {
  // Of a NaN and a bound these two return what stands second. What is beyond 2^127 becomes infinite at the end.
  __m512 v = _mm512_min_ps(_mm512_set1_ps(100), _mm512_max_ps(_mm512_set1_ps(-104), (__m512)x));
  lanes n = (lanes)_mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), 0);
  lanes r = (lanes)v - n * 0.693359375f + n * 2.12194440e-4f;
  lanes p = exp_of_small(r);
  return (lanes)_mm512_scalef_ps((__m512)p, (__m512)n);
}
#else
INLINE lanes exp_lanes(lanes x) {
  whole_lanes tiny = x < all(-87), huge = x > all(88);  // NaN is neither, and passes
  x = choose(tiny, all(-87), choose(huge, all(88), x));
  lanes turns = x * 1.44269504f;
  whole_lanes n = __builtin_convertvector(turns + choose(turns < all(0), all(-0.5f), all(0.5f)), whole_lanes);
  lanes whole = __builtin_convertvector(n, lanes);
  lanes r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  lanes p = exp_of_small(r);
  return choose(tiny, all(0), choose(huge, all(INFINITY), p * (lanes)((n + 127) << 23)));
}
#endif
