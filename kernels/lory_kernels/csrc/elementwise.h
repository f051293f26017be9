/* Template over ELEM: norms, gated activations, rotary embedding with the write to the cache. */

enum { FN(WEIGHT_AFTER_ROUNDING) = 0, FN(WEIGHT_SAME_DTYPE) = 1, FN(WEIGHT_F32) = 2 };

/* out = x * rsqrt(mean(x^2) + eps) * weight; out may be x. */
INLINE void FN(norm_row)(const ELEM *x, const void *weight, int mode, float eps, ELEM *out,
                         long width) {
  vf squares[2] = {{0}, {0}};
  long i = 0;
  for (; i + 2 * VL <= width; i += 2 * VL)
    UNROLL for (int u = 0; u < 2; u++) {
      vf v = FN(load)(x + i + u * VL);
      squares[u] += v * v;
    }
  for (; i < width; i += VL) {
    vf v = FN(load_n)(x + i, width - i);
    squares[0] += v * v;
  }
  float gain = 1.0f / sqrtf(sum_lanes(squares[0] + squares[1]) / (float)width + eps);
  for (i = 0; i < width; i += VL) {
    vf normed = FN(load_n)(x + i, width - i) * gain;
    vf w = mode == FN(WEIGHT_F32) ? load_n_f32((const float *)weight + i, width - i)
                                  : FN(load_n)((const ELEM *)weight + i, width - i);
    if (mode == FN(WEIGHT_AFTER_ROUNDING)) normed = FN(round)(normed);
    FN(store_n)(out + i, normed * w, width - i);
  }
}

EXPORT void FN(rms_norm)(const ELEM *x, const void *weight, int mode, float eps, ELEM *out,
                         long rows, long width, int threads) {
  threads = threads_for(rows * width, ELEMENTS_PER_THREAD, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long t = 0; t < rows; t++)
    FN(norm_row)(x + t * width, weight, mode, eps, out + t * width, width);
}

EXPORT void FN(add_rms_norm)(ELEM *residual, const ELEM *x, const void *weight, int mode, float eps,
                             ELEM *out, long rows, long width, int threads) {
  threads = threads_for(rows * width, ELEMENTS_PER_THREAD, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long t = 0; t < rows; t++) {
    ELEM *sum = residual + t * width;
    for (long i = 0; i < width; i += VL) {
      vf added = FN(load_n)(x + t * width + i, width - i);
      FN(store_n)(sum + i, FN(load_n)(sum + i, width - i) + added, width - i);
    }
    FN(norm_row)(sum, weight, mode, eps, out + t * width, width);
  }
}

EXPORT void FN(silu_mul)(const ELEM *gate_up, ELEM *out, long rows, long width, int threads) {
  threads = threads_for(rows * width, ELEMENTS_PER_THREAD, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long t = 0; t < rows; t++) {
    const ELEM *gate = gate_up + t * 2 * width, *up = gate + width;
    for (long i = 0; i < width; i += VL) {
      vf g = FN(load_n)(gate + i, width - i);
      vf active = FN(round)(g / (splat(1.0f) + vexp(-g)));
      FN(store_n)(out + t * width + i, active * FN(load_n)(up + i, width - i), width - i);
    }
  }
}

EXPORT void FN(gelu_tanh_mul)(const ELEM *gate_up, ELEM *out, long rows, long width, int threads) {
  threads = threads_for(rows * width, ELEMENTS_PER_THREAD, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long t = 0; t < rows; t++) {
    const ELEM *gate = gate_up + t * 2 * width, *up = gate + width;
    for (long i = 0; i < width; i += VL) {
      vf g = FN(load_n)(gate + i, width - i);
      /* (1 + tanh u) / 2 = sigmoid(2 u), without the cancellation at u < 0. */
      vf twice_u = 1.5957691216057308f * (g + 0.044715f * g * g * g);
      vf active = FN(round)(g * vsigmoid(twice_u));
      FN(store_n)(out + t * width + i, active * FN(load_n)(up + i, width - i), width - i);
    }
  }
}

/* x[i], x[i + half] turned by the angle whose cos, sin stand at cos_sin[i], [i + half]. */
INLINE void FN(rotate)(ELEM *x, const float *cos_sin, long half) {
  for (long i = 0; i < half; i += VL) {
    long left = half - i;
    vf c = load_n_f32(cos_sin + i, left), s = load_n_f32(cos_sin + half + i, left);
    vf first = FN(load_n)(x + i, left), second = FN(load_n)(x + half + i, left);
    FN(store_n)(x + i, first * c - second * s, left);
    FN(store_n)(x + half + i, second * c + first * s, left);
  }
}

EXPORT void FN(rope_write_kv)(ELEM *qkv, long qkv_stride, const int64_t *positions,
                              const float *cos_sin, int rotary_dim, ELEM *k_cache, ELEM *v_cache,
                              const int64_t *kv_slots, long tokens, int heads, int kv_heads,
                              int head_dim, int block_size, const void *q_norm, const void *k_norm,
                              int norm_mode, float norm_eps, int threads) {
  long width = (long)(heads + 2 * kv_heads) * head_dim;
  threads = threads_for(tokens * width, ELEMENTS_PER_THREAD, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long t = 0; t < tokens; t++) {
    ELEM *row = qkv + t * qkv_stride, *k = row + (long)heads * head_dim;
    const ELEM *v = k + (long)kv_heads * head_dim;
    const float *angles = cos_sin + positions[t] * rotary_dim;
    for (int h = 0; h < heads + kv_heads; h++) {
      ELEM *x = row + (long)h * head_dim;
      const void *norm = h < heads ? q_norm : k_norm;
      if (norm) FN(norm_row)(x, norm, norm_mode, norm_eps, x, head_dim);
      FN(rotate)(x, angles, rotary_dim / 2);
    }
    if (kv_slots[t] < 0) continue;
    long block = kv_slots[t] / block_size, offset = kv_slots[t] % block_size;
    for (int h = 0; h < kv_heads; h++) {
      long place = ((block * kv_heads + h) * block_size + offset) * head_dim;
      memcpy(k_cache + place, k + (long)h * head_dim, sizeof(ELEM) * head_dim);
      memcpy(v_cache + place, v + (long)h * head_dim, sizeof(ELEM) * head_dim);
    }
  }
}
