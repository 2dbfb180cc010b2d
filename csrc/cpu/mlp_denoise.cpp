// The loop, after the hoists of the modulation (it depends on step and condition, not on the state): for some steps at a time
//
//   modulation = W_mod silu(times[step] + conditions[row])                      one matrix product for all those steps and rows
//   h = W_in x
//   for each step, for each block:  m = silu(W1 (norm(h) * scale + shift) + b1);  h += gate * (W2 m + b2)
//   and at the end of a step:       (eps, v) = W_out (norm(h) * scale + shift) + b_out;  guidance;  x <- update;  h = W_in x
//
// Threads share out panels of output columns (and blocks of rows, where there are many) and meet after every matrix product.
#include "mlp_denoise.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "team.h"

namespace disa_fast::cpu {
namespace {

// How much modulation is made at a time; it bounds the memory of a call, and the rows that walk through the steps together.
constexpr size_t kModulationFloats = size_t(8) << 20;

// Up to this many rows every thread normalizes all of them for itself, which is cheaper than to meet once more.
constexpr int kPrivateRows = 16;

// Trajectories whose step one thread finishes at a time.
constexpr int kFinishRows = 7;

// A row's distance from the next is not a multiple of 4096 bytes: else all rows of a tile would fall into one set of the cache.
size_t stride_of(int columns) { return size_t(columns) + 16; }

int divide_up(size_t a, size_t b) { return int((a + b - 1) / b); }

// Hands out parts of one allocation, aligned as it is up to 128 bytes; without one it only counts.
class Arena {
 public:
  explicit Arena(float* memory) : memory_(memory) {}
  Matrix matrix(size_t rows, size_t stride) {
    const Matrix m{memory_ ? memory_ + used_ : nullptr, stride};
    used_ += (rows * stride + 31) / 32 * 32;
    return m;
  }
  size_t used() const { return used_; }

 private:
  float* memory_;
  size_t used_ = 0;
};

// out = epilogue(in @ weight^T + bias), [rows, columns], by all members together: each takes panels, for some of the rows where
// they are many.
void multiply(Member& member, const Kernels& kernels, const Linear& linear, Matrix in, int rows, Epilogue epilogue, Matrix out,
              Matrix gate) {
  const int parts = divide_up(rows, kTaskRows);
  member.for_each(linear.panel_count() * parts, [&](int i) {
    const int64_t part = i % parts;
    const int from = int(part * rows / parts), to = int((part + 1) * rows / parts);
    kernels.linear_panel(linear, i / parts, in.from(from), to - from, epilogue, out.from(from), gate.from(from));
  });
}

// The rows of one call that walk through all steps together: trajectories [from, from + count).
struct Chunk {
  int from, count, rows;  // rows = count, or 2 * count under guidance
};

// What one thread needs to finish the step of a few trajectories.
struct Finishing {
  Matrix normalized, out, x;
  size_t floats;

  Finishing(float* memory, const MlpWeights& w) {
    Arena arena(memory);
    normalized = arena.matrix(2 * kFinishRows, stride_of(w.padded()));
    out = arena.matrix(2 * kFinishRows, w.output.columns);
    x = arena.matrix(kFinishRows, w.input.k);
    floats = arena.used();
  }
};

struct Buffers {
  Matrix y;           // [steps at a time * rows, width]
  Matrix modulation;  // [steps at a time * rows, parts * padded]
  Matrix h, m;        // [rows, width]
  Matrix normalized;  // [rows, width]; where rows are few, one such for every thread
  Matrix before;      // [trajectories, channels], the network's output at the step before
  Matrix finishing;   // one row for every thread
  size_t floats;

  Buffers(float* memory, const MlpWeights& w, int rows, int steps, int threads) {
    Arena arena(memory);
    const size_t stride = stride_of(w.padded());
    y = arena.matrix(size_t(steps) * rows, stride);
    modulation = arena.matrix(size_t(steps) * rows, stride_of(w.modulation.columns));
    h = arena.matrix(rows, stride);
    m = arena.matrix(rows, stride);
    normalized = arena.matrix(size_t(rows) * (rows <= kPrivateRows ? threads : 1), stride);
    before = arena.matrix(rows, w.channels);
    finishing = arena.matrix(threads, Finishing(nullptr, w).floats);
    floats = arena.used();
  }
};

class Loop {
 public:
  Loop(const MlpDenoise& call, const Kernels& kernels, const Buffers& buffers, const Chunk& chunk, int steps_at_a_time)
      : call_(call), w_(*call.weights), kernels_(kernels), b_(buffers), chunk_(chunk), steps_at_a_time_(steps_at_a_time) {}

  void run(Member& member) const {
    const int depth = int(w_.first.size());
    start(member);
    for (int step = 0; step < call_.steps.count; ++step) {
      if (step % steps_at_a_time_ == 0) modulate(member, step, std::min(steps_at_a_time_, call_.steps.count - step));
      for (int block = 0; block < depth; ++block) {
        const Matrix normalized = normalize(member, part(step, 3 * block));
        multiply(member, kernels_, w_.first[block], normalized, chunk_.rows, Epilogue::silu, b_.m, {});
        multiply(member, kernels_, w_.second[block], b_.m, chunk_.rows, Epilogue::gated_residual, b_.h, part(step, 3 * block + 2));
      }
      finish(member, step);
    }
  }

 private:
  // Part p of the modulation of `step`: [rows, padded].
  Matrix part(int step, int p) const {
    return {b_.modulation.row(size_t(step % steps_at_a_time_) * chunk_.rows) + size_t(p) * w_.padded(), b_.modulation.stride};
  }

  const float* condition(int row) const {
    const int trajectory = row < chunk_.count ? row : row - chunk_.count + call_.trajectories;
    return call_.conditions + size_t(chunk_.from + trajectory) * w_.padded();
  }

  void modulate(Member& member, int from, int steps) const {
    member.for_each(steps * chunk_.rows, [&](int i) {
      const float* time = call_.times + size_t(from + i / chunk_.rows) * w_.padded();
      kernels_.silu_sum(time, condition(i % chunk_.rows), w_.padded(), b_.y.row(i));
    });
    multiply(member, kernels_, w_.modulation, b_.y, steps * chunk_.rows, Epilogue::store, b_.modulation, {});
  }

  // Row r of h, normalized and modulated; the scale lies behind the shift.
  void normalize_row(int r, Matrix shift, float* out) const {
    kernels_.normalize(b_.h.row(r), shift.row(r), shift.row(r) + w_.padded(), w_.width, w_.padded(), w_.eps, out);
  }

  Matrix normalize(Member& member, Matrix shift) const {
    if (chunk_.rows <= kPrivateRows) {
      const Matrix own = b_.normalized.from(size_t(member.index) * chunk_.rows);
      for (int r = 0; r < chunk_.rows; ++r) normalize_row(r, shift, own.row(r));
      return own;
    }
    member.for_each(chunk_.rows, [&](int r) { normalize_row(r, shift, b_.normalized.row(r)); });
    return b_.normalized;
  }

  // body(from, count) for some trajectories at a time.
  template <class Body>
  void for_each_few(Member& member, Body body) const {
    member.for_each(divide_up(chunk_.count, kFinishRows), [&](int i) {
      const int from = i * kFinishRows;
      body(from, std::min(kFinishRows, chunk_.count - from));
    });
  }

  void start(Member& member) const {
    for_each_few(member, [&](int from, int count) {
      for (int t = from; t < from + count; ++t) std::memset(b_.before.row(t), 0, w_.channels * sizeof(float));
      project_input(member, from, count);
    });
  }

  // The end of a step, some trajectories at a time: output layer, guidance, the table's update, and the next step's input layer.
  void finish(Member& member, int step) const {
    const int halves = call_.guided ? 2 : 1;
    const Matrix shift = part(step, 3 * int(w_.first.size()));
    for_each_few(member, [&](int from, int count) {
      const Finishing own(b_.finishing.row(member.index), w_);
      for (int half = 0; half < halves; ++half)
        for (int t = 0; t < count; ++t) normalize_row(half * chunk_.count + from + t, shift, own.normalized.row(half * count + t));
      for (int panel = 0; panel < w_.output.panel_count(); ++panel)
        kernels_.linear_panel(w_.output, panel, own.normalized, halves * count, Epilogue::store, own.out, {});
      for (int t = 0; t < count; ++t) update(step, from + t, own.out.row(t), call_.guided ? own.out.row(count + t) : nullptr);
      if (step + 1 < call_.steps.count) project_input(member, from, count);
    });
  }

  void update(int i, int t, const float* conditional, const float* unconditional) const {
    const Steps& s = call_.steps;
    float* x = call_.state + size_t(chunk_.from + t) * w_.channels;
    float* before = b_.before.row(t);
    const size_t at = (size_t(i) * call_.trajectories + chunk_.from + t) * w_.channels;
    for (int c = 0; c < w_.channels; ++c) {
      double o = conditional[c];
      if (unconditional) o = unconditional[c] + call_.cfg * (o - unconditional[c]);
      double next = s.a[i] * x[c] + s.b[i] * o;
      if (s.c[i] != 0) next += s.c[i] * before[c];
      if (s.noisy[i]) {
        const double v = conditional[w_.channels + c];
        next += std::exp((s.l0[i] + s.l1[i] * v) / 2) * call_.step_noise[at + c] * call_.temperature;
      }
      x[c] = float(next);
      before[c] = float(o);
    }
  }

  // h = W_in x for trajectories [from, from + count), in both halves.
  void project_input(Member& member, int from, int count) const {
    const Matrix x = Finishing(b_.finishing.row(member.index), w_).x;
    for (int t = 0; t < count; ++t) {
      std::memset(x.row(t), 0, w_.input.k * sizeof(float));
      std::memcpy(x.row(t), call_.state + size_t(chunk_.from + from + t) * w_.channels, w_.channels * sizeof(float));
    }
    for (int panel = 0; panel < w_.input.panel_count(); ++panel)
      kernels_.linear_panel(w_.input, panel, x, count, Epilogue::store, b_.h.from(from), {});
    if (call_.guided)
      for (int t = from; t < from + count; ++t) std::memcpy(b_.h.row(chunk_.count + t), b_.h.row(t), w_.padded() * sizeof(float));
  }

  const MlpDenoise& call_;
  const MlpWeights& w_;
  const Kernels& kernels_;
  const Buffers& b_;
  const Chunk chunk_;
  const int steps_at_a_time_;
};

// How many of the threads have something to do: meeting the others costs about as much as kFlops of arithmetic.
int useful_members(int threads, double flops) {
  constexpr double kFlops = 2e5;
  return std::max(1, int(std::min(double(threads), flops / kFlops)));
}

}  // namespace

void mlp_denoise(const MlpDenoise& call, const Kernels& kernels, int threads) {
  const MlpWeights& w = *call.weights;
  if (call.trajectories == 0 || call.steps.count == 0) return;
  const int halves = call.guided ? 2 : 1;
  const size_t row_floats = stride_of(w.modulation.columns);
  const int most = std::max<int>(1, int(std::min<size_t>(call.trajectories, kModulationFloats / (row_floats * halves))));
  const int chunks = divide_up(call.trajectories, most);
  const int largest = divide_up(call.trajectories, chunks);
  const int steps = std::clamp<int>(int(kModulationFloats / (row_floats * halves * largest)), 1, call.steps.count);

  const double rows = double(halves) * largest;
  const int members = useful_members(threads, (rows + 4) * 2.0 * w.padded() * w.padded());
  const auto team = Team::borrow(threads);
  const auto buffers_in = [&](float* memory) { return Buffers(memory, w, halves * largest, steps, members); };
  const Buffers buffers = buffers_in(team->scratch(buffers_in(nullptr).floats));
  team->run(members, [&](Member& member) {
    for (int i = 0; i < chunks; ++i) {
      const int from = int(int64_t(call.trajectories) * i / chunks), to = int(int64_t(call.trajectories) * (i + 1) / chunks);
      const Chunk chunk{from, to - from, halves * (to - from)};
      Loop(call, kernels, buffers, chunk, steps).run(member);
    }
  });
}

void linear(const Linear& linear, const Kernels& kernels, Matrix in, int rows, Epilogue epilogue, float* out, int threads) {
  if (rows == 0) return;
  const int members = useful_members(threads, 2.0 * (rows + 4) * linear.k * linear.columns);
  Team::borrow(threads)->run(
      members, [&](Member& member) { multiply(member, kernels, linear, in, rows, epilogue, {out, size_t(linear.columns)}, {}); });
}

}  // namespace disa_fast::cpu
