// The scale and zero point of one group a lane: quantcli/ops/affine.py says what is searched and why; the order of operations is the same.
#pragma once

#include "../api.h"
#include "../spmd.h"

namespace quantcli::QC_ISA {

/// One group a lane. w[j] is weight j of each lane (F*, or a pointer into a row on CUDA); h[j] the importance of input j.
/// Codes run lo … hi; `zero` counts from 0 of that range, so it stays 0 when symmetric.
template <class Run>
struct AffineGroup {
    Run w;
    const float* h;
    int n;
    Float held;
    bool sym;
    float levels, lo, hi;
    F low, high, peak;  // min(w, 0), max(w, 0), max |w|

    AffineGroup() = default;
};

struct AffineBest {
    F error, scale, zero;
};

/// Candidates judged side by side: enough to hide the latency of division and rounding.
constexpr int kAbreast = 4;

/// round-to-nearest-even of a value within lo … hi, clamped first: the same as clamping after.
QC_FN F nearest_code(F v, float lo, float hi) {
    const F inside = min(max(v, splat(lo)), splat(hi));
    return (inside + kRound) - kRound;
}

template <class Run>
QC_FN void find_ends(AffineGroup<Run>& group) {
    group.low = group.high = splat(0.0f);
    for (int j = 0; j < group.n; ++j) {
        group.low = min(group.low, group.w[j]);
        group.high = max(group.high, group.w[j]);
    }
    group.peak = max(negate(group.low), group.high);
}

/// `scale` as the file's dtype holds it, above zero; 1 where the group is all zeros.
template <class Run>
QC_FN F storable(const AffineGroup<Run>& group, F scale) {
    F held;
    if (group.held == Float::f16) {
        held = max(from_half(to_half(scale)), splat(0x1.0p-24f));
    } else {
        held = max(group.held == Float::bf16 ? round_to_bf16(scale) : scale, splat(0x1.0p-126f));
    }
    return select(group.peak == 0.0f, splat(1.0f), held);
}

/// The zero point that puts code 0 nearest to `low`.
template <class Run>
QC_FN F zero_at(const AffineGroup<Run>& group, F low, F scale) {
    return group.sym ? splat(0.0f) : nearest_code(negate(low) / scale, 0.0f, group.levels);
}

/// Whether no lane's sums of kN candidates are below `bound` any more: they only grow. A NaN might be, so it says no.
template <int kN>
QC_FN bool have_lost(const F* sum, F bound) {
    Mask lost = sum[0] >= bound;
    for (int c = 1; c < kN; ++c) lost = lost & (sum[c] >= bound);
    return all(lost);
}

/// error[c] = Σ h·(w − ŵ)² of kN candidates, or what it is so far once none can be below `bound`.
template <int kN, class Run>
QC_FN void judge(const AffineGroup<Run>& group, const F* scale, const F* zero, F bound, F* error) {
    constexpr int kRunLength = 8;
    F offset[kN], sum[kN];
    for (int c = 0; c < kN; ++c) {
        offset[c] = negate(scale[c] * zero[c]);
        sum[c] = splat(0.0f);
    }
    for (int start = 0; start < group.n && !have_lost<kN>(sum, bound); start += kRunLength) {
        const int end = start + kRunLength < group.n ? start + kRunLength : group.n;
        for (int j = start; j < end; ++j) {
            const F x = group.w[j];
            const F h = splat(group.h[j]);
            QC_UNROLL(4)
            for (int c = 0; c < kN; ++c) {
                const F q = nearest_code((x - offset[c]) / scale[c], group.lo, group.hi);
                const F d = (q * scale[c] + offset[c]) - x;
                sum[c] = sum[c] + (d * d) * h;
            }
        }
    }
    for (int c = 0; c < kN; ++c) error[c] = sum[c];
}

/// The first smallest of `best` and kN candidates in their order; a NaN never wins.
template <int kN, class Run>
QC_FN void improve(const AffineGroup<Run>& group, const F* scale, const F* zero, AffineBest& best) {
    F error[kN];
    judge<kN>(group, scale, zero, best.error, error);
    for (int c = 0; c < kN; ++c) {
        const Mask less = error[c] < best.error;
        best.error = select(less, error[c], best.error);
        best.scale = select(less, scale[c], best.scale);
        best.zero = select(less, zero[c], best.zero);
    }
}

template <class Run>
QC_FN AffineBest minmax(const AffineGroup<Run>& group) {
    const F width = group.sym ? group.peak * 2.0f : group.high - group.low;
    const F scale = storable(group, width / splat(group.levels));
    return {splat(0.0f), scale, zero_at(group, group.low, scale)};
}

template <class Run>
QC_FN void shrink_symmetric(const AffineGroup<Run>& group, AffineBest& best) {
    const F top = group.peak / splat(group.hi);
    double factor = 1.0;
    for (int i = 0; i < 48; i += kAbreast) {
        F scale[kAbreast], zero[kAbreast];
        for (int c = 0; c < kAbreast; ++c, factor *= 0.96) {
            scale[c] = storable(group, top * static_cast<float>(factor));
            zero[c] = splat(0.0f);
        }
        improve<kAbreast>(group, scale, zero, best);
    }
}

template <class Run>
QC_FN void shrink_ends(const AffineGroup<Run>& group, AffineBest& best) {
    const float factors[10] = {1.0f, 0.92f, 0.84f, 0.76f, 0.68f, 0.6f, 0.5f, 0.4f, 0.28f, 0.16f};
    for (int i = 0; i < 100; i += kAbreast) {
        F scale[kAbreast], zero[kAbreast];
        for (int c = 0; c < kAbreast; ++c) {
            const F low = group.low * factors[(i + c) / 10];
            const F high = group.high * factors[(i + c) % 10];
            scale[c] = storable(group, (high - low) / splat(group.levels));
            zero[c] = zero_at(group, low, scale[c]);
        }
        improve<kAbreast>(group, scale, zero, best);
    }
}

template <class Run>
QC_FN void move(const AffineGroup<Run>& group, AffineBest& best) {
    const float factors[12] = {0.8f, 0.84f, 0.88f, 0.91f, 0.94f, 0.97f, 1.0f, 1.03f, 1.06f, 1.1f, 1.15f, 1.2f};
    const AffineBest from = best;
    for (int i = 0; i < 60; i += kAbreast) {
        F scale[kAbreast], zero[kAbreast];
        for (int c = 0; c < kAbreast; ++c) {
            scale[c] = storable(group, from.scale * factors[(i + c) % 12]);
            zero[c] = min(max(from.zero + static_cast<float>((i + c) / 12 - 2), splat(0.0f)), splat(group.levels));
        }
        improve<kAbreast>(group, scale, zero, best);
    }
}

/// The scale of least error for the codes of `best`: Σ h·k·w / Σ h·k² with k = code − zero.
template <class Run>
QC_FN F resolve(const AffineGroup<Run>& group, const AffineBest& best) {
    const F offset = negate(best.scale * best.zero);
    F above = splat(0.0f), below = splat(0.0f);
    for (int j = 0; j < group.n; ++j) {
        const F k = nearest_code((group.w[j] - offset) / best.scale, group.lo, group.hi) - best.zero;
        const F hk = splat(group.h[j]) * k;
        above = above + hk * group.w[j];
        below = below + hk * k;
    }
    const F solved = select(below > 0.0f, above / below, best.scale);
    return select(above > 0.0f, solved, best.scale);
}

template <class Run>
QC_FN AffineBest fit_group(AffineGroup<Run>& group, int bits, bool sym, bool search) {
    group.sym = sym;
    group.levels = static_cast<float>((1 << bits) - 1);
    group.lo = sym ? -static_cast<float>(1 << (bits - 1)) : 0.0f;
    group.hi = group.lo + group.levels;
    find_ends(group);
    AffineBest best = minmax(group);
    if (!search) return best;
    judge<1>(group, &best.scale, &best.zero, splat(INFINITY), &best.error);
    if (sym) {
        shrink_symmetric(group, best);
    } else {
        shrink_ends(group, best);
        move(group, best);
    }
    for (int i = 0; i < 3; ++i) {
        const F scale = storable(group, resolve(group, best));
        const F zero = best.zero;
        improve<1>(group, &scale, &zero, best);
    }
    return best;
}

/// What rounding to `best` leaves of weight j.
template <class Run>
QC_FN F error_at(const AffineGroup<Run>& group, const AffineBest& best, int j) {
    const F offset = negate(best.scale * best.zero);
    const F q = nearest_code((group.w[j] - offset) / best.scale, group.lo, group.hi);
    return group.w[j] - (q * best.scale + offset);
}

}  // namespace quantcli::QC_ISA
