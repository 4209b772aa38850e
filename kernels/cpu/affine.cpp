// Driver of the group fit: a lane is a row, and all lanes stand at the same group, so that importance is one broadcast.
#include "../blocks/affine.h"

#include "solve.h"

namespace quantcli::QC_ISA {
namespace {

void store_fit(const AffineFit& fit, const Rows& rows, int64_t g, const AffineBest& best) {
    const int64_t n_groups = fit.cols / fit.group_size;
    const int middle = fit.sym ? 1 << (fit.bits - 1) : 0;
    for (int lane = 0; lane < rows.n_lanes; ++lane) {
        fit.scale[rows.row[lane] * n_groups + g] = best.scale[lane];
        fit.zero[rows.row[lane] * n_groups + g] = static_cast<int32_t>(best.zero[lane]) + middle;
    }
}

/// E of a group; `weights`, in the basis, are written over with it.
void store_errors(const AffineFit& fit, const Rows& rows, const AffineGroup<const F*>& group, const AffineBest& best, int64_t first,
                  F* weights) {
    for (int j = 0; j < group.n; ++j) weights[j] = error_at(group, best, j) / splat(fit.basis[first + j]);
    uint8_t* runs[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) runs[lane] = reinterpret_cast<uint8_t*>(fit.E + rows.row[lane] * fit.cols + first);
    store_runs(weights, group.n, runs, rows.n_lanes);
}

}  // namespace

Status fit_affine(const AffineFit& fit, void*) {
    const int64_t n_groups = fit.cols / fit.group_size;
    const int n = static_cast<int>(fit.group_size);
    parallel_for(lane_groups(fit.rows), 1, [&](int64_t begin, int64_t end) {
        const Scratch<F> weights(n);
        for (int64_t index = begin; index < end; ++index) {
            const Rows rows(index, fit.rows);
            for (int64_t g = 0; g < n_groups; ++g) {
                load_columns(fit.W, rows, fit.cols, g * n, n, weights.data);
                if (fit.basis)
                    for (int j = 0; j < n; ++j) weights.data[j] = weights.data[j] * fit.basis[g * n + j];
                AffineGroup<const F*> group;
                group.w = weights.data;
                group.h = fit.importance + g * n;
                group.n = n;
                group.held = fit.held;
                const AffineBest best = fit_group(group, fit.bits, fit.sym, fit.search);
                store_fit(fit, rows, g, best);
                if (fit.E) store_errors(fit, rows, group, best, g * n, weights.data);
            }
        }
    });
    return kOk;
}

}  // namespace quantcli::QC_ISA
