// One Linear op with integer weights: round the rows it reads, multiply, scale, finish each row.
//
// Sums of integers are exact in any order, and the scaling goes group by group in ascending order
// for any number of rows: a row's result depends on that row alone.
#pragma once

#include <algorithm>

#include "integer_rows.h"
#include "rows.h"
#include "step.h"

namespace fabric {

// Rows of integers that stay in the L2 cache while all panels pass over them.
constexpr int kResidentIntegerRows = 128;

// Up to this many rows every thread rounds all of them for itself: cheaper than a barrier.
constexpr int kPrivateIntegerRows = 4;

// How far ahead of a stream of weights to ask for it. The hardware's prefetcher stops at each 4 KB.
constexpr int kAheadLines = 32;

// What one block of rows needs to know. Rows are IntegerRows at a constant stride.
struct IntegerRows {
  Rows rows;
  const QuantizedMatrix* weight;
  IntegerRow row(int index) const { return {rows.row(index), *weight}; }
};

// Vectors of columns that make a line.
template <class Lanes>
constexpr int kVectors = kTileColumns / Lanes::kColumns;

// sums[row][vector] += the products of `lines` lines.
template <class Lanes, int kBits, int kRowCount>
inline void dot_lines(const int16_t* values, int64_t stride, const uint32_t* words, int lines,
                      typename Lanes::I (&sums)[kRowCount][kVectors<Lanes>]) {
  constexpr int kParts = 32 / kBits / 2;
  for (int line = 0; line < lines; ++line, words += kTileColumns, values += 2 * kParts) {
    _mm_prefetch(reinterpret_cast<const char*>(words + kAheadLines * kTileColumns), _MM_HINT_T0);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors<Lanes>; ++v) {
      const auto raw = Lanes::load(words + v * Lanes::kColumns);
      // Inputs are not kept for the next vector: sums and parts fill the registers.
      const auto multiply = [&]<int kPart>() {
        const auto weights = Lanes::template part<kBits, kPart>(raw);
#pragma GCC unroll 8
        for (int row = 0; row < kRowCount; ++row) {
          const auto inputs = Lanes::pair(values + row * stride + kPart * 2);
          sums[row][v] = Lanes::dot(sums[row][v], weights, inputs);
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
}

// out[row][32]: the products of `rows` rows (at most kRowCount) with half a panel.
template <class Lanes, int kBits, int kRowCount>
void multiply_rows(const IntegerRows& x, int rows, int first_row, int panel, int half, float* out) {
  if constexpr (kRowCount > 1) {
    if (rows < kRowCount) {
      return multiply_rows<Lanes, kBits, kRowCount - 1>(x, rows, first_row, panel, half, out);
    }
  }
  const QuantizedMatrix& weight = *x.weight;
  const uint32_t* words = weight.half(panel, half);
  const float* scales = weight.scales(panel) + half * kTileColumns;
  const int group_lines = weight.group() * kBits / 32;
  for (int group = 0; group < weight.groups(); ++group) {
    typename Lanes::I sums[kRowCount][kVectors<Lanes>];
    for (auto& row : sums) {
      for (auto& sum : row) sum = Lanes::zero();
    }
    const int begin = group * group_lines;
    const int end = group + 1 == weight.groups() ? weight.lines() : begin + group_lines;
    const int16_t* values = x.row(first_row).values + begin * (32 / kBits);
    dot_lines<Lanes, kBits, kRowCount>(values, x.rows.stride, words + begin * kTileColumns,
                                       end - begin, sums);
    for (int row = 0; row < kRowCount; ++row) {
      const IntegerRow read = x.row(first_row + row);
      for (int v = 0; v < kVectors<Lanes>; ++v) {
        auto sum = sums[row][v];
        if constexpr (kBits == 4) sum = Lanes::less_eights(sum, read.sums[group]);
        const int column = v * Lanes::kColumns;
        Lanes::add_scaled(out + row * kPanelColumns + half * kTileColumns + column, group == 0, sum,
                          read.scales[group], scales + group * kPanelColumns + column);
      }
    }
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

template <class Isa, int kBits, Finish kFinish>
void multiply_integers(const Step& step, const Linear& op, const IntegerRows& x, int rows,
                       int first_panel, int last_panel) {
  using Lanes = typename Isa::Integers;
  alignas(64) float sums[Lanes::kRows * kPanelColumns];
  for (int resident = 0; resident < rows; resident += kResidentIntegerRows) {
    const int end = std::min(rows, resident + kResidentIntegerRows);
    for (int panel = first_panel; panel < last_panel; ++panel) {
      // Blocks of nearly equal height: 4 and 4 rows instead of 6 and 2.
      const int blocks = (end - resident + Lanes::kRows - 1) / Lanes::kRows;
      for (int block = 0, row = resident; block < blocks; ++block) {
        const int count = (end - row) / (blocks - block);
        for (int half : {0, 1}) {
          multiply_rows<Lanes, kBits, Lanes::kRows>(x, count, row, panel, half, sums);
        }
        finish_rows<typename Isa::Vector, kFinish>(step, op, row, count, panel, sums, 0);
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
  const int first = op.integers.panels() * thread / threads;
  const int last = op.integers.panels() * (thread + 1) / threads;
  const auto run = [&]<Finish kFinish>() {
    if (op.integers.bits() == 8) {
      multiply_integers<Isa, 8, kFinish>(step, op, x, rows, first, last);
    } else {
      multiply_integers<Isa, 4, kFinish>(step, op, x, rows, first, last);
    }
  };
  switch (finish_of(op)) {
    case Finish::kPlain: run.template operator()<Finish::kPlain>(); break;
    case Finish::kResidual: run.template operator()<Finish::kResidual>(); break;
    case Finish::kGated: run.template operator()<Finish::kGated>(); break;
    case Finish::kLogits: run.template operator()<Finish::kLogits>(); break;
    case Finish::kPieces: break;  // refused at load: a group has no weights of integers yet
  }
  step.pool.barrier();
}

}  // namespace fabric
