// The small floats in Python: absmax, rounding and decoding, and the search for the scales of groups.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "minifloat.h"

namespace quantcli {

#ifdef QUANTCLI_CUDA
namespace cuda {
extern const MinifloatOps minifloat_ops;
}
#endif

namespace {

const MinifloatOps& ops_for(const Array& array) {
    if (!on_cuda(array)) return *active_set().minifloat;
#ifdef QUANTCLI_CUDA
    return cuda::minifloat_ops;
#else
    throw KernelFault("this build of quantcli has no CUDA kernels, and got " + describe(array));
#endif
}

void* stream_of(uint64_t handle) { return reinterpret_cast<void*>(static_cast<uintptr_t>(handle)); }

template <class T>
T* pointer(const Array& array) {
    return static_cast<T*>(array.data());
}

int64_t size_at(const char* name, const Array& array, size_t axis) {
    if (array.ndim() != 2) throw KernelFault(std::string(name) + ": expected two dimensions, got " + describe(array));
    return static_cast<int64_t>(array.shape(axis));
}

Weights weights_of(const Array& W) {
    const int64_t rows = size_at("W", W, 0), cols = size_at("W", W, 1);
    check("W", W, {kF32, kBf16, kF16}, {rows, cols});
    const Float dtype = W.dtype() == kF32 ? Float::f32 : W.dtype() == kBf16 ? Float::bf16 : Float::f16;
    return {W.data(), dtype, rows, cols};
}

Float8 float8_of(const std::string& name) {
    if (name != "e4m3" && name != "e5m2") throw KernelFault("no float of eight bits '" + name + "'; there are: e4m3, e5m2");
    return name == "e4m3" ? Float8::e4m3 : Float8::e5m2;
}

Scaled4 scaled4_of(const std::string& name) {
    if (name != "mxfp4" && name != "nvfp4") throw KernelFault("no format of four-bit floats '" + name + "'; there are: mxfp4, nvfp4");
    return name == "mxfp4" ? Scaled4::mxfp4 : Scaled4::nvfp4;
}

int64_t tiles_along(int64_t size, int64_t tile) {
    if (tile < 1) throw KernelFault("a tile has " + std::to_string(tile) + " weights along one side; expected at least 1");
    return (size + tile - 1) / tile;
}

Tiles tiles_of(const Array& scale, int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols, const Array& like) {
    check("scale", scale, {kF32}, {tiles_along(rows, tile_rows), tiles_along(cols, tile_cols)}, &like);
    return {pointer<float>(scale), tile_rows, tile_cols};
}

/// Inputs of a group, from the groups of a row.
int64_t group_of(const char* name, const Array& per_group, int64_t cols) {
    const int64_t n_groups = size_at(name, per_group, 1);
    const int64_t group = n_groups ? cols / n_groups : 0;
    if ((group != 16 && group != 32) || group * n_groups != cols)
        throw KernelFault(std::string(name) + " has " + std::to_string(n_groups) + " groups for " + std::to_string(cols) +
                          " inputs; expected groups of 16 or 32");
    return group;
}

void run_absmax(const Array& W, int64_t width, const Array& absmax, uint64_t stream) {
    const Weights weights = weights_of(W);
    check("absmax", absmax, {kF32}, {weights.rows, tiles_along(weights.cols, width)}, &W);
    const MinifloatOps& ops = ops_for(W);
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("run_absmax", ops.run_absmax(weights, width, pointer<float>(absmax), stream_of(stream)));
}

void quantize_fp8(const std::string& name, const Array& W, const Array& scale, int64_t tile_rows, int64_t tile_cols, const Array& data,
                  uint64_t stream) {
    const Float8 format = float8_of(name);
    const Weights weights = weights_of(W);
    const Tiles tiles = tiles_of(scale, weights.rows, weights.cols, tile_rows, tile_cols, W);
    check("data", data, {kU8}, {weights.rows, weights.cols}, &W);
    const MinifloatOps& ops = ops_for(W);
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("quantize_fp8", ops.quantize_fp8(format, weights, tiles, pointer<uint8_t>(data), stream_of(stream)));
}

void dequantize_fp8(const std::string& name, const Array& data, const Array& scale, int64_t tile_rows, int64_t tile_cols, const Array& W,
                    uint64_t stream) {
    const Float8 format = float8_of(name);
    const int64_t rows = size_at("data", data, 0), cols = size_at("data", data, 1);
    check("data", data, {kU8}, {rows, cols});
    const Tiles tiles = tiles_of(scale, rows, cols, tile_rows, tile_cols, data);
    check("W", W, {kF32}, {rows, cols}, &data);
    const MinifloatOps& ops = ops_for(data);
    const OnDevice device(data);
    nb::gil_scoped_release release;
    require_ok("dequantize_fp8",
               ops.dequantize_fp8(format, pointer<uint8_t>(data), rows, cols, tiles, pointer<float>(W), stream_of(stream)));
}

void quantize_fp4(const Array& W, const Array& step, const Array& packed, uint64_t stream) {
    const Weights weights = weights_of(W);
    const int64_t group = group_of("step", step, weights.cols);
    check("step", step, {kF32}, {weights.rows, weights.cols / group}, &W);
    check("packed", packed, {kU8}, {weights.rows, weights.cols / 2}, &W);
    const MinifloatOps& ops = ops_for(W);
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("quantize_fp4", ops.quantize_fp4(weights, pointer<float>(step), group, pointer<uint8_t>(packed), stream_of(stream)));
}

void dequantize_fp4(const Array& packed, const Array& step, const Array& W, uint64_t stream) {
    const int64_t rows = size_at("packed", packed, 0), cols = 2 * size_at("packed", packed, 1);
    check("packed", packed, {kU8}, {rows, cols / 2});
    const int64_t group = group_of("step", step, cols);
    check("step", step, {kF32}, {rows, cols / group}, &packed);
    check("W", W, {kF32}, {rows, cols}, &packed);
    const MinifloatOps& ops = ops_for(packed);
    const OnDevice device(packed);
    nb::gil_scoped_release release;
    require_ok("dequantize_fp4",
               ops.dequantize_fp4(pointer<uint8_t>(packed), rows, cols, pointer<float>(step), group, pointer<float>(W), stream_of(stream)));
}

void fit_fp4(const std::string& name, const Array& W, const std::optional<Array>& importance, const Array& start, float global_scale,
             int first, int last, const Array& found, uint64_t stream) {
    const Weights weights = weights_of(W);
    const int64_t group = group_of("start", start, weights.cols), n_groups = weights.cols / group;
    if (importance) check("importance", *importance, {kF32}, {weights.cols}, &W);
    check("start", start, {kU8}, {weights.rows, n_groups}, &W);
    check("found", found, {kU8}, {weights.rows, n_groups}, &W);
    if (first > 0 || last < 0 || first < -126 || last > 126)
        throw KernelFault("candidates " + std::to_string(first) + " to " + std::to_string(last) + " do not lie around 0");
    const ScaleFit fit{.format = scaled4_of(name),
                       .W = weights,
                       .importance = importance ? pointer<float>(*importance) : nullptr,
                       .start = pointer<uint8_t>(start),
                       .group = group,
                       .global_scale = global_scale,
                       .first = first,
                       .last = last,
                       .found = pointer<uint8_t>(found)};
    const MinifloatOps& ops = ops_for(W);
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("fit_fp4", ops.fit_fp4(fit, stream_of(stream)));
}

}  // namespace

void register_minifloat(nb::module_& m) {
    using nb::arg;
    m.def("run_absmax", &run_absmax, arg("W"), arg("width"), arg("absmax"), arg("stream") = 0);
    m.def("quantize_fp8", &quantize_fp8, arg("dtype"), arg("W"), arg("scale"), arg("tile_rows"), arg("tile_cols"), arg("data"),
          arg("stream") = 0);
    m.def("dequantize_fp8", &dequantize_fp8, arg("dtype"), arg("data"), arg("scale"), arg("tile_rows"), arg("tile_cols"), arg("W"),
          arg("stream") = 0);
    m.def("quantize_fp4", &quantize_fp4, arg("W"), arg("step"), arg("packed"), arg("stream") = 0);
    m.def("dequantize_fp4", &dequantize_fp4, arg("packed"), arg("step"), arg("W"), arg("stream") = 0);
    m.def("fit_fp4", &fit_fp4, arg("kind"), arg("W"), arg("importance").none(), arg("start"), arg("global_scale"), arg("first"),
          arg("last"), arg("found"), arg("stream") = 0);
}

}  // namespace quantcli
