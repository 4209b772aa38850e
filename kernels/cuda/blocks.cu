// Drivers of the block types: a thread is a block (256 weights for the k-quants) and runs the same codec as a lane of the CPU.
#include <cuda_runtime.h>

#include <mutex>

#include "../blocks/kinds.h"

namespace quantcli::cuda {
namespace {

constexpr int kThreads = 64;  // a thread holds a whole block in local memory: small groups spread over more multiprocessors

__device__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

/// The low kBytes of a value, little-endian. Blocks start at even addresses at best, those of an odd size at any: words go as halves, or as
/// bytes.
template <class T, int kBytes>
__device__ void put_bytes(uint8_t* at, I value) {
    constexpr int kStep = T::kBytes % 2 ? 1 : 2;
    for (int i = 0; i < kBytes; i += kStep, value = shift_right_logical(value, 8 * kStep)) {
        if (kStep == 2)
            *reinterpret_cast<uint16_t*>(at + i) = static_cast<uint16_t>(value);
        else
            at[i] = static_cast<uint8_t>(value);
    }
}

template <class T, int kBytes>
__device__ I get_bytes(const uint8_t* at) {
    constexpr int kStep = T::kBytes % 2 ? 1 : 2;
    I value = 0;
    for (int i = 0; i < kBytes; i += kStep) value |= (kStep == 2 ? *reinterpret_cast<const uint16_t*>(at + i) : at[i]) << (8 * i);
    return value;
}

template <class T>
__device__ void store_block(const I* codes, const Params& params, uint8_t* at) {
    I words[kWords<T>];
    T::pack(codes, params, words);
    put_bytes<T, T::kHead>(at, outermost<T>(params));
    at += T::kHead;
    for (int i = 0; i < kWords<T>; ++i, at += 4) put_bytes<T, 4>(at, words[i]);
    put_bytes<T, T::kTail>(at, outermost<T>(params));
}

template <class T>
__device__ void load_block(const uint8_t* at, I* codes, Params& params) {
    I words[kWords<T>];
    if (T::kHead) outermost<T>(params) = get_bytes<T, T::kHead>(at);
    at += T::kHead;
    for (int i = 0; i < kWords<T>; ++i, at += 4) words[i] = get_bytes<T, 4>(at);
    if (T::kTail) outermost<T>(params) = get_bytes<T, T::kTail>(at);
    T::unpack(words, codes, params);
}

template <class T>
__device__ void put_params(const Params& params, int64_t block, const BlockParams& out) {
    constexpr int kSubs = T::kBlock / T::kSub;
    if (T::kHasD) out.d[block] = static_cast<uint16_t>(params.d);
    if (T::kHasMin) out.dmin[block] = static_cast<uint16_t>(params.dmin);
    if (T::kHasOffset) out.m[block] = static_cast<uint16_t>(params.m);
    for (int j = 0; T::kHasScales && j < kSubs; ++j) out.scale[block * kSubs + j] = static_cast<uint8_t>(params.scale[j]);
    for (int j = 0; T::kHasMin && j < kSubs; ++j) out.min[block * kSubs + j] = static_cast<uint8_t>(params.min[j]);
}

template <class T>
__device__ void get_params(const BlockParams& in, int64_t block, Params& params) {
    constexpr int kSubs = T::kBlock / T::kSub;
    if (T::kHasD) params.d = in.d[block];
    if (T::kHasMin) params.dmin = in.dmin[block];
    if (T::kHasOffset) params.m = in.m[block];
    for (int j = 0; T::kHasScales && j < kSubs; ++j) params.scale[j] = scale_from_byte<T>(in.scale[block * kSubs + j]);
    for (int j = 0; T::kHasMin && j < kSubs; ++j) params.min[j] = in.min[block * kSubs + j];
}

/// What a search needs: `powers` [rows] is the mean square of each row where the type weighs with it, else null.
struct Source {
    Weights W;
    const float* importance;
    const float* powers;
    int64_t n_blocks, blocks_per_row;

    /// Weight i of the whole matrix. The float type is an argument, not a template's: each copy of a search costs the compiler seconds.
    __device__ float weight(int64_t i) const {
        if (W.dtype == Float::f32) return static_cast<const float*>(W.data)[i];
        const I bits16 = static_cast<const uint16_t*>(W.data)[i];
        return W.dtype == Float::bf16 ? from_bits(bits16 << 16) : from_half(bits16);
    }
};

/// Search, and what is wanted of it: the blocks (if not null), the parameters (if out has any).
template <class T>
__global__ void search_kernel(Source source, uint8_t* blocks, BlockParams out) {
    const int64_t block = thread_index();
    if (block >= source.n_blocks) return;
    F x[T::kBlock], wanted[T::kBlock];
    const bool weighted = T::kWeighted && source.importance;
    for (int i = 0; i < T::kBlock; ++i) x[i] = source.weight(block * T::kBlock + i);
    for (int i = 0; weighted && i < T::kBlock; ++i) wanted[i] = source.importance[block % source.blocks_per_row * T::kBlock + i];
    const F power = source.powers ? source.powers[block / source.blocks_per_row] : 0.0f;
    Found found;
    static_assert(T::kAbreast == 1, "a thread is one block");
    T::search(x, weighted ? wanted : nullptr, &power, &found);
    if (out.d || out.scale) put_params<T>(found.params, block, out);
    if (!blocks) return;
    I codes[T::kBlock];
    T::encode(x, found, codes);
    store_block<T>(codes, found.params, blocks + block * T::kBytes);
}

/// Mean square of each row, a thread a row, in ggml's order.
__global__ void row_powers_kernel(Source source, float* powers) {
    const int64_t row = thread_index();
    if (row >= source.W.rows) return;
    F sum = 0.0f;
    for (int64_t i = 0; i < source.W.cols; ++i) {
        const F x = source.weight(row * source.W.cols + i);
        sum += x * x;
    }
    powers[row] = sum / static_cast<float>(source.W.cols);
}

template <class T>
__global__ void dequantize_kernel(const uint8_t* blocks, int64_t n_blocks, float* W) {
    const int64_t block = thread_index();
    if (block >= n_blocks) return;
    I codes[T::kBlock];
    Params params;
    load_block<T>(blocks + block * T::kBytes, codes, params);
    T::decode(codes, params, W + block * T::kBlock);
}

template <class T>
__global__ void pack_kernel(const int8_t* codes, BlockParams in, int64_t n_blocks, uint8_t* blocks) {
    const int64_t block = thread_index();
    if (block >= n_blocks) return;
    I lane[T::kBlock];
    Params params;
    for (int i = 0; i < T::kBlock; ++i) lane[i] = codes[block * T::kBlock + i];
    get_params<T>(in, block, params);
    store_block<T>(lane, params, blocks + block * T::kBytes);
}

template <class T>
__global__ void unpack_kernel(const uint8_t* blocks, int64_t n_blocks, int8_t* codes, BlockParams out) {
    const int64_t block = thread_index();
    if (block >= n_blocks) return;
    I lane[T::kBlock];
    Params params;
    load_block<T>(blocks + block * T::kBytes, lane, params);
    put_params<T>(params, block, out);
    for (int i = 0; i < T::kBlock; ++i) codes[block * T::kBlock + i] = static_cast<int8_t>(lane[i]);
}

// -- code books ---------------------------------------------------------------------------------------------------------------------

/// Puts a copy of array [n] on the device in its place.
template <class E>
Status move_to_device(const E*& array, size_t n) {
    void* copy = nullptr;
    Status status = cudaMalloc(&copy, n * sizeof(E));
    if (status == cudaSuccess) status = cudaMemcpy(copy, array, n * sizeof(E), cudaMemcpyHostToDevice);
    array = static_cast<const E*>(copy);
    return status;
}

/// Gives the current device the tables of a code book, once; they stay for as long as the process lives.
Status provide_grid(Grid grid) {
    constexpr int kMaxDevices = 64;
    static std::mutex lock;
    static bool is_there[kMaxDevices][kGrids];
    int device = 0;
    Status status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    const int number = static_cast<int>(grid);
    const std::lock_guard<std::mutex> guard(lock);
    if (is_there[device][number]) return kOk;
    GridTable table = grid_table(grid);
    status = move_to_device(table.points, table.n_points);
    if (status == cudaSuccess) status = move_to_device(table.index, table.n_cells);
    if (status == cudaSuccess) status = move_to_device(table.lists, 2 * table.n_cells);
    if (status == cudaSuccess) status = move_to_device(table.candidates, table.n_candidates);
    if (status == cudaSuccess) status = cudaMemcpyToSymbol(device_grids, &table, sizeof table, sizeof table * number);
    if (status == cudaSuccess) status = cudaDeviceSynchronize();
    is_there[device][number] = status == cudaSuccess;
    return status;
}

/// body(T{}) for the codec of `kind`, with the tables it needs on the device.
template <class Body>
Status with_tables(Kind kind, const Body& body) {
    return with_codec(kind, [&](auto codec) -> Status {
        if constexpr (decltype(codec)::kHasGrid) {
            if (const Status status = provide_grid(decltype(codec)::kGrid); status != kOk) return status;
        }
        return body(codec);
    });
}

unsigned grid_for(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

template <class T>
Status search_all(Weights W, const float* importance, uint8_t* blocks, BlockParams out, cudaStream_t stream) {
    const int64_t per_row = W.cols / T::kBlock;
    Source source{W, importance, nullptr, W.rows * per_row, per_row};
    if (source.n_blocks == 0) return kOk;
    float* powers = nullptr;
    if (T::kRowPower && importance) {
        const Status status = cudaMallocAsync(&powers, W.rows * sizeof(float), stream);
        if (status != cudaSuccess) return status;
        row_powers_kernel<<<grid_for(W.rows), kThreads, 0, stream>>>(source, powers);
        source.powers = powers;
    }
    search_kernel<T><<<grid_for(source.n_blocks), kThreads, 0, stream>>>(source, blocks, out);
    const Status launched = cudaGetLastError();
    const Status freed = powers ? cudaFreeAsync(powers, stream) : cudaSuccess;
    return launched != cudaSuccess ? launched : freed;
}

Status quantize(Kind kind, Weights W, const float* importance, uint8_t* blocks, void* stream) {
    return with_tables(kind, [&](auto codec) {
        return search_all<decltype(codec)>(W, importance, blocks, BlockParams{}, static_cast<cudaStream_t>(stream));
    });
}

Status fit(Kind kind, Weights W, const float* importance, BlockParams out, void* stream) {
    return with_tables(
        kind, [&](auto codec) { return search_all<decltype(codec)>(W, importance, nullptr, out, static_cast<cudaStream_t>(stream)); });
}

Status dequantize(Kind kind, const uint8_t* blocks, int64_t rows, int64_t cols, float* W, void* handle) {
    return with_tables(kind, [&](auto codec) -> Status {
        using T = decltype(codec);
        const int64_t n = rows * (cols / T::kBlock);
        if (n) dequantize_kernel<T><<<grid_for(n), kThreads, 0, static_cast<cudaStream_t>(handle)>>>(blocks, n, W);
        return cudaGetLastError();
    });
}

Status pack(Kind kind, const int8_t* codes, BlockParams in, int64_t rows, int64_t cols, uint8_t* blocks, void* handle) {
    return with_tables(kind, [&](auto codec) -> Status {
        using T = decltype(codec);
        const int64_t n = rows * (cols / T::kBlock);
        if (n) pack_kernel<T><<<grid_for(n), kThreads, 0, static_cast<cudaStream_t>(handle)>>>(codes, in, n, blocks);
        return cudaGetLastError();
    });
}

Status unpack(Kind kind, const uint8_t* blocks, int64_t rows, int64_t cols, int8_t* codes, BlockParams out, void* handle) {
    return with_tables(kind, [&](auto codec) -> Status {
        using T = decltype(codec);
        const int64_t n = rows * (cols / T::kBlock);
        if (n) unpack_kernel<T><<<grid_for(n), kThreads, 0, static_cast<cudaStream_t>(handle)>>>(blocks, n, codes, out);
        return cudaGetLastError();
    });
}

}  // namespace

extern const BlockOps block_ops;
const BlockOps block_ops = {kKindInfo, sizeof kKindInfo / sizeof *kKindInfo, quantize, dequantize, fit, pack, unpack};

}  // namespace quantcli::cuda
