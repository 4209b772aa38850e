// Q6_K: 256 weights in 16 sub-blocks of 16, w = (d·scale)·q with q in −32 … 31 and int8 scales.
//
//   byte 0                               128                          192               208     210
//        | 2 × 64 low four bits           | 2 × 32 high two bits       | 16 × scale int8 | d f16 |
//        | q[i] | q[i+64] << 4, i < 64    | of q[i], q[i+32], q[i+64], q[i+96], i < 32   |          of each half of 128, q + 32
#pragma once

#include "search.h"

namespace quantcli::QC_ISA {

struct Q6_K : Codec {
    static constexpr int kBlock = 256, kSub = 16, kSubs = 16, kBytes = 210;
    static constexpr int kTail = 2;
    static constexpr bool kHasScales = true, kSignedScales = true;

    QC_FN void search(const F* x, const F* importance, const F*, Found* found) {
        F scale[kSubs];
        F peak = splat(0.0f), amax = splat(0.0f);
        for (int j = 0; j < kSubs; ++j) {
            const F* sub = x + kSub * j;
            F w[kSub];
            for (int i = 0; i < kSub; ++i) w[i] = importance ? importance[kSub * j + i] : sub[i] * sub[i];
            Ray ray;
            search_ray<kSub, 32>(sub, w, ray);
            scale[j] = ray.scale;
            found->inverse[j] = ray.inverse;
            const F magnitude = absolute(scale[j]);
            const Mask more = magnitude > amax;
            amax = select(more, magnitude, amax);
            peak = select(more, scale[j], peak);
        }
        // ggml writes a block of zeros where every scale is tiny: no scale, and the codes of an all-zero sub-block.
        const Mask tiny = amax < kTiny;
        const F inverse = -128.0f / select(tiny, splat(1.0f), peak);
        found->params.d = select(tiny, splat_int(0), to_half(1.0f / inverse));
        for (int j = 0; j < kSubs; ++j) {
            const I code = min(nearest_int(inverse * scale[j]), splat_int(127));
            found->params.scale[j] = select(tiny, splat_int(0), (code << 24) >> 24);
            found->inverse[j] = select(tiny, splat(0.0f), found->inverse[j]);
        }
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        const F d = from_half(found.params.d);
        for (int j = 0; j < kSubs; ++j) {
            const F scale = d * to_float(found.params.scale[j]);
            const Mask vanished = scale == 0.0f;  // ggml then keeps the codes of its search
            for (int i = kSub * j; i < kSub * (j + 1); ++i) {
                const I code = nearest_int(x[i] / scale);
                codes[i] = max(min(code, splat_int(31)), splat_int(-32));
            }
            if (!any(vanished)) continue;
            for (int i = kSub * j; i < kSub * (j + 1); ++i) codes[i] = select(vanished, ray_code<32>(found.inverse[j], x[i]), codes[i]);
        }
    }

    QC_FN I raw(const I* codes) { return bytes_of(codes[0] + 32, codes[1] + 32, codes[2] + 32, codes[3] + 32); }

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        for (int half = 0; half < 2; ++half) {
            const I* q = codes + 128 * half;
            for (int i = 0; i < 16; ++i) words[16 * half + i] = (raw(q + 4 * i) & 0x0f0f0f0f) | (raw(q + 4 * i + 64) & 0x0f0f0f0f) << 4;
            for (int i = 0; i < 8; ++i) {
                I high = splat_int(0);
                for (int k = 0; k < 4; ++k) high |= (shift_right_logical(raw(q + 4 * i + 32 * k), 4) & 0x03030303) << (2 * k);
                words[32 + 8 * half + i] = high;
            }
        }
        for (int i = 0; i < 4; ++i) {
            const I* scale = params.scale + 4 * i;
            words[48 + i] = bytes_of(scale[0], scale[1], scale[2], scale[3]);
        }
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        for (int i = 0; i < kBlock; ++i) {
            const int half = i / 128, k = i % 128 / 32, l = i % 32;  // the k-th of the four values that share a high byte
            const I low = shift_right_logical(byte_at(words[16 * half + (32 * (k % 2) + l) / 4], l % 4), 4 * (k / 2)) & 15;
            const I high = shift_right_logical(byte_at(words[32 + 8 * half + l / 4], l % 4), 2 * k) & 3;
            codes[i] = (low | high << 4) - 32;
        }
        for (int j = 0; j < kSubs; ++j) params.scale[j] = signed_byte_at(words[48 + j / 4], j % 4);
    }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        decode_scaled<Q6_K>(codes, params, x, [](const I& code) { return to_float(code); });
    }
};

}  // namespace quantcli::QC_ISA
