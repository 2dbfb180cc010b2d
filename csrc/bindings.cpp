// disa_fast._C: the native core as seen from Python. Addresses come from torch tensors whose owners, disa_fast/backends/cpu.py and
// cuda.py, keep them alive and have checked them; nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/isa.h"
#include "cpu/mlp_denoise.h"
#include "cpu/probe.h"
#include "cpu/team.h"
#include "cuda/driver.h"

namespace py = pybind11;
namespace cpu = disa_fast::cpu;
namespace cuda = disa_fast::cuda;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const cpu::Kernels& kernels_named(const std::string& isa) {
  for (const cpu::Kernels* kernels : cpu::kernels_here())
    if (isa == kernels->name) return *kernels;
  throw py::value_error("isa: expected one of isas(), got " + isa);
}

using Unlocked = py::call_guard<py::gil_scoped_release>;

void bind_cuda(py::module_& m) {
  py::class_<cuda::Resources>(m, "CudaResources", "Of a kernel, as its compiler chose.")
      .def_readonly("registers", &cuda::Resources::registers, "Of a thread.")
      .def_readonly("local_bytes", &cuda::Resources::local_bytes, "Of a thread, in memory, where registers did not do.")
      .def_readonly("shared_bytes", &cuda::Resources::shared_bytes, "Of a block, static.")
      .def_readonly("threads", &cuda::Resources::threads, "Of a block, at most.");

  py::class_<cuda::Module>(
      m, "CudaModule",
      "Machine code on one GPU, through the CUDA driver: libcuda.so.1, or what the environment variable DISA_FAST_LIBCUDA names, "
      "opened when the first is made. RuntimeError with the driver's words where anything fails. Any thread may use it. A kernel "
      "is loaded by the first call that names it: before a CUDA graph's capture, not in it; likewise for making and freeing this.")
      .def(py::init([](const py::bytes& image, int device) {
             const char* bytes = std::string_view(image).data();  // behind which Python keeps a zero, as PTX needs
             py::gil_scoped_release release;
             return std::make_unique<cuda::Module>(bytes, device);
           }),
           py::kw_only(), py::arg("image"), py::arg("device"), "image: a fatbin, a cubin or PTX; device: an index, as torch's.")
      .def("multiprocessors", &cuda::Module::multiprocessors, Unlocked(), "How many may be used, here and under limits of MPS.")
      .def("shared_bytes", &cuda::Module::shared_bytes, Unlocked(), "The most that a block may have, dynamic and static together.")
      .def("architecture", &cuda::Module::architecture, Unlocked(), "90 for compute capability 9.0.")
      .def("resources", &cuda::Module::resources, Unlocked(), py::arg("name"), "What the compiler gave a kernel.")
      .def(
          "fits", &cuda::Module::fits, Unlocked(), py::kw_only(), py::arg("name"), py::arg("threads"), py::arg("shared_bytes"),
          "How many blocks can run at once, each with so much dynamic shared memory; 0 if not even one. RuntimeError where a block "
          "may not have so much.")
      .def(
          "launch",
          [](cuda::Module& module, const std::string& name, const py::bytes& parameters, unsigned grid, unsigned threads,
             unsigned shared_bytes, uintptr_t stream) {
            const std::string_view bytes(parameters);
            py::gil_scoped_release release;
            module.launch(name, bytes, grid, threads, shared_bytes, pointer<void>(stream));
          },
          py::kw_only(), py::arg("name"), py::arg("parameters"), py::arg("grid"), py::arg("threads"), py::arg("shared_bytes"),
          py::arg("stream"),
          "A cooperative launch on a stream's handle, which may be capturing; does not wait. parameters: the kernel's only one.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("PANEL") = cpu::kPanel;
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const cpu::Kernels* kernels : cpu::kernels_here()) names.push_back(kernels->name);
        return names;
      },
      "Instruction sets that this processor has kernels for, best first.");

  py::class_<cpu::Linear>(m, "Linear")
      .def(py::init([](uintptr_t panels, uintptr_t bias, int k, int columns, bool bfloat16) {
             return cpu::Linear{pointer<const void>(panels), pointer<const float>(bias), k, columns,
                                bfloat16 ? cpu::Storage::bfloat16 : cpu::Storage::float32};
           }),
           py::arg("panels"), py::arg("bias"), py::arg("k"), py::arg("columns"), py::arg("bfloat16"))
      .def_readonly("k", &cpu::Linear::k)
      .def_readonly("columns", &cpu::Linear::columns);

  py::class_<cpu::MlpWeights>(m, "MlpWeights")
      .def(py::init([](int channels, int width, float eps, const cpu::Linear& modulation, const cpu::Linear& input,
                       std::vector<cpu::Linear> first, std::vector<cpu::Linear> second, const cpu::Linear& output) {
             return cpu::MlpWeights{channels, width, eps, modulation, input, std::move(first), std::move(second), output};
           }),
           py::arg("channels"), py::arg("width"), py::arg("eps"), py::arg("modulation"), py::arg("input"), py::arg("first"),
           py::arg("second"), py::arg("output"));

  m.def(
      "mlp_denoise",
      [](const cpu::MlpWeights& weights, int steps, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t l0, uintptr_t l1,
         uintptr_t noisy, uintptr_t times, uintptr_t conditions, uintptr_t step_noise, uintptr_t state, int trajectories,
         bool guided, double cfg, double temperature, const std::string& isa, int threads) {
        const cpu::Steps table{steps,
                               pointer<const double>(a),
                               pointer<const double>(b),
                               pointer<const double>(c),
                               pointer<const double>(l0),
                               pointer<const double>(l1),
                               pointer<const bool>(noisy)};
        const cpu::MlpDenoise call{&weights,
                                   table,
                                   pointer<const float>(times),
                                   pointer<const float>(conditions),
                                   pointer<const float>(step_noise),
                                   pointer<float>(state),
                                   trajectories,
                                   guided,
                                   cfg,
                                   temperature};
        const cpu::Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release release;
        cpu::mlp_denoise(call, kernels, threads);
      },
      py::kw_only(), py::arg("weights"), py::arg("steps"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("l0"), py::arg("l1"),
      py::arg("noisy"), py::arg("times"), py::arg("conditions"), py::arg("step_noise"), py::arg("state"), py::arg("trajectories"),
      py::arg("guided"), py::arg("cfg"), py::arg("temperature"), py::arg("isa"), py::arg("threads"),
      "The denoising loop, in place in `state`; see csrc/cpu/mlp_denoise.h.");

  m.def(
      "linear",
      [](const cpu::Linear& linear, uintptr_t in, size_t stride, int rows, bool silu, uintptr_t out, const std::string& isa,
         int threads) {
        const cpu::Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release release;
        cpu::linear(linear, kernels, {pointer<float>(in), stride}, rows, silu ? cpu::Epilogue::silu : cpu::Epilogue::store,
                    pointer<float>(out), threads);
      },
      py::kw_only(), py::arg("linear"), py::arg("input"), py::arg("stride"), py::arg("rows"), py::arg("silu"), py::arg("out"),
      py::arg("isa"), py::arg("threads"), "out [rows, columns] = input [rows, k] @ weight^T + bias, through silu or not.");

  m.def(
      "read_memory",
      [](uintptr_t data, size_t bytes, const std::string& isa, int threads) {
        py::gil_scoped_release release;
        cpu::read_memory(kernels_named(isa), pointer<const void>(data), bytes, threads);
      },
      py::arg("data"), py::arg("bytes"), py::arg("isa"), py::arg("threads"), "Reads memory once; for benchmarks to time.");

  m.def(
      "multiply_add",
      [](int64_t rounds, const std::string& isa, int threads) {
        py::gil_scoped_release release;
        return cpu::multiply_add(kernels_named(isa), rounds, threads);
      },
      py::arg("rounds"), py::arg("isa"), py::arg("threads"),
      "Does float32 multiply-adds in registers and returns how many; for benchmarks to time.");

  bind_cuda(m);

  // Made now, under the GIL, so that a fork in another thread cannot meet it half made.
  cpu::Team::borrow(1);
}
