#include "group.h"

#include <fcntl.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <new>
#include <stdexcept>

namespace fabric {
namespace {

// Time-stamp ticks, some 50 us: the ranks of a step come to an exchange nearly together, and to be
// woken takes that long. Between steps nobody waits here.
constexpr uint64_t kSpinTicks = 150'000;
constexpr int64_t kLookUpNs = 20'000'000;
constexpr uint32_t kReady = 0x46414252;
constexpr uint32_t kMailDepth = 2;

int64_t now_ms() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000 + time.tv_nsec / 1'000'000;
}

// Not the private kind: the waiter is another process.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  const timespec timeout{0, kLookUpNs};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

struct flock lock_of(int rank, short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}

}  // namespace

struct alignas(64) SharedMemoryGroup::Flag {
  std::atomic<uint32_t> count;
  std::atomic<uint32_t> sleepers;

  void advance() {
    count.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) != 0) futex_wake(count);
  }
};

struct alignas(64) SharedMemoryGroup::Header {
  std::atomic<uint32_t> ready;
  std::atomic<uint32_t> joined;
  std::atomic<uint32_t> broken;  // 1 + the rank that gave up, so that the others do at once
  uint32_t size;
  int64_t capacity;
};

SharedMemoryGroup::SharedMemoryGroup(const char* name, int rank, int size, int64_t capacity,
                                     int timeout_ms)
    : rank_(rank), size_(size), capacity_((capacity + 4095) / 4096 * 4096),
      timeout_ms_(timeout_ms) {
  try {
    rank == 0 ? create(name) : attach(name);
    auto& header = *reinterpret_cast<Header*>(base_);
    header.joined.fetch_add(1);
    const int64_t deadline = now_ms() + timeout_ms_;
    while (header.joined.load() < static_cast<uint32_t>(size_)) {
      if (now_ms() > deadline) throw std::runtime_error("not all workers of the group came");
      usleep(1000);
    }
    if (rank == 0) shm_unlink(name);
  } catch (...) {
    if (rank == 0 && base_ != nullptr) shm_unlink(name);
    if (base_ != nullptr) munmap(base_, segment_bytes());
    if (file_ >= 0) close(file_);
    throw;
  }
}

SharedMemoryGroup::~SharedMemoryGroup() {
  munmap(base_, segment_bytes());
  close(file_);  // gives the lock back: the others see that this rank is gone
}

void SharedMemoryGroup::create(const char* name) {
  file_ = shm_open(name, O_CREAT | O_EXCL | O_RDWR, 0600);
  if (file_ < 0) refuse(std::string("can't make the shared memory ") + name);
  if (ftruncate(file_, segment_bytes()) != 0) refuse("can't size the shared memory");
  map(segment_bytes());
  take_lock();
  auto& header = *new (base_) Header{};
  header.size = size_;
  header.capacity = capacity_;
  header.ready.store(kReady);
}

void SharedMemoryGroup::attach(const char* name) {
  const int64_t deadline = now_ms() + timeout_ms_;
  const auto wait_a_moment = [&] {
    if (now_ms() > deadline) {
      throw std::runtime_error(std::string("rank 0 made no shared memory ") + name + " in time");
    }
    usleep(1000);
  };
  while ((file_ = shm_open(name, O_RDWR, 0)) < 0) {
    if (errno != ENOENT) refuse(std::string("can't open the shared memory ") + name);
    wait_a_moment();
  }
  struct stat status {};
  while (fstat(file_, &status) == 0 && status.st_size == 0) wait_a_moment();
  if (status.st_size != segment_bytes()) {
    throw std::runtime_error("the workers of the group disagree on its size or capacity");
  }
  map(segment_bytes());
  take_lock();
  while (reinterpret_cast<Header*>(base_)->ready.load() != kReady) wait_a_moment();
}

void SharedMemoryGroup::map(int64_t bytes) {
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
  if (mapped == MAP_FAILED) refuse("can't map the shared memory");
  base_ = static_cast<std::byte*>(mapped);
}

// Locks of an open file, not of a process: the same process may hold two ranks, as tests do.
void SharedMemoryGroup::take_lock() const {
  struct flock lock = lock_of(rank_, F_WRLCK);
  if (fcntl(file_, F_OFD_SETLK, &lock) != 0) {
    throw std::runtime_error("rank " + std::to_string(rank_) + " of the group is taken");
  }
}

bool SharedMemoryGroup::is_alive(int rank) const {
  struct flock lock = lock_of(rank, F_WRLCK);
  return fcntl(file_, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

const char* SharedMemoryGroup::share(int64_t bytes) {
  if (bytes > capacity_) return fail("more bytes than an outbox holds");
  posted(rank_).advance();
  ++round_;
  for (int other = 0; other < size_; ++other) {
    if (other == rank_) continue;
    if (const char* problem = wait(posted(other), round_, other)) return problem;
  }
  return nullptr;
}

const char* SharedMemoryGroup::send(int to, const std::byte* data, int64_t bytes) {
  for (int64_t done = 0; done < bytes; done += capacity_) {
    Flag& flag = sent(rank_, to);
    const uint32_t piece = flag.count.load(std::memory_order_relaxed);
    if (const char* problem = wait(taken(rank_, to), piece - kMailDepth + 1, to)) return problem;
    std::memcpy(mail_slot(rank_, to, piece), data + done, std::min(capacity_, bytes - done));
    flag.advance();
  }
  return nullptr;
}

const char* SharedMemoryGroup::receive(int from, std::byte* data, int64_t bytes) {
  for (int64_t done = 0; done < bytes; done += capacity_) {
    Flag& flag = taken(from, rank_);
    const uint32_t piece = flag.count.load(std::memory_order_relaxed);
    if (const char* problem = wait(sent(from, rank_), piece + 1, from)) return problem;
    std::memcpy(data + done, mail_slot(from, rank_, piece), std::min(capacity_, bytes - done));
    flag.advance();
  }
  return nullptr;
}

// Counts may wrap: they are compared by their difference.
const char* SharedMemoryGroup::wait(Flag& flag, uint32_t count, int peer) {
  auto& header = *reinterpret_cast<Header*>(base_);
  const auto reached = [&](uint32_t seen) { return static_cast<int32_t>(seen - count) >= 0; };
  const uint64_t start = __rdtsc();
  while (__rdtsc() - start < kSpinTicks) {
    if (reached(flag.count.load(std::memory_order_acquire))) return nullptr;
    _mm_pause();
  }
  const int64_t deadline = now_ms() + timeout_ms_;
  for (;;) {
    flag.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = flag.count.load(std::memory_order_seq_cst);
    if (!reached(seen)) futex_wait(flag.count, seen);
    flag.sleepers.fetch_sub(1, std::memory_order_relaxed);
    // Asked before the count is: a rank that counted and then ended was alive when it mattered.
    const bool alive = is_alive(peer);
    const uint32_t broken = header.broken.load();
    const int64_t now = now_ms();
    if (reached(flag.count.load(std::memory_order_acquire))) return nullptr;
    if (!alive) return fail("rank " + std::to_string(peer) + " of the group is gone");
    if (broken != 0) {
      return fail("rank " + std::to_string(broken - 1) + " of the group has given up");
    }
    if (now > deadline) {
      return fail("rank " + std::to_string(peer) + " of the group did not answer within " +
                  std::to_string(timeout_ms_) + " ms");
    }
  }
}

const char* SharedMemoryGroup::fail(const std::string& problem) {
  uint32_t nobody = 0;
  reinterpret_cast<Header*>(base_)->broken.compare_exchange_strong(nobody, rank_ + 1);
  problem_ = problem;
  return problem_.c_str();
}

SharedMemoryGroup::Flag& SharedMemoryGroup::posted(int rank) const {
  return reinterpret_cast<Flag*>(base_ + sizeof(Header))[rank];
}

SharedMemoryGroup::Flag& SharedMemoryGroup::sent(int from, int to) const {
  return reinterpret_cast<Flag*>(base_ + sizeof(Header))[size_ + (from * size_ + to) * 2];
}

SharedMemoryGroup::Flag& SharedMemoryGroup::taken(int from, int to) const {
  return reinterpret_cast<Flag*>(base_ + sizeof(Header))[size_ + (from * size_ + to) * 2 + 1];
}

int64_t SharedMemoryGroup::flags_bytes() const {
  const int64_t bytes = sizeof(Header) + sizeof(Flag) * (size_ + 2 * size_ * size_);
  return (bytes + 4095) / 4096 * 4096;
}

std::byte* SharedMemoryGroup::slot(int rank, uint32_t round) const {
  return base_ + flags_bytes() + (round % 2 * size_ + rank) * capacity_;
}

std::byte* SharedMemoryGroup::mail_slot(int from, int to, uint32_t piece) const {
  const int64_t index = 2 * size_ + (from * size_ + to) * kMailDepth + piece % kMailDepth;
  return base_ + flags_bytes() + index * capacity_;
}

// Most of it is never touched, and so takes no memory.
int64_t SharedMemoryGroup::segment_bytes() const {
  return flags_bytes() + (2 * size_ + size_ * size_ * kMailDepth) * capacity_;
}

}  // namespace fabric
