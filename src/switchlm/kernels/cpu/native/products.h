/* What other files use of products.c. */

#ifndef SWITCHLM_PRODUCTS_H
#define SWITCHLM_PRODUCTS_H

#include <stdint.h>

void product(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
             float *y, int64_t y_row, int64_t M, int64_t K, int64_t N, int add, int large);
void product_of_columns(const float *a, int64_t a_row, const float *b, int64_t b_column, float *y,
                        int64_t y_row, int64_t M, int64_t K, int64_t N, int add);

/* y[k][m] = x[m][k]; strides are those of rows. */
void transpose(const float *x, int64_t x_row, float *y, int64_t y_row, int64_t M, int64_t K);

#endif
