#include "team.h"

#include <algorithm>
#include <new>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#define DISA_FAST_POSIX
#include <dlfcn.h>
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

std::atomic<bool> forked{false};

Idle& idle() {
  static Idle* const made = [] {
    Idle* fresh = new (idle_storage) Idle;
#if defined(DISA_FAST_POSIX)
    // The child has none of the threads, and perhaps a locked mutex: forget both without touching them.
    pthread_atfork(nullptr, nullptr, [] {
      new (idle_storage) Idle;
      forked = true;
    });
#endif
    return fresh;
  }();
  return *made;
}

// The entry points of the OpenMP runtime that is loaded; GNU's, LLVM's and Intel's all have them.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};

const OpenMp* open_mp() {
  static const OpenMp found = [] {
    OpenMp omp;
#if defined(DISA_FAST_POSIX)
    omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    omp.thread_num = reinterpret_cast<decltype(omp.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    omp.num_threads = reinterpret_cast<decltype(omp.num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
    return omp;
  }();
  return found.parallel && found.thread_num && found.num_threads && !forked ? &found : nullptr;
}

}  // namespace

void Barrier::wait(int count) {
  if (count == 1) return;
  const unsigned generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
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

Team::Team(int threads) : asked_(threads), taken_(threads) {
  if (!open_mp()) start_threads();
}

void Team::start_threads() {
  // The new threads wait until it is known how many there are: the system may give fewer than asked for.
  const auto hold = std::make_shared<std::mutex>();
  const std::lock_guard lock(*hold);
  try {
    for (int i = 1; i < asked_; ++i)
      own_.emplace_back([this, i, hold] {
        hold->lock();
        hold->unlock();
        work(i);
      });
  } catch (const std::system_error&) {
  }
}

Team::~Team() {
  if (own_.empty()) return;
  stop_ = true;
  gate_.wait(int(own_.size()) + 1);
  for (std::thread& thread : own_) thread.join();
}

void Team::work(int index) {
  for (;;) {
    gate_.wait(int(own_.size()) + 1);
    if (stop_) return;
    take_part(index, std::min(members_, int(own_.size()) + 1));
    gate_.wait(int(own_.size()) + 1);
  }
}

void Team::take_part(int index, int members) {
  if (index >= members) return;
  Member member(*this, index, members);
  (*body_)(member);
}

void Team::run(int members, const std::function<void(Member&)>& body) {
  body_ = &body;
  members_ = members;
  for (Taken& taken : taken_) taken.of[0].store(0, std::memory_order_relaxed);
  const OpenMp* omp = open_mp();
  if (members == 1) {
    take_part(0, 1);
  } else if (omp) {
    // All threads, whether they take part or not: a runtime that is asked for fewer ends the others.
    omp->parallel(
        [](void* self) {
          Team& team = *static_cast<Team*>(self);
          team.take_part(open_mp()->thread_num(), std::min(team.members_, open_mp()->num_threads()));
        },
        this, unsigned(asked_), 0);
  } else {
    gate_.wait(int(own_.size()) + 1);
    take_part(0, std::min(members, int(own_.size()) + 1));
    gate_.wait(int(own_.size()) + 1);
  }
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

std::shared_ptr<Team> Team::borrow(int threads) {
  std::unique_ptr<Team> team;
  {
    std::lock_guard lock(idle().mutex);
    auto& teams = idle().teams;
    for (size_t i = teams.size(); i-- > 0;)
      if (teams[i]->asked_ == threads) {
        team = std::move(teams[i]);
        teams.erase(teams.begin() + i);
        break;
      }
  }
  if (!team) team = std::make_unique<Team>(threads);
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
