// Rows into lanes and back: kLanes contiguous runs of memory become vectors that hold one element of each run.
#pragma once

#include <utility>

#include "../api.h"
#include "../spmd.h"

namespace quantcli::QC_ISA {

/// One stage of a square transpose: swaps the off-diagonal kStep × kStep squares of rows a and b. Each line is one or two shuffles.
template <int kStep, class V, int... k>
QC_FN void exchange(V& a, V& b, std::integer_sequence<int, k...>) {
    const V low = __builtin_shufflevector(a, b, ((k & kStep) ? kLanes + k - kStep : k)...);
    const V high = __builtin_shufflevector(a, b, ((k & kStep) ? kLanes + k : k + kStep)...);
    a = low;
    b = high;
}

template <int kStep, class V>
QC_FN void transpose_stage(V* tile) {
    if constexpr (kStep < kLanes) {
        QC_UNROLL(16)
        for (int i = 0; i < kLanes; ++i)
            if (!(i & kStep)) exchange<kStep>(tile[i], tile[i + kStep], std::make_integer_sequence<int, kLanes>{});
        transpose_stage<kStep * 2>(tile);
    }
}

/// Transposes tile[kLanes] of kLanes elements each, in place.
template <class V>
QC_FN void transpose(V* tile) {
    transpose_stage<1>(tile);
}

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

QC_FN F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

QC_FN I load_halves(const void* p) {
    typedef uint16_t H __attribute__((vector_size(2 * QC_LANES)));
    H h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, I);
}

QC_FN F load(const Bf16* p) { return from_bits(load_halves(p) << 16); }
QC_FN F load(const F16* p) { return from_half(load_halves(p)); }

/// x[i] = element i of each lane's run, i < n; n is a multiple of kLanes.
template <class T>
QC_FN void load_runs(const T* const* runs, int n, F* x) {
    for (int i = 0; i < n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) x[i + lane] = load(runs[lane] + i);
        transpose(x + i);
    }
}

/// The inverse: four bytes at runs[lane] + 4·i = x[i], for the first n_lanes lanes. V is F or I.
template <class V>
QC_FN void store_runs(const V* x, int n, uint8_t* const* runs, int n_lanes) {
    for (int i = 0; i < n; i += kLanes) {
        V tile[kLanes];
        const int n_rows = n - i < kLanes ? n - i : kLanes;
        for (int k = 0; k < kLanes; ++k) tile[k] = k < n_rows ? x[i + k] : V{};
        transpose(tile);
        for (int lane = 0; lane < n_lanes; ++lane) {
            if (n_rows == kLanes)
                std::memcpy(runs[lane] + 4 * i, &tile[lane], sizeof(V));  // one store: the usual case, and a constant size
            else
                std::memcpy(runs[lane] + 4 * i, &tile[lane], 4 * n_rows);
        }
    }
}

}  // namespace quantcli::QC_ISA
