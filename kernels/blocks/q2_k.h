// Q2_K: 256 weights in 16 sub-blocks of 16, w = (d·scale)·q − (dmin·min) with q in 0 … 3 and four-bit scales and minima.
//
//   byte 0                              16                          80      82         84
//        | 16 × (scale[j] | min[j] << 4) | q, paired as in pairs.h  | d f16 | dmin f16 |
#pragma once

#include "affine_k.h"
#include "pairs.h"

namespace quantcli::QC_ISA {

struct Q2_K : AffineK<3, 15, FourBitScales> {
    static constexpr int kBytes = 84;

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        FourBitScales::pack(params, words);
        pack_pairs(words + 4, [&](int i) { return bytes_of(codes[i], codes[i + 1], codes[i + 2], codes[i + 3]); });
        words[20] = pack_halves(params);
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        FourBitScales::unpack(words, params);
        for (int i = 0; i < kBlock; ++i) codes[i] = pair_at(words + 4, i);
        unpack_halves(words[20], params);
    }
};

}  // namespace quantcli::QC_ISA
