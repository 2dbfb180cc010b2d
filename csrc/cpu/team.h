// Threads that run one function together, phase by phase.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace disa_fast::cpu {

// Where `size` threads meet. Whoever comes early spins for some microseconds, for the others are usually as far, and then sleeps: a
// thread that went on spinning would take the core from the one that it waits for, where other programs keep the machine busy.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait();

 private:
  const int size_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> generation_{0};
  std::mutex mutex_;
  std::condition_variable condition_;
};

class Team;

// One thread's part in Team::run.
class Member {
 public:
  const int index;

  // body(i) for every i in [0, count), shared out among the team, each i once; all members call it with the same count, and all
  // bodies are done when it returns. Everyone has a range of consecutive i, and helps the others when done with it.
  template <class Body>
  void for_each(int count, Body body);

 private:
  friend class Team;
  Member(Team& team, int index) : index(index), team_(team) {}
  Team& team_;
  int phase_ = 0;
};

// `size` threads, of which the caller of `run` is one. For one caller at a time: see borrow.
class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;

  int size() const { return int(threads_.size()) + 1; }

  // body(member) on every thread of the team; returns when all are done. body must not throw.
  void run(const std::function<void(Member&)>& body);

  // At least `floats` floats, aligned to a cache line, contents undefined; kept for the next caller. Throws std::bad_alloc.
  float* scratch(size_t floats);

  // A team of at most `size` threads that nobody else uses, kept for the next caller when the pointer goes. Fewer threads where the
  // system gives no more. A child process after fork starts with none, for threads do not survive it.
  static std::shared_ptr<Team> borrow(int size);

 private:
  friend class Member;

  // How many of its range each member has given out, in the phases of even and of odd number.
  struct alignas(64) Taken {
    std::atomic<int> of[2]{{0}, {0}};
  };

  void work(int index);

  const int asked_;
  std::unique_ptr<Barrier> barrier_;
  std::vector<Taken> taken_;
  const std::function<void(Member&)>* body_ = nullptr;
  bool stop_ = false;
  std::vector<std::thread> threads_;
  std::unique_ptr<float[], void (*)(float*)> scratch_{nullptr, nullptr};
  size_t scratch_floats_ = 0;
};

template <class Body>
void Member::for_each(int count, Body body) {
  const int size = team_.size();
  // Everybody left the phase before the last one at the barrier, so nobody reads these counters before the next.
  team_.taken_[index].of[(phase_ + 1) & 1].store(0, std::memory_order_relaxed);
  for (int k = 0; k < size; ++k) {
    const int owner = (index + k) % size;
    const int start = int(int64_t(count) * owner / size), end = int(int64_t(count) * (owner + 1) / size);
    std::atomic<int>& taken = team_.taken_[owner].of[phase_ & 1];
    while (taken.load(std::memory_order_relaxed) < end - start) {
      const int i = start + taken.fetch_add(1, std::memory_order_relaxed);
      if (i < end) body(i);
    }
  }
  ++phase_;
  team_.barrier_->wait();
}

}  // namespace disa_fast::cpu
