#include "team.h"

#include <cstdint>
#include <new>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace disa_fast::cpu {
namespace {

constexpr int kSpins = 1000;  // some tens of microseconds

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr size_t kIdleTeams = 8;

struct Idle {
  Idle() { teams.reserve(kIdleTeams); }
  std::mutex mutex;
  std::vector<std::unique_ptr<Team>> teams;
};

// Never destroyed: a thread may still be in a call when the process ends.
alignas(Idle) unsigned char idle_storage[sizeof(Idle)];

Idle& idle() {
  static Idle* const made = [] {
    Idle* fresh = new (idle_storage) Idle;
#if defined(__unix__) || defined(__APPLE__)
    // The child has none of the threads, and perhaps a locked mutex: forget both without touching them.
    pthread_atfork(nullptr, nullptr, [] { new (idle_storage) Idle; });
#endif
    return fresh;
  }();
  return *made;
}

}  // namespace

void Barrier::wait() {
  if (size_ == 1) return;
  const unsigned generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    {
      std::lock_guard lock(mutex_);
      generation_.store(generation + 1, std::memory_order_release);
    }
    condition_.notify_all();
    return;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (generation_.load(std::memory_order_acquire) != generation) return;
    pause();
  }
  std::unique_lock lock(mutex_);
  condition_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != generation; });
}

Team::Team(int size) : asked_(size) {
  // Threads wait for the barrier to be made, and it for their number: the system may give fewer than asked for.
  std::mutex mutex;
  std::condition_variable made;
  bool ready = false;
  try {
    for (int i = 1; i < size; ++i)
      threads_.emplace_back([this, i, &mutex, &made, &ready] {
        {
          std::unique_lock lock(mutex);
          made.wait(lock, [&] { return ready; });
        }
        work(i);
      });
  } catch (const std::system_error&) {
  }
  taken_ = std::vector<Taken>(this->size());
  barrier_ = std::make_unique<Barrier>(this->size());
  {
    std::lock_guard lock(mutex);
    ready = true;
  }
  made.notify_all();
  barrier_->wait();  // nobody uses the three locals any more
}

Team::~Team() {
  stop_ = true;
  barrier_->wait();
  for (std::thread& thread : threads_) thread.join();
}

void Team::work(int index) {
  barrier_->wait();
  for (;;) {
    barrier_->wait();
    if (stop_) return;
    Member member(*this, index);
    (*body_)(member);
    barrier_->wait();
  }
}

void Team::run(const std::function<void(Member&)>& body) {
  body_ = &body;
  for (Taken& taken : taken_) taken.of[0].store(0, std::memory_order_relaxed);
  barrier_->wait();
  Member member(*this, 0);
  body(member);
  barrier_->wait();
}

float* Team::scratch(size_t floats) {
  if (floats > scratch_floats_) {
    scratch_.reset();
    scratch_floats_ = 0;
    constexpr std::align_val_t kAlignment{2 << 20};  // huge pages, where the system has them
    scratch_ = {static_cast<float*>(operator new(floats * sizeof(float), kAlignment)),
                [](float* p) { operator delete(p, kAlignment); }};
#if defined(__linux__)
    madvise(scratch_.get(), floats * sizeof(float), MADV_HUGEPAGE);
#endif
    scratch_floats_ = floats;
  }
  return scratch_.get();
}

std::shared_ptr<Team> Team::borrow(int size) {
  std::unique_ptr<Team> team;
  {
    std::lock_guard lock(idle().mutex);
    auto& teams = idle().teams;
    for (size_t i = teams.size(); i-- > 0;)
      if (teams[i]->asked_ == size) {
        team = std::move(teams[i]);
        teams.erase(teams.begin() + i);
        break;
      }
  }
  if (!team) team = std::make_unique<Team>(size);
  return {team.release(), [](Team* back) {
            std::unique_ptr<Team> oldest, returned(back);
            std::lock_guard lock(idle().mutex);
            auto& teams = idle().teams;
            if (teams.size() >= kIdleTeams) {
              oldest = std::move(teams.front());
              teams.erase(teams.begin());
            }
            teams.push_back(std::move(returned));
          }};
}

}  // namespace disa_fast::cpu
