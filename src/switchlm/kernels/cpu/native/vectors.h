/* Vectors of numbers, as wide as the processor's registers, and what differs by processor. */

#ifndef SWITCHLM_VECTORS_H
#define SWITCHLM_VECTORS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* What differs by processor. LANES: float32 numbers in a vector. TILE: vectors of a result in
   registers. HOLD: keep a loaded vector in its register for all rows; compilers load it again for
   each row otherwise. */
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#define TILE 24
#define HOLD(v) __asm__("" : "+v"(v))
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define TILE 12
#define HOLD(v) __asm__("" : "+x"(v))
#else
#define LANES 4
#define TILE 12
#define HOLD(v) (void)(v)
#endif

#ifdef __clang__
#define EACH(i, number) _Pragma("unroll") for (int i = 0; i < (number); i++)
#else
#define EACH(i, number) _Pragma("GCC unroll 24") for (int i = 0; i < (number); i++)
#endif

#define VECTOR(type, lanes, name) \
  typedef type name __attribute__((vector_size((lanes) * sizeof(type)), aligned(1), may_alias))
VECTOR(float, LANES, LooseFloats); /* at any address */
VECTOR(uint16_t, LANES, LooseHalves);
VECTOR(uint8_t, LANES, LooseCodes);
VECTOR(int16_t, 2 * LANES, LooseShorts);
VECTOR(int8_t, 2 * LANES, LooseBytes);
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float FourFloats __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

#if LANES == 16
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define STREAM(p, v) _mm512_stream_ps(p, (__m512)(v))
#define FENCE() _mm_sfence()
#define UPCAST_HALVES(p) (Ints) _mm512_cvtepu16_epi32(_mm256_loadu_si256(p))
#define UPCAST_CODES(p) (Ints) _mm512_cvtepu8_epi32(_mm_loadu_si128(p))
#define UPCAST_BYTES(p) (Shorts) _mm512_cvtepi8_epi16(_mm256_loadu_si256(p))
#elif LANES == 8
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#define STREAM(p, v) _mm256_stream_ps(p, (__m256)(v))
#define FENCE() _mm_sfence()
#define UPCAST_HALVES(p) (Ints) _mm256_cvtepu16_epi32(_mm_loadu_si128(p))
#define UPCAST_CODES(p) (Ints) _mm256_cvtepu8_epi32(_mm_loadl_epi64(p))
#define UPCAST_BYTES(p) (Shorts) _mm256_cvtepi8_epi16(_mm_loadu_si128(p))
#else
#define LANE_NUMBERS 0, 1, 2, 3
#define STREAM(p, v) (*(Floats *)(p) = (v))
#define FENCE() (void)0
#define UPCAST_HALVES(p) __builtin_convertvector(*(const LooseHalves *)(p), Ints)
#define UPCAST_CODES(p) __builtin_convertvector(*(const LooseCodes *)(p), Ints)
#define UPCAST_BYTES(p) __builtin_convertvector(*(const LooseBytes *)(p), Shorts)
#endif

typedef Floats Load(const void *, int64_t);
#define AT(type, from, at) (const void *)((const type *)(from) + (at))

INLINE Floats load_float32(const void *from, int64_t at) {
  return *(const LooseFloats *)AT(float, from, at);
}

/* The same number in all lanes. HOLD, since compilers else broadcast so many at once that none of
   the registers is left for results. */
INLINE Floats broadcast(float x) {
  Floats all = x - (Floats){0};
  HOLD(all);
  return all;
}

INLINE Floats load_bfloat16(const void *from, int64_t at) {
  return (Floats)(UPCAST_HALVES(AT(uint16_t, from, at)) << 16);
}

INLINE Floats load_float16(const void *from, int64_t at) {
  const void *place = AT(uint16_t, from, at);
#if LANES == 16
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(place));
#elif LANES == 8 && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(place));
#else
  /* Exponent and fraction as those of float32, which is 2^112 too small; infinity and NaN keep
     their exponent of ones. */
  const Ints half = UPCAST_HALVES(place), rest = (half & 0x7fff) << 13;
  const Ints number = (Ints)((Floats)rest * 0x1p112f) | ((rest > 0x0f7fffff) & 0x7f800000);
  return (Floats)(number | (half & 0x8000) << 16);
#endif
}

/* Lanes are float32, or int32 where `integers`. */

INLINE Floats plus(Floats a, Floats b, const int integers) {
  return integers ? (Floats)((Ints)a + (Ints)b) : a + b;
}

INLINE float sum_of(Floats v, const int integers) {
  union {
    Floats all;
    FourFloats part[LANES / 4];
  } lanes = {v};
  EACH(i, LANES / 4 - 1)
  lanes.part[0] = integers ? (FourFloats)((FourInts)lanes.part[0] + (FourInts)lanes.part[i + 1])
                           : lanes.part[0] + lanes.part[i + 1];
  const FourInts whole = (FourInts)lanes.part[0];
  if (integers) return (float)(whole[0] + whole[1] + whole[2] + whole[3]);
  return (lanes.part[0][0] + lanes.part[0][1]) + (lanes.part[0][2] + lanes.part[0][3]);
}

INLINE float sum(Floats v) { return sum_of(v, 0); }

/* y[o] = the sum of all lanes of v[o], in the same order for any number of outputs. Several outputs
   share their shuffles. */
INLINE void store_sums(const Floats *v, float *y, const int integers, const int outputs) {
#if LANES == 16
  if (outputs == 4) {
#define PAIR(how, a, b) (Floats) how((__m512)(a), (__m512)(b))
    const Floats low = plus(PAIR(_mm512_unpacklo_ps, v[0], v[1]),
                            PAIR(_mm512_unpackhi_ps, v[0], v[1]), integers);
    const Floats high = plus(PAIR(_mm512_unpacklo_ps, v[2], v[3]),
                             PAIR(_mm512_unpackhi_ps, v[2], v[3]), integers);
    const Floats quarters = plus((Floats)_mm512_shuffle_ps((__m512)low, (__m512)high, 0x44),
                                 (Floats)_mm512_shuffle_ps((__m512)low, (__m512)high, 0xee),
                                 integers);
#undef PAIR
    const Floats swapped = (Floats)_mm512_shuffle_f32x4((__m512)quarters, (__m512)quarters, 0x4e);
    union {
      Floats all;
      FourFloats part[4];
    } lanes = {plus(quarters, swapped, integers)};
    FourFloats sums = lanes.part[0] + lanes.part[1];
    if (integers)
      sums = __builtin_convertvector((FourInts)lanes.part[0] + (FourInts)lanes.part[1], FourFloats);
    memcpy(y, &sums, sizeof sums);
    return;
  }
#endif
#if LANES == 8
  if (outputs == 2) {
    union {
      Floats all;
      FourFloats half[2];
    } one = {v[0]}, two = {v[1]};
    FourFloats sums;
    if (integers) {
      const FourInts first = (FourInts)one.half[0] + (FourInts)one.half[1];
      const FourInts second = (FourInts)two.half[0] + (FourInts)two.half[1];
      const __m128i pairs = _mm_hadd_epi32((__m128i)first, (__m128i)second);
      sums = __builtin_convertvector((FourInts)_mm_hadd_epi32(pairs, pairs), FourFloats);
    } else {
      const FourFloats first = one.half[0] + one.half[1], second = two.half[0] + two.half[1];
      const __m128 pairs = _mm_hadd_ps((__m128)first, (__m128)second);
      sums = (FourFloats)_mm_hadd_ps(pairs, pairs);
    }
    memcpy(y, &sums, 2 * sizeof *y);
    return;
  }
#endif
  EACH(o, outputs) y[o] = sum_of(v[o], integers);
}

INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

/* The larger of each two; b where one is NaN. */
INLINE Floats larger(Floats a, Floats b) {
#if LANES == 16
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  const Ints first = a > b;
  return (Floats)((first & (Ints)a) | (~first & (Ints)b));
#endif
}

INLINE float largest_of(Floats v) {
  union {
    Floats all;
    FourFloats part[LANES / 4];
    float lane[LANES];
  } lanes = {v};
  EACH(i, LANES / 4 - 1) {
    const FourInts more = lanes.part[i + 1] > lanes.part[0];
    lanes.part[0] = (FourFloats)((more & (FourInts)lanes.part[i + 1]) |
                                 (~more & (FourInts)lanes.part[0]));
  }
  const float low = lanes.lane[0] > lanes.lane[1] ? lanes.lane[0] : lanes.lane[1];
  const float high = lanes.lane[2] > lanes.lane[3] ? lanes.lane[2] : lanes.lane[3];
  return low > high ? low : high;
}

/* e^x to a unit in the last place, for x <= 0; zero below -87, where float32 soon has no normal
   number for it; NaN of NaN. 2^n e^r with |r| <= ln(2) / 2, and e^r by the polynomial of degree 6
   that is nearest to it. */
INLINE Floats exponential(Floats x) {
  const Ints exists = ~(x < -87.0f);
  x = larger(broadcast(-87.0f), x);
  const Floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: n is in the last bits */
  const Floats n = shifted - 12582912.0f;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
  Floats power = 1.381454e-3f * r + 8.368745e-3f;
  power = power * r + 4.166839e-2f;
  power = power * r + 1.6666521e-1f;
  power = power * r + 4.9999994e-1f;
  power = power * r + 1.0f;
  power = power * r + 1.0f;
  const Ints scale = ((Ints)shifted << 23) + 0x3f800000; /* 2^n */
  return (Floats)((Ints)(power * (Floats)scale) & exists);
}

/* EACH_TILE(R, body): body(r, rows) for rows from r on, `rows` a constant of at most MOST_ROWS. */
enum { MOST_ROWS = 6 };
#define EACH_TILE(R, body)                        \
  for (int64_t r = 0; r < (R); r += MOST_ROWS)    \
    switch ((R) - r) {                            \
      case 1: body(r, 1); break;                  \
      case 2: body(r, 2); break;                  \
      case 3: body(r, 3); break;                  \
      case 4: body(r, 4); break;                  \
      case 5: body(r, 5); break;                  \
      default: body(r, MOST_ROWS);                \
    }

#endif
