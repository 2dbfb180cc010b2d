// The CPU core without Python, for `make sanitize`: sizes that end in the middle of panels, blocks and chunks against a plain loop
// in double precision; bits that depend neither on threads nor on neighbours; calls from several threads; a call after fork.
#include "cpu/mlp_denoise.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/probe.h"
#include "cpu/team.h"

using namespace disa_fast::cpu;

namespace {

void check(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

int up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

float bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0xffff0000;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A linear layer as numbers, and packed; its memory ends where the panels end, for the sanitizer to see any step beyond.
struct Layer {
  int columns, k;
  std::vector<float> weight, bias;  // padded: [columns, k], [columns]
  std::unique_ptr<char[]> panels;
  Linear packed;

  Layer(int true_columns, int true_k, Storage storage, std::mt19937& random, float bias_mean = 0) {
    columns = up(true_columns, kPanel);
    k = up(true_k, 2);
    std::normal_distribution<float> normal;
    weight.assign(size_t(columns) * k, 0);
    bias.assign(columns, 0);
    for (int c = 0; c < true_columns; ++c) {
      bias[c] = bias_mean + 0.1f * normal(random);
      for (int i = 0; i < true_k; ++i) weight[size_t(c) * k + i] = bfloat16(normal(random) / std::sqrt(float(true_k)));
    }
    const size_t bytes = storage == Storage::float32 ? 4 : 2;
    panels = std::make_unique<char[]>(size_t(columns) * k * bytes);
    for (int c = 0; c < columns; ++c)
      for (int i = 0; i < k; ++i) {
        const float& w = weight[size_t(c) * k + i];
        const size_t panel = size_t(c / kPanel) * k * kPanel, column = c % kPanel;
        if (storage == Storage::float32)
          std::memcpy(&panels[(panel + size_t(i) * kPanel + column) * 4], &w, 4);
        else
          std::memcpy(&panels[(panel + size_t(i / 2) * 2 * kPanel + 2 * column + i % 2) * 2], reinterpret_cast<const char*>(&w) + 2,
                      2);
      }
    packed = {panels.get(), bias.data(), k, columns, storage};
  }

  std::vector<double> operator()(const std::vector<double>& x) const {
    std::vector<double> y(columns);
    for (int c = 0; c < columns; ++c) {
      y[c] = bias[c];
      for (int i = 0; i < k; ++i) y[c] += double(weight[size_t(c) * k + i]) * (i < int(x.size()) ? x[i] : 0.0);
    }
    return y;
  }
};

double silu(double x) { return x / (1 + std::exp(-x)); }

struct Head {
  int channels, width, depth, padded;
  std::vector<Layer> first, second;
  std::unique_ptr<Layer> modulation, input, output;
  MlpWeights weights;

  Head(int channels, int width, int depth, Storage storage, int seed) : channels(channels), width(width), depth(depth) {
    std::mt19937 random(seed);
    padded = up(width, kPanel);
    for (int i = 0; i < depth; ++i) {
      first.emplace_back(width, width, storage, random);
      second.emplace_back(width, width, storage, random);
    }
    // Every part is padded for itself. A part's columns beyond the width are zero.
    modulation = std::make_unique<Layer>((3 * depth + 2) * padded, width, storage, random, 0.5f);
    input = std::make_unique<Layer>(width, channels, Storage::float32, random);
    output = std::make_unique<Layer>(2 * channels, width, Storage::float32, random);
    weights = {channels, width, 1e-6f, modulation->packed, input->packed, {}, {}, output->packed};
    for (int i = 0; i < depth; ++i) {
      weights.first.push_back(first[i].packed);
      weights.second.push_back(second[i].packed);
    }
  }

  std::vector<double> normalize(std::vector<double> h, const double* shift, const double* scale) const {
    double mean = 0, square = 0;
    for (int j = 0; j < width; ++j) mean += h[j] / width;
    for (int j = 0; j < width; ++j) square += (h[j] - mean) * (h[j] - mean) / width;
    for (int j = 0; j < width; ++j) h[j] = (h[j] - mean) / std::sqrt(square + 1e-6) * scale[j] + shift[j];
    h.resize(width);
    return h;
  }

  std::vector<double> operator()(const std::vector<double>& x, const float* time, const float* condition) const {
    std::vector<double> y(width);
    for (int j = 0; j < width; ++j) y[j] = silu(double(time[j]) + condition[j]);
    const std::vector<double> parts = (*modulation)(y);
    std::vector<double> h = (*input)(x);
    for (int i = 0; i < depth; ++i) {
      const double* part = &parts[size_t(3 * i) * padded];
      std::vector<double> m = first[i](normalize(h, part, part + padded));
      for (double& value : m) value = silu(value);
      m.resize(width);
      m = second[i](m);
      for (int j = 0; j < width; ++j) h[j] += part[2 * padded + j] * m[j];
    }
    const double* part = &parts[size_t(3 * depth) * padded];
    return (*output)(normalize(h, part, part + padded));
  }
};

// A call with all that it points to.
struct Problem {
  const Head& head;
  int trajectories, rows;
  bool guided;
  double cfg, temperature = 0.8;
  std::vector<double> a, b, c, l0, l1;
  std::unique_ptr<bool[]> noisy;
  std::vector<float> times, conditions, step_noise, start;

  Problem(const Head& head, int trajectories, int steps, double cfg, int seed)
      : head(head), trajectories(trajectories), rows(cfg == 1 ? trajectories : 2 * trajectories), guided(cfg != 1), cfg(cfg) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto draw = [&](size_t count, int width, int padded) {
      std::vector<float> values(count * padded, 0);
      for (size_t i = 0; i < count; ++i)
        for (int j = 0; j < width; ++j) values[i * padded + j] = normal(random);
      return values;
    };
    noisy = std::make_unique<bool[]>(steps);
    for (int i = 0; i < steps; ++i) {
      a.push_back(0.9 + 0.01 * i);
      b.push_back(-0.3);
      c.push_back(i % 2 ? 0.1 : 0);
      l0.push_back(-2);
      l1.push_back(0.5);
      noisy[i] = i % 3 != 2;
    }
    times = draw(steps, head.width, head.padded);
    conditions = draw(rows, head.width, head.padded);
    step_noise = draw(size_t(steps) * trajectories, head.channels, head.channels);
    start = draw(trajectories, head.channels, head.channels);
  }

  std::vector<float> run(const Kernels& kernels, int threads) const {
    std::vector<float> state = start;
    const Steps steps{int(a.size()), a.data(), b.data(), c.data(), l0.data(), l1.data(), noisy.get()};
    mlp_denoise({&head.weights, steps, times.data(), conditions.data(), step_noise.data(), state.data(), trajectories, guided, cfg,
                 temperature},
                kernels, threads);
    return state;
  }

  std::vector<double> truth(int t) const {
    const int channels = head.channels;
    std::vector<double> x(start.begin() + size_t(t) * channels, start.begin() + size_t(t + 1) * channels), before(channels, 0);
    for (size_t i = 0; i < a.size(); ++i) {
      const float* time = &times[i * head.padded];
      const std::vector<double> out = head(x, time, &conditions[size_t(t) * head.padded]);
      std::vector<double> eps(out.begin(), out.begin() + channels);
      if (guided) {
        const std::vector<double> other = head(x, time, &conditions[size_t(trajectories + t) * head.padded]);
        for (int j = 0; j < channels; ++j) eps[j] = other[j] + cfg * (eps[j] - other[j]);
      }
      for (int j = 0; j < channels; ++j) {
        x[j] = a[i] * x[j] + b[i] * eps[j] + c[i] * before[j];
        const double noise = step_noise[(i * trajectories + t) * channels + j];
        if (noisy[i]) x[j] += std::exp((l0[i] + l1[i] * out[channels + j]) / 2) * noise * temperature;
      }
      before = eps;
    }
    return x;
  }
};

void test_against_a_plain_loop(const Kernels& kernels) {
  for (Storage storage : {Storage::float32, Storage::bfloat16})
    for (const auto& [channels, width, depth, trajectories, steps] :
         {std::array{16, 64, 2, 1, 3}, std::array{5, 77, 1, 9, 4}, std::array{16, 300, 1, 33, 2}, std::array{3, 1, 1, 2, 2}})
      for (double cfg : {1.0, 3.0}) {
        const Head head(channels, width, depth, storage, width);
        const Problem problem(head, trajectories, steps, cfg, 7);
        const std::vector<float> state = problem.run(kernels, 2);
        double error = 0, size = 0;
        for (int t = 0; t < trajectories; ++t) {
          const std::vector<double> truth = problem.truth(t);
          for (int j = 0; j < channels; ++j) {
            error = std::max(error, std::abs(state[size_t(t) * channels + j] - truth[j]));
            size = std::max(size, std::abs(truth[j]));
          }
        }
        check(error < 1e-5 * (1 + size),
              std::string(kernels.name) + ", width " + std::to_string(width) + ", error " + std::to_string(error));
      }
}

void test_bits(const Kernels& kernels) {
  const Head head(16, 160, 2, Storage::bfloat16, 1);
  const Problem problem(head, 130, 3, 2.0, 3);
  const std::vector<float> one = problem.run(kernels, 1);
  for (int threads : {2, 3, 7}) check(problem.run(kernels, threads) == one, "bits depend on the number of threads");
}

void test_callers_at_once(const Kernels& kernels) {
  const Head head(16, 160, 2, Storage::float32, 1);
  const Problem problem(head, 20, 5, 2.0, 3);
  const std::vector<float> expected = problem.run(kernels, 1);
  std::vector<std::thread> callers;
  for (int i = 0; i < 6; ++i)
    callers.emplace_back([&, i] {
      for (int k = 0; k < 5; ++k) check(problem.run(kernels, 1 + (i + k) % 3) == expected, "calls at once disturb each other");
    });
  for (std::thread& caller : callers) caller.join();
}

[[maybe_unused]] void test_after_fork(const Kernels& kernels) {
  const Head head(16, 160, 2, Storage::float32, 1);
  const Problem problem(head, 20, 3, 2.0, 3);
  const std::vector<float> expected = problem.run(kernels, 2);
  const pid_t child = fork();
  if (child == 0) _exit(problem.run(kernels, 2) == expected ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a call in a child process");
}

void test_probes(const Kernels& kernels) {
  const std::vector<float> memory(1 << 16, 1.0f);
  read_memory(kernels, memory.data(), memory.size() * sizeof(float), 2);
  check(multiply_add(kernels, 10, 2) > 0, "multiply_add");
}

}  // namespace

int main() {
  for (const Kernels* here : kernels_here()) {
    const Kernels& kernels = *here;
    test_against_a_plain_loop(kernels);
    test_bits(kernels);
    test_callers_at_once(kernels);
#if !defined(__SANITIZE_THREAD__)  // it does not let a child make threads
    test_after_fork(kernels);
#endif
    test_probes(kernels);
    std::printf("%s: good\n", kernels.name);
  }
}
