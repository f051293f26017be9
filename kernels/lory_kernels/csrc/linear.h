/* Template over ELEM: y = x @ W.T + b, W laid out once in panels of PANEL columns, dense or as NF4.
 *
 *   dense  [panel][k / PAIR][column][PAIR]: for every PAIR of inputs those of each column side by side,
 *          as the dot-product instruction takes them (one input where there is no such instruction)
 *   NF4    [panel][k / PAIR][PANEL * PAIR / 2 bytes] in the order that `decode` undoes, and a scale
 *          for each block of inputs and each column: [panel][k / block][PANEL]
 *
 * A panel stays in the first cache while blocks of rows go over it, and the next panel is asked for
 * meanwhile, so that arithmetic hides memory. NF4 is decoded to what bitsandbytes decodes it to, code
 * times scale rounded to ELEM, by the first block of rows; the others find it in scratch memory. Sums
 * run over k in order, whatever the rows around: a row's result depends neither on its batch nor on
 * threads. Must not know adapters. */

#ifndef PANEL
#define PANEL 32
#define VECS (PANEL / VL)
#define BLOCK_ROWS (VL == 16 ? 12 : VL == 8 ? 3 : 1) /* As many as have room for their sums in registers. */
#define ROWS_AT_ONCE 384 /* Rows that go over all panels before the next: x stays in the second cache. */

enum { DENSE, DECODE, DECODE_AND_KEEP };

/* One for all weights: what a thread decodes it uses at once. */
typedef struct {
  char *memory;
  long bytes_per_thread;
} panel_scratch;

typedef struct {
  const void *panels, *bias;
  const float *absmax; /* 0: dense */
  const panel_scratch *scratch; /* of NF4 */
  long n, k, block;
} panel_weight;

typedef struct {
  const panel_weight *weight;
  void *y; /* [tokens, n] */
  const void *x; /* [tokens, k] */
} linear_args;

/* VL codes, a byte each. */
INLINE vi widen_bytes(const uint8_t *p) {
#if VL == 16
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif VL == 8
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  return (vi){p[0], p[1], p[2], p[3]};
#endif
}

/* The values of NF4 (arXiv 2305.14314, appendix E), by the low four bits of each code. */
static const float nf4_values[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

INLINE vf nf4_of(vi codes) {
#if VL == 16
  return (vf)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(nf4_values));
#elif VL == 8
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(nf4_values), (__m256i)codes);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(nf4_values + 8), (__m256i)codes);
  return (vf)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
#else
  return (vf){nf4_values[codes[0] & 15], nf4_values[codes[1] & 15], nf4_values[codes[2] & 15],
              nf4_values[codes[3] & 15]};
#endif
}
#endif

#undef PAIR
#undef SCALES
#define PAIR (WORDS + 1)
#define SCALES (WORDS ? 2 * VECS : VECS)

typedef struct {
  const ELEM *x, *panel, *bias;
  const uint8_t *codes;
  const float *absmax;
  /* Half as long as what is asked for on the way over k. Not also the factors that an SGMV after this
   * call reads: where memory is busy all the time, that only moves the wait. */
  const char *next;
  ELEM *y, *kept;
  long k, block, x_stride, y_stride;
  int columns;
} FN(linear_block);

INLINE float FN(number)(ELEM value) {
#if IS_BF16
  uint32_t bits = (uint32_t)value << 16;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
#else
  return value;
#endif
}

/* One step's inputs of a row, in all lanes. */
INLINE OPERAND FN(inputs)(const ELEM *x) {
#if WORDS
  int32_t pair;
  memcpy(&pair, x, sizeof pair);
  return _mm512_set1_epi32(pair);
#else
  return splat(FN(number)(*x));
#endif
}

/* The scales of a block in the lanes where `decode` needs them. */
INLINE void FN(scales)(const float *absmax, vf scale[SCALES]) {
#if WORDS
  const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  UNROLL for (int v = 0; v < VECS; v++) {
    __m512 columns = _mm512_loadu_ps(absmax + v * VL);
    scale[2 * v] = (vf)_mm512_permutexvar_ps(low, columns);
    scale[2 * v + 1] = (vf)_mm512_permutexvar_ps(high, columns);
  }
#else
  UNROLL for (int v = 0; v < VECS; v++) scale[v] = load_f32(absmax + v * VL);
#endif
}

/* One step of a panel. With words, the byte 2 c + i of a vector's 16 holds input i of columns c (low)
 * and 8 + c (high); without, the byte c holds columns c (low) and 16 + c (high). */
INLINE void FN(decode)(const uint8_t *codes, const vf scale[SCALES], OPERAND w[VECS]) {
#if WORDS
  UNROLL for (int v = 0; v < VECS; v++) {
    vi both = widen_bytes(codes + v * VL);
    vf low = nf4_of(both) * scale[2 * v], high = nf4_of(both >> 4) * scale[2 * v + 1];
    w[v] = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
#else
  UNROLL for (int v = 0; v < VECS; v++) {
    vi both = widen_bytes(codes + v * VL % 16);
    w[v] = FN(round)(nf4_of(v * VL < 16 ? both : both >> 4) * scale[v]);
  }
#endif
}

INLINE void FN(load_weights)(const ELEM *panel, OPERAND w[VECS]) {
  UNROLL for (int v = 0; v < VECS; v++) w[v] = FN(operand)(panel + v * VL * PAIR, VL * PAIR);
}

INLINE void FN(keep_weights)(ELEM *kept, const OPERAND w[VECS]) {
  UNROLL for (int v = 0; v < VECS; v++) {
#if WORDS
    _mm512_storeu_si512(kept + v * VL * PAIR, w[v]);
#else
    FN(store)(kept + v * VL, w[v]);
#endif
  }
}

INLINE vf FN(bias_or_zero)(const FN(linear_block) *b, int from) {
  if (!b->bias || b->columns <= from) return splat(0);
  return FN(load_n)(b->bias + from, b->columns - from);
}

INLINE void FN(multiply_block)(int rows, int source, const FN(linear_block) *b) {
  vf acc[BLOCK_ROWS][VECS], scale[SCALES];
  OPERAND w[VECS];
  UNROLL for (int v = 0; v < VECS; v++) {
    vf first = FN(bias_or_zero)(b, v * VL);
    UNROLL for (int r = 0; r < rows; r++) acc[r][v] = first;
  }
  long block = source == DENSE ? b->k : b->block;
  long next_bytes = source == DENSE ? PANEL * sizeof(ELEM) / 2 : PANEL / 2;
  for (long from = 0; from < b->k; from += block) {
    if (source != DENSE) FN(scales)(b->absmax + from / block * PANEL, scale);
    for (long k = from; k < from + block; k += PAIR) {
      if (source == DENSE)
        FN(load_weights)(b->panel + k * PANEL, w);
      else
        FN(decode)(b->codes + k * PANEL / 2, scale, w);
      if (source == DECODE_AND_KEEP) FN(keep_weights)(b->kept + k * PANEL, w);
      __builtin_prefetch(b->next + k * next_bytes);
      UNROLL for (int r = 0; r < rows; r++) {
        OPERAND x = FN(inputs)(b->x + r * b->x_stride + k);
        UNROLL for (int v = 0; v < VECS; v++) acc[r][v] = FN(dot_step)(acc[r][v], x, w[v]);
      }
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < VECS; v++)
      if (b->columns > v * VL)
        FN(store_n)(b->y + r * b->y_stride + v * VL, acc[r][v], b->columns - v * VL);
}

INLINE void FN(multiply_many)(int rows, int source, const FN(linear_block) *b) {
  switch (rows) {
#if VL == 16
    case 12: FN(multiply_block)(12, source, b); return;
    case 11: FN(multiply_block)(11, source, b); return;
    case 10: FN(multiply_block)(10, source, b); return;
    case 9: FN(multiply_block)(9, source, b); return;
    case 8: FN(multiply_block)(8, source, b); return;
    default: FN(multiply_block)(7, source, b);
#elif VL == 8
    case 3: FN(multiply_block)(3, source, b); return;
    default: FN(multiply_block)(2, source, b);
#else
    default: FN(multiply_block)(1, source, b);
#endif
  }
}

INLINE void FN(multiply_few)(int rows, int source, const FN(linear_block) *b) {
  switch (rows) {
#if VL == 16
    case 6: FN(multiply_block)(6, source, b); return;
    case 5: FN(multiply_block)(5, source, b); return;
    case 4: FN(multiply_block)(4, source, b); return;
    case 3: FN(multiply_block)(3, source, b); return;
    case 2: FN(multiply_block)(2, source, b); return;
#endif
    default: FN(multiply_block)(1, source, b);
  }
}

static __attribute__((noinline)) void FN(multiply_rows)(int rows, int source,
                                                        const FN(linear_block) *b) {
  int is_many = rows > BLOCK_ROWS / 2;
  if (source == DECODE_AND_KEEP)
    FN(multiply_many)(rows, DECODE_AND_KEEP, b); /* There are more rows than fit in a block. */
  else if (source == DECODE)
    is_many ? FN(multiply_many)(rows, DECODE, b) : FN(multiply_few)(rows, DECODE, b);
  else
    is_many ? FN(multiply_many)(rows, DENSE, b) : FN(multiply_few)(rows, DENSE, b);
}

/* All rows over one panel. Of a dense panel each of the first two blocks asks for half of the next. */
static void FN(multiply_panel)(FN(linear_block) b, long rows) {
  long blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, each = (rows + blocks - 1) / blocks;
  int source = !b.absmax ? DENSE : blocks == 1 ? DECODE : DECODE_AND_KEEP;
  for (long first = 0; first < rows; first += each) {
    FN(multiply_rows)((int)(rows - first < each ? rows - first : each), source, &b);
    b.x += each * b.x_stride;
    b.y += each * b.y_stride;
    if (source == DENSE && first == 0)
      b.next += b.k * (PANEL * sizeof(ELEM) / 2);
    else
      b.next = (const char *)b.panel;
    source = DENSE;
  }
}

/* Up to ROWS_AT_ONCE rows from `row` over panel p, which is not the last of a share if `more`. */
INLINE void FN(multiply_tile)(const linear_args *a, long p, long row, long rows, int thread, int more) {
  const panel_weight *w = a->weight;
  long columns = w->n - p * PANEL, num_bytes = PANEL * w->k * (w->absmax ? 1 : 2 * sizeof(ELEM)) / 2;
  const char *panel = (const char *)w->panels + p * num_bytes;
  FN(linear_block) b = {.x = (const ELEM *)a->x + row * w->k,
                        .panel = (const ELEM *)panel,
                        .bias = w->bias ? (const ELEM *)w->bias + p * PANEL : 0,
                        .next = more ? panel + num_bytes : panel,
                        .y = (ELEM *)a->y + row * w->n + p * PANEL,
                        .k = w->k,
                        .block = w->block,
                        .x_stride = w->k,
                        .y_stride = w->n,
                        .columns = (int)(columns < PANEL ? columns : PANEL)};
  if (w->absmax) {
    b.codes = (const uint8_t *)panel;
    b.absmax = w->absmax + p * PANEL * (w->k / w->block);
    b.kept = (ELEM *)(w->scratch->memory + thread * w->scratch->bytes_per_thread);
    b.panel = b.kept;
  }
  FN(multiply_panel)(b, rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE);
}

/* All rows over the panels of one thread. */
static void FN(linear_op)(const void *args, const step *s, int thread, int team, long *next) {
  const linear_args *a = args;
  span panels = share_of((a->weight->n + PANEL - 1) / PANEL, thread, team);
  for (long row = 0; row < s->tokens; row += ROWS_AT_ONCE)
    for (long p = panels.first; p < panels.end; p++)
      FN(multiply_tile)(a, p, row, s->tokens, thread, p + 1 < panels.end);
}

static int FN(linear_team)(const void *args, const step *s, int threads) {
  const panel_weight *w = ((const linear_args *)args)->weight;
  return threads_for(2 * s->tokens * w->n * w->k, FLOPS_PER_THREAD, threads);
}

EXPORT_CALL(linear, linear_op, linear_team)

/* w [n, k] to panels, zero past the last column; k is a multiple of PAIR. */
EXPORT void FN(pack_panels)(const ELEM *w, ELEM *panels, long n, long k) {
  long num_panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for
  for (long p = 0; p < num_panels; p++)
    for (long c = 0; c < PANEL; c++) {
      const ELEM *row = w + (p * PANEL + c) * k;
      ELEM *to = panels + p * PANEL * k + c * PAIR;
      for (long i = 0; i < k; i += PAIR, to += PANEL * PAIR)
        for (long j = 0; j < PAIR; j++) to[j] = p * PANEL + c < n ? row[i + j] : 0;
    }
}

/* Where the low and the high half of byte `at` of a step of PAIR inputs come from; see `decode`. */
INLINE void FN(halves_of)(long at, long *column, long *input, long *apart) {
  *column = WORDS ? at / 16 * 16 + at % 16 / 2 : at;
  *input = WORDS ? at % 2 : 0;
  *apart = WORDS ? 8 : 16;
}

/* Codes of bitsandbytes, [n, k] with two a byte and the first in the high half, to panels. */
EXPORT void FN(pack_nf4)(const uint8_t *codes, uint8_t *panels, long n, long k) {
  long num_panels = (n + PANEL - 1) / PANEL, step_bytes = PANEL * PAIR / 2;
#pragma omp parallel for
  for (long p = 0; p < num_panels; p++)
    for (long at = 0; at < step_bytes; at++) {
      long column, input, apart;
      FN(halves_of)(at, &column, &input, &apart);
      for (long i = input; i < k; i += PAIR) {
        int byte = 0;
        for (int half = 0; half < 2; half++) {
          long row = p * PANEL + column + half * apart;
          int code = row < n ? codes[(row * k + i) / 2] >> (i % 2 ? 0 : 4) & 15 : 0;
          byte |= code << (4 * half);
        }
        panels[p * PANEL * k / 2 + i / PAIR * step_bytes + at] = (uint8_t)byte;
      }
    }
}

/* A panel of NF4 as the dense one that rows are multiplied by. */
EXPORT void FN(decode_panel)(const uint8_t *codes, const float *absmax, long k, long block,
                             ELEM *kept) {
  vf scale[SCALES];
  OPERAND w[VECS];
  for (long from = 0; from < k; from += block) {
    FN(scales)(absmax + from / block * PANEL, scale);
    for (long at = from; at < from + block; at += PAIR) {
      FN(decode)(codes + at * PANEL / 2, scale, w);
      FN(keep_weights)(kept + at * PANEL, w);
    }
  }
}

/* A dense panel as rows [PANEL, k], some inputs at a time: they stay in the first cache. */
EXPORT void FN(unpack_panel)(const ELEM *panel, long k, float *rows) {
  for (long from = 0; from < k; from += 64)
    for (long c = 0; c < PANEL; c++)
      for (long i = from; i < from + 64 && i < k; i++)
        rows[c * k + i] = FN(number)(panel[(i / PAIR * PANEL + c) * PAIR + i % PAIR]);
}
