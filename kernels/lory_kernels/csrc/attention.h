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

/* Takes the next task; 0 if there is none left. */
static int next_attention(const attention_call *c, attention_cursor *at, long *next,
                          attention_task *task) {
  long index = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
  if (!seek_attention(c, at, index)) return 0;
  *task = attention_task_at(c, at->row, (int)(index - at->first));
  return 1;
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

/* Up to KEY_TILE keys, and their values, where they lie. */
typedef struct {
  const ELEM *keys[KEY_TILE], *values[KEY_TILE];
  int num;
} FN(key_tile);

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

/* Columns [d, d + vectors * VL) of a key and its value. */
INLINE void FN(ask_for_columns)(const FN(key_tile) *tile, int j, int d, int vectors) {
  UNROLL for (int i = 0; i < vectors * VL; i += 64 / sizeof(ELEM)) {
    __builtin_prefetch(tile->keys[j] + d + i);
    __builtin_prefetch(tile->values[j] + d + i);
  }
}

/* out[m][d] = factor[m] * out[m][d] + sum_j p[m][j] * values[j][d] over `vectors` vectors of d, of
 * which `left` numbers are there. Asks for the columns of the next tile meanwhile: asked for all at
 * once, before, they stop the core until its line buffers are free. */
INLINE void FN(mix_block)(int lines, int vectors, const float (*p)[KEY_TILE], const float *factor,
                          const FN(key_tile) *tile, const FN(key_tile) *next, int d, int left,
                          float (*out)[MAX_HEAD_DIM]) {
  vf acc[4][4];
  UNROLL for (int m = 0; m < lines; m++)
    UNROLL for (int v = 0; v < vectors; v++) acc[m][v] = load_f32(out[m] + d + v * VL) * factor[m];
  for (int j = 0; j < tile->num; j++) {
    if (j < next->num) FN(ask_for_columns)(next, j, d, vectors);
    UNROLL for (int v = 0; v < vectors; v++) {
      vf vs = FN(load_n)(tile->values[j] + d + v * VL, left - v * VL);
      UNROLL for (int m = 0; m < lines; m++) acc[m][v] += p[m][j] * vs;
    }
  }
  for (int j = tile->num; j < next->num; j++) FN(ask_for_columns)(next, j, d, vectors);
  UNROLL for (int m = 0; m < lines; m++)
    UNROLL for (int v = 0; v < vectors; v++) store_f32(out[m] + d + v * VL, acc[m][v]);
}

INLINE void FN(mix_lines)(int lines, const float (*p)[KEY_TILE], const float *factor,
                          const FN(key_tile) *tile, const FN(key_tile) *next, int head_dim,
                          float (*out)[MAX_HEAD_DIM]) {
  int d = 0;
  for (; d + 4 * VL <= head_dim; d += 4 * VL)
    FN(mix_block)(lines, 4, p, factor, tile, next, d, 4 * VL, out);
  for (; d < head_dim; d += VL)
    FN(mix_block)(lines, 1, p, factor, tile, next, d, head_dim - d, out);
}

static void FN(mix_values)(attention_scratch *s, int lines, const float *factor,
                           const FN(key_tile) *tile, const FN(key_tile) *next, int head_dim) {
  const FN(key_tile) none = {.num = 0};
  int m = 0;
  for (; m + 4 <= lines; m += 4)
    FN(mix_lines)(4, (const float(*)[KEY_TILE])s->scores + m, factor + m, tile,
                  m == 0 ? next : &none, head_dim, s->out + m);
  for (; m + 2 <= lines; m += 2)
    FN(mix_lines)(2, (const float(*)[KEY_TILE])s->scores + m, factor + m, tile,
                  m == 0 ? next : &none, head_dim, s->out + m);
  for (; m < lines; m++)
    FN(mix_lines)(1, (const float(*)[KEY_TILE])s->scores + m, factor + m, tile,
                  m == 0 ? next : &none, head_dim, s->out + m);
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

/* The tile of a task's keys from position `start`. */
static void FN(find_tile)(const attention_call *c, const attention_task *task, int start,
                          const ELEM *k_cache, const ELEM *v_cache, FN(key_tile) *tile) {
  tile->num = min_int(KEY_TILE, task->num_keys - start);
  for (int j = 0; j < tile->num;) {
    long place = FN(place_of)(c, task, start + j);
    for (int run = FN(run_from)(c, start + j, start + tile->num); run > 0; run--, j++) {
      tile->keys[j] = k_cache + place;
      tile->values[j] = v_cache + place;
      place += c->head_dim;
    }
  }
}

/* Scores want whole vectors of keys: past the last, the last again. */
INLINE void FN(pad_tile)(FN(key_tile) *tile) {
  for (int j = tile->num; j < KEY_TILE; j++) tile->keys[j] = tile->keys[tile->num - 1];
}

/* Writes the lines' queries to `q` and clears what they will sum up. */
static void FN(open_lines)(const attention_call *c, const attention_task *task, const ELEM *qkv,
                           const ELEM **q, attention_scratch *s) {
  int head_dim = c->head_dim, outer = task->lines >= LINES_TO_TRANSPOSE;
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
}

static void FN(close_lines)(const attention_call *c, const attention_task *task, ELEM *out,
                            const attention_scratch *s) {
  int head_dim = c->head_dim;
  for (int m = 0; m < task->lines; m++) {
    long token = task->first_token + m / task->heads, head = task->first_head + m % task->heads;
    ELEM *to = out + (token * c->heads + head) * head_dim;
    for (int d = 0; d < head_dim; d += VL)
      FN(store_n)(to + d, load_f32(s->out[m] + d) / s->total[m], head_dim - d);
  }
}

/* `tile` starts at position `start`; the next one is asked for. */
static void FN(attend_tile)(const attention_call *c, const attention_task *task, int start,
                            const ELEM *const *q, const FN(key_tile) *tile,
                            const FN(key_tile) *next, attention_scratch *s) {
  float factor[TILE_LINES];
  if (task->lines >= LINES_TO_TRANSPOSE) {
    FN(transpose_keys)(tile->keys, c->head_dim, s->keys);
    score_lines(s, task->lines, c->head_dim);
  } else {
    for (int m = 0; m < task->lines; m++)
      for (int j = 0; j < tile->num; j += VL)
        FN(score_keys)(q[m], tile->keys + j, c->head_dim, s->scores[m] + j);
  }
  for (int m = 0; m < task->lines; m++) {
    int position = task->first_position + m / task->heads;
    int low = c->window > 0 ? position - c->window + 1 - start : 0;
    factor[m] = softmax_tile(c, s->scores[m], low, min_int(position + 1 - start, tile->num),
                             &s->largest[m], &s->total[m]);
  }
  FN(mix_values)(s, task->lines, factor, tile, next, c->head_dim);
}

/* One task; `first` is its first tile, and becomes that of the task after it, if there is one. */
static void FN(attend)(const attention_call *c, const attention_task *task,
                       const attention_task *after, const ELEM *qkv, const ELEM *k_cache,
                       const ELEM *v_cache, ELEM *out, FN(key_tile) *first, attention_scratch *s) {
  const ELEM *q[TILE_LINES];
  FN(key_tile) spare, *tile = first, *next = &spare;
  FN(open_lines)(c, task, qkv, q, s);
  for (int start = first_key(c, task); start < task->num_keys; start += KEY_TILE) {
    next->num = 0;
    if (start + KEY_TILE < task->num_keys)
      FN(find_tile)(c, task, start + KEY_TILE, k_cache, v_cache, next);
    else if (after)
      FN(find_tile)(c, after, first_key(c, after), k_cache, v_cache, next);
    FN(pad_tile)(tile);
    FN(attend_tile)(c, task, start, q, tile, next, s);
    FN(key_tile) *done = tile;
    tile = next;
    next = done;
  }
  if (tile != first) *first = *tile;
  FN(close_lines)(c, task, out, s);
}

typedef struct {
  const ELEM *qkv, *k_cache, *v_cache;
  ELEM *out;
  long qkv_stride;
  int heads, kv_heads, head_dim, block_size, window;
  float scale, softcap;
} FN(attention_args);

INLINE attention_call FN(attention_call_of)(const FN(attention_args) *a, const step *s) {
  return (attention_call){.qkv_stride = a->qkv_stride,
                          .max_blocks = s->max_blocks,
                          .rows = s->rows,
                          .block_tables = s->block_tables,
                          .query_starts = s->query_starts,
                          .context_lens = s->context_lens,
                          .heads = a->heads,
                          .kv_heads = a->kv_heads,
                          .head_dim = a->head_dim,
                          .block_size = a->block_size,
                          .window = a->window,
                          .scale = a->scale,
                          .softcap = a->softcap};
}

static int FN(attention_team)(const void *args, const step *s, int threads) {
  const FN(attention_args) *a = args;
  long pairs = 0;
  for (long r = 0; r < s->rows; r++)
    pairs += (long)(s->query_starts[r + 1] - s->query_starts[r]) * s->context_lens[r];
  return threads_for(2 * pairs * a->heads * a->head_dim, FLOPS_PER_THREAD, threads);
}

static void FN(attention_op)(const void *args, const step *s, int thread, int team, long *next) {
  const FN(attention_args) *a = args;
  attention_call call = FN(attention_call_of)(a, s);
  attention_scratch scratch;
  attention_cursor at = {-1, 0, 0};
  attention_task task, after;
  FN(key_tile) tile;
  int more = next_attention(&call, &at, next, &after);
  if (more) FN(find_tile)(&call, &after, first_key(&call, &after), a->k_cache, a->v_cache, &tile);
  while (more) {
    task = after;
    more = next_attention(&call, &at, next, &after);
    FN(attend)(&call, &task, more ? &after : 0, a->qkv, a->k_cache, a->v_cache, a->out, &tile,
               &scratch);
  }
}

EXPORT_CALL(paged_attention, attention_op, attention_team)
