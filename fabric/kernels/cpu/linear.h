// One Linear op: norm the rows it reads, multiply panel by panel, finish each row.
//
// Batch invariance: `Isa::multiply_panel` gives every output its own chain of accumulations over k
// in ascending order, for any number of rows, so a row's result depends on that row alone.
#pragma once

#include <algorithm>

#include "rows.h"
#include "step.h"

namespace fabric {

// Rows of activations that stay in the L2 cache while all panels pass over them.
constexpr int kResidentRows = 256;

// What row `row` of the op multiplies: for logits the row that was asked for; HIDDEN is normed, or
// rounded at least.
template <class Vector>
void stage_row(const Step& step, const Linear& op, int row, Bf16* out) {
  const int from = op.target == Buffer::kLogits ? step.input.logit_rows[row] : row;
  const int padded = op.weight.steps() * kStepInputs;
  if (op.source != Buffer::kHidden) {
    std::memcpy(out, step.rows[static_cast<int>(op.source)].row(from), padded * sizeof(Bf16));
  } else if (op.norm.empty()) {
    const float* source = step.hidden.row(from);
    for (int i = 0; i < padded; i += Vector::kLanes) {
      Vector::store_bf16(out + i, Vector::load(source + i));
    }
  } else {
    const Shape& shape = step.program.shape;
    norm_row<Vector>(step.hidden.row(from), op.norm.data(), shape.hidden, padded, shape.norm_eps,
                     out);
  }
}

struct PanelRange {
  int first;
  int last;
};

// Many rows: bound by arithmetic. The activations stay in cache while all panels pass over them.
template <class Isa, Finish kFinish>
void multiply_panels(const Step& step, const Linear& op, const Rows& source, int rows,
                     PanelRange range, typename Isa::Thread& state) {
  alignas(64) float sums[Isa::kRows * kPanelColumns];
  for (int resident = 0; resident < rows; resident += kResidentRows) {
    const int end = std::min(rows, resident + kResidentRows);
    for (int panel = range.first; panel < range.last; ++panel) {
      for (int row = resident; row < end; row += Isa::kRows) {
        const int count = std::min(Isa::kRows, end - row);
        Isa::multiply_panel(state, source.row(row), source.stride, count, op.weight.panel(panel),
                            op.weight.steps(), row == resident, sums);
        finish_rows<typename Isa::Vector, kFinish>(step, op, row, count, panel, sums);
      }
    }
  }
}

// Few rows: bound by reading the weights. Two panels at a time, one from each half of the range, so
// that a thread reads two endless streams (measured: 1.1 to 1.2 times the bandwidth of one). A
// second block of rows finds the two panels in cache.
template <class Isa, Finish kFinish>
void stream_panels(const Step& step, const Linear& op, const Rows& source, int rows,
                   PanelRange range, typename Isa::Thread& state) {
  constexpr int kBlock = Isa::kStreamBlock;
  alignas(64) float sums[2 * kBlock * kPanelColumns];
  const int half = (range.last - range.first) / 2;
  for (int panel = range.first; panel < range.first + half; ++panel) {
    for (int row = 0; row < rows; row += kBlock) {
      const int count = std::min(kBlock, rows - row);
      Isa::multiply_two_panels(state, source.row(row), source.stride, count, op.weight.panel(panel),
                               op.weight.panel(panel + half), op.weight.steps(), row == 0, sums);
      for (int i : {0, 1}) {
        finish_rows<typename Isa::Vector, kFinish>(step, op, row, count, panel + i * half,
                                                   sums + i * count * kPanelColumns);
      }
    }
  }
  const PanelRange rest{range.first + 2 * half, range.last};
  multiply_panels<Isa, kFinish>(step, op, source, rows, rest, state);
}

template <class Isa>
void run_linear(Step& step, const Linear& op, int thread, typename Isa::Thread& state) {
  const int threads = step.pool.size();
  const bool logits = op.target == Buffer::kLogits;
  const int rows = logits ? step.input.logit_row_count : step.input.tokens;
  Rows source = step.rows[static_cast<int>(op.source)];
  if (op.source == Buffer::kHidden || logits) {
    const bool mine = rows <= kPrivateRows;
    source = mine ? Rows{step.private_rows(thread), step.normed.stride} : step.normed;
    const int first = mine ? 0 : rows * thread / threads;
    const int last = mine ? rows : rows * (thread + 1) / threads;
    for (int row = first; row < last; ++row) {
      stage_row<typename Isa::Vector>(step, op, row, source.row(row));
    }
    if (!mine) step.pool.barrier();
  }
  const PanelRange mine{op.weight.panels() * thread / threads,
                        op.weight.panels() * (thread + 1) / threads};
  const auto run = [&]<Finish kFinish>() {
    if (rows <= Isa::kStreamRows) {
      stream_panels<Isa, kFinish>(step, op, source, rows, mine, state);
    } else {
      multiply_panels<Isa, kFinish>(step, op, source, rows, mine, state);
    }
  };
  switch (finish_of(op)) {
    case Finish::kPlain: run.template operator()<Finish::kPlain>(); break;
    case Finish::kResidual: run.template operator()<Finish::kResidual>(); break;
    case Finish::kGated: run.template operator()<Finish::kGated>(); break;
    case Finish::kLogits: run.template operator()<Finish::kLogits>(); break;
  }
  step.pool.barrier();
}

}  // namespace fabric
