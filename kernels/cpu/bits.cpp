// Driver of the dense bits, and the table of the solvers' ops.
#include "../blocks/bits.h"

#include "solve.h"

namespace quantcli::QC_ISA {

constexpr int64_t kRunsAtOnce = 4096;

Status pack_bits(const DenseBits& shape, const uint8_t* codes, uint32_t* words, void*) {
    with_bit_run(shape.bits, [&](auto run) {
        using Run = decltype(run);
        parallel_for(shape.rows * shape.n / Run::kCodes, kRunsAtOnce, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) Run::pack(codes + i * Run::kCodes, words + i * Run::kWords);
        });
    });
    return kOk;
}

Status unpack_bits(const DenseBits& shape, const uint32_t* words, uint8_t* codes, void*) {
    with_bit_run(shape.bits, [&](auto run) {
        using Run = decltype(run);
        parallel_for(shape.rows * shape.n / Run::kCodes, kRunsAtOnce, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) Run::unpack(words + i * Run::kWords, codes + i * Run::kCodes);
        });
    });
    return kOk;
}

extern const SolveOps solve_ops;
const SolveOps solve_ops = {fit_affine, gptq_chunk, choose_grid, pack_bits, unpack_bits};

}  // namespace quantcli::QC_ISA
