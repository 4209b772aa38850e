// Driver of the group fit: a thread is a group, read where it lies; its weights stay in the first cache over the search.
#include "../blocks/affine.h"
#include "solve.h"

namespace quantcli::cuda {

constexpr int kThreads = 64;

static __global__ void fit_groups(AffineFit fit) {
    const int64_t n_groups = fit.cols / fit.group_size;
    const int64_t index = thread_index();
    if (index >= fit.rows * n_groups) return;
    AffineGroup<const float*> group;
    group.w = fit.W + index * fit.group_size;
    group.h = fit.importance + index % n_groups * fit.group_size;
    group.n = static_cast<int>(fit.group_size);
    group.held = fit.held;
    const AffineBest best = fit_group(group, fit.bits, fit.sym, fit.search);
    fit.scale[index] = best.scale;
    fit.zero[index] = static_cast<int32_t>(best.zero) + (fit.sym ? 1 << (fit.bits - 1) : 0);
}

Status fit_affine(const AffineFit& fit, void* stream) {
    const int64_t n = fit.rows * (fit.cols / fit.group_size);
    if (n == 0) return kOk;
    fit_groups<<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(fit);
    return cudaGetLastError();
}

}  // namespace quantcli::cuda
