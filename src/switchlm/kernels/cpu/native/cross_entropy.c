/* Cross-entropy in training, float32: one pass over the logits of a row forward, while they are in the
   cache, and one backward, which recomputes the softmax instead of reading it from memory.

   Shapes: N rows, V logits, a multiple of 16. targets: a logit of each row, or IGNORED. */

#include <math.h>

#include "vectors.h"

enum { IGNORED = -100 };

/* loss [N]: log(sum(e^logit)) - logit of the target, 0 where ignored; the largest logit is subtracted
   first, for precision. kept [2, N], for the backward pass: the largest logit, and
   1 / sum(e^(logit - largest)). Returns the first row whose target is out of range, N if there is
   none. */
int64_t cross_entropy(const float *logits, const int64_t *targets, float *loss, float *kept,
                      int64_t N, int64_t V, int threads) {
  for (int64_t n = 0; n < N; n++)
    if (targets[n] != IGNORED && (targets[n] < 0 || targets[n] >= V)) return n;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int64_t n = 0; n < N; n++) {
    const float *row = logits + n * V;
    Floats top = load_float32(row, 0), total = {0};
    for (int64_t v = LANES; v < V; v += LANES) top = larger(load_float32(row, v), top);
    const float most = largest_of(top);
    for (int64_t v = 0; v < V; v += LANES) total += exponential(load_float32(row, v) - most);
    const float all = sum(total);
    kept[n] = most;
    kept[N + n] = 1 / all;
    loss[n] = targets[n] == IGNORED ? 0 : most - row[targets[n]] + logf(all);
  }
  return N;
}

/* dlogits = dloss * (softmax - 1 at the target). */
void cross_entropy_backward(const float *logits, const int64_t *targets, const float *kept,
                            const float *dloss, float *dlogits, int64_t N, int64_t V, int threads) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int64_t n = 0; n < N; n++) {
    const int ignored = targets[n] == IGNORED;
    const float *row = logits + n * V;
    float *change = dlogits + n * V;
    const Floats size = broadcast(dloss[n] * kept[N + n]), most = broadcast(kept[n]);
    for (int64_t v = 0; v < V; v += LANES)
      *(LooseFloats *)(change + v) =
          ignored ? (Floats){0} : exponential(load_float32(row, v) - most) * size;
    if (!ignored) change[targets[n]] -= dloss[n];
  }
}
