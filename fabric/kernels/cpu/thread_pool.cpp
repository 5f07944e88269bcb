#include "thread_pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace fabric {
namespace {

// Time-stamp ticks, about 25 us at 2 to 3 GHz: a few barriers long, far below a step.
constexpr uint64_t kSpinTicks = 60'000;

void futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, nullptr, nullptr, 0);
}

// Returns once `word` is no longer `seen`.
void wait_while(std::atomic<uint32_t>& word, uint32_t seen) {
  const uint64_t start = __rdtsc();
  while (word.load(std::memory_order_acquire) == seen) {
    if (__rdtsc() - start < kSpinTicks) {
      _mm_pause();
    } else {
      futex(word, FUTEX_WAIT_PRIVATE, seen);
    }
  }
}

void advance(std::atomic<uint32_t>& word) {
  word.fetch_add(1, std::memory_order_release);
  futex(word, FUTEX_WAKE_PRIVATE, INT_MAX);
}

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(threads < 1 ? 1 : threads) {
  for (int thread = 1; thread < threads_; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  advance(region_);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(Function function, void* argument) {
  function_ = function;
  argument_ = argument;
  if (threads_ > 1) advance(region_);
  function(argument, 0);
  barrier();
}

void ThreadPool::work(int thread) {
  for (uint32_t seen = 0;; ++seen) {
    wait_while(region_, seen);
    if (stopping_) return;
    function_(argument_, thread);
    barrier();
  }
}

void ThreadPool::barrier() {
  if (threads_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(threads_)) {
    arrived_.store(0, std::memory_order_relaxed);
    advance(phase_);
  } else {
    wait_while(phase_, phase);
  }
}

}  // namespace fabric
