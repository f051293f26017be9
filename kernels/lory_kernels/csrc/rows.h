/* Template over ELEM: rows of any width as vectors, and the dot products both matmuls share. */

static __attribute__((noinline)) vf FN(load_tail)(const ELEM *p, long left) {
  ELEM lanes[VL] = {0};
  for (long i = 0; i < left; i++) lanes[i] = p[i];
  return FN(load)(lanes);
}

static __attribute__((noinline)) void FN(store_tail)(ELEM *p, vf v, long left) {
  ELEM lanes[VL];
  FN(store)(lanes, v);
  for (long i = 0; i < left; i++) p[i] = lanes[i];
}

/* The first min(left, VL) elements; lanes past them are zero, or are not stored. */
INLINE vf FN(load_n)(const ELEM *p, long left) {
  return left >= VL ? FN(load)(p) : FN(load_tail)(p, left);
}

INLINE void FN(store_n)(ELEM *p, vf v, long left) {
  if (left >= VL)
    FN(store)(p, v);
  else
    FN(store_tail)(p, v, left);
}

/* One step of a dot product takes STEP elements of both sides, as OPERANDs: 32 bfloat16 of a register
 * with AVX512-BF16 (WORDS), VL widened numbers without. */
#undef WORDS
#if IS_BF16 && defined(__AVX512BF16__)
#undef STEP
#undef OPERAND
#define WORDS 1
#define STEP 32
#define OPERAND __m512i
INLINE __m512i FN(operand)(const ELEM *p, long left) {
  if (left >= 32) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16((__mmask32)((1u << left) - 1), p);
}
INLINE vf FN(dot_step)(vf acc, __m512i a, __m512i b) {
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#else
#undef STEP
#undef OPERAND
#define WORDS 0
#define STEP VL
#define OPERAND vf
INLINE vf FN(operand)(const ELEM *p, long left) { return FN(load_n)(p, left); }
INLINE vf FN(dot_step)(vf acc, vf a, vf b) { return acc + a * b; }
#endif
