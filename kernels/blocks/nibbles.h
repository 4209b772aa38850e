// How the 32-weight types of 4 and 5 bits lay out their codes q, all at or above zero:
//
//   5 bits only:  4 bytes, bit i = fifth bit of q[i]
//   both:         16 × (q[i] low four bits | q[i+16] low four bits << 4)
#pragma once

#include "params.h"

namespace quantcli::QC_ISA {

template <int kBits>
QC_FN void pack_nibbles(const I* q, I* words) {
    if (kBits == 5) {
        *words = splat_int(0);
        QC_UNROLL(32)
        for (int i = 0; i < 32; ++i) *words |= (shift_right_logical(q[i], 4) & 1) << i;
        ++words;
    }
    for (int i = 0; i < 16; i += 4) {
        const I low = bytes_of(q[i], q[i + 1], q[i + 2], q[i + 3]) & 0x0f0f0f0f;
        words[i / 4] = low | (bytes_of(q[i + 16], q[i + 17], q[i + 18], q[i + 19]) & 0x0f0f0f0f) << 4;
    }
}

template <int kBits>
QC_FN void unpack_nibbles(const I* words, I* q) {
    const I* low = kBits == 5 ? words + 1 : words;
    for (int i = 0; i < 16; ++i) {
        const I byte = byte_at(low[i / 4], i % 4);
        q[i] = byte & 15;
        q[i + 16] = shift_right_logical(byte, 4);
    }
    if (kBits == 5)
        for (int i = 0; i < 32; ++i) q[i] |= (shift_right_logical(words[0], i) & 1) << 4;
}

}  // namespace quantcli::QC_ISA
