// Q3_K: 256 weights in 16 sub-blocks of 16, w = (d·scale)·q with q in −4 … 3 and six-bit scales, −32 … 31.
//
//   byte 0                            32                                  96                   108     110
//        | 32 × third bits of q + 4   | 2 × 32 × low two bits of q + 4     | scales + 32 (12)   | d f16 |
//        | bit j = q[32j + i], i < 32 | 2-bit pair k = q[32k + i] of each half of 128
//
//   byte j of the scales' 12:  s[j] low 4 bits | s[j+8] low 4 bits << 4    j = 0 … 7
//   byte j + 8:                high 2 bits of s[j], s[j+4], s[j+8], s[j+12]   j = 0 … 3
#pragma once

#include "pairs.h"
#include "search.h"

namespace quantcli::QC_ISA {

struct Q3_K : Codec {
    static constexpr int kBlock = 256, kSub = 16, kSubs = 16, kBytes = 110;
    static constexpr int kTail = 2, kMax = 4;
    static constexpr bool kHasScales = true, kSignedScales = true;

    QC_FN void search(const F* x, const F* importance, const F*, Found* found) {
        found->is_weighted = importance != nullptr;
        if (importance)
            search_weighted(x, importance, *found);
        else
            search_plain(x, *found);
    }

    QC_FN void search_plain(const F* x, Found& found) {
        F peak = splat(0.0f), amax = splat(0.0f);
        F scale[kSubs];
        for (int j = 0; j < kSubs; j += kDescents) descend(x + kSub * j, nullptr, scale + j);
        for (int j = 0; j < kSubs; ++j) {
            const Mask more = absolute(scale[j]) > amax;
            amax = select(more, absolute(scale[j]), amax);
            peak = select(more, scale[j], peak);
        }
        const Mask zero = peak == 0.0f;  // ggml then stores the lowest scales
        const F inverse = -32.0f / select(zero, splat(1.0f), peak);
        found.params.d = select(zero, splat_int(0), to_half(1.0f / inverse));
        for (int j = 0; j < kSubs; ++j) {
            const I code = (nearest_int(inverse * scale[j]) << 24) >> 24;
            found.params.scale[j] = select(zero, splat_int(-32), max(min(code, splat_int(31)), splat_int(-32)));
        }
    }

    QC_FN void search_weighted(const F* x, const F* importance, Found& found) {
        F power = splat(0.0f);
        for (int i = 0; i < kBlock; ++i) power += x[i] * x[i];
        power = 2.0f * power / 256.0f;
        F scale[kSubs], total[kSubs];
        for (int j = 0; j < kSubs; ++j) {
            const F* sub = x + kSub * j;
            F w[kSub];
            total[j] = splat(0.0f);
            for (int i = 0; i < kSub; ++i) {
                w[i] = importance[kSub * j + i] * square_root(power + sub[i] * sub[i]);
                total[j] += w[i];
            }
            Ray ray;
            search_ray<kSub, kMax>(sub, w, ray);
            scale[j] = ray.scale;
            found.inverse[j] = ray.inverse;
        }
        Ray ray;
        search_ray<kSubs, 32, true>(scale, total, ray);
        found.params.d = to_half(ray.scale);
        for (int j = 0; j < kSubs; ++j) found.params.scale[j] = ray_code<32>(ray.tiny, ray.inverse, scale[j]);
    }

    /// Descents side by side: each waits for its own division.
    static constexpr int kDescents = kLinesAbreast;

    /// make_q3_quants of kDescents sub-blocks, one after another in x: scale of least Σ x²·(scale·q − x)² by coordinate descent. `codes`
    /// may be null.
    QC_CALL void descend(const F* x, I* codes, F* scale) {
        F q[kDescents * kSub], lx[kDescents], l2[kDescents];
        Mask tiny[kDescents];
        for (int c = 0; c < kDescents; ++c) start_descent(x + kSub * c, q + kSub * c, tiny[c], lx[c], l2[c]);
        // ggml stops after a round without a change; another such round changes nothing either.
        for (int round = 0; round < 5; ++round) {
            Mask changed = splat_int(0) != 0;
            for (int i = 0; i < kSub; ++i)
                for (int c = 0; c < kDescents; ++c) changed |= descend_one(x[kSub * c + i], q[kSub * c + i], lx[c], l2[c]);
            if (!any(changed)) break;
        }
        for (int c = 0; c < kDescents; ++c) {
            scale[c] = select(l2[c] > 0.0f, lx[c] / l2[c], splat(0.0f));
            scale[c] = select(tiny[c], splat(0.0f), scale[c]);
        }
        for (int i = 0; codes && i < kDescents * kSub; ++i) codes[i] = select(tiny[i / kSub], splat_int(-kMax), truncate(q[i]));
    }

    QC_FN void start_descent(const F* x, F* q, Mask& tiny, F& lx, F& l2) {
        F peak = splat(0.0f), amax = splat(0.0f);
        for (int i = 0; i < kSub; ++i) {
            const Mask more = absolute(x[i]) > amax;
            amax = select(more, absolute(x[i]), amax);
            peak = select(more, x[i], peak);
        }
        tiny = amax < kTiny;
        const F inverse = -static_cast<float>(kMax) / select(tiny, splat(1.0f), peak);
        lx = l2 = splat(0.0f);
        for (int i = 0; i < kSub; ++i) {
            const F w = x[i] * x[i];
            q[i] = code_fast(inverse * x[i], -kMax, kMax - 1);
            lx += w * x[i] * q[i];
            l2 += w * q[i] * q[i];
        }
    }

    /// Moves one code to where the others' scale wants it, if that lowers the error.
    QC_FN Mask descend_one(F x, F& q, F& lx, F& l2) {
        const F w = x * x, wx = w * x;
        const F others_lx = lx - wx * q, others_l2 = l2 - w * q * q;
        const F moved = code_exact(x * others_l2 / others_lx, -kMax, kMax - 1);
        const F new_lx = others_lx + wx * moved, new_l2 = others_l2 + w * moved * moved;
        const Mask better = (others_lx > 0.0f) & (moved != q) & (new_l2 > 0.0f) & (new_lx * new_lx * l2 > lx * lx * new_l2);
        q = select(better, moved, q);
        lx = select(better, new_lx, lx);
        l2 = select(better, new_l2, l2);
        return better;
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        const F d = from_half(found.params.d);
        for (int j = 0; j < kSubs; ++j) {
            const F scale = d * to_float(found.params.scale[j]);
            const Mask vanished = scale == 0.0f;  // ggml then keeps the codes of its search
            for (int i = kSub * j; i < kSub * (j + 1); ++i) codes[i] = max(min(nearest_int(x[i] / scale), splat_int(3)), splat_int(-4));
            if (!any(vanished)) continue;
            I searched[kSub];
            search_again(x, found, j, searched);
            for (int i = 0; i < kSub; ++i) codes[kSub * j + i] = select(vanished, searched[i], codes[kSub * j + i]);
        }
    }

    /// The codes that the search gave sub-block j.
    QC_CALL void search_again(const F* x, const Found& found, int j, I* codes) {
        if (found.is_weighted) {
            for (int i = 0; i < kSub; ++i) codes[i] = ray_code<kMax>(found.inverse[j], x[kSub * j + i]);
            return;
        }
        I q[kDescents * kSub];
        F scale[kDescents];
        descend(x + kSub * (j / kDescents * kDescents), q, scale);
        for (int i = 0; i < kSub; ++i) codes[i] = q[kSub * (j % kDescents) + i];
    }

    QC_FN I raw(const I* codes) { return bytes_of(codes[0] + 4, codes[1] + 4, codes[2] + 4, codes[3] + 4); }

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        for (int i = 0; i < 8; ++i) {
            words[i] = splat_int(0);
            for (int j = 0; j < 8; ++j) words[i] |= (shift_right_logical(raw(codes + 32 * j + 4 * i), 2) & 0x01010101) << j;
        }
        pack_pairs(words + 8, [&](int i) { return raw(codes + i) & 0x03030303; });
        I bytes[12];
        for (int j = 0; j < 8; ++j) bytes[j] = ((params.scale[j] + 32) & 15) | ((params.scale[j + 8] + 32) & 15) << 4;
        for (int j = 0; j < 4; ++j) {
            bytes[8 + j] = splat_int(0);
            for (int k = 0; k < 4; ++k) bytes[8 + j] |= shift_right_logical(params.scale[j + 4 * k] + 32, 4) << (2 * k);
        }
        for (int i = 0; i < 3; ++i) words[24 + i] = bytes_of(bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]);
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        for (int i = 0; i < kBlock; ++i) {
            const I high = shift_right_logical(byte_at(words[i % 32 / 4], i % 4), i / 32) & 1;
            codes[i] = (pair_at(words + 8, i) | high << 2) - 4;
        }
        for (int j = 0; j < kSubs; ++j) {
            const I low = shift_right_logical(byte_at(words[24 + j % 8 / 4], j % 4), j / 8 * 4) & 15;
            const I high = shift_right_logical(byte_at(words[26], j % 4), j / 4 * 2) & 3;
            params.scale[j] = (low | high << 4) - 32;
        }
    }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        decode_scaled<Q3_K>(codes, params, x, [](const I& code) { return to_float(code); });
    }
};

}  // namespace quantcli::QC_ISA
