// Long-lived memory on huge pages where the system grants them: weights are streamed whole every
// step, and 4 KB pages would cost a TLB miss every 64 cache lines.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>

namespace fabric {

// Zeroed, 64-byte aligned (in fact page aligned), not copyable.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    void* address =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc();
    address_ = address;
    if (bytes >= kHugePage) madvise(address, bytes, MADV_HUGEPAGE);
  }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory() {
    if (address_ != nullptr) munmap(address_, bytes_);
  }

  template <class Element>
  Element* as() const {
    return static_cast<Element*>(address_);
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;

  void swap(Memory& other) {
    std::swap(address_, other.address_);
    std::swap(bytes_, other.bytes_);
  }

  void* address_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace fabric
