/* What other files use of gemm.c. */

#ifndef SWITCHLM_GEMM_H
#define SWITCHLM_GEMM_H

#include <stdint.h>

void gemm(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float *y,
          int64_t y_row, int64_t M, int64_t K, int64_t N, int add, int large);
void gemm_nt(const float *a, int64_t a_row, const float *b, int64_t b_column, float *y,
             int64_t y_row, int64_t M, int64_t K, int64_t N, int add);

/* y[k][m] = x[m][k]; strides are those of rows. */
void transpose(const float *x, int64_t x_row, float *y, int64_t y_row, int64_t M, int64_t K);

#endif
