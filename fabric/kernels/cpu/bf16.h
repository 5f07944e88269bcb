// bfloat16 as bits: the upper half of a float.
#pragma once

#include <bit>
#include <cstdint>

namespace fabric {

using Bf16 = uint16_t;

inline float to_float(Bf16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

template <class Integer>
constexpr Integer round_up(Integer value, Integer multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace fabric
