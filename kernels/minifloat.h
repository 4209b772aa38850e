// The ops of small floats, as every instruction set and CUDA offer them.
#pragma once

#include "api.h"

namespace quantcli {

enum class Float8 : int { e4m3 = 0, e5m2 = 1 };

/// Formats of four-bit floats, by what scales their groups: a power of two, or an E4M3 over a global scale.
enum class Scaled4 : int { mxfp4 = 0, nvfp4 = 1 };

/// A scale for each tile of `rows` × `cols` weights; those at the right and lower edge may be cut. scale: [tiles down, tiles across].
struct Tiles {
    const float* scale;
    int64_t rows, cols;
};

/// A search among the bytes start + first … start + last of each group; importance [cols] or null; start, found [rows, cols / group].
struct ScaleFit {
    Scaled4 format;
    Weights W;
    const float* importance;
    const uint8_t* start;
    int64_t group;
    float global_scale;
    int first, last;
    uint8_t* found;
};

/// `group` is a multiple of 16; step is [rows, cols / group], packed [rows, cols / 2]. `stream` is a cudaStream_t; the CPU ignores it.
struct MinifloatOps {
    /// absmax [rows, ceil(cols / width)]: NaN where there is one.
    Status (*run_absmax)(Weights, int64_t width, float* absmax, void* stream);
    Status (*quantize_fp8)(Float8, Weights, Tiles, uint8_t* data, void* stream);
    Status (*dequantize_fp8)(Float8, const uint8_t* data, int64_t rows, int64_t cols, Tiles, float* W, void* stream);
    Status (*quantize_fp4)(Weights, const float* step, int64_t group, uint8_t* packed, void* stream);
    Status (*dequantize_fp4)(const uint8_t* packed, int64_t rows, int64_t cols, const float* step, int64_t group, float* W, void* stream);
    Status (*fit_fp4)(const ScaleFit&, void* stream);
};

}  // namespace quantcli
