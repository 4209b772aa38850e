// ggml's block types in Python: quantize, dequantize, fit, pack, unpack.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "cpu/dispatch.h"

namespace quantcli {

#ifdef QUANTCLI_CUDA
namespace cuda {
extern const BlockOps block_ops;
}
#endif

namespace {

Kind kind_of(const std::string& name) {
    std::string known;
    for (int i = 0; i < kKinds; ++i) {
        if (name == kKindNames[i]) return static_cast<Kind>(i);
        known += std::string(i ? ", " : "") + kKindNames[i];
    }
    throw KernelFault("no block type '" + name + "'; there are: " + known);
}

const KindInfo& info_of(Kind kind) { return kKindInfo[static_cast<int>(kind)]; }

/// Rows and columns of a matrix whose columns are whole blocks.
struct Extent {
    int64_t rows, cols, blocks;
    Extent(int64_t rows, int64_t cols, Kind kind) : rows(rows), cols(cols), blocks(cols / info_of(kind).block) {
        if (cols <= 0 || cols % info_of(kind).block)
            throw KernelFault("in_features " + std::to_string(cols) + " is not a positive multiple of the " +
                              kKindNames[static_cast<int>(kind)] + " block " + std::to_string(info_of(kind).block));
    }
};

int64_t size_at(const char* name, const Array& array, size_t axis) {
    if (array.ndim() != 2) throw KernelFault(std::string(name) + ": expected two dimensions, got " + describe(array));
    return static_cast<int64_t>(array.shape(axis));
}

Weights weights_of(const Array& W, const Extent& extent) {
    check("W", W, {kF32, kBf16, kF16}, {extent.rows, extent.cols});
    const Float dtype = W.dtype() == kF32 ? Float::f32 : W.dtype() == kBf16 ? Float::bf16 : Float::f16;
    return {W.data(), dtype, extent.rows, extent.cols};
}

const float* importance_of(const std::optional<Array>& importance, const Extent& extent, const Array& W) {
    if (!importance) return nullptr;
    check("importance", *importance, {kF32}, {extent.cols}, &W);
    return static_cast<const float*>(importance->data());
}

template <class T>
T* pointer(const std::optional<Array>& array) {
    return array ? static_cast<T*>(array->data()) : nullptr;
}

using Maybe = std::optional<Array>;

BlockParams params_of(Kind kind, const Extent& extent, const Array& like, const Array& d, const Maybe& dmin, const Maybe& scale,
                      const Maybe& min) {
    const KindInfo& info = info_of(kind);
    const int64_t subs = extent.cols / info.sub;
    check("d", d, {kF16}, {extent.rows, extent.blocks}, &like);
    if (dmin.has_value() != info.has_min || min.has_value() != info.has_min || scale.has_value() != info.has_scales)
        throw KernelFault(std::string(kKindNames[static_cast<int>(kind)]) + ": parameters are d" + (info.has_scales ? ", scale" : "") +
                          (info.has_min ? ", dmin, min" : ""));
    if (dmin) check("dmin", *dmin, {kF16}, {extent.rows, extent.blocks}, &like);
    if (scale) check("scale", *scale, {info.has_min ? kU8 : kI8}, {extent.rows, subs}, &like);
    if (min) check("min", *min, {kU8}, {extent.rows, subs}, &like);
    return {static_cast<uint16_t*>(d.data()), pointer<uint16_t>(dmin), pointer<uint8_t>(scale), pointer<uint8_t>(min)};
}

void check_blocks(const Array& blocks, Kind kind, const Extent& extent, const Array* like) {
    check("blocks", blocks, {kU8}, {extent.rows, extent.blocks * info_of(kind).bytes}, like);
}

const BlockOps& ops_for(const Array& array) {
    if (!on_cuda(array)) return *active_set().blocks;
#ifdef QUANTCLI_CUDA
    return cuda::block_ops;
#else
    throw KernelFault("this build of quantcli has no CUDA kernels, and got " + describe(array));
#endif
}

void* stream_of(uint64_t handle) { return reinterpret_cast<void*>(static_cast<uintptr_t>(handle)); }

void quantize(const std::string& name, const Array& W, const Maybe& importance, const Array& blocks, uint64_t stream) {
    const Kind kind = kind_of(name);
    const Extent extent(size_at("W", W, 0), size_at("W", W, 1), kind);
    const Weights weights = weights_of(W, extent);
    const float* weight = importance_of(importance, extent, W);
    check_blocks(blocks, kind, extent, &W);
    const BlockOps& ops = ops_for(W);
    auto* out = static_cast<uint8_t*>(blocks.data());
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("quantize_blocks", ops.quantize(kind, weights, weight, out, stream_of(stream)));
}

void dequantize(const std::string& name, const Array& blocks, const Array& W, uint64_t stream) {
    const Kind kind = kind_of(name);
    const Extent extent(size_at("W", W, 0), size_at("W", W, 1), kind);
    check("W", W, {kF32}, {extent.rows, extent.cols});
    check_blocks(blocks, kind, extent, &W);
    const BlockOps& ops = ops_for(W);
    const auto* in = static_cast<const uint8_t*>(blocks.data());
    auto* out = static_cast<float*>(W.data());
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("dequantize_blocks", ops.dequantize(kind, in, extent.rows, extent.cols, out, stream_of(stream)));
}

void fit(const std::string& name, const Array& W, const Maybe& importance, const Array& d, const Maybe& dmin, const Maybe& scale,
         const Maybe& min, uint64_t stream) {
    const Kind kind = kind_of(name);
    const Extent extent(size_at("W", W, 0), size_at("W", W, 1), kind);
    const Weights weights = weights_of(W, extent);
    const float* weight = importance_of(importance, extent, W);
    const BlockParams params = params_of(kind, extent, W, d, dmin, scale, min);
    const BlockOps& ops = ops_for(W);
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("fit_blocks", ops.fit(kind, weights, weight, params, stream_of(stream)));
}

void pack(const std::string& name, const Array& codes, const Array& d, const Maybe& dmin, const Maybe& scale, const Maybe& min,
          const Array& blocks, uint64_t stream) {
    const Kind kind = kind_of(name);
    const Extent extent(size_at("codes", codes, 0), size_at("codes", codes, 1), kind);
    check("codes", codes, {kI8}, {extent.rows, extent.cols});
    const BlockParams params = params_of(kind, extent, codes, d, dmin, scale, min);
    check_blocks(blocks, kind, extent, &codes);
    const BlockOps& ops = ops_for(codes);
    const auto* in = static_cast<const int8_t*>(codes.data());
    auto* out = static_cast<uint8_t*>(blocks.data());
    const OnDevice device(codes);
    nb::gil_scoped_release release;
    require_ok("pack_blocks", ops.pack(kind, in, params, extent.rows, extent.cols, out, stream_of(stream)));
}

void unpack(const std::string& name, const Array& blocks, const Array& codes, const Array& d, const Maybe& dmin, const Maybe& scale,
            const Maybe& min, uint64_t stream) {
    const Kind kind = kind_of(name);
    const Extent extent(size_at("codes", codes, 0), size_at("codes", codes, 1), kind);
    check("codes", codes, {kI8}, {extent.rows, extent.cols});
    const BlockParams params = params_of(kind, extent, codes, d, dmin, scale, min);
    check_blocks(blocks, kind, extent, &codes);
    const BlockOps& ops = ops_for(codes);
    const auto* in = static_cast<const uint8_t*>(blocks.data());
    auto* out = static_cast<int8_t*>(codes.data());
    const OnDevice device(codes);
    nb::gil_scoped_release release;
    require_ok("unpack_blocks", ops.unpack(kind, in, extent.rows, extent.cols, out, params, stream_of(stream)));
}

}  // namespace

void register_blocks(nb::module_& m) {
    using nb::arg;
    const auto none = nb::none();
    m.def("quantize_blocks", &quantize, arg("kind"), arg("W"), arg("importance").none(), arg("blocks"), arg("stream") = 0);
    m.def("dequantize_blocks", &dequantize, arg("kind"), arg("blocks"), arg("W"), arg("stream") = 0);
    m.def("fit_blocks", &fit, arg("kind"), arg("W"), arg("importance").none(), arg("d"), arg("dmin") = none, arg("scale") = none,
          arg("min") = none, arg("stream") = 0);
    m.def("pack_blocks", &pack, arg("kind"), arg("codes"), arg("d"), arg("dmin") = none, arg("scale") = none, arg("min") = none,
          arg("blocks"), arg("stream") = 0);
    m.def("unpack_blocks", &unpack, arg("kind"), arg("blocks"), arg("codes"), arg("d"), arg("dmin") = none, arg("scale") = none,
          arg("min") = none, arg("stream") = 0);
}

}  // namespace quantcli
