#include "step.h"

#include <algorithm>
#include <cstring>

#include "integer_rows.h"

namespace fabric {
namespace {

constexpr Buffer kRounded[] = {Buffer::kQkv, Buffer::kAttended, Buffer::kGated};

}  // namespace

Step::Step(const Program& program_, ThreadPool& pool_)
    : program(program_),
      pool(pool_),
      next_unit(std::make_unique<std::atomic<int32_t>[]>(program_.ops.size())) {
  for (int rank = 0; program.group != nullptr && rank < program.ranks(); ++rank) {
    most_logit_columns = std::max<int64_t>(most_logit_columns, program.logit_columns(rank));
  }
  for (const Op& op : program.ops) {
    if (const Linear* linear = std::get_if<Linear>(&op)) {
      widest_integers_ = std::max(widest_integers_, linear->integers.inputs());
    }
    const Attend* attend = std::get_if<Attend>(&op);
    if (attend == nullptr || reach_ == 0) continue;
    reach_ = attend->window == 0 ? 0 : std::max(reach_, attend->window);
  }
}

const char* Step::prepare(const StepInput& new_input) {
  if (const char* problem = check(new_input)) return problem;
  input = new_input;
  problem = nullptr;
  reserve(input.tokens);
  for (size_t op = 0; op < program.ops.size(); ++op) next_unit[op].store(0);
  spans.clear();
  for (int sequence = 0; sequence < input.sequences; ++sequence) {
    const int first_token = input.query_starts[sequence];
    const int count = input.query_starts[sequence + 1] - first_token;
    const int first_position = input.first_positions[sequence];
    for (int token = 0; token < count;) {
      const int position = first_position + token;
      const int in_page = std::min(count - token, input.page - position % input.page);
      spans.push_back({sequence, first_token + token, in_page, position});
      token += in_page;
    }
  }
  cut_into_tiles(input, program.shape.group(), members, tiles);
  return nullptr;
}

const char* Step::check(const StepInput& in) const {
  const Shape& shape = program.shape;
  if (in.tokens < 1 || in.sequences < 1) return "an empty batch";
  if (in.query_starts[0] != 0 || in.query_starts[in.sequences] != in.tokens) {
    return "query_starts_S1 must run from 0 to the number of tokens";
  }
  for (int token = 0; token < in.tokens; ++token) {
    if (in.token_ids[token] < 0 || in.token_ids[token] >= shape.vocab) {
      return "a token id is outside the vocabulary";
    }
  }
  for (int row = 0; row < in.logit_row_count; ++row) {
    if (in.logit_rows[row] < 0 || in.logit_rows[row] >= in.tokens) {
      return "a logit row is outside the batch";
    }
  }
  for (int sequence = 0; sequence < in.sequences; ++sequence) {
    const int count = in.query_starts[sequence + 1] - in.query_starts[sequence];
    const int first = in.first_positions[sequence];
    if (count < 1) return "a sequence without tokens";
    if (first < 0 || first + count > shape.positions) return "a position is outside the rope table";
    const int row = in.table_rows[sequence];
    if (row < 0 || row >= in.table_height) return "a table row is outside the block tables";
    const int pages = (first + count - 1) / in.page + 1;
    if (pages > in.table_width) return "a sequence is longer than its block table";
    // Earlier pages may have slid out of every window and been given back; these are read.
    const int32_t* table = in.block_tables + static_cast<int64_t>(row) * in.table_width;
    for (int page = first_read_position(first) / in.page; page < pages; ++page) {
      if (table[page] < 0 || table[page] >= in.block_count) return "a block is outside the pool";
    }
  }
  return nullptr;
}

int Step::first_read_position(int first_position) const {
  return reach_ == 0 ? 0 : std::max(0, first_position - reach_ + 1);
}

void Step::reserve(int tokens) {
  if (tokens <= capacity_) return;
  const Shape& shape = program.shape;
  const int64_t capacity = std::max<int64_t>(round_up(tokens, 64), capacity_ * 2);
  hidden.stride = row_stride<float>(shape.hidden);
  int64_t widest = row_stride<Bf16>(shape.hidden);
  int64_t total = 0;
  for (Buffer buffer : kRounded) {
    const int64_t stride = row_stride<Bf16>(shape.columns(buffer));
    rows[static_cast<int>(buffer)].stride = stride;
    widest = std::max(widest, stride);
    total += stride * capacity;
  }
  // A staged row of integers carries its scales behind it.
  widest = row_stride<Bf16>(std::max<int64_t>(widest, integer_row_elements(widest_integers_)));
  normed.stride = widest;
  total += widest * (capacity + pool.size() * kPrivateRows);
  const int64_t floats = hidden.stride * capacity;
  workspace_ = Memory(floats * sizeof(float) + total * sizeof(Bf16));
  reserve_mixture(capacity);
  capacity_ = capacity;  // not before: the allocations may throw
  hidden.data = workspace_.as<float>();
  Bf16* next = reinterpret_cast<Bf16*>(hidden.data + floats);
  for (Buffer each : kRounded) {
    const int buffer = static_cast<int>(each);
    rows[buffer].data = next;
    next += rows[buffer].stride * capacity_;
  }
  normed.data = next;
  private_ = next + widest * capacity_;
}

void Step::reserve_mixture(int64_t tokens) {
  int64_t experts = 0, top_k = 0, columns = 0;
  for (const Op& op : program.ops) {
    const Mixture* mixture = std::get_if<Mixture>(&op);
    if (mixture == nullptr) continue;
    experts = std::max<int64_t>(experts, mixture->experts);
    top_k = std::max<int64_t>(top_k, mixture->top_k);
    for (const PackedMatrix& down : mixture->down) {
      columns = std::max<int64_t>(columns, down.steps() * kStepInputs);
    }
  }
  if (experts == 0) return;
  const int64_t choices = tokens * top_k;
  mixture.experts.resize(choices);
  mixture.weights.resize(choices);
  mixture.places.resize(choices);
  mixture.answers.reserve(choices);
  mixture.starts.resize(experts + 1);
  mixture.logits.stride = row_stride<float>(experts);
  mixture.outputs.stride = row_stride<float>(program.shape.hidden);
  mixture.rows.stride = row_stride<Bf16>(program.shape.hidden);
  mixture.gated.stride = row_stride<Bf16>(columns);
  const int64_t floats = mixture.logits.stride * tokens + mixture.outputs.stride * choices;
  const int64_t halves = (mixture.rows.stride + mixture.gated.stride) * choices;
  mixture_ = Memory(floats * sizeof(float) + halves * sizeof(Bf16));
  mixture.logits.data = mixture_.as<float>();
  mixture.outputs.data = mixture.logits.data + mixture.logits.stride * tokens;
  mixture.rows.data = reinterpret_cast<Bf16*>(mixture_.as<float>() + floats);
  mixture.gated.data = mixture.rows.data + mixture.rows.stride * choices;
}

void Step::poison() {
  std::memset(workspace_.as<void>(), 0xff, workspace_.bytes());
  std::memset(mixture_.as<void>(), 0xff, mixture_.bytes());
}

}  // namespace fabric
