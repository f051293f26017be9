/* How ops are called: weights, buffers and geometry as `args`, what changes from step to step as a
 * `step`. So a model's step is a list of calls that is made once, and run in one call from outside.
 *
 * An op does the share of `thread` in a team; `next` is a counter of its own, 0 when it starts. Must
 * not know what any op computes. */

/* Which rows use which adapter: segment g covers [starts[g], starts[g + 1]) and uses slots[g], the
 * base if it is negative. */
typedef struct {
  const int32_t *starts, *slots;
  long segments, adapted_rows;
  int max_rank;
  int has_gain_or_bias; /* 0: no slot named here has either */
} sgmv_rows;

typedef struct {
  long tokens, rows, max_blocks;
  const int64_t *positions, *kv_slots;
  const int32_t *block_tables, *query_starts, *context_lens;
  const sgmv_rows *lora; /* 0: no row uses an adapter */
} step;

typedef void step_op(const void *args, const step *s, int thread, int team, long *next);

/* Threads that are worth waking for an op of this size; 0: there is nothing to do. */
typedef int step_team(const void *args, const step *s, int threads);

typedef struct {
  step_op *op;
  step_team *team;
  const void *args;
} step_call;

static void run_alone(const step_call *c, const step *s, int threads) {
  long next = 0;
  threads = c->team(c->args, s, threads);
  if (threads == 0) return;
#pragma omp parallel num_threads(threads) if (threads > 1)
  c->op(c->args, s, omp_get_thread_num(), omp_get_num_threads(), &next);
}

/* One team for all calls: between two of them its threads wait for each other, and nobody else. */
static void run_together(const step_call *calls, long num_calls, const step *s, int threads,
                         long *next) {
#pragma omp parallel num_threads(threads)
  for (long i = 0; i < num_calls; i++) {
    int team = calls[i].team(calls[i].args, s, omp_get_num_threads());
    int thread = omp_get_thread_num();
    if (team == 0) continue; /* Nobody waits for nothing. */
    if (thread < team) calls[i].op(calls[i].args, s, thread, team, next + i);
#pragma omp barrier
  }
}

/* `next` holds a counter a call. */
EXPORT void run_calls(const step_call *calls, long num_calls, const step *s, int threads,
                      long *next) {
  if (num_calls == 1 || threads == 1) {
    for (long i = 0; i < num_calls; i++) run_alone(calls + i, s, threads);
    return;
  }
  memset(next, 0, num_calls * sizeof *next);
  run_together(calls, num_calls, s, threads, next);
}

/* The part [first, end) of `items` that falls to a thread. */
typedef struct {
  long first, end;
} span;

INLINE span share_of(long items, int thread, int team) {
  return (span){items * thread / team, items * (thread + 1) / team};
}

/* The op and its team under the name that others look for, as `name` of this dtype. */
#define EXPORT_CALL(name, op, team) \
  EXPORT const step_call FN(name) = {FN(op), FN(team), 0};
