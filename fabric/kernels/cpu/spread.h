// What a group's workers do together with an op whose rows, sums or logits are spread over them.
//
// More rows than an outbox holds go through in blocks; every worker cuts them alike.
#pragma once

#include <algorithm>
#include <cstring>

#include "rows.h"
#include "step.h"

namespace fabric {

// Rows [first, last) of HIDDEN get the bias and the sum of all ranks' pieces, added as the tree of
// chunks says: what finish_rows does for a sum that is whole.
template <class Vector>
void add_pieces(const Step& step, const Linear& op, Range block, int thread) {
  using F = typename Vector::F;
  const Group& group = *step.program.group;
  const int panels = op.panels();
  const int64_t columns = static_cast<int64_t>(panels) * kPanelColumns;
  const int64_t units = static_cast<int64_t>(block.last - block.first) * panels;
  const int threads = step.pool.size();
  for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; ++unit) {
    const int within = static_cast<int>(unit / panels);
    const int64_t column = unit % panels * kPanelColumns;
    float* out = step.hidden.row(block.first + within) + column;
    for (int i = 0; i < kPanelColumns; i += Vector::kLanes) {
      F stack[kStackHeight];
      int height = 0;
      for (const Piece& piece : op.pieces) {
        const auto* box = reinterpret_cast<const float*>(group.inbox(piece.rank));
        const int64_t row = piece.index * (block.last - block.first) + within;
        stack[height++] = Vector::load(box + row * columns + column + i);
        for (int merge = 0; merge < piece.merges; ++merge) {
          --height;
          stack[height - 1] = Vector::add(stack[height - 1], stack[height]);
        }
      }
      const F sum = Vector::add(stack[0], Vector::load(op.bias.data() + column + i));
      Vector::store(out + i, Vector::add(sum, Vector::load(out + i)));
    }
  }
}

// A Linear whose inputs are spread: `multiply` leaves this rank's pieces of a block in the outbox.
template <class Vector, class Multiply>
void through_the_group(Step& step, const Linear& op, int rows, int thread, Multiply multiply) {
  for (int first = 0; first < rows; first += op.block_rows) {
    const Range block{first, std::min(rows, first + op.block_rows)};
    multiply(block);
    const int64_t columns = static_cast<int64_t>(op.panels()) * kPanelColumns;
    const int64_t piece = (block.last - block.first) * columns * sizeof(float);
    if (!step.share(thread, op.most_pieces * piece)) return;
    add_pieces<Vector>(step, op, block, thread);
    step.pool.barrier();
  }
}

// The head: `multiply` computes this rank's columns of a block; rank 0 puts all side by side.
template <class Multiply>
void gather_logits(Step& step, int rows, int thread, Multiply multiply) {
  const Program& program = step.program;
  const int at_once = step.rows_at_once(step.most_logit_columns * sizeof(float));
  const int threads = step.pool.size();
  for (int first = 0; first < rows; first += at_once) {
    const Range block{first, std::min(rows, first + at_once)};
    multiply(block);
    const int64_t count = block.last - block.first;
    if (!step.share(thread, count * step.most_logit_columns * sizeof(float))) return;
    const int parts = static_cast<int>(count) * (program.ranks() - 1);
    for (int part = thread; program.rank() == 0 && part < parts; part += threads) {
      const int rank = 1 + part % (program.ranks() - 1);
      const int within = part / (program.ranks() - 1);
      const int32_t* starts = program.shape.vocab_starts;
      const auto* box = reinterpret_cast<const float*>(program.group->inbox(rank));
      std::memcpy(step.logits_row(block.first + within) + starts[rank],
                  box + static_cast<int64_t>(within) * program.logit_columns(rank),
                  (starts[rank + 1] - starts[rank]) * sizeof(float));
    }
    step.pool.barrier();
  }
}

// A Linear's rows from product to target, through the group where one has a part of them.
// `run.operator()<kFinish>(block)` multiplies a block of rows and finishes each as `kFinish` says.
template <class Vector, class Run>
void finish_linear(Step& step, const Linear& op, int rows, int thread, Run run) {
  const Range all{0, rows};
  switch (finish_of(op)) {
    case Finish::kPlain: run.template operator()<Finish::kPlain>(all); break;
    case Finish::kResidual: run.template operator()<Finish::kResidual>(all); break;
    case Finish::kGated: run.template operator()<Finish::kGated>(all); break;
    case Finish::kPieces:
      return through_the_group<Vector>(step, op, rows, thread, [&](Range block) {
        run.template operator()<Finish::kPieces>(block);
      });
    case Finish::kLogits:
      if (step.program.group != nullptr) {
        return gather_logits(step, rows, thread, [&](Range block) {
          run.template operator()<Finish::kLogits>(block);
        });
      }
      run.template operator()<Finish::kLogits>(all);
      break;
  }
  step.pool.barrier();
}

// The embedding: `embed(token id of this rank's part, out)` for the tokens that are here.
template <class Look>
void spread_embed(Step& step, int thread, Look embed) {
  const Program& program = step.program;
  const int32_t* starts = program.shape.vocab_starts;
  const int tokens = step.input.tokens;
  const int threads = step.pool.size();
  const int64_t columns = round_up(program.shape.hidden, kStepInputs);
  const int at_once = step.rows_at_once(columns * sizeof(float));
  for (int first = 0; first < tokens; first += at_once) {
    const int last = std::min(tokens, first + at_once);
    for (int token = first + thread; token < last; token += threads) {
      const int id = step.input.token_ids[token];
      if (id < starts[program.rank()] || id >= starts[program.rank() + 1]) continue;
      auto* outbox = reinterpret_cast<float*>(program.group->outbox());
      embed(id - starts[program.rank()], outbox + (token - first) * columns);
    }
    if (!step.share(thread, (last - first) * columns * sizeof(float))) return;
    for (int token = first + thread; token < last; token += threads) {
      const int id = step.input.token_ids[token];
      const int32_t* above = std::upper_bound(starts, starts + program.ranks(), id);
      const auto* box = reinterpret_cast<const float*>(
          program.group->inbox(static_cast<int>(above - starts) - 1));
      std::memcpy(step.hidden.row(token), box + (token - first) * columns,
                  columns * sizeof(float));
    }
    step.pool.barrier();
  }
}

}  // namespace fabric
