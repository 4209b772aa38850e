// Driver of the chunks of GPTQ and of the descent: a lane is an output row, its columns stay in the first cache.
#include "../blocks/gptq.h"

#include "solve.h"

namespace quantcli::QC_ISA {
namespace {

/// Quantizes one column of kLanes rows on the grid of the column's group, and keeps the codes. `before`: D's columns in a descent.
template <bool kBook, bool kDescent>
struct Round {
    const GptqChunk& chunk;
    const Rows& rows;
    I* codes;
    const F* before;
    int32_t group = -1;
    F scale{}, offset{};

    void enter(int32_t next) {
        if (next == group) return;
        group = next;
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t at = rows.row[lane] * chunk.n_groups + group;
            scale[lane] = chunk.scale[at];
            if (chunk.offset) offset[lane] = chunk.offset[at];
        }
    }

    F nearest(int j, F x) {
        enter(chunk.group[j]);
        if constexpr (kBook) return round_to_book(x, scale, offset, chunk.book, chunk.mids, chunk.hi + 1, codes[j]);
        return round_affine(x, scale, offset, static_cast<float>(chunk.lo), static_cast<float>(chunk.hi), codes[j]);
    }

    F error(int j, F x) {
        if constexpr (kDescent) return nearest(j, x) - before[j];
        return x - nearest(j, x);
    }
};

void store_codes(const I* codes, const Rows& rows, int n, uint8_t* out) {
    for (int lane = 0; lane < rows.n_lanes; ++lane)
        for (int j = 0; j < n; ++j) out[rows.row[lane] * n + j] = static_cast<uint8_t>(codes[j][lane]);
}

template <bool kBook, bool kDescent>
void solve_all(const GptqChunk& chunk) {
    const int n = static_cast<int>(chunk.n);
    parallel_for(lane_groups(chunk.rows), 4, [&](int64_t begin, int64_t end) {
        const Scratch<F> columns(n), before(kDescent ? n : 0);
        const Scratch<I> codes(n);
        for (int64_t index = begin; index < end; ++index) {
            const Rows rows(index, chunk.rows);
            load_columns(chunk.W, rows, n, 0, n, columns.data);
            if constexpr (kDescent) load_columns(chunk.D, rows, n, 0, n, before.data);
            Round<kBook, kDescent> round{chunk, rows, codes.data, before.data};
            solve_chunk(columns.data, chunk.U, n, round);
            uint8_t* runs[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) runs[lane] = reinterpret_cast<uint8_t*>(chunk.E + rows.row[lane] * n);
            store_runs(columns.data, n, runs, rows.n_lanes);
            store_codes(codes.data, rows, n, chunk.codes);
        }
    });
}

}  // namespace

Status gptq_chunk(const GptqChunk& chunk, void*) {
    if (chunk.D)
        chunk.book ? solve_all<true, true>(chunk) : solve_all<false, true>(chunk);
    else
        chunk.book ? solve_all<true, false>(chunk) : solve_all<false, false>(chunk);
    return kOk;
}

}  // namespace quantcli::QC_ISA
