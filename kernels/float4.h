// Four-bit codes of any sixteen levels, in blocks that share a scale: NF4 and FP4. The table that every instruction set and CUDA fill.
#pragma once

#include "api.h"

namespace quantcli {

/// Sixteen levels and where the nearest one changes. `heap` [16]: the 15 midpoints as a search tree, the children of i at 2·i and 2·i + 1,
/// entry 0 unused; `order` [16]: the code of each level from the lowest up, null where that is 0 … 15; `levels` [16]: by code.
struct Book4 {
    const float* heap;
    const int32_t* order;
    const float* levels;
};

/// n weights in blocks of `block` (a multiple of 32), the last of which may be short; `packed` [(n + 1) / 2], the even weight in the high
/// half of a byte; `scale`, `error`, `energy` [blocks].
struct Float4 {
    int64_t n, block;
    Book4 book;
};

/// One entry an op; `stream` is a cudaStream_t, which the CPU ignores.
struct Float4Ops {
    /// Nearest codes; the scale is the block's largest magnitude.
    Status (*quantize)(const Float4&, const void* W, Float dtype, uint8_t* packed, float* scale, void* stream);
    /// W = level · scale.
    Status (*dequantize)(const Float4&, const uint8_t* packed, const float* scale, float* W, void* stream);
    /// Sums over each block, in order: (w − level · scale)² and w².
    Status (*errors)(const Float4&, const void* W, Float dtype, const uint8_t* packed, const float* scale, float* error, float* energy,
                     void* stream);
};

}  // namespace quantcli
