/* Attention in training: y = softmax(q k^T + bias) v, and its gradients, float32, for heads and
   sequences so small that the scores of a block of queries stay in the cache.

   The forward pass keeps two numbers per query, the largest score and 1 / sum(e^(score - largest)),
   from which the backward pass recomputes the weights. Rows of scores are padded to whole vectors;
   padding has a bias of -inf, and so a weight of zero.

   A task is one head for a group of rows of the batch (all heads, where they share their bias). One
   thread runs it and sums its own gradient of the bias; the sums of all groups are added in order.
   So results have the same bits with any number of threads.

   Shapes: B batch, H heads, Q queries, M keys and values (memory), K head width, W = H * K. */

#include <math.h>

#include "gemm.h"
#include "vectors.h"

enum { BLOCK = 1 << 13 }; /* scores at once: 32 KiB */

#define WHOLE(n) (((n) + LANES - 1) / LANES * LANES)

/* Strides are in numbers: of a row of the batch, a head, a position. The last dim is contiguous. */
typedef struct {
  float *at;
  int64_t row, head, place;
} Heads;

typedef struct {
  const float *at; /* or NULL */
  int64_t row, head, query; /* strides; keys are contiguous */
} Bias;

typedef struct {
  int64_t B, H, Q, M, K;
  int64_t group;            /* rows of the batch in a task */
  int64_t shared;           /* heads in a task: 1 or H */
  Heads q, k, v, y, dy, dq, dk, dv;
  Bias bias;
  float *largest, *inverse; /* [B, H, Q] */
  float *dbias;             /* [groups, H / shared, Q, M], or NULL */
} Call;

/* The workspace of a task; all rows are of whole vectors. */
typedef struct {
  float *k_columns, *v_columns; /* [K, M] */
  float *q, *k, *v, *dy;        /* [places, K], where K is not whole vectors */
  float *result;                /* [places, K] */
  float *dk, *dv;               /* [M, K] */
  float *bias, *dbias;          /* [Q, M] */
  float *score, *dscore;        /* [block, M] */
} Workspace;

_Static_assert(sizeof(float *) == sizeof(int64_t), "Python fills a Call as an array of int64");

typedef struct {
  const float *at;
  int64_t row;
} Rows;

static float *of_head(const Heads *x, int64_t b, int64_t h) {
  return x->at + b * x->row + h * x->head;
}

/* y[k][m] = x[m][k], zeros after M. */
static void transposed(const float *x, int64_t row, float *y, int64_t M, int64_t K) {
  const int64_t places = WHOLE(M);
  transpose(x, row, y, places, M, K);
  for (int64_t k = 0; places > M && k < K; k++)
    memset(y + k * places + M, 0, sizeof *y * (places - M));
}

/* Copy `count` numbers; usually few. */
INLINE void copy(float *to, const float *from, int64_t count) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) memcpy(to + i, from + i, 4 * sizeof *to);
  for (; i < count; i++) to[i] = from[i];
}

/* Rows of whole vectors: the rows themselves, or a copy in `workspace` with zeros after K. */
static Rows whole(const float *x, int64_t row, float *workspace, int64_t places, int64_t K) {
  const int64_t width = WHOLE(K);
  if (width == K) return (Rows){x, row};
  for (int64_t i = 0; i < places; i++) {
    memset(workspace + i * width, 0, sizeof *workspace * width);
    copy(workspace + i * width, x + i * row, K);
  }
  return (Rows){workspace, width};
}

/* The bias of one head in rows of whole vectors. Without one: a single row, for all queries. */
static Rows whole_bias(const Call *c, float *workspace, int64_t b, int64_t h) {
  const int64_t places = WHOLE(c->M);
  const float *from = c->bias.at;
  const int64_t queries = from && c->bias.query ? c->Q : 1;
  if (from) from += b * c->bias.row + h * c->bias.head;
  for (int64_t i = 0; i < queries; i++, workspace += places) {
    for (int64_t m = places - LANES; m < places; m++) workspace[m] = -INFINITY;
    if (from)
      memcpy(workspace, from + i * c->bias.query, sizeof *workspace * c->M);
    else
      memset(workspace, 0, sizeof *workspace * c->M);
  }
  return (Rows){workspace - queries * places, queries > 1 ? places : 0};
}

/* How many queries are computed at once: a multiple of 12, for full tiles. */
static int64_t queries_per_block(const Call *c) {
  const int64_t queries = BLOCK / WHOLE(c->M) / 12 * 12;
  return queries ? queries : 12;
}

/* score = q k^T + bias of `n` queries. */
static void scores(const Call *c, const float *q, const float *k_columns, Rows bias, float *score,
                   int64_t n) {
  const int64_t places = WHOLE(c->M);
  for (int64_t i = 0; i < n; i++)
    memcpy(score + i * places, bias.at + i * bias.row, sizeof *score * places);
  gemm(q, c->q.place, 1, k_columns, places, score, places, n, c->K, places, 1, 0);
}

static void forward(const Call *c, const Workspace *r, Rows bias, int64_t b, int64_t h) {
  const int64_t places = WHOLE(c->M), width = WHOLE(c->K);
  const int64_t block = queries_per_block(c);
  transposed(of_head(&c->k, b, h), c->k.place, r->k_columns, c->M, c->K);
  const Rows v = whole(of_head(&c->v, b, h), c->v.place, r->v, c->M, c->K);
  for (int64_t first = 0; first < c->Q; first += block) {
    const int64_t n = minimum(c->Q - first, block);
    const float *q = of_head(&c->q, b, h) + first * c->q.place;
    float *y = of_head(&c->y, b, h) + first * c->y.place;
    float *largest = c->largest + (b * c->H + h) * c->Q + first;
    float *inverse = c->inverse + (b * c->H + h) * c->Q + first;
    scores(c, q, r->k_columns, (Rows){bias.at + first * bias.row, bias.row}, r->score, n);
    for (int64_t i = 0; i < n; i++) {
      float *score = r->score + i * places;
      Floats most = load_float32(score, 0);
      for (int64_t m = LANES; m < places; m += LANES) most = larger(load_float32(score, m), most);
      largest[i] = largest_of(most);
      Floats total = {0};
      for (int64_t m = 0; m < places; m += LANES) {
        const Floats e = exponential(load_float32(score, m) - largest[i]);
        *(LooseFloats *)(score + m) = e;
        total += e;
      }
      inverse[i] = 1 / sum(total);
    }
    gemm(r->score, places, 1, v.at, v.row, r->result, width, n, c->M, width, 0, 0);
    for (int64_t i = 0; i < n; i++) {
      for (int64_t k = 0; k < width; k += LANES)
        *(LooseFloats *)(r->result + i * width + k) *= inverse[i];
      copy(y + i * c->y.place, r->result + i * width, c->K);
    }
  }
}

static float dot(const float *a, const float *b, int64_t K) {
  FourFloats total = {0};
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    FourFloats x, y;
    memcpy(&x, a + k, sizeof x);
    memcpy(&y, b + k, sizeof y);
    total += x * y;
  }
  float all = (total[0] + total[1]) + (total[2] + total[3]);
  for (; k < K; k++) all += a[k] * b[k];
  return all;
}

static void backward(const Call *c, const Workspace *r, Rows bias, int64_t b, int64_t h) {
  const int64_t places = WHOLE(c->M), width = WHOLE(c->K);
  const int64_t block = queries_per_block(c);
  transposed(of_head(&c->k, b, h), c->k.place, r->k_columns, c->M, c->K);
  transposed(of_head(&c->v, b, h), c->v.place, r->v_columns, c->M, c->K);
  const Rows k = whole(of_head(&c->k, b, h), c->k.place, r->k, c->M, c->K);
  for (int64_t first = 0; first < c->Q; first += block) {
    const int64_t n = minimum(c->Q - first, block);
    const float *q_at = of_head(&c->q, b, h) + first * c->q.place;
    const float *y = of_head(&c->y, b, h) + first * c->y.place;
    const float *dy_at = of_head(&c->dy, b, h) + first * c->dy.place;
    float *dq = of_head(&c->dq, b, h) + first * c->dq.place;
    const float *largest = c->largest + (b * c->H + h) * c->Q + first;
    const float *inverse = c->inverse + (b * c->H + h) * c->Q + first;
    const Rows q = whole(q_at, c->q.place, r->q, n, c->K);
    const Rows dy = whole(dy_at, c->dy.place, r->dy, n, c->K);
    scores(c, q_at, r->k_columns, (Rows){bias.at + first * bias.row, bias.row}, r->score, n);
    gemm(dy_at, c->dy.place, 1, r->v_columns, places, r->dscore, places, n, c->K, places, 0, 0);
    for (int64_t i = 0; i < n; i++) {
      float *score = r->score + i * places, *dscore = r->dscore + i * places;
      float *dbias = c->dbias ? r->dbias + (first + i) * places : NULL;
      const float mean = dot(dy_at + i * c->dy.place, y + i * c->y.place, c->K);
      for (int64_t m = 0; m < places; m += LANES) {
        const Floats weight = exponential(load_float32(score, m) - largest[i]) * inverse[i];
        const Floats change = weight * (load_float32(dscore, m) - mean);
        *(LooseFloats *)(score + m) = weight;
        *(LooseFloats *)(dscore + m) = change;
        if (dbias) *(LooseFloats *)(dbias + m) += change;
      }
    }
    gemm(r->score, 1, places, dy.at, dy.row, r->dv, width, c->M, n, width, first > 0, 0);
    gemm(r->dscore, 1, places, q.at, q.row, r->dk, width, c->M, n, width, first > 0, 0);
    gemm(r->dscore, places, 1, k.at, k.row, r->result, width, n, c->M, width, 0, 0);
    for (int64_t i = 0; i < n; i++) copy(dq + i * c->dq.place, r->result + i * width, c->K);
  }
  for (int64_t m = 0; m < c->M; m++) {
    copy(of_head(&c->dk, b, h) + m * c->dk.place, r->dk + m * width, c->K);
    copy(of_head(&c->dv, b, h) + m * c->dv.place, r->dv + m * width, c->K);
  }
}

/* Divide memory into the parts of a workspace; return how many numbers they take. */
static int64_t divide(const Call *c, float *memory, Workspace *r) {
  const int64_t places = WHOLE(c->M), width = WHOLE(c->K);
  const int64_t block = queries_per_block(c);
  const int64_t queries = minimum(c->Q, block);
  int64_t taken = 0;
#define TAKE(part, numbers) r->part = memory ? memory + taken : NULL, taken += (numbers)
  TAKE(k_columns, c->K * places), TAKE(v_columns, c->K * places);
  TAKE(q, queries * width), TAKE(dy, queries * width), TAKE(result, queries * width);
  TAKE(k, c->M * width), TAKE(v, c->M * width), TAKE(dk, c->M * width), TAKE(dv, c->M * width);
  TAKE(score, queries * places), TAKE(dscore, queries * places);
  TAKE(bias, c->Q * places), TAKE(dbias, c->Q * places);
#undef TAKE
  return taken;
}

/* One task. If every row of the batch has its own learned bias, groups are of one row. */
static void attend(const Call *c, const Workspace *r, int64_t task, int differentiate) {
  const int64_t places = WHOLE(c->M), parts = c->H / c->shared;
  const int64_t start = task / parts * c->group, part = task % parts;
  const int64_t stop = minimum(start + c->group, c->B);
  const int sums = differentiate && c->dbias;
  if (sums) memset(r->dbias, 0, sizeof(float) * c->Q * places);
  for (int64_t h = part * c->shared; h < (part + 1) * c->shared; h++) {
    Rows bias = {0};
    for (int64_t b = start; b < stop; b++) {
      if (b == start || c->bias.row) bias = whole_bias(c, r->bias, b, h);
      if (differentiate)
        backward(c, r, bias, b, h);
      else
        forward(c, r, bias, b, h);
    }
  }
  for (int64_t i = 0; sums && i < c->Q; i++)
    memcpy(c->dbias + (task * c->Q + i) * c->M, r->dbias + i * places, sizeof(float) * c->M);
}

/* See attention.py for the arguments. Returns 0, or 1 if memory runs out. */
int attention(const Call *call, int differentiate, int threads) {
  const Call c = *call;
  const int64_t tasks = (c.B + c.group - 1) / c.group * (c.H / c.shared);
  int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(| : failed) if (threads > 1)
#endif
  {
    Workspace workspace;
    const int64_t numbers = divide(&c, NULL, &workspace);
    float *memory = NULL;
    failed = posix_memalign((void **)&memory, 64, sizeof(float) * numbers) != 0;
    if (!failed) divide(&c, memory, &workspace);
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
    for (int64_t task = 0; task < tasks; task++)
      if (!failed) attend(&c, &workspace, task, differentiate);
    free(memory);
  }
  return failed;
}
