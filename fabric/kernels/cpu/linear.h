// One Linear op: norm the rows it reads, multiply panel by panel, finish each row.
//
// Batch invariance: `Isa::multiply_panel` gives every output its own chain of accumulations over k
// in ascending order, for any number of rows, so a row's result depends on that row alone.
#pragma once

#include <algorithm>
#include <array>

#include "rows.h"
#include "step.h"

namespace fabric {

// Rows of activations that stay in the L2 cache while all panels pass over them.
constexpr int kResidentRows = 256;

// The row of HIDDEN (or another source) that row `row` of the op reads.
inline int source_row(const Step& step, const Linear& op, int row) {
  return op.target == Buffer::kLogits ? step.input.logit_rows[row] : row;
}

template <class Vector>
void stage_row(const Step& step, const Linear& op, int row, Bf16* out) {
  const Bf16* source = step.rows[static_cast<int>(op.source)].row(source_row(step, op, row));
  const int inputs = step.program.shape.columns(op.source);
  const int padded = op.weight.steps() * kStepInputs;
  if (op.norm.empty()) {
    std::memcpy(out, source, padded * sizeof(Bf16));
  } else {
    norm_row<Vector>(source, op.norm.data(), inputs, padded, step.program.shape.norm_eps, out);
  }
}

template <class Isa>
void run_linear(Step& step, const Linear& op, int thread, typename Isa::Thread& state) {
  const int threads = step.pool.size();
  const bool logits = op.target == Buffer::kLogits;
  const int rows = logits ? step.input.logit_row_count : step.input.tokens;
  Rows source = step.rows[static_cast<int>(op.source)];
  if (!op.norm.empty() || logits) {
    const bool mine = rows <= kPrivateRows;
    source = mine ? Rows{step.private_rows(thread), step.normed.stride} : step.normed;
    const int first = mine ? 0 : rows * thread / threads;
    const int last = mine ? rows : rows * (thread + 1) / threads;
    for (int row = first; row < last; ++row) {
      stage_row<typename Isa::Vector>(step, op, row, source.row(row));
    }
    if (!mine) step.pool.barrier();
  }
  const int first_panel = op.weight.panels() * thread / threads;
  const int last_panel = op.weight.panels() * (thread + 1) / threads;
  alignas(64) std::array<float, Isa::kRows * kPanelColumns> sums;
  for (int resident = 0; resident < rows; resident += kResidentRows) {
    const int end = std::min(rows, resident + kResidentRows);
    for (int panel = first_panel; panel < last_panel; ++panel) {
      for (int row = resident; row < end; row += Isa::kRows) {
        const int count = std::min(Isa::kRows, end - row);
        Isa::multiply_panel(state, source.row(row), source.stride, count, op.weight.panel(panel),
                            op.weight.steps(), sums.data());
        for (int i = 0; i < count; ++i) {
          finish_row<typename Isa::Vector>(step, op, row + i, panel,
                                           sums.data() + i * kPanelColumns);
        }
      }
    }
  }
  step.pool.barrier();
}

}  // namespace fabric
