// How fast this machine reads memory: the floor under a decode step, which reads every weight once.
#include <immintrin.h>

#include <chrono>

#include "memory.h"
#include "thread_pool.h"

namespace fabric {
namespace {

constexpr int kStreams = 2;  // per thread, each prefetched 1 KB ahead: the best of what was tried
constexpr size_t kAheadBytes = 1024;

struct Scan {
  const char* data;
  size_t bytes;  // per stream
};

void scan(void* argument, int thread) {
  const Scan& work = *static_cast<Scan*>(argument);
  const char* streams[kStreams];
  for (int i = 0; i < kStreams; ++i) {
    streams[i] = work.data + (static_cast<size_t>(thread) * kStreams + i) * work.bytes;
  }
  __m256i sums[kStreams] = {};
  for (size_t offset = 0; offset < work.bytes; offset += 64) {
    for (int i = 0; i < kStreams; ++i) {
      const char* at = streams[i] + offset;
      _mm_prefetch(at + kAheadBytes, _MM_HINT_T0);
      sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256((const __m256i*)at));
      sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256((const __m256i*)(at + 32)));
    }
  }
  volatile int keep = _mm256_extract_epi32(_mm256_xor_si256(sums[0], sums[1]), 0);
  (void)keep;
}

}  // namespace

// Bytes per second, the best of `repeats` scans of `bytes` on `threads` threads.
extern "C" double fabric_cpu_read_bandwidth(int threads, int64_t bytes, int repeats) {
  using Clock = std::chrono::steady_clock;
  ThreadPool pool(threads);
  Scan work{nullptr, static_cast<size_t>(bytes) / threads / kStreams / 64 * 64};
  const size_t total = work.bytes * kStreams * threads;
  const Memory memory(total + kAheadBytes);
  for (size_t page = 0; page < total; page += 4096) memory.as<char>()[page] = 1;
  work.data = memory.as<char>();
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    pool.run(scan, &work);
    const std::chrono::duration<double> elapsed = Clock::now() - start;
    best = total / elapsed.count() > best ? total / elapsed.count() : best;
  }
  return best;
}

}  // namespace fabric
