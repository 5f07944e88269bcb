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

}  // namespace

// The wake is a system call, so it is made only when somebody sleeps. Both sides are sequentially
// consistent: either the sleeper is seen here, or the kernel sees the new count there.
void ThreadPool::Event::advance() {
  count.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_seq_cst) != 0) futex(count, FUTEX_WAKE_PRIVATE, INT_MAX);
}

void ThreadPool::Event::wait_while(uint32_t seen) {
  const uint64_t start = __rdtsc();
  while (count.load(std::memory_order_acquire) == seen) {
    if (__rdtsc() - start < kSpinTicks) {
      _mm_pause();
      continue;
    }
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    futex(count, FUTEX_WAIT_PRIVATE, seen);  // returns at once if the count has moved on
    sleepers.fetch_sub(1, std::memory_order_relaxed);
  }
}

ThreadPool::ThreadPool(int threads) : threads_(threads < 1 ? 1 : threads) {
  for (int thread = 1; thread < threads_; ++thread) {
    try {
      workers_.emplace_back([this, thread] { work(thread); });
    } catch (...) {
      stop();  // a running thread must not be destroyed
      throw;
    }
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_ = true;
  region_.advance();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(Function function, void* argument) {
  function_ = function;
  argument_ = argument;
  if (threads_ > 1) region_.advance();
  function(argument, 0);
  barrier();
}

void ThreadPool::work(int thread) {
  for (uint32_t seen = 0;; ++seen) {
    region_.wait_while(seen);
    if (stopping_) return;
    function_(argument_, thread);
    barrier();
  }
}

void ThreadPool::barrier() {
  if (threads_ == 1) return;
  const uint32_t phase = phase_.count.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(threads_)) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.advance();
  } else {
    phase_.wait_while(phase);
  }
}

}  // namespace fabric
