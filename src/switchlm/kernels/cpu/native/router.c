/* The fused router where every token takes one expert: logits, softmax, choice, capacity and losses
   in one pass over the tokens, float32, one thread. A block of tokens stays in the cache, with one
   token per lane, so that only the mean probabilities are sums across lanes.

   Shapes: N tokens, D width, E experts, G groups of S consecutive tokens. Probabilities are stored by
   block, [E, width] each, a block's tokens padded to whole vectors; blocks do not span groups. */

#include "gemm.h"
#include "vectors.h"
#include <math.h>

enum {
  BLOCK = 64,
  FULL = 16 /* lanes of a whole vector on every processor */,
  AT_ONCE = 4 /* vectors */
};

INLINE Floats load(const float *from) { return load_float32(from, 0); }
INLINE void store(float *to, Floats v) { *(LooseFloats *)to = v; }
INLINE Floats where(Ints chosen, Floats a, Floats b) {
  return (Floats)((chosen & (Ints)a) | (~chosen & (Ints)b));
}

/* The logarithm of normal numbers, to 1 ulp (Cephes' polynomial); NaN stays NaN. */
INLINE Floats log_of(Floats x) {
  const Ints exponent = ((Ints)x - 0x3f3504f3) >> 23; /* of x = 2^n (1 + f), f around 0 */
  const Floats f = (Floats)((Ints)x - (exponent << 23)) - 1.0f, square = f * f;
  const Floats n = __builtin_convertvector(exponent, Floats);
  Floats y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * square - n * 2.12194440e-4f - 0.5f * square;
  return f + y + n * 0.693359375f + (x - x);
}

/* p[E, width]: from logits to probabilities, for several independent vectors of tokens at once.
   lse: the logarithm of the sum of e^logit. chosen: the expert with the largest p + bias, the first
   of equals; NaN counts as largest. */
INLINE void softmax(float *p, int64_t E, int64_t width, const float *bias, float *lse,
                    int32_t *chosen, const int vectors) {
  Floats top[AT_ONCE], sum[AT_ONCE], best[AT_ONCE];
  Ints index[AT_ONCE];
  EACH(v, vectors) {
    top[v] = load(p + v * LANES);
    best[v] = (Floats){0} - INFINITY;
    sum[v] = (Floats){0};
    index[v] = (Ints){0};
  }
  for (int64_t e = 1; e < E; e++)
    EACH(v, vectors) top[v] = larger(load(p + e * width + v * LANES), top[v]);
  for (int64_t e = 0; e < E; e++) EACH(v, vectors) {
    float *const place = p + e * width + v * LANES;
    const Floats power = exponential(load(place) - top[v]);
    store(place, power);
    sum[v] += power;
  }
  EACH(v, vectors) {
    const Ints infinite = (top[v] == INFINITY) | (top[v] == -INFINITY);
    store(lse + v * LANES, where(infinite, top[v], top[v] + log_of(sum[v])));
    sum[v] = 1.0f / sum[v];
  }
  for (int64_t e = 0; e < E; e++) EACH(v, vectors) {
    float *const place = p + e * width + v * LANES;
    const Floats share = load(place) * sum[v], score = bias ? share + bias[e] : share;
    store(place, share);
    const Ints takes = ~(score <= best[v]) & (best[v] == best[v]);
    best[v] = where(takes, score, best[v]);
    index[v] = (takes & ((Ints){0} + (int32_t)e)) | (~takes & index[v]);
  }
  EACH(v, vectors) memcpy(chosen + v * LANES, &index[v], sizeof index[v]);
}

/* Writes expert [N], gate [N], kept [N], load [E], fraction and mean probability [G, E], the losses
   (balance, z), and for the backward pass probability and lse [N].

   bias: NULL or [E], added for the choice alone. valid: NULL or [N]; padding is neither kept nor
   counted. capacity: of an expert in a group, or -1. workspace: D x 64 + E x 16. */
void route(const float *x, const float *weight, const float *bias, const uint8_t *valid, int64_t N,
           int64_t D, int64_t E, int64_t S, int64_t capacity, float *workspace, int64_t *expert,
           float *gate, uint8_t *kept, int64_t *loads, float *fraction, float *mean,
           float *balance_loss, float *z_loss, float *probability, float *lse) {
  float *const totals = workspace + D * BLOCK; /* of each expert's probabilities, by lane */
  double balance = 0, z = 0;
  int64_t groups = 0;
  memset(loads, 0, E * sizeof *loads);
  for (int64_t first = 0; !first || first < N; first += S, fraction += E, mean += E) {
    const int64_t last = minimum(first + S, N);
    int64_t real = 0;
    double z_group = 0, balance_group = 0;
    memset(fraction, 0, E * sizeof *fraction);
    memset(totals, 0, E * sizeof(Floats));
    for (int64_t start = first; start < last; start += BLOCK) {
      const int64_t tokens = minimum(last - start, BLOCK), width = (tokens + FULL - 1) / FULL * FULL;
      float lses[BLOCK], counts[BLOCK] = {0};
      int32_t chosen[BLOCK];
      transpose(x + start * D, D, workspace, width, tokens, D);
      for (int64_t d = 0; tokens < width && d < D; d++)
        memset(workspace + d * width + tokens, 0, (width - tokens) * sizeof *workspace);
      gemm(weight, D, 1, workspace, width, probability, width, E, D, width, 0, 0);
      int64_t done = 0;
#define SOFTMAX(vectors) \
  softmax(probability + done, E, width, bias, lses + done, chosen + done, vectors)
      for (; done + AT_ONCE * LANES <= width; done += AT_ONCE * LANES) SOFTMAX(AT_ONCE);
      for (; done < width; done += LANES) SOFTMAX(1);
      for (int64_t n = 0; n < tokens; n++) {
        const int64_t token = start + n, e = chosen[n];
        const int counted = !valid || valid[token];
        counts[n] = (float)counted;
        expert[token] = e;
        gate[token] = probability[e * width + n];
        lse[token] = lses[n];
        kept[token] = counted && (capacity < 0 || fraction[e] < (float)capacity);
        fraction[e] += counts[n];
        z_group += lses[n] * lses[n] * counts[n];
        real += counted;
      }
      for (int64_t e = 0; e < E; e++) {
        Floats total = load(totals + e * LANES);
        for (int64_t n = 0; n < width; n += LANES)
          total += load(probability + e * width + n) * load(counts + n);
        store(totals + e * LANES, total);
      }
      probability += E * width;
    }
    const float tokens = (float)(real ? real : 1);
    for (int64_t e = 0; e < E; e++) {
      loads[e] += (int64_t)fraction[e];
      fraction[e] /= tokens;
      mean[e] = sum(load(totals + e * LANES)) / tokens;
      balance_group += fraction[e] * mean[e];
    }
    balance += balance_group * (double)E;
    z += z_group / tokens;
    groups += real > 0;
  }
  *balance_loss = (float)(balance / (double)(groups ? groups : 1));
  *z_loss = (float)(z / (double)(groups ? groups : 1));
}

INLINE int64_t real_tokens(const uint8_t *valid, int64_t first, int64_t last) {
  if (!valid) return last - first;
  int64_t real = 0;
  for (int64_t n = first; n < last; n++) real += valid[n] != 0;
  return real;
}

/* The gradients of x and weight, those that are not NULL, from those of gate [N], mean probability
   [G, E] and the losses, of which any may be NULL. workspace: E x 64 + E. */
void route_backward(const float *x, const float *weight, const uint8_t *valid, int64_t N, int64_t D,
                    int64_t E, int64_t S, const int64_t *expert, const float *fraction,
                    const float *probability, const float *lse, const float *dgate,
                    const float *dmean, const float *dbalance, const float *dz, float *workspace,
                    float *dx, float *dweight) {
  float *const dshare = workspace + E * BLOCK;
  int64_t groups = 0;
  for (int64_t first = 0; first < N; first += S)
    groups += real_tokens(valid, first, minimum(first + S, N)) > 0;
  if (dweight) memset(dweight, 0, E * D * sizeof *dweight);
  for (int64_t first = 0, g = 0; first < N; first += S, g++) {
    const int64_t last = minimum(first + S, N), real = real_tokens(valid, first, last);
    const float tokens_here = (float)(real ? real : 1);
    const float balance = dbalance ? *dbalance * (float)E / (float)(groups ? groups : 1) : 0;
    const float square = dz ? 2 * *dz / (tokens_here * (float)(groups ? groups : 1)) : 0;
    for (int64_t e = 0; e < E; e++) {
      const float own = dmean ? dmean[g * E + e] : 0;
      dshare[e] = (own + balance * fraction[g * E + e]) / tokens_here;
    }
    for (int64_t start = first; start < last; start += BLOCK) {
      const int64_t tokens = minimum(last - start, BLOCK), width = (tokens + FULL - 1) / FULL * FULL;
      float gates[BLOCK] = {0}, counts[BLOCK] = {0}, squares[BLOCK] = {0};
      for (int64_t n = 0; n < tokens; n++) {
        const int64_t token = start + n;
        gates[n] = dgate ? dgate[token] * probability[expert[token] * width + n] : 0;
        counts[n] = !valid || valid[token];
        squares[n] = square * lse[token] * counts[n];
      }
      for (int64_t n = 0; n < width; n += LANES) {
        const Floats counted = load(counts + n);
        Floats inner = {0};
        for (int64_t e = 0; e < E; e++) inner += load(probability + e * width + n) * dshare[e];
        const Floats rest = load(squares + n) - load(gates + n) - inner * counted;
        for (int64_t e = 0; e < E; e++) {
          const Floats share = load(probability + e * width + n);
          store(workspace + e * width + n, share * (counted * dshare[e] + rest));
        }
      }
      for (int64_t n = 0; n < tokens; n++) workspace[expert[start + n] * width + n] += gates[n];
      if (dx) gemm(workspace, 1, width, weight, D, dx + start * D, D, tokens, E, D, 0, 0);
      if (dweight) gemm(workspace, width, 1, x + start * D, D, dweight, D, E, tokens, D, 1, 0);
      probability += E * width;
    }
  }
}
