// IQ4_NL and IQ4_XS: 4-bit codes of sixteen fixed levels. IQ4_NL is a block of 32 weights, w = d·level[q]; IQ4_XS is 8 of these with a
// six-bit scale each, −32 … 31: w = (d·scale)·level[q].
//
//   IQ4_NL   byte 0      2                  18
//                 | d f16 | q as in nibbles.h |
//   IQ4_XS   byte 0      2                         4                        8                      136
//                 | d f16 | scale + 32, high 2 bits | low 4 bits, 2 in a byte | 8 × q as in nibbles.h |
#pragma once

#include "nibbles.h"
#include "search.h"

namespace quantcli::QC_ISA {

/// Level k, and where the nearest level changes from k to k + 1.
QC_FN float level(int k) {
    constexpr int8_t kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    return kLevels[k];
}
QC_FN float middle(int k) { return 0.5f * (level(k) + level(k + 1)); }

/// The index of the level nearest to v, the upper of two equally near. NaN gives the last, as ggml's bisection does.
QC_FN I level_index(F v) {
    I index = splat_int(15);
    QC_UNROLL(15)
    for (int k = 0; k < 15; ++k) index -= select(v < middle(k), splat_int(1), splat_int(0));
    return index;
}

QC_FN F level_at(I index) {
#ifdef QC_HAS_LOOKUP
    constexpr float kLow[8] = {-127, -104, -83, -65, -49, -35, -22, -10}, kHigh[8] = {1, 13, 25, 38, 53, 69, 89, 113};
    return select(index > 7, lookup(kHigh, index), lookup(kLow, index));
#else
    F found = splat(level(0));
    QC_UNROLL(15)
    for (int k = 1; k < 16; ++k) found = select(index == k, splat(level(k)), found);
    return found;
#endif
}

/// The level nearest to v.
QC_FN F nearest_level(F v) {
#ifdef QC_HAS_LOOKUP
    // The quarter of the levels by comparing, then where to compare by looking up.
    constexpr float kHalves[8] = {-93.5f, -28.5f, 19.0f, 79.0f}, kPairs[8] = {-115.5f, -74.0f, -42.0f, -16.0f, 7.0f, 31.5f, 61.0f, 101.0f};
    constexpr float kLower[8] = {-127, -83, -49, -22, 1, 25, 53, 89}, kUpper[8] = {-104, -65, -35, -10, 13, 38, 69, 113};
    const I quarter = -((v >= middle(3)) + (v >= middle(7)) + (v >= middle(11)));
    const I pair = quarter + quarter - (v >= lookup(kHalves, quarter));
    return select(v >= lookup(kPairs, pair), lookup(kUpper, pair), lookup(kLower, pair));
#else
    F found = splat(level(0));
    QC_UNROLL(15)
    for (int k = 0; k < 15; ++k) found += select(v >= middle(k), splat(level(k + 1) - level(k)), splat(0.0f));
    return found;
#endif
}

QC_FN RaySums level_sums(const F* x, const F* w, F inverse) {
    RaySums sum = {splat(0.0f), splat(0.0f)};
    QC_UNROLL(4)
    for (int i = 0; i < 32; ++i) {
        const F l = nearest_level(inverse * x[i]);
        const F wl = w[i] * l;
        sum.lx += wl * x[i];
        sum.l2 += wl * l;
    }
    return sum;
}

/// The scale of least Σ w·(scale·level − x)² for x[32]: the best of 16 spacings that put the extreme weight near the first level. 0 where
/// the weights count as all zero.
QC_CALL void search_levels(const F* x, const F* w, F& found) {
    F peak = splat(0.0f), amax = splat(0.0f);
    for (int i = 0; i < 32; ++i) {
        const Mask more = absolute(x[i]) > amax;
        amax = select(more, absolute(x[i]), amax);
        peak = select(more, x[i], peak);
    }
    const Mask tiny = amax < kTiny;
    peak = select(tiny, splat(1.0f), peak);

    constexpr float kFirst = -127.0f;
    RaySums sum = level_sums(x, w, 1.0f / (negate(peak) / kFirst));
    F scale = select(sum.l2 > 0.0f, sum.lx / sum.l2, splat(0.0f));
    F best_score = scale * sum.lx;
    for (int trial = -7; trial <= 7; ++trial) {
        sum = level_sums(x, w, (static_cast<float>(trial) + kFirst) / peak);
        const Mask better = (sum.l2 > 0.0f) & (sum.lx * sum.lx > best_score * sum.l2);
        scale = select(better, sum.lx / sum.l2, scale);
        best_score = select(better, scale * sum.lx, best_score);
    }
    found = select(tiny, splat(0.0f), scale);
}

/// What weighs each error of x[n]: with importance, that times what is left of a weight of its own size; else the weight's square.
template <int n>
QC_FN void level_weights(const F* x, const F* importance, F* w) {
    F power = splat(0.0f);
    for (int i = 0; i < n; ++i) power += x[i] * x[i];
    power *= 2.0f / n;
    for (int i = 0; i < n; ++i) w[i] = importance ? importance[i] * square_root(power + x[i] * x[i]) : x[i] * x[i];
}

QC_FN F inverse_of(F scale) { return select(scale == 0.0f, splat(0.0f), 1.0f / scale); }

struct IQ4_NL : Codec {
    static constexpr int kBlock = 32, kSub = 32, kBytes = 18;
    static constexpr int kHead = 2;

    QC_FN void search(const F* x, const F* importance, const F*, Found* found) {
        F w[kBlock], scale;
        level_weights<kBlock>(x, importance, w);
        search_levels(x, w, scale);
        found->params.d = to_half(scale);
        found->inverse[0] = inverse_of(scale);
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        for (int i = 0; i < kBlock; ++i) codes[i] = level_index(found.inverse[0] * x[i]);
    }

    QC_FN void pack(const I* codes, const Params&, I* words) { pack_nibbles<4>(codes, words); }
    QC_FN void unpack(const I* words, I* codes, Params&) { unpack_nibbles<4>(words, codes); }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        const F d = from_half(params.d);
        for (int i = 0; i < kBlock; ++i) x[i] = d * level_at(codes[i]);
    }
};

struct IQ4_XS : Codec {
    static constexpr int kBlock = 256, kSub = 32, kSubs = 8, kBytes = 136;
    static constexpr bool kHasScales = true, kSignedScales = true;

    QC_FN void search(const F* x, const F* importance, const F*, Found* found) {
        F w[kBlock], scale[kSubs];
        level_weights<kBlock>(x, importance, w);
        F peak = splat(0.0f), amax = splat(0.0f);
        for (int j = 0; j < kSubs; ++j) {
            search_levels(x + kSub * j, w + kSub * j, scale[j]);
            const Mask more = absolute(scale[j]) > amax;
            amax = select(more, absolute(scale[j]), amax);
            peak = select(more, scale[j], peak);
        }
        const F d = negate(peak) / 32.0f;
        found->params.d = to_half(d);
        const F inverse = inverse_of(d);
        for (int j = 0; j < kSubs; ++j) {
            const I code = max(min(nearest_int(inverse * scale[j]), splat_int(31)), splat_int(-32));
            found->params.scale[j] = code;
            found->inverse[j] = inverse_of(d * to_float(code));
        }
    }

    QC_FN void encode(const F* x, const Found& found, I* codes) {
        for (int i = 0; i < kBlock; ++i) codes[i] = level_index(found.inverse[i / kSub] * x[i]);
    }

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        words[0] = params.d & 0xffff;
        words[1] = splat_int(0);
        for (int j = 0; j < kSubs; ++j) {
            const I raw = params.scale[j] + 32;
            words[0] |= shift_right_logical(raw, 4) << (16 + 2 * j);
            words[1] |= (raw & 15) << (4 * j);
            pack_nibbles<4>(codes + kSub * j, words + 2 + 4 * j);
        }
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        params.d = words[0] & 0xffff;
        for (int j = 0; j < kSubs; ++j) {
            const I high = shift_right_logical(words[0], 16 + 2 * j) & 3, low = shift_right_logical(words[1], 4 * j) & 15;
            params.scale[j] = (low | high << 4) - 32;
            unpack_nibbles<4>(words + 2 + 4 * j, codes + kSub * j);
        }
    }

    QC_FN void decode(const I* codes, const Params& params, F* x) {
        decode_scaled<IQ4_XS>(codes, params, x, [](const I& code) { return level_at(code); });
    }
};

}  // namespace quantcli::QC_ISA
