// Driver of the GPTQ chunk: a lane is an output row, its columns stay in the first cache.
#include "../blocks/gptq.h"

#include "solve.h"

namespace quantcli::QC_ISA {
namespace {

/// Quantizes one column of kLanes rows on the grid of the column's group, and keeps the codes.
template <bool kBook>
struct Round {
    const GptqChunk& chunk;
    const Rows& rows;
    I* codes;
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

    F operator()(int j, F x) {
        enter(chunk.group[j]);
        if constexpr (kBook) return round_to_book(x, scale, offset, chunk.book, chunk.mids, chunk.hi + 1, codes[j]);
        return round_affine(x, scale, offset, static_cast<float>(chunk.lo), static_cast<float>(chunk.hi), codes[j]);
    }
};

void store_codes(const I* codes, const Rows& rows, int n, uint8_t* out) {
    for (int lane = 0; lane < rows.n_lanes; ++lane)
        for (int j = 0; j < n; ++j) out[rows.row[lane] * n + j] = static_cast<uint8_t>(codes[j][lane]);
}

template <bool kBook>
void solve_all(const GptqChunk& chunk) {
    const int n = static_cast<int>(chunk.n);
    parallel_for(lane_groups(chunk.rows), 4, [&](int64_t begin, int64_t end) {
        const Scratch<F> columns(n);
        const Scratch<I> codes(n);
        for (int64_t index = begin; index < end; ++index) {
            const Rows rows(index, chunk.rows);
            load_columns(chunk.W, rows, n, 0, n, columns.data);
            Round<kBook> round{chunk, rows, codes.data};
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
    if (chunk.book)
        solve_all<true>(chunk);
    else
        solve_all<false>(chunk);
    return kOk;
}

}  // namespace quantcli::QC_ISA
