/* Products as an expert needs them in training: float32, some ten to a hundred rows, one thread. So
   few rows that packing the factors first, as libraries for large products do, costs more than it
   saves; a tile of the result stays in registers while the factors come from the cache.

   Shapes: M x K times K x N. Strides are in numbers, from one row, or column, to the next. */

#include "vectors.h"

enum { VECTORS = TILE / MOST_ROWS, DEPTH = 512 /* of a, so that b stays in the cache */ };

/* stream: write past the cache, what nobody reads soon. */
INLINE void tile(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
                 float *y, int64_t y_row, int64_t K, int add, const int stream, const int rows,
                 const int vectors) {
  Floats total[TILE];
  EACH(r, rows) EACH(v, vectors)
  total[r * vectors + v] = add ? load_float32(y, r * y_row + v * LANES) : (Floats){0};
  for (int64_t k = 0; k < K; k++) EACH(v, vectors) {
      Floats input = load_float32(b, k * b_row + v * LANES);
      HOLD(input);
      EACH(r, rows) total[r * vectors + v] += a[r * a_row + k * a_column] * input;
    }
  EACH(r, rows) EACH(v, vectors) {
    float *place = y + r * y_row + v * LANES;
    if (stream)
      STREAM(place, total[r * vectors + v]);
    else
      *(LooseFloats *)place = total[r * vectors + v];
  }
}

/* y = a b, or y += a b where `add`. N: a multiple of LANES; the numbers of a row of b and y are
   neighbours. large: the result, if it is written at once, goes past the cache. */
void product(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
             float *y, int64_t y_row, int64_t M, int64_t K, int64_t N, int add, int large) {
  const int aligned = (uintptr_t)y % sizeof(Floats) == 0 && y_row % LANES == 0;
  const int stream = large && !add && K <= DEPTH && aligned;
  for (int64_t k = 0; k < K; k += DEPTH) {
    const int64_t depth = K - k < DEPTH ? K - k : DEPTH;
    int64_t n = 0;
#define TILE_AT(m, streams, rows, vectors)                                                       \
  tile(a + (m) * a_row + k * a_column, a_row, a_column, b + k * b_row + n, b_row,                \
       y + (m) * y_row + n, y_row, depth, add || k, streams, rows, vectors)
#define STREAMED(m, rows) TILE_AT(m, 1, rows, VECTORS)
#define STORED(m, rows) TILE_AT(m, 0, rows, VECTORS)
#define NARROW(m, rows) TILE_AT(m, 0, rows, 1)
    for (; n + VECTORS * LANES <= N; n += VECTORS * LANES)
      if (stream)
        EACH_TILE(M, STREAMED)
      else
        EACH_TILE(M, STORED)
    for (; n < N; n += LANES) EACH_TILE(M, NARROW)
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

/* The same where the numbers of a row of a, and of a column of b, are neighbours. K: a multiple of
   LANES. */
void product_of_columns(const float *a, int64_t a_row, const float *b, int64_t b_column, float *y,
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
