/* Of the CUDA runtime, what our plugin for TensorRT uses; written for tests. */
#ifndef PAREDOWN_TEST_CUDA_RUNTIME_API_H
#define PAREDOWN_TEST_CUDA_RUNTIME_API_H

typedef void *cudaStream_t;
typedef enum { cudaSuccess = 0 } cudaError_t;

extern "C" cudaError_t cudaGetDevice(int *device);

#endif
