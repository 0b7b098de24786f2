/* RMSNorm, float32: y = x * scale * weight, where the scale of a row is
   1 / sqrt(mean(x^2) + epsilon). One pass over the rows each way.

   The backward pass takes groups of rows, each of which sums its own gradient of the weight; they are
   added in order, so that the result has the same bits with any number of threads.

   Shapes: R rows, D width, a multiple of 16. */

#include <math.h>

#include "vectors.h"

enum { GROUP = 256 };

static void norm_rows(const float *x, const float *weight, float *y, float *scale, int64_t start,
                      int64_t stop, int64_t D, float epsilon) {
  for (int64_t r = start; r < stop; r++) {
    const float *row = x + r * D;
    Floats squares = {0};
    for (int64_t d = 0; d < D; d += LANES) squares += load_float32(row, d) * load_float32(row, d);
    const float size = 1 / sqrtf(sum(squares) / (float)D + epsilon);
    for (int64_t d = 0; d < D; d += LANES)
      *(LooseFloats *)(y + r * D + d) = load_float32(row, d) * size * load_float32(weight, d);
    if (scale) scale[r] = size;
  }
}

/* scale [R]: kept for the backward pass, or NULL. */
void rms_norm(const float *x, const float *weight, float *y, float *scale, int64_t R, int64_t D,
              float epsilon, int threads) {
  if (threads == 1) { /* the few rows of a decoding step: starting OpenMP takes as long as they do */
    norm_rows(x, weight, y, scale, 0, R, D, epsilon);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
  for (int64_t r = 0; r < R; r++) norm_rows(x, weight, y, scale, r, r + 1, D, epsilon);
}

/* dx = scale * (dy * weight - x * scale^2 * mean(dy * weight * x)); dweight = sum(dy * x * scale).
   dweight: [groups, D], of which the first becomes the sum. */
void rms_norm_backward(const float *dy, const float *x, const float *weight, const float *scale,
                       float *dx, float *dweight, int64_t R, int64_t D, int threads) {
  const int64_t groups = (R + GROUP - 1) / GROUP;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int64_t g = 0; g < groups; g++) {
    float *total = dweight + g * D;
    const int64_t stop = minimum((g + 1) * GROUP, R);
    memset(total, 0, sizeof *total * D);
    for (int64_t r = g * GROUP; r < stop; r++) {
      const float *row = x + r * D, *change = dy + r * D;
      const Floats size = broadcast(scale[r]);
      Floats along = {0};
      for (int64_t d = 0; d < D; d += LANES) {
        const Floats product = load_float32(change, d) * load_float32(row, d);
        along += product * load_float32(weight, d);
        *(LooseFloats *)(total + d) += product * size;
      }
      const float share = scale[r] * scale[r] * sum(along) / (float)D;
      for (int64_t d = 0; d < D; d += LANES)
        *(LooseFloats *)(dx + r * D + d) =
            (load_float32(change, d) * load_float32(weight, d) - load_float32(row, d) * share) * size;
    }
  }
  for (int64_t g = 1; g < groups; g++)
    for (int64_t d = 0; d < D; d += LANES)
      *(LooseFloats *)(dweight + d) += load_float32(dweight, g * D + d);
}
