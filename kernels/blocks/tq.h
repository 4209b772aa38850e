// TQ1_0 and TQ2_0: 256 ternary weights, w = d·q with q in −1, 0, 1 (TQ2_0 can hold 2).
//
//   TQ1_0   byte 0                  32                     48                   52      54
//                | 5 × 32 trits     | 5 × 16 trits         | 4 × 4 trits        | d f16 |
//                | of q[32k + i]    | of q[160 + 16k + i]  | of q[240 + 4k + i] |          byte i of each, k = 0 … 4 or 3
//   TQ2_0   byte 0                           64      66
//                | q + 1, as in pairs.h      | d f16 |
//
// A byte of trits t[k] = q + 1 is the fraction 0.t[0]t[1]t[2]t[3]t[4] in base 3, times 256 and rounded up: times 3, each trit in turn is
// the carry. Of the 256 bytes 243 are made by it.
#pragma once

#include "pairs.h"

namespace quantcli::QC_ISA {

struct Ternary : Codec {
    static constexpr int kBlock = 256, kSub = 256, kTail = 2;
    static constexpr bool kWeighted = false;

    QC_FN void search(const F* x, const F*, const F*, Found* found) {
        F peak = splat(0.0f);
        for (int i = 0; i < kBlock; ++i) peak = max(peak, absolute(x[i]));
        found->params.d = to_half(peak);
        found->inverse[0] = select(peak == 0.0f, splat(0.0f), 1.0f / peak);
    }

    /// ggml keeps the low bits of a rounded long: where 1/d is infinite (d subnormal), 0.
    QC_FN void encode(const F* x, const Found& found, I* codes) {
        for (int i = 0; i < kBlock; ++i) codes[i] = (round_half_away(x[i] * found.inverse[0]) << 24) >> 24;
    }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        const F d = from_half(params.d);
        for (int i = 0; i < kBlock; ++i) x[i] = to_float(codes[i]) * d;
    }
};

struct TQ1_0 : Ternary {
    static constexpr int kBytes = 54;

    /// Of byte i: the code that its first trit belongs to, how far apart its trits' codes are, and how many it has.
    struct Trits {
        int first, apart, n;
    };

    QC_FN Trits trits_of(int i) {
        if (i < 32) return {i, 32, 5};
        return i < 48 ? Trits{128 + i, 16, 5} : Trits{192 + i, 4, 4};
    }

    QC_FN I pack_byte(const I* codes, int i) {
        const Trits trits = trits_of(i);
        I number = splat_int(0);
        for (int k = 0; k < 5; ++k) number = number * 3 + (k < trits.n ? codes[trits.first + trits.apart * k] + 1 : splat_int(0));
        return number + shift_right_logical((number * 13 + 242) * 270, 16);  // ⌈256·number / 243⌉
    }

    QC_FN void pack(const I* codes, const Params&, I* words) {
        for (int i = 0; i < 13; ++i)
            words[i] =
                bytes_of(pack_byte(codes, 4 * i), pack_byte(codes, 4 * i + 1), pack_byte(codes, 4 * i + 2), pack_byte(codes, 4 * i + 3));
    }

    QC_FN void unpack(const I* words, I* codes, Params&) {
        for (int i = 0; i < 52; ++i) {
            const Trits trits = trits_of(i);
            I fraction = byte_at(words[i / 4], i % 4);
            for (int k = 0; k < trits.n; ++k) {
                fraction = fraction * 3;
                codes[trits.first + trits.apart * k] = shift_right_logical(fraction, 8) - 1;
                fraction &= 255;
            }
        }
    }
};

struct TQ2_0 : Ternary {
    static constexpr int kBytes = 66;

    QC_FN void pack(const I* codes, const Params&, I* words) {
        pack_pairs(words, [&](int i) { return bytes_of(codes[i] + 1, codes[i + 1] + 1, codes[i + 2] + 1, codes[i + 3] + 1); });
    }

    QC_FN void unpack(const I* words, I* codes, Params&) {
        for (int i = 0; i < kBlock; ++i) codes[i] = pair_at(words, i) - 1;
    }
};

}  // namespace quantcli::QC_ISA
