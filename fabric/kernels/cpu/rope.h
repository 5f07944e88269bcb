// One head of q or k: optional RMSNorm over the head, then rotary embedding (Su et al. 2021).
#pragma once

#include <cmath>

#include "step.h"

namespace fabric {

constexpr int kMaxHeadDim = 256;

// Half-split pairing: element i turns with i + head_dim / 2. Rounded once, at the end.
template <class Vector>
void rotate_head(const Shape& shape, const Bf16* in, const std::vector<float>& norm, int position,
                 Bf16* out) {
  using F = typename Vector::F;
  const int half = shape.head_dim / 2;
  alignas(64) float normed[kMaxHeadDim];
  const float* cos = shape.rope_cos + static_cast<int64_t>(position) * half;
  const float* sin = shape.rope_sin + static_cast<int64_t>(position) * half;
  if (!norm.empty()) {
    F squares = Vector::zero();
    for (int i = 0; i < shape.head_dim; i += Vector::kLanes) {
      const F value = Vector::load_bf16_first(in + i, shape.head_dim - i);
      squares = Vector::fma(value, value, squares);
    }
    const float mean = Vector::sum(squares) / static_cast<float>(shape.head_dim);
    const F scale = Vector::set(1.0f / std::sqrt(mean + shape.norm_eps));
    for (int i = 0; i < shape.head_dim; i += Vector::kLanes) {
      const int left = shape.head_dim - i;
      const F value = Vector::mul(Vector::load_bf16_first(in + i, left), scale);
      Vector::store(normed + i, Vector::mul(value, Vector::load_first(norm.data() + i, left)));
    }
  }
  const auto at = [&](int i, int left) {
    return norm.empty() ? Vector::load_bf16_first(in + i, left)
                        : Vector::load_first(normed + i, left);
  };
  for (int i = 0; i < half; i += Vector::kLanes) {
    const int left = half - i;
    const F low = at(i, left);
    const F high = at(half + i, left);
    const F c = Vector::load_first(cos + i, left);
    const F s = Vector::load_first(sin + i, left);
    Vector::store_bf16_first(out + i, Vector::sub(Vector::mul(low, c), Vector::mul(high, s)), left);
    Vector::store_bf16_first(out + half + i, Vector::add(Vector::mul(high, c), Vector::mul(low, s)),
                             left);
  }
}

}  // namespace fabric
