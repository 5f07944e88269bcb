// Row by row: the embedding lookup, RMSNorm, and what follows a matrix product.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "step.h"

namespace fabric {

// 1 / sqrt(mean(x^2) + eps) over `count` elements of which `padded` (zeros behind) are read.
template <class Vector>
float inverse_rms(const float* x, int count, int padded, float eps) {
  typename Vector::F squares = Vector::zero();
  for (int i = 0; i < padded; i += Vector::kLanes) {
    const typename Vector::F value = Vector::load(x + i);
    squares = Vector::fma(value, value, squares);
  }
  return 1.0f / std::sqrt(Vector::sum(squares) / static_cast<float>(count) + eps);
}

// RMSNorm (Zhang & Sennrich 2019), rounded once: transformers rounds before it scales, too.
// `padded` elements are read and written; the norm is zero behind `count`.
template <class Vector>
void norm_row(const float* x, const float* norm, int count, int padded, float eps, Bf16* out) {
  const typename Vector::F scale = Vector::set(inverse_rms<Vector>(x, count, padded, eps));
  for (int i = 0; i < padded; i += Vector::kLanes) {
    const typename Vector::F normed = Vector::mul(Vector::load(x + i), scale);
    Vector::store_bf16(out + i, Vector::mul(normed, Vector::load(norm + i)));
  }
}

// Row `id` of this worker's table.
inline void embed_row(const Step& step, const Embed& op, int id, float* out) {
  const Shape& shape = step.program.shape;
  if (op.tied_op >= 0) {
    std::get<Linear>(step.program.ops[op.tied_op]).weight.unpack_row(id, shape.hidden, out);
  } else {
    const Bf16* row = op.table + static_cast<int64_t>(id) * shape.hidden;
    for (int i = 0; i < shape.hidden; ++i) out[i] = to_float(row[i]);
  }
  std::fill(out + shape.hidden, out + round_up(shape.hidden, kStepInputs), 0.0f);
}

// `count` a multiple of 32.
template <class Vector>
void add_row(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += Vector::kLanes) {
    Vector::store(to + i, Vector::add(Vector::load(to + i), Vector::load(from + i)));
  }
}

template <class Vector>
typename Vector::F silu(typename Vector::F gate) {
  const typename Vector::F one = Vector::set(1.0f);
  return Vector::div(gate, Vector::add(one, Vector::exp(Vector::sub(Vector::zero(), gate))));
}

// Which token row `row` of the op reads.
inline int token_of(const Step& step, const Linear& op, int row) {
  return op.target == Buffer::kLogits ? step.input.logit_rows[row] : row;
}

// What row `row` of the op multiplies: for logits the row that was asked for; HIDDEN is normed, or
// rounded at least.
template <class Vector>
void stage_row(const Step& step, const Linear& op, int row, Bf16* out) {
  const int from = token_of(step, op, row);
  const int padded = round_up(step.program.shape.columns(op.source), kStepInputs);
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

// Runs `multiply(chunk, sums)` for each chunk and adds the chunks' sums, `floats` each, as the
// tree of chunks says. The pieces that remain lie at the foot of the stack.
template <class Vector, class Multiply>
void add_chunks(const Linear& op, float* stack, int64_t floats, Multiply multiply) {
  float* top = stack;
  for (const Chunk& chunk : op.chunks) {
    multiply(chunk, top);
    for (int merge = 0; merge < chunk.merges; ++merge, top -= floats) {
      float* below = top - floats;
      for (int64_t i = 0; i < floats; i += Vector::kLanes) {
        Vector::store(below + i, Vector::add(Vector::load(below + i), Vector::load(top + i)));
      }
    }
    top += floats;
  }
}

enum class Finish { kPlain, kResidual, kGated, kLogits, kPieces };

inline Finish finish_of(const Linear& op) {
  if (!op.pieces.empty()) return Finish::kPieces;
  if (op.target == Buffer::kLogits) return Finish::kLogits;
  return op.gated ? Finish::kGated : op.residual ? Finish::kResidual : Finish::kPlain;
}

// Rows of one panel, 32 sums each, to their target: bias, then gate, residual or plain. A residual
// is added to HIDDEN, in float. Pieces of sums, `floats` apart, go to the outbox as they are:
// [piece][row][column].
template <class Vector, Finish kFinish>
void finish_rows(const Step& step, const Linear& op, int first_row, int rows, int panel,
                 const float* sums, int64_t floats) {
  using F = typename Vector::F;
  constexpr int kLanes = Vector::kLanes;
  if constexpr (kFinish == Finish::kPieces) {
    const int64_t columns = static_cast<int64_t>(op.panels()) * kPanelColumns;
    float* outbox = reinterpret_cast<float*>(step.program.group->outbox());
    for (int piece = 0; piece < op.own_pieces; ++piece, sums += floats) {
      for (int row = 0; row < rows; ++row) {
        const int64_t at = piece * step.rows_of_block(op, first_row) +
                           (first_row + row) % op.block_rows;
        std::memcpy(outbox + at * columns + panel * kPanelColumns, sums + row * kPanelColumns,
                    kPanelColumns * sizeof(float));
      }
    }
    return;
  }
  const float* bias = op.bias.data() + panel * kPanelColumns;
  for (int row = 0; row < rows; ++row, sums += kPanelColumns) {
    const auto at = [&](int column) {
      return Vector::add(Vector::load(sums + column), Vector::load(bias + column));
    };
    if constexpr (kFinish == Finish::kLogits) {
      float* out = step.logits_row(first_row + row);
      for (int i = 0; i < kPanelColumns; i += kLanes) {
        Vector::stream(out + panel * kPanelColumns + i, at(i));
      }
    } else if constexpr (kFinish == Finish::kGated) {
      Bf16* out = step.rows[static_cast<int>(op.target)].row(first_row + row);
      for (int i = 0; i < kTileColumns; i += kLanes) {
        const F gated = Vector::mul(silu<Vector>(at(i)), at(i + kTileColumns));
        Vector::store_bf16(out + panel * kTileColumns + i, gated);
      }
    } else if constexpr (kFinish == Finish::kResidual) {
      float* out = step.hidden.row(first_row + row) + panel * kPanelColumns;
      for (int i = 0; i < kPanelColumns; i += kLanes) {
        Vector::store(out + i, Vector::add(at(i), Vector::load(out + i)));
      }
    } else {
      Bf16* out = step.rows[static_cast<int>(op.target)].row(first_row + row);
      out += panel * kPanelColumns;
      for (int i = 0; i < kPanelColumns; i += kLanes) Vector::store_bf16(out + i, at(i));
    }
  }
}

}  // namespace fabric
