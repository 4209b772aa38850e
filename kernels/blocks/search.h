// ggml's three scale searches, a block a lane. Each follows ggml-quants.c operation by operation (the order of every sum included), with
// its early returns as selects, so that the result is the same to the last bit.
#pragma once

#include "params.h"

namespace quantcli::QC_ISA {

/// Below this a group counts as all zero (ggml's GROUP_MAX_EPS).
constexpr float kTiny = 1e-15f;

/// Beyond ±this, ggml's rounding by the low bits of a float no longer rounds; the codec must then follow the bits.
constexpr float kRoundable = 4194303.0f;

/// nearest_int(v) clamped to lo … hi, as a float.
QC_FN F code_exact(F v, int lo, int hi) { return to_float(max(min(nearest_int(v), splat_int(hi)), splat_int(lo))); }

/// The same for |v| ≤ kRoundable, without leaving floats: clamping the biased sum costs nothing more than clamping the code.
QC_FN F code_fast(F v, int lo, int hi) { return min(max(v + kRound, splat(kRound + lo)), splat(kRound + hi)) - kRound; }

// -- w·(scale·q + min − x)², q = 0 … kMax -----------------------------------------------------------------------------------------

/// x ≈ scale·q + min with min ≤ 0, and the codes of the search: q = round(inverse·(x − origin)).
struct Line {
    F scale, min, inverse, origin;
};

/// Searches run side by side where sums of one alone would wait for their own last addition: on the CPU, whose lanes share a thread.
#ifdef __CUDACC__
constexpr int kLinesAbreast = 1;
#else
constexpr int kLinesAbreast = 2;
#endif

struct LineSums {
    F l, l2, xl;
};

template <int n, int kMax, bool kExact>
QC_FN LineSums line_codes_as(const F* x, const F* w, F inverse, F low, F* codes) {
    LineSums sum = {splat(0.0f), splat(0.0f), splat(0.0f)};
    QC_UNROLL(4)
    for (int i = 0; i < n; ++i) {
        const F v = inverse * (x[i] - low);
        const F l = kExact ? code_exact(v, 0, kMax) : code_fast(v, 0, kMax);
        codes[i] = l;
        const F wl = w[i] * l;
        sum.l += wl;
        sum.l2 += wl * l;
        sum.xl += wl * x[i];
    }
    return sum;
}

template <int n, int kMax>
QC_FN LineSums line_codes(const F* x, const F* w, F inverse, F low, F* codes) {
    return line_codes_as<n, kMax, false>(x, w, inverse, low, codes);
}

/// Out of line: it is rarely needed, and the compiler's time goes with what is inlined.
template <int n, int kMax>
QC_CALL void line_codes_exact(const F* x, const F* w, const F& inverse, const F& low, F* codes, LineSums& sum) {
    sum = line_codes_as<n, kMax, true>(x, w, inverse, low, codes);
}

/// error[c] = Σ w·(scale·q + min − x)² (kMad: the magnitude, not its square) of kN groups, one after another in x, w and codes; their sums
/// grow side by side.
template <int n, int kN, bool kMad>
QC_FN void line_errors(const F* x, const F* w, const F* scale, const F* min, const F* codes, F* error) {
    for (int c = 0; c < kN; ++c) error[c] = splat(0.0f);
    QC_UNROLL(4)
    for (int i = 0; i < n; ++i) {
        QC_UNROLL(4)
        for (int c = 0; c < kN; ++c) {
            const F diff = scale[c] * codes[n * c + i] + min[c] - x[n * c + i];
            error[c] += w[n * c + i] * (kMad ? absolute(diff) : diff * diff);
        }
    }
}

/// Codes and sums of one trial. The float path rounds as nearest_int does only while every v is small, which both ends of the range tell:
/// v is monotone in x, rounding included.
template <int n, int kMax>
QC_FN LineSums line_trial(const F* x, const F* w, F inverse, F low, F lowest, F highest, F* codes) {
    const Mask roundable = (absolute(inverse * (lowest - low)) <= kRoundable) & (absolute(inverse * (highest - low)) <= kRoundable);
    if (all(roundable)) return line_codes<n, kMax>(x, w, inverse, low, codes);
    LineSums sum;
    line_codes_exact<n, kMax>(x, w, inverse, low, codes, sum);
    return sum;
}

/// One group's search between two trials.
struct LineState {
    F low, lowest, highest, sum_w, sum_x, best_error;
    Mask flat;
    Line best;
};

/// Starts the search of a group: its ends and sums, and the codes of the plain spacing.
template <int n, int kMax>
QC_FN void start_line(const F* x, const F* w, LineState& s, F* codes) {
    F low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < n; ++i) {
        low = min(x[i], low);
        high = max(x[i], high);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    low = select(low > 0.0f, splat(0.0f), low);
    s.low = s.lowest = low;
    s.highest = high;
    s.sum_w = sum_w;
    s.sum_x = sum_x;
    s.flat = high <= low;
    s.best.inverse = static_cast<float>(kMax) / select(s.flat, splat(1.0f), high - low);
    s.best.scale = 1.0f / s.best.inverse;
    s.best.origin = low;
    line_trial<n, kMax>(x, w, s.best.inverse, low, low, high, codes);
}

/// make_qkx2_quants and make_qkx3_quants (equal but for their constants) of kN groups, one after another in x and w: tries n_steps + 1
/// spacings, fits scale and min to each.
template <int n, int kMax, int kN, bool kMad = false>
QC_CALL void search_lines(const F* x, const F* w, float first, float step, int n_steps, Line* found) {
    LineState s[kN];
    F codes[kN * n], scale[kN], min[kN], error[kN];
    for (int c = 0; c < kN; ++c) {
        start_line<n, kMax>(x + n * c, w + n * c, s[c], codes + n * c);
        scale[c] = s[c].best.scale;
        min[c] = s[c].low;
    }
    line_errors<n, kN, kMad>(x, w, scale, min, codes, error);
    // A flat block takes no trial's result: no error is below −1.
    for (int c = 0; c < kN; ++c) s[c].best_error = select(s[c].flat, splat(-1.0f), error[c]);

    for (int trial = 0; trial <= n_steps; ++trial) {
        const float spacing = first + step * static_cast<float>(trial) + static_cast<float>(kMax);
        F inverse[kN], determinant[kN];
        for (int c = 0; c < kN; ++c) {
            inverse[c] = spacing / select(s[c].flat, splat(1.0f), s[c].highest - s[c].low);
            const LineSums sum = line_trial<n, kMax>(x + n * c, w + n * c, inverse[c], s[c].low, s[c].lowest, s[c].highest, codes + n * c);
            determinant[c] = s[c].sum_w * sum.l2 - sum.l * sum.l;
            scale[c] = (s[c].sum_w * sum.xl - s[c].sum_x * sum.l) / determinant[c];
            min[c] = (sum.l2 * s[c].sum_x - sum.l * sum.xl) / determinant[c];
            const Mask positive = min[c] > 0.0f;
            if (any(positive)) {
                scale[c] = select(positive, sum.xl / sum.l2, scale[c]);
                min[c] = select(positive, splat(0.0f), min[c]);
            }
        }
        line_errors<n, kN, kMad>(x, w, scale, min, codes, error);
        for (int c = 0; c < kN; ++c) {
            const Mask better = (determinant[c] > 0.0f) & (error[c] < s[c].best_error);
            s[c].best_error = select(better, error[c], s[c].best_error);
            s[c].best.inverse = select(better, inverse[c], s[c].best.inverse);
            s[c].best.origin = select(better, s[c].low, s[c].best.origin);
            s[c].best.scale = select(better, scale[c], s[c].best.scale);
            s[c].low = select(better, min[c], s[c].low);  // and the next trial spans high − low of this one
        }
    }
    for (int c = 0; c < kN; ++c) {
        found[c].scale = select(s[c].flat, splat(0.0f), s[c].best.scale);
        found[c].inverse = select(s[c].flat, splat(0.0f), s[c].best.inverse);
        found[c].origin = s[c].best.origin;
        found[c].min = s[c].low;
    }
}

// -- w·(scale·q − x)², q = −kMax … kMax − 1 -----------------------------------------------------------------------------------------

/// x ≈ scale·q, and the codes of the search: q = round(inverse·x). inverse is 0 where the block counts as all zero.
struct Ray {
    F scale, inverse;
    Mask tiny;
};

struct RaySums {
    F lx, l2;
};

template <int n, int kMax, bool kExact>
QC_FN RaySums ray_sums(const F* x, const F* w, const F* wx, F inverse) {
    RaySums sum = {splat(0.0f), splat(0.0f)};
    QC_UNROLL(8)
    for (int i = 0; i < n; ++i) {
        const F v = inverse * x[i];
        const F l = kExact ? code_exact(v, -kMax, kMax - 1) : code_fast(v, -kMax, kMax - 1);
        sum.lx += wx[i] * l;
        sum.l2 += w[i] * l * l;
    }
    return sum;
}

/// The code that the search gave x, where it was `tiny` or not.
template <int kMax>
QC_FN I ray_code(Mask tiny, F inverse, F x) {
    const I code = max(min(nearest_int(inverse * x), splat_int(kMax - 1)), splat_int(-kMax));
    return select(tiny, splat_int(-kMax), code);
}

/// The same of finite x, whose search leaves 0 as inverse only if tiny.
template <int kMax>
QC_FN I ray_code(F inverse, F x) {
    return ray_code<kMax>(inverse == 0.0f, inverse, x);
}

/// make_qx_quants with rmse_type 1. Finite x need no exact path, for then |inverse·x| < kMax + 1.
template <int n, int kMax, bool kExact = false>
QC_CALL void search_ray(const F* x, const F* w, Ray& found) {
    F peak = splat(0.0f), amax = splat(0.0f);
    F wx[n];
    for (int i = 0; i < n; ++i) {
        const F magnitude = absolute(x[i]);
        const Mask more = magnitude > amax;
        amax = select(more, magnitude, amax);
        peak = select(more, x[i], peak);
        wx[i] = w[i] * x[i];
    }
    const Mask tiny = amax < kTiny;
    peak = select(tiny, splat(1.0f), peak);

    Ray best;
    best.tiny = tiny;
    best.inverse = -static_cast<float>(kMax) / peak;
    RaySums sum = ray_sums<n, kMax, kExact>(x, w, wx, best.inverse);
    best.scale = select(sum.l2 == 0.0f, splat(0.0f), sum.lx / sum.l2);
    F best_score = best.scale * sum.lx;
    for (int trial = -9; trial <= 9; ++trial) {
        if (trial == 0) continue;
        const F inverse = -(static_cast<float>(kMax) + 0.1f * static_cast<float>(trial)) / peak;
        sum = ray_sums<n, kMax, kExact>(x, w, wx, inverse);
        const Mask better = (sum.l2 > 0.0f) & (sum.lx * sum.lx > best_score * sum.l2);
        best.scale = select(better, sum.lx / sum.l2, best.scale);
        best.inverse = select(better, inverse, best.inverse);
        best_score = select(better, best.scale * sum.lx, best_score);
    }
    best.scale = select(tiny, splat(0.0f), best.scale);
    best.inverse = select(tiny, splat(0.0f), best.inverse);
    found = best;
}

// -- the scales of the scales ---------------------------------------------------------------------------------------------------------

/// make_qp_quants: the super-scale of non-negative x[n] with weights w, codes 0 … kMax; these as ggml's bytes (low 8 bits).
template <int n, int kMax>
QC_CALL void search_scales(const F* x, const F* w, I* codes, F& scale_of_scales) {
    F peak = splat(0.0f);
    for (int i = 0; i < n; ++i) peak = max(peak, x[i]);
    const Mask tiny = peak < kTiny;
    peak = select(tiny, splat(1.0f), peak);

    F inverse = static_cast<float>(kMax) / peak;
    F best_error = splat(0.0f);
    const F scale = 1.0f / inverse;
    for (int i = 0; i < n; ++i) {
        const F diff = x[i] - scale * to_float(nearest_int(inverse * x[i]) & 255);
        best_error += w[i] * diff * diff;
    }
    for (int trial = -4; trial <= 4; ++trial) {
        if (trial == 0) continue;
        const F trial_inverse = (0.1f * static_cast<float>(trial) + static_cast<float>(kMax)) / peak;
        const F trial_scale = 1.0f / trial_inverse;
        F error = splat(0.0f);
        for (int i = 0; i < n; ++i) {
            const F diff = x[i] - trial_scale * to_float(min(nearest_int(trial_inverse * x[i]), splat_int(kMax)));
            error += w[i] * diff * diff;
        }
        const Mask better = error < best_error;
        best_error = select(better, error, best_error);
        inverse = select(better, trial_inverse, inverse);
    }

    F sum_lx = splat(0.0f), sum_l2 = splat(0.0f);
    for (int i = 0; i < n; ++i) {
        const I l = min(nearest_int(inverse * x[i]), splat_int(kMax));
        codes[i] = l & 255;
        sum_lx += w[i] * x[i] * to_float(l);
        sum_l2 += w[i] * to_float(l) * to_float(l);
    }
    // Five rounds of coordinate descent, or fewer: a round without a change is the last.
    for (int round = 0; round < 5; ++round) {
        Mask changed = splat_mask(false);
        for (int i = 0; i < n; ++i) {
            const F l = to_float(codes[i]);
            F lx = sum_lx - w[i] * x[i] * l;
            F l2 = sum_l2 - w[i] * l * l;
            const I moved = min(nearest_int(x[i] * l2 / lx), splat_int(kMax));
            const F m = to_float(moved);
            const Mask possible = (lx > 0.0f) & (l2 > 0.0f) & (moved != codes[i]);
            lx += w[i] * x[i] * m;
            l2 += w[i] * m * m;
            const Mask better = possible & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
            codes[i] = select(better, moved & 255, codes[i]);
            sum_lx = select(better, lx, sum_lx);
            sum_l2 = select(better, l2, sum_l2);
            changed = changed | better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < n; ++i) codes[i] = select(tiny, splat_int(0), codes[i]);
    scale_of_scales = select(tiny, splat(0.0f), select(sum_l2 > 0.0f, sum_lx / sum_l2, splat(0.0f)));
}

}  // namespace quantcli::QC_ISA
