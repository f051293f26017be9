/* Template over ELEM: y[rows of g, columns of k] = gain * y + scale * (x @ A.T) @ B + bias for
 * segments g, slices k; gain and bias where an adapter has them.
 *
 * A task is up to TILE_ROWS rows of one segment, over one slice or, where there are segments enough
 * for all threads, over all slices, whose factors lie side by side. It makes h = x @ A.T on the
 * stack and adds h @ B to y at once, so threads share nothing but the task counter and the result
 * does not depend on who ran what. Four rows of x share each load of A and B; a single row streams
 * both front to back. */

#ifndef TILE_ROWS
#define TILE_ROWS 16
#define MAX_RANK 256
#define SUM_COLUMNS 4096
/* One row meets each byte of A and B once, and the hardware's prefetcher restarts at every page: on
 * a Zen 5 core, asking four rows (at least 8 KB) ahead lifts 20 GB/s to 31-37. */
#define AHEAD(n) (4 * (n) > 4096 ? 4 * (n) : 4096)

/* A site: where the adapters of every slot keep their factors for one packed linear. */
typedef struct {
  const void *pool;
  long in_features;
  const int64_t *out_offsets, *out_features;
  const int64_t *a_offset, *b_offset;
  const int32_t *rank;
  const float *scale;
  const int64_t *gain_offset, *bias_offset; /* 0, or -1 in place of an offset: there is none */
  long slices;
} sgmv_site;

/* A gain and a bias, each a number a column, or 0. */
typedef struct {
  const float *gain, *bias;
} sgmv_outputs;

INLINE sgmv_outputs outputs_from(sgmv_outputs o, long column) {
  return (sgmv_outputs){o.gain ? o.gain + column : 0, o.bias ? o.bias + column : 0};
}

/* The first min(left, VL) of p, or `otherwise` in their place. */
INLINE vf floats_n(const float *p, long left, float otherwise) {
  float lanes[VL] = {0};
  if (!p) return splat(otherwise);
  if (left >= VL) return load_f32(p);
  for (long i = 0; i < left; i++) lanes[i] = p[i];
  return load_f32(lanes);
}

typedef struct {
  const sgmv_site *site;
  const sgmv_rows *rows;
  int tile_rows, slices_per_task;
} sgmv_tables;

/* Walks the tasks in order; `first` is the index of the current segment's first task. */
typedef struct {
  long segment, first, count;
} sgmv_cursor;

INLINE long tasks_of(const sgmv_tables *t, long segment) {
  if (t->rows->slots[segment] < 0) return 0;
  long rows = t->rows->starts[segment + 1] - t->rows->starts[segment];
  return (rows + t->tile_rows - 1) / t->tile_rows * (t->site->slices / t->slices_per_task);
}

/* Moves to the segment that holds task `index`; 0 if there is none. */
INLINE int seek_task(const sgmv_tables *t, sgmv_cursor *at, long index) {
  while (index >= at->first + at->count) {
    at->first += at->count;
    if (++at->segment >= t->rows->segments) return 0;
    at->count = tasks_of(t, at->segment);
  }
  return 1;
}
#endif

INLINE void FN(shrink_step)(int rows, int ranks, const ELEM *x, long x_stride, const ELEM *a, long n,
                            long left, vf acc[4][4]) {
  OPERAND xs[4];
  UNROLL for (int r = 0; r < rows; r++) xs[r] = FN(operand)(x + r * x_stride, left);
  UNROLL for (int j = 0; j < ranks; j++) {
    OPERAND as = FN(operand)(a + j * n, left);
    UNROLL for (int r = 0; r < rows; r++) acc[r][j] = FN(dot_step)(acc[r][j], xs[r], as);
  }
}

/* h[i][j] = scale * x_i . a_j for `rows` x `ranks` rows of length n. */
INLINE void FN(shrink_block)(int rows, int ranks, const ELEM *x, long x_stride, const ELEM *a,
                             long n, float scale, float *h) {
  vf acc[4][4] = {{{0}}};
  long i = 0;
  for (; i + STEP <= n; i += STEP) FN(shrink_step)(rows, ranks, x + i, x_stride, a + i, n, STEP, acc);
  if (i < n) FN(shrink_step)(rows, ranks, x + i, x_stride, a + i, n, n - i, acc);
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < ranks; j++) h[r * MAX_RANK + j] = scale * sum_lanes(acc[r][j]);
}

INLINE void FN(shrink_rows)(int rows, const ELEM *x, long x_stride, const ELEM *a, long n, int rank,
                            float scale, float *h) {
  int j = 0;
  for (; j + 4 <= rank; j += 4)
    FN(shrink_block)(rows, 4, x, x_stride, a + j * n, n, scale, h + j);
  for (; j < rank; j++) FN(shrink_block)(rows, 1, x, x_stride, a + j * n, n, scale, h + j);
}

INLINE vf FN(dot_at)(vf acc, const ELEM *x, const ELEM *a, long left) {
  return FN(dot_step)(acc, FN(operand)(x, left), FN(operand)(a, left));
}

/* One row of x: A is read front to back, 3.0 -> 2.75 ms against four rows of A at a time. */
static void FN(shrink_row)(const ELEM *x, const ELEM *a, long n, int rank, float scale, float *h) {
  for (int j = 0; j < rank; j++, a += n) {
    vf acc[4] = {{0}};
    long i = 0;
    for (; i + 4 * STEP <= n; i += 4 * STEP)
      UNROLL for (int u = 0; u < 4; u++) {
        __builtin_prefetch(a + i + u * STEP + 4096);
        acc[u] = FN(dot_at)(acc[u], x + i + u * STEP, a + i + u * STEP, STEP);
      }
    for (; i < n; i += STEP) acc[0] = FN(dot_at)(acc[0], x + i, a + i, n - i);
    h[j] = scale * sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
}

/* y[i][c] = gain[c] * y[i][c] + bias[c] + sum_j h[i][j] * b[j][c] over `vectors` vectors of columns. */
INLINE void FN(expand_block)(int rows, int vectors, ELEM *y, long y_stride, const ELEM *b, long n,
                             int rank, const float *h, long left, sgmv_outputs o) {
  vf acc[4][8];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vectors; v++)
      acc[r][v] = FN(load_n)(y + r * y_stride + v * VL, left - v * VL);
  if (o.gain || o.bias)
    UNROLL for (int v = 0; v < vectors; v++) {
      vf gain = floats_n(outputs_from(o, v * VL).gain, left - v * VL, 1);
      vf bias = floats_n(outputs_from(o, v * VL).bias, left - v * VL, 0);
      UNROLL for (int r = 0; r < rows; r++) acc[r][v] = gain * acc[r][v] + bias;
    }
  for (int j = 0; j < rank; j++)
    UNROLL for (int v = 0; v < vectors; v++) {
      vf bs = FN(load_n)(b + j * n + v * VL, left - v * VL);
      UNROLL for (int r = 0; r < rows; r++) acc[r][v] += h[r * MAX_RANK + j] * bs;
    }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vectors; v++)
      FN(store_n)(y + r * y_stride + v * VL, acc[r][v], left - v * VL);
}

INLINE void FN(expand_rows)(int rows, int vectors, ELEM *y, long y_stride, const ELEM *b, long n,
                            int rank, const float *h, sgmv_outputs o) {
  long c = 0;
  for (; c + vectors * VL <= n; c += vectors * VL)
    FN(expand_block)(rows, vectors, y + c, y_stride, b + c, n, rank, h, vectors * VL,
                     outputs_from(o, c));
  for (; c < n; c += VL)
    FN(expand_block)(rows, 1, y + c, y_stride, b + c, n, rank, h, n - c, outputs_from(o, c));
}

/* y[c] = gain[c] * y[c] + bias[c] + sum_j h[j] * b[j][c] for one row: B is read four rows at a time, front to back, the sums
 * stay in the first-level cache. */
#if WORDS
/* 32 columns a step: the even ones are the low halves of 16 words, shifted up, the odd ones the high
 * halves, masked; sums keep the two apart, 16 and 16, until they are stored. Whole vectors take 5
 * instructions a cache line where widening takes 8: 3.9 -> 3.0 ms for 77 MB of factors. */
#define ROW_STEP 32
INLINE vf FN(even)(__m512i words) { return (vf)_mm512_slli_epi32(words, 16); }

INLINE vf FN(odd)(__m512i words) {
  return (vf)_mm512_and_si512(words, _mm512_set1_epi32((int)0xFFFF0000));
}

INLINE void FN(open_sums)(float *sums, const ELEM *y, long left) {
  __m512i words = FN(operand)(y, left);
  store_f32(sums, FN(even)(words));
  store_f32(sums + 16, FN(odd)(words));
}

INLINE void FN(close_sums)(ELEM *y, const float *sums, long left) {
  __m512i low = _mm512_cvtepu16_epi32((__m256i)narrow(load_f32(sums)));
  __m512i high = _mm512_cvtepu16_epi32((__m256i)narrow(load_f32(sums + 16)));
  __m512i words = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  __mmask32 kept = left >= 32 ? (__mmask32)-1 : (__mmask32)((1u << left) - 1);
  _mm512_mask_storeu_epi16(y, kept, words);
}

/* 32 columns as two vectors, of the even and of the odd ones. */
INLINE void FN(output_step)(float *sums, sgmv_outputs o, long left) {
  const __m512i evens =
      _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  sgmv_outputs high = outputs_from(o, 16);
  vf gain[2] = {floats_n(o.gain, left, 1), floats_n(high.gain, left - 16, 1)};
  vf bias[2] = {floats_n(o.bias, left, 0), floats_n(high.bias, left - 16, 0)};
  UNROLL for (int odd = 0; odd < 2; odd++) {
    __m512i at = _mm512_add_epi32(evens, _mm512_set1_epi32(odd));
    vf g = (vf)_mm512_permutex2var_ps((__m512)gain[0], at, (__m512)gain[1]);
    vf b = (vf)_mm512_permutex2var_ps((__m512)bias[0], at, (__m512)bias[1]);
    store_f32(sums + 16 * odd, g * load_f32(sums + 16 * odd) + b);
  }
}

INLINE void FN(add_step)(int ranks, float *sums, const ELEM *b, long n, const vf *h, long left) {
  vf even = load_f32(sums), odd = load_f32(sums + 16);
  UNROLL for (int j = 0; j < ranks; j++) {
    __builtin_prefetch(b + j * n + AHEAD(n));
    __m512i words = FN(operand)(b + j * n, left);
    even += h[j] * FN(even)(words);
    odd += h[j] * FN(odd)(words);
  }
  store_f32(sums, even);
  store_f32(sums + 16, odd);
}
#else
#define ROW_STEP VL
INLINE void FN(open_sums)(float *sums, const ELEM *y, long left) {
  store_f32(sums, FN(load_n)(y, left));
}

INLINE void FN(close_sums)(ELEM *y, const float *sums, long left) {
  FN(store_n)(y, load_f32(sums), left);
}

INLINE void FN(output_step)(float *sums, sgmv_outputs o, long left) {
  store_f32(sums, floats_n(o.gain, left, 1) * load_f32(sums) + floats_n(o.bias, left, 0));
}

INLINE void FN(add_step)(int ranks, float *sums, const ELEM *b, long n, const vf *h, long left) {
  vf sum = load_f32(sums);
  UNROLL for (int j = 0; j < ranks; j++) {
    __builtin_prefetch(b + j * n + AHEAD(n));
    sum += h[j] * FN(load_n)(b + j * n, left);
  }
  store_f32(sums, sum);
}
#endif

INLINE void FN(add_ranks)(int ranks, float *sums, const ELEM *b, long n, const float *h, long width) {
  vf weights[4];
  long c = 0;
  UNROLL for (int j = 0; j < ranks; j++) weights[j] = splat(h[j]);
  for (; c + ROW_STEP <= width; c += ROW_STEP)
    FN(add_step)(ranks, sums + c, b + c, n, weights, ROW_STEP);
  if (c < width) FN(add_step)(ranks, sums + c, b + c, n, weights, width - c);
}

/* sums = gain * sums + bias */
static void FN(apply_outputs)(float *sums, sgmv_outputs o, long width) {
  for (long c = 0; c < width; c += ROW_STEP)
    FN(output_step)(sums + c, outputs_from(o, c), width - c);
}

static void FN(expand_row)(ELEM *y, const ELEM *b, long n, int rank, const float *h,
                           sgmv_outputs o) {
  float sums[SUM_COLUMNS];
  for (long c = 0; c < n; c += SUM_COLUMNS) {
    long width = n - c < SUM_COLUMNS ? n - c : SUM_COLUMNS;
    int j = 0;
    for (long i = 0; i < width; i += ROW_STEP) FN(open_sums)(sums + i, y + c + i, width - i);
    if (o.gain || o.bias) FN(apply_outputs)(sums, outputs_from(o, c), width);
    for (; j + 4 <= rank; j += 4) FN(add_ranks)(4, sums, b + j * n + c, n, h + j, width);
    for (; j < rank; j++) FN(add_ranks)(1, sums, b + j * n + c, n, h + j, width);
    for (long i = 0; i < width; i += ROW_STEP) FN(close_sums)(y + c + i, sums + i, width - i);
  }
}
#undef ROW_STEP

/* What a slot has for one slice. */
INLINE sgmv_outputs FN(outputs_of)(const sgmv_site *site, long entry, const ELEM *pool) {
  long gain = site->gain_offset ? site->gain_offset[entry] : -1;
  long bias = site->bias_offset ? site->bias_offset[entry] : -1;
  return (sgmv_outputs){gain < 0 ? 0 : (const float *)(pool + gain),
                        bias < 0 ? 0 : (const float *)(pool + bias)};
}

static void FN(sgmv_tile)(const sgmv_tables *t, const sgmv_cursor *at, long tile, long k, ELEM *y,
                          long y_stride, const ELEM *x, long x_stride, const ELEM *pool) {
  const sgmv_site *site = t->site;
  const int32_t *starts = t->rows->starts;
  long entry = t->rows->slots[at->segment] * site->slices + k;
  int rank = site->rank[entry];
  sgmv_outputs o = {0, 0};
  if (t->rows->has_gain_or_bias) o = FN(outputs_of)(site, entry, pool);
  if (rank == 0 && !o.gain && !o.bias) return;
  long begin = starts[at->segment] + tile * t->tile_rows;
  int rows = min_int(t->tile_rows, starts[at->segment + 1] - begin), r = 0;
  const ELEM *a = pool + site->a_offset[entry], *b = pool + site->b_offset[entry];
  long n = site->in_features, width = site->out_features[k];
  float scale = site->scale[entry], h[TILE_ROWS * MAX_RANK];
  x += begin * x_stride;
  y += begin * y_stride + site->out_offsets[k];
  for (; r + 4 <= rows; r += 4)
    FN(shrink_rows)(4, x + r * x_stride, x_stride, a, n, rank, scale, h + r * MAX_RANK);
  for (; r < rows; r++)
    FN(shrink_row)(x + r * x_stride, a, n, rank, scale, h + r * MAX_RANK);
  for (r = 0; r + 4 <= rows; r += 4)
    FN(expand_rows)(4, 4, y + r * y_stride, y_stride, b, width, rank, h + r * MAX_RANK, o);
  for (; r < rows; r++)
    FN(expand_row)(y + r * y_stride, b, width, rank, h + r * MAX_RANK, o);
}

static void FN(sgmv_task)(const sgmv_tables *t, const sgmv_cursor *at, long index, ELEM *y,
                          long y_stride, const ELEM *x, long x_stride, const ELEM *pool) {
  long groups = t->site->slices / t->slices_per_task, local = index - at->first;
  long first = local % groups * t->slices_per_task;
  for (long k = first; k < first + t->slices_per_task; k++)
    FN(sgmv_tile)(t, at, local / groups, k, y, y_stride, x, x_stride, pool);
}

typedef struct {
  const sgmv_site *site;
  ELEM *y;
  const ELEM *x;
  long y_stride, x_stride;
} FN(sgmv_args);

static int FN(sgmv_team)(const void *args, const step *s, int threads) {
  const sgmv_site *site = ((const FN(sgmv_args) *)args)->site;
  if (!s->lora) return 0;
  long width = site->slices * site->in_features;
  for (long k = 0; k < site->slices; k++) width += site->out_features[k];
  return threads_for(s->lora->adapted_rows * s->lora->max_rank * width, FLOPS_PER_THREAD, threads);
}

static sgmv_tables FN(sgmv_plan)(const sgmv_site *site, const sgmv_rows *rows, int team) {
  int tile_rows = (int)((rows->adapted_rows / team + 3) / 4 * 4);
  return (sgmv_tables){.site = site,
                       .rows = rows,
                       .tile_rows = tile_rows < 4 ? 4 : min_int(tile_rows, TILE_ROWS),
                       .slices_per_task = rows->segments >= 4 * team ? (int)site->slices : 1};
}

/* Tasks, until none is left. */
static void FN(sgmv_op)(const void *args, const step *s, int thread, int team, long *next) {
  const FN(sgmv_args) *a = args;
  sgmv_tables tables = FN(sgmv_plan)(a->site, s->lora, team);
  sgmv_cursor at = {-1, 0, 0};
  for (;;) {
    long index = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (!seek_task(&tables, &at, index)) return;
    FN(sgmv_task)(&tables, &at, index, a->y, a->y_stride, a->x, a->x_stride, a->site->pool);
  }
}

EXPORT_CALL(sgmv, sgmv_op, sgmv_team)
