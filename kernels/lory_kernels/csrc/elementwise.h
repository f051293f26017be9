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

typedef struct {
  const ELEM *x;
  const void *weight;
  ELEM *residual, *out; /* residual: added to and normed instead of x; 0 for a norm alone */
  long width;
  int mode;
  float eps;
} FN(norm_args);

static int FN(norm_team)(const void *args, const step *s, int threads) {
  return threads_for(s->tokens * ((const FN(norm_args) *)args)->width, ELEMENTS_PER_THREAD, threads);
}

static void FN(norm_op)(const void *args, const step *s, int thread, int team, long *next) {
  const FN(norm_args) *a = args;
  span rows = share_of(s->tokens, thread, team);
  for (long t = rows.first; t < rows.end; t++)
    FN(norm_row)(a->x + t * a->width, a->weight, a->mode, a->eps, a->out + t * a->width, a->width);
}

static void FN(add_norm_op)(const void *args, const step *s, int thread, int team, long *next) {
  const FN(norm_args) *a = args;
  span rows = share_of(s->tokens, thread, team);
  for (long t = rows.first; t < rows.end; t++) {
    const ELEM *x = a->x + t * a->width;
    ELEM *sum = a->residual + t * a->width;
    for (long i = 0; i < a->width; i += VL) {
      vf added = FN(load_n)(x + i, a->width - i);
      FN(store_n)(sum + i, FN(load_n)(sum + i, a->width - i) + added, a->width - i);
    }
    FN(norm_row)(sum, a->weight, a->mode, a->eps, a->out + t * a->width, a->width);
  }
}

EXPORT_CALL(rms_norm, norm_op, norm_team)
EXPORT_CALL(add_rms_norm, add_norm_op, norm_team)

typedef struct {
  const ELEM *gate_up;
  ELEM *out;
  long width;
} FN(gated_args);

static int FN(gated_team)(const void *args, const step *s, int threads) {
  return threads_for(s->tokens * ((const FN(gated_args) *)args)->width, ELEMENTS_PER_THREAD, threads);
}

static void FN(silu_mul_op)(const void *args, const step *s, int thread, int team, long *next) {
  const FN(gated_args) *a = args;
  long width = a->width;
  span rows = share_of(s->tokens, thread, team);
  for (long t = rows.first; t < rows.end; t++) {
    const ELEM *gate = a->gate_up + t * 2 * width, *up = gate + width;
    for (long i = 0; i < width; i += VL) {
      vf g = FN(load_n)(gate + i, width - i);
      vf active = FN(round)(g / (splat(1.0f) + vexp(-g)));
      FN(store_n)(a->out + t * width + i, active * FN(load_n)(up + i, width - i), width - i);
    }
  }
}

static void FN(gelu_tanh_mul_op)(const void *args, const step *s, int thread, int team, long *next) {
  const FN(gated_args) *a = args;
  long width = a->width;
  span rows = share_of(s->tokens, thread, team);
  for (long t = rows.first; t < rows.end; t++) {
    const ELEM *gate = a->gate_up + t * 2 * width, *up = gate + width;
    for (long i = 0; i < width; i += VL) {
      vf g = FN(load_n)(gate + i, width - i);
      /* (1 + tanh u) / 2 = sigmoid(2 u), without the cancellation at u < 0. */
      vf twice_u = 1.5957691216057308f * (g + 0.044715f * g * g * g);
      vf active = FN(round)(g * vsigmoid(twice_u));
      FN(store_n)(a->out + t * width + i, active * FN(load_n)(up + i, width - i), width - i);
    }
  }
}

EXPORT_CALL(silu_mul, silu_mul_op, gated_team)
EXPORT_CALL(gelu_tanh_mul, gelu_tanh_mul_op, gated_team)

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

typedef struct {
  ELEM *qkv;
  long qkv_stride;
  const float *cos_sin;
  ELEM *k_cache, *v_cache;
  const void *q_norm, *k_norm;
  int rotary_dim, heads, kv_heads, head_dim, block_size, norm_mode;
  float norm_eps;
} FN(rope_args);

INLINE void FN(rope_row)(const FN(rope_args) *a, ELEM *row, long position) {
  const float *angles = a->cos_sin + position * a->rotary_dim;
  for (int h = 0; h < a->heads + a->kv_heads; h++) {
    ELEM *x = row + (long)h * a->head_dim;
    const void *norm = h < a->heads ? a->q_norm : a->k_norm;
    if (norm) FN(norm_row)(x, norm, a->norm_mode, a->norm_eps, x, a->head_dim);
    FN(rotate)(x, angles, a->rotary_dim / 2);
  }
}

INLINE void FN(write_kv)(const FN(rope_args) *a, const ELEM *row, long slot) {
  const ELEM *k = row + (long)a->heads * a->head_dim, *v = k + (long)a->kv_heads * a->head_dim;
  long block = slot / a->block_size, offset = slot % a->block_size;
  for (int h = 0; h < a->kv_heads; h++) {
    long place = ((block * a->kv_heads + h) * a->block_size + offset) * a->head_dim;
    memcpy(a->k_cache + place, k + (long)h * a->head_dim, sizeof(ELEM) * a->head_dim);
    memcpy(a->v_cache + place, v + (long)h * a->head_dim, sizeof(ELEM) * a->head_dim);
  }
}

static int FN(rope_team)(const void *args, const step *s, int threads) {
  const FN(rope_args) *a = args;
  long width = (long)(a->heads + 2 * a->kv_heads) * a->head_dim;
  return threads_for(s->tokens * width, ELEMENTS_PER_THREAD, threads);
}

static void FN(rope_op)(const void *args, const step *s, int thread, int team, long *next) {
  const FN(rope_args) *a = args;
  span tokens = share_of(s->tokens, thread, team);
  for (long t = tokens.first; t < tokens.end; t++) {
    ELEM *row = a->qkv + t * a->qkv_stride;
    FN(rope_row)(a, row, s->positions[t]);
    if (s->kv_slots[t] >= 0) FN(write_kv)(a, row, s->kv_slots[t]);
  }
}

EXPORT_CALL(rope_write_kv, rope_op, rope_team)
