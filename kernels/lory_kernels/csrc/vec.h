/* Vectors of VL floats over GCC's vector extensions, so that one source serves AVX-512, AVX2 and
 * plain C; intrinsics stand only where the extensions cannot say it. Must not know any op. */
#ifndef LORY_VEC_H
#define LORY_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VL 16
#define LANES_LOW {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define LANES_HIGH {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#elif defined(__AVX2__)
#define VL 8
#define LANES_LOW {0, 8, 1, 9, 2, 10, 3, 11}
#define LANES_HIGH {4, 12, 5, 13, 6, 14, 7, 15}
#else
#define VL 4
#define LANES_LOW {0, 4, 1, 5}
#define LANES_HIGH {2, 6, 3, 7}
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint16_t bf16;

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

INLINE vf vmax(vf a, vf b) { return pick((a > b) | (a != a), a, b); }

INLINE vf interleave_low(vf a, vf b) { return __builtin_shuffle(a, b, (vi)LANES_LOW); }

INLINE vf interleave_high(vf a, vf b) { return __builtin_shuffle(a, b, (vi)LANES_HIGH); }

/* Lane l of the result is the sum of rows[l]; rows is used up. */
INLINE vf sum_rows(vf rows[VL]) {
  UNROLL for (int half = VL / 2; half > 0; half /= 2)
    UNROLL for (int i = 0; i < half; i++)
      rows[i] = interleave_low(rows[i], rows[i + half]) + interleave_high(rows[i], rows[i + half]);
  return rows[0];
}

/* rows as a VL x VL matrix, transposed in place. */
INLINE void transpose(vf rows[VL]) {
  UNROLL for (int stage = 1; stage < VL; stage *= 2) {
    vf next[VL];
    UNROLL for (int i = 0; i < VL / 2; i++) {
      next[2 * i] = interleave_low(rows[i], rows[i + VL / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + VL / 2]);
    }
    UNROLL for (int i = 0; i < VL; i++) rows[i] = next[i];
  }
}

INLINE float sum_lanes(vf v) {
#if VL == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < VL; i++) total += v[i];
  return total;
#endif
}

INLINE float max_lanes(vf v) {
#if VL == 16
  if (_mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q)) return NAN;
  return _mm512_reduce_max_ps((__m512)v);
#else
  float largest = v[0];
  for (int i = 1; i < VL; i++) largest = largest > v[i] || largest != largest ? largest : v[i];
  return largest;
#endif
}

/* e^x within 2 ulp; 0 below -87.33, infinite above 88.02; keeps NaN. */
INLINE vf vexp(vf x) {
  vi tiny = x < splat(-87.33f), huge = x > splat(88.02f);
  x = pick(tiny | huge, splat(0), x);
  vf shifted = x * 1.44269504088896341f + splat(12582912.0f);
  vf n = shifted - splat(12582912.0f);
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  vf power = (vf)(((vi)shifted - 0x4B400000 + 127) << 23);
  return pick(huge, splat(INFINITY), pick(tiny, splat(0), p * power));
}

INLINE vf vsigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + vexp(-x)); }

/* tanh x within a few ulp of itself, near zero too. */
INLINE vf vtanh(vf x) {
  vf size = (vf)((vi)x & 0x7FFFFFFF);
  vf far = splat(1.0f) - 2.0f / (vexp(size + size) + splat(1.0f));
  far = (vf)((vi)far | ((vi)x & (int32_t)0x80000000));
  vf square = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * square + splat(2.06390887954e-2f);
  p = p * square + splat(-5.37397155531e-2f);
  p = p * square + splat(1.33314422036e-1f);
  p = p * square + splat(-3.33332819422e-1f);
  return pick(size > splat(0.625f), far, p * square * x + x);
}

/* By name where GCC would widen halves and join them: attention spent half its time there. */
INLINE vf widen(vh h) {
#if VL == 16
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif VL == 8
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

/* Rounds to nearest even, as torch does (the instruction takes subnormal numbers for zero). */
INLINE vh narrow(vf v) {
#if VL == 16 && defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  vu bits = (vu)v;
  vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  vi is_nan = v != v;
  return __builtin_convertvector((rounded & ~(vu)is_nan) | ((vu)is_nan & 0x7FC0), vh);
#endif
}

INLINE vf load_f32(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store_f32(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf load_bf16(const bf16 *p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return widen(h);
}

INLINE void store_bf16(bf16 *p, vf v) {
  vh h = narrow(v);
  memcpy(p, &h, sizeof h);
}

INLINE vf round_f32(vf v) { return v; }

INLINE vf round_bf16(vf v) { return widen(narrow(v)); }

INLINE int min_int(int a, int b) { return a < b ? a : b; }

#endif
