// The lane type: F and I are kLanes floats and ints, one block of weights in each lane.
//
// The maths in blocks/*.h is written once in terms of F, I, Mask and the functions below. On CUDA a lane is a thread and F is a plain
// float; on the CPU F is a vector of 4, 8 or 16 floats (GCC and Clang vector extensions, so the compiler picks the instructions).
// No function adds across lanes: every lane sees the IEEE operations of a scalar loop in the same order, at every width.
// Compile with -ffp-contract=off (nvcc: --fmad=false) or results will differ in the last bit.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define QC_FN static __device__ __forceinline__
#define QC_CALL static __device__ __noinline__
#define QC_UNROLL(n) _Pragma("unroll")
#ifndef QC_ISA
#define QC_ISA cuda
#endif
#else
#include <cmath>
#define QC_FN static inline __attribute__((always_inline))
#define QC_CALL static __attribute__((noinline))  // for what is called from several places: lanes by reference, never by value
#define QC_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define QC_UNROLL(n) QC_PRAGMA(clang loop unroll_count(n))
#else
#define QC_UNROLL(n) QC_PRAGMA(GCC unroll n)
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#endif

namespace quantcli::QC_ISA {

#ifdef __CUDACC__

constexpr int kLanes = 1;
using F = float;
using I = int32_t;
using Mask = bool;

QC_FN F splat(float x) { return x; }
QC_FN I splat_int(int32_t x) { return x; }
QC_FN Mask splat_mask(bool x) { return x; }
QC_FN I bits(F x) { return __float_as_int(x); }
QC_FN F from_bits(I x) { return __int_as_float(x); }
QC_FN F to_float(I x) { return static_cast<float>(x); }
QC_FN I shift_right_logical(I x, int n) { return static_cast<I>(static_cast<uint32_t>(x) >> n); }
QC_FN bool any(Mask m) { return m; }
QC_FN bool all(Mask m) { return m; }
QC_FN F square_root(F x) { return __fsqrt_rn(x); }
/// Truncation towards zero; NaN and values outside int32 give INT32_MIN, as on x86 (and so in ggml's files).
QC_FN I truncate(F x) { return fabsf(x) < 2147483648.0f ? static_cast<I>(x) : INT32_MIN; }

#else

constexpr int kLanes = QC_LANES;
typedef float F __attribute__((vector_size(4 * QC_LANES)));
typedef int32_t I __attribute__((vector_size(4 * QC_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * QC_LANES)));
using Mask = I;

QC_FN F splat(float x) { return x - F{}; }  // not +, which would lose the sign of −0
QC_FN I splat_int(int32_t x) { return x - I{}; }
QC_FN Mask splat_mask(bool x) { return splat_int(-static_cast<int32_t>(x)); }
QC_FN I bits(F x) { return (I)x; }
QC_FN F from_bits(I x) { return (F)x; }
QC_FN F to_float(I x) { return __builtin_convertvector(x, F); }
QC_FN I shift_right_logical(I x, int n) { return (I)((U)x >> n); }

QC_FN bool any(Mask m) {
#if defined(__AVX512DQ__) && QC_LANES == 16
    return _mm512_movepi32_mask((__m512i)m) != 0;
#elif defined(__AVX2__) && QC_LANES == 8
    return _mm256_movemask_ps((__m256)m) != 0;
#elif defined(__SSE2__) && QC_LANES == 4
    return _mm_movemask_ps((__m128)m) != 0;
#else
    int32_t found = 0;
    for (int lane = 0; lane < kLanes; ++lane) found |= m[lane];
    return found != 0;
#endif
}

QC_FN bool all(Mask m) { return !any(~m); }

QC_FN F square_root(F x) {
#if defined(__AVX512F__) && QC_LANES == 16
    return (F)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__) && QC_LANES == 8
    return (F)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__) && QC_LANES == 4
    return (F)_mm_sqrt_ps((__m128)x);
#else
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
#endif
}

/// Truncation towards zero; NaN and values outside int32 give INT32_MIN, as on x86 (and so in ggml's files).
QC_FN I truncate(F x) {
#if defined(__x86_64__)
    return __builtin_convertvector(x, I);
#else
    const F inside = from_bits(bits(x) & 0x7fffffff);
    return inside < 2147483648.0f ? __builtin_convertvector(x, I) : splat_int(INT32_MIN);
#endif
}

#endif

/// One lane of a value, for what lanes cannot do side by side.
#ifdef __CUDACC__
QC_FN float lane_of(F x, int) { return x; }
QC_FN int32_t lane_of(I x, int) { return x; }
QC_FN void set_lane(I& x, int, int32_t value) { x = value; }
QC_FN void set_lane(Mask& x, int, int32_t value) { x = value != 0; }
#else
QC_FN float lane_of(const F& x, int lane) { return x[lane]; }
QC_FN int32_t lane_of(const I& x, int lane) { return x[lane]; }
QC_FN void set_lane(I& x, int lane, int32_t value) { x[lane] = value; }
#endif

QC_FN F select(Mask m, F a, F b) { return m ? a : b; }
QC_FN I select(Mask m, I a, I b) { return m ? a : b; }

/// a < b ? a : b and a > b ? a : b, with NaN and signed zeros too: minps and maxps, which GCC 12 does not find by itself in vectors.
#if defined(__AVX512F__) && QC_LANES == 16
QC_FN F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
QC_FN F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && QC_LANES == 8
QC_FN F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
QC_FN F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__) && QC_LANES == 4
QC_FN F min(F a, F b) { return (F)_mm_min_ps((__m128)a, (__m128)b); }
QC_FN F max(F a, F b) { return (F)_mm_max_ps((__m128)a, (__m128)b); }
#else
QC_FN F min(F a, F b) { return a < b ? a : b; }
QC_FN F max(F a, F b) { return a > b ? a : b; }
#endif
QC_FN I min(I a, I b) { return a < b ? a : b; }
QC_FN I max(I a, I b) { return a > b ? a : b; }
QC_FN F absolute(F x) { return from_bits(bits(x) & 0x7fffffff); }
QC_FN F negate(F x) { return from_bits(bits(x) ^ INT32_MIN); }

/// table[index & 7], where there is an instruction for it.
#if defined(__AVX512DQ__) && QC_LANES == 16
#define QC_HAS_LOOKUP
QC_FN F lookup(const float* table, I index) {
    const __m512 twice = _mm512_broadcast_f32x8(_mm256_loadu_ps(table));
    return (F)_mm512_permutexvar_ps((__m512i)index, twice);
}
#elif defined(__AVX2__) && QC_LANES == 8
#define QC_HAS_LOOKUP
QC_FN F lookup(const float* table, I index) { return (F)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index); }
#endif

/// 1.5 · 2²³: added to |x| ≤ 2²² it leaves round-to-nearest-even(x) in the low bits of the sum.
constexpr float kRound = 12582912.0f;

/// ggml's nearest_int, also where its argument is out of range or NaN (then the low 23 bits are what they are).
QC_FN I nearest_int(F x) {
    const F sum = x + kRound;
#ifdef __CUDACC__
    if (sum != sum) return 0;  // a CUDA NaN carries other low bits than a CPU's
#endif
    return (bits(sum) & 0x007fffff) - 0x00400000;
}

/// roundf: halves away from zero. Exact for |x| < 2²³; the addend is the float below one half, so that 0.49999997 does not round up.
QC_FN I round_half_away(F x) {
    const I half = (bits(x) & INT32_MIN) | 0x3effffff;
    return truncate(x + from_bits(half));
}

/// float → IEEE half, to nearest even with subnormals and overflow to infinity, in the low 16 bits. NaN becomes 0x7e00 with its sign.
QC_FN I to_half(F x) {
    const I w = bits(x);
    const I magnitude = w & 0x7fffffff;
    const I sign = shift_right_logical(w, 16) & 0x8000;
    // Adding a power of two 13 binades above x's own leaves the mantissa rounded to half's 10 bits; below 2⁻¹⁴ the addend stays, which
    // rounds subnormals. The two multiplications turn what exceeds 65504 into infinity first.
    const F base = (absolute(x) * 0x1.0p+112f) * 0x1.0p-110f;
    const I exponent = max(magnitude & 0x7f800000, splat_int(0x38800000));
    const I rounded = bits(from_bits(exponent + 0x07800000) + base);
    const I half = (shift_right_logical(rounded, 13) & 0x7c00) + (rounded & 0x0fff);
#if defined(__x86_64__) && !defined(__CUDACC__)
    return sign | select(magnitude > 0x7f800000, splat_int(0x7e00), half);
#else
    return select(magnitude > 0x7f800000, splat_int(0xfe00), sign | half);  // x86 makes negative NaN, others positive: follow x86
#endif
}

/// The nearest bfloat16 of a finite x, ties to even, as a float.
QC_FN F round_to_bf16(F x) {
    const I w = bits(x);
    return from_bits((w + 0x7fff + (shift_right_logical(w, 16) & 1)) & ~0xffff);
}

/// IEEE half (low 16 bits) → float, exact.
QC_FN F from_half(I h) {
    const I sign = (h & 0x8000) << 16;
    const I magnitude = (h & 0x7fff) << 13;
    const F normal = from_bits(magnitude + (0x70 << 23));
    const F special = from_bits(magnitude | 0x7f800000);
    const F subnormal = to_float(h & 0x3ff) * 0x1.0p-24f;
    const F small = select((h & 0x7c00) == 0, subnormal, normal);
    return from_bits(sign | bits(select((h & 0x7c00) == 0x7c00, special, small)));
}

}  // namespace quantcli::QC_ISA
