// Threads that run one function together, phase by phase.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace disa_fast::cpu {

// Where threads meet. Whoever comes early spins for some microseconds, for the others are usually as far, and then sleeps: a thread
// that went on spinning would take the core from the one that it waits for, where other programs keep the machine busy.
class Barrier {
 public:
  // Returns when `count` threads have come; all who meet say the same number.
  void wait(int count);

 private:
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

  // body(i) for every i in [0, count), shared out among the members, each i once; all members call it with the same count, and all
  // bodies are done when it returns. Everyone has a range of consecutive i, and helps the others when done with it.
  template <class Body>
  void for_each(int count, Body body);

 private:
  friend class Team;
  Member(Team& team, int index, int members) : index(index), team_(team), members_(members) {}
  Team& team_;
  const int members_;
  int phase_ = 0;
};

// Threads, for one caller at a time: see borrow. Where an OpenMP runtime is loaded already, torch's, they are that one's: its
// threads spin for milliseconds after each of torch's operations, and would take the cores from any others. Otherwise, and in a
// child process after fork, where OpenMP's threads are gone for good, they are the team's own.
class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;

  // body(member) on `members` threads, of which the caller is one, or on fewer where the system gives no more; returns when all are
  // done. At most as many as the team has threads. body must not throw.
  void run(int members, const std::function<void(Member&)>& body);

  // At least `floats` floats, aligned to a cache line, contents undefined; kept for the next caller. Throws std::bad_alloc.
  float* scratch(size_t floats);

  // A team that nobody else uses, kept for the next caller when the pointer goes.
  static std::shared_ptr<Team> borrow(int threads);

 private:
  friend class Member;

  // How many of its range each member has given out, in the phases of even and of odd number.
  struct alignas(64) Taken {
    std::atomic<int> of[2]{{0}, {0}};
  };

  void start_threads();
  void work(int index);
  void take_part(int index, int members);

  const int asked_;
  std::vector<Taken> taken_;
  Barrier barrier_;
  const std::function<void(Member&)>* body_ = nullptr;
  int members_ = 0;

  std::vector<std::thread> own_;
  Barrier gate_;  // where its own threads wait for work, and the caller for them
  bool stop_ = false;

  std::unique_ptr<float[], void (*)(float*)> scratch_{nullptr, nullptr};
  size_t scratch_floats_ = 0;
};

template <class Body>
void Member::for_each(int count, Body body) {
  // Everybody left the phase before the last one at the barrier, so nobody reads these counters before the next.
  team_.taken_[index].of[(phase_ + 1) & 1].store(0, std::memory_order_relaxed);
  for (int k = 0; k < members_; ++k) {
    const int owner = (index + k) % members_;
    const int start = int(int64_t(count) * owner / members_), end = int(int64_t(count) * (owner + 1) / members_);
    std::atomic<int>& taken = team_.taken_[owner].of[phase_ & 1];
    while (taken.load(std::memory_order_relaxed) < end - start) {
      const int i = start + taken.fetch_add(1, std::memory_order_relaxed);
      if (i < end) body(i);
    }
  }
  ++phase_;
  team_.barrier_.wait(members_);
}

}  // namespace disa_fast::cpu
