// Driver of the group fit: a lane is a row, and all lanes stand at the same group, so that importance is one broadcast.
#include "../blocks/affine.h"

#include "solve.h"

namespace quantcli::QC_ISA {

Status fit_affine(const AffineFit& fit, void*) {
    const int64_t n_groups = fit.cols / fit.group_size;
    const int n = static_cast<int>(fit.group_size);
    const int middle = fit.sym ? 1 << (fit.bits - 1) : 0;
    parallel_for(lane_groups(fit.rows), 1, [&](int64_t begin, int64_t end) {
        const Scratch<F> weights(n);
        for (int64_t index = begin; index < end; ++index) {
            const Rows rows(index, fit.rows);
            for (int64_t g = 0; g < n_groups; ++g) {
                load_columns(fit.W, rows, fit.cols, g * n, n, weights.data);
                AffineGroup<const F*> group;
                group.w = weights.data;
                group.h = fit.importance + g * n;
                group.n = n;
                group.held = fit.held;
                const AffineBest best = fit_group(group, fit.bits, fit.sym, fit.search);
                for (int lane = 0; lane < rows.n_lanes; ++lane) {
                    fit.scale[rows.row[lane] * n_groups + g] = best.scale[lane];
                    fit.zero[rows.row[lane] * n_groups + g] = static_cast<int32_t>(best.zero[lane]) + middle;
                }
            }
        }
    });
    return kOk;
}

}  // namespace quantcli::QC_ISA
