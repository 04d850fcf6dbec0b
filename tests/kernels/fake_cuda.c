/* A CUDA driver that has no GPU: it notes what it is asked, so that tests see what the real one would be given.
 *
 * PAREDOWN_FAKE_CAPABILITY (90), PAREDOWN_FAKE_DRIVER (13000) and PAREDOWN_FAKE_PROCESSORS (3) say what it stands for,
 * PAREDOWN_FAKE_FAILURE names a function that fails, PAREDOWN_FAKE_LOG the file that notes go to. A kernel's name ends in
 * the types of its arguments after "__": p pointer, i int32, f float. Memory is that of the CPU, and a test that sets
 * paredown_fake_launch runs kernels itself.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static __thread void *stack[8];
static __thread int depth;

struct piece {
  uintptr_t address;
  size_t bytes;
};
static struct piece pieces[1024];

/* Of a launch: the kernel, grid and block and shared memory, the stream, the arguments. */
void (*paredown_fake_launch)(const char *function, const unsigned *sizes, void *stream, void **arguments);
const struct piece *paredown_fake_memory(void) { return pieces; }

static void note(const char *text) {
  const char *path = getenv("PAREDOWN_FAKE_LOG");
  FILE *file = path ? fopen(path, "a") : NULL;
  if (file == NULL) return;
  fprintf(file, "%s\n", text);
  fclose(file);
}

static int number(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

static int fails(const char *name) {
  const char *failing = getenv("PAREDOWN_FAKE_FAILURE");
  return failing != NULL && strcmp(failing, name) == 0 ? 700 : 0;
}

int cuInit(unsigned flags) { return flags ? 1 : fails("cuInit"); }
int cuDriverGetVersion(int *version) { return *version = number("PAREDOWN_FAKE_DRIVER", 13000), 0; }
int cuDeviceGetCount(int *count) { return *count = 2, 0; }
int cuDeviceGet(int *handle, int device) { return *handle = device + 100, device < 2 ? 0 : 101; }
int cuDeviceGetName(char *text, int size, int handle) { return snprintf(text, size, "Fake GPU %d", handle - 100), 0; }

int cuDeviceGetAttribute(int *value, int attribute, int handle) {
  const int capability = number("PAREDOWN_FAKE_CAPABILITY", 90);
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 16 ? number("PAREDOWN_FAKE_PROCESSORS", 3) : -1;
  return handle >= 100 ? 0 : 101;
}

int cuDevicePrimaryCtxRetain(void **context, int handle) { return *context = (void *)(intptr_t)(handle * 16), 0; }
int cuCtxGetCurrent(void **context) { return *context = depth ? stack[depth - 1] : NULL, 0; }
int cuCtxPushCurrent_v2(void *context) { return stack[depth++] = context, 0; }
int cuCtxPopCurrent_v2(void **context) { return depth ? (*context = stack[--depth], 0) : 201; }

int cuDevicePrimaryCtxRelease_v2(int handle) { return handle >= 100 ? 0 : 101; }
int cuModuleUnload(void *module) { return module == NULL; }
int cuStreamSynchronize(void *stream) { return (void)stream, fails("cuStreamSynchronize"); }

/* Memory of the device is aligned to 256 bytes, and holds what was there before: here poison. */
int cuMemAlloc_v2(uintptr_t *address, size_t bytes) {
  struct piece *piece = pieces;
  if (!depth || bytes == 0 || fails("cuMemAlloc_v2")) return depth ? 700 : 201;
  while (piece->address) ++piece;
  *address = (uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset((void *)*address, 0xA5, bytes);
  piece->address = *address, piece->bytes = bytes;
  return 0;
}

int cuMemFree_v2(uintptr_t address) {
  struct piece *piece = pieces;
  while (piece->address != address) {
    if (++piece == pieces + sizeof pieces / sizeof *pieces) return 1;
  }
  piece->address = 0, piece->bytes = 0;
  free((void *)address);
  return 0;
}

int cuMemcpyHtoD_v2(uintptr_t to, const void *from, size_t bytes) {
  if (!depth) return 201;
  memcpy((void *)to, from, bytes);
  return 0;
}

int cuModuleLoadData(void **module, const char *image) {
  char text[64];
  if (!depth) return 201;
  snprintf(text, sizeof text, "load in %d: %.4s", (int)(intptr_t)stack[depth - 1], image + (image[0] == 127));
  note(text);
  *module = (void *)image;
  return fails("cuModuleLoadData");
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  if (module == NULL || strncmp(name, "absent", 6) == 0) return 500;
  *function = strdup(name);
  return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
  char text[128];
  snprintf(text, sizeof text, "attribute %d of %s: %d", attribute, (const char *)function, value);
  note(text);
  return 0;
}

int cuLaunchKernel(const char *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
  char text[1024];
  const char *types = strstr(function, "__");
  const unsigned sizes[7] = {gx, gy, gz, bx, by, bz, shared};
  if (paredown_fake_launch) {
    paredown_fake_launch(function, sizes, stream, arguments);
    return !depth || extra != NULL ? 1 : fails("cuLaunchKernel");
  }
  int size = snprintf(text, sizeof text, "launch %s in %d on %d: %u %u %u, %u %u %u, %u:", function,
                      depth ? (int)(intptr_t)stack[depth - 1] : 0, (int)(intptr_t)stream, gx, gy, gz, bx, by, bz, shared);
  for (types = types ? types + 2 : ""; *types; ++types, ++arguments) {
    if (*types == 'p') size += snprintf(text + size, sizeof text - size, " %lu", (unsigned long)*(uintptr_t *)*arguments);
    if (*types == 'i') size += snprintf(text + size, sizeof text - size, " %d", *(int32_t *)*arguments);
    if (*types == 'f') size += snprintf(text + size, sizeof text - size, " %g", *(float *)*arguments);
  }
  note(text);
  return extra != NULL ? 1 : fails("cuLaunchKernel");
}

int cuGetErrorName(int status, const char **name) {
  return status == 700 ? (*name = "CUDA_ERROR_ILLEGAL_ADDRESS", 0) : status == 500 ? (*name = "CUDA_ERROR_NOT_FOUND", 0) : 1;
}
int cuGetErrorString(int status, const char **text) { return *text = "as the test asked", status == 700 || status == 500 ? 0 : 1; }
