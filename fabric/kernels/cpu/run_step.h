// The whole program on one thread of the pool, for one instruction set.
#pragma once

#include <immintrin.h>

#include "attention.h"
#include "linear.h"
#include "mixture.h"
#include "rows.h"
#include "step.h"

namespace fabric {

// Denormals are flushed to zero in here: the bfloat16 dot products do so in hardware, and an output
// must not depend on whether it passed through one more of them. Also, they are slow.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

inline void run_embed(Step& step, const Embed& op, int thread) {
  if (step.program.group != nullptr) {
    return spread_embed(step, thread,
                        [&](int id, float* out) { embed_row(step, op, id, out); });
  }
  const int tokens = step.input.tokens;
  const int threads = step.pool.size();
  for (int t = tokens * thread / threads; t < tokens * (thread + 1) / threads; ++t) {
    embed_row(step, op, step.input.token_ids[t], step.hidden.row(t));
  }
  step.pool.barrier();
}

// HIDDEN from the pipeline stage before, or for the one behind.
inline void hand_over(Step& step, bool enters, int thread) {
  const int hidden = step.program.shape.hidden;
  const int padded = round_up(hidden, kStepInputs);
  for (int t = thread; t < step.input.tokens; t += step.pool.size()) {
    float* row = step.hidden.row(t);
    const int64_t at = static_cast<int64_t>(t) * hidden;
    if (enters) {
      std::memcpy(row, step.input.entering + at, hidden * sizeof(float));
      std::fill(row + hidden, row + padded, 0.0f);
    } else {
      std::memcpy(step.input.leaving + at, row, hidden * sizeof(float));
    }
  }
  step.pool.barrier();
}

template <class Isa>
void run_step(Step& step, int thread) {
  const FlushDenormals flush;
  typename Isa::Thread state(step, thread);
  const int threads = step.pool.size();
  const int tokens = step.input.tokens;
  const Rows& attended = step.rows[static_cast<int>(Buffer::kAttended)];
  const int width = step.program.shape.columns(Buffer::kAttended);
  const int padding = round_up(width, kStepInputs) - width;
  for (int token = tokens * thread / threads; token < tokens * (thread + 1) / threads; ++token) {
    std::memset(attended.row(token) + width, 0, padding * sizeof(Bf16));
  }
  for (size_t index = 0; index < step.program.ops.size(); ++index) {
    const Op& op = step.program.ops[index];
    if (const auto* linear = std::get_if<Linear>(&op)) {
      run_linear<Isa>(step, *linear, thread, state);
    } else if (const auto* attend = std::get_if<Attend>(&op)) {
      run_attend<Isa>(step, *attend, static_cast<int>(index), thread, state);
    } else if (const auto* embed = std::get_if<Embed>(&op)) {
      run_embed(step, *embed, thread);
    } else if (const auto* mixture = std::get_if<Mixture>(&op)) {
      run_mixture<Isa>(step, *mixture, thread, state);
    } else {
      hand_over(step, std::holds_alternative<Enter>(op), thread);
    }
    if (step.problem != nullptr) return;  // of the group; every thread sees it
  }
}

}  // namespace fabric
