/* Matmul of an expert in training: float32, some ten to a hundred rows, one thread. With so few rows
   packing the factors first, as BLAS libraries do, costs more than it saves. A tile of the result
   stays in registers while the factors come from the cache.

   Shapes: M x K times K x N. Strides are in numbers, from one row, or column, to the next. */

#include "gemm.h"
#include "vectors.h"

enum { VECTORS = TILE / MOST_ROWS, DEPTH = 512 /* of a, so that b stays in the cache */ };

/* stream: write past the cache, for results that are not read soon. */
INLINE void tile(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
                 float *y, int64_t y_row, int64_t K, int add, const int stream, const int rows,
                 const int vectors) {
  Floats total[TILE];
  EACH(r, rows) EACH(v, vectors)
  total[r * vectors + v] = add ? load_float32(y, r * y_row + v * LANES) : (Floats){0};
  for (int64_t k = 0; k < K; k++) {
    Floats input[VECTORS];
    EACH(v, vectors) {
      input[v] = load_float32(b, k * b_row + v * LANES);
      HOLD(input[v]);
    }
    EACH(r, rows) {
      const Floats factor = broadcast(a[r * a_row + k * a_column]);
      EACH(v, vectors) total[r * vectors + v] += factor * input[v];
    }
  }
  EACH(r, rows) EACH(v, vectors) {
    float *place = y + r * y_row + v * LANES;
    if (stream)
      STREAM(place, total[r * vectors + v]);
    else
      *(LooseFloats *)place = total[r * vectors + v];
  }
}

/* y = a b, or y += a b where `add`. Rows of b and y are contiguous, N is a multiple of LANES.
   large: write past the cache if the result is written once. */
void gemm(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float *y,
          int64_t y_row, int64_t M, int64_t K, int64_t N, int add, int large) {
  const int aligned = (uintptr_t)y % sizeof(Floats) == 0 && y_row % LANES == 0;
  const int stream = large && !add && K <= DEPTH && aligned;
  for (int64_t k = 0; k < K; k += DEPTH) {
    const int64_t depth = minimum(K - k, DEPTH);
    int64_t n = 0;
#define TILE_AT(m, streams, rows, vectors)                                                       \
  tile(a + (m) * a_row + k * a_column, a_row, a_column, b + k * b_row + n, b_row,                \
       y + (m) * y_row + n, y_row, depth, add || k, streams, rows, vectors)
#define STREAMED(m, rows) TILE_AT(m, 1, rows, VECTORS)
#define STORED(m, rows) TILE_AT(m, 0, rows, VECTORS)
#define PAIRED(m, rows) TILE_AT(m, 0, rows, 2)
#define NARROW(m, rows) TILE_AT(m, 0, rows, 1)
    for (; n + VECTORS * LANES <= N; n += VECTORS * LANES)
      if (stream)
        EACH_TILE(M, STREAMED)
      else
        EACH_TILE(M, STORED)
    /* Narrow tiles are high, so that enough independent sums are in progress. */
#define HIGH(body)                                                           \
  {                                                                          \
    int64_t m = 0;                                                           \
    for (; m + 2 * MOST_ROWS <= M; m += 2 * MOST_ROWS) body(m, 2 * MOST_ROWS); \
    EACH_TILE(M - m, body##_REST)                                            \
  }
#define PAIRED_REST(r, rows) PAIRED(m + r, rows)
#define NARROW_REST(r, rows) NARROW(m + r, rows)
#if LANES == 16
    for (; n + 2 * LANES <= N; n += 2 * LANES) HIGH(PAIRED)
#endif
    for (; n < N; n += LANES) HIGH(NARROW)
  }
  if (stream) FENCE();
}

INLINE void dot_tile(const float *a, int64_t a_row, const float *b, int64_t b_column, float *y,
                     int64_t y_row, int64_t K, int add, const int rows, const int columns) {
  Floats total[MOST_ROWS][VECTORS];
  EACH(r, rows) EACH(c, columns) total[r][c] = (Floats){0};
  for (int64_t k = 0; k < K; k += LANES) {
    Floats column[VECTORS];
    EACH(c, columns) {
      column[c] = load_float32(b, c * b_column + k);
      HOLD(column[c]);
      __builtin_prefetch(b + (VECTORS + c) * b_column + k, 0, 2);
    }
    EACH(r, rows) {
      Floats row = load_float32(a, r * a_row + k);
      HOLD(row);
      EACH(c, columns) total[r][c] += row * column[c];
    }
  }
  EACH(r, rows) {
    float found[VECTORS];
    store_sums(total[r], found, 0, columns);
    EACH(c, columns) y[r * y_row + c] = (add ? y[r * y_row + c] : 0) + found[c];
  }
}

/* The same where rows of a and columns of b are contiguous. K: a multiple of LANES. */
void gemm_nt(const float *a, int64_t a_row, const float *b, int64_t b_column, float *y,
             int64_t y_row, int64_t M, int64_t K, int64_t N, int add) {
  int64_t n = 0;
#define DOTS_OF(m, rows, columns)                                                                \
  dot_tile(a + (m) * a_row, a_row, b + n * b_column, b_column, y + (m) * y_row + n, y_row, K, add, \
           rows, columns)
#define WIDE(m, rows) DOTS_OF(m, rows, VECTORS)
#define SINGLE(m, rows) DOTS_OF(m, rows, 1)
  for (; n + VECTORS <= N; n += VECTORS) EACH_TILE(M, WIDE)
  for (; n < N; n++) EACH_TILE(M, SINGLE)
}

void transpose(const float *x, int64_t x_row, float *y, int64_t y_row, int64_t M, int64_t K) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) {
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
      FourFloats in[4];
      EACH(i, 4) memcpy(&in[i], x + (m + i) * x_row + k, sizeof in[i]);
#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (FourInts){__VA_ARGS__})
#endif
      const FourFloats low = MIX(in[0], in[1], 0, 4, 1, 5), high = MIX(in[2], in[3], 0, 4, 1, 5);
      const FourFloats low2 = MIX(in[0], in[1], 2, 6, 3, 7), high2 = MIX(in[2], in[3], 2, 6, 3, 7);
      const FourFloats out[4] = {MIX(low, high, 0, 1, 4, 5), MIX(low, high, 2, 3, 6, 7),
                                 MIX(low2, high2, 0, 1, 4, 5), MIX(low2, high2, 2, 3, 6, 7)};
      EACH(i, 4) memcpy(y + (k + i) * y_row + m, &out[i], sizeof out[i]);
    }
    for (; k < K; k++) EACH(i, 4) y[k * y_row + m + i] = x[(m + i) * x_row + k];
  }
  for (; m < M; m++)
    for (int64_t k = 0; k < K; k++) y[k * y_row + m] = x[m * x_row + k];
}
