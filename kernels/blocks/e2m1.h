// ggml's MXFP4 and NVFP4: 4-bit floats (sign, two bits of exponent, one of mantissa) with a float of 8 bits as scale and no d.
// w = scale·level[q]; levels are twice the floats' numbers, scales half of what their bits say elsewhere.
//
//   MXFP4   byte 0            1                  17              32 weights, scale 2^(bits − 128)
//                | scale E8M0 | q as in nibbles.h |
//   NVFP4   byte 0                4                                     36      4 × 16 weights
//                | 4 × scale UE4M3 | 4 × 8 × (q[i] | q[i+8] << 4), i < 8 |
#pragma once

#include "nibbles.h"

namespace quantcli::QC_ISA {

QC_FN F e2m1_level(I q) {
    const I magnitude = q & 7;
    const I level = select(magnitude < 5, magnitude, (magnitude << 1) - 4) + select(magnitude == 7, splat_int(2), splat_int(0));
    return to_float(select(q > 7, -level, level));
}

/// The code of least |scale·level − x|, the first of equals: differences are rounded, so that far from every level many are equal.
QC_FN I e2m1_code(F x, F scale) {
    constexpr float kLevels[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    I code = splat_int(0);
    F least = absolute(x);
    QC_UNROLL(16)
    for (int k = 1; k < 16; ++k) {
        if (k == 8) continue;  // −0 is never better than 0
        const float level = k < 8 ? kLevels[k] : -kLevels[k - 8];
        const F error = absolute(level * scale - x);
        const Mask better = error < least;
        code = select(better, splat_int(k), code);
        least = select(better, error, least);
    }
    return code;
}

struct MXFP4 : Codec {
    static constexpr int kBlock = 32, kSub = 32, kBytes = 17;
    static constexpr int kHead = 1;
    static constexpr bool kHasD = false, kHasScales = true, kWeighted = false;

    /// ⌊log2f(x)⌋ of x > 0 as glibc computes it, and so ggml: just below a power of two the logarithm rounds up to it. There
    /// x = 2^k·(1 − j·2⁻²⁴), log2 x ≈ k − j·2⁻²⁴/ln 2, and float32 is spaced by 2⁻²³ times the power of two in k.
    QC_FN I floor_log2(F x) {
        const Mask subnormal = x < 0x1.0p-126f;
        const I word = bits(select(subnormal, x * 0x1.0p+24f, x));
        const I exponent = shift_right_logical(word, 23) - select(subnormal, splat_int(127 + 24), splat_int(127));
        const I k = exponent + 1, j = 0x800000 - (word & 0x7fffff);
        const I distance = select(k > 0, k - 1, -k);  // a power of two is spaced finer from below
        const F half_spacing = from_bits(bits(to_float(distance)) & 0x7f800000);
        const Mask rounds_up = to_float(j) <= half_spacing * 0.6931472f;
        return select(rounds_up, k, exponent);
    }

    QC_FN F scale_of(I bits8) {
        const I subnormal = select(bits8 == 0, splat_int(0x00200000), splat_int(0x00400000));
        return from_bits(select(bits8 < 2, subnormal, (bits8 - 1) << 23));
    }

    /// ggml keeps the low byte of an exponent below zero.
    QC_FN void search(const F* x, const F*, const F*, Found* found) {
        F peak = splat(0.0f);
        for (int i = 0; i < kBlock; ++i) peak = max(peak, absolute(x[i]));
        const I exponent = (floor_log2(peak) + (127 - 2)) & 255;
        found->params.scale[0] = select(peak > 0.0f, exponent, splat_int(0));
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        const F scale = scale_of(found.params.scale[0]);
        for (int i = 0; i < kBlock; ++i) codes[i] = e2m1_code(x[i], scale);
    }

    QC_FN void pack(const I* codes, const Params&, I* words) { pack_nibbles<4>(codes, words); }
    QC_FN void unpack(const I* words, I* codes, Params&) { unpack_nibbles<4>(words, codes); }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        const F scale = scale_of(params.scale[0] & 255);
        for (int i = 0; i < kBlock; ++i) x[i] = e2m1_level(codes[i]) * scale;
    }
};

struct NVFP4 : Codec {
    static constexpr int kBlock = 64, kSub = 16, kSubs = 4, kBytes = 36;
    static constexpr bool kHasD = false, kHasScales = true, kWeighted = false;

    /// The UE4M3 nearest to x ≥ 0 as ggml rounds: halves up, and what reaches 256 becomes the largest, 448.
    QC_FN I scale_bits(F x) {
        const I word = bits(min(x, splat(448.0f)));
        const I exponent = shift_right_logical(word, 23) - 127 + 7;
        const I small = min(truncate(x * 512.0f + 0.5f), splat_int(7));
        const I rounded = shift_right_logical(word - ((127 - 7) << 23) + (1 << 19), 20);
        return select(exponent <= 0, small, select(rounded >= 0x78, splat_int(0x7e), rounded));
    }

    QC_FN F scale_of(I bits8) {
        const I exponent = shift_right_logical(bits8, 3) & 15, mantissa = bits8 & 7;
        const F normal = from_bits(((exponent + (127 - 8)) << 23) | mantissa << 20);
        const F scale = select(exponent == 0, to_float(mantissa) * 0x1.0p-10f, normal);
        return select(bits8 == 0x7f, splat(0.0f), scale);
    }

    QC_FN void search(const F* x, const F*, const F*, Found* found) {
        for (int j = 0; j < kSubs; ++j) {
            F peak = splat(0.0f);
            for (int i = kSub * j; i < kSub * (j + 1); ++i) peak = max(peak, absolute(x[i]));
            found->params.scale[j] = scale_bits(peak / 6.0f);
        }
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        for (int i = 0; i < kBlock; ++i) codes[i] = e2m1_code(x[i], scale_of(found.params.scale[i / kSub]));
    }

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        words[0] = bytes_of(params.scale[0], params.scale[1], params.scale[2], params.scale[3]);
        for (int i = 0; i < 8; ++i) {
            const I* q = codes + kSub * (i / 2) + 4 * (i % 2);
            words[1 + i] = bytes_of(q[0] | q[8] << 4, q[1] | q[9] << 4, q[2] | q[10] << 4, q[3] | q[11] << 4);
        }
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        for (int j = 0; j < kSubs; ++j) params.scale[j] = byte_at(words[0], j);
        for (int i = 0; i < 32; ++i) {
            const I byte = byte_at(words[1 + i / 4], i % 4);
            I* q = codes + kSub * (i / 8) + i % 8;
            q[0] = byte & 15;
            q[8] = shift_right_logical(byte, 4);
        }
    }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        for (int i = 0; i < kBlock; ++i) x[i] = e2m1_level(codes[i]) * scale_of(params.scale[i / kSub] & 255);
    }
};

}  // namespace quantcli::QC_ISA
