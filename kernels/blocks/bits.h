// One run of dense bits: the shortest row whose codes fill whole words (quantcli/ops/bits.py draws it).
#pragma once

#include "../spmd.h"

namespace quantcli::QC_ISA {

template <int kBits>
struct BitRun {
    static constexpr int kCodes = kBits == 3 ? 32 : 32 / kBits;
    static constexpr int kWords = kCodes * kBits / 32;

    QC_FN void pack(const uint8_t* codes, uint32_t* words) {
        for (int i = 0; i < kWords; ++i) words[i] = 0;
        QC_UNROLL(32)
        for (int i = 0; i < kCodes; ++i) {
            const int word = i * kBits / 32, shift = i * kBits % 32;
            words[word] |= static_cast<uint32_t>(codes[i]) << shift;
            if (shift + kBits > 32) words[word + 1] |= static_cast<uint32_t>(codes[i]) >> (32 - shift);
        }
    }

    QC_FN void unpack(const uint32_t* words, uint8_t* codes) {
        QC_UNROLL(32)
        for (int i = 0; i < kCodes; ++i) {
            const int word = i * kBits / 32, shift = i * kBits % 32;
            uint32_t code = words[word] >> shift;
            if (shift + kBits > 32) code |= words[word + 1] << (32 - shift);
            codes[i] = static_cast<uint8_t>(code & ((1u << kBits) - 1));
        }
    }
};

/// Calls body(BitRun<bits>{}); bits is 2, 3, 4 or 8.
template <class Body>
void with_bit_run(int bits, const Body& body) {
    switch (bits) {
        case 2:
            return body(BitRun<2>{});
        case 3:
            return body(BitRun<3>{});
        case 4:
            return body(BitRun<4>{});
        default:
            return body(BitRun<8>{});
    }
}

}  // namespace quantcli::QC_ISA
