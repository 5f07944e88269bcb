// How the workers of a group exchange bytes in the middle of a step.
//
// Each has an outbox. `share` shows it to the others and waits until they have shown theirs: then
// `inbox(rank)` is what that rank wrote. One primitive, because sums, gathers and the dispatch to
// experts differ only in who reads what.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "memory.h"

namespace fabric {

class Group {
 public:
  virtual ~Group() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // The most bytes that one `share` moves.
  virtual int64_t capacity() const = 0;
  virtual std::byte* outbox() = 0;
  // Returns nullptr, or what went wrong; then the group is of no more use.
  virtual const char* share(int64_t bytes) = 0;
  // Valid until the next `share`; must not be read after the one behind that has begun.
  virtual const std::byte* inbox(int rank) const = 0;
};

// Between processes of one machine: one segment of POSIX shared memory.
//
// A rank has two outboxes and a count of how often it has shared. It may write an outbox again as
// soon as everybody has shared once more: who has, is done with reading the one before.
//
// Waiting spins briefly, then sleeps on a futex in the segment. Who sleeps looks up every 20 ms to
// see whether the other is still alive: each process holds a lock on one byte of the segment's
// file, which the kernel gives back however the process ends.
class SharedMemoryGroup final : public Group {
 public:
  // Rank 0 makes the segment `name` (as shm_open has it), the others wait for it; when all are
  // there the name goes, so that nothing is left behind. Throws std::runtime_error.
  SharedMemoryGroup(const char* name, int rank, int size, int64_t capacity, int timeout_ms);
  ~SharedMemoryGroup() override;
  SharedMemoryGroup(const SharedMemoryGroup&) = delete;
  SharedMemoryGroup& operator=(const SharedMemoryGroup&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  int64_t capacity() const override { return capacity_; }
  std::byte* outbox() override { return slot(rank_, round_); }
  const char* share(int64_t bytes) override;
  const std::byte* inbox(int rank) const override { return slot(rank, round_ - 1); }

  // From one rank to another, in order; up to two pieces of `capacity` bytes wait in between.
  const char* send(int to, const std::byte* data, int64_t bytes);
  const char* receive(int from, std::byte* data, int64_t bytes);

 private:
  struct Header;
  struct Flag;

  void create(const char* name);
  void attach(const char* name);
  void map(int64_t bytes);
  void take_lock() const;
  bool is_alive(int rank) const;
  std::byte* slot(int rank, uint32_t round) const;
  std::byte* mail_slot(int from, int to, uint32_t piece) const;
  Flag& posted(int rank) const;
  Flag& sent(int from, int to) const;
  Flag& taken(int from, int to) const;
  int64_t flags_bytes() const;
  int64_t segment_bytes() const;
  // Until the flag has reached `count`, which `peer` advances.
  const char* wait(Flag& flag, uint32_t count, int peer);
  const char* fail(const std::string& problem);

  const int rank_;
  const int size_;
  const int64_t capacity_;
  const int timeout_ms_;
  int file_ = -1;
  std::byte* base_ = nullptr;
  uint32_t round_ = 0;
  std::string problem_;
};

// Through a function of the caller, for groups that reach over machines. It gathers `bytes` of
// every rank's `mine` into `all`, rank by rank, and returns 0 if it could.
using Gather = int (*)(const void* mine, void* all, int64_t bytes);

class CallbackGroup final : public Group {
 public:
  CallbackGroup(Gather gather, int rank, int size, int64_t capacity)
      : gather_(gather), rank_(rank), size_(size), capacity_(capacity),
        boxes_(static_cast<size_t>(capacity) * (size + 1)) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  int64_t capacity() const override { return capacity_; }
  std::byte* outbox() override { return boxes_.as<std::byte>(); }
  const char* share(int64_t bytes) override {
    shared_ = bytes;
    return gather_(outbox(), outbox() + capacity_, bytes) == 0 ? nullptr : "the exchange failed";
  }
  const std::byte* inbox(int rank) const override {
    return boxes_.as<std::byte>() + capacity_ + rank * shared_;
  }

 private:
  const Gather gather_;
  const int rank_;
  const int size_;
  const int64_t capacity_;
  int64_t shared_ = 0;
  Memory boxes_;
};

}  // namespace fabric
