/* The fused Switch layer of small experts, one expert per token: gather, y = relu(x up) down, times
   the gate, and scatter, expert by expert, while its rows are in the cache. float32, one thread.

   Shapes: N tokens, E experts, D inputs, F hidden numbers, both multiples of 16. Rows are tokens in
   the order of their experts: row r is token[r], counts[e] rows are those of expert e, and rows of
   no expert come last. */

#include "gemm.h"
#include "vectors.h"

enum { ROWS = 128 /* of an expert at a time */ };

/* Order assignments by expert, dropped ones last: row r holds assignment[r], and row[] is the
   inverse. */
void sort_by_expert(const int64_t *expert, const uint8_t *kept, int64_t A, int64_t E,
                    int64_t *assignment, int64_t *row, int64_t *counts) {
  memset(counts, 0, E * sizeof *counts);
  for (int64_t a = 0; a < A; a++)
    if (kept[a]) counts[expert[a]]++;
  int64_t end = 0;
  for (int64_t e = 0; e < E; e++) { /* the next row of each expert */
    const int64_t start = end;
    end += counts[e];
    counts[e] = start;
  }
  for (int64_t a = 0; a < A; a++) {
    const int64_t r = kept[a] ? counts[expert[a]]++ : end++;
    assignment[r] = a;
    row[a] = r;
  }
  for (int64_t e = E - 1; e > 0; e--) counts[e] -= counts[e - 1];
}

INLINE void gather(const float *x, const int64_t *token, int64_t rows, int64_t D, float *workspace) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t d = 0; d < D; d += LANES)
      *(LooseFloats *)(workspace + r * D + d) = load_float32(x, token[r] * D + d);
}

/* y [N, D]; zeros for tokens of no expert. hidden: relu(x up) of all rows if `all`, else memory for 128
   of them. workspace: 128 x D. */
void switch_experts(const float *x, const float *gate, const int64_t *token, const int64_t *counts,
                    int64_t N, int64_t E, int64_t D, int64_t F, const float *up, const float *down,
                    float *hidden, int all, float *workspace, float *y) {
  int64_t done = 0;
  for (int64_t e = 0; e < E; e++)
    for (int64_t left = counts[e], rows; left; left -= rows, done += rows) {
      rows = minimum(left, ROWS);
      float *const inner = all ? hidden + done * F : hidden;
      gather(x, token + done, rows, D, workspace);
      gemm(workspace, D, 1, up + e * D * F, F, inner, F, rows, D, F, 0, 0);
      for (int64_t i = 0; i < rows * F; i++) inner[i] = inner[i] < 0 ? 0 : inner[i];
      gemm(inner, F, 1, down + e * F * D, D, workspace, D, rows, F, D, 0, 0);
      for (int64_t r = 0; r < rows; r++) {
        const int64_t n = token[done + r];
        const Floats weight = broadcast(gate[n]);
        for (int64_t d = 0; d < D; d += LANES)
          *(LooseFloats *)(y + n * D + d) = weight * load_float32(workspace, r * D + d);
      }
    }
  for (; done < N; done++) memset(y + token[done] * D, 0, D * sizeof *y);
}

/* The gradients of all that is not NULL; zeros for tokens of no expert and experts of no token.
   workspace: 128 x (2 D + F) + 2 D F. */
void switch_experts_backward(const float *dy, const float *x, const float *gate,
                             const int64_t *token, const int64_t *counts, int64_t N, int64_t E,
                             int64_t D, int64_t F, const float *up, const float *down,
                             const float *hidden, float *workspace, float *dx, float *dgate, float *dup,
                             float *ddown) {
  float *const rows_x = workspace, *const rows_dy = rows_x + ROWS * D;
  float *const inner = rows_dy + ROWS * D;
  float *const up_columns = inner + ROWS * F, *const down_columns = up_columns + D * F;
  int64_t done = 0;
  for (int64_t e = 0; e < E; e++) {
    const int64_t matrix = e * D * F;
    if (dup && !counts[e]) memset(dup + matrix, 0, D * F * sizeof *dup);
    if (ddown && !counts[e]) memset(ddown + matrix, 0, D * F * sizeof *ddown);
    if (counts[e]) {
      transpose(down + matrix, D, down_columns, F, F, D);
      if (dx) transpose(up + matrix, F, up_columns, D, D, F);
    }
    for (int64_t left = counts[e], rows; left; left -= rows, done += rows) {
      const int add = left < counts[e];
      const float *const active = hidden + done * F;
      rows = minimum(left, ROWS);
      gather(dy, token + done, rows, D, rows_dy);
      gemm(rows_dy, D, 1, down_columns, F, inner, F, rows, D, F, 0, 0);
      for (int64_t r = 0; r < rows; r++) {
        const int64_t n = token[done + r];
        const Floats weight = broadcast(gate[n]);
        Floats dot = {0};
        for (int64_t f = r * F; f < (r + 1) * F; f += LANES) {
          const Floats value = load_float32(active, f), gradient = load_float32(inner, f);
          const Ints stays = ~(value <= (Floats){0});
          dot += value * gradient;
          *(LooseFloats *)(inner + f) = (Floats)(stays & (Ints)(weight * gradient));
        }
        if (dgate) dgate[n] = sum(dot);
        if (ddown)
          for (int64_t d = r * D; d < (r + 1) * D; d += LANES)
            *(LooseFloats *)(rows_dy + d) = weight * load_float32(rows_dy, d);
      }
      if (ddown) gemm(active, 1, F, rows_dy, D, ddown + matrix, D, F, rows, D, add, 0);
      if (dup) {
        gather(x, token + done, rows, D, rows_x);
        gemm(rows_x, 1, D, inner, F, dup + matrix, F, D, rows, F, add, 0);
      }
      if (dx) {
        gemm(inner, F, 1, up_columns, D, rows_x, D, rows, F, D, 0, 0);
        for (int64_t r = 0; r < rows; r++)
          memcpy(dx + token[done + r] * D, rows_x + r * D, D * sizeof *dx);
      }
    }
  }
  for (; done < N; done++) {
    if (dx) memset(dx + token[done] * D, 0, D * sizeof *dx);
    if (dgate) dgate[token[done]] = 0;
  }
}
