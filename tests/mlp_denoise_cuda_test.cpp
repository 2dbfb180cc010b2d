// The CUDA kernel without CUDA, for `make sanitize`: kernels/cuda/mlp_denoise.cu on threads of this machine. Against a plain loop
// in double precision; bits that depend neither on neighbours nor on where weights lie; a launch in two parts; noise drawn in the
// kernel; blocks that do not come.
//
// With --without-sync LINE, small problems only, without the __syncthreads of that line of mlp_denoise.cuh: host_cuda/every_sync.sh
// expects that ThreadSanitizer or the results tell.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "host_cuda/ptx.h"
#include "mlp_denoise.cu"

using namespace disa_fast::cuda;

namespace {

void check(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

int up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// A head ------------------------------------------------------------------------------------------------------------------------

u16 to_bfloat16(double x) {
  const float single = float(x);
  u32 bits;
  std::memcpy(&bits, &single, 4);
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double from_bfloat16(u16 high) {
  const u32 bits = u32(high) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

double rounded(double x) { return from_bfloat16(to_bfloat16(x)); }
double silu(double x) { return x / (1 + std::exp(-x)); }

// Every buffer ends where the kernel's does, for the sanitizer to see any step beyond. What must not count has a value that shows.
constexpr float kOdd = 1000;

struct Head {
  int width, depth, channels;
  std::vector<std::vector<u16>> layers;  // [out][in] bfloat16: W1, W2 of each block; the output layer, o at row 0, v at kChannels
  std::vector<float> bias, out_bias, in_weight, in_bias;
  std::vector<uint2> units;

  Head(int width, int depth, int channels, int seed) : width(width), depth(depth), channels(channels) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto draw = [&](size_t count) {
      std::vector<float> values(count);
      for (float& value : values) value = 0.1f * normal(random);
      return values;
    };
    for (int i = 0; i <= 2 * depth; ++i) {
      const int outputs = i < 2 * depth ? width : 2 * kChannels;
      layers.emplace_back(size_t(outputs) * width);
      for (u16& weight : layers.back()) weight = to_bfloat16(normal(random) / std::sqrt(float(width)));
    }
    bias = draw(size_t(2 * depth) * width);
    out_bias = draw(2 * kChannels);
    in_bias = draw(width);
    in_weight = draw(size_t(width) * kChannels);
    for (int o = 0; o < width * kChannels; ++o) in_weight[o] = o % kChannels < channels ? 10 * in_weight[o] : kOdd;
    for (int o = 0; o < 2 * kChannels; ++o)
      if (o % kChannels >= channels) out_bias[o] = kOdd;
    pack();
  }

  void pack() {
    units = std::vector<uint2>((2 * size_t(depth) * (width / kColumns) + kOutTiles) * (width / 16) * 32);
    uint2* to = units.data();
    for (const std::vector<u16>& layer : layers)
      for (int tile = 0; tile < int(layer.size()) / width / kColumns; ++tile)
        for (int piece = 0; piece < width / 16; ++piece)
          for (int lane = 0; lane < 32; ++lane) {
            const u16* from = &layer[size_t(tile * kColumns + lane / 4) * width + piece * 16 + 2 * (lane % 4)];
            *to++ = {from[0] | u32(from[1]) << 16, from[8] | u32(from[9]) << 16};
          }
  }

  // Outputs of a layer, without bias
  std::vector<double> product(int number, const std::vector<double>& x) const {
    const std::vector<u16>& layer = layers[number];
    std::vector<double> y(layer.size() / width, 0);
    for (size_t o = 0; o < y.size(); ++o)
      for (int k = 0; k < width; ++k) y[o] += from_bfloat16(layer[o * width + k]) * x[k];
    return y;
  }

  std::vector<double> normalized(const std::vector<double>& h, const u16* shift, const u16* scale) const {
    double mean = 0, square = 0;
    for (double value : h) mean += value / width;
    for (double value : h) square += (value - mean) * (value - mean) / width;
    std::vector<double> m(width);
    for (int j = 0; j < width; ++j)
      m[j] = rounded((h[j] - mean) / std::sqrt(square + 1e-6) * from_bfloat16(scale[j]) + from_bfloat16(shift[j]));
    return m;
  }

  // (o, v) for a state and a row of modulation, [2*kChannels]
  std::vector<double> operator()(const std::vector<double>& x, const u16* modulation) const {
    std::vector<double> h(in_bias.begin(), in_bias.end());
    for (int j = 0; j < width; ++j)
      for (int c = 0; c < channels; ++c) h[j] += double(in_weight[j * kChannels + c]) * x[c];
    for (int i = 0; i < depth; ++i, modulation += 3 * width) {
      std::vector<double> u = product(2 * i, normalized(h, modulation, modulation + width));
      for (int j = 0; j < width; ++j) u[j] = rounded(silu(u[j] + bias[2 * i * width + j]));
      const std::vector<double> y = product(2 * i + 1, u);
      for (int j = 0; j < width; ++j) h[j] += from_bfloat16(modulation[2 * width + j]) * (y[j] + bias[(2 * i + 1) * width + j]);
    }
    std::vector<double> out = product(2 * depth, normalized(h, modulation, modulation + width));
    for (int o = 0; o < 2 * kChannels; ++o) out[o] += out_bias[o];
    return out;
  }
};

// Noise -------------------------------------------------------------------------------------------------------------------------

using Words = std::array<u32, 4>;

// Two pairs: r and l become high(m * r) ^ l ^ k and low(m * r), with m * r of the other pair.
Words philox(Words counter, u64 key) {
  auto [r0, l0, r1, l1] = counter;
  for (u32 round = 0; round < 10; ++round) {
    const u64 first = u64(r0) * 0xD2511F53u, second = u64(r1) * 0xCD9E8D57u;
    r0 = u32(second >> 32) ^ l0 ^ (u32(key) + round * 0x9E3779B9u);
    r1 = u32(first >> 32) ^ l1 ^ (u32(key >> 32) + round * 0xBB67AE85u);
    l0 = u32(second);
    l1 = u32(first);
  }
  return {r0, l0, r1, l1};
}

double philox_normal(u64 seed, u64 stream, u32 step, int channel) {
  const Words words = philox({step, u32(channel / 4), u32(stream), u32(stream >> 32)}, seed);
  const u32 *pair = &words[channel % 4 / 2 * 2], radius_bits = pair[0] >> 8, angle_bits = pair[1] >> 8;
  const double radius = std::sqrt(-2 * std::log((radius_bits + 1.0) / (1 << 24)));
  const double angle = 2 * 3.14159265358979323846 * angle_bits / (1 << 24);
  return radius * (channel % 2 ? std::sin(angle) : std::cos(angle));
}

// A launch ----------------------------------------------------------------------------------------------------------------------

using Entry = void (*)(MlpDenoise);

void mlp_denoise_256(MlpDenoise call) {
  Loop<256, Bfloat16>(call).run();
}  // a width known to the compiler, as the published ones are

constexpr int kAll = -1;
constexpr u64 kPatience = 60'000'000'000;  // a thousand threads on two processors, under a sanitizer, beside other work
constexpr u64 kShort = 100'000'000;

struct Turn {
  std::vector<int> blocks;  // that run at once
  u64 patience = kPatience;
};

// How a problem is laid out on the machine.
struct Plan {
  int groups = 1, blocks = 1;  // of each group
  bool out_resident = true;
  int resident = kAll, ring = 0;
  Entry entry = mlp_denoise_any;
  std::vector<Turn> turns = {};  // one after the other; all blocks at once if not given
};

std::string name_of(const Plan& plan) {
  return std::to_string(plan.groups) + " groups of " + std::to_string(plan.blocks) + " blocks, resident " +
         std::to_string(plan.resident) + ", ring " + std::to_string(plan.ring) +
         (plan.out_resident ? ", output layer resident" : "");
}

void launch(MlpDenoise call, const Plan& plan, size_t shared_bytes) {
  const int grid = plan.groups * plan.blocks;
  std::vector<Turn> turns = plan.turns;
  if (turns.empty()) {
    turns.push_back({std::vector<int>(grid)});
    std::iota(turns[0].blocks.begin(), turns[0].blocks.end(), 0);
  }
  for (const Turn& turn : turns) {
    call.patience = turn.patience;
    host::run_blocks(turn.blocks, grid, kThreads, shared_bytes, [&] { plan.entry(call); });
  }
}

struct Outcome {
  std::vector<float> x, before;
  bool gave_up = false;
  bool operator==(const Outcome& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
    };
    return gave_up == other.gave_up && same(x, other.x) && same(before, other.before);
  }
};

enum class Noise { none, given, philox };

struct Problem {
  const Head& head;
  int trajectories, steps, first_step = 0;
  bool guided;
  std::vector<u16> modulation;
  std::vector<float> table, scalars, noise;
  std::vector<u64> streams;
  Outcome start;

  Problem(const Head& head, int trajectories, int steps, bool guided, Noise kind, bool noisy, int seed)
      : head(head), trajectories(trajectories), steps(steps), guided(guided) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const auto draw = [&](size_t count) {
      std::vector<float> values(count);
      for (float& value : values) value = normal(random);
      return values;
    };
    modulation = std::vector<u16>(size_t(steps) * rows() * row_size());
    for (u16& value : modulation) value = to_bfloat16(0.5f + 0.5f * normal(random));
    table = std::vector<float>(size_t(steps) * kTableColumns, kOdd);
    for (int i = 0; i < steps; ++i) {
      const float row[] = {0.9f + 0.01f * i, -0.3f, i % 2 ? 0.1f : 0.2f, -2, 0.5f, noisy && i % 3 != 1 ? 1.f : 0.f};
      std::copy(std::begin(row), std::end(row), &table[i * kTableColumns]);
    }
    scalars = {3, 0.8f};
    if (kind == Noise::given) noise = draw(size_t(steps) * trajectories * head.channels);
    if (kind == Noise::philox) streams = std::vector<u64>(1 + trajectories);
    for (u64& stream : streams) stream = random();
    start = {draw(size_t(trajectories) * head.channels), draw(size_t(trajectories) * head.channels)};
  }

  int rows() const { return guided ? 2 * trajectories : trajectories; }
  size_t row_size() const { return size_t(3 * head.depth + 2) * head.width; }

  // Of some of the trajectories
  Problem only(const std::vector<int>& chosen) const {
    Problem part = *this;
    part.trajectories = int(chosen.size());
    const auto take = [&](auto& to, const auto& from, int lead, size_t size, int halves) {
      to.clear();
      for (int i = 0; i < lead; ++i)
        for (int half = 0; half < halves; ++half)
          for (int t : chosen) {
            const auto* row = &from[((size_t(i) * halves + half) * trajectories + t) * size];
            to.insert(to.end(), row, row + size);
          }
      to.shrink_to_fit();
    };
    take(part.modulation, modulation, steps, row_size(), guided ? 2 : 1);
    if (!noise.empty()) take(part.noise, noise, steps, head.channels, 1);
    take(part.start.x, start.x, 1, head.channels, 1);
    take(part.start.before, start.before, 1, head.channels, 1);
    if (!streams.empty()) {
      part.streams = {streams[0]};
      for (int t : chosen) part.streams.push_back(streams[1 + t]);
      part.streams.shrink_to_fit();
    }
    return part;
  }

  Outcome run(const Plan& plan) const { return run(plan, start, 0, steps); }

  // Steps `begin` to `end` alone
  Outcome run(const Plan& plan, Outcome state, int begin, int end) const {
    const int width = head.width, tiles_max = up(width / kColumns, plan.blocks) / plan.blocks;
    const int rows_max = (guided ? 2 : 1) * up(trajectories, plan.groups) / plan.groups;
    check(rows_max <= kRows, "rows of a group");
    std::vector<u32> words(size_t(plan.groups) * 3 * kRows * width, 0);
    u32 gave_up = 0;
    MlpDenoise call = {};
    call.gave_up = &gave_up;
    call.units = head.units.data();
    call.bias = head.bias.data();
    call.out_bias = head.out_bias.data();
    call.in_weight = head.in_weight.data();
    call.in_bias = head.in_bias.data();
    call.modulation = modulation.data() + size_t(begin) * rows() * row_size();
    call.table = table.data() + begin * kTableColumns;
    call.scalars = scalars.data();
    call.noise = noise.empty() ? nullptr : noise.data() + size_t(begin) * trajectories * head.channels;
    call.philox = streams.empty() ? nullptr : streams.data();
    call.x = reinterpret_cast<u32*>(state.x.data());
    call.before = reinterpret_cast<u32*>(state.before.data());
    call.words = words.data();
    call.width = width;
    call.depth = head.depth;
    call.channels = head.channels;
    call.steps = end - begin;
    call.trajectories = trajectories;
    call.guided = guided;
    call.first_step = first_step + begin;
    call.blocks = plan.blocks;
    call.each = trajectories / plan.groups;
    call.more = trajectories % plan.groups;
    call.activations_at = kPartialAt + 4 * std::min(tiles_max, kPass) * kWarps * kTile;
    call.own_at = up(call.activations_at + 2 * rows_max * (width + kPad), 16);
    call.units_at = up(call.own_at + 4 * tiles_max * kOwn, 128);
    call.out_resident = plan.out_resident;
    call.resident = plan.resident == kAll ? 2 * head.depth * tiles_max : plan.resident;
    call.ring = plan.ring;
    launch(call, plan, call.units_at + size_t(kOutTiles * call.out_resident + call.resident + call.ring) * 16 * width);
    state.gave_up = gave_up != 0;
    return state;
  }

  double noise_at(int step, int t, int channel) const {
    if (!streams.empty()) return philox_normal(streams[0], streams[1 + t], first_step + step + 1, channel);
    return noise.empty() ? 0 : noise[(size_t(step) * trajectories + t) * head.channels + channel];
  }

  // What `run` should give: x, then before. `factor` is of the network's output.
  std::vector<double> truth(double factor = 1) const {
    const int channels = head.channels;
    std::vector<double> all(2 * start.x.size());
    for (int t = 0; t < trajectories; ++t) {
      std::vector<double> x(&start.x[t * channels], &start.x[t * channels] + channels);
      std::vector<double> before(&start.before[t * channels], &start.before[t * channels] + channels);
      for (int i = 0; i < steps; ++i) {
        const auto network = [&](int row) { return head(x, &modulation[(size_t(i) * rows() + row) * row_size()]); };
        const float *row = &table[i * kTableColumns], a = row[0], b = row[1], c = row[2], l0 = row[3], l1 = row[4], noisy = row[5];
        std::vector<double> out = network(t), other = guided ? network(trajectories + t) : out;
        for (int j = 0; j < channels; ++j) {
          const double o = factor * (guided ? other[j] + scalars[0] * (out[j] - other[j]) : out[j]);
          x[j] = a * x[j] + b * o + c * before[j];
          if (noisy) x[j] += std::exp((l0 + l1 * out[kChannels + j]) / 2) * noise_at(i, t, j) * scalars[1];
          before[j] = o;
        }
      }
      std::copy(x.begin(), x.end(), &all[t * channels]);
      std::copy(before.begin(), before.end(), &all[start.x.size() + t * channels]);
    }
    return all;
  }
};

// Checks ------------------------------------------------------------------------------------------------------------------------

// Errors are 1e-7; where one makes an activation round to its other neighbour in bfloat16, some 3e-4 in a small head.
constexpr double kWorst = 2e-3, kRelative = 1e-3;

struct Distance {
  double worst, relative;  // the largest error, of the largest number; the whole, and NaN where one is NaN
  bool small() const { return worst < kWorst && relative < kRelative; }
};

Distance distance(const Outcome& outcome, const std::vector<double>& truth) {
  std::vector<double> values(outcome.x.begin(), outcome.x.end());
  values.insert(values.end(), outcome.before.begin(), outcome.before.end());
  double worst = 0, largest = 0, squares = 0, all = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double error = std::abs(values[i] - truth[i]);
    worst = std::max(worst, error);
    largest = std::max(largest, std::abs(truth[i]));
    squares += error * error;
    all += truth[i] * truth[i];
  }
  return {worst / largest, std::sqrt(squares / all)};
}

void check_truth(const Problem& problem, const Plan& plan) {
  const Distance found = distance(problem.run(plan), problem.truth());
  check(found.small(), "width " + std::to_string(problem.head.width) + ", " + name_of(plan) + ": worst " +
                           std::to_string(found.worst) + ", of the whole " + std::to_string(found.relative));
}

void test_against_a_plain_loop() {
  const Head one_tile(16, 2, 16, 1), small(32, 1, 5, 2), deep(64, 2, 16, 3), uneven(80, 2, 16, 4), wide(112, 1, 5, 5),
      known(256, 1, 16, 6);
  check_truth({deep, 5, 3, true, Noise::given, true, 1}, {.groups = 2, .blocks = 3, .resident = 5, .ring = 2});
  check_truth({known, 7, 1, false, Noise::given, true, 2}, {.blocks = 3, .resident = 9, .ring = 2, .entry = mlp_denoise_256});
  if (kWarps > 4) return;  // what more warps do otherwise is in these two
  check_truth({one_tile, 2, 3, true, Noise::philox, true, 3}, {.blocks = 2, .resident = 1, .ring = 1});
  check_truth({small, 1, 3, true, Noise::philox, true, 4}, {.out_resident = false, .resident = 0, .ring = 2});
  check_truth({small, 16, 2, false, Noise::none, true, 5}, {.blocks = 2});
  check_truth({uneven, 8, 2, true, Noise::none, false, 6}, {.blocks = 3, .out_resident = false});
  check_truth({wide, 7, 2, true, Noise::philox, true, 7}, {.groups = 3, .blocks = 3, .resident = 0, .ring = 4});
}

// The bounds are such that an output wrong by 1 % is beyond both.
void test_bounds() {
  const Head head(32, 1, 16, 6);
  for (bool guided : {false, true}) {
    const Problem problem(head, 3, 2, guided, Noise::given, true, 7);
    Outcome outcome = problem.run({});
    check(distance(outcome, problem.truth()).small(), "two steps");
    const Distance network = distance(outcome, problem.truth(1.01));
    check(network.worst > kWorst && network.relative > kRelative, "1 % of the network's output unnoticed");
    for (float& value : outcome.x) value *= 1.01f;
    for (float& value : outcome.before) value *= 1.01f;
    const Distance all = distance(outcome, problem.truth());
    check(all.worst > kWorst && all.relative > kRelative, "1 % of the result unnoticed");
  }
}

void test_bits() {
  const Head head(80, 1, 5, 8);
  const Problem problem(head, 7, 2, true, Noise::philox, true, 9);
  const Outcome expected = problem.run({});
  check(distance(expected, problem.truth()).small(), "one block");
  for (const Plan& plan : std::vector<Plan>{{.blocks = 2, .out_resident = false},
                                            {.blocks = 3, .resident = 0, .ring = 2},
                                            {.groups = 2, .blocks = 1, .resident = 13, .ring = 2},
                                            {.groups = 2, .blocks = 3, .out_resident = false, .resident = 7, .ring = 4},
                                            {.groups = 3, .blocks = 2, .out_resident = false, .resident = 5, .ring = 2},
                                            {.groups = 3, .blocks = 3, .resident = 1, .ring = 4}})
    check(problem.run(plan) == expected, "bits depend on the plan: " + name_of(plan));
  for (const std::vector<int>& chosen : {std::vector{4}, std::vector{6, 1, 3}}) {
    const Problem part = problem.only(chosen);
    Outcome rows;
    for (int t : chosen)
      for (auto member : {&Outcome::x, &Outcome::before})
        (rows.*member).insert((rows.*member).end(), &(expected.*member)[t * 5], &(expected.*member)[t * 5] + 5);
    check(part.run({.blocks = 2}) == rows, "bits depend on neighbours");
  }
}

void test_known_width() {
  const Head head(256, 1, 16, 10);
  const Problem problem(head, 2, 1, true, Noise::given, true, 11);
  check(problem.run({.blocks = 2, .entry = mlp_denoise_256}) == problem.run({.blocks = 2}), "bits depend on a width that is known");
}

// An entry of the library; slow.
[[maybe_unused]] void test_published_width() {
  const Head head(1024, 1, 16, 12);
  check_truth({head, 1, 1, false, Noise::philox, true, 13}, {.blocks = 2, .resident = 3, .ring = 2, .entry = mlp_denoise_1024});
}

void test_two_launches() {
  const Head head(48, 1, 16, 14);
  for (const auto& [kind, cut] : {std::pair{Noise::given, 1}, std::pair{Noise::philox, 2}}) {
    Problem problem(head, 3, 3, true, kind, true, 15);
    problem.first_step = 4;
    const Plan plan = {.groups = 2, .blocks = 2, .resident = 4, .ring = 2};
    const Outcome expected = problem.run(plan);
    check(distance(expected, problem.truth()).small(), "a trajectory from its fifth step");
    check(problem.run(plan, problem.run(plan, problem.start, 0, cut), cut, 3) == expected, "bits depend on a cut between launches");
  }
}

// The noise alone: a table by which x becomes it.
void test_philox() {
  check(philox({0, 0, 0, 0}, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}, "philox of this test");
  const Head head(16, 1, 16, 16);
  Problem problem(head, 16, 2, false, Noise::philox, true, 17);
  problem.first_step = 7;
  problem.scalars = {1, 1};
  for (float& value : problem.table) value = 0;
  problem.table[5] = problem.table[kTableColumns + 5] = 1;
  for (int step : {0, 1}) {
    const Outcome found = problem.run({}, problem.start, 0, step + 1);
    for (int o = 0; o < 16 * 16; ++o)
      check(std::abs(found.x[o] - problem.noise_at(step, o / 16, o % 16)) < 5e-6, "noise of the kernel");
  }
}

// Where blocks do not come, or not at the same time, the launch ends and leaves NaN; another group is as ever.
void test_giving_up() {
  const Head head(48, 1, 5, 18);
  const Problem problem(head, 5, 3, true, Noise::given, true, 19);
  const auto lost = [](const Outcome& outcome, size_t count) {
    const auto none = [&](const std::vector<float>& values) {
      return std::all_of(values.begin(), values.begin() + count, [](float value) { return std::isnan(value); });
    };
    return outcome.gave_up && none(outcome.x) && none(outcome.before);
  };
  Plan plan = {.blocks = 3, .resident = 3, .ring = 2};
  for (const std::vector<Turn>& turns : std::vector<std::vector<Turn>>{{{{0, 2}, kShort}},
                                                                       {{{0, 1}, kShort}, {{2}, kShort}},
                                                                       {{{2}, kShort}, {{1}, kShort}, {{0}, kShort}},
                                                                       {{{1}, kShort}, {{0, 2}, kShort}}}) {
    plan.turns = turns;
    check(lost(problem.run(plan), 5 * 5), "a block that does not come goes unnoticed");
  }
  plan = {.groups = 2, .blocks = 2, .resident = 3, .ring = 2};
  const Outcome expected = problem.run(plan);
  for (const std::vector<Turn>& turns : std::vector<std::vector<Turn>>{{{{0}, kShort}, {{2, 3}}}, {{{2, 3}}, {{0}, kShort}}}) {
    plan.turns = turns;
    Outcome outcome = problem.run(plan);
    check(lost(outcome, 3 * 5), "a block that does not come goes unnoticed");
    std::copy_n(expected.x.begin(), 3 * 5, outcome.x.begin());
    std::copy_n(expected.before.begin(), 3 * 5, outcome.before.begin());
    outcome.gave_up = false;
    check(outcome == expected, "a block that does not come disturbs another group");
  }
}

void test_a_clock_that_goes_back() {
  const Head head(48, 1, 5, 18);
  const Problem problem(head, 5, 3, true, Noise::given, true, 19);
  const Plan plan = {.blocks = 3, .resident = 3, .ring = 2};
  const Outcome expected = problem.run(plan);
  host::clock_goes_back = true;
  check(problem.run(plan) == expected, "a clock that goes back ends a launch");
  host::clock_goes_back = false;
}

// Small: all weights stay, or all stream, or a block has one tile of a layer.
void test_without_sync() {
  const Head head(32, 1, 5, 20);
  for (const Plan& plan :
       {Plan{.blocks = 2}, Plan{.blocks = 2, .out_resident = false, .resident = 0, .ring = 2}, Plan{.blocks = 4}})
    check_truth({head, 3, 2, true, Noise::given, true, 21}, plan);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "--without-sync") {
    host::skipped_line = std::atoi(arguments[2]);
    test_without_sync();
    return 0;
  }
  test_against_a_plain_loop();
  if (kWarps == 4) {
    test_bounds();
    test_bits();
    test_known_width();
#if !defined(__SANITIZE_THREAD__)  // a minute, in which mlp_denoise_256 does the same
    test_published_width();
#endif
    test_two_launches();
    test_philox();
    test_giving_up();
    test_a_clock_that_goes_back();
  }
  std::printf("mlp_denoise.cu, %d warps: good\n", kWarps);
}
