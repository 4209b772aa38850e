// What the floors hand each other: raw pointers and sizes in, a status out. No Python, no torch.
#pragma once

#include <cstdint>

namespace quantcli {

/// A CPU op cannot fail once its arguments are checked; a CUDA op returns cudaError_t's value.
using Status = int;
constexpr Status kOk = 0;

enum class Float : int { f32 = 0, bf16 = 1, f16 = 2 };

/// ggml's block types, by the names that Python uses.
enum class Kind : int { q8_0 = 0, q4_0, q4_k, q5_k, q6_k };
constexpr const char* kKindNames[] = {"q8_0", "q4_0", "q4_k", "q5_k", "q6_k"};
constexpr int kKinds = 5;

/// Sizes of a block type, for checks: weights and bytes of a block, weights of a sub-block, which parameters there are.
struct KindInfo {
    int block, bytes, sub;
    bool has_scales, has_min;
};
constexpr KindInfo kKindInfo[] = {
    {32, 34, 32, false, false}, {32, 18, 32, false, false},  {256, 144, 32, true, true},
    {256, 176, 32, true, true}, {256, 210, 16, true, false},
};

/// A weight matrix [rows, cols], contiguous, any of the three float types.
struct Weights {
    const void* data;
    Float dtype;
    int64_t rows, cols;
};

/// A block type's parameters: d, dmin [rows, cols / block] IEEE halves; scale (i8 bytes for q6_k), min [rows, cols / sub]. Null where
/// absent.
struct BlockParams {
    uint16_t* d;
    uint16_t* dmin;
    uint8_t* scale;
    uint8_t* min;
};

/// One entry an op; `importance` is [cols] or null, `codes` [rows, cols], `blocks` [rows, cols / block · bytes]. `stream` is a
/// cudaStream_t; the CPU ignores it.
struct BlockOps {
    Status (*quantize)(Kind, Weights, const float* importance, uint8_t* blocks, void* stream);
    Status (*dequantize)(Kind, const uint8_t* blocks, int64_t rows, int64_t cols, float* W, void* stream);
    Status (*fit)(Kind, Weights, const float* importance, BlockParams, void* stream);
    Status (*pack)(Kind, const int8_t* codes, BlockParams, int64_t rows, int64_t cols, uint8_t* blocks, void* stream);
    Status (*unpack)(Kind, const uint8_t* blocks, int64_t rows, int64_t cols, int8_t* codes, BlockParams, void* stream);
};

}  // namespace quantcli
