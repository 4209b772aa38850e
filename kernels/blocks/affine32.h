// Q4_1 and Q5_1: 32 weights, w = d·q + m with q in 0 … kMax, kMax 15 or 31.
//
//   byte 0      2       4                   20         byte 0      2       4                 8                   24
//        | d f16 | m f16 | q as in nibbles.h |              | d f16 | m f16 | fifth bits of q | q as in nibbles.h |
#pragma once

#include "nibbles.h"
#include "search.h"

namespace quantcli::QC_ISA {

template <int kBits>
struct Affine32 : Codec {
    static constexpr int kBlock = 32, kSub = 32, kBytes = 4 + 4 * kBits;
    static constexpr int kMax = (1 << kBits) - 1, kAbreast = kLinesAbreast;
    static constexpr bool kHasOffset = true, kRowPower = true;

    QC_FN void search(const F* x, const F* importance, const F* power, Found* found) {
        for (int b = 0; b < kAbreast; ++b) found[b].is_weighted = importance != nullptr;
        if (importance) return search_weighted(x, importance, power, found);
        for (int b = 0; b < kAbreast; ++b) search_plain(x + kBlock * b, found[b]);
    }

    QC_FN void search_weighted(const F* x, const F* importance, const F* power, Found* found) {
        F w[kAbreast * kBlock];
        for (int i = 0; i < kAbreast * kBlock; ++i) w[i] = importance[i] * square_root(power[i / kBlock] + x[i] * x[i]);
        Line line[kAbreast];
        search_lines<kBlock, kMax, kAbreast>(x, w, -0.9f, 0.05f, 36, line);
        for (int b = 0; b < kAbreast; ++b) {
            found[b].params.d = to_half(line[b].scale);
            found[b].params.m = to_half(line[b].min);
            found[b].inverse[0] = line[b].inverse;
            found[b].origin[0] = line[b].origin;
        }
    }

    QC_FN void search_plain(const F* x, Found& found) {
        F low = splat(0x1.fffffep+127f), high = splat(-0x1.fffffep+127f);
        for (int i = 0; i < kBlock; ++i) {
            low = min(x[i], low);
            high = max(x[i], high);
        }
        const F d = (high - low) / static_cast<float>(kMax);
        found.params.d = to_half(d);
        found.params.m = to_half(low);
        found.inverse[0] = select(d == 0.0f, splat(0.0f), 1.0f / d);
        found.origin[0] = low;
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        const F inverse = found.inverse[0], origin = found.origin[0];
        if (found.is_weighted) {
            for (int i = 0; i < kBlock; ++i) codes[i] = max(min(nearest_int(inverse * (x[i] - origin)), splat_int(kMax)), splat_int(0));
            return;
        }
        // ggml keeps a byte of the truncated sum: an infinite or NaN one gives INT32_MIN and so 0.
        for (int i = 0; i < kBlock; ++i) codes[i] = min(truncate((x[i] - origin) * inverse + 0.5f) & 255, splat_int(kMax));
    }

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        words[0] = (params.d & 0xffff) | params.m << 16;
        pack_nibbles<kBits>(codes, words + 1);
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        params.d = words[0] & 0xffff;
        params.m = shift_right_logical(words[0], 16);
        unpack_nibbles<kBits>(words + 1, codes);
    }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        const F d = from_half(params.d), m = from_half(params.m);
        for (int i = 0; i < kBlock; ++i) x[i] = to_float(codes[i]) * d + m;
    }
};

using Q4_1 = Affine32<4>;
using Q5_1 = Affine32<5>;

}  // namespace quantcli::QC_ISA
