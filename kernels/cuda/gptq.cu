// Driver of the chunks of GPTQ and of the descent: a thread is an output row. Its columns lie `rows` floats apart, so that a warp reads 32
// neighbours at once.
#include "../blocks/gptq.h"
#include "solve.h"

namespace quantcli::cuda {
namespace {

constexpr int kThreads = 32;  // few rows and long ones: small blocks reach more multiprocessors

/// Column k of one row of a transposed matrix.
struct Strided {
    float* at;
    int64_t stride;
    __device__ float& operator[](int k) const { return at[k * stride]; }
};

/// Quantizes one column of one row on the grid of the column's group, and keeps the code.
template <bool kBook, bool kDescent>
struct Round {
    const GptqChunk& chunk;
    int64_t row;

    __device__ float nearest(int j, float x) const {
        const int64_t at = row * chunk.n_groups + chunk.group[j];
        const float scale = chunk.scale[at], offset = chunk.offset ? chunk.offset[at] : 0.0f;
        I code;
        float value;
        if constexpr (kBook)
            value = round_to_book(x, scale, offset, chunk.book, chunk.mids, chunk.hi + 1, code);
        else
            value = round_affine(x, scale, offset, static_cast<float>(chunk.lo), static_cast<float>(chunk.hi), code);
        chunk.codes[row * chunk.n + j] = static_cast<uint8_t>(code);
        return value;
    }

    __device__ float error(int j, float x) const {
        if constexpr (kDescent) return nearest(j, x) - chunk.D[row * chunk.n + j];
        return x - nearest(j, x);
    }
};

template <bool kBook, bool kDescent>
__global__ void solve_rows(GptqChunk chunk, float* columns) {
    const int64_t row = thread_index();
    if (row >= chunk.rows) return;
    const int n = static_cast<int>(chunk.n);
    const Strided w{columns + row, chunk.rows};
    for (int k = 0; k < n; ++k) w[k] = chunk.W[row * n + k];
    Round<kBook, kDescent> round{chunk, row};
    solve_chunk(w, chunk.U, n, round);
    for (int k = 0; k < n; ++k) chunk.E[row * n + k] = w[k];
}

}  // namespace

Status gptq_chunk(const GptqChunk& chunk, void* stream) {
    if (chunk.rows == 0 || chunk.n == 0) return kOk;
    float* columns = nullptr;
    const size_t n_bytes = sizeof(float) * static_cast<size_t>(chunk.rows * chunk.n);
    if (const Status status = cudaMallocAsync(&columns, n_bytes, stream_of(stream))) return status;
    const unsigned blocks = blocks_for(chunk.rows, kThreads);
    const auto solve = chunk.D ? (chunk.book ? solve_rows<true, true> : solve_rows<false, true>)
                               : (chunk.book ? solve_rows<true, false> : solve_rows<false, false>);
    solve<<<blocks, kThreads, 0, stream_of(stream)>>>(chunk, columns);
    const Status launched = cudaGetLastError();
    const Status freed = cudaFreeAsync(columns, stream_of(stream));
    return launched ? launched : freed;
}

}  // namespace quantcli::cuda
