// Q8_0: 32 weights, w = d·q with q in −127 … 127.
//
//   byte 0      2                     34
//        | d f16 | q[0] … q[31] int8 |
#pragma once

#include "params.h"

namespace quantcli::QC_ISA {

struct Q8_0 : Codec {
    static constexpr int kBlock = 32, kSub = 32, kBytes = 34;
    static constexpr int kHead = 2;
    static constexpr bool kWeighted = false;

    QC_FN void search(const F* x, const F*, const F*, Found* found) {
        F peak = splat(0.0f);
        for (int i = 0; i < kBlock; ++i) peak = max(peak, absolute(x[i]));
        const F d = peak / 127.0f;
        found->params.d = to_half(d);
        found->inverse[0] = select(d == 0.0f, splat(0.0f), 1.0f / d);
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        for (int i = 0; i < kBlock; ++i) codes[i] = (round_half_away(x[i] * found.inverse[0]) << 24) >> 24;
    }

    QC_FN void pack(const I* codes, const Params&, I* words) {
        for (int i = 0; i < 8; ++i) words[i] = bytes_of(codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3]);
    }

    QC_FN void unpack(const I* words, I* codes, Params&) {
        for (int i = 0; i < kBlock; ++i) codes[i] = signed_byte_at(words[i / 4], i % 4);
    }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        const F d = from_half(params.d);
        for (int i = 0; i < kBlock; ++i) x[i] = to_float(codes[i]) * d;
    }
};

}  // namespace quantcli::QC_ISA
