// Q5_K: 256 weights in 8 sub-blocks, w = (d·scale)·q − (dmin·min) with q in 0 … 31.
//
//   byte 0      2         4                         16                               48                                  176
//        | d f16 | dmin f16 | scales and minima (12) | 32 × fifth bits: bit j = q[32j + i] | low four bits, paired as in Q4_K |
#pragma once

#include "affine_k.h"

namespace quantcli::QC_ISA {

struct Q5_K : AffineK<31, 15, SixBitScales> {
    static constexpr int kBytes = 176;

    QC_FN void pack(const I* codes, const Params& params, I* words) {
        words[0] = pack_halves(params);
        SixBitScales::pack(params, words + 1);
        for (int i = 0; i < 8; ++i) {
            words[4 + i] = splat_int(0);
            for (int j = 0; j < kSubs; ++j) {
                const I* q = codes + 32 * j + 4 * i;
                words[4 + i] |= (shift_right_logical(bytes_of(q[0], q[1], q[2], q[3]), 4) & 0x01010101) << j;
            }
        }
        for (int i = 0; i < 32; ++i) {
            const I* pair = codes + 64 * (i / 8) + 4 * (i % 8);
            const I low = bytes_of(pair[0], pair[1], pair[2], pair[3]) & 0x0f0f0f0f;
            const I high = bytes_of(pair[32], pair[33], pair[34], pair[35]) & 0x0f0f0f0f;
            words[12 + i] = low | high << 4;
        }
    }

    QC_FN void unpack(const I* words, I* codes, Params& params) {
        unpack_halves(words[0], params);
        SixBitScales::unpack(words + 1, params);
        for (int i = 0; i < 128; ++i) {
            const int p = i / 32;
            I* pair = codes + 64 * p + i % 32;
            const I byte = byte_at(words[12 + i / 4], i % 4);
            const I fifth = shift_right_logical(byte_at(words[4 + i % 32 / 4], i % 4), 2 * p);
            pair[0] = (byte & 15) | (fifth & 1) << 4;
            pair[32] = shift_right_logical(byte, 4) | (fifth & 2) << 3;
        }
    }
};

}  // namespace quantcli::QC_ISA
