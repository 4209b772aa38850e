// Driver of the dense bits: a thread is a run; and the table of the solvers' ops.
#include "../blocks/bits.h"
#include "solve.h"

namespace quantcli::cuda {
namespace {

constexpr int kThreads = 256;

template <class Run>
__global__ void pack_runs(int64_t n_runs, const uint8_t* codes, uint32_t* words) {
    const int64_t i = thread_index();
    if (i < n_runs) Run::pack(codes + i * Run::kCodes, words + i * Run::kWords);
}

template <class Run>
__global__ void unpack_runs(int64_t n_runs, const uint32_t* words, uint8_t* codes) {
    const int64_t i = thread_index();
    if (i < n_runs) Run::unpack(words + i * Run::kWords, codes + i * Run::kCodes);
}

}  // namespace

Status pack_bits(const DenseBits& shape, const uint8_t* codes, uint32_t* words, void* stream) {
    if (shape.rows * shape.n == 0) return kOk;
    with_bit_run(shape.bits, [&](auto run) {
        using Run = decltype(run);
        const int64_t n_runs = shape.rows * shape.n / Run::kCodes;
        pack_runs<Run><<<blocks_for(n_runs, kThreads), kThreads, 0, stream_of(stream)>>>(n_runs, codes, words);
    });
    return cudaGetLastError();
}

Status unpack_bits(const DenseBits& shape, const uint32_t* words, uint8_t* codes, void* stream) {
    if (shape.rows * shape.n == 0) return kOk;
    with_bit_run(shape.bits, [&](auto run) {
        using Run = decltype(run);
        const int64_t n_runs = shape.rows * shape.n / Run::kCodes;
        unpack_runs<Run><<<blocks_for(n_runs, kThreads), kThreads, 0, stream_of(stream)>>>(n_runs, words, codes);
    });
    return cudaGetLastError();
}

extern const SolveOps solve_ops;
const SolveOps solve_ops = {fit_affine, gptq_chunk, choose_grid, pack_bits, unpack_bits};

}  // namespace quantcli::cuda
