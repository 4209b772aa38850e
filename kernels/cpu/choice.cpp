// Driver of the choice among grids: a block of B stays in the cache while rows pass it.
#include "../blocks/choice.h"

#include "solve.h"

namespace quantcli::QC_ISA {

constexpr int64_t kRowsAtOnce = 32;

Status choose_grid(const GridChoice& choice, void*) {
    const int64_t n_groups = choice.cols / choice.group_size, n_runs = (choice.rows + kRowsAtOnce - 1) / kRowsAtOnce;
    with_group(choice.group_size, [&](auto group) {
        constexpr int kColumns = decltype(group)::kColumns;
        parallel_for(n_groups * n_runs, 1, [&](int64_t begin, int64_t end) {
            for (int64_t index = begin; index < end; ++index) {
                const int64_t g = index / n_runs, first = index % n_runs * kRowsAtOnce;
                const int64_t last = first + kRowsAtOnce < choice.rows ? first + kRowsAtOnce : choice.rows;
                GroupChoice<kColumns> here;
                here.lo = choice.lo;
                here.hi = choice.hi;
                enter_block(here, choice.blocks + g * kColumns * kColumns);
                for (int64_t row = first; row < last; ++row) choose_of_row(choice, here, row, g);
            }
        });
    });
    return kOk;
}

}  // namespace quantcli::QC_ISA
