#include "driver.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#define DISA_FAST_POSIX
#include <dlfcn.h>
#endif

namespace disa_fast::cuda {
namespace {

// From cuda.h, where these are CUresult, CUdevice_attribute, CUfunction_attribute and CUexecAffinityType. Handles are pointers,
// all but that of a device.
constexpr int CUDA_SUCCESS = 0;
constexpr int CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
constexpr int CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;
constexpr int CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 0;
constexpr int CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1;
constexpr int CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3;
constexpr int CU_FUNC_ATTRIBUTE_NUM_REGS = 4;
constexpr int CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
constexpr int CU_EXEC_AFFINITY_TYPE_SM_COUNT = 0;

struct CUexecAffinityParam {
  int type;
  unsigned multiprocessors;  // smCount.val
};

// The driver's functions, under the names that cuda.h gives their present versions.
struct Driver {
  int (*init)(unsigned flags);
  int (*error_name)(int error, const char** name);
  int (*error_string)(int error, const char** text);
  int (*device_get)(int* device, int ordinal);
  int (*device_attribute)(int* value, int attribute, int device);
  int (*retain_primary)(void** context, int device);
  int (*release_primary)(int device);
  int (*current_context)(void** context);
  int (*set_context)(void* context);
  int (*context_device)(int* device);
  int (*load_module)(void** module, const void* image);
  int (*unload_module)(void* module);
  int (*get_function)(void** function, void* module, const char* name);
  int (*get_attribute)(int* value, int attribute, void* function);
  int (*set_attribute)(void* function, int attribute, int value);
  int (*occupancy)(int* blocks, void* function, int threads, size_t shared_bytes);
  int (*launch_cooperative)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads_x,
                            unsigned threads_y, unsigned threads_z, unsigned shared_bytes, void* stream, void** parameters);
  int (*exec_affinity)(CUexecAffinityParam* affinity, int type);                           // CUDA 11.4, or null
  int (*parameter_info)(void* function, size_t parameter, size_t* offset, size_t* bytes);  // CUDA 12.4, or null
};

#if defined(DISA_FAST_POSIX)
template <class Pointer>
void find(void* library, const char* name, Pointer& found, const char* file = nullptr) {
  found = reinterpret_cast<Pointer>(dlsym(library, name));
  if (!found && file) throw std::runtime_error(std::string(file) + " has no " + name + ": too old a driver");
}
#endif

[[noreturn]] void fail(const Driver& driver, int error, const std::string& what) {
  const char *name = nullptr, *text = nullptr;
  driver.error_name(error, &name);
  driver.error_string(error, &text);
  throw std::runtime_error(what + ": " + (name ? name : "error " + std::to_string(error)) + (text ? std::string(": ") + text : ""));
}

Driver open_driver() {
#if defined(DISA_FAST_POSIX)
  const char* file = std::getenv("DISA_FAST_LIBCUDA");
  if (!file || !*file) file = "libcuda.so.1";
  void* const library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* reason = dlerror();
    throw std::runtime_error(std::string("the CUDA driver cannot be opened: ") + (reason ? reason : file));
  }
  Driver d;
  find(library, "cuInit", d.init, file);
  find(library, "cuGetErrorName", d.error_name, file);
  find(library, "cuGetErrorString", d.error_string, file);
  find(library, "cuDeviceGet", d.device_get, file);
  find(library, "cuDeviceGetAttribute", d.device_attribute, file);
  find(library, "cuDevicePrimaryCtxRetain", d.retain_primary, file);
  find(library, "cuDevicePrimaryCtxRelease_v2", d.release_primary, file);
  find(library, "cuCtxGetCurrent", d.current_context, file);
  find(library, "cuCtxSetCurrent", d.set_context, file);
  find(library, "cuCtxGetDevice", d.context_device, file);
  find(library, "cuModuleLoadData", d.load_module, file);
  find(library, "cuModuleUnload", d.unload_module, file);
  find(library, "cuModuleGetFunction", d.get_function, file);
  find(library, "cuFuncGetAttribute", d.get_attribute, file);
  find(library, "cuFuncSetAttribute", d.set_attribute, file);
  find(library, "cuOccupancyMaxActiveBlocksPerMultiprocessor", d.occupancy, file);
  find(library, "cuLaunchCooperativeKernel", d.launch_cooperative, file);
  find(library, "cuCtxGetExecAffinity", d.exec_affinity);
  find(library, "cuFuncGetParamInfo", d.parameter_info);
  if (const int error = d.init(0)) fail(d, error, "cuInit");
  return d;
#else
  throw std::runtime_error("the CUDA driver is looked for on Linux only");
#endif
}

const Driver& driver() {
  static const Driver opened = open_driver();  // tried again if that throws
  return opened;
}

void check(int error, const char* what) {
  if (error != CUDA_SUCCESS) fail(driver(), error, what);
}

void check(int error, const char* what, const std::string& name) {
  if (error != CUDA_SUCCESS) fail(driver(), error, what + (" of " + name));
}

// A context that is the calling thread's for a while.
class Entered {
 public:
  explicit Entered(void* context) {
    check(driver().current_context(&before_), "cuCtxGetCurrent");
    if (before_ == context) return;
    check(driver().set_context(context), "cuCtxSetCurrent");
    changed_ = true;
  }
  ~Entered() {
    if (changed_) driver().set_context(before_);
  }
  Entered(const Entered&) = delete;

 private:
  void* before_ = nullptr;
  bool changed_ = false;
};

int attribute_of(void* function, int attribute, const std::string& name) {
  int value = 0;
  check(driver().get_attribute(&value, attribute, function), "cuFuncGetAttribute", name);
  return value;
}

std::string in_words(unsigned threads, unsigned shared_bytes) {
  return std::to_string(threads) + " threads, " + std::to_string(shared_bytes) + " bytes of shared memory";
}

}  // namespace

// By way of another constructor, after which the destructor undoes what was done before a failure.
Module::Module(const char* image, int device) : Module() {
  const Driver& d = driver();
  int current = -1;
  check(d.current_context(&context_), "cuCtxGetCurrent");
  if (context_) check(d.context_device(&current), "cuCtxGetDevice");
  check(d.device_get(&device_, device), "cuDeviceGet", "device " + std::to_string(device));
  if (!context_ || current != device_) {
    check(d.retain_primary(&context_, device_), "cuDevicePrimaryCtxRetain", "device " + std::to_string(device));
    retained_ = true;
  }
  const Entered here(context_);
  check(d.load_module(&module_, image), "cuModuleLoadData", "code for sm_" + std::to_string(architecture()));
}

Module::~Module() {
  // What fails here is a driver that shuts down, or a context that is gone with all that was in it.
  try {
    if (module_) {
      const Entered here(context_);
      driver().unload_module(module_);
    }
    if (retained_) driver().release_primary(device_);
  } catch (const std::runtime_error&) {
  }
}

int Module::device_attribute(int attribute, const char* what) const {
  int value = 0;
  check(driver().device_attribute(&value, attribute, device_), "cuDeviceGetAttribute", what);
  return value;
}

int Module::multiprocessors() const {
  const int count = device_attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, "MULTIPROCESSOR_COUNT");
  const Entered here(context_);
  CUexecAffinityParam affinity{};
  const auto ask = driver().exec_affinity;
  if (!ask || ask(&affinity, CU_EXEC_AFFINITY_TYPE_SM_COUNT) != CUDA_SUCCESS || affinity.multiprocessors == 0) return count;
  return int(std::min<unsigned>(count, affinity.multiprocessors));
}

int Module::shared_bytes() const {
  return device_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN");
}

int Module::architecture() const {
  return 10 * device_attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, "COMPUTE_CAPABILITY_MAJOR") +
         device_attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, "COMPUTE_CAPABILITY_MINOR");
}

Module::Function Module::function(const std::string& name, unsigned shared_bytes) {
  const Driver& d = driver();
  const std::lock_guard lock(mutex_);
  auto found = functions_.find(name);
  if (found == functions_.end()) {
    Function fresh;
    check(d.get_function(&fresh.handle, module_, name.c_str()), "cuModuleGetFunction", name);
    size_t offset = 0;
    if (!d.parameter_info || d.parameter_info(fresh.handle, 0, &offset, &fresh.parameter_bytes) != CUDA_SUCCESS)
      fresh.parameter_bytes = 0;
    found = functions_.emplace(name, fresh).first;
  }
  Function& function = found->second;
  if (shared_bytes > function.shared_bytes) {
    const int error = d.set_attribute(function.handle, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, int(shared_bytes));
    if (error != CUDA_SUCCESS)
      fail(d, error, "cuFuncSetAttribute of " + name + ", " + std::to_string(shared_bytes) + " bytes of shared memory");
    function.shared_bytes = shared_bytes;
  }
  return function;
}

Resources Module::resources(const std::string& name) {
  const Entered here(context_);
  void* const handle = function(name, 0).handle;
  return {attribute_of(handle, CU_FUNC_ATTRIBUTE_NUM_REGS, name), attribute_of(handle, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, name),
          attribute_of(handle, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, name),
          attribute_of(handle, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, name)};
}

int Module::fits(const std::string& name, unsigned threads, unsigned shared_bytes) {
  const Entered here(context_);
  int blocks = 0;
  const int error = driver().occupancy(&blocks, function(name, shared_bytes).handle, int(threads), shared_bytes);
  if (error != CUDA_SUCCESS)
    fail(driver(), error, "cuOccupancyMaxActiveBlocksPerMultiprocessor of " + name + ", " + in_words(threads, shared_bytes));
  return blocks * multiprocessors();
}

void Module::launch(const std::string& name, std::string_view parameters, unsigned grid, unsigned threads, unsigned shared_bytes,
                    void* stream) {
  const Entered here(context_);
  const Function kernel = function(name, shared_bytes);
  if (kernel.parameter_bytes && kernel.parameter_bytes != parameters.size())
    throw std::runtime_error(name + " takes " + std::to_string(kernel.parameter_bytes) + " bytes of parameters, got " +
                             std::to_string(parameters.size()));
  void* first = const_cast<char*>(parameters.data());
  const int error = driver().launch_cooperative(kernel.handle, grid, 1, 1, threads, 1, 1, shared_bytes, stream, &first);
  if (error != CUDA_SUCCESS)
    fail(driver(), error,
         "cuLaunchCooperativeKernel of " + name + ", " + std::to_string(grid) + " blocks of " + in_words(threads, shared_bytes));
}

}  // namespace disa_fast::cuda
