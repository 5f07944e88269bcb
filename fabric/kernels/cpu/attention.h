// One Attend op: write K and V of new tokens into their pages, then causal attention over pages.
//
// Batch invariance: a query row walks its keys in chunks that begin at absolute multiples of the
// chunk size, with the same instructions whatever else is in its tile. A key that the row may not
// see weighs exactly zero, and a chunk of only such keys leaves maximum, sum and output alone: so
// it makes no difference which pages the other rows of the tile drag in. The running maximum and
// sum are those of online softmax (Milakov & Gimelshein 2018).
#pragma once

#include <algorithm>
#include <cstring>

#include "rope.h"
#include "step.h"

namespace fabric {

constexpr int kMaxPage = 128;
constexpr int kChunkKeys = 64;  // or one page, when that is longer
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

template <class Isa>
void attend_tile(const Step& step, const Attend& op, const QueryTile& tile, int head,
                 typename Isa::Thread& state, AttentionScratch& scratch) {
  using Vector = typename Isa::Vector;
  const Shape& shape = step.program.shape;
  const int head_dim = shape.head_dim;
  const int padded_dim = round_up(head_dim, 16);
  const int group = shape.group();
  const int page = step.input.page;
  const int first_token = step.input.query_starts[tile.sequence];
  const int first_position = step.input.first_positions[tile.sequence];
  const int32_t* table = step.block_table(tile.sequence);
  const auto position_of = [&](int row) { return first_position + (tile.first_row + row) / group; };

  const int query_stride = round_up(head_dim, kStepInputs);
  for (int row = 0; row < tile.rows; ++row) {
    const int token = first_token + (tile.first_row + row) / group;
    const int query_head = head * group + (tile.first_row + row) % group;
    const Bf16* query =
        step.rows[static_cast<int>(Buffer::kQkv)].row(token) + query_head * head_dim;
    Bf16* rotated = scratch.queries + row * query_stride;
    rotate_head<Vector>(shape, query, op.q_norm, position_of(row), rotated);
    std::fill(rotated + head_dim, rotated + query_stride, Bf16{0});
    std::fill_n(scratch.outputs + row * kMaxHeadDim, padded_dim, 0.0f);
    std::fill_n(scratch.sums + row * 16, 16, 0.0f);
    scratch.maxima[row] = kLowest;
  }

  const auto first_seen = [&](int row) {
    return op.window == 0 ? 0 : std::max(0, position_of(row) - op.window + 1);
  };
  const int chunk_pages = std::max(1, kChunkKeys / page);
  const int first_page = first_seen(0) / page;
  const int last_page = position_of(tile.rows - 1) / page;
  ChunkPages chunk_of_pages;
  const bool few_rows = tile.rows < kTileRows;  // bound by reading the pages, not by arithmetic
  for (int chunk = first_page / chunk_pages; chunk <= last_page / chunk_pages; ++chunk) {
    const int begin_page = std::max(first_page, chunk * chunk_pages);
    const int pages = std::min(last_page + 1, (chunk + 1) * chunk_pages) - begin_page;
    chunk_of_pages.count = pages;
    for (int i = 0; i < pages; ++i) {
      const int index = begin_page + i;
      const bool ask = few_rows && index + chunk_pages <= last_page;
      const int next = table[ask ? index + chunk_pages : index];
      chunk_of_pages.keys[i] = step.page(table[index], op.layer, false, head);
      chunk_of_pages.values[i] = step.page(table[index], op.layer, true, head);
      chunk_of_pages.next_keys[i] = ask ? step.page(next, op.layer, false, head) : nullptr;
      chunk_of_pages.next_values[i] = ask ? step.page(next, op.layer, true, head) : nullptr;
    }
    Isa::score(state, scratch.queries, query_stride, tile.rows, chunk_of_pages, page, head_dim,
               scratch.scores);
    const int first_key = begin_page * page;
    for (int row = 0; row < tile.rows; ++row) {
      weigh_row<Vector>(scratch, row, pages * page, first_seen(row) - first_key,
                        position_of(row) + 1 - first_key, shape.attention_scale, padded_dim);
    }
    Isa::combine(state, scratch.weights, tile.rows, chunk_of_pages, page, head_dim,
                 scratch.outputs);
  }

  for (int row = 0; row < tile.rows; ++row) {
    const int token = first_token + (tile.first_row + row) / group;
    const int query_head = head * group + (tile.first_row + row) % group;
    Bf16* out = step.rows[static_cast<int>(Buffer::kAttended)].row(token) + query_head * head_dim;
    const float sum = Vector::sum(Vector::load(scratch.sums + row * 16)) ;
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
