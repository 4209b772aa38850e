// The solvers' ops in Python: group fits, the GPTQ chunk, the choice among grids, dense bits.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "solve.h"

namespace quantcli {

#ifdef QUANTCLI_CUDA
namespace cuda {
extern const SolveOps solve_ops;
}
#endif

namespace {

using Maybe = std::optional<Array>;

const SolveOps& ops_for(const Array& array) {
    if (!on_cuda(array)) return *active_set().solve;
#ifdef QUANTCLI_CUDA
    return cuda::solve_ops;
#else
    throw KernelFault("this build of quantcli has no CUDA kernels, and got " + describe(array));
#endif
}

void* stream_of(uint64_t handle) { return reinterpret_cast<void*>(static_cast<uintptr_t>(handle)); }

int64_t size_at(const char* name, const Array& array, size_t axis) {
    if (array.ndim() != 2) throw KernelFault(std::string(name) + ": expected two dimensions, got " + describe(array));
    return static_cast<int64_t>(array.shape(axis));
}

template <class T>
T* pointer(const Array& array) {
    return static_cast<T*>(array.data());
}

template <class T>
const T* pointer(const Maybe& array) {
    return array ? static_cast<const T*>(array->data()) : nullptr;
}

/// "f16", "bf16" or "f32".
Float float_named(const std::string& name) {
    if (name == "f16") return Float::f16;
    if (name == "bf16") return Float::bf16;
    if (name == "f32") return Float::f32;
    throw KernelFault("held is '" + name + "'; expected f16, bf16 or f32");
}

void fit_affine(const Array& W, const Array& importance, int bits, int64_t group_size, bool sym, bool search, const std::string& held,
                const Array& scale, const Array& zero, const Maybe& basis, const Maybe& E, uint64_t stream) {
    const int64_t rows = size_at("W", W, 0), cols = size_at("W", W, 1);
    check("W", W, {kF32}, {rows, cols});
    check("importance", importance, {kF32}, {cols}, &W);
    if (bits < 2 || bits > 8) throw KernelFault("bits is " + std::to_string(bits) + "; expected 2 to 8");
    if (group_size < 1 || cols % group_size)
        throw KernelFault("group_size " + std::to_string(group_size) + " does not divide the " + std::to_string(cols) + " inputs of W");
    check("scale", scale, {kF32}, {rows, cols / group_size}, &W);
    check("zero", zero, {kI32}, {rows, cols / group_size}, &W);
    if (basis.has_value() != E.has_value()) throw KernelFault("a basis needs E, and the other way round");
    if (basis) check("basis", *basis, {kF32}, {cols}, &W);
    if (E) check("E", *E, {kF32}, {rows, cols}, &W);
    const AffineFit fit{.W = pointer<float>(W),
                        .importance = pointer<float>(importance),
                        .basis = pointer<float>(basis),
                        .rows = rows,
                        .cols = cols,
                        .group_size = group_size,
                        .bits = bits,
                        .sym = sym,
                        .search = search,
                        .held = float_named(held),
                        .scale = pointer<float>(scale),
                        .zero = pointer<int32_t>(zero),
                        .E = E ? pointer<float>(*E) : nullptr};
    const SolveOps& ops = ops_for(W);
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("fit_affine", ops.fit_affine(fit, stream_of(stream)));
}

void gptq_chunk(const Array& W, const Array& U, const Array& scale, const Maybe& offset, const Array& group, int lo, int hi,
                const Maybe& book, const Maybe& mids, const Array& codes, const Array& E, const Maybe& D, uint64_t stream) {
    const int64_t rows = size_at("W", W, 0), n = size_at("W", W, 1), n_groups = size_at("scale", scale, 1);
    check("W", W, {kF32}, {rows, n});
    check("U", U, {kF32}, {n, n}, &W);
    check("scale", scale, {kF32}, {rows, n_groups}, &W);
    if (offset) check("offset", *offset, {kF32}, {rows, n_groups}, &W);
    check("group", group, {kI32}, {n}, &W);
    if (book.has_value() != mids.has_value()) throw KernelFault("a book needs its midpoints, and the other way round");
    if (book) check("book", *book, {kF32}, {hi + 1}, &W);
    if (mids) check("mids", *mids, {kF32}, {hi}, &W);
    check("codes", codes, {hi > 127 ? kU8 : kI8}, {rows, n}, &W);
    check("E", E, {kF32}, {rows, n}, &W);
    if (D) check("D", *D, {kF32}, {rows, n}, &W);
    const GptqChunk chunk{.W = pointer<float>(W),
                          .U = pointer<float>(U),
                          .scale = pointer<float>(scale),
                          .offset = pointer<float>(offset),
                          .group = pointer<int32_t>(group),
                          .book = pointer<float>(book),
                          .mids = pointer<float>(mids),
                          .D = pointer<float>(D),
                          .rows = rows,
                          .n = n,
                          .n_groups = n_groups,
                          .lo = lo,
                          .hi = hi,
                          .codes = pointer<uint8_t>(codes),
                          .E = pointer<float>(E)};
    const SolveOps& ops = ops_for(W);
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("gptq_chunk", ops.gptq_chunk(chunk, stream_of(stream)));
}

void choose_grid(const Array& W, const Array& blocks, const Array& scale, const Maybe& offset, float lo, float hi, const Array& best,
                 uint64_t stream) {
    const int64_t rows = size_at("W", W, 0), cols = size_at("W", W, 1), n_groups = size_at("best", best, 1);
    const int64_t size = n_groups ? cols / n_groups : 0, n_candidates = static_cast<int64_t>(scale.ndim() ? scale.shape(0) : 0);
    if (size != 32 && size != 64 && size != 128 && size != 256)
        throw KernelFault("groups of " + std::to_string(size) + " weights; expected 32, 64, 128 or 256");
    check("W", W, {kF32}, {rows, n_groups * size});
    check("blocks", blocks, {kF32}, {n_groups, size, size}, &W);
    check("scale", scale, {kF32}, {n_candidates, rows, n_groups}, &W);
    if (offset) check("offset", *offset, {kF32}, {n_candidates, rows, n_groups}, &W);
    check("best", best, {kI32}, {rows, n_groups}, &W);
    const GridChoice choice{.W = pointer<float>(W),
                            .blocks = pointer<float>(blocks),
                            .scale = pointer<float>(scale),
                            .offset = pointer<float>(offset),
                            .rows = rows,
                            .cols = cols,
                            .group_size = size,
                            .n_candidates = static_cast<int>(n_candidates),
                            .lo = lo,
                            .hi = hi,
                            .best = pointer<int32_t>(best)};
    const SolveOps& ops = ops_for(W);
    const OnDevice device(W);
    nb::gil_scoped_release release;
    require_ok("choose_grid", ops.choose_grid(choice, stream_of(stream)));
}

/// Checks codes [rows, n] against words [rows, n · bits / 32].
DenseBits bits_of(const Array& codes, const Array& words, int bits) {
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) throw KernelFault("bits is " + std::to_string(bits) + "; expected 2, 3, 4 or 8");
    const int64_t rows = size_at("codes", codes, 0), n = size_at("codes", codes, 1);
    if (n * bits % 32) throw KernelFault(std::to_string(n) + " codes of " + std::to_string(bits) + " bits do not fill whole words");
    check("codes", codes, {kU8}, {rows, n});
    check("words", words, {kI32}, {rows, n * bits / 32}, &codes);
    return {rows, n, bits};
}

void pack_bits(const Array& codes, int bits, const Array& words, uint64_t stream) {
    const DenseBits shape = bits_of(codes, words, bits);
    const SolveOps& ops = ops_for(codes);
    const OnDevice device(codes);
    nb::gil_scoped_release release;
    require_ok("pack_bits", ops.pack_bits(shape, pointer<uint8_t>(codes), pointer<uint32_t>(words), stream_of(stream)));
}

void unpack_bits(const Array& words, int bits, const Array& codes, uint64_t stream) {
    const DenseBits shape = bits_of(codes, words, bits);
    const SolveOps& ops = ops_for(codes);
    const OnDevice device(codes);
    nb::gil_scoped_release release;
    require_ok("unpack_bits", ops.unpack_bits(shape, pointer<uint32_t>(words), pointer<uint8_t>(codes), stream_of(stream)));
}

}  // namespace

void register_solve(nb::module_& m) {
    using nb::arg;
    m.def("fit_affine", &fit_affine, arg("W"), arg("importance"), arg("bits"), arg("group_size"), arg("sym"), arg("search"), arg("held"),
          arg("scale"), arg("zero"), arg("basis") = nb::none(), arg("E") = nb::none(), arg("stream") = 0);
    m.def("gptq_chunk", &gptq_chunk, arg("W"), arg("U"), arg("scale"), arg("offset").none(), arg("group"), arg("lo"), arg("hi"),
          arg("book").none(), arg("mids").none(), arg("codes"), arg("E"), arg("D") = nb::none(), arg("stream") = 0);
    m.def("choose_grid", &choose_grid, arg("W"), arg("blocks"), arg("scale"), arg("offset").none(), arg("lo"), arg("hi"), arg("best"),
          arg("stream") = 0);
    m.def("pack_bits", &pack_bits, arg("codes"), arg("bits"), arg("words"), arg("stream") = 0);
    m.def("unpack_bits", &unpack_bits, arg("words"), arg("bits"), arg("codes"), arg("stream") = 0);
}

}  // namespace quantcli
