// A weight of 8 or 4 bit integers in the one order that all instruction sets read.
//
//   panel   32 output columns, as in PackedMatrix
//   word    32 bits of one column: 4 (or 8) consecutive inputs, the first in the lowest bits
//   line    the same word of 16 columns, half a panel: 64 bytes
//
// A panel is all lines of its first half, then all of its second; so packing transposes 32-bit
// words. Those of an int4 weight are the words of a compressed-tensors checkpoint, and 16 lines of
// an int8 weight are what AMX multiplies by. Inputs are padded to 64; there the activations are 0.
//
// Levels of 4 bits go from 0 to 15: a weight is level * scale + minimum. Scales and minimums are
// float, or half where they came so: with groups of 32 a weight then takes 5 bits in all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "chunk.h"
#include "packed_matrix.h"

namespace fabric {

constexpr int kIntegerStep = 64;

// A product that takes activations of 16 bits adds at most this many inputs in 32 bits:
// 256 * 127 * 32767 < 2^31.
constexpr int kWideInputs = 256;

// Mirrored by QuantizedRecord in records.py.
struct QuantizedSource {
  const uint8_t* values;   // [outputs][inputs * bits / 8]
  const void* scales;      // [outputs][groups]
  const void* minimums;    // the same; null with 8 bits
  int32_t bits;            // 8 or 4
  int32_t number_bytes;    // of a scale or minimum: 4, or 2 with 4 bits
  int32_t group;           // inputs that share a scale; the last group may be cut short
  int32_t cut;             // a chunk is cut into groups of so many inputs; 0: it is one
  int32_t levels;          // activations become -levels ... levels
  int32_t by_token;        // one activation scale a token, else one a token and group
  float input_scale;       // of static activations; 0: from the activations themselves
};

// Inputs [begin, end) whose products are scaled together.
struct InputGroup {
  int32_t begin;
  int32_t end;
};

class QuantizedMatrix {
 public:
  QuantizedMatrix() = default;
  // Neither values nor scales are kept. Groups begin anew with each chunk.
  QuantizedMatrix(const QuantizedSource& source, const std::vector<Chunk>& chunks, int outputs,
                  int inputs, bool gated, Arena& arena, ThreadPool& pool);

  bool empty() const { return panels_ == 0; }
  int panels() const { return panels_; }
  int inputs() const { return inputs_; }
  int padded_inputs() const { return padded_inputs_; }
  int bits() const { return bits_; }
  int levels() const { return levels_; }
  // Activations are bytes then, and lie so in a row.
  bool by_bytes() const { return bits_ == 4 && levels_ <= 127; }
  bool by_token() const { return by_token_; }
  float input_scale() const { return input_scale_; }

  // Groups as the product goes through them: no wider than what 32 bits can add. The last one ends
  // with the padding.
  InputGroup group(int index) const { return groups_[index]; }
  int groups() const { return static_cast<int>(groups_.size()); }
  int chunks() const { return static_cast<int>(first_groups_.size()) - 1; }
  // That of a chunk; behind the last chunk the number of groups.
  int first_group(int chunk) const { return first_groups_[chunk]; }
  int lines() const { return padded_inputs_ * bits_ / 32; }

  // [lines][16]: half a panel.
  const uint32_t* half(int panel, int half) const {
    return words_ + static_cast<size_t>(panel * 2 + half) * lines() * kTileColumns;
  }
  bool halves() const { return number_bytes_ == 2; }
  // 32 scales; behind them, with 4 bits, 32 minimums.
  const std::byte* scales(int panel, int group) const {
    return scales_ + (static_cast<size_t>(panel) * groups() + group) * group_bytes();
  }
  int number_bytes() const { return number_bytes_; }

 private:
  int group_bytes() const { return kPanelColumns * number_bytes_ * (bits_ == 4 ? 2 : 1); }
  void cut_into_groups(const std::vector<Chunk>& chunks, int cut);
  void pack_panel(const QuantizedSource& source, int outputs, bool gated, int panel);
  void pack_scales(const QuantizedSource& source, int row, int panel, int column);

  int panels_ = 0;
  int inputs_ = 0;
  int padded_inputs_ = 0;
  int bits_ = 8;
  int levels_ = 0;
  bool by_token_ = false;
  float input_scale_ = 0.0f;
  std::vector<InputGroup> groups_;
  std::vector<int32_t> first_groups_;
  int number_bytes_ = 4;
  uint32_t* words_ = nullptr;
  std::byte* scales_ = nullptr;
};

}  // namespace fabric
