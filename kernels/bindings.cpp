// The module: instruction sets, threads, and the checks that every op's arguments go through.
#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu/dispatch.h"
#include "cpu/threads.h"

namespace quantcli {

static std::string word(nb::dlpack::dtype dtype) {
    const char* names[] = {"int", "uint", "float", "opaque", "bfloat"};
    const std::string name = dtype.code < 5 ? names[dtype.code] : "code" + std::to_string(dtype.code) + "-";
    return name + std::to_string(dtype.bits);
}

static std::string shape_words(const int64_t* shape, size_t n) {
    std::string text = "[";
    for (size_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

std::string describe(const Array& array) {
    const char* device = on_cuda(array) ? "cuda" : array.device_type() == nb::device::cpu::value ? "cpu" : "another device";
    return word(array.dtype()) + " " + shape_words(array.shape_ptr(), array.ndim()) + " on " + device;
}

static bool contiguous(const Array& array) {
    int64_t stride = 1;
    for (size_t i = array.ndim(); i-- > 0; stride *= array.shape(i))
        if (array.shape(i) != 1 && array.stride(i) != stride && array.size()) return false;
    return true;
}

void check(const char* name, const Array& array, std::initializer_list<nb::dlpack::dtype> dtypes, std::initializer_list<int64_t> shape,
           const Array* like) {
    bool fits = array.ndim() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = static_cast<int64_t>(array.shape(i)) == shape.begin()[i];
    bool typed = false;
    std::string wanted;
    for (const auto dtype : dtypes) {
        typed |= array.dtype() == dtype;
        wanted += (wanted.empty() ? "" : "|") + word(dtype);
    }
    if (!fits || !typed)
        throw KernelFault(std::string(name) + ": expected " + wanted + " " + shape_words(shape.begin(), shape.size()) + ", got " +
                          describe(array));
    if (!contiguous(array)) throw KernelFault(std::string(name) + ": " + describe(array) + " is not contiguous; call .contiguous()");
    if (like && (array.device_type() != like->device_type() || array.device_id() != like->device_id()))
        throw KernelFault(std::string(name) + " is " + describe(array) + ", but the first argument is " + describe(*like));
    if (!on_cuda(array) && array.device_type() != nb::device::cpu::value)
        throw KernelFault(std::string(name) + ": " + describe(array) + "; kernels run on cpu and cuda");
}

bool on_cuda(const Array& array) { return array.device_type() == nb::device::cuda::value; }

#ifdef QUANTCLI_CUDA
namespace cuda {
int exchange_device(int device);
}
OnDevice::OnDevice(const Array& array) {
    if (on_cuda(array)) previous_ = cuda::exchange_device(array.device_id());
}
OnDevice::~OnDevice() {
    if (previous_ >= 0) cuda::exchange_device(previous_);
}
#else
OnDevice::OnDevice(const Array&) {}
OnDevice::~OnDevice() {}
#endif

void require_ok(const char* op, Status status) {
    if (status != kOk) throw KernelFault(std::string(op) + ": the device failed with CUDA error " + std::to_string(status));
}

static void use(const std::string& name) {
    if (select_set(name)) return;
    std::string available;
    for (const auto& set : instruction_sets())
        if (set.supported && !set.hidden) available += (available.empty() ? "" : ", ") + std::string(set.name);
    throw KernelFault("instruction set '" + name + "' is not available on this machine; there are: reference, " + available);
}

static std::vector<std::string> sets(bool hidden) {
    std::vector<std::string> names;
    for (const auto& set : instruction_sets())
        if (set.supported && (hidden || !set.hidden)) names.emplace_back(set.name);
    return names;
}

}  // namespace quantcli

NB_MODULE(_kernels, m) {
    using namespace quantcli;
    nb::exception<KernelFault>(m, "KernelFault", nb::module_::import_("quantcli.errors").attr("KernelError").ptr());
#ifdef QUANTCLI_CUDA
    m.attr("has_cuda") = true;
#else
    m.attr("has_cuda") = false;
#endif
    m.def("use", &use, nb::arg("name"), "Make instruction set `name` the one in use.");
    m.def("active", [] { return std::string(active_set().name); }, "The instruction set in use.");
    m.def("sets", &sets, nb::arg("hidden") = false,
          "The instruction sets this machine can run, best last; with those that only tests use.");
    m.def("set_threads", &set_threads, nb::arg("n"));
    register_blocks(m);
    register_solve(m);
    register_float4(m);
    register_minifloat(m);
}
