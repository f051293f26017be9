/* The CPU kernels: every op for float (suffix f32) and bfloat16 (suffix bf16).
 *
 * The op files are templates over ELEM, included once per dtype. Threads come from the OpenMP
 * runtime that the caller has loaded; `threads` is an upper bound, small work stays on one.
 * Must not know Python or torch: pointers, sizes and strides in elements are all it gets. */
#include <omp.h>

#include "vec.h"

#define GLUE_(name, dtype) name##_##dtype
#define GLUE(name, dtype) GLUE_(name, dtype)
#define FN(name) GLUE(name, DTYPE)
#define EXPORT __attribute__((visibility("default")))

/* Elements (or multiply-adds) below which waking another thread costs more than it saves. */
#define ELEMENTS_PER_THREAD 16384
#define FLOPS_PER_THREAD 131072

INLINE int threads_for(long work, long per_thread, int threads) {
  long wanted = work / per_thread;
  return wanted < 1 ? 1 : wanted < threads ? (int)wanted : threads;
}

#include "step.h"

#define ELEM float
#define DTYPE f32
#define IS_BF16 0
#include "rows.h"
#include "elementwise.h"
#include "sgmv.h"
#include "attention.h"
#include "linear.h"
#undef ELEM
#undef DTYPE
#undef IS_BF16

#define ELEM bf16
#define DTYPE bf16
#define IS_BF16 1
#include "rows.h"
#include "elementwise.h"
#include "sgmv.h"
#include "attention.h"
#include "linear.h"

EXPORT int lory_vector_lanes(void) { return VL; }
