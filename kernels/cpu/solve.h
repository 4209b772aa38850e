// What the solvers' CPU drivers share: rows of any length into lanes, and scratch for them.
#pragma once

#include "../solve.h"
#include "lanes.h"
#include "threads.h"

namespace quantcli::QC_ISA {

Status fit_affine(const AffineFit&, void* stream);
Status gptq_chunk(const GptqChunk&, void* stream);
Status choose_grid(const GridChoice&, void* stream);
Status pack_bits(const DenseBits&, const uint8_t* codes, uint32_t* words, void* stream);
Status unpack_bits(const DenseBits&, const uint32_t* words, uint8_t* codes, void* stream);

/// n vectors on the heap: a chunk or a group may be as long as a row.
template <class V>
struct Scratch {
    explicit Scratch(int64_t n) : data(new V[n]) {}
    ~Scratch() { delete[] data; }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    V* const data;
};

/// kLanes consecutive rows; lanes past the last row repeat it and are not stored.
struct Rows {
    int64_t row[kLanes];
    int n_lanes;

    Rows(int64_t index, int64_t n_rows) {
        const int64_t left = n_rows - index * kLanes;
        n_lanes = static_cast<int>(left < kLanes ? left : kLanes);
        for (int lane = 0; lane < kLanes; ++lane) row[lane] = index * kLanes + (lane < n_lanes ? lane : n_lanes - 1);
    }
};

inline int64_t lane_groups(int64_t n_rows) { return (n_rows + kLanes - 1) / kLanes; }

/// x[i] = W[row][start + i] of each lane, i < n, for rows of `stride` weights. n is arbitrary: nothing is read past a run's end.
QC_FN void load_columns(const float* W, const Rows& rows, int64_t stride, int64_t start, int n, F* x) {
    const float* runs[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) runs[lane] = W + rows.row[lane] * stride + start;
    const int whole = n / kLanes * kLanes;
    load_runs(runs, whole, x);
    for (int i = whole; i < n; ++i)
        for (int lane = 0; lane < kLanes; ++lane) x[i][lane] = runs[lane][i];
}

}  // namespace quantcli::QC_ISA
