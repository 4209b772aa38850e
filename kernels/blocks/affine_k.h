// What Q2_K, Q4_K and Q5_K share: 256 weights in sub-blocks, w = (d·scale)·q − (dmin·min).
#pragma once

#include "search.h"

namespace quantcli::QC_ISA {

/// Six-bit scales and minima of 8 sub-blocks, given as ggml's bytes (low 8 bits), in 12 bytes:
///
///   byte j:       scale[j] | scale[j+4] high 2 bits << 6        j = 0 … 3
///   byte j + 4:   min[j] | min[j+4] high 2 bits << 6
///   byte j + 8:   scale[j+4] low 4 bits | min[j+4] low 4 bits << 4
struct SixBitScales {
    static constexpr int kSubs = 8, kTop = 63, kWords = 3;

    QC_FN void pack(const Params& params, I* words) {
        I low[4], high[4], split[4];
        for (int j = 0; j < 4; ++j) {
            low[j] = params.scale[j] | shift_right_logical(params.scale[j + 4], 4) << 6;
            high[j] = params.min[j] | shift_right_logical(params.min[j + 4], 4) << 6;
            split[j] = (params.scale[j + 4] & 15) | (params.min[j + 4] & 15) << 4;
        }
        words[0] = bytes_of(low[0], low[1], low[2], low[3]);
        words[1] = bytes_of(high[0], high[1], high[2], high[3]);
        words[2] = bytes_of(split[0], split[1], split[2], split[3]);
    }

    QC_FN void unpack(const I* words, Params& params) {
        for (int j = 0; j < 4; ++j) {
            const I low = byte_at(words[0], j), high = byte_at(words[1], j), split = byte_at(words[2], j);
            params.scale[j] = low & 63;
            params.min[j] = high & 63;
            params.scale[j + 4] = (split & 15) | shift_right_logical(low, 6) << 4;
            params.min[j + 4] = shift_right_logical(split, 4) | shift_right_logical(high, 6) << 4;
        }
    }
};

/// Four-bit scales and minima of 16 sub-blocks, given as ggml's bytes: byte j is scale[j] | min[j] << 4.
struct FourBitScales {
    static constexpr int kSubs = 16, kTop = 15, kWords = 4;

    QC_FN void pack(const Params& params, I* words) {
        I bytes[kSubs];
        for (int j = 0; j < kSubs; ++j) bytes[j] = params.scale[j] | params.min[j] << 4;
        for (int i = 0; i < kWords; ++i) words[i] = bytes_of(bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]);
    }

    QC_FN void unpack(const I* words, Params& params) {
        for (int j = 0; j < kSubs; ++j) {
            const I byte = byte_at(words[j / 4], j % 4);
            params.scale[j] = byte & 15;
            params.min[j] = shift_right_logical(byte, 4);
        }
    }
};

/// kMax is the largest code; plain and weighted searches have their own spacing (first, step, count).
template <int kMax, int kPlainSteps, class Scales>
struct AffineK : Codec {
    static constexpr int kBlock = 256, kSubs = Scales::kSubs, kSub = kBlock / kSubs, kTop = Scales::kTop;
    static constexpr bool kHasScales = true, kHasMin = true;
    static constexpr bool kTwoBits = kMax == 3;

    /// d and dmin as one word.
    QC_FN I pack_halves(const Params& params) { return (params.d & 0xffff) | params.dmin << 16; }
    QC_FN void unpack_halves(const I& word, Params& params) {
        params.d = word & 0xffff;
        params.dmin = shift_right_logical(word, 16);
    }

    QC_FN void search(const F* x, const F* importance, const F*, Found* found) {
        if (importance)
            search_weighted(x, importance, *found);
        else
            search_plain(x, *found);
        // What is stored is what counts: ggml ORs bytes that it does not always clip.
        I words[Scales::kWords];
        Scales::pack(found->params, words);
        Scales::unpack(words, found->params);
    }

    QC_FN void search_plain(const F* x, Found& found) {
        F scale[kSubs], min[kSubs];
        F max_scale = splat(0.0f), max_min = splat(0.0f);
        F w[kBlock];
        for (int j = 0; j < kSubs; ++j) {
            const F* sub = x + kSub * j;
            F power = splat(0.0f);
            for (int i = 0; i < kSub; ++i) power += sub[i] * sub[i];
            const F rms = kTwoBits ? splat(0.0f) : square_root(power / 32.0f);
            for (int i = 0; i < kSub; ++i) w[kSub * j + i] = rms + absolute(sub[i]);
        }
        constexpr float kFirst = kMax == 15 ? -1.0f : -0.5f;
        search_subs<kTwoBits>(x, w, kFirst, 0.1f, kPlainSteps, found, scale, min);
        for (int j = 0; j < kSubs; ++j) {
            max_scale = QC_ISA::max(scale[j], max_scale);
            max_min = QC_ISA::max(min[j], max_min);
        }
        constexpr float kLargest = kTop;
        constexpr int kClip = kTwoBits ? 255 : kTop;  // ggml does not clip Q2_K's
        const F inverse_scale = select(max_scale > 0.0f, kLargest / max_scale, splat(0.0f));
        const F inverse_min = select(max_min > 0.0f, kLargest / max_min, splat(0.0f));
        for (int j = 0; j < kSubs; ++j) {
            found.params.scale[j] = QC_ISA::min(nearest_int(inverse_scale * scale[j]) & 255, splat_int(kClip));
            found.params.min[j] = QC_ISA::min(nearest_int(inverse_min * min[j]) & 255, splat_int(kClip));
        }
        found.params.d = to_half(max_scale / kLargest);
        found.params.dmin = to_half(max_min / kLargest);
    }

    QC_FN void search_weighted(const F* x, const F* importance, Found& found) {
        F power = splat(0.0f);
        for (int i = 0; i < kBlock; ++i) power += x[i] * x[i];
        power = (kTwoBits ? 1.0f : 2.0f) * power / 256.0f;
        F scale[kSubs], min[kSubs], total[kSubs], w[kBlock];
        for (int i = 0; i < kBlock; ++i) w[i] = importance[i] * square_root(power + x[i] * x[i]);
        for (int j = 0; j < kSubs; ++j) {
            total[j] = splat(0.0f);
            for (int i = 0; i < kSub; ++i) total[j] += w[kSub * j + i];
        }
        search_subs<false>(x, w, -0.9f, 0.05f, 36, found, scale, min);
        F d, dmin;
        search_scales<kSubs, kTop>(scale, total, found.params.scale, d);
        search_scales<kSubs, kTop>(min, total, found.params.min, dmin);
        found.params.d = to_half(d);
        found.params.dmin = to_half(dmin);
        if (kMax == 31) {  // ggml clips here for Q5_K alone
            for (int j = 0; j < kSubs; ++j) {
                found.params.scale[j] = QC_ISA::min(found.params.scale[j], splat_int(kTop));
                found.params.min[j] = QC_ISA::min(found.params.min[j], splat_int(kTop));
            }
        }
    }

    /// The line of each sub-block.
    template <bool kMad>
    QC_FN void search_subs(const F* x, const F* w, float first, float step, int n_steps, Found& found, F* scale, F* min) {
        for (int j = 0; j < kSubs; j += kLinesAbreast) {
            Line line[kLinesAbreast];
            search_lines<kSub, kMax, kLinesAbreast, kMad>(x + kSub * j, w + kSub * j, first, step, n_steps, line);
            for (int c = 0; c < kLinesAbreast; ++c) {
                scale[j + c] = line[c].scale;
                min[j + c] = negate(line[c].min);
                found.inverse[j + c] = line[c].inverse;
                found.origin[j + c] = line[c].origin;
            }
        }
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        const F d = from_half(found.params.d), dmin = from_half(found.params.dmin);
        for (int j = 0; j < kSubs; ++j) {
            const F scale = d * to_float(found.params.scale[j]);
            const F min = dmin * to_float(found.params.min[j]);
            const Mask vanished = scale == 0.0f;  // ggml then keeps the codes of its search
            for (int i = kSub * j; i < kSub * (j + 1); ++i) codes[i] = clamp_code(nearest_int((x[i] + min) / scale));
            if (!any(vanished)) continue;
            for (int i = kSub * j; i < kSub * (j + 1); ++i) {
                const I searched = clamp_code(nearest_int(found.inverse[j] * (x[i] - found.origin[j])));
                codes[i] = select(vanished, searched, codes[i]);
            }
        }
    }

    QC_FN I clamp_code(I code) { return QC_ISA::max(QC_ISA::min(code, splat_int(kMax)), splat_int(0)); }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        const F d = from_half(params.d), dmin = from_half(params.dmin);
        for (int j = 0; j < kSubs; ++j) {
            const F scale = d * to_float(params.scale[j]);
            const F min = dmin * to_float(params.min[j]);
            for (int i = kSub * j; i < kSub * (j + 1); ++i) x[i] = scale * to_float(codes[i]) - min;
        }
    }
};

}  // namespace quantcli::QC_ISA
