// One step: its input, the activations, and how its tokens are cut into work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "memory.h"
#include "program.h"
#include "query_tiles.h"
#include "step_input.h"
#include "thread_pool.h"

namespace fabric {

// Rows of activations. The stride is an odd number of cache lines: rows a power of two apart would
// all fall into the same few cache sets, and a tile load reads 16 of them.
template <class Element>
struct RowsOf {
  Element* data = nullptr;
  int64_t stride = 0;
  Element* row(int64_t index) const { return data + index * stride; }
};
using Rows = RowsOf<Bf16>;

// In elements, for rows that are read in whole steps.
template <class Element>
int64_t row_stride(int columns) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  return (round_up(columns, kStepInputs) / kLine | 1) * kLine;
}

// Consecutive tokens of one sequence in one page: the unit of writing K and V.
struct Span {
  int32_t sequence;
  int32_t first_token;
  int32_t count;
  int32_t position;
};

// What the mixtures of a step work in. A choice is a token of this rank and one of its experts.
struct MixtureSpace {
  // An output that goes back to the ep rank `source`: its `row` there, and its place among ours.
  struct Answer {
    int32_t source;
    int32_t row;
    int32_t place;
  };

  std::vector<int32_t> experts;       // by choice
  std::vector<float> weights;         // by choice
  std::vector<int32_t> places;        // by choice: where it comes when sorted by expert
  std::vector<int32_t> starts;        // by expert: where its choices begin, and the end
  std::vector<int32_t> next;          // while sorting
  std::vector<int32_t> local_starts;  // by expert of this rank: where its rows begin, and the end
  std::vector<int32_t> bases;         // by ep rank: where its answers begin, and the end
  std::vector<Answer> answers;        // by row
  RowsOf<float> logits;               // of the router, by token
  Rows rows;                          // what this rank's experts multiply, together by expert
  Rows gated;
  RowsOf<float> outputs;
};

// Up to this many rows every thread norms all of them for itself: cheaper than a barrier.
constexpr int kPrivateRows = 16;

class Step {
 public:
  Step(const Program& program, ThreadPool& pool);

  // Cuts the batch into work. Returns what is wrong with the input, or nullptr.
  const char* prepare(const StepInput& input);

  // Fills the activations with NaN first, so that a test sees any lane that is read before written.
  void poison();

  const Program& program;
  ThreadPool& pool;
  StepInput input{};
  Rows rows[kBuffers];  // but HIDDEN and the logits
  // HIDDEN, the residual stream, is float: rounded after each of 60 additions, it made two thirds
  // of the logits' error.
  RowsOf<float> hidden;
  Rows normed;

  // `kPrivateRows` rows of `normed.stride` that belong to one thread.
  Bf16* private_rows(int thread) const { return private_ + thread * kPrivateRows * normed.stride; }

  // Every thread comes here: once all have, the group shares `bytes` of its outboxes. False: the
  // group is lost, `problem` says why, and every thread must leave the step.
  bool share(int thread, int64_t bytes) {
    pool.barrier();
    if (thread == 0) problem = program.group->share(bytes);
    pool.barrier();
    return problem == nullptr;
  }
  const char* problem = nullptr;

  // Rows of this size that go through the group at once.
  int rows_at_once(int64_t row_bytes) const {
    return static_cast<int>(std::min<int64_t>(program.group->capacity() / row_bytes, 1 << 20));
  }

  // How many rows there are in the block of a spread Linear that `row` is in.
  int rows_of_block(const Linear& op, int row) const {
    return std::min(op.block_rows, input.tokens - row / op.block_rows * op.block_rows);
  }

  // Where this rank's logits of a row go: to the caller, or to rank 0 by way of the outbox.
  float* logits_row(int row) const {
    if (program.rank() == 0) return input.logits + row * input.logits_stride;
    const int columns = program.logit_columns(program.rank());
    const int within = row % rows_at_once(most_logit_columns * sizeof(float));
    return reinterpret_cast<float*>(program.group->outbox()) +
           static_cast<int64_t>(within) * columns;
  }
  int64_t most_logit_columns = 0;  // of any rank

  MixtureSpace mixture;

  std::vector<Span> spans;
  std::vector<TileMember> members;
  std::vector<QueryTile> tiles;
  std::unique_ptr<std::atomic<int32_t>[]> next_unit;  // by op: attention units are taken in turn

  const int32_t* block_table(int sequence) const { return input.block_table(sequence); }

  // Layer `layer`'s page of K (or V) of kv head `head` in block `block`.
  Bf16* page(int block, int layer, bool value, int head) const {
    const Shape& shape = program.shape;
    const int64_t page_elements = static_cast<int64_t>(shape.head_dim) * input.page;
    const int64_t index = (layer * 2 + (value ? 1 : 0)) * shape.kv_heads + head;
    return reinterpret_cast<Bf16*>(input.blocks + block * input.block_bytes) +
           index * page_elements;
  }

 private:
  const char* check(const StepInput& input) const;
  int first_read_position(int first_position) const;
  void reserve(int tokens);
  void reserve_mixture(int64_t tokens);

  int64_t capacity_ = 0;
  int reach_ = 1;  // the widest window of any layer; 0: some layer sees every position
  int widest_integers_ = 0;  // inputs of a weight of integers
  Bf16* private_ = nullptr;
  Memory workspace_;
  Memory mixture_;
};

}  // namespace fabric
