// The search of ggml's code-book types: the scale of a sub-block, and a point of the code book for each of its runs of weights.
//
// Magnitudes are scale·(2·level + 1). Each trial rounds the weights to levels at another scale, takes for each run the nearest point that
// the code book has, and solves for the scale anew; the best trial is then refined. Operation by operation as in ggml-quants.c, with its
// branches as selects.
#pragma once

#include "nearest.h"
#include "search.h"

namespace quantcli::QC_ISA {

/// A weight nearer than this to the edge of its cell, in levels, gets the whole list of the cell (grids.cpp): far more than rounding moves
/// it by, and rare.
constexpr float kEdge = 1e-4f;

/// Which runs the refinement looks at again: those off the code book; all if one is; all, always.
enum class Refine { off_points, all_if_any, all };

template <class G>
constexpr int kRuns = G::kSub / G::kRun;

/// A sub-block: magnitudes (one of eight negative where an even number of signs is stored and theirs is odd), their weights, and what the
/// trials share.
template <class G>
struct GridWeights {
    F x[G::kSub], w[G::kSub];
    F root[G::kSub];  // √w: neighbours are weighed with it
    F wx[G::kSub];
    F peak;      // largest x
    F farthest;  // largest |x|
    Mask live;   // not all zero
};

/// A sub-block's scale and points. Lanes of `lost` are those for which ggml has no answer and aborts.
template <class G>
struct GridFit {
    F scale;
    I points[kRuns<G>];
    Mask lost;
};

/// The lists of candidates for x at 1/scale = `inverse`, a list a run, list 0 where not `live`; and the cells themselves, as points.
template <class G, bool kExact>
QC_FN void round_to_cells_as(const GridTable& table, const F* x, F inverse, Mask live, I* lists, I* cells) {
    constexpr int top = G::kLevels - 1;
    for (int k = 0; k < kRuns<G>; ++k) {
        F number = splat(0.0f), point = splat(0.0f), edge = splat(1.0f);
        for (int i = G::kRun; i-- > 0;) {
            const F v = 0.5f * (inverse * x[G::kRun * k + i] - 1.0f);
            const F level = kExact ? code_exact(v, 0, top) : code_fast(v, 0, top);
            number = number * static_cast<float>(G::kLevels) + level;
            point = point * static_cast<float>(1 << G::kBits) + level;
            if (!kExact) edge = min(edge, absolute(absolute(v - level) - 0.5f));
        }
        const I list = truncate(number), whole = list + table.n_cells;
        lists[k] = select(live, kExact ? whole : select(edge < kEdge, whole, list), splat_int(0));
        cells[k] = truncate(point);
    }
}

template <class G>
QC_CALL void round_to_cells_exactly(const GridTable& table, const F* x, const F& inverse, const Mask& live, I* lists, I* cells) {
    round_to_cells_as<G, true>(table, x, inverse, live, lists, cells);
}

template <class G>
QC_FN void round_to_cells(const GridTable& table, const GridWeights<G>& sub, F inverse, Mask live, I* lists, I* cells) {
    // What is rounded is at most |inverse·x|/2 + 1.
    if (all(absolute(inverse * sub.farthest) < kRoundable)) return round_to_cells_as<G, false>(table, sub.x, inverse, live, lists, cells);
    round_to_cells_exactly<G>(table, sub.x, inverse, live, lists, cells);
}

/// Σ w·x·q and Σ w·q² with q = 2·level + 1 of the points.
template <class G>
QC_FN RaySums point_sums(const GridWeights<G>& sub, const I* points) {
    RaySums sum = {splat(0.0f), splat(0.0f)};
    for (int i = 0; i < G::kSub; ++i) {
        const I level = shift_right_logical(points[i / G::kRun], G::kBits * (i % G::kRun)) & G::kFieldMask;
        const F q = to_float(level + level + 1);
        sum.lx += sub.wx[i] * q;
        sum.l2 += sub.w[i] * q * q;
    }
    return sum;
}

/// Of eight weights with an odd number of minus signs the one of least w·x² takes the other sign. Returns the sign bits to change.
template <class G>
QC_FN I make_even(const F* x, GridWeights<G>& sub, int start, I signs) {
    I parity = shift_right_logical(signs, start);
    for (int shift = 4; shift; shift /= 2) parity ^= shift_right_logical(parity & 255, shift);
    const Mask odd = (parity & 1) != 0;
    F least = sub.w[start] * x[0] * x[0];
    I at = splat_int(0);
    for (int i = 1; i < 8; ++i) {
        const F power = sub.w[start + i] * x[i] * x[i];
        const Mask less = power < least;
        least = select(less, power, least);
        at = select(less, splat_int(i), at);
    }
    I changed = splat_int(0);
    for (int i = 0; i < 8; ++i) {
        const Mask here = odd & (at == i);
        sub.x[start + i] = select(here, negate(sub.x[start + i]), sub.x[start + i]);
        changed |= select(here, splat_int(static_cast<int32_t>(1u << (start + i))), splat_int(0));
    }
    return changed;
}

/// Splits x, weighted by sub.w, into magnitudes and signs (bit i set: negative), and prepares the search.
template <class G>
QC_FN I prepare_weights(const F* x, GridWeights<G>& sub) {
    I signs = splat_int(0);
    for (int i = 0; i < G::kSub; ++i) {
        sub.x[i] = absolute(x[i]);
        signs |= select(x[i] < 0.0f, splat_int(static_cast<int32_t>(1u << i)), splat_int(0));
    }
    for (int start = 0; G::kEvenSigns && start < G::kSub; start += 8) signs ^= make_even<G>(x + start, sub, start, signs);
    sub.peak = sub.x[0];
    sub.farthest = splat(0.0f);
    for (int i = 0; i < G::kSub; ++i) {
        sub.root[i] = square_root(sub.w[i]);
        sub.wx[i] = sub.w[i] * sub.x[i];
        sub.peak = max(sub.peak, sub.x[i]);
        sub.farthest = max(sub.farthest, absolute(sub.x[i]));
    }
    sub.live = G::kLeastPeak > 0.0f ? sub.peak >= G::kLeastPeak : sub.peak != 0.0f;
    return signs;
}

/// Tries scales around reach / kWidth, which fit.scale stands for where none will do. Leaves the best one's inverse, 0 where none would.
template <class G>
QC_CALL void try_scales(const GridTable& table, const GridWeights<G>& sub, const F& reach, GridFit<G>& fit, F& best_inverse) {
    F best = splat(0.0f);
    best_inverse = splat(0.0f);
    for (int k = 0; k < kRuns<G>; ++k) fit.points[k] = splat_int(0);
    const F width = select(sub.live, reach, splat(1.0f));
    for (int trial = -G::kSteps; trial <= G::kSteps; ++trial) {
        const F inverse = (static_cast<float>(G::kWidth) + static_cast<float>(trial) * G::kStep) / width;
        I lists[kRuns<G>], cells[kRuns<G>], found[kRuns<G>];
        round_to_cells<G>(table, sub, inverse, sub.live, lists, cells);
        nearest_points<G, kRuns<G>>(table, sub.x, sub.root, 1.0f / inverse, lists, found, fit.lost);
        const RaySums sum = point_sums<G>(sub, found);
        const Mask better = (sum.l2 > 0.0f) & (sum.lx * sum.lx > best * sum.l2);
        fit.scale = select(better, sum.lx / sum.l2, fit.scale);
        best = select(better, fit.scale * sum.lx, best);
        best_inverse = select(better, inverse, best_inverse);
        for (int k = 0; k < kRuns<G>; ++k) fit.points[k] = select(better, found[k], fit.points[k]);
    }
}

/// Which runs are to be found again: those whose weights the best trial rounded into cells that are no points, and what goes with them.
template <class G>
QC_FN void runs_to_refine(const GridTable& table, const GridWeights<G>& sub, const GridFit<G>& fit, F best_inverse, Mask* again) {
    if (G::kRefine == Refine::all) {
        for (int k = 0; k < kRuns<G>; ++k) again[k] = splat_mask(true);
        return;
    }
    // Where no trial would do, ggml counts all runs as points, but for IQ3_S, where none is one.
    const Mask settled = best_inverse != 0.0f;
    I lists[kRuns<G>], cells[kRuns<G>];
    round_to_cells<G>(table, sub, best_inverse, sub.live, lists, cells);
    for (int k = 0; k < kRuns<G>; ++k) again[k] = settled & (cells[k] != fit.points[k]);
    if (G::kRefine != Refine::all_if_any) return;
    Mask some = best_inverse == 0.0f;
    for (int k = 0; k < kRuns<G>; ++k) some = some | again[k];
    for (int k = 0; k < kRuns<G>; ++k) again[k] = some;
}

/// Finds the points once more, at the scale of the best trial.
template <class G>
QC_CALL void refine(const GridTable& table, const GridWeights<G>& sub, const F& best_inverse, GridFit<G>& fit) {
    Mask again[kRuns<G>];
    runs_to_refine<G>(table, sub, fit, best_inverse, again);
    const Mask positive = sub.live & (fit.scale > 0.0f);
    Mask some = positive & again[0];
    for (int k = 1; k < kRuns<G>; ++k) some = some | (positive & again[k]);
    if (!any(some)) return;
    const F scale = select(some, fit.scale, splat(1.0f));
    I lists[kRuns<G>], cells[kRuns<G>], found[kRuns<G>];
    round_to_cells<G>(table, sub, 1.0f / scale, some, lists, cells);
    for (int k = 0; k < kRuns<G>; ++k) lists[k] = select(again[k], lists[k], splat_int(0));
    nearest_points<G, kRuns<G>>(table, sub.x, sub.root, scale, lists, found, fit.lost);
    for (int k = 0; k < kRuns<G>; ++k) fit.points[k] = select(some & again[k], found[k], fit.points[k]);
    const RaySums sum = point_sums<G>(sub, fit.points);
    fit.scale = select(some & (sum.l2 > 0.0f), sum.lx / sum.l2, fit.scale);
}

/// The whole search of a sub-block. Returns the scale, not below zero, and turns all signs where it was.
template <class G>
QC_FN void search_points(const GridTable& table, GridWeights<G>& sub, F reach, F start, GridFit<G>& fit, I& signs) {
    fit.scale = start;
    fit.lost = splat_mask(false);
    F best_inverse;
    try_scales<G>(table, sub, reach, fit, best_inverse);
    refine<G>(table, sub, best_inverse, fit);
    signs ^= select(fit.scale < 0.0f, splat_int(-1), splat_int(0));
    fit.scale = absolute(fit.scale);
    fit.lost = sub.live & (fit.lost | (fit.scale != fit.scale));
    fit.scale = select(sub.live, fit.scale, splat(0.0f));
    signs = select(sub.live, signs, splat_int(0));
}

}  // namespace quantcli::QC_ISA
