/* A CUDA runtime whose GPU is this processor: as much of libcudart as run.py calls.
 *
 * PAREDOWN_GPU is its compute capability, "87" unless said; "none" where there is no GPU.
 */
#include <stdlib.h>
#include <string.h>

static const char *gpu(void) {
  const char *said = getenv("PAREDOWN_GPU");
  return said ? said : "87";
}

int cudaGetDeviceCount(int *count) { return *count = strcmp(gpu(), "none") != 0, *count ? 0 : 100; }
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  const int whole = atoi(gpu());
  *value = attribute == 75 ? whole / 10 : attribute == 76 ? whole % 10 : -1;
  return device;
}
int cudaMalloc(void **pointer, size_t bytes) {
  *pointer = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(*pointer, 0xA5, bytes);
  return *pointer == NULL ? 2 : 0;
}
int cudaFree(void *pointer) { return free(pointer), 0; }
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { return memcpy(to, from, bytes), kind == 1 || kind == 2 ? 0 : 1; }
int cudaStreamCreate(void **stream) { return *stream = (void *)4321, 0; }
int cudaStreamSynchronize(void *stream) { return stream == (void *)4321 ? 0 : 400; }
const char *cudaGetErrorString(int status) { return status ? "as the test asked" : "no error"; }
