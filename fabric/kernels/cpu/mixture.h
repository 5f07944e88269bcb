// One Mixture op: route each row, put the rows of each expert together, two products an expert, and
// the weighted sums back to HIDDEN.
//
// Expert parallel, the tokens of a block are shared out over the ep ranks. A rank routes its own
// and leaves the rows, sorted by expert, in its outbox; whoever has an expert takes them from
// there, and leaves the outputs; the rank adds up its own tokens' and everybody gathers the sums.
// Tensor parallel, the ranks of one ep rank have the same rows and some columns of each expert, so
// that last gathering adds theirs.
#pragma once

#include <algorithm>
#include <cmath>

#include "rows.h"
#include "spread.h"
#include "step.h"

namespace fabric {

// Who is who in a block of `count` tokens from `first` on.
struct MixtureBlock {
  int first;
  int count;
  int share;  // tokens of an ep rank, the last one's may be fewer
  int begin;  // this rank's are [begin, end) of the block
  int end;
};

inline int64_t mixture_header_bytes(const Mixture& op) {
  return round_up<int64_t>((op.experts + 1) * sizeof(int32_t) * 2, 64);
}

// The softmax of a row's router logits; the likeliest `top_k`, the lower number among equals.
inline void choose(const Mixture& op, float* logits, int32_t* experts, float* weights) {
  const float highest = *std::max_element(logits, logits + op.experts);
  float sum = 0.0f;
  for (int expert = 0; expert < op.experts; ++expert) {
    logits[expert] = std::exp(logits[expert] - highest);
    sum += logits[expert];
  }
  float chosen = 0.0f;
  for (int choice = 0; choice < op.top_k; ++choice) {
    const auto best = static_cast<int32_t>(std::max_element(logits, logits + op.experts) - logits);
    experts[choice] = best;
    weights[choice] = logits[best] / sum;
    chosen += weights[choice];
    logits[best] = -1.0f;
  }
  for (int choice = 0; op.renormalise && choice < op.top_k; ++choice) weights[choice] /= chosen;
}

// Rows of one matrix, a thread's share of its panels; `finish(row, count, panel, sums)`.
template <class Isa, class Finish>
void multiply_share(const PackedMatrix& weight, const Rows& source, Range rows, Range panels,
                    typename Isa::Thread& state, Finish finish) {
  alignas(64) float sums[Isa::kRows * kPanelColumns];
  for (int panel = panels.first; panel < panels.last; ++panel) {
    for (int row = rows.first; row < rows.last; row += Isa::kRows) {
      const int count = std::min(Isa::kRows, rows.last - row);
      Isa::multiply_panel(state, source.row(row), source.stride, count, weight.panel(panel),
                          weight.steps(), row == rows.first, sums);
      finish(row, count, panel, sums);
    }
  }
}

template <class Isa>
void route_rows(Step& step, const Mixture& op, const MixtureBlock& block, int thread,
                typename Isa::Thread& state) {
  MixtureSpace& space = step.mixture;
  const Shape& shape = step.program.shape;
  const int tokens = block.end - block.begin;
  const int threads = step.pool.size();
  const Range mine{tokens * thread / threads, tokens * (thread + 1) / threads};
  const int padded = round_up(shape.hidden, kStepInputs);
  for (int row = mine.first; row < mine.last; ++row) {
    norm_row<typename Isa::Vector>(step.hidden.row(block.first + block.begin + row),
                                   op.norm.data(), shape.hidden, padded, shape.norm_eps,
                                   step.normed.row(row));
  }
  multiply_share<Isa>(op.router, step.normed, mine, {0, op.router.panels()}, state,
                      [&](int row, int count, int panel, const float* sums) {
                        for (int i = 0; i < count; ++i) {
                          std::memcpy(space.logits.row(row + i) + panel * kPanelColumns,
                                      sums + i * kPanelColumns, kPanelColumns * sizeof(float));
                        }
                      });
  for (int row = mine.first; row < mine.last; ++row) {
    choose(op, space.logits.row(row), &space.experts[row * op.top_k],
           &space.weights[row * op.top_k]);
  }
  step.pool.barrier();
}

// Sorts the choices by expert, tokens in order: `starts` and each choice's `places`.
inline void sort_choices(MixtureSpace& space, const Mixture& op, int choices) {
  std::fill(space.starts.begin(), space.starts.end(), 0);
  for (int i = 0; i < choices; ++i) ++space.starts[space.experts[i] + 1];
  for (int expert = 0; expert < op.experts; ++expert) {
    space.starts[expert + 1] += space.starts[expert];
  }
  space.next.assign(space.starts.begin(), space.starts.end());
  for (int i = 0; i < choices; ++i) space.places[i] = space.next[space.experts[i]]++;
}

// The rows of this rank's experts, together by expert, in `space.rows`. False: the group is lost.
inline bool dispatch(Step& step, const Mixture& op, const MixtureBlock& block, int thread) {
  MixtureSpace& space = step.mixture;
  const int threads = step.pool.size();
  const int choices = (block.end - block.begin) * op.top_k;
  const int64_t row_bytes = round_up(step.program.shape.hidden, kStepInputs) * sizeof(Bf16);
  if (thread == 0) sort_choices(space, op, choices);
  step.pool.barrier();
  if (op.parts() == 1) {
    for (int i = thread; i < choices; i += threads) {
      std::memcpy(space.rows.row(space.places[i]), step.normed.row(i / op.top_k), row_bytes);
    }
    if (thread == 0) space.local_starts.assign(space.starts.begin(), space.starts.end());
    step.pool.barrier();
    return true;
  }
  Group& group = *step.program.group;
  const int64_t header = mixture_header_bytes(op);
  std::byte* outbox = group.outbox();
  if (thread == 0) std::memcpy(outbox, space.starts.data(), (op.experts + 1) * sizeof(int32_t));
  for (int i = thread; i < choices; i += threads) {
    std::memcpy(outbox + header + space.places[i] * row_bytes, step.normed.row(i / op.top_k),
                row_bytes);
  }
  if (!step.share(thread, header + block.share * op.top_k * row_bytes)) return false;
  const int tp = step.program.ranks() / op.parts();
  const int tp_rank = step.program.rank() % tp;
  const int part = step.program.rank() / tp;
  const int first = op.run_starts[part];
  const int local = op.run_starts[part + 1] - first;
  const auto starts_of = [&](int source) {
    return reinterpret_cast<const int32_t*>(group.inbox(source * tp + tp_rank));
  };
  if (thread == 0) {
    // By expert, then by the rank that sent them; answers go by rank, then by expert.
    space.answers.clear();
    space.bases.assign(op.parts() + 1, 0);
    for (int source = 0; source < op.parts(); ++source) {
      const int32_t* starts = starts_of(source);
      space.bases[source + 1] = space.bases[source] + starts[first + local] - starts[first];
    }
    space.local_starts.assign(1, 0);
    for (int expert = first; expert < first + local; ++expert) {
      for (int source = 0; source < op.parts(); ++source) {
        const int32_t* starts = starts_of(source);
        for (int row = starts[expert]; row < starts[expert + 1]; ++row) {
          space.answers.push_back({source, row, space.bases[source] + row - starts[first]});
        }
      }
      space.local_starts.push_back(static_cast<int32_t>(space.answers.size()));
    }
  }
  step.pool.barrier();
  for (size_t i = thread; i < space.answers.size(); i += threads) {
    const auto& answer = space.answers[i];
    std::memcpy(space.rows.row(i),
                group.inbox(answer.source * tp + tp_rank) + header + answer.row * row_bytes,
                row_bytes);
  }
  step.pool.barrier();
  return true;
}

template <class Isa>
void run_experts(Step& step, const Mixture& op, int thread, typename Isa::Thread& state) {
  using Vector = typename Isa::Vector;
  MixtureSpace& space = step.mixture;
  const int threads = step.pool.size();
  const auto share = [&](const PackedMatrix& weight) {
    return Range{weight.panels() * thread / threads, weight.panels() * (thread + 1) / threads};
  };
  for (size_t expert = 0; expert < op.gate_up.size(); ++expert) {
    const Range rows{space.local_starts[expert], space.local_starts[expert + 1]};
    multiply_share<Isa>(
        op.gate_up[expert], space.rows, rows, share(op.gate_up[expert]), state,
        [&](int row, int count, int panel, const float* sums) {
          for (int i = 0; i < count; ++i, sums += kPanelColumns) {
            Bf16* out = space.gated.row(row + i) + panel * kTileColumns;
            for (int at = 0; at < kTileColumns; at += Vector::kLanes) {
              const auto gate = silu<Vector>(Vector::load(sums + at));
              Vector::store_bf16(out + at,
                                 Vector::mul(gate, Vector::load(sums + kTileColumns + at)));
            }
          }
        });
  }
  step.pool.barrier();
  for (size_t expert = 0; expert < op.down.size(); ++expert) {
    const Range rows{space.local_starts[expert], space.local_starts[expert + 1]};
    multiply_share<Isa>(op.down[expert], space.gated, rows, share(op.down[expert]), state,
                        [&](int row, int count, int panel, const float* sums) {
                          for (int i = 0; i < count; ++i) {
                            std::memcpy(space.outputs.row(row + i) + panel * kPanelColumns,
                                        sums + i * kPanelColumns, kPanelColumns * sizeof(float));
                          }
                        });
  }
  if (thread == 0 && op.loads != nullptr) {
    const int first = op.run_starts[op.part];
    for (size_t expert = 0; expert < op.down.size(); ++expert) {
      op.loads[first + expert] += space.local_starts[expert + 1] - space.local_starts[expert];
    }
  }
  step.pool.barrier();
}

// total = the weighted sum of the outputs of one token of this rank, `output(choice, expert)`.
template <class Vector, class Output>
void weigh_outputs(const Step& step, const Mixture& op, int token, float* total, Output output) {
  const MixtureSpace& space = step.mixture;
  const int padded = round_up(step.program.shape.hidden, kPanelColumns);
  for (int choice = 0; choice < op.top_k; ++choice) {
    const int index = token * op.top_k + choice;
    const float* row = output(index, space.experts[index]);
    const typename Vector::F weight = Vector::set(space.weights[index]);
    for (int i = 0; i < padded; i += Vector::kLanes) {
      const typename Vector::F weighted = Vector::mul(weight, Vector::load(row + i));
      Vector::store(total + i,
                    choice == 0 ? weighted : Vector::add(Vector::load(total + i), weighted));
    }
  }
}

// The outputs go back to the tokens and onto HIDDEN. False: the group is lost.
template <class Vector>
bool combine(Step& step, const Mixture& op, const MixtureBlock& block, int thread) {
  MixtureSpace& space = step.mixture;
  const Program& program = step.program;
  const int threads = step.pool.size();
  const int64_t columns = round_up(program.shape.hidden, kPanelColumns);
  const int tp = program.ranks() / op.parts();
  const int tp_rank = program.rank() % tp;
  const int64_t header = mixture_header_bytes(op);
  if (op.parts() > 1) {
    std::byte* outbox = program.group->outbox();
    if (thread == 0) std::memcpy(outbox, space.bases.data(), op.parts() * sizeof(int32_t));
    for (size_t i = thread; i < space.answers.size(); i += threads) {
      std::memcpy(outbox + header + space.answers[i].place * columns * sizeof(float),
                  space.outputs.row(i), columns * sizeof(float));
    }
    if (!step.share(thread, header + block.count * op.top_k * columns * sizeof(float))) {
      return false;
    }
  }
  const auto output = [&](int index, int expert) -> const float* {
    if (op.parts() == 1) return space.outputs.row(space.places[index]);
    const auto above = std::upper_bound(op.run_starts.begin(), op.run_starts.end(), expert);
    const int part = static_cast<int>(above - op.run_starts.begin()) - 1;
    const std::byte* box = program.group->inbox(part * tp + tp_rank);
    const int64_t base = reinterpret_cast<const int32_t*>(box)[program.rank() / tp];
    const int64_t row = base + space.places[index] - space.starts[op.run_starts[part]];
    return reinterpret_cast<const float*>(box + header) + row * columns;
  };
  if (program.group == nullptr) {
    for (int token = thread; token < block.count; token += threads) {
      float* total = space.outputs.row(space.places[token * op.top_k]);  // spent by its own sum
      weigh_outputs<Vector>(step, op, token, total, output);
      add_row<Vector>(step.hidden.row(block.first + token), total, columns);
    }
    step.pool.barrier();
    return true;
  }
  auto* sums = reinterpret_cast<float*>(program.group->outbox());
  for (int token = thread; token < block.end - block.begin; token += threads) {
    weigh_outputs<Vector>(step, op, token, sums + token * columns, output);
  }
  if (!step.share(thread, block.share * columns * sizeof(float))) return false;
  for (int token = thread; token < block.count; token += threads) {
    const int part = token / block.share;
    float* hidden = step.hidden.row(block.first + token);
    for (int i = 0; i < columns; i += Vector::kLanes) {
      typename Vector::F sum = Vector::zero();
      for (int rank = part * tp; rank < (part + 1) * tp; ++rank) {
        const auto* box = reinterpret_cast<const float*>(program.group->inbox(rank));
        sum = Vector::add(sum, Vector::load(box + (token - part * block.share) * columns + i));
      }
      Vector::store(hidden + i, Vector::add(Vector::load(hidden + i), sum));
    }
  }
  step.pool.barrier();
  return true;
}

template <class Isa>
void run_mixture(Step& step, const Mixture& op, int thread, typename Isa::Thread& state) {
  const Program& program = step.program;
  const int part = op.parts() == 1 ? 0 : program.rank() / (program.ranks() / op.parts());
  for (int first = 0; first < step.input.tokens; first += op.block_tokens) {
    MixtureBlock block{first, std::min(op.block_tokens, step.input.tokens - first), 0, 0, 0};
    block.share = (block.count + op.parts() - 1) / op.parts();
    block.begin = std::min(block.count, part * block.share);
    block.end = std::min(block.count, block.begin + block.share);
    route_rows<Isa>(step, op, block, thread, state);
    if (!dispatch(step, op, block, thread)) return;
    run_experts<Isa>(step, op, thread, state);
    if (!combine<typename Isa::Vector>(step, op, block, thread)) return;
  }
}

}  // namespace fabric
