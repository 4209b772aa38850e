// The device that CUDA calls of this thread go to.
#include <cuda_runtime.h>

namespace quantcli::cuda {

/// Makes `device` the current one and returns the one before.
int exchange_device(int device) {
    int previous = device;
    cudaGetDevice(&previous);
    if (previous != device) cudaSetDevice(device);
    return previous;
}

}  // namespace quantcli::cuda
