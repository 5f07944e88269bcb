// Row by row: the embedding lookup, RMSNorm, and what follows a matrix product.
#pragma once

#include <cmath>
#include <cstring>

#include "step.h"

namespace fabric {

// 1 / sqrt(mean(x^2) + eps) over `count` elements of which `padded` (zeros behind) are read.
template <class Vector>
float inverse_rms(const Bf16* x, int count, int padded, float eps) {
  typename Vector::F squares = Vector::zero();
  for (int i = 0; i < padded; i += Vector::kLanes) {
    const typename Vector::F value = Vector::load_bf16(x + i);
    squares = Vector::fma(value, value, squares);
  }
  return 1.0f / std::sqrt(Vector::sum(squares) / static_cast<float>(count) + eps);
}

// RMSNorm (Zhang & Sennrich 2019) in float, rounded to bfloat16, then scaled and rounded again: the
// order of transformers. `padded` elements are read and written; the norm is zero behind `count`.
template <class Vector>
void norm_row(const Bf16* x, const float* norm, int count, int padded, float eps, Bf16* out) {
  const typename Vector::F scale = Vector::set(inverse_rms<Vector>(x, count, padded, eps));
  for (int i = 0; i < padded; i += Vector::kLanes) {
    Vector::store_bf16(out + i, Vector::mul(Vector::load_bf16(x + i), scale));
    Vector::store_bf16(out + i,
                       Vector::mul(Vector::load_bf16(out + i), Vector::load(norm + i)));
  }
}

inline void embed_row(const Step& step, const Embed& op, int token) {
  const Shape& shape = step.program.shape;
  Bf16* out = step.rows[static_cast<int>(Buffer::kHidden)].row(token);
  const int id = step.input.token_ids[token];
  if (op.tied_op >= 0) {
    std::get<Linear>(step.program.ops[op.tied_op]).weight.unpack_row(id, shape.hidden, out);
  } else {
    std::memcpy(out, op.table + static_cast<int64_t>(id) * shape.hidden,
                shape.hidden * sizeof(Bf16));
  }
  const int padded = round_up(shape.hidden, kStepInputs);
  std::memset(out + shape.hidden, 0, (padded - shape.hidden) * sizeof(Bf16));
}

template <class Vector>
typename Vector::F silu(typename Vector::F gate) {
  const typename Vector::F one = Vector::set(1.0f);
  return Vector::div(gate, Vector::add(one, Vector::exp(Vector::sub(Vector::zero(), gate))));
}

enum class Finish { kPlain, kResidual, kGated, kLogits };

inline Finish finish_of(const Linear& op) {
  if (op.target == Buffer::kLogits) return Finish::kLogits;
  return op.gated ? Finish::kGated : op.residual ? Finish::kResidual : Finish::kPlain;
}

// Rows of one panel, 32 sums each, to their target: bias, then gate, residual or plain.
template <class Vector, Finish kFinish>
void finish_rows(const Step& step, const Linear& op, int first_row, int rows, int panel,
                 const float* sums) {
  using F = typename Vector::F;
  constexpr int kLanes = Vector::kLanes;
  const float* bias = op.bias.data() + panel * kPanelColumns;
  for (int row = 0; row < rows; ++row, sums += kPanelColumns) {
    const auto at = [&](int column) {
      return Vector::add(Vector::load(sums + column), Vector::load(bias + column));
    };
    if constexpr (kFinish == Finish::kLogits) {
      float* out = step.input.logits + (first_row + row) * step.input.logits_stride;
      for (int i = 0; i < kPanelColumns; i += kLanes) {
        Vector::stream(out + panel * kPanelColumns + i, at(i));
      }
    } else if constexpr (kFinish == Finish::kGated) {
      Bf16* out = step.rows[static_cast<int>(op.target)].row(first_row + row);
      for (int i = 0; i < kTileColumns; i += kLanes) {
        const F gated = Vector::mul(silu<Vector>(at(i)), at(i + kTileColumns));
        Vector::store_bf16(out + panel * kTileColumns + i, gated);
      }
    } else {
      Bf16* out = step.rows[static_cast<int>(op.target)].row(first_row + row);
      out += panel * kPanelColumns;
      for (int i = 0; i < kPanelColumns; i += kLanes) {
        F sum = at(i);
        if constexpr (kFinish == Finish::kResidual) {
          sum = Vector::add(sum, Vector::load_bf16(out + i));
        }
        Vector::store_bf16(out + i, sum);
      }
    }
  }
}

}  // namespace fabric
