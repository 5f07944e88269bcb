// The program of fabric/kernels/program.py as C++ keeps it: weights packed, vectors padded.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "bf16.h"
#include "packed_matrix.h"

namespace fabric {

// Numbered as in fabric.kernels.program.Buffer.
enum class Buffer : int32_t { kHidden = 0, kQkv, kAttended, kGated, kLogits };
constexpr int kBuffers = 5;

// Mirrored by ShapeRecord in executor.py.
struct Shape {
  int32_t layers;
  int32_t hidden;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t intermediate;
  int32_t vocab;
  int32_t positions;  // rows of the rope tables
  float norm_eps;
  float attention_scale;
  const float* rope_cos;  // [positions][head_dim / 2], owned by the caller, outlives the program
  const float* rope_sin;

  int group() const { return heads / kv_heads; }
  int columns(Buffer buffer) const {
    switch (buffer) {
      case Buffer::kHidden: return hidden;
      case Buffer::kQkv: return (heads + 2 * kv_heads) * head_dim;
      case Buffer::kAttended: return heads * head_dim;
      case Buffer::kGated: return intermediate;
      default: return vocab;
    }
  }
};

struct Embed {
  const Bf16* table = nullptr;  // [vocab][hidden], null when tied
  int tied_op = -1;             // the Linear of the same weight, whose rows are unpacked
};

struct Linear {
  Buffer source;
  Buffer target;
  PackedMatrix weight;
  std::vector<float> bias;  // in packed column order; zeros when there is none
  std::vector<float> norm;  // padded with zeros; empty: none
  bool residual = false;
  bool gated = false;
};

struct Attend {
  int layer;
  int window;                 // 0: every earlier position is seen
  std::vector<float> q_norm;  // [head_dim]; empty: none
  std::vector<float> k_norm;
};

using Op = std::variant<Embed, Linear, Attend>;

struct Program {
  Shape shape;
  std::vector<Op> ops;
  Arena weights;
};

}  // namespace fabric
