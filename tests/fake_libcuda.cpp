// A CUDA driver without a GPU, for test_cuda_driver.py: two devices; calls are written down, and fail where they are told to or
// where the real ones would. WITHOUT_NEW: has only what every driver has.
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>

namespace {

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500, TOO_LARGE = 720 };

// Contexts are numbers, of which the last digit is the device's: 0x10 and 0x11 are the primary ones, others the test's own.
using Context = uintptr_t;
constexpr Context kPrimary = 0x10;
thread_local Context current = 0;

struct Module {
  Context context;
};

struct Function {
  Module* module;
  std::string name;
  int allowed_shared = 48 << 10;
};

// Shared memory: of a multiprocessor; of a block at most; what the system keeps of the first for each block; a kernel's own.
constexpr int kShared = 228 << 10, kBlockShared = 227 << 10, kReserved = 1 << 10, kOwn = 64;

std::mutex mutex;
std::string calls, reported;
std::map<std::string, int> failures;
std::map<std::string, Function> functions;

template <class... Numbers>
int called(const char* function, const char* format = "", Numbers... numbers) {
  const std::lock_guard lock(mutex);
  std::array<char, 400> text;
  std::snprintf(text.data(), text.size(), format, numbers...);
  calls += std::string(function) + (*format ? " " : "") + text.data() + "\n";
  const auto found = failures.find(function);
  return found == failures.end() ? SUCCESS : found->second;
}

int uncounted(const char* function) {
  const std::lock_guard lock(mutex);
  const auto found = failures.find(function);
  return found == failures.end() ? SUCCESS : found->second;
}

}  // namespace

extern "C" {

// For the test to set: what the context may use, what a kernel takes, whether launches wait, whether what the system keeps of a
// block's shared memory is told as the kernel's own.
int fake_affinity = 0;
int fake_tells_reserved = 0;
int fake_parameter_bytes = 0;
std::atomic<int> fake_hold{0};
std::atomic<int> fake_held{0};

// The calls so far, one a line, and forgets them.
const char* fake_calls() {
  const std::lock_guard lock(mutex);
  reported.swap(calls);
  calls.clear();
  return reported.c_str();
}

void fake_fail(const char* function, int error) {
  const std::lock_guard lock(mutex);
  failures[function] = error;
}

int cuInit(unsigned flags) { return called("cuInit", "%u", flags); }

int cuGetErrorName(int error, const char** name) {
  *name = error == INVALID_VALUE     ? "CUDA_ERROR_INVALID_VALUE"
          : error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
          : error == NOT_FOUND       ? "CUDA_ERROR_NOT_FOUND"
          : error == TOO_LARGE       ? "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
                                     : nullptr;
  return *name ? SUCCESS : INVALID_VALUE;
}

int cuGetErrorString(int error, const char** text) {
  *text = error == INVALID_VALUE     ? "invalid argument"
          : error == INVALID_CONTEXT ? "invalid device context"
          : error == NOT_FOUND       ? "named symbol not found"
          : error == TOO_LARGE       ? "too many blocks in cooperative launch"
                                     : nullptr;
  return *text ? SUCCESS : INVALID_VALUE;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < 0 || ordinal > 1 ? INVALID_VALUE : uncounted("cuDeviceGet");
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 16:
      *value = 132 - device;
      break;  // multiprocessors
    case 75:
      *value = 9;
      break;  // compute capability
    case 76:
      *value = 0;
      break;
    case 97:
      *value = kBlockShared;
      break;  // shared memory of a block
    default:
      return INVALID_VALUE;
  }
  return uncounted("cuDeviceGetAttribute");
}

int cuDevicePrimaryCtxRetain(Context* context, int device) {
  *context = kPrimary + device;
  return called("cuDevicePrimaryCtxRetain", "%d", device);
}

int cuDevicePrimaryCtxRelease_v2(int device) { return called("cuDevicePrimaryCtxRelease", "%d", device); }

int cuCtxGetCurrent(Context* context) {
  *context = current;
  return uncounted("cuCtxGetCurrent");
}

int cuCtxSetCurrent(Context context) {
  current = context;
  return called("cuCtxSetCurrent", "%#zx", context);
}

int cuCtxGetDevice(int* device) {
  *device = int(current % 0x10);
  return current ? uncounted("cuCtxGetDevice") : INVALID_CONTEXT;
}

int cuModuleLoadData(Module** module, const void* image) {
  if (!current) return INVALID_CONTEXT;
  *module = new Module{current};
  return called("cuModuleLoadData", "'%s' in %#zx", static_cast<const char*>(image), current);
}

int cuModuleUnload(Module* module) {
  return called("cuModuleUnload", module->context == current ? "in its context" : "in another context");
}

int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  if (std::strncmp(name, "mlp_denoise", 11) != 0) return NOT_FOUND;
  const int error = called("cuModuleGetFunction", "%s", name);
  const std::lock_guard lock(mutex);
  *function = &functions.insert_or_assign(name, Function{module, name}).first->second;
  return error;
}

static int static_bytes() { return kOwn + (fake_tells_reserved ? kReserved : 0); }

int cuFuncGetAttribute(int* value, int attribute, Function*) {
  switch (attribute) {
    case 0:
      *value = 512;
      break;  // threads
    case 1:
      *value = static_bytes();
      break;  // shared memory
    case 3:
      *value = 8;
      break;  // local memory
    case 4:
      *value = 128;
      break;  // registers
    default:
      return INVALID_VALUE;
  }
  return uncounted("cuFuncGetAttribute");
}

int cuFuncSetAttribute(Function* function, int attribute, int value) {
  if (attribute != 8 || value < 0 || value + static_bytes() > kBlockShared) return INVALID_VALUE;
  function->allowed_shared = value;
  return called("cuFuncSetAttribute", "%s shared=%d", function->name.c_str(), value);
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int threads, size_t shared_bytes) {
  const bool allowed = threads <= 512 && int(shared_bytes) <= function->allowed_shared;
  *blocks = allowed ? int(std::min<size_t>(2048 / threads, kShared / (shared_bytes + kOwn + kReserved))) : 0;
  return uncounted("cuOccupancyMaxActiveBlocksPerMultiprocessor");
}

int cuLaunchCooperativeKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads_x,
                              unsigned threads_y, unsigned threads_z, unsigned shared_bytes, void* stream, void** parameters) {
  ++fake_held;
  while (fake_hold) std::this_thread::yield();
  if (function->module->context != current) return INVALID_CONTEXT;
  if (int(shared_bytes) > function->allowed_shared) return INVALID_VALUE;
  if (grid_x > 132 * (kShared / (shared_bytes + kOwn + kReserved))) return TOO_LARGE;
  const int bytes = fake_parameter_bytes ? fake_parameter_bytes : 4;
  return called("cuLaunchCooperativeKernel", "%s (%u %u %u) x (%u %u %u) shared=%u stream=%#zx '%.*s'", function->name.c_str(),
                grid_x, grid_y, grid_z, threads_x, threads_y, threads_z, shared_bytes, uintptr_t(stream), bytes,
                static_cast<const char*>(parameters[0]));
}

#if !defined(WITHOUT_NEW)

int cuCtxGetExecAffinity(int* affinity, int type) {
  if (!current || type != 0) return INVALID_CONTEXT;
  affinity[0] = type;
  affinity[1] = fake_affinity;
  return uncounted("cuCtxGetExecAffinity");
}

int cuFuncGetParamInfo(Function*, size_t parameter, size_t* offset, size_t* bytes) {
  *offset = 0;
  *bytes = fake_parameter_bytes;
  return parameter == 0 && fake_parameter_bytes ? SUCCESS : INVALID_VALUE;
}

#endif

}  // extern "C"
