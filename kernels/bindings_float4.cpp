// Four-bit blocks in Python: quantize, dequantize, errors.
#include <nanobind/stl/optional.h>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "float4.h"

namespace quantcli {

#ifdef QUANTCLI_CUDA
namespace cuda {
extern const Float4Ops float4_ops;
}
#endif

namespace {

using Maybe = std::optional<Array>;

const Float4Ops& ops_for(const Array& array) {
    if (!on_cuda(array)) return *active_set().float4;
#ifdef QUANTCLI_CUDA
    return cuda::float4_ops;
#else
    throw KernelFault("this build of quantcli has no CUDA kernels, and got " + describe(array));
#endif
}

void* stream_of(uint64_t handle) { return reinterpret_cast<void*>(static_cast<uintptr_t>(handle)); }

/// Weights, codes and scales that fit each other. `W` is flat.
Float4 shape_of(const Array& W, std::initializer_list<nb::dlpack::dtype> dtypes, const Array& packed, const Array& scale, int64_t block,
                const Array& heap, const Maybe& order, const Array& levels) {
    if (W.ndim() != 1) throw KernelFault("W: expected one dimension, got " + describe(W));
    if (block < 32 || block % 32) throw KernelFault("block is " + std::to_string(block) + "; expected a multiple of 32");
    const int64_t n = static_cast<int64_t>(W.shape(0));
    check("W", W, dtypes, {n});
    check("packed", packed, {kU8}, {(n + 1) / 2}, &W);
    check("scale", scale, {kF32}, {(n + block - 1) / block}, &W);
    check("heap", heap, {kF32}, {16}, &W);
    if (order) check("order", *order, {kI32}, {16}, &W);
    check("levels", levels, {kF32}, {16}, &W);
    return {n, block,
            Book4{static_cast<const float*>(heap.data()), order ? static_cast<const int32_t*>(order->data()) : nullptr,
                  static_cast<const float*>(levels.data())}};
}

Float float_of(const Array& W) { return W.dtype() == kF32 ? Float::f32 : W.dtype() == kBf16 ? Float::bf16 : Float::f16; }

void quantize(const Array& W, int64_t block, const Array& heap, const Maybe& order, const Array& levels, const Array& packed,
              const Array& scale, uint64_t stream) {
    const Float4 shape = shape_of(W, {kF32, kBf16, kF16}, packed, scale, block, heap, order, levels);
    const Float4Ops& ops = ops_for(W);
    const void* in = W.data();
    const Float dtype = float_of(W);
    auto* codes = static_cast<uint8_t*>(packed.data());
    auto* scales = static_cast<float*>(scale.data());
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("quantize_float4", ops.quantize(shape, in, dtype, codes, scales, stream_of(stream)));
}

void dequantize(const Array& packed, const Array& scale, int64_t block, const Array& heap, const Maybe& order, const Array& levels,
                const Array& W, uint64_t stream) {
    const Float4 shape = shape_of(W, {kF32}, packed, scale, block, heap, order, levels);
    const Float4Ops& ops = ops_for(W);
    const auto* codes = static_cast<const uint8_t*>(packed.data());
    const auto* scales = static_cast<const float*>(scale.data());
    auto* out = static_cast<float*>(W.data());
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("dequantize_float4", ops.dequantize(shape, codes, scales, out, stream_of(stream)));
}

void errors(const Array& W, const Array& packed, const Array& scale, int64_t block, const Array& heap, const Maybe& order,
            const Array& levels, const Array& error, const Array& energy, uint64_t stream) {
    const Float4 shape = shape_of(W, {kF32, kBf16, kF16}, packed, scale, block, heap, order, levels);
    const int64_t n_blocks = static_cast<int64_t>(scale.shape(0));
    check("error", error, {kF32}, {n_blocks}, &W);
    check("energy", energy, {kF32}, {n_blocks}, &W);
    const Float4Ops& ops = ops_for(W);
    const void* in = W.data();
    const Float dtype = float_of(W);
    const auto* codes = static_cast<const uint8_t*>(packed.data());
    const auto* scales = static_cast<const float*>(scale.data());
    auto* lost = static_cast<float*>(error.data());
    auto* whole = static_cast<float*>(energy.data());
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("float4_errors", ops.errors(shape, in, dtype, codes, scales, lost, whole, stream_of(stream)));
}

}  // namespace

void register_float4(nb::module_& m) {
    using nb::arg;
    m.def("quantize_float4", &quantize, arg("W"), arg("block"), arg("heap"), arg("order").none(), arg("levels"), arg("packed"),
          arg("scale"), arg("stream") = 0);
    m.def("dequantize_float4", &dequantize, arg("packed"), arg("scale"), arg("block"), arg("heap"), arg("order").none(), arg("levels"),
          arg("W"), arg("stream") = 0);
    m.def("float4_errors", &errors, arg("W"), arg("packed"), arg("scale"), arg("block"), arg("heap"), arg("order").none(), arg("levels"),
          arg("error"), arg("energy"), arg("stream") = 0);
}

}  // namespace quantcli
