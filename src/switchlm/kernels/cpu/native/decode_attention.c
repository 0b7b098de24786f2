/* Attention of a decoding step: one query per head.

Shapes: B batch, H heads, M keys and values (memory), K head width. */

#include <math.h>

#include "vectors.h"

/* softmax(q k^T + bias) v of one head. weight: memory for M, padded to whole vectors. */
INLINE void attend(Load load, const float *q, const void *k, const void *v, const float *bias,
                   float *y, float *weight, int64_t M, int64_t K, int64_t place,
                   int64_t bias_place) {
  const int64_t filled = (M + LANES - 1) / LANES * LANES;
  float most = -INFINITY;
  for (int64_t m = 0; m < M; m++) {
    Floats product = {0};
    for (int64_t i = 0; i < K; i += LANES)
      product += load_float32(q, i) * load(k, m * place + i);
    weight[m] = sum(product) + (bias ? bias[m * bias_place] : 0);
    most = weight[m] > most ? weight[m] : most;
  }
  for (int64_t m = M; m < filled; m++) weight[m] = -INFINITY;
  Floats total = {0};
  for (int64_t m = 0; m < filled; m += LANES) {
    const Floats w = exponential(load_float32(weight, m) - most);
    *(LooseFloats *)(weight + m) = w;
    total += w;
  }
  const float all = sum(total);
  for (int64_t i = 0; i < K; i += LANES) {
    Floats value = {0};
    for (int64_t m = 0; m < M; m++) value += weight[m] * load(v, m * place + i);
    *(LooseFloats *)(y + i) = value / all;
  }
}

/* y_BHK for queries q_BHK. k, v: [B, H, M, K] float32, or by `half` bfloat16 (1) or float16 (2),
   the same strides of B, H and M (in numbers). bias: float32 [B, H, M] by its strides, or none. K: a multiple of
   LANES. Returns 0, or 1 if memory runs out. */
int decode_attention(int half, const float *q, const void *k, const void *v, const float *bias,
                     float *y, int64_t B, int64_t H, int64_t M, int64_t K, int64_t row,
                     int64_t head, int64_t place, int64_t bias_row, int64_t bias_head,
                     int64_t bias_place, int threads) {
  int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(| : failed) if (threads > 1)
#endif
  {
    float *weight = malloc(sizeof(float) * (M + LANES));
    failed = !weight;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t i = 0; i < B * H; i++) {
      if (!weight) continue;
      const int64_t b = i / H, h = i % H, first = (b * row + h * head) * (half ? 2 : 4);
      const float *added = bias ? bias + b * bias_row + h * bias_head : 0;
      const void *keys = (const char *)k + first, *values = (const char *)v + first;
#define OF_HEAD q + i * K, keys, values, added, y + i * K, weight, M, K, place, bias_place
      if (half == 2)
        attend(load_float16, OF_HEAD);
      else if (half)
        attend(load_bfloat16, OF_HEAD);
      else
        attend(load_float32, OF_HEAD);
    }
    free(weight);
  }
  return failed;
}
