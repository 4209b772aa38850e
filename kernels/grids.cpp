// Builds the lists of candidates: which points of a code book may be nearest to weights that round into a cell.
//
// ggml's list of a cell (iq2xs_init_impl, iq3xs_init_impl) holds the points at its n smallest distances, nearest first, equal ones by
// index; the search takes the first of least Σ w·(scale·q − x)². Most of a list can never win. Let a cell's level be 0 on every axis; the
// weight lies within half a level of it, or beyond it where levels end. Then along an axis, whatever the weight in the cell,
//
//   level 0 is no farther than any other, ±k than ±(k + 1) and beyond, and ±k than ∓(k + 1) and beyond,
//
// so a point that is no farther than another along every axis is no farther in all, and stands before it in the list: the other one goes.
// Rounding is monotone, so this holds in floats too, unless a weight lies on the edge of its cell: such weights, and those whose rounding
// overflowed, are given the whole list (grid_search.h).
#include "grids.h"

#include "grid_points.h"

namespace quantcli {
namespace {

constexpr int kMaxRun = 8, kMaxPoints = 1024, kMaxDistance = 4 * 7 * 7;

struct CodeBook {
    const uint16_t* points;
    int n_points, run, n_levels;
    int n_distances;  // how many of the smallest distances make a list

    int bits() const { return 16 / run; }
    int level(int point, int axis) const { return points[point] >> (bits() * axis) & ((1 << bits()) - 1); }
    int cells() const {
        int n = 1;
        for (int axis = 0; axis < run; ++axis) n *= n_levels;
        return n;
    }
    int cell_of(int point) const {
        int cell = 0;
        for (int axis = run; axis-- > 0;) cell = cell * n_levels + level(point, axis);
        return cell;
    }
};

constexpr CodeBook kBooks[kGrids] = {
    {kIQ2_XXS, 256, 8, 3, 2}, {kIQ2_XS, 512, 8, 3, 2}, {kIQ2_S, 1024, 8, 3, 1}, {kIQ3_XXS, 256, 4, 8, 2}, {kIQ3_S, 512, 4, 8, 3},
};

/// Indices of the points in a cell's list.
struct Neighbours {
    int n = 0;
    uint16_t at[kMaxPoints];
};

/// Levels by axis, for distances to many points at once.
struct Axes {
    uint8_t level[kMaxRun][kMaxPoints];

    explicit Axes(const CodeBook& book) {
        for (int axis = 0; axis < book.run; ++axis)
            for (int point = 0; point < book.n_points; ++point) level[axis][point] = static_cast<uint8_t>(book.level(point, axis));
    }
};

void levels_of(const CodeBook& book, int cell, int* levels) {
    for (int axis = 0; axis < book.run; ++axis, cell /= book.n_levels) levels[axis] = cell % book.n_levels;
}

/// The points at the smallest distances from the cell, nearest first, equal ones by index.
void find_neighbours(const CodeBook& book, const Axes& axes, const int* cell, Neighbours& found) {
    uint8_t distance[kMaxPoints] = {};
    for (int axis = 0; axis < book.run; ++axis) {
        for (int point = 0; point < book.n_points; ++point) {
            const int away = axes.level[axis][point] - cell[axis];
            distance[point] = static_cast<uint8_t>(distance[point] + away * away);
        }
    }
    int count[kMaxDistance + 1] = {};
    for (int point = 0; point < book.n_points; ++point) ++count[distance[point]];
    int n_taken = 0, next[kMaxDistance + 1];
    found.n = 0;
    for (int d = 0; d <= kMaxDistance; ++d) {
        const bool is_taken = count[d] && n_taken < book.n_distances;
        next[d] = is_taken ? found.n : -1;
        n_taken += is_taken;
        found.n += is_taken ? count[d] : 0;
    }
    for (int point = 0; point < book.n_points; ++point)
        if (next[distance[point]] >= 0) found.at[next[distance[point]]++] = static_cast<uint16_t>(point);
}

/// Whether `a` is no farther than `b` along every axis, from anywhere in the cell.
bool is_no_farther(const CodeBook& book, const Axes& axes, const int* cell, int a, int b) {
    for (int axis = 0; axis < book.run; ++axis) {
        const int from_a = axes.level[axis][a] - cell[axis], from_b = axes.level[axis][b] - cell[axis];
        const int far_a = from_a < 0 ? -from_a : from_a, far_b = from_b < 0 ? -from_b : from_b;
        if (far_a > far_b || (far_a == far_b && from_a != from_b)) return false;
    }
    return true;
}

void prune(const CodeBook& book, const Axes& axes, const int* cell, Neighbours& found) {
    int kept = 0;
    for (int i = 0; i < found.n; ++i) {
        bool is_needed = true;
        for (int j = 0; j < kept && is_needed; ++j) is_needed = !is_no_farther(book, axes, cell, found.at[j], found.at[i]);
        if (is_needed) found.at[kept++] = found.at[i];
    }
    found.n = kept;
}

/// Calls take(list number, cell, neighbours, is_point) for both lists of every cell.
template <class Take>
void for_each_list(const CodeBook& book, const Axes& axes, const int16_t* point_in, const Take& take) {
    Neighbours found;
    const int n_cells = book.cells();
    for (int cell = 0; cell < n_cells; ++cell) {
        int levels[kMaxRun];
        levels_of(book, cell, levels);
        const bool is_point = point_in[cell] >= 0;
        if (is_point) {
            found.n = 1;
            found.at[0] = static_cast<uint16_t>(point_in[cell]);
        } else {
            find_neighbours(book, axes, levels, found);
        }
        take(n_cells + cell, cell, found, is_point);
        if (!is_point) prune(book, axes, levels, found);
        take(cell, cell, found, is_point);
    }
}

uint32_t groups_of(int n) { return static_cast<uint32_t>((n + kCandidatesAtOnce - 1) / kCandidatesAtOnce); }

GridTable build(const CodeBook& book) {
    const Axes axes(book);
    const int n_cells = book.cells();
    auto* const point_in = new int16_t[2 * n_cells];
    auto* const index = point_in + n_cells;
    auto* const lists = new uint32_t[2 * n_cells];
    for (int cell = 0; cell < n_cells; ++cell) point_in[cell] = -1;
    for (int point = 0; point < book.n_points; ++point) point_in[book.cell_of(point)] = static_cast<int16_t>(point);
    uint32_t end = 0;
    for_each_list(book, axes, point_in, [&](int list, int cell, const Neighbours& found, bool is_point) {
        index[cell] = static_cast<int16_t>(found.at[0]);
        lists[list] = list_of(end, static_cast<uint32_t>(found.n), is_point);
        end += groups_of(found.n);
    });
    auto* const candidates = new uint16_t[end * kCandidatesAtOnce];
    for_each_list(book, axes, point_in, [&](int list, int, const Neighbours& found, bool) {
        uint16_t* const out = candidates + start_of(lists[list]) * kCandidatesAtOnce;
        for (int i = 0; i < static_cast<int>(groups_of(found.n)) * kCandidatesAtOnce; ++i)
            out[i] = book.points[found.at[i < found.n ? i : found.n - 1]];
    });
    return {book.n_points, n_cells, static_cast<int>(end) * kCandidatesAtOnce, book.points, index, lists, candidates};
}

/// Made once, at the first call, and kept until the process ends.
template <Grid grid>
const GridTable& built() {
    static const GridTable table = build(kBooks[static_cast<int>(grid)]);
    return table;
}

}  // namespace

const GridTable& grid_table(Grid grid) {
    switch (grid) {
        case Grid::iq2_xxs:
            return built<Grid::iq2_xxs>();
        case Grid::iq2_xs:
            return built<Grid::iq2_xs>();
        case Grid::iq2_s:
            return built<Grid::iq2_s>();
        case Grid::iq3_xxs:
            return built<Grid::iq3_xxs>();
        default:
            return built<Grid::iq3_s>();
    }
}

}  // namespace quantcli
