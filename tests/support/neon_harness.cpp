// Arm's lane of the kernels as a program without an operating system: what test_kernels_neon.py links it with, and calls in an emulator.
#include <cstddef>
#include <cstdint>

#include "api.h"
#include "cpu/threads.h"

namespace {
alignas(64) unsigned char heap[8 << 20];
std::size_t used = 0;
}  // namespace

/// Nothing is given back: a call ends the program.
void* operator new[](std::size_t n) {
    void* at = heap + used;
    used += (n + 63) / 64 * 64;
    return at;
}
void operator delete[](void*) noexcept {}
void operator delete[](void*, std::size_t) noexcept {}

namespace quantcli {

int threads() { return 1; }
void parallel_run(int64_t n, int64_t grain, void (*run)(const void*, int64_t, int64_t), const void* context) {
    for (int64_t i = 0; i < n; i += grain) run(context, i, i + grain < n ? i + grain : n);
}

namespace neon {
extern const BlockOps block_ops;
}

}  // namespace quantcli

using namespace quantcli;

extern "C" {

Status quantize(int kind, const float* W, int64_t rows, int64_t cols, const float* importance, uint8_t* blocks) {
    return neon::block_ops.quantize(static_cast<Kind>(kind), {W, Float::f32, rows, cols}, importance, blocks, nullptr);
}

Status dequantize(int kind, const uint8_t* blocks, int64_t rows, int64_t cols, float* W) {
    return neon::block_ops.dequantize(static_cast<Kind>(kind), blocks, rows, cols, W, nullptr);
}

void* memcpy(void* to, const void* from, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) static_cast<volatile unsigned char*>(to)[i] = static_cast<const unsigned char*>(from)[i];
    return to;
}

void* memset(void* to, int value, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) static_cast<volatile unsigned char*>(to)[i] = static_cast<unsigned char>(value);
    return to;
}
}
