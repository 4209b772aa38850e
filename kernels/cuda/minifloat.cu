// Drivers of the small floats: a thread is a weight, or a group of E2M1; a warp is a run that absmax is taken of.
#include "../blocks/minifloat.h"
#include "solve.h"

namespace quantcli::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kMaxGroup = 32;

__device__ float weight_at(const Weights& W, int64_t i) {
    if (W.dtype == Float::f32) return static_cast<const float*>(W.data)[i];
    const I bits16 = static_cast<const uint16_t*>(W.data)[i];
    return W.dtype == Float::bf16 ? from_bits(bits16 << 16) : from_half(bits16);
}

__device__ float scale_at(const Tiles& tiles, int64_t i, int64_t cols) {
    const int64_t across = (cols + tiles.cols - 1) / tiles.cols;
    return tiles.scale[i / cols / tiles.rows * across + i % cols / tiles.cols];
}

__global__ void absmax_runs(Weights W, int64_t width, float* absmax) {
    const int64_t across = (W.cols + width - 1) / width, run = thread_index() / kWarp;
    if (run >= W.rows * across) return;
    const int64_t start = run % across * width, row = run / across * W.cols;
    const int64_t stop = start + width < W.cols ? start + width : W.cols;
    I most = 0;  // magnitudes compare as integers, and NaN is above infinity
    for (int64_t i = start + threadIdx.x % kWarp; i < stop; i += kWarp) most = max(most, bits(absolute(weight_at(W, row + i))));
    for (int apart = kWarp / 2; apart; apart /= 2) most = max(most, __shfl_xor_sync(0xffffffff, most, apart));
    if (threadIdx.x % kWarp == 0) absmax[run] = from_bits(most);
}

template <class Format>
__global__ void encode_weights(Weights W, Tiles tiles, uint8_t* data) {
    const int64_t i = thread_index();
    if (i < W.rows * W.cols) data[i] = static_cast<uint8_t>(Format::encode(weight_at(W, i) / scale_at(tiles, i, W.cols)));
}

template <class Format>
__global__ void decode_weights(const uint8_t* data, int64_t n, int64_t cols, Tiles tiles, float* W) {
    const int64_t i = thread_index();
    if (i < n) W[i] = Format::decode(data[i]) * scale_at(tiles, i, cols);
}

__global__ void encode_groups(Weights W, const float* step, int64_t group, uint8_t* packed) {
    const int64_t i = thread_index();
    if (i >= W.rows * W.cols / group) return;
    for (int64_t k = 0; k < group; k += 2) {
        const I low = encode_e2m1(weight_at(W, i * group + k) / step[i]), high = encode_e2m1(weight_at(W, i * group + k + 1) / step[i]);
        packed[(i * group + k) / 2] = static_cast<uint8_t>(low | high << 4);
    }
}

__global__ void decode_pairs(const uint8_t* packed, int64_t n_pairs, const float* step, int64_t group, float* W) {
    const int64_t i = thread_index();
    if (i >= n_pairs) return;
    const float s = step[2 * i / group];
    W[2 * i] = decode_e2m1(packed[i]) * s;
    W[2 * i + 1] = decode_e2m1(packed[i] >> 4) * s;
}

template <Scaled4 kFormat>
__global__ void fit_groups(ScaleFit fit) {
    const int64_t i = thread_index(), across = fit.W.cols / fit.group;
    if (i >= fit.W.rows * across) return;
    F x[kMaxGroup], weight[kMaxGroup];
    const int n = static_cast<int>(fit.group);
    for (int k = 0; k < n; ++k) x[k] = weight_at(fit.W, i * n + k);
    if (fit.importance)
        for (int k = 0; k < n; ++k) weight[k] = fit.importance[i % across * n + k];
    const I start = fit.start[i];
    const I best = fit.importance ? best_byte<kFormat, true>(x, weight, n, start, fit.global_scale, fit.first, fit.last)
                                  : best_byte<kFormat, false>(x, weight, n, start, fit.global_scale, fit.first, fit.last);
    fit.found[i] = static_cast<uint8_t>(best);
}

Status run_absmax(Weights W, int64_t width, float* absmax, void* stream) {
    const int64_t n_runs = W.rows * ((W.cols + width - 1) / width);
    if (n_runs) absmax_runs<<<blocks_for(n_runs * kWarp, kThreads), kThreads, 0, stream_of(stream)>>>(W, width, absmax);
    return cudaGetLastError();
}

Status quantize_fp8(Float8 format, Weights W, Tiles tiles, uint8_t* data, void* stream) {
    const int64_t n = W.rows * W.cols;
    if (n == 0) return kOk;
    if (format == Float8::e4m3)
        encode_weights<E4M3><<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(W, tiles, data);
    else
        encode_weights<E5M2><<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(W, tiles, data);
    return cudaGetLastError();
}

Status dequantize_fp8(Float8 format, const uint8_t* data, int64_t rows, int64_t cols, Tiles tiles, float* W, void* stream) {
    const int64_t n = rows * cols;
    if (n == 0) return kOk;
    if (format == Float8::e4m3)
        decode_weights<E4M3><<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(data, n, cols, tiles, W);
    else
        decode_weights<E5M2><<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(data, n, cols, tiles, W);
    return cudaGetLastError();
}

Status quantize_fp4(Weights W, const float* step, int64_t group, uint8_t* packed, void* stream) {
    const int64_t n_groups = W.rows * W.cols / group;
    if (n_groups) encode_groups<<<blocks_for(n_groups, kThreads), kThreads, 0, stream_of(stream)>>>(W, step, group, packed);
    return cudaGetLastError();
}

Status dequantize_fp4(const uint8_t* packed, int64_t rows, int64_t cols, const float* step, int64_t group, float* W, void* stream) {
    const int64_t n_pairs = rows * cols / 2;
    if (n_pairs) decode_pairs<<<blocks_for(n_pairs, kThreads), kThreads, 0, stream_of(stream)>>>(packed, n_pairs, step, group, W);
    return cudaGetLastError();
}

Status fit_fp4(const ScaleFit& fit, void* stream) {
    const int64_t n_groups = fit.W.rows * fit.W.cols / fit.group;
    if (n_groups == 0) return kOk;
    if (fit.format == Scaled4::nvfp4)
        fit_groups<Scaled4::nvfp4><<<blocks_for(n_groups, kThreads), kThreads, 0, stream_of(stream)>>>(fit);
    else
        fit_groups<Scaled4::mxfp4><<<blocks_for(n_groups, kThreads), kThreads, 0, stream_of(stream)>>>(fit);
    return cudaGetLastError();
}

}  // namespace

extern const MinifloatOps minifloat_ops;
const MinifloatOps minifloat_ops = {run_absmax, quantize_fp8, dequantize_fp8, quantize_fp4, dequantize_fp4, fit_fp4};

}  // namespace quantcli::cuda
