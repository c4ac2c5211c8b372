/* Vectors of floats, and the exponential, sigmoid and softplus of them. */
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ENTRY(name) JOIN(name, ISA)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *p) { return *(const vec_unaligned *)p; }
INLINE void store(float *p, vec v) { *(vec_unaligned *)p = v; }
INLINE vec splat(float x) { return x - (vec){0}; } /* 0 + x is no copy: it turns -0 to 0 */

/* The last vector of a row may be partial: `count` channels are left. No call of memcpy where the machine has masks: the
   compiler would keep few vectors in registers across it. */
#if defined(__AVX512F__)
INLINE __mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << count) - 1); }
INLINE vec load_first(const float *p, int64_t count) { return (vec)_mm512_maskz_loadu_ps(first_lanes(count), p); }
INLINE void store_first(float *p, vec v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v); }
#elif defined(__AVX2__)
INLINE __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vec load_first(const float *p, int64_t count) { return (vec)_mm256_maskload_ps(p, first_lanes(count)); }
INLINE void store_first(float *p, vec v, int64_t count) { _mm256_maskstore_ps(p, first_lanes(count), (__m256)v); }
#else
INLINE vec load_first(const float *p, int64_t count) {
    vec v = {0};
    memcpy(&v, p, sizeof(float) * (size_t)count);
    return v;
}
INLINE void store_first(float *p, vec v, int64_t count) { memcpy(p, &v, sizeof(float) * (size_t)count); }
#endif
INLINE vec load_some(const float *p, int64_t count) { return count >= LANES ? load(p) : load_first(p, count); }
INLINE void store_some(float *p, vec v, int64_t count) {
    if (count >= LANES)
        store(p, v);
    else
        store_first(p, v, count);
}

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

/* A NaN in x stays: x86's instructions return their second operand then. */
#if defined(__AVX512F__)
INLINE vec at_least(vec x, vec low) { return (vec)_mm512_max_ps((__m512)low, (__m512)x); }
INLINE vec at_most(vec x, vec high) { return (vec)_mm512_min_ps((__m512)high, (__m512)x); }
/* Cheaper than a division; the Newton step makes 14 good bits 28. */
INLINE vec reciprocal(vec x) {
    vec r = (vec)_mm512_rcp14_ps((__m512)x);
    return r + r * (1.0f - x * r);
}
#else
INLINE vec at_least(vec x, vec low) { return choose(low > x, low, x); }
INLINE vec at_most(vec x, vec high) { return choose(high < x, high, x); }
INLINE vec reciprocal(vec x) { return 1.0f / x; }
#endif

/* A NaN without a payload: the exponentials shift theirs into the exponent, and what CUDA calls NaN would come out finite. */
INLINE vec plain_nan(vec x) { return choose(x == x, x, splat(__builtin_nanf(""))); }

INLINE float lane_sum(const vec *v) {
    typedef float four __attribute__((vector_size(16), may_alias));
    const four *p = (const four *)v;
    four s = p[0];
    for (int i = 1; i < LANES / 4; i++) s += p[i];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

/* Adding this number rounds a float of moderate size to an integer, which then stands in the low bits. */
#define ROUNDER 12582912.0f
#define LOG2E 1.44269504088896f
#define LOG2E_LOW 1.92596299e-8f
#define LN2 0.693147180559945f
/* 2^x is a normal number below this size. */
#define EXP2_LIMIT 126.0f

/* 2^f for |f| <= 1/2, within 1.1e-7. The first two coefficients are 1 and ln 2: the recurrence takes numbers near 1 to a
   power of thousands, so the error must vanish at 0. */
#define POLY5 1.330026407e-03f
#define POLY4 9.669708397e-03f
#define POLY3 5.550559994e-02f
#define POLY2 2.402228161e-01f
INLINE vec exp2_fraction(vec f) {
    vec p = POLY5 * f + POLY4;
    p = p * f + POLY3;
    p = p * f + POLY2;
    p = p * f + LN2;
    return p * f + 1.0f;
}
INLINE vec scale_by_power(vec p, vec rounded) { return (vec)((ivec)p + ((ivec)rounded << 23)); }

INLINE vec exp_of_moderate(vec x) {
    x = plain_nan(x);
    vec rounded = x * LOG2E + ROUNDER, whole = rounded - ROUNDER;
    return scale_by_power(exp2_fraction((x * LOG2E - whole) + x * LOG2E_LOW), rounded);
}
INLINE vec exp_of_negative(vec x) { return exp_of_moderate(at_least(x, splat(-EXP2_LIMIT * LN2))); }
INLINE vec exp_of_any(vec x) { return exp_of_negative(at_most(x, splat(EXP2_LIMIT * LN2))); }

/* out[i] = 2^(d * a[i]), four at a time to keep the pipelines full. `wide` takes any product: the square of 2^(x/2). Of
   NaN only those of `plain_nan`. */
#ifndef EXPS
#define EXPS 4
#endif
INLINE void exp2_products(const int count, const int wide, vec d, const vec *a, vec *out) {
    vec rounded[EXPS], f[EXPS], p[EXPS];
    if (wide) {
        UNROLL for (int i = 0; i < count; i++) {
            vec x = at_least(at_most(d * a[i] * 0.5f, splat(EXP2_LIMIT)), splat(-EXP2_LIMIT));
            rounded[i] = x + ROUNDER;
            p[i] = scale_by_power(exp2_fraction(x - (rounded[i] - ROUNDER)), rounded[i]);
            out[i] = p[i] * p[i];
        }
        return;
    }
    UNROLL for (int i = 0; i < count; i++) rounded[i] = d * a[i] + ROUNDER;
    UNROLL for (int i = 0; i < count; i++) f[i] = rounded[i] - ROUNDER;
    UNROLL for (int i = 0; i < count; i++) f[i] = d * a[i] - f[i];
    UNROLL for (int i = 0; i < count; i++) p[i] = POLY5 * f[i] + POLY4;
    UNROLL for (int i = 0; i < count; i++) p[i] = p[i] * f[i] + POLY3;
    UNROLL for (int i = 0; i < count; i++) p[i] = p[i] * f[i] + POLY2;
    UNROLL for (int i = 0; i < count; i++) p[i] = p[i] * f[i] + LN2;
    UNROLL for (int i = 0; i < count; i++) p[i] = p[i] * f[i] + 1.0f;
    UNROLL for (int i = 0; i < count; i++) out[i] = scale_by_power(p[i], rounded[i]);
}

INLINE vec sigmoid(vec x) { return reciprocal(1.0f + exp_of_any(-x)); }

/* max(x, 0) + log(1 + e^-|x|), the logarithm as an atanh series: small steps keep their relative accuracy.
   *slope, where asked for, is its derivative sigmoid(x). */
INLINE vec softplus(vec x, vec *slope) {
    vec w = exp_of_negative(-absolute(x)), s = w * reciprocal(2.0f + w), q = s * s;
    vec p = 1.400599307e-01f * q + 1.400090261e-01f;
    p = p * q + 2.001076363e-01f;
    p = p * q + 3.333320814e-01f;
    p = p * q + 1.0f;
    if (slope) *slope = choose(x < 0.0f, w, splat(1.0f)) * reciprocal(1.0f + w);
    return at_least(x, splat(0)) + 2.0f * s * p;
}
