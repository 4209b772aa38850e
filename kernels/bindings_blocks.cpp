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

/// The block type called `name`, a matrix's rows and columns in its blocks, and the ops for where the matrix lies.
struct Target {
    Kind kind;
    const KindInfo* info;
    const BlockOps* ops;
    int64_t rows, cols, blocks;

    Target(const std::string& name, const char* argument, const Array& matrix);
};

const BlockOps& ops_for(const Array& array) {
    if (!on_cuda(array)) return *active_set().blocks;
#ifdef QUANTCLI_CUDA
    return cuda::block_ops;
#else
    throw KernelFault("this build of quantcli has no CUDA kernels, and got " + describe(array));
#endif
}

Kind kind_of(const std::string& name, const BlockOps& ops) {
    std::string known;
    for (int i = 0; i < ops.n_kinds; ++i) {
        if (name == ops.kinds[i].name) return static_cast<Kind>(i);
        known += std::string(i ? ", " : "") + ops.kinds[i].name;
    }
    throw KernelFault("no block type '" + name + "'; there are: " + known);
}

Target::Target(const std::string& name, const char* argument, const Array& matrix) : ops(&ops_for(matrix)) {
    kind = kind_of(name, *ops);
    info = &ops->kinds[static_cast<int>(kind)];
    if (matrix.ndim() != 2) throw KernelFault(std::string(argument) + ": expected two dimensions, got " + describe(matrix));
    rows = static_cast<int64_t>(matrix.shape(0));
    cols = static_cast<int64_t>(matrix.shape(1));
    blocks = cols / info->block;
    if (cols <= 0 || cols % info->block)
        throw KernelFault("in_features " + std::to_string(cols) + " is not a positive multiple of the " + name + " block " +
                          std::to_string(info->block));
}

/// The arrays of a type's parameters by name: all that it has, and no other.
BlockParams params_of(const Target& target, const Array& like, const nb::dict& arrays) {
    const KindInfo& info = *target.info;
    const int64_t subs = target.cols / info.sub;
    std::string names;
    size_t n_names = 0;
    const auto take = [&](bool exists, const char* name, nb::dlpack::dtype dtype, int64_t width) -> void* {
        if (!exists) return nullptr;
        names += (n_names++ ? ", " : "") + std::string(name);
        if (!arrays.contains(name)) throw KernelFault(std::string(info.name) + ": the parameter " + name + " is missing");
        const auto array = nb::cast<Array>(arrays[name]);
        check(name, array, {dtype}, {target.rows, width}, &like);
        return array.data();
    };
    const BlockParams params = {
        .d = static_cast<uint16_t*>(take(info.has_d, "d", kF16, target.blocks)),
        .dmin = static_cast<uint16_t*>(take(info.has_min, "dmin", kF16, target.blocks)),
        .m = static_cast<uint16_t*>(take(info.has_offset, "m", kF16, target.blocks)),
        .scale = static_cast<uint8_t*>(take(info.has_scales, "scale", info.signed_scales ? kI8 : kU8, subs)),
        .min = static_cast<uint8_t*>(take(info.has_min, "min", kU8, subs)),
    };
    if (arrays.size() == n_names) return params;
    throw KernelFault(std::string(info.name) + ": expected the parameters " + names + " alone, got " + std::to_string(arrays.size()));
}

uint8_t* blocks_of(const Target& target, const Array& blocks, const Array& like) {
    check("blocks", blocks, {kU8}, {target.rows, target.blocks * target.info->bytes}, &like);
    return static_cast<uint8_t*>(blocks.data());
}

/// Checks what every search takes, and runs it: run(W, importance) returns a status.
template <class Run>
void search(const char* op, const Target& target, const Array& W, const std::optional<Array>& importance, const Run& run) {
    check("W", W, {kF32, kBf16, kF16}, {target.rows, target.cols});
    if (!importance && target.info->needs_importance) throw KernelFault(std::string(target.info->name) + " needs importance, got none");
    if (importance) check("importance", *importance, {kF32}, {target.cols}, &W);
    const Float dtype = W.dtype() == kF32 ? Float::f32 : W.dtype() == kBf16 ? Float::bf16 : Float::f16;
    const Weights weights = {W.data(), dtype, target.rows, target.cols};
    const auto* wanted = importance ? static_cast<const float*>(importance->data()) : nullptr;
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok(op, run(weights, wanted));
}

/// Checks codes, parameters and the blocks that hold them, and runs what turns one into the other: run(codes, params, blocks).
template <class Run>
void repack(const char* op, const Target& target, const Array& codes, const nb::dict& params, const Array& blocks, const Run& run) {
    check("codes", codes, {kI8}, {target.rows, target.cols});
    const BlockParams parts = params_of(target, codes, params);
    uint8_t* bytes = blocks_of(target, blocks, codes);
    const OnDevice device(codes);
    nb::gil_scoped_release release;
    require_ok(op, run(static_cast<int8_t*>(codes.data()), parts, bytes));
}

void* stream_of(uint64_t handle) { return reinterpret_cast<void*>(static_cast<uintptr_t>(handle)); }

void quantize(const std::string& name, const Array& W, const std::optional<Array>& importance, const Array& blocks, uint64_t stream) {
    const Target target(name, "W", W);
    uint8_t* bytes = blocks_of(target, blocks, W);
    search("quantize_blocks", target, W, importance, [&](const Weights& weights, const float* wanted) {
        return target.ops->quantize(target.kind, weights, wanted, bytes, stream_of(stream));
    });
}

void fit(const std::string& name, const Array& W, const std::optional<Array>& importance, const nb::dict& params, uint64_t stream) {
    const Target target(name, "W", W);
    const BlockParams parts = params_of(target, W, params);
    search("fit_blocks", target, W, importance, [&](const Weights& weights, const float* wanted) {
        return target.ops->fit(target.kind, weights, wanted, parts, stream_of(stream));
    });
}

void dequantize(const std::string& name, const Array& blocks, const Array& W, uint64_t stream) {
    const Target target(name, "W", W);
    check("W", W, {kF32}, {target.rows, target.cols});
    const uint8_t* bytes = blocks_of(target, blocks, W);
    const OnDevice device(W);
    nb::gil_scoped_release release;
    auto* out = static_cast<float*>(W.data());
    require_ok("dequantize_blocks", target.ops->dequantize(target.kind, bytes, target.rows, target.cols, out, stream_of(stream)));
}

void pack(const std::string& name, const Array& codes, const nb::dict& params, const Array& blocks, uint64_t stream) {
    const Target target(name, "codes", codes);
    repack("pack_blocks", target, codes, params, blocks, [&](const int8_t* in, const BlockParams& parts, uint8_t* out) {
        return target.ops->pack(target.kind, in, parts, target.rows, target.cols, out, stream_of(stream));
    });
}

void unpack(const std::string& name, const Array& blocks, const Array& codes, const nb::dict& params, uint64_t stream) {
    const Target target(name, "codes", codes);
    repack("unpack_blocks", target, codes, params, blocks, [&](int8_t* out, const BlockParams& parts, const uint8_t* in) {
        return target.ops->unpack(target.kind, in, target.rows, target.cols, out, parts, stream_of(stream));
    });
}

}  // namespace

void register_blocks(nb::module_& m) {
    using nb::arg;
    m.def("quantize_blocks", &quantize, arg("kind"), arg("W"), arg("importance").none(), arg("blocks"), arg("stream") = 0);
    m.def("dequantize_blocks", &dequantize, arg("kind"), arg("blocks"), arg("W"), arg("stream") = 0);
    m.def("fit_blocks", &fit, arg("kind"), arg("W"), arg("importance").none(), arg("params"), arg("stream") = 0);
    m.def("pack_blocks", &pack, arg("kind"), arg("codes"), arg("params"), arg("blocks"), arg("stream") = 0);
    m.def("unpack_blocks", &unpack, arg("kind"), arg("blocks"), arg("codes"), arg("params"), arg("stream") = 0);
}

}  // namespace quantcli
