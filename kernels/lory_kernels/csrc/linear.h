/* y = x @ W.T + b in bfloat16, W packed once in panels of PANEL columns: for every pair of inputs the
 * pair of each column side by side, as the dot-product instruction takes them.
 *
 * A panel stays in the first cache while blocks of rows go over it, and the next panel is asked for
 * meanwhile, so that arithmetic hides memory. Sums run over k in order, whatever the rows around:
 * a row's result does not depend on its batch, nor on threads. Must not know adapters. */

#define PANEL 32
#define BLOCK_ROWS 12
#define ROWS_AT_ONCE 384 /* Rows that go over all panels before the next: x stays in the second cache. */

typedef struct {
  const bf16 *panels, *bias;
  long n, k;
} panel_weight;

#if VL == 16 && defined(__AVX512BF16__)

typedef struct {
  const bf16 *x, *panel, *bias;
  const char *next;
  bf16 *y;
  long k, x_stride, y_stride;
  int columns;
} linear_block;

INLINE __m512bh pair_of(const bf16 *x) {
  int32_t pair;
  memcpy(&pair, x, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

INLINE void store_columns(bf16 *y, vf v, int columns) {
  __mmask16 kept = columns >= 16 ? (__mmask16)-1 : (__mmask16)((1u << (columns > 0 ? columns : 0)) - 1);
  _mm256_mask_storeu_epi16(y, kept, (__m256i)narrow(v));
}

INLINE vf bias_or_zero(const bf16 *bias, int columns) {
  if (!bias || columns <= 0) return splat(0);
  __mmask16 kept = columns >= 16 ? (__mmask16)-1 : (__mmask16)((1u << columns) - 1);
  return widen((vh)_mm256_maskz_loadu_epi16(kept, bias));
}

INLINE void multiply_block(int rows, const linear_block *b) {
  __m512 acc[BLOCK_ROWS][2];
  __m512 left = (__m512)bias_or_zero(b->bias, b->columns);
  __m512 right = (__m512)bias_or_zero(b->bias ? b->bias + 16 : 0, b->columns - 16);
  const char *next = b->next;
  UNROLL for (int r = 0; r < rows; r++) acc[r][0] = left, acc[r][1] = right;
  for (long k = 0; k < b->k; k += 2) {
    __m512bh w_left = (__m512bh)_mm512_loadu_si512(b->panel + k * PANEL);
    __m512bh w_right = (__m512bh)_mm512_loadu_si512(b->panel + k * PANEL + 32);
    _mm_prefetch(next + k * 32, _MM_HINT_T0);
    UNROLL for (int r = 0; r < rows; r++) {
      __m512bh x = pair_of(b->x + r * b->x_stride + k);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, w_left);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, w_right);
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    store_columns(b->y + r * b->y_stride, (vf)acc[r][0], b->columns);
    store_columns(b->y + r * b->y_stride + 16, (vf)acc[r][1], b->columns - 16);
  }
}

static void multiply_rows(int rows, const linear_block *b) {
  switch (rows) {
    case 1: multiply_block(1, b); return;
    case 2: multiply_block(2, b); return;
    case 3: multiply_block(3, b); return;
    case 4: multiply_block(4, b); return;
    case 5: multiply_block(5, b); return;
    case 6: multiply_block(6, b); return;
    case 7: multiply_block(7, b); return;
    case 8: multiply_block(8, b); return;
    case 9: multiply_block(9, b); return;
    case 10: multiply_block(10, b); return;
    case 11: multiply_block(11, b); return;
    default: multiply_block(12, b);
  }
}

/* All rows over one panel. Each of the first two blocks asks for half of the panel after it. */
static void multiply_panel(linear_block b, long rows) {
  long blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, each = (rows + blocks - 1) / blocks;
  for (long first = 0; first < rows; first += each) {
    multiply_rows((int)(rows - first < each ? rows - first : each), &b);
    b.x += each * b.x_stride;
    b.y += each * b.y_stride;
    b.next = first == 0 ? b.next + b.k * 32 : (const char *)b.panel;
  }
}

typedef struct {
  const panel_weight *weight;
  bf16 *y; /* [tokens, n] */
  const bf16 *x; /* [tokens, k] */
} linear_args;

/* Up to ROWS_AT_ONCE rows from `row` over panel p, which is not the last of a share if `more`. */
INLINE void multiply_tile(const linear_args *a, long p, long row, long rows, int more) {
  const panel_weight *w = a->weight;
  const bf16 *panel = w->panels + p * PANEL * w->k;
  long left = w->n - p * PANEL;
  linear_block b = {.x = a->x + row * w->k,
                    .panel = panel,
                    .bias = w->bias ? w->bias + p * PANEL : 0,
                    .next = (const char *)(more ? panel + PANEL * w->k : panel),
                    .y = a->y + row * w->n + p * PANEL,
                    .k = w->k,
                    .x_stride = w->k,
                    .y_stride = w->n,
                    .columns = (int)(left < PANEL ? left : PANEL)};
  multiply_panel(b, rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE);
}

/* All rows over the panels of one thread. */
static void linear_op_bf16(const void *args, const step *s, int thread, int team, long *next) {
  const linear_args *a = args;
  span panels = share_of((a->weight->n + PANEL - 1) / PANEL, thread, team);
  for (long row = 0; row < s->tokens; row += ROWS_AT_ONCE)
    for (long p = panels.first; p < panels.end; p++)
      multiply_tile(a, p, row, s->tokens, p + 1 < panels.end);
}

static int linear_team_bf16(const void *args, const step *s, int threads) {
  const panel_weight *w = ((const linear_args *)args)->weight;
  return threads_for(2 * s->tokens * w->n * w->k, FLOPS_PER_THREAD, threads);
}

EXPORT_CALL(linear, linear_op, linear_team)
EXPORT int can_multiply_panels_bf16(void) { return 1; }

#else

EXPORT int can_multiply_panels_bf16(void) { return 0; }

#endif

/* panels[p][k / 2][c][k % 2] = w[p * PANEL + c][k], zero past the last column. k is even. */
EXPORT void pack_panels_bf16(const bf16 *w, bf16 *panels, long n, long k) {
  long num_panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for
  for (long p = 0; p < num_panels; p++)
    for (long c = 0; c < PANEL; c++) {
      const bf16 *row = w + (p * PANEL + c) * k;
      bf16 *to = panels + p * PANEL * k + c * 2;
      for (long i = 0; i < k; i += 2, to += PANEL * 2) {
        to[0] = p * PANEL + c < n ? row[i] : 0;
        to[1] = p * PANEL + c < n ? row[i + 1] : 0;
      }
    }
}
