// What the floors hand each other: raw pointers and sizes in, a status out. No Python, no torch.
#pragma once

#include <cstdint>

namespace quantcli {

/// A CPU op cannot fail once its arguments are checked; a CUDA op returns cudaError_t's value.
using Status = int;
constexpr Status kOk = 0;

enum class Float : int { f32 = 0, bf16 = 1, f16 = 2 };

/// ggml's block types: the name that Python uses, and the codec in blocks/ (which blocks/kinds.h includes).
// clang-format off
#define QC_KINDS(X)                                                                           \
    X(q8_0, Q8_0) X(q4_0, Q4_0) X(q4_1, Q4_1) X(q5_0, Q5_0) X(q5_1, Q5_1)                     \
    X(q2_k, Q2_K) X(q3_k, Q3_K) X(q4_k, Q4_K) X(q5_k, Q5_K) X(q6_k, Q6_K)                     \
    X(iq4_nl, IQ4_NL) X(iq4_xs, IQ4_XS)                                                       \
    X(iq3_s, IQ3_S) X(iq3_xxs, IQ3_XXS) X(iq2_xs, IQ2_XS) X(iq2_xxs, IQ2_XXS) X(iq2_s, IQ2_S) \
    X(ggml_mxfp4, MXFP4) X(ggml_nvfp4, NVFP4) X(tq1_0, TQ1_0) X(tq2_0, TQ2_0)
// clang-format on

#define QC_NAME(kind, codec) kind,
enum class Kind : int { QC_KINDS(QC_NAME) };
#undef QC_NAME

/// The sizes and parameters of a codec, for checks: weights and bytes of a block, weights of a sub-block, and which parameters it has.
struct KindInfo {
    const char* name;
    int block, bytes, sub;
    bool has_d, has_scales, signed_scales, has_min, has_offset, needs_importance;
};

/// A weight matrix [rows, cols], contiguous, any of the three float types.
struct Weights {
    const void* data;
    Float dtype;
    int64_t rows, cols;
};

/// A block type's parameters: d, dmin, m [rows, cols / block] IEEE halves; scale (i8 bytes where signed), min [rows, cols / sub]. Null
/// where absent.
struct BlockParams {
    uint16_t* d;
    uint16_t* dmin;
    uint16_t* m;
    uint8_t* scale;
    uint8_t* min;
};

/// One entry an op; `importance` is [cols] or null, `codes` [rows, cols], `blocks` [rows, cols / block · bytes]. `stream` is a
/// cudaStream_t; the CPU ignores it.
struct BlockOps {
    const KindInfo* kinds;
    int n_kinds;
    Status (*quantize)(Kind, Weights, const float* importance, uint8_t* blocks, void* stream);
    Status (*dequantize)(Kind, const uint8_t* blocks, int64_t rows, int64_t cols, float* W, void* stream);
    Status (*fit)(Kind, Weights, const float* importance, BlockParams, void* stream);
    Status (*pack)(Kind, const int8_t* codes, BlockParams, int64_t rows, int64_t cols, uint8_t* blocks, void* stream);
    Status (*unpack)(Kind, const uint8_t* blocks, int64_t rows, int64_t cols, int8_t* codes, BlockParams, void* stream);
};

}  // namespace quantcli
