// Q4_K: 256 weights in 8 sub-blocks, w = (d·scale)·q − (dmin·min) with q in 0 … 15.
//
//   byte 0      2         4                         16                                                    144
//        | d f16 | dmin f16 | scales and minima (12) | 4 × 32 × (q[64p + i] | q[64p + 32 + i] << 4), p = 0 … 3 |
#pragma once

#include "affine_k.h"

namespace quantcli::QC_ISA {

struct Q4_K : AffineK<15, 20, SixBitScales> {
    static constexpr int kBytes = 144;

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        words[0] = pack_halves(params);
        SixBitScales::pack(params, words + 1);
        for (int i = 0; i < 32; ++i) {
            const I* pair = codes + 64 * (i / 8) + 4 * (i % 8);
            words[4 + i] = bytes_of(pair[0], pair[1], pair[2], pair[3]) | bytes_of(pair[32], pair[33], pair[34], pair[35]) << 4;
        }
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        unpack_halves(words[0], params);
        SixBitScales::unpack(words + 1, params);
        for (int i = 0; i < 128; ++i) {
            I* pair = codes + 64 * (i / 32) + i % 32;
            const I byte = byte_at(words[4 + i / 4], i % 4);
            pair[0] = byte & 15;
            pair[32] = shift_right_logical(byte, 4);
        }
    }
};

}  // namespace quantcli::QC_ISA
