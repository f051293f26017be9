/* Template over ELEM: causal attention over paged K and V, decode and prefill rows mixed.
 *
 * A task is (some queries of one row) x (some heads of one kv head): up to TILE_QUERIES pairs
 * ("lines") that read the same keys. Keys come KEY_TILE at a time with an online softmax. Few lines
 * (decode) take dot products on the cache as it lies; many (prefill) transpose the key tile once
 * and run an outer product. */

#ifndef KEY_TILE
#define KEY_TILE 64
#define TILE_LINES 32
#define MAX_HEAD_DIM 256
#define LINES_TO_TRANSPOSE 8

typedef struct {
  long qkv_stride, max_blocks, rows;
  const int32_t *block_tables, *query_starts, *context_lens;
  int heads, kv_heads, head_dim, block_size, window;
  float scale, softcap;
} attention_call;

/* Lines [0, lines): line m is query first_query + m / heads, head first_head + m % heads. */
typedef struct {
  long row, first_token;
  int kv_head, first_head, heads, lines, first_position, num_keys;
} attention_task;

typedef struct {
  float q[TILE_LINES][MAX_HEAD_DIM], out[TILE_LINES][MAX_HEAD_DIM];
  float scores[TILE_LINES][KEY_TILE], keys[MAX_HEAD_DIM][KEY_TILE];
  float largest[TILE_LINES], total[TILE_LINES];
} attention_scratch;

typedef struct {
  long row, first, count;
} attention_cursor;

INLINE int head_chunk(const attention_call *c) { return min_int(c->heads / c->kv_heads, TILE_LINES); }

INLINE int query_chunk(const attention_call *c) { return TILE_LINES / head_chunk(c); }

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

INLINE int queries_of(const attention_call *c, long row) {
  return c->query_starts[row + 1] - c->query_starts[row];
}

INLINE long attention_tasks_of(const attention_call *c, long row) {
  long head_chunks = ceil_div(c->heads / c->kv_heads, head_chunk(c));
  return c->kv_heads * head_chunks * ceil_div(queries_of(c, row), query_chunk(c));
}

INLINE int seek_attention(const attention_call *c, attention_cursor *at, long index) {
  while (index >= at->first + at->count) {
    at->first += at->count;
    if (++at->row >= c->rows) return 0;
    at->count = attention_tasks_of(c, at->row);
  }
  return 1;
}

INLINE attention_task attention_task_at(const attention_call *c, long row, int index) {
  int group = c->heads / c->kv_heads, chunk = head_chunk(c);
  int head_chunks = ceil_div(group, chunk), queries = queries_of(c, row);
  int kv_head = index % c->kv_heads, rest = index / c->kv_heads;
  int head_offset = rest % head_chunks * chunk;
  int first_query = rest / head_chunks * query_chunk(c);
  int heads = min_int(chunk, group - head_offset);
  int num_queries = min_int(query_chunk(c), queries - first_query);
  int first_position = c->context_lens[row] - queries + first_query;
  return (attention_task){.row = row,
                          .first_token = c->query_starts[row] + first_query,
                          .kv_head = kv_head,
                          .first_head = kv_head * group + head_offset,
                          .heads = heads,
                          .lines = num_queries * heads,
                          .first_position = first_position,
                          .num_keys = first_position + num_queries};
}

INLINE int first_key(const attention_call *c, const attention_task *task) {
  int start = c->window > 0 ? task->first_position - c->window + 1 : 0;
  return start > 0 ? start : 0;
}

/* Scores of one line become exp(cap(scale * s) - largest), 0 outside keys [low, high); the line's
 * running maximum and sum move on. Returns the factor for what was summed before. */
static float softmax_tile(const attention_call *c, float *scores, int low, int high, float *largest,
                          float *total) {
  vf top = splat(-INFINITY), sum = splat(0);
  vi lane;
  for (int i = 0; i < VL; i++) lane[i] = i;
  for (int j = 0; j < KEY_TILE; j += VL) {
    vf s = load_f32(scores + j) * c->scale;
    if (c->softcap > 0) s = c->softcap * vtanh(s / c->softcap);
    s = pick((lane + j >= low) & (lane + j < high), s, splat(-INFINITY));
    store_f32(scores + j, s);
    top = vmax(s, top);
  }
  float before = *largest, now = max_lanes(top);
  now = before > now ? before : now;
  if (now == -INFINITY) {
    memset(scores, 0, KEY_TILE * sizeof(float));
    return 1.0f;
  }
  for (int j = 0; j < KEY_TILE; j += VL) {
    vf p = vexp(load_f32(scores + j) - now);
    store_f32(scores + j, p);
    sum += p;
  }
  float factor = before == now ? 1.0f : vexp(splat(before - now))[0];
  *largest = now;
  *total = *total * factor + sum_lanes(sum);
  return factor;
}
#endif

/* scores[j] = q . keys[j] for VL keys where they lie. */
INLINE void FN(score_keys)(const ELEM *q, const ELEM *const *keys, int head_dim, float *scores) {
  vf acc[VL] = {{0}};
  for (int d = 0; d < head_dim; d += STEP) {
    OPERAND qs = FN(operand)(q + d, head_dim - d);
    UNROLL for (int j = 0; j < VL; j++)
      acc[j] = FN(dot_step)(acc[j], qs, FN(operand)(keys[j] + d, head_dim - d));
  }
  store_f32(scores, sum_rows(acc));
}

/* keys_DK[d][j] = keys[j][d] as float; dims are padded with zeros to a whole vector. */
static void FN(transpose_keys)(const ELEM *const *keys, int head_dim, float (*keys_DK)[KEY_TILE]) {
  for (int d = 0; d < head_dim; d += VL)
    for (int j = 0; j < KEY_TILE; j += VL) {
      vf square[VL];
      UNROLL for (int i = 0; i < VL; i++) square[i] = FN(load_n)(keys[j + i] + d, head_dim - d);
      transpose(square);
      UNROLL for (int i = 0; i < VL; i++) store_f32(keys_DK[d + i] + j, square[i]);
    }
}

#ifndef SCORE_VECTORS
#define SCORE_VECTORS 4
/* scores[m][j] = sum_d q[m][d] * keys[d][j] for `lines` lines and SCORE_VECTORS * VL keys. */
INLINE void score_block(int lines, const float (*q)[MAX_HEAD_DIM], const float (*keys)[KEY_TILE],
                        int head_dim, float (*scores)[KEY_TILE]) {
  vf acc[4][SCORE_VECTORS] = {{{0}}};
  for (int d = 0; d < head_dim; d++) {
    vf ks[SCORE_VECTORS];
    UNROLL for (int v = 0; v < SCORE_VECTORS; v++) ks[v] = load_f32(keys[d] + v * VL);
    UNROLL for (int m = 0; m < lines; m++)
      UNROLL for (int v = 0; v < SCORE_VECTORS; v++) acc[m][v] += q[m][d] * ks[v];
  }
  UNROLL for (int m = 0; m < lines; m++)
    UNROLL for (int v = 0; v < SCORE_VECTORS; v++) store_f32(scores[m] + v * VL, acc[m][v]);
}

static void score_lines(attention_scratch *s, int lines, int head_dim) {
  for (int j = 0; j < KEY_TILE; j += SCORE_VECTORS * VL) {
    const float(*keys)[KEY_TILE] = (const float(*)[KEY_TILE])(&s->keys[0][j]);
    int m = 0;
    for (; m + 4 <= lines; m += 4)
      score_block(4, s->q + m, keys, head_dim, (float(*)[KEY_TILE])(&s->scores[m][j]));
    for (; m < lines; m++)
      score_block(1, s->q + m, keys, head_dim, (float(*)[KEY_TILE])(&s->scores[m][j]));
  }
}
#endif

/* out[m][d] = factor[m] * out[m][d] + sum_j p[m][j] * values[j][d] over `vectors` vectors of d, of
 * which `left` numbers are there. */
INLINE void FN(mix_block)(int lines, int vectors, const float (*p)[KEY_TILE], const float *factor,
                          const ELEM *const *values, int num_keys, int d, int left,
                          float (*out)[MAX_HEAD_DIM]) {
  vf acc[4][4];
  UNROLL for (int m = 0; m < lines; m++)
    UNROLL for (int v = 0; v < vectors; v++) acc[m][v] = load_f32(out[m] + d + v * VL) * factor[m];
  for (int j = 0; j < num_keys; j++)
    UNROLL for (int v = 0; v < vectors; v++) {
      vf vs = FN(load_n)(values[j] + d + v * VL, left - v * VL);
      UNROLL for (int m = 0; m < lines; m++) acc[m][v] += p[m][j] * vs;
    }
  UNROLL for (int m = 0; m < lines; m++)
    UNROLL for (int v = 0; v < vectors; v++) store_f32(out[m] + d + v * VL, acc[m][v]);
}

INLINE void FN(mix_lines)(int lines, const float (*p)[KEY_TILE], const float *factor,
                          const ELEM *const *values, int num_keys, int head_dim,
                          float (*out)[MAX_HEAD_DIM]) {
  int d = 0;
  for (; d + 4 * VL <= head_dim; d += 4 * VL)
    FN(mix_block)(lines, 4, p, factor, values, num_keys, d, 4 * VL, out);
  for (; d < head_dim; d += VL)
    FN(mix_block)(lines, 1, p, factor, values, num_keys, d, head_dim - d, out);
}

static void FN(mix_values)(attention_scratch *s, int lines, const float *factor,
                           const ELEM *const *values, int num_keys, int head_dim) {
  int m = 0;
  for (; m + 4 <= lines; m += 4)
    FN(mix_lines)(4, (const float(*)[KEY_TILE])s->scores + m, factor + m, values, num_keys,
                  head_dim, s->out + m);
  for (; m + 2 <= lines; m += 2)
    FN(mix_lines)(2, (const float(*)[KEY_TILE])s->scores + m, factor + m, values, num_keys,
                  head_dim, s->out + m);
  for (; m < lines; m++)
    FN(mix_lines)(1, (const float(*)[KEY_TILE])s->scores + m, factor + m, values, num_keys,
                  head_dim, s->out + m);
}

/* Where position `position` of the task's kv head lies in either cache. */
INLINE long FN(place_of)(const attention_call *c, const attention_task *task, int position) {
  long block = c->block_tables[task->row * c->max_blocks + position / c->block_size];
  long page = block * c->kv_heads + task->kv_head;
  return (page * c->block_size + position % c->block_size) * c->head_dim;
}

/* Positions from `position` that lie side by side, at most up to `end`. */
INLINE int FN(run_from)(const attention_call *c, int position, int end) {
  return min_int(c->block_size - position % c->block_size, end - position);
}

/* Where positions [start, start + num) of a kv head lie; past the last, the last again. */
static void FN(find_keys)(const attention_call *c, const attention_task *task, int start, int num,
                          const ELEM *k_cache, const ELEM *v_cache, const ELEM **keys,
                          const ELEM **values) {
  for (int j = 0; j < num;) {
    long place = FN(place_of)(c, task, start + j);
    for (int run = FN(run_from)(c, start + j, start + num); run > 0; run--, j++) {
      keys[j] = k_cache + place;
      values[j] = v_cache + place;
      place += c->head_dim;
    }
  }
  for (int j = num; j < KEY_TILE; j++) keys[j] = keys[num - 1];
}

/* Asks for the keys and values of positions [start, start + KEY_TILE) of a task: blocks lie apart,
 * so the hardware does not see the next one coming. */
static void FN(ask_for_keys)(const attention_call *c, const attention_task *task, int start,
                             const ELEM *k_cache, const ELEM *v_cache) {
  int end = min_int(start + KEY_TILE, task->num_keys);
  while (start < end) {
    long place = FN(place_of)(c, task, start);
    int run = FN(run_from)(c, start, end);
    for (long i = 0; i < (long)run * c->head_dim; i += 64 / sizeof(ELEM)) {
      __builtin_prefetch(k_cache + place + i, 0, 2);
      __builtin_prefetch(v_cache + place + i, 0, 2);
    }
    start += run;
  }
}

static void FN(attend)(const attention_call *c, const attention_task *task, const ELEM *qkv,
                       const ELEM *k_cache, const ELEM *v_cache, ELEM *out,
                       attention_scratch *s) {
  int head_dim = c->head_dim, outer = task->lines >= LINES_TO_TRANSPOSE;
  const ELEM *q[TILE_LINES], *keys[KEY_TILE], *values[KEY_TILE];
  for (int m = 0; m < task->lines; m++) {
    long token = task->first_token + m / task->heads, head = task->first_head + m % task->heads;
    q[m] = qkv + token * c->qkv_stride + head * head_dim;
    for (int d = 0; d < head_dim; d += VL) {
      if (outer) store_f32(s->q[m] + d, FN(load_n)(q[m] + d, head_dim - d));
      store_f32(s->out[m] + d, splat(0));
    }
    s->largest[m] = -INFINITY;
    s->total[m] = 0;
  }
  for (int start = first_key(c, task); start < task->num_keys; start += KEY_TILE) {
    int num = min_int(KEY_TILE, task->num_keys - start);
    FN(ask_for_keys)(c, task, start + KEY_TILE, k_cache, v_cache);
    FN(find_keys)(c, task, start, num, k_cache, v_cache, keys, values);
    if (outer) {
      FN(transpose_keys)(keys, head_dim, s->keys);
      score_lines(s, task->lines, head_dim);
    } else {
      for (int m = 0; m < task->lines; m++)
        for (int j = 0; j < num; j += VL) FN(score_keys)(q[m], keys + j, head_dim, s->scores[m] + j);
    }
    float factor[TILE_LINES];
    for (int m = 0; m < task->lines; m++) {
      int position = task->first_position + m / task->heads;
      int low = c->window > 0 ? position - c->window + 1 - start : 0;
      factor[m] = softmax_tile(c, s->scores[m], low, min_int(position + 1 - start, num),
                               &s->largest[m], &s->total[m]);
    }
    FN(mix_values)(s, task->lines, factor, values, num, head_dim);
  }
  for (int m = 0; m < task->lines; m++) {
    long token = task->first_token + m / task->heads, head = task->first_head + m % task->heads;
    ELEM *to = out + (token * c->heads + head) * head_dim;
    for (int d = 0; d < head_dim; d += VL)
      FN(store_n)(to + d, load_f32(s->out[m] + d) / s->total[m], head_dim - d);
  }
}

/* Takes a task and asks for its first keys, so that they come while the task before is computed.
 * 0 if there is none left. */
static int FN(next_attention)(const attention_call *c, attention_cursor *at, long *next,
                              const ELEM *k_cache, const ELEM *v_cache, attention_task *task) {
  long index = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
  if (!seek_attention(c, at, index)) return 0;
  *task = attention_task_at(c, at->row, (int)(index - at->first));
  FN(ask_for_keys)(c, task, first_key(c, task), k_cache, v_cache);
  return 1;
}

EXPORT void FN(paged_attention)(const ELEM *qkv, long qkv_stride, const ELEM *k_cache,
                                const ELEM *v_cache, const int32_t *block_tables, long max_blocks,
                                const int32_t *query_starts, const int32_t *context_lens, long rows,
                                ELEM *out, int heads, int kv_heads, int head_dim, int block_size,
                                float scale, int window, float softcap, int threads) {
  attention_call call = {qkv_stride, max_blocks, rows,      block_tables, query_starts, context_lens,
                         heads,      kv_heads,   head_dim,  block_size,   window,       scale,
                         softcap};
  long pairs = 0, next = 0;
  for (long r = 0; r < rows; r++) pairs += (long)queries_of(&call, r) * context_lens[r];
  threads = threads_for(2 * pairs * heads * head_dim, FLOPS_PER_THREAD, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    attention_scratch scratch;
    attention_cursor at = {-1, 0, 0};
    attention_task task, coming;
    int more = FN(next_attention)(&call, &at, &next, k_cache, v_cache, &coming);
    while (more) {
      task = coming;
      more = FN(next_attention)(&call, &at, &next, k_cache, v_cache, &coming);
      FN(attend)(&call, &task, qkv, k_cache, v_cache, out, &scratch);
    }
  }
}
