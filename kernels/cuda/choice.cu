// Driver of the choice among grids: a warp is a row, and a block of warps stays with one block of B, which the first cache then holds.
#include "../blocks/choice.h"
#include "solve.h"

namespace quantcli::cuda {

constexpr int kWarps = 8;
constexpr int kRowsAWarp = 8;

template <int kColumns>
static __global__ void choose_rows(GridChoice choice) {
    GroupChoice<kColumns> group;
    group.lo = choice.lo;
    group.hi = choice.hi;
    enter_block(group, choice.blocks + blockIdx.y * static_cast<int64_t>(kColumns * kColumns));
    const int64_t first = blockIdx.x * static_cast<int64_t>(kWarps * kRowsAWarp) + threadIdx.x / kTeam;
    for (int i = 0; i < kRowsAWarp && first + i * kWarps < choice.rows; ++i) choose_of_row(choice, group, first + i * kWarps, blockIdx.y);
}

Status choose_grid(const GridChoice& choice, void* stream) {
    const int64_t n_groups = choice.cols / choice.group_size;
    if (choice.rows == 0 || n_groups == 0) return kOk;
    const dim3 blocks(blocks_for(choice.rows, kWarps * kRowsAWarp), static_cast<unsigned>(n_groups));
    with_group(choice.group_size,
               [&](auto group) { choose_rows<decltype(group)::kColumns><<<blocks, kWarps * kTeam, 0, stream_of(stream)>>>(choice); });
    return cudaGetLastError();
}

}  // namespace quantcli::cuda
