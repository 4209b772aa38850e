// What the solvers' CUDA drivers share.
#pragma once

#include <cuda_runtime.h>

#include "../solve.h"

namespace quantcli::cuda {

Status fit_affine(const AffineFit&, void* stream);
Status gptq_chunk(const GptqChunk&, void* stream);
Status choose_grid(const GridChoice&, void* stream);
Status pack_bits(const DenseBits&, const uint8_t* codes, uint32_t* words, void* stream);
Status unpack_bits(const DenseBits&, const uint32_t* words, uint8_t* codes, void* stream);

/// Thread blocks that give each of n pieces a thread.
inline unsigned blocks_for(int64_t n, int threads) { return static_cast<unsigned>((n + threads - 1) / threads); }

inline __device__ int64_t thread_index() { return blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; }

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace quantcli::cuda
