// One Attend op: write K and V of new tokens into their pages, then causal attention over pages.
//
// Batch invariance: a query row walks its keys in chunks that begin at absolute multiples of the
// chunk size, with the same instructions whatever else is in its tile. A key that the row may not
// see weighs exactly zero, and a chunk of only such keys leaves maximum, sum and output alone: so
// it makes no difference which pages the other rows of the tile drag in, and sequences that begin
// with the same pages can share a tile: it reads those pages once. The running maximum and sum are
// those of online softmax (Milakov & Gimelshein 2018).
#pragma once

#include <algorithm>
#include <cstring>

#include "rope.h"
#include "step.h"

namespace fabric {

constexpr int kMaxPage = 128;
constexpr int kMaxChunk = 128;
constexpr float kLowest = -1e30f;  // below any score; finite, so that differences stay numbers

// K pages are [head_dim / 2][page][2], V pages [page / 2][head_dim][2].
template <class Vector>
void write_span(const Step& step, const Attend& op, const Span& span, int head) {
  const Shape& shape = step.program.shape;
  const int head_dim = shape.head_dim;
  const int page = step.input.page;
  const int block = step.block_table(span.sequence)[span.position / page];
  auto* keys = reinterpret_cast<uint32_t*>(step.page(block, op.layer, false, head));
  Bf16* values = step.page(block, op.layer, true, head);
  const int first_slot = span.position % page;
  // A slot's weight is zero until it is written, but zero times NaN is NaN: what an earlier owner
  // (or nobody) left in the page's values must go. Masked keys need no such care.
  if (first_slot == 0) std::memset(values, 0, sizeof(Bf16) * page * head_dim);
  for (int i = 0; i < span.count; ++i) {
    const Bf16* row = step.rows[static_cast<int>(Buffer::kQkv)].row(span.first_token + i);
    const Bf16* key = row + (shape.heads + head) * head_dim;
    const Bf16* value = row + (shape.heads + shape.kv_heads + head) * head_dim;
    const int slot = first_slot + i;
    alignas(64) uint32_t rotated[kMaxHeadDim / 2];
    rotate_head<Vector>(shape, key, op.k_norm, span.position + i,
                        reinterpret_cast<Bf16*>(rotated));
    for (int pair = 0; pair < head_dim / 2; ++pair) keys[pair * page + slot] = rotated[pair];
    Bf16* column = values + static_cast<int64_t>(slot / 2) * head_dim * 2 + slot % 2;
    for (int element = 0; element < head_dim; ++element) column[element * 2] = value[element];
  }
}

// The pages of one chunk, and those of the next, null where there is none or no need to ask for
// them: pages lie apart, so the hardware's prefetcher does not find the next one. The instruction
// sets ask for page i of the next chunk while they compute on page i of this one, a few lines at a
// time: asked for in a burst, they would fill the line buffers and stall the loads behind them.
struct ChunkPages {
  int count = 0;
  const Bf16* keys[kMaxChunk / 16];
  const Bf16* values[kMaxChunk / 16];
  const Bf16* next_keys[kMaxChunk / 16];
  const Bf16* next_values[kMaxChunk / 16];
};

inline void prefetch_lines(const Bf16* from, int first, int count) {
  const char* line = reinterpret_cast<const char*>(from) + first * 64;
  for (int i = 0; i < count; ++i) _mm_prefetch(line + i * 64, _MM_HINT_T0);
}

// What one thread needs for one query tile.
struct AttentionScratch {
  alignas(64) Bf16 queries[kTileRows * kMaxHeadDim];
  alignas(64) float scores[kTileRows * kMaxChunk];
  alignas(64) Bf16 weights[kTileRows * kMaxChunk];
  alignas(64) float outputs[kTileRows * kMaxHeadDim];
  alignas(64) float sums[kTileRows * 16];  // one vector a row
  float maxima[kTileRows];
};

// One row's scores of `keys` keys to weights: online softmax. [begin, end) are the keys it may see.
template <class Vector>
void weigh_row(AttentionScratch& scratch, int row, int keys, int begin, int end, float scale,
               int padded_dim) {
  using F = typename Vector::F;
  float* scores = scratch.scores + row * kMaxChunk;
  Bf16* weights = scratch.weights + row * kMaxChunk;
  const F lowest = Vector::set(kLowest);
  F highest = lowest;
  for (int i = 0; i < keys; i += Vector::kLanes) {
    const F score = Vector::mul(Vector::load(scores + i), Vector::set(scale));
    const F seen = Vector::between(score, begin - i, end - i, lowest);
    Vector::store(scores + i, seen);
    highest = Vector::max(highest, seen);
  }
  const float before = scratch.maxima[row];
  const float maximum = std::max(before, Vector::maximum(highest));
  F sum = Vector::load(scratch.sums + row * 16);
  if (maximum != before) {
    const F shrink = Vector::exp(Vector::set(before - maximum));
    sum = Vector::mul(sum, shrink);
    float* output = scratch.outputs + row * kMaxHeadDim;
    for (int i = 0; i < padded_dim; i += Vector::kLanes) {
      Vector::store(output + i, Vector::mul(Vector::load(output + i), shrink));
    }
    scratch.maxima[row] = maximum;
  }
  for (int i = 0; i < keys; i += Vector::kLanes) {
    const F weight = Vector::exp(Vector::sub(Vector::load(scores + i), Vector::set(maximum)));
    const F seen = Vector::between(weight, begin - i, end - i, Vector::zero());
    sum = Vector::add(sum, seen);
    Vector::store_bf16(weights + i, seen);
  }
  Vector::store(scratch.sums + row * 16, sum);
}

// Pages [begin, begin + pages) of a block table, for rows [base, base + rows) of a tile.
struct KeyChunk {
  const int32_t* table;
  int begin;
  int pages;
  int base;
  int rows;
};

// All chunks of a tile: first those that its members share, for all rows at once, then each
// member's own.
class ChunkWalk {
 public:
  ChunkWalk(const Step& step, const QueryTile& tile, int window)
      : chunk_pages_(std::max(1, kChunkKeys / step.input.page)) {
    // A window lets go of leading pages, so nobody shares them.
    const int shared = window == 0 ? tile.shared_pages : 0;
    if (shared > 0) {
      const TileMember& first = step.members[tile.first_member];
      runs_[count_++] = {step.block_table(first.sequence), 0, shared, 0, tile.rows};
    }
    for (int i = 0; i < tile.members; ++i) {
      const TileMember& member = step.members[tile.first_member + i];
      const int group = step.program.shape.group();
      const int first_position = step.input.first_positions[member.sequence];
      const int first = first_position + member.first_row / group;
      const int last = first_position + (member.first_row + member.rows - 1) / group;
      const int seen = window == 0 ? 0 : std::max(0, first - window + 1);
      const int begin = std::max(shared, seen / step.input.page);
      const int pages = last / step.input.page + 1 - begin;
      const int32_t* table = step.block_table(member.sequence);
      if (pages > 0) runs_[count_++] = {table, begin, pages, member.base, member.rows};
    }
  }

  // Without pages when there are no more.
  KeyChunk next() {
    if (index_ == count_) return {};
    KeyChunk& run = runs_[index_];
    KeyChunk chunk = run;
    chunk.pages = std::min(run.pages, (run.begin / chunk_pages_ + 1) * chunk_pages_ - run.begin);
    run.begin += chunk.pages;
    run.pages -= chunk.pages;
    if (run.pages == 0) ++index_;
    return chunk;
  }

 private:
  const int chunk_pages_;
  KeyChunk runs_[kTileRows + 1];
  int count_ = 0;
  int index_ = 0;
};

// The pages of `chunk`; those of `next` are asked for meanwhile.
inline ChunkPages pages_of(const Step& step, int layer, int head, const KeyChunk& chunk,
                           const KeyChunk& next) {
  ChunkPages pages;
  pages.count = chunk.pages;
  for (int i = 0; i < chunk.pages; ++i) {
    const int block = chunk.table[chunk.begin + i];
    pages.keys[i] = step.page(block, layer, false, head);
    pages.values[i] = step.page(block, layer, true, head);
    const bool ask = i < next.pages;
    const int ahead = ask ? next.table[next.begin + i] : block;
    pages.next_keys[i] = ask ? step.page(ahead, layer, false, head) : nullptr;
    pages.next_values[i] = ask ? step.page(ahead, layer, true, head) : nullptr;
  }
  return pages;
}

// Where a tile's row comes from and goes to.
struct RowPlace {
  int token;
  int query_head;
  int position;
};

template <class Isa>
void attend_tile(const Step& step, const Attend& op, const QueryTile& tile, int head,
                 typename Isa::Thread& state, AttentionScratch& scratch) {
  using Vector = typename Isa::Vector;
  const Shape& shape = step.program.shape;
  const int head_dim = shape.head_dim;
  const int padded_dim = round_up(head_dim, 16);
  const int query_stride = round_up(head_dim, kStepInputs);
  const int group = shape.group();
  const int page = step.input.page;

  RowPlace places[kTileRows];
  for (int i = 0; i < tile.members; ++i) {
    const TileMember& member = step.members[tile.first_member + i];
    for (int row = 0; row < member.rows; ++row) {
      const int token = (member.first_row + row) / group;
      places[member.base + row] = {step.input.query_starts[member.sequence] + token,
                                   head * group + (member.first_row + row) % group,
                                   step.input.first_positions[member.sequence] + token};
    }
  }
  for (int row = 0; row < tile.rows; ++row) {
    const auto [token, query_head, position] = places[row];
    const Bf16* query =
        step.rows[static_cast<int>(Buffer::kQkv)].row(token) + query_head * head_dim;
    Bf16* rotated = scratch.queries + row * query_stride;
    rotate_head<Vector>(shape, query, op.q_norm, position, rotated);
    std::fill(rotated + head_dim, rotated + query_stride, Bf16{0});
    std::fill_n(scratch.outputs + row * kMaxHeadDim, padded_dim, 0.0f);
    std::fill_n(scratch.sums + row * 16, 16, 0.0f);
    scratch.maxima[row] = kLowest;
  }

  // Full tiles of one sequence are bound by arithmetic, and their neighbours just read the pages.
  const bool ask = tile.rows < kTileRows || tile.members > 1;
  ChunkWalk walk(step, tile, op.window);
  for (KeyChunk chunk = walk.next(), next; chunk.pages > 0; chunk = next) {
    next = walk.next();
    const ChunkPages pages = pages_of(step, op.layer, head, chunk, ask ? next : KeyChunk{});
    Isa::score(state, scratch.queries + chunk.base * query_stride, query_stride, chunk.rows, pages,
               page, head_dim, scratch.scores + chunk.base * kMaxChunk);
    const int first_key = chunk.begin * page;
    for (int row = chunk.base; row < chunk.base + chunk.rows; ++row) {
      const int position = places[row].position;
      const int first_seen = op.window == 0 ? 0 : std::max(0, position - op.window + 1);
      weigh_row<Vector>(scratch, row, chunk.pages * page, first_seen - first_key,
                        position + 1 - first_key, shape.attention_scale, padded_dim);
    }
    Isa::combine(state, scratch.weights + chunk.base * kMaxChunk, chunk.rows, pages, page, head_dim,
                 scratch.outputs + chunk.base * kMaxHeadDim);
  }

  for (int row = 0; row < tile.rows; ++row) {
    Bf16* out = step.rows[static_cast<int>(Buffer::kAttended)].row(places[row].token) +
                   places[row].query_head * head_dim;
    const float sum = Vector::sum(Vector::load(scratch.sums + row * 16));
    const typename Vector::F inverse = Vector::set(1.0f / sum);
    for (int i = 0; i < head_dim; i += Vector::kLanes) {
      const typename Vector::F output = Vector::load(scratch.outputs + row * kMaxHeadDim + i);
      Vector::store_bf16_first(out + i, Vector::mul(output, inverse), head_dim - i);
    }
  }
}

template <class Isa>
void run_attend(Step& step, const Attend& op, int op_index, int thread,
                typename Isa::Thread& state) {
  const int kv_heads = step.program.shape.kv_heads;
  const int writes = static_cast<int>(step.spans.size()) * kv_heads;
  const int threads = step.pool.size();
  for (int unit = writes * thread / threads; unit < writes * (thread + 1) / threads; ++unit) {
    write_span<typename Isa::Vector>(step, op, step.spans[unit / kv_heads], unit % kv_heads);
  }
  step.pool.barrier();
  AttentionScratch scratch;
  // With work enough for all, a thread takes all heads of a tile: they are neighbours in memory.
  const int tiles = static_cast<int>(step.tiles.size());
  const int heads_at_once = tiles >= 4 * threads ? kv_heads : 1;
  std::atomic<int32_t>& next = step.next_unit[op_index];
  for (int unit; (unit = next.fetch_add(heads_at_once, std::memory_order_relaxed)) <
                 tiles * kv_heads;) {
    for (int i = unit; i < unit + heads_at_once; ++i) {
      attend_tile<Isa>(step, op, step.tiles[i / kv_heads], i % kv_heads, state, scratch);
    }
  }
  step.pool.barrier();
}

}  // namespace fabric
