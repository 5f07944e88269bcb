// How the inputs of a product are cut, so that any number of workers adds in one order.
#pragma once

#include <cstdint>

namespace fabric {

// A run of inputs that is summed from zero. Its sums go on a stack; then, `merges` times, the two
// on top become one. See fabric/kernels/summation.py.
struct Chunk {
  int32_t first_step;
  int32_t steps;
  int32_t merges;
};

}  // namespace fabric
