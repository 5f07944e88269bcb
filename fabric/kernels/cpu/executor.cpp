// The C ABI that executor.py loads with ctypes. Handles are opaque; errors are static strings.
#include <asm/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string_view>
#include <system_error>

#include "kernels.h"
#include "mixture.h"
#include "program.h"
#include "step.h"
#include "thread_pool.h"

namespace fabric {
namespace {

// Linux hands out the tile registers' 8 KB of state per process and on request only.
bool request_tiles() {
  constexpr int kRequestPermission = 0x1023;
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

RunStep kernels_of(std::string_view isa) {
  if (isa == "amx" && run_step_amx != nullptr && request_tiles()) return run_step_amx;
  if (isa == "avx512_bf16") return run_step_avx512_bf16;
  if (isa == "avx2") return run_step_avx2;
  return nullptr;
}

struct Executor {
  Executor(const Shape& shape, RunStep run_step_, int threads, Group* group)
      : run_step(run_step_), pool(threads), program{shape, {}, {}, group} {}

  RunStep run_step;
  ThreadPool pool;
  Program program;
  std::unique_ptr<Step> step;  // made by the first run, when the ops are complete
  std::mutex one_at_a_time;
  bool poison = false;
};

std::vector<float> widened(const Bf16* values, int count, int padded) {
  std::vector<float> out(values == nullptr ? 0 : padded, 0.0f);
  for (int i = 0; i < static_cast<int>(out.size()) && i < count; ++i) out[i] = to_float(values[i]);
  return out;
}

// What `work` returns. An exception must not reach the caller, who is not C++: its text does.
template <class Work>
const char* guarded(Work work) noexcept {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return "out of memory";
  } catch (const std::system_error&) {
    return "the system refused a thread or a lock";
  } catch (...) {
    return "an unexpected C++ exception";
  }
}

}  // namespace

// Mirrored by LinearRecord in executor.py.
struct LinearRecord {
  const Bf16* weight;  // [outputs][inputs] or null
  const Bf16* bias;    // [outputs] or null
  const Bf16* norm;    // [inputs] or null
  int32_t source;
  int32_t target;
  int32_t outputs;
  int32_t inputs;
  int32_t residual;
  int32_t gated;
  const Chunk* chunks;
  const Piece* pieces;
  int32_t chunk_count;  // 0: all inputs are one
  int32_t piece_count;  // 0: the sum is whole here
};

// Mirrored by MixtureRecord in records.py.
struct MixtureRecord {
  const Bf16* norm;            // [hidden]
  const Bf16* router;          // [experts][hidden]
  const Bf16* const* gate_up;  // by expert of this rank: [2 * columns][hidden]
  const Bf16* const* down;     // [hidden][columns]
  const int32_t* run_starts;   // [parts + 1]
  int64_t* loads;
  int32_t parts;
  int32_t experts;
  int32_t columns;
  int32_t top_k;
  int32_t renormalise;
};

extern "C" {

// Functions that return a string return what went wrong, or null.

// `executor` stays null when this process cannot use `isa`. `group` may be null; else it outlives
// the executor.
const char* fabric_cpu_create(const Shape* shape, const char* isa, int threads, Group* group,
                              Executor** executor) {
  return guarded([&]() -> const char* {
    const RunStep run_step = kernels_of(isa);
    if (run_step != nullptr) *executor = new Executor(*shape, run_step, threads, group);
    return nullptr;
  });
}

void fabric_cpu_destroy(Executor* executor) { delete executor; }

// `table` is copied, unless the Linear at `tied_op` of the program has the same weight (else -1).
const char* fabric_cpu_add_embed(Executor* executor, const Bf16* table, int tied_op) {
  return guarded([&]() -> const char* {
    Embed op;
    op.tied_op = tied_op;
    if (tied_op < 0) {
      const Shape& shape = executor->program.shape;
      const int rank = executor->program.rank();
      const size_t rows = shape.vocab_starts[rank + 1] - shape.vocab_starts[rank];
      const size_t bytes = rows * shape.hidden * sizeof(Bf16);
      std::byte* copy = executor->program.weights.allocate(bytes);
      std::memcpy(copy, table, bytes);
      op.table = reinterpret_cast<const Bf16*>(copy);
    }
    executor->program.ops.emplace_back(std::move(op));
    return nullptr;
  });
}

// `quantized` null: the weight is bfloat16, else it is read from there.
const char* fabric_cpu_add_linear(Executor* executor, const LinearRecord* record,
                                  const QuantizedSource* quantized) {
  return guarded([&]() -> const char* {
    const bool gated = record->gated != 0;
    Linear op{.source = static_cast<Buffer>(record->source),
              .target = static_cast<Buffer>(record->target),
              .weight = {},
              .integers = {},
              .bias = {},
              .norm = {},
              .residual = record->residual != 0,
              .gated = gated,
              .chunks = {},
              .pieces = {}};
    op.chunks.assign(record->chunks, record->chunks + record->chunk_count);
    if (op.chunks.empty()) {
      op.chunks.push_back({0, round_up(record->inputs, kStepInputs) / kStepInputs, 0});
    }
    Arena& arena = executor->program.weights;
    if (quantized == nullptr) {
      op.weight = PackedMatrix(record->weight, record->outputs, record->inputs, gated, arena,
                               executor->pool);
    } else {
      op.integers = QuantizedMatrix(*quantized, op.chunks, record->outputs, record->inputs, gated,
                                    arena, executor->pool);
    }
    op.norm = widened(record->norm, record->inputs, round_up(record->inputs, kStepInputs));
    const int columns = panel_count(record->outputs, gated) * kPanelColumns;
    op.bias.assign(columns, 0.0f);
    for (int column = 0; record->bias != nullptr && column < columns; ++column) {
      const int row = output_of(column / kPanelColumns, column % kPanelColumns, record->outputs,
                                gated);
      if (row >= 0) op.bias[column] = to_float(record->bias[row]);
    }
    op.pieces.assign(record->pieces, record->pieces + record->piece_count);
    for (const Piece& piece : op.pieces) {
      op.most_pieces = std::max(op.most_pieces, piece.index + 1);
      if (piece.rank == executor->program.rank()) op.own_pieces = piece.index + 1;
    }
    if (!op.pieces.empty()) {
      const int64_t columns = static_cast<int64_t>(op.panels()) * kPanelColumns;
      op.block_rows = static_cast<int>(executor->program.group->capacity() /
                                       (op.most_pieces * columns * sizeof(float)));
      if (op.block_rows == 0) return "the group's outboxes don't hold one row";
    }
    executor->program.ops.emplace_back(std::move(op));
    return nullptr;
  });
}

const char* fabric_cpu_add_mixture(Executor* executor, const MixtureRecord* record) {
  return guarded([&]() -> const char* {
    Program& program = executor->program;
    const int hidden = program.shape.hidden;
    Mixture op{.norm = widened(record->norm, hidden, round_up(hidden, kStepInputs)),
               .router = PackedMatrix(record->router, record->experts, hidden, false,
                                      program.weights, executor->pool),
               .gate_up = {},
               .down = {},
               .run_starts = {record->run_starts, record->run_starts + record->parts + 1},
               .experts = record->experts,
               .top_k = record->top_k,
               .renormalise = record->renormalise != 0,
               .loads = record->loads};
    op.part = record->parts == 1 ? 0 : program.rank() / (program.ranks() / record->parts);
    const int local = op.run_starts[op.part + 1] - op.run_starts[op.part];
    for (int expert = 0; expert < local; ++expert) {
      op.gate_up.emplace_back(record->gate_up[expert], 2 * record->columns, hidden, true,
                              program.weights, executor->pool);
      op.down.emplace_back(record->down[expert], hidden, record->columns, false, program.weights,
                           executor->pool);
    }
    if (program.group != nullptr) {
      const int64_t row_bytes = round_up(hidden, kPanelColumns) * sizeof(float);
      const int64_t room = program.group->capacity() - mixture_header_bytes(op);
      op.block_tokens = static_cast<int>(std::min<int64_t>(room / (op.top_k * row_bytes), 1 << 20));
      if (op.block_tokens < 1) return "the group's outboxes don't hold one token";
    }
    program.ops.emplace_back(std::move(op));
    return nullptr;
  });
}

// HIDDEN comes from the stage before (else: goes to the one behind).
const char* fabric_cpu_add_hand_over(Executor* executor, int enters) {
  return guarded([&]() -> const char* {
    executor->program.ops.emplace_back(enters != 0 ? Op(Enter{}) : Op(Leave{}));
    return nullptr;
  });
}

const char* fabric_cpu_add_attend(Executor* executor, int layer, int window, const Bf16* q_norm,
                                  const Bf16* k_norm) {
  return guarded([&]() -> const char* {
    const int head_dim = executor->program.shape.head_dim;
    executor->program.ops.emplace_back(Attend{.layer = layer,
                                              .window = window,
                                              .q_norm = widened(q_norm, head_dim, head_dim),
                                              .k_norm = widened(k_norm, head_dim, head_dim)});
    return nullptr;
  });
}

// Bytes of packed matrices and the embedding; norms and biases are too small to count.
int64_t fabric_cpu_weight_bytes(const Executor* executor) {
  return static_cast<int64_t>(executor->program.weights.total());
}

// For tests: from now on every step begins with its activations full of NaN.
void fabric_cpu_poison(Executor* executor) { executor->poison = true; }

// Runs one step. What goes wrong is the input, or memory.
const char* fabric_cpu_run(Executor* executor, const StepInput* input) {
  return guarded([&]() -> const char* {
    const std::lock_guard<std::mutex> guard(executor->one_at_a_time);
    if (executor->step == nullptr) {
      executor->step = std::make_unique<Step>(executor->program, executor->pool);
    }
    if (const char* problem = executor->step->prepare(*input)) return problem;
    if (executor->poison) executor->step->poison();
    executor->pool.run(
        [](void* argument, int thread) {
          auto* mine = static_cast<Executor*>(argument);
          mine->run_step(*mine->step, thread);
        },
        executor);
    return executor->step->problem;
  });
}

// Did the last step end because the group is lost?
int fabric_cpu_lost_group(const Executor* executor) {
  return executor->step != nullptr && executor->step->problem != nullptr ? 1 : 0;
}

}  // extern "C"
}  // namespace fabric
