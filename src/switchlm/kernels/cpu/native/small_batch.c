/* Matmul of few rows with large matrices on a CPU: y = x w, w in any of eight formats.

With few rows it takes as long as reading the matrix, provided that every weight is read from memory
once and used for all rows while it is in a register. So a tile of the result stays in registers.

The order in which a result is summed depends on neither the other rows nor the number of threads: a
row gives the same bits whatever the other rows.

Shapes: R rows, K inputs, N outputs, E experts. All row-major; x and y are float32. */

#include <float.h>
#include <math.h>

#include "vectors.h"

enum { OUTPUTS = TILE / MOST_ROWS };
enum { BLOCK = 64, HALF = BLOCK / 2 / LANES }; /* of 4 bits: outputs, and vectors of codes */
enum { STEP = 8 };     /* inputs that a strip adds at once */
enum { INPUTS = 512 }; /* that a tile adds before the next tile does: they stay in the cache */
enum { AHEAD = 8 };    /* inputs whose weights a tile prefetches, as they are far apart */

/* w_NK, as of a linear layer: a result is a dot product of float32 numbers, or of what multiplies
   faster: pairs of bfloat16, or of 16-bit integers, in vectors of as many bytes. */

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE Floats load_int16(const void *from, int64_t at) {
  return load_float32(AT(int16_t, from, at), 0);
}

INLINE Floats load_int8(const void *from, int64_t at) {
  return (Floats)UPCAST_BYTES(AT(int8_t, from, at));
}

/* Prefetch numbers; an address past the end does no harm. */
INLINE void prefetch(Load load, const void *from, int64_t at) {
  const int size = load == load_float32 ? 4 : load == load_int8 ? 1 : 2;
  __builtin_prefetch((const char *)from + at * size, 0, 2);
}

typedef Floats Multiply(Floats, Floats, Floats);

INLINE Floats multiply_float32(Floats total, Floats a, Floats b) { return total + a * b; }

INLINE Floats multiply_int16(Floats total, Floats a, Floats b) {
#if defined(__AVX512VNNI__)
  return (Floats)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif LANES == 16
  return (Floats)((Ints)total + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b));
#elif LANES == 8
  return (Floats)((Ints)total + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b));
#else
  const Shorts x = (Shorts)a, w = (Shorts)b;
  Ints sums = (Ints)total;
  EACH(i, LANES) sums[i] += x[2 * i] * w[2 * i] + x[2 * i + 1] * w[2 * i + 1];
  return (Floats)sums;
#endif
}

#ifdef __AVX512BF16__
INLINE Floats multiply_bfloat16(Floats total, Floats a, Floats b) {
  return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
}
#endif

INLINE void dot_tile(Load load_row, Load load_weight, Multiply multiply, const int integers,
                     const int width, const char *x, int64_t row, const void *w, int64_t first,
                     float *y, int64_t K, int64_t N, const int rows, const int outputs) {
  Floats total[MOST_ROWS][OUTPUTS];
  EACH(r, rows) EACH(o, outputs) total[r][o] = (Floats){0};
  for (int64_t k = 0; k < K; k += width) {
    Floats weight[OUTPUTS];
    EACH(o, outputs) {
      weight[o] = load_weight(w, (first + o) * K + k);
      HOLD(weight[o]);
      prefetch(load_weight, w, (first + OUTPUTS + o) * K + k);
    }
    EACH(r, rows) {
      Floats input = load_row(x + r * row, k);
      HOLD(input);
      EACH(o, outputs) total[r][o] = multiply(total[r][o], input, weight[o]);
    }
  }
  EACH(r, rows) store_sums(total[r], y + r * N + first, integers, outputs);
}

/* x: rows of `row` bytes. width: inputs in a vector. */
INLINE void dots(Load load_row, Load load_weight, Multiply multiply, const int integers,
                 const int width, const void *x, int64_t row, const void *w, float *y, int64_t R,
                 int64_t K, int64_t N, int64_t start, int64_t stop) {
  int64_t n = start;
#define TILE_OF(r, rows)                                                                    \
  dot_tile(load_row, load_weight, multiply, integers, width, (const char *)x + r * row, row, w, n, \
           y + r * N, K, N, rows, outputs)
  {
    enum { outputs = OUTPUTS };
    for (; n + outputs <= stop; n += outputs) EACH_TILE(R, TILE_OF)
  }
  enum { outputs = 1 };
  for (; n < stop; n++) EACH_TILE(R, TILE_OF)
#undef TILE_OF
}

/* w_KN, as of stacked experts: inputs add their weights to results, a vector of outputs at once.
   One or two rows read full rows of w, several inputs at a time, since reading takes all the time;
   more rows are computed in tiles. The order of the sums is the same. */

INLINE void add_strip(Load load, const float *x, const void *w, float *y, int64_t K, int64_t N,
                      int64_t start, int64_t stop, const int rows) {
  for (int64_t k = 0; k < K; k += STEP)
    for (int64_t n = start; n < stop; n += LANES) {
      Floats weight[STEP];
      EACH(i, STEP) {
        weight[i] = load(w, (k + i) * N + n);
        HOLD(weight[i]);
        prefetch(load, w, (k + STEP + i) * N + n);
      }
      EACH(r, rows) {
        Floats total = k ? load_float32(y, r * N + n) : (Floats){0};
        EACH(i, STEP) total += x[r * K + k + i] * weight[i];
        *(LooseFloats *)(y + r * N + n) = total;
      }
    }
}

INLINE void add_tile(Load load, const float *x, const void *w, float *y, int64_t K, int64_t N,
                     int64_t k, int64_t end, int64_t n, const int rows, const int vectors) {
  Floats total[TILE];
  EACH(r, rows) EACH(v, vectors)
    total[r * vectors + v] = k ? load_float32(y, r * N + n + v * LANES) : (Floats){0};
  for (; k < end; k++) EACH(v, vectors) {
      Floats weight = load(w, k * N + n + v * LANES);
      HOLD(weight);
      prefetch(load, w, (k + AHEAD) * N + n + v * LANES);
      EACH(r, rows) total[r * vectors + v] += broadcast(x[r * K + k]) * weight;
    }
  EACH(r, rows) EACH(v, vectors)
    *(LooseFloats *)(y + r * N + n + v * LANES) = total[r * vectors + v];
}

INLINE void sums(Load load, const float *x, const void *w, float *y, int64_t R, int64_t K,
                 int64_t N, int64_t start, int64_t stop) {
  if (R == 1) add_strip(load, x, w, y, K, N, start, stop, 1);
  if (R == 2) add_strip(load, x, w, y, K, N, start, stop, 2);
  if (R <= 2) return;
  for (int64_t k = 0; k < K; k += INPUTS) {
    const int64_t end = minimum(k + INPUTS, K);
#define TILE_OF(r, rows)                                                                          \
  {                                                                                               \
    int64_t n = start;                                                                            \
    for (; n + TILE / rows * LANES <= stop; n += TILE / rows * LANES)                             \
      add_tile(load, x + r * K, w, y + r * N, K, N, k, end, n, rows, TILE / rows);                \
    for (; n < stop; n += LANES)                                                                  \
      add_tile(load, x + r * K, w, y + r * N, K, N, k, end, n, rows, 1);                          \
  }
    EACH_TILE(R, TILE_OF)
#undef TILE_OF
  }
}

/* 8 bits: w_NK = code * scale_N. Rows are codes too, and sums are of integers: exact. */

/* Round each row to codes from -127 to 127, of its largest number. */
static void round_rows(const float *x, int16_t *codes, float *scale, int64_t R, int64_t K) {
  for (int64_t r = 0; r < R; r++) {
    Floats most = {0};
    for (int64_t k = 0; k < K; k += LANES) {
      const Floats input = load_float32(x, r * K + k);
      most = larger(most, larger(input, -input));
    }
    scale[r] = FLT_MIN * 127;
    for (int i = 0; i < LANES; i++) scale[r] = most[i] > scale[r] ? most[i] : scale[r];
    scale[r] /= 127;
    for (int64_t k = 0; k < K; k++) codes[r * K + k] = (int16_t)rintf(x[r * K + k] / scale[r]);
  }
}

/* y = sum * scale_N * x_scale_R, between two columns. */
static void scale_sums(float *y, const float *scale, const float *x_scale, int64_t R, int64_t N,
                       int64_t start, int64_t stop) {
  for (int64_t r = 0; r < R; r++)
    for (int64_t n = start; n < stop; n++) y[r * N + n] = y[r * N + n] * scale[n] * x_scale[r];
}

/* 4 bits: codes [N / 64, K, 32], a byte the outputs j (low bits) and j + 32 of a block. Every group
   of inputs has a scale and an offset per output, [G, N, 2] bfloat16:
     w = (code - 8) * scale + offset
   so that a group's sum is scale * sum(x * code) + (offset - 8 * scale) * sum(x). */

/* Add the sums of a group to a vector of results; the first group writes. all: sum(x). */
INLINE void add_group(Floats total, float all, const uint16_t *scale, float *y, int64_t g) {
  const Ints two = (Ints)load_float32(scale, 0);
  const Floats size = (Floats)(two << 16), offset = (Floats)(two & (int32_t)0xffff0000);
  const Floats before = g ? load_float32(y, 0) : (Floats){0};
  *(LooseFloats *)y = before + size * total + (offset - 8 * size) * all;
}

/* Code vectors at once: each gives two vectors of results per row, which stay in registers. */
#define PART(rows) \
  (2 * HALF * (rows) <= TILE ? HALF : 8 * (rows) <= TILE ? 4 : 4 * (rows) <= TILE ? 2 : 1)

INLINE void block_tile(const float *x, const float *x_sum, const uint8_t *codes,
                       const uint16_t *scale, float *y, int64_t K, int64_t N, int64_t group,
                       int64_t b, const int rows, const int part) {
  for (int64_t g = 0; g < K / group; g++)
    for (int64_t first = 0; first < HALF; first += part) {
      Floats low[MOST_ROWS][HALF], high[MOST_ROWS][HALF];
      EACH(r, rows) EACH(v, part) low[r][v] = high[r][v] = (Floats){0};
      for (int64_t k = g * group; k < (g + 1) * group; k++)
        EACH(v, part) {
          const Ints wide =
              UPCAST_CODES(AT(uint8_t, codes, (b * K + k) * (BLOCK / 2) + (first + v) * LANES));
          Floats code = __builtin_convertvector(wide & 15, Floats);
          Floats other = __builtin_convertvector(wide >> 4, Floats);
          HOLD(code);
          HOLD(other);
          EACH(r, rows) {
            const Floats input = broadcast(x[r * K + k]);
            low[r][v] += input * code;
            high[r][v] += input * other;
          }
        }
      EACH(v, part) {
        const int64_t n = b * BLOCK + (first + v) * LANES;
        EACH(r, rows) {
          const float all = x_sum[r * (K / group) + g];
          add_group(low[r][v], all, scale + 2 * (g * N + n), y + r * N + n, g);
          add_group(high[r][v], all, scale + 2 * (g * N + n) + BLOCK, y + r * N + n + BLOCK / 2, g);
        }
      }
    }
}

/* Round rows to bfloat16, and sum up every group. */
static void round_and_sum(const float *x, float *rounded, float *sums, int64_t R, int64_t K,
                          int64_t group) {
  for (int64_t i = 0; i < R * K; i++) {
    uint32_t bits = bits_of(x[i]);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(rounded + i, &bits, sizeof bits);
  }
  for (int64_t g = 0; g < R * K / group; g++) {
    Floats all = {0};
    for (int64_t k = 0; k < group; k += LANES) all += load_float32(rounded, g * group + k);
    sums[g] = sum(all);
  }
}

/* The columns from start to stop of one matmul, by the format of the weight. */

typedef enum {
  FLOAT32_NK,
  BFLOAT16_NK,
  FLOAT16_NK,
  FLOAT32_KN,
  BFLOAT16_KN,
  FLOAT16_KN,
  INT8_NK,
  INT4_BLOCKS
} Format;

typedef struct {
  Format format;
  const void *weight, *scale;
  int64_t inputs, outputs, group;
} Matrix;

/* Outputs are divided among threads in multiples of this. */
static int64_t unit(Format format) {
  if (format == INT4_BLOCKS) return BLOCK;
  return format >= FLOAT32_KN && format <= FLOAT16_KN ? LANES : OUTPUTS;
}

/* workspace: memory for the converted rows. Every thread converts all rows, which takes less time than
   waiting for each other. */
static size_t workspace_size(const Matrix *m, int64_t R) {
  const size_t rows = R, inputs = m->inputs;
  switch (m->format) {
    case BFLOAT16_NK: return rows * inputs * sizeof(int16_t);
    case INT8_NK: return rows * (inputs * sizeof(int16_t) + sizeof(float));
    case INT4_BLOCKS: return rows * (inputs + inputs / m->group) * sizeof(float);
    default: return 0;
  }
}

static void columns(const Matrix *m, const float *x, float *y, void *workspace, int64_t R,
                    int64_t start, int64_t stop) {
  const int64_t K = m->inputs, N = m->outputs;
  const void *w = m->weight;
#define DOTS(x_load, w_load, multiply, integers, x, x_type, factor) \
  dots(x_load, w_load, multiply, integers, factor * LANES, x, K * sizeof(x_type), w, y, R, K, N, \
       start, stop)
  switch (m->format) {
    case FLOAT32_NK:
      DOTS(load_float32, load_float32, multiply_float32, 0, x, float, 1);
      break;
    case BFLOAT16_NK:
#ifdef __AVX512BF16__
      for (int64_t i = 0; i < R * K; i++) ((uint16_t *)workspace)[i] = bits_of(x[i]) >> 16;
      DOTS(load_int16, load_int16, multiply_bfloat16, 0, workspace, uint16_t, 2);
#else
      DOTS(load_float32, load_bfloat16, multiply_float32, 0, x, float, 1);
#endif
      break;
    case FLOAT16_NK:
      DOTS(load_float32, load_float16, multiply_float32, 0, x, float, 1);
      break;
    case FLOAT32_KN: sums(load_float32, x, w, y, R, K, N, start, stop); break;
    case BFLOAT16_KN: sums(load_bfloat16, x, w, y, R, K, N, start, stop); break;
    case FLOAT16_KN: sums(load_float16, x, w, y, R, K, N, start, stop); break;
    case INT8_NK: {
      float *x_scale = workspace;
      int16_t *codes = (int16_t *)(x_scale + R);
      round_rows(x, codes, x_scale, R, K);
      DOTS(load_int16, load_int8, multiply_int16, 1, codes, int16_t, 2);
      scale_sums(y, m->scale, x_scale, R, N, start, stop);
      break;
    }
    case INT4_BLOCKS: {
      float *rounded = workspace, *x_sum = rounded + R * K;
      const int64_t groups = K / m->group;
      round_and_sum(x, rounded, x_sum, R, K, m->group);
#define TILE_OF(r, rows)                                                                         \
  block_tile(rounded + r * K, x_sum + r * groups, w, m->scale, y + r * N, K, N, m->group, b, rows, \
             PART(rows))
      for (int64_t b = start / BLOCK; b < stop / BLOCK; b++) EACH_TILE(R, TILE_OF)
#undef TILE_OF
    }
  }
}

/* y_RN = x_RK w, the first counts[0] rows with the first of E matrices, and so on. Rows past the
   counts give zeros. Each thread computes some columns for all matrices. Returns 0, 1 if memory runs
   out, or 2 where experts have more rows than there are. stride: bytes between two matrices. */
int small_batch_matmul(int format, const void *weight, const void *scale, int64_t stride,
                       int64_t inputs, int64_t outputs, int64_t group, const float *x, float *y,
                       int64_t rows, const int64_t *counts, int64_t experts, int threads) {
  int failed = 0;
  int64_t all = 0;
  for (int64_t e = 0; e < experts; e++) all += counts[e];
  if (all > rows) return 2;
  const int64_t units = outputs / unit(format);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(| : failed) if (threads > 1)
#endif
  {
#ifdef _OPENMP
    const int64_t thread = omp_get_thread_num(), number = omp_get_num_threads();
#else
    const int64_t thread = 0, number = 1;
#endif
    const int64_t start = units * thread / number * unit(format);
    const int64_t next = units * (thread + 1) / number * unit(format);
    const int64_t stop = thread == number - 1 ? outputs : next;
    int64_t row = 0;
    for (int64_t e = 0; e < experts; row += counts[e++]) {
      const Matrix m = {format, (const char *)weight + e * stride, scale, inputs, outputs, group};
      if (!counts[e]) continue;
      const size_t size = workspace_size(&m, counts[e]);
      void *workspace = size ? malloc(size) : NULL;
      if (size && !workspace)
        failed = 1;
      else
        columns(&m, x + row * inputs, y + row * outputs, workspace, counts[e], start, stop);
      free(workspace);
    }
    for (; row < rows; row++)
      memset(y + row * outputs + start, 0, sizeof(float) * (stop - start));
  }
  return failed;
}
