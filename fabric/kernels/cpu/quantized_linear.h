// One Linear op with integer weights: round the rows it reads, multiply, scale, finish each row.
//
// Sums of integers are exact in any order, and the scaling goes group by group in ascending order
// for any number of rows: a row's result depends on that row alone.
#pragma once

#include <algorithm>

#include "integer_rows.h"
#include "rows.h"
#include "spread.h"
#include "step.h"

namespace fabric {

// Rows of integers that stay in the L2 cache while all panels pass over them.
constexpr int kResidentIntegerRows = 128;

// Up to this many rows every thread rounds all of them for itself: cheaper than a barrier.
constexpr int kPrivateIntegerRows = 4;

// How far ahead of a stream of weights to ask for it. The hardware's prefetcher stops at each 4 KB.
constexpr int kAheadLines = 32;

// Lines of 4-bit weights, 32 inputs, whose products with bytes lanes of 16 bits can add up.
constexpr int kNarrowLines = 4;

// What one block of rows needs to know. Rows are IntegerRows at a constant stride.
struct IntegerRows {
  Rows rows;
  const QuantizedMatrix* weight;
  IntegerRow row(int index) const { return {rows.row(index), *weight}; }
};

// What a product reads: weights of 8 or 4 bits against activations of 16, or of 4 against 8.
enum class Integers { kEight, kFour, kFourByEight };

constexpr int bits_of(Integers kind) { return kind == Integers::kEight ? 8 : 4; }

// Vectors of columns that make a line.
template <class Lanes>
constexpr int kVectors = kTileColumns / Lanes::kColumns;

template <class Lanes, int kRowCount>
using Sums = typename Lanes::I[kRowCount][kVectors<Lanes>];

template <class Lanes, int kRowCount>
inline void clear(Sums<Lanes, kRowCount>& sums) {
  for (auto& row : sums) {
    for (auto& sum : row) sum = Lanes::zero();
  }
}

// sums[row][vector] += the products of `lines` lines, in lanes of 16 bits.
template <class Lanes, int kBits, int kRowCount>
inline void dot_lines(const int16_t* values, int64_t stride, const uint32_t* words, int lines,
                      Sums<Lanes, kRowCount>& sums) {
  constexpr int kParts = 32 / kBits / 2;
  for (int line = 0; line < lines; ++line, words += kTileColumns, values += 2 * kParts) {
    _mm_prefetch(reinterpret_cast<const char*>(words + kAheadLines * kTileColumns), _MM_HINT_T0);
    // Inputs are read once for all vectors, raw words again for each part: beside the sums of six
    // rows there are registers for a part's weights, and one for inputs.
    const auto multiply = [&]<int kPart>() {
      typename Lanes::I weights[kVectors<Lanes>];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors<Lanes>; ++v) {
        weights[v] = Lanes::template part<kBits, kPart>(Lanes::load(words + v * Lanes::kColumns));
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRowCount; ++row) {
        const auto inputs = Lanes::word(values + row * stride + kPart * 2);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors<Lanes>; ++v) {
          sums[row][v] = Lanes::dot(sums[row][v], weights[v], inputs);
        }
      }
    };
    multiply.template operator()<0>();
    multiply.template operator()<1>();
    if constexpr (kParts == 4) {
      multiply.template operator()<2>();
      multiply.template operator()<3>();
    }
  }
}

// The same of 4-bit weights and 8-bit activations: 32 inputs at a time, which lanes of 16 bits can
// add up. `stride` in bytes.
template <class Lanes, int kRowCount>
inline void dot_bytes(const int8_t* values, int64_t stride, const uint32_t* words, int lines,
                      Sums<Lanes, kRowCount>& sums) {
  for (int line = 0; line < lines; line += kNarrowLines) {
    Sums<Lanes, kRowCount> narrow;
    clear<Lanes, kRowCount>(narrow);
#pragma GCC unroll 4
    for (int each = 0; each < kNarrowLines; ++each, words += kTileColumns, values += 8) {
      _mm_prefetch(reinterpret_cast<const char*>(words + kAheadLines * kTileColumns), _MM_HINT_T0);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors<Lanes>; ++v) {
        const auto raw = Lanes::load(words + v * Lanes::kColumns);
        const auto multiply = [&]<int kPart>() {
          const auto levels = Lanes::template levels<kPart>(raw);
#pragma GCC unroll 8
          for (int row = 0; row < kRowCount; ++row) {
            const auto inputs = Lanes::word(values + row * stride + kPart * 4);
            narrow[row][v] = Lanes::dot_bytes(narrow[row][v], levels, inputs);
          }
        };
        multiply.template operator()<0>();
        multiply.template operator()<1>();
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRowCount; ++row) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors<Lanes>; ++v) {
        sums[row][v] = Lanes::add(sums[row][v], Lanes::widen(narrow[row][v]));
      }
    }
  }
}

// 16 or 8 of a group's scales (or minimums), the `first` of 32 and on.
template <class Vector>
inline typename Vector::F load_numbers(const std::byte* numbers, bool halves, int first) {
  if (halves) return Vector::load_half(reinterpret_cast<const uint16_t*>(numbers) + first);
  return Vector::load(reinterpret_cast<const float*>(numbers) + first);
}

// out[row][32] += half a panel's sums of one group, scaled. No fused operation: the reference has
// none. What `out` held before the `first` group of a chunk does not matter.
template <class Isa, Integers kKind, int kRowCount>
inline void add_group(const IntegerRows& x, int first_row, int group, bool first,
                      const std::byte* scales, int first_column,
                      const Sums<typename Isa::Integers, kRowCount>& sums, float* out) {
  using Lanes = typename Isa::Integers;
  using Vector = typename Isa::Vector;
  static_assert(Vector::kLanes == Lanes::kColumns);
  const bool halves = x.weight->halves();
  const std::byte* minimums = scales + kPanelColumns * x.weight->number_bytes();
#pragma GCC unroll 2
  for (int v = 0; v < kVectors<Lanes>; ++v) {
    const int column = first_column + v * Lanes::kColumns;
    const auto scale = load_numbers<Vector>(scales, halves, column);
    auto minimum = Vector::zero();
    if constexpr (bits_of(kKind) == 4) minimum = load_numbers<Vector>(minimums, halves, column);
#pragma GCC unroll 8
    for (int row = 0; row < kRowCount; ++row) {
      const IntegerRow read = x.row(first_row + row);
      const auto both = Vector::mul(Vector::set(read.scales[group]), scale);
      auto sum = Vector::mul(Lanes::to_float(sums[row][v]), both);
      if constexpr (bits_of(kKind) == 4) {
        sum = Vector::add(sum, Vector::mul(Vector::set(read.offsets[group]), minimum));
      }
      float* total = out + row * kPanelColumns + column;
      Vector::store(total, Vector::add(first ? Vector::zero() : Vector::load(total), sum));
    }
  }
}

// out[row][32]: a chunk's products of `rows` rows (at most kRowCount) with half a panel.
template <class Isa, Integers kKind, int kRowCount>
void multiply_rows(const IntegerRows& x, int rows, int first_row, int chunk, int panel, int half,
                   float* out) {
  if constexpr (kRowCount > 1) {
    if (rows < kRowCount) {
      return multiply_rows<Isa, kKind, kRowCount - 1>(x, rows, first_row, chunk, panel, half, out);
    }
  }
  using Lanes = typename Isa::Integers;
  constexpr int kBits = bits_of(kKind);
  const QuantizedMatrix& weight = *x.weight;
  const uint32_t* words = weight.half(panel, half);
  const int first = weight.first_group(chunk);
  for (int group = first; group < weight.first_group(chunk + 1); ++group) {
    Sums<Lanes, kRowCount> sums;
    clear<Lanes, kRowCount>(sums);
    const InputGroup inputs = weight.group(group);
    const int begin = inputs.begin * kBits / 32;
    const int lines = inputs.end * kBits / 32 - begin;
    const IntegerRow read = x.row(first_row);
    const uint32_t* from = words + begin * kTileColumns;
    if constexpr (kKind == Integers::kFourByEight) {
      dot_bytes<Lanes, kRowCount>(read.bytes() + inputs.begin, x.rows.stride * sizeof(Bf16), from,
                                  lines, sums);
    } else {
      dot_lines<Lanes, kBits, kRowCount>(read.values + inputs.begin, x.rows.stride, from, lines,
                                         sums);
    }
    add_group<Isa, kKind, kRowCount>(x, first_row, group, group == first,
                                     weight.scales(panel, group), half * kTileColumns, sums, out);
  }
}

template <class Vector>
void stage_integers(const Step& step, const Linear& op, int row, const Rows& out) {
  const IntegerRow target(out.row(row), op.integers);
  if (op.source != Buffer::kHidden) {
    const Rows& source = step.rows[static_cast<int>(op.source)];
    return quantize_row(source.row(token_of(step, op, row)), op.integers, target);
  }
  stage_row<Vector>(step, op, row, out.row(row));
  quantize_row(out.row(row), op.integers, target);
}

template <class Isa, Integers kKind, Finish kFinish>
void multiply_integers(const Step& step, const Linear& op, const IntegerRows& x, Range rows,
                       Range panels) {
  using Lanes = typename Isa::Integers;
  alignas(64) float sums[kStackHeight * Lanes::kRows * kPanelColumns];
  for (int resident = rows.first; resident < rows.last; resident += kResidentIntegerRows) {
    const int end = std::min(rows.last, resident + kResidentIntegerRows);
    for (int panel = panels.first; panel < panels.last; ++panel) {
      // Blocks of nearly equal height: 4 and 4 rows instead of 6 and 2.
      const int blocks = (end - resident + Lanes::kRows - 1) / Lanes::kRows;
      for (int block = 0, row = resident; block < blocks; ++block) {
        const int count = (end - row) / (blocks - block);
        const int64_t floats = count * kPanelColumns;
        add_chunks<typename Isa::Vector>(op, sums, floats, [&](const Chunk& chunk, float* out) {
          const int index = static_cast<int>(&chunk - op.chunks.data());
          for (int half : {0, 1}) {
            multiply_rows<Isa, kKind, Lanes::kRows>(x, count, row, index, panel, half, out);
          }
        });
        finish_rows<typename Isa::Vector, kFinish>(step, op, row, count, panel, sums, floats);
        row += count;
      }
    }
  }
}

template <class Isa>
void run_quantized_linear(Step& step, const Linear& op, int thread) {
  const int threads = step.pool.size();
  const bool logits = op.target == Buffer::kLogits;
  const int rows = logits ? step.input.logit_row_count : step.input.tokens;
  const bool mine = rows <= kPrivateIntegerRows;
  const Rows staged = mine ? Rows{step.private_rows(thread), step.normed.stride} : step.normed;
  for (int row = mine ? 0 : rows * thread / threads;
       row < (mine ? rows : rows * (thread + 1) / threads); ++row) {
    stage_integers<typename Isa::Vector>(step, op, row, staged);
  }
  if (!mine) step.pool.barrier();
  const IntegerRows x{staged, &op.integers};
  const Range panels = op.panels_of(thread, threads);
  finish_linear<typename Isa::Vector>(
      step, op, rows, thread, [&]<Finish kFinish>(Range block) {
        if (op.integers.bits() == 8) {
          multiply_integers<Isa, Integers::kEight, kFinish>(step, op, x, block, panels);
        } else if (op.integers.by_bytes()) {
          multiply_integers<Isa, Integers::kFourByEight, kFinish>(step, op, x, block, panels);
        } else {
          multiply_integers<Isa, Integers::kFour, kFinish>(step, op, x, block, panels);
        }
      });
}

}  // namespace fabric
