// E4M3, E5M2 and E2M1: rounding to nearest even, their values, and the search for a group's scale. quantcli/ops/minifloat.py draws the
// bits.
#pragma once

#include "../minifloat.h"
#include "../spmd.h"

namespace quantcli::QC_ISA {

/// Eight bits: sign, exponent, kMantissa. kTop: the byte of the largest finite number.
template <int kMantissa, int kBias, int kTop>
struct Bits8 {
    static constexpr int kShift = 23 - kMantissa;
    static constexpr int kRebias = (127 - kBias) << 23;

    QC_FN F largest() { return from_bits(splat_int((kTop << kShift) + kRebias)); }
    /// 2^(1 − bias): below it the numbers are multiples of step().
    QC_FN F smallest_normal() { return from_bits(splat_int((128 - kBias) << 23)); }
    QC_FN F step() { return from_bits(splat_int((128 - kBias - kMantissa) << 23)); }

    /// The byte nearest to x, saturating; NaN becomes the largest number.
    QC_FN I encode(F x) {
        const I sign = shift_right_logical(bits(x), 24) & 0x80;
        const F a = min(absolute(x), largest());
        const I b = bits(a);
        const I even = shift_right_logical(b, kShift) & 1;
        const I normal = shift_right_logical(b - kRebias + (even + ((1 << (kShift - 1)) - 1)), kShift);
        // 2²³ steps: what is added to it is rounded to whole steps, which the sum's low bits count.
        const I magic = splat_int((128 - kBias - kMantissa + 23) << 23);
        const I subnormal = bits(a + from_bits(magic)) - magic;
        return sign | select(a < smallest_normal(), subnormal, normal);
    }

    QC_FN F decode(I byte) {
        const I m = byte & 0x7f;
        const F normal = from_bits((m << kShift) + kRebias);
        const F small = select(m < (1 << kMantissa), to_float(m) * step(), normal);
        // Above the top lie NaN and, in E5M2, infinity first: float's own with the same mantissa bits (E4M3 has one NaN).
        const I special = kMantissa == 3 ? splat_int(0x7fc00000) : (m << kShift) | 0x7f800000;
        return from_bits(bits(select(m > kTop, from_bits(special), small)) | (byte & 0x80) << 24);
    }
};

using E4M3 = Bits8<3, 7, 0x7e>;
using E5M2 = Bits8<2, 15, 0x7b>;

/// |x| ≤ 6 on the grid of E2M1: count whole steps of ½ below 2, of 1 below 4, of 2 above.
struct Rounded4 {
    F magic, sum;
    I octave;

    QC_FN Rounded4 of(F x) {
        const F a = min(absolute(x), splat(6.0f));
        Rounded4 r;
        r.octave = max(bits(a) & 0x7f800000, splat_int(0x3f800000));
        r.magic = from_bits(r.octave + (22 << 23));  // its last bit is worth a step
        r.sum = a + r.magic;
        return r;
    }
};

/// The level nearest to |x|, up to 6.
QC_FN F round_e2m1(F x) {
    const Rounded4 r = Rounded4::of(x);
    return r.sum - r.magic;
}

/// The code nearest to x: bit 3 says that x is below zero, also where it rounds to it.
QC_FN I encode_e2m1(F x) {
    const Rounded4 r = Rounded4::of(x);
    const I magnitude = bits(r.sum) - bits(r.magic) + shift_right_logical(r.octave - 0x3f800000, 22);
    return magnitude | select(x < 0.0f, splat_int(8), splat_int(0));
}

QC_FN F decode_e2m1(I code) {
    const I m = code & 7;
    const F normal = from_bits((m << 22) + (126 << 23));
    const F value = select(m < 2, to_float(m) * 0.5f, normal);
    return from_bits(bits(value) | (code & 8) << 28);
}

/// What a level of 1 is worth in a group with this scale byte.
template <Scaled4 kFormat>
QC_FN F step_of(I byte, F global_scale) {
    if constexpr (kFormat == Scaled4::nvfp4)
        return E4M3::decode(byte) / global_scale;
    else
        return select(byte == 0, from_bits(splat_int(1 << 22)), from_bits(byte << 23));
}

/// Σ weight·(x − x̂)² of a group [n] with this step, from the first to the last; without weights where they are null.
template <bool kWeighted>
QC_FN F error_of(const F* x, const F* weight, int n, F step) {
    F error = splat(0.0f);
    for (int i = 0; i < n; ++i) {
        const F miss = absolute(x[i]) - round_e2m1(x[i] / step) * step;
        const F square = miss * miss;
        error = error + (kWeighted ? square * weight[i] : square);
    }
    return error;
}

/// The byte of the least error among start and start + first … last, the first of equals, start before all.
template <Scaled4 kFormat, bool kWeighted>
QC_FN I best_byte(const F* x, const F* weight, int n, I start, F global_scale, int first, int last) {
    // NVFP4 has no step at byte 0, and NaN at 127; in MXFP4 a level of 6 is infinite from 253 on.
    const I lowest = splat_int(kFormat == Scaled4::nvfp4 ? 1 : 0), highest = splat_int(kFormat == Scaled4::nvfp4 ? 126 : 252);
    I best = start;
    F least = from_bits(splat_int(0x7f800000));
    for (int k = first - 1; k <= last; ++k) {
        if (k == 0) continue;
        const int offset = k < first ? 0 : k;
        const I byte = max(min(start + offset, highest), lowest);
        const F error = error_of<kWeighted>(x, weight, n, step_of<kFormat>(byte, global_scale));
        const Mask better = error < least;
        best = select(better, byte, best);
        least = select(better, error, least);
    }
    return best;
}

}  // namespace quantcli::QC_ISA
