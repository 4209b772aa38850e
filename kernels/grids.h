// The code books of ggml's IQ2 and IQ3 types, and for every point of the lattice around them which points may be nearest.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QC_ANYWHERE __host__ __device__
#else
#define QC_ANYWHERE
#endif

namespace quantcli {

enum class Grid : int { iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s };
constexpr int kGrids = 5;

/// Candidates are looked at in groups of this many: each list is filled up to a whole number of them with its last one.
constexpr int kCandidatesAtOnce = 8;

/// One code book. A point is a run of 4 or 8 levels (levels 0 … 7 or 0 … 2), packed into 16 bits from the lowest up. A cell is any run of
/// levels, numbered Σ level[i]·n_levelsⁱ; most are no points.
struct GridTable {
    int n_points, n_cells, n_candidates;
    const uint16_t* points;
    const int16_t* index;        // [n_cells] the point in a cell, or else the one nearest to it
    const uint32_t* lists;       // [2 · n_cells] see list_of; for each cell a pruned list, then for each the whole one
    const uint16_t* candidates;  // points, list by list
};

/// A list: where it starts (in groups), its length, and whether its cell is a point itself, which then is all there is in it.
QC_ANYWHERE constexpr uint32_t list_of(uint32_t start, uint32_t n, bool is_point) { return start << 10 | n << 1 | is_point; }
QC_ANYWHERE constexpr uint32_t start_of(uint32_t list) { return list >> 10; }
QC_ANYWHERE constexpr uint32_t length_of(uint32_t list) { return list >> 1 & 511; }
QC_ANYWHERE constexpr bool is_point(uint32_t list) { return list & 1; }

/// The table of a code book, made when first asked for.
const GridTable& grid_table(Grid grid);

}  // namespace quantcli
