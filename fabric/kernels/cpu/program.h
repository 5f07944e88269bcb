// The program of fabric/kernels/program.py as C++ keeps it: weights packed, vectors padded.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "bf16.h"
#include "chunk.h"
#include "group.h"
#include "packed_matrix.h"
#include "quantized_matrix.h"

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
  int32_t vocab;      // of the model
  int32_t positions;  // rows of the rope tables
  float norm_eps;
  float attention_scale;
  const float* rope_cos;  // [positions][head_dim / 2], owned by the caller, outlives the program
  const float* rope_sin;
  const int32_t* vocab_starts;  // [group's size + 1]: the rows of the vocabulary by rank

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

struct Enter {};
struct Leave {};

// The most sums that are kept apart while chunks are added as a tree; executor.py checks.
constexpr int kStackHeight = 16;

// What is left on a rank's stack, in the order in which all ranks' pieces are added: likewise.
struct Piece {
  int32_t rank;
  int32_t index;  // on that rank's stack
  int32_t merges;
};

struct Range {
  int first;
  int last;
};

struct Linear {
  Buffer source;
  Buffer target;
  PackedMatrix weight;       // empty if the weight is of integers
  QuantizedMatrix integers;  // empty if it is not
  std::vector<float> bias;  // in packed column order; zeros when there is none
  std::vector<float> norm;  // padded with zeros; empty: none
  bool residual = false;
  bool gated = false;
  std::vector<Chunk> chunks;  // at least one: all steps
  std::vector<Piece> pieces;  // of all ranks; empty: the sum is whole here
  int own_pieces = 0;
  int most_pieces = 0;  // of any rank
  int block_rows = 0;   // as many rows go through the group at once

  int panels() const { return integers.empty() ? weight.panels() : integers.panels(); }
  // A thread's share of them.
  Range panels_of(int thread, int threads) const {
    return {panels() * thread / threads, panels() * (thread + 1) / threads};
  }
};

struct Attend {
  int layer;
  int window;                 // 0: every earlier position is seen
  std::vector<float> q_norm;  // [head_dim]; empty: none
  std::vector<float> k_norm;
};

struct Mixture {
  std::vector<float> norm;
  PackedMatrix router;
  std::vector<PackedMatrix> gate_up;  // this rank's experts
  std::vector<PackedMatrix> down;
  std::vector<int32_t> run_starts;  // the experts of each ep rank, and the end
  int experts;                      // in all
  int top_k;
  bool renormalise;
  int part = 0;              // this rank's ep rank
  int64_t* loads = nullptr;  // [experts], the caller's: rows that each expert got; null: not here
  int block_tokens = 1 << 20;  // as many go through the group at once

  int parts() const { return static_cast<int>(run_starts.size()) - 1; }
};

using Op = std::variant<Embed, Enter, Linear, Attend, Mixture, Leave>;

struct Program {
  Shape shape;
  std::vector<Op> ops;
  Arena weights;
  Group* group = nullptr;  // null: this worker is alone

  int rank() const { return group == nullptr ? 0 : group->rank(); }
  int ranks() const { return group == nullptr ? 1 : group->size(); }
  // The columns of logits, padded to whole panels, that a rank computes.
  int logit_columns(int rank) const {
    return round_up(shape.vocab_starts[rank + 1] - shape.vocab_starts[rank], kPanelColumns);
  }
};

}  // namespace fabric
