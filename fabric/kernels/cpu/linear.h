// One Linear op: norm the rows it reads, multiply panel by panel, finish each row.
//
// Batch invariance: `Isa::multiply_panel` gives every output its own chain of accumulations over k
// in ascending order, for any number of rows, so a row's result depends on that row alone. A Linear
// in chunks has one chain a chunk, and adds them in an order that is the same on any number of
// workers.
#pragma once

#include <algorithm>

#include "quantized_linear.h"
#include "rows.h"
#include "spread.h"
#include "step.h"

namespace fabric {

inline const Bf16* chunk_of_panel(const Linear& op, int panel, const Chunk& chunk) {
  return op.weight.panel(panel) + static_cast<int64_t>(chunk.first_step) * 2 * kTileElements;
}

// Many rows: bound by arithmetic. The activations stay in cache while all panels pass over them.
template <class Isa, Finish kFinish>
void multiply_panels(const Step& step, const Linear& op, const Rows& source, Range rows,
                     Range panels, typename Isa::Thread& state) {
  alignas(64) float sums[kStackHeight * Isa::kRows * kPanelColumns];
  for (int resident = rows.first; resident < rows.last; resident += Isa::kResidentRows) {
    const int end = std::min(rows.last, resident + Isa::kResidentRows);
    for (int panel = panels.first; panel < panels.last; ++panel) {
      Isa::begin_panel(state, op.weight.panel(panel), op.weight.steps());
      for (int row = resident; row < end; row += Isa::kRows) {
        const int count = std::min(Isa::kRows, end - row);
        const int64_t floats = count * kPanelColumns;
        add_chunks<typename Isa::Vector>(op, sums, floats, [&](const Chunk& chunk, float* out) {
          Isa::multiply_panel(state, source.row(row) + chunk.first_step * kStepInputs,
                              source.stride, count, chunk_of_panel(op, panel, chunk), chunk.steps,
                              row == resident, out);
        });
        finish_rows<typename Isa::Vector, kFinish>(step, op, row, count, panel, sums, floats);
      }
    }
  }
}

// The rows of the next block of at most `most` when `rows` are left: as even as it goes.
inline int even_block(int rows, int most) {
  const int blocks = (rows + most - 1) / most;
  return (rows + blocks - 1) / blocks;
}

// Few rows: bound by reading the weights. Two panels at a time, one from each half of the range, so
// that a thread reads two endless streams (measured: 1.1 to 1.2 times the bandwidth of one). The
// next blocks of rows find the two panels in cache.
template <class Isa, Finish kFinish>
void stream_panels(const Step& step, const Linear& op, const Rows& source, Range rows,
                   Range panels, typename Isa::Thread& state) {
  constexpr int kBlock = Isa::kStreamBlock;
  alignas(64) float sums[kStackHeight * 2 * kBlock * kPanelColumns];
  const int half = (panels.last - panels.first) / 2;
  for (int panel = panels.first; panel < panels.first + half; ++panel) {
    for (int row = rows.first, count; row < rows.last; row += count) {
      count = even_block(rows.last - row, kBlock);
      const int64_t floats = 2 * count * kPanelColumns;
      add_chunks<typename Isa::Vector>(op, sums, floats, [&](const Chunk& chunk, float* out) {
        Isa::multiply_two_panels(state, source.row(row) + chunk.first_step * kStepInputs,
                                 source.stride, count, chunk_of_panel(op, panel, chunk),
                                 chunk_of_panel(op, panel + half, chunk), chunk.steps,
                                 row == rows.first, out);
      });
      for (int i : {0, 1}) {
        finish_rows<typename Isa::Vector, kFinish>(step, op, row, count, panel + i * half,
                                                   sums + i * count * kPanelColumns, floats);
      }
    }
  }
  const Range rest{panels.first + 2 * half, panels.last};
  multiply_panels<Isa, kFinish>(step, op, source, rows, rest, state);
}

// The rows that the op multiplies: in place, or staged for this thread or for all.
template <class Isa>
Rows stage_rows(Step& step, const Linear& op, int rows, int thread) {
  if (op.source != Buffer::kHidden && op.target != Buffer::kLogits) {
    return step.rows[static_cast<int>(op.source)];
  }
  const int threads = step.pool.size();
  const bool mine = rows <= kPrivateRows;
  const Rows staged = mine ? Rows{step.private_rows(thread), step.normed.stride} : step.normed;
  const int first = mine ? 0 : rows * thread / threads;
  const int last = mine ? rows : rows * (thread + 1) / threads;
  for (int row = first; row < last; ++row) {
    stage_row<typename Isa::Vector>(step, op, row, staged.row(row));
  }
  if (!mine) step.pool.barrier();
  return staged;
}

template <class Isa>
void run_linear(Step& step, const Linear& op, int thread, typename Isa::Thread& state) {
  if (!op.integers.empty()) return run_quantized_linear<Isa>(step, op, thread);
  const int threads = step.pool.size();
  const bool logits = op.target == Buffer::kLogits;
  const int rows = logits ? step.input.logit_row_count : step.input.tokens;
  const Rows source = stage_rows<Isa>(step, op, rows, thread);
  const Range mine = op.panels_of(thread, threads);
  finish_linear<typename Isa::Vector>(
      step, op, rows, thread, [&]<Finish kFinish>(Range block) {
        if (block.last - block.first <= Isa::kStreamRows) {
          stream_panels<Isa, kFinish>(step, op, source, block, mine, state);
        } else {
          multiply_panels<Isa, kFinish>(step, op, source, block, mine, state);
        }
      });
}

}  // namespace fabric
