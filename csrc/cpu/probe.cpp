#include "probe.h"

#include <algorithm>
#include <atomic>

#include "team.h"

namespace disa_fast::cpu {

void read_memory(const Kernels& kernels, const void* data, size_t bytes, int threads) {
  constexpr size_t kPiece = 1 << 18;
  std::atomic<float> sum{0};
  Team::borrow(threads)->run(threads, [&](Member& member) {
    member.for_each(int((bytes + kPiece - 1) / kPiece), [&](int i) {
      const size_t from = size_t(i) * kPiece;
      sum.store(kernels.read_memory(static_cast<const char*>(data) + from, std::min(kPiece, bytes - from)));
    });
  });
}

double multiply_add(const Kernels& kernels, int64_t rounds, int threads) {
  std::atomic<int64_t> done{0};
  Team::borrow(threads)->run(threads, [&](Member& member) {
    float values[16] = {0.5f, 0.25f};
    done += kernels.multiply_add(rounds, values);
    member.for_each(0, [](int) {});
  });
  return double(done);
}

}  // namespace disa_fast::cpu
