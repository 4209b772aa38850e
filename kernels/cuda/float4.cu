// Drivers of the 4-bit blocks: a thread is a block, and the short one at the end of a tensor is a thread's too.
#include "../blocks/float4.h"
#include "solve.h"

namespace quantcli::cuda {
namespace {

constexpr int kThreads = 128;

/// Weight i of W, whatever its type.
__device__ float weight(const void* W, Float dtype, int64_t i) {
    if (dtype == Float::f32) return static_cast<const float*>(W)[i];
    const I half = static_cast<const uint16_t*>(W)[i];
    return dtype == Float::bf16 ? from_bits(half << 16) : from_half(half);
}

/// The weights of one block: start … end, whole or not.
struct Span {
    int64_t start, end;
    bool is_whole;
    __device__ Span(const Float4& shape, int64_t index) {
        start = index * shape.block;
        is_whole = start + shape.block <= shape.n;
        end = is_whole ? start + shape.block : shape.n;
    }
};

__device__ I code_at(const uint8_t* packed, int64_t i) { return packed[i / 2] >> (i % 2 ? 0 : 4) & 15; }

/// A short block divides by its scale, which is never below 1e-38, where a whole one multiplies by the inverse: so bitsandbytes does.
template <bool kSorted>
__global__ void quantize_blocks(Float4 shape, int64_t n_blocks, const void* W, Float dtype, uint8_t* packed, float* scale) {
    const int64_t index = thread_index();
    if (index >= n_blocks) return;
    const Span span(shape, index);
    F peak = span.is_whole ? 0.0f : 1e-38f;
    for (int64_t i = span.start; i < span.end; ++i) peak = max(peak, absolute(weight(W, dtype, i)));
    scale[index] = peak;
    const F inverse = inverse_of(peak);
    const auto code = [&](int64_t i) {
        const float x = i < span.end ? weight(W, dtype, i) : 0.0f;
        return nearest_level<kSorted>(span.is_whole ? x * inverse : x / peak, shape.book);
    };
    for (int64_t i = span.start; i < span.end; i += 2) packed[i / 2] = static_cast<uint8_t>(code(i) << 4 | code(i + 1));
}

/// A thread a weight: neighbours write neighbours.
__global__ void dequantize_weights(Float4 shape, const uint8_t* packed, const float* scale, float* W) {
    const int64_t i = thread_index();
    if (i < shape.n) W[i] = pick16(shape.book.levels, code_at(packed, i)) * scale[i / shape.block];
}

__global__ void measure_blocks(Float4 shape, int64_t n_blocks, const void* W, Float dtype, const uint8_t* packed, const float* scale,
                               float* error, float* energy) {
    const int64_t index = thread_index();
    if (index >= n_blocks) return;
    const Span span(shape, index);
    F lost = 0.0f, whole = 0.0f;
    for (int64_t i = span.start; i < span.end; ++i) {
        const F x = weight(W, dtype, i), difference = x - pick16(shape.book.levels, code_at(packed, i)) * scale[index];
        lost = lost + difference * difference;
        whole = whole + x * x;
    }
    error[index] = lost;
    energy[index] = whole;
}

int64_t blocks_of(const Float4& shape) { return (shape.n + shape.block - 1) / shape.block; }

Status quantize(const Float4& shape, const void* W, Float dtype, uint8_t* packed, float* scale, void* stream) {
    const int64_t n = blocks_of(shape);
    if (n == 0) return kOk;
    if (shape.book.order)
        quantize_blocks<false><<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(shape, n, W, dtype, packed, scale);
    else
        quantize_blocks<true><<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(shape, n, W, dtype, packed, scale);
    return cudaGetLastError();
}

Status dequantize(const Float4& shape, const uint8_t* packed, const float* scale, float* W, void* stream) {
    if (shape.n == 0) return kOk;
    dequantize_weights<<<blocks_for(shape.n, kThreads), kThreads, 0, stream_of(stream)>>>(shape, packed, scale, W);
    return cudaGetLastError();
}

Status errors(const Float4& shape, const void* W, Float dtype, const uint8_t* packed, const float* scale, float* error, float* energy,
              void* stream) {
    const int64_t n = blocks_of(shape);
    if (n == 0) return kOk;
    measure_blocks<<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(shape, n, W, dtype, packed, scale, error, energy);
    return cudaGetLastError();
}

}  // namespace

extern const Float4Ops float4_ops;
const Float4Ops float4_ops = {quantize, dequantize, errors};

}  // namespace quantcli::cuda
