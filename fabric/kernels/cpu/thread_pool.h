// A few threads that run one function together, and a barrier inside it.
//
// Not OpenMP: torch brings its own libgomp, and two OpenMP runtimes spin against each other.
// Waiting spins briefly, because the next barrier is microseconds away, then sleeps on a futex,
// because an idle server must not burn a core.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fabric {

class ThreadPool {
 public:
  using Function = void (*)(void* argument, int thread);

  // The calling thread of `run` is thread 0, so `threads` - 1 are started here.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return threads_; }

  // Calls function(argument, t) on every thread t, returns when all are done. One caller at a time.
  void run(Function function, void* argument);

  // Inside `run`: every thread must come here before any goes on.
  void barrier();

 private:
  void work(int thread);
  void stop();

  const int threads_;
  Function function_ = nullptr;
  void* argument_ = nullptr;
  bool stopping_ = false;
  // A count that waiters sleep on. Each on its own cache line: some poll it while others write.
  struct alignas(64) Event {
    std::atomic<uint32_t> count{0};
    std::atomic<uint32_t> sleepers{0};
    void advance();
    void wait_while(uint32_t seen);
  };
  Event region_;
  Event phase_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
  std::vector<std::thread> workers_;
};

}  // namespace fabric
