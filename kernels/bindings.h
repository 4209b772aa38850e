// What the bindings files share: an array argument and its checks, each with the actual values in the words.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <string>

#include "api.h"

namespace quantcli {

namespace nb = nanobind;
using Array = nb::ndarray<>;

/// What ops raises as KernelError.
struct KernelFault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string describe(const Array& array);

/// Raises unless `array` has one of these dtypes and this shape, is contiguous and lies where `like` lies (if given).
void check(const char* name, const Array& array, std::initializer_list<nb::dlpack::dtype> dtypes, std::initializer_list<int64_t> shape,
           const Array* like = nullptr);

constexpr nb::dlpack::dtype kF32{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 32, 1};
constexpr nb::dlpack::dtype kF16{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
constexpr nb::dlpack::dtype kBf16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
constexpr nb::dlpack::dtype kU8{static_cast<uint8_t>(nb::dlpack::dtype_code::UInt), 8, 1};
constexpr nb::dlpack::dtype kI8{static_cast<uint8_t>(nb::dlpack::dtype_code::Int), 8, 1};
constexpr nb::dlpack::dtype kI32{static_cast<uint8_t>(nb::dlpack::dtype_code::Int), 32, 1};

bool on_cuda(const Array& array);

/// While it lives, this thread's CUDA calls go to the array's device. Nothing for an array on the CPU.
class OnDevice {
  public:
    explicit OnDevice(const Array& array);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;

  private:
    int previous_ = -1;
};

void require_ok(const char* op, Status status);

void register_blocks(nb::module_& m);
void register_solve(nb::module_& m);
void register_float4(nb::module_& m);
void register_minifloat(nb::module_& m);

}  // namespace quantcli
