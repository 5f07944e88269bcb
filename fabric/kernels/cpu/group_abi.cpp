// The C ABI of groups, for shared_memory.py and executor.py. Strings say what went wrong, or null.
#include <cstdio>
#include <exception>

#include "group.h"

namespace fabric {

extern "C" {

// `problem` has room for 200 bytes.
Group* fabric_group_open(const char* name, int rank, int size, int64_t capacity, int timeout_ms,
                         char* problem) {
  try {
    return new SharedMemoryGroup(name, rank, size, capacity, timeout_ms);
  } catch (const std::exception& error) {
    std::snprintf(problem, 200, "%s", error.what());
    return nullptr;
  }
}

Group* fabric_group_of_callback(Gather gather, int rank, int size, int64_t capacity) {
  try {
    return new CallbackGroup(gather, rank, size, capacity);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void fabric_group_close(Group* group) { delete group; }

int64_t fabric_group_capacity(const Group* group) { return group->capacity(); }
void* fabric_group_outbox(Group* group) { return group->outbox(); }
const void* fabric_group_inbox(const Group* group, int rank) { return group->inbox(rank); }
const char* fabric_group_share(Group* group, int64_t bytes) { return group->share(bytes); }

const char* fabric_group_send(Group* group, int to, const void* data, int64_t bytes) {
  return static_cast<SharedMemoryGroup*>(group)->send(to, static_cast<const std::byte*>(data),
                                                      bytes);
}

const char* fabric_group_receive(Group* group, int from, void* data, int64_t bytes) {
  return static_cast<SharedMemoryGroup*>(group)->receive(from, static_cast<std::byte*>(data),
                                                         bytes);
}

}  // extern "C"
}  // namespace fabric
