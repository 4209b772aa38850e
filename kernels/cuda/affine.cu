// Driver of the group fit: a thread is a group, read where it lies; its weights stay in the first cache over the search.
#include "../blocks/affine.h"
#include "solve.h"

namespace quantcli::cuda {
namespace {

constexpr int kThreads = 64;

/// Weights in another basis.
struct Scaled {
    const float* w;
    const float* basis;
    __device__ float operator[](int j) const { return w[j] * basis[j]; }
};

template <class Run>
__device__ AffineBest fit_one(const AffineFit& fit, int64_t index, AffineGroup<Run>& group) {
    const int64_t n_groups = fit.cols / fit.group_size;
    group.h = fit.importance + index % n_groups * fit.group_size;
    group.n = static_cast<int>(fit.group_size);
    group.held = fit.held;
    const AffineBest best = fit_group(group, fit.bits, fit.sym, fit.search);
    fit.scale[index] = best.scale;
    fit.zero[index] = static_cast<int32_t>(best.zero) + (fit.sym ? 1 << (fit.bits - 1) : 0);
    return best;
}

__global__ void fit_groups(AffineFit fit) {
    const int64_t index = thread_index();
    if (index >= fit.rows * (fit.cols / fit.group_size)) return;
    AffineGroup<const float*> group;
    group.w = fit.W + index * fit.group_size;
    fit_one(fit, index, group);
}

__global__ void fit_in_basis(AffineFit fit) {
    const int64_t n_groups = fit.cols / fit.group_size, index = thread_index();
    if (index >= fit.rows * n_groups) return;
    AffineGroup<Scaled> group;
    group.w = {fit.W + index * fit.group_size, fit.basis + index % n_groups * fit.group_size};
    const AffineBest best = fit_one(fit, index, group);
    for (int j = 0; j < group.n; ++j) fit.E[index * fit.group_size + j] = error_at(group, best, j) / group.w.basis[j];
}

}  // namespace

Status fit_affine(const AffineFit& fit, void* stream) {
    const int64_t n = fit.rows * (fit.cols / fit.group_size);
    if (n == 0) return kOk;
    if (fit.basis)
        fit_in_basis<<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(fit);
    else
        fit_groups<<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(fit);
    return cudaGetLastError();
}

}  // namespace quantcli::cuda
