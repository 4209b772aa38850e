// Q4_0: 32 weights, w = d·q with q in −8 … 7.
//
//   byte 0      2                                      18
//        | d f16 | 16 × (q[i] + 8 | (q[i+16] + 8) << 4) |
#pragma once

#include "search.h"

namespace quantcli::QC_ISA {

struct Q4_0 {
    static constexpr int kBlock = 32, kSub = 32, kBytes = 18;
    static constexpr int kWords = 4, kHead = 2, kTail = 0;
    static constexpr bool kHasScales = false, kHasMin = false, kWeighted = true, kRowPower = true;

    /// `power` is the mean square of the block's whole row, as ggml weighs with it.
    QC_FN void search(const F* x, const F* importance, F power, Found& found) {
        found.is_weighted = importance != nullptr;
        if (importance) {
            F w[kBlock];
            for (int i = 0; i < kBlock; ++i) w[i] = importance[i] * square_root(power + x[i] * x[i]);
            Ray ray;
            search_ray<kBlock, 8>(x, w, ray);
            found.params.d = to_half(ray.scale);
            found.inverse[0] = ray.inverse;
            return;
        }
        F peak = splat(0.0f), amax = splat(0.0f);
        for (int i = 0; i < kBlock; ++i) {
            const F magnitude = absolute(x[i]);
            const Mask more = amax < magnitude;
            amax = select(more, magnitude, amax);
            peak = select(more, x[i], peak);
        }
        const F d = peak / -8.0f;
        found.params.d = to_half(d);
        found.inverse[0] = select(d == 0.0f, splat(0.0f), 1.0f / d);
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        const F inverse = found.inverse[0];
        if (found.is_weighted) {
            for (int i = 0; i < kBlock; ++i) codes[i] = ray_code<8>(inverse, x[i]);
            return;
        }
        // ggml truncates x/d + 8.5 to int8: an infinite 1/d (d subnormal) gives INT32_MIN and so 0.
        for (int i = 0; i < kBlock; ++i) codes[i] = min((truncate(x[i] * inverse + 8.5f) << 24) >> 24, splat_int(15)) - 8;
    }

    QC_FN void pack(const I* codes, const Params&, I* words) {
        for (int i = 0; i < kWords; ++i) {
            I byte[4];
            for (int k = 0; k < 4; ++k) byte[k] = ((codes[4 * i + k] + 8) & 15) | ((codes[4 * i + k + 16] + 8) & 15) << 4;
            words[i] = bytes_of(byte[0], byte[1], byte[2], byte[3]);
        }
    }

    QC_FN void unpack(const I* words, I* codes, Params&) {
        for (int i = 0; i < 16; ++i) {
            const I byte = byte_at(words[i / 4], i % 4);
            codes[i] = (byte & 15) - 8;
            codes[i + 16] = shift_right_logical(byte, 4) - 8;
        }
    }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        const F d = from_half(params.d);
        for (int i = 0; i < kBlock; ++i) x[i] = to_float(codes[i]) * d;
    }
};

}  // namespace quantcli::QC_ISA
