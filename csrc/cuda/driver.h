// Cooperative kernels launched through the CUDA driver's own interface, which is opened when first used. Nothing is linked and no
// CUDA header is needed, so one binary serves PyTorch for any CUDA, or for none.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <string_view>

namespace disa_fast::cuda {

// What the compiler gave a kernel, for a thread or a block.
struct Resources {
  int registers;
  int local_bytes;   // of a thread, where registers did not do
  int shared_bytes;  // of a block, static; some drivers may count what the system keeps for itself
  int threads;       // of a block, at most
};

// Machine code on one GPU. Every call may come from any thread, with any context current or none, and leaves that as it was. They
// throw std::runtime_error, with what was tried and what the driver said.
class Module {
 public:
  // image: a fatbin, a cubin, or PTX that a zero ends. Loaded in the calling thread's context if that is on this device, else in
  // the device's primary context, which is PyTorch's. device: as PyTorch counts.
  Module(const char* image, int device);

  // Unloads the code: nothing that uses it may be running then, nor be kept in a CUDA graph.
  ~Module();
  Module(const Module&) = delete;

  // How many multiprocessors the context may use: all of the device, or what is left of them under a limit of MPS.
  int multiprocessors() const;
  // The most that a block may have, dynamic and what `resources` calls static together.
  int shared_bytes() const;
  // 90, for compute capability 9.0.
  int architecture() const;

  Resources resources(const std::string& name);

  // How many blocks can run at once, each with so much dynamic shared memory, as the driver counts. 0 if not even one. Throws where
  // a block may not have so much.
  int fits(const std::string& name, unsigned threads, unsigned shared_bytes);

  // A cooperative launch on a CUstream, which may be capturing; does not wait for it. parameters: the kernel's only one. The first
  // call that names a kernel loads its code, which a capture may not allow, so let it be `fits` or `resources`.
  void launch(const std::string& name, std::string_view parameters, unsigned grid, unsigned threads, unsigned shared_bytes,
              void* stream);

 private:
  Module() = default;

  struct Function {
    void* handle = nullptr;
    size_t parameter_bytes = 0;  // 0 where the driver does not tell
    unsigned shared_bytes = 0;   // dynamic, that it was allowed to have
  };

  // Allowed to have so much dynamic shared memory.
  Function function(const std::string& name, unsigned shared_bytes);
  int device_attribute(int attribute, const char* what) const;

  int device_ = 0;
  void* context_ = nullptr;
  bool retained_ = false;  // the primary context, which stays until released
  void* module_ = nullptr;
  std::mutex mutex_;
  std::map<std::string, Function> functions_;
};

}  // namespace disa_fast::cuda
