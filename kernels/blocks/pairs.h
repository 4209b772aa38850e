// How the 256-weight types of 2 and 3 bits lay out two bits of each code: a byte holds those of codes 32 apart.
//
//   2 × 32 × (pair[i] | pair[i+32] << 2 | pair[i+64] << 4 | pair[i+96] << 6), i < 32, of each half of 128
#pragma once

#include "params.h"

namespace quantcli::QC_ISA {

/// four(i) is a word of the pairs of codes i … i + 3, a byte each.
template <class Four>
QC_FN void pack_pairs(I* words, const Four& four) {
    for (int i = 0; i < 16; ++i) {
        words[i] = splat_int(0);
        for (int k = 0; k < 4; ++k) words[i] |= four(128 * (i / 8) + 32 * k + 4 * (i % 8)) << (2 * k);
    }
}

/// The pair of code i.
QC_FN I pair_at(const I* words, int i) {
    return shift_right_logical(byte_at(words[8 * (i / 128) + i % 32 / 4], i % 4), i % 128 / 32 * 2) & 3;
}

}  // namespace quantcli::QC_ISA
