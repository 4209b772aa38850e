// Q4_0 and Q5_0: 32 weights, w = d·(q − kMax) with q in 0 … 2·kMax − 1, kMax 8 or 16. Codes here are q − kMax.
//
//   byte 0      2                  18                   byte 0      2                 6                    22
//        | d f16 | q as in nibbles.h |                       | d f16 | fifth bits of q | q as in nibbles.h |
#pragma once

#include "nibbles.h"
#include "search.h"

namespace quantcli::QC_ISA {

template <int kBits>
struct Symmetric32 : Codec {
    static constexpr int kBlock = 32, kSub = 32, kBytes = 2 + 4 * kBits;
    static constexpr int kHead = 2, kMax = 1 << (kBits - 1);
    static constexpr bool kRowPower = true;

    /// `*power` is the mean square of the block's whole row, as ggml weighs with it.
    QC_FN void search(const F* x, const F* importance, const F* power, Found* found) {
        found->is_weighted = importance != nullptr;
        if (importance) {
            F w[kBlock];
            for (int i = 0; i < kBlock; ++i) w[i] = importance[i] * square_root(*power + x[i] * x[i]);
            Ray ray;
            search_ray<kBlock, kMax>(x, w, ray);
            found->params.d = to_half(ray.scale);
            found->inverse[0] = ray.inverse;
            return;
        }
        F peak = splat(0.0f), amax = splat(0.0f);
        for (int i = 0; i < kBlock; ++i) {
            const F magnitude = absolute(x[i]);
            const Mask more = amax < magnitude;
            amax = select(more, magnitude, amax);
            peak = select(more, x[i], peak);
        }
        const F d = peak / -static_cast<float>(kMax);
        found->params.d = to_half(d);
        found->inverse[0] = select(d == 0.0f, splat(0.0f), 1.0f / d);
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        const F inverse = found.inverse[0];
        if (found.is_weighted) {
            for (int i = 0; i < kBlock; ++i) codes[i] = ray_code<kMax>(inverse, x[i]);
            return;
        }
        // ggml truncates x/d + kMax + 0.5 to int8: an infinite 1/d (d subnormal) gives INT32_MIN and so 0.
        constexpr float kHalfUp = kMax + 0.5f;
        for (int i = 0; i < kBlock; ++i) {
            const I byte = (truncate(x[i] * inverse + kHalfUp) << 24) >> 24;
            codes[i] = min(byte, splat_int(2 * kMax - 1)) - kMax;
        }
    }

    QC_FN void pack(const I* codes, const Params&, I* words) {
        I q[kBlock];
        for (int i = 0; i < kBlock; ++i) q[i] = codes[i] + kMax;
        pack_nibbles<kBits>(q, words);
    }

    QC_FN void unpack(const I* words, I* codes, Params&) {
        unpack_nibbles<kBits>(words, codes);
        for (int i = 0; i < kBlock; ++i) codes[i] -= kMax;
    }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        const F d = from_half(params.d);
        for (int i = 0; i < kBlock; ++i) x[i] = to_float(codes[i]) * d;
    }
};

using Q4_0 = Symmetric32<4>;
using Q5_0 = Symmetric32<5>;

}  // namespace quantcli::QC_ISA
