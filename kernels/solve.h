// The ops that solvers need, as every instruction set and CUDA offer them.
#pragma once

#include "api.h"

namespace quantcli {

/// A group fit: `group_size` divides cols; `importance` [cols] is at most 1; scale, zero are [rows, cols / group_size]. Scales are numbers
/// that `held` can store. With a basis [cols], above zero, the weights are W·diag(basis), and E [rows, cols] is what rounding leaves of
/// them, over the basis; both null or neither.
struct AffineFit {
    const float* W;
    const float* importance;
    const float* basis;
    int64_t rows, cols, group_size;
    int bits;
    bool sym, search;
    Float held;
    float* scale;
    int32_t* zero;
    float* E;
};

/// A GPTQ chunk: W, E, codes [rows, n], U [n, n], scale, offset [rows, n_groups] (offset null is 0), group [n]; book [hi + 1] with mids
/// [hi] between its entries, or both null. Codes are bytes, signed or not as lo … hi demands. With D [rows, n], the decoded weights so far,
/// it is a chunk of the descent: an error is how far a decoded weight moves from D; null in GPTQ.
struct GptqChunk {
    const float* W;
    const float* U;
    const float* scale;
    const float* offset;
    const int32_t* group;
    const float* book;
    const float* mids;
    const float* D;
    int64_t rows, n, n_groups;
    int lo, hi;
    uint8_t* codes;
    float* E;
};

/// A choice among grids: W [rows, cols], blocks [cols / group_size, group_size, group_size], scale and offset (null is 0)
/// [n_candidates, rows, cols / group_size], best [rows, cols / group_size]; group_size is 32, 64, 128 or 256.
struct GridChoice {
    const float* W;
    const float* blocks;
    const float* scale;
    const float* offset;
    int64_t rows, cols, group_size;
    int n_candidates;
    float lo, hi;
    int32_t* best;
};

/// Dense bits: codes [rows, n], words [rows, n · bits / 32].
struct DenseBits {
    int64_t rows, n;
    int bits;
};

/// `stream` is a cudaStream_t; the CPU ignores it.
struct SolveOps {
    Status (*fit_affine)(const AffineFit&, void* stream);
    Status (*gptq_chunk)(const GptqChunk&, void* stream);
    Status (*choose_grid)(const GridChoice&, void* stream);
    Status (*pack_bits)(const DenseBits&, const uint8_t* codes, uint32_t* words, void* stream);
    Status (*unpack_bits)(const DenseBits&, const uint32_t* words, uint8_t* codes, void* stream);
};

}  // namespace quantcli
