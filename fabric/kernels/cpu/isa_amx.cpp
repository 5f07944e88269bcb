// Products with AMX tiles: tdpbf16ps multiplies [16 rows][32 inputs] by [32 inputs][16 columns].
//
// One token uses the tiles too, with one row configured: vdpbf16ps would round differently, and a
// token must come out the same from a decode step and from a prompt's chunk.
#include "integer_avx512.h"
#include "kernels.h"
#include "run_step.h"
#include "vector_avx512.h"

namespace fabric {
namespace {

constexpr int kTileBytes = 64;  // one row of a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t row_count[16] = {};

  void set(int tile, int rows, int bytes) {
    row_count[tile] = rows;
    row_bytes[tile] = bytes;
  }
};

// How far ahead of a stream of weights to ask for it. The hardware's prefetcher stops at each 4 KB.
constexpr int kAheadBytes = 2048;

void prefetch_tile(const Bf16* tile) {
  const char* ahead = reinterpret_cast<const char*>(tile) + kAheadBytes;
#pragma GCC unroll 16
  for (int line = 0; line < 16; ++line) _mm_prefetch(ahead + line * 64, _MM_HINT_T0);
}

// The intrinsics do not tell the compiler that they read memory: stores must be done before.
void before_tile_loads() { asm volatile("" ::: "memory"); }

void load_config(const TileConfig& config) {
  before_tile_loads();
  _tile_loadconfig(&config);
}

class AmxThread {
 public:
  AmxThread(const Step&, int) {}
  ~AmxThread() { _tile_release(); }

  // Sums in 0..3, rows of x in 4 and 5, weights in 6 and 7. 2 x 2 tiles when rows > 16, else 1 x 2.
  void for_panel(int rows) {
    if (shape_ == rows) return;
    shape_ = rows;
    TileConfig config;
    const int low = rows < 16 ? rows : 16;
    const int high = rows > 16 ? rows - 16 : 1;
    for (int tile : {0, 1, 4}) config.set(tile, low, kTileBytes);
    for (int tile : {2, 3, 5}) config.set(tile, high, kTileBytes);
    for (int tile : {6, 7}) config.set(tile, 16, kTileBytes);
    load_config(config);
  }

  // Sums in 0..3, rows of x in 4, weights in 5, 6 and 7: up to 16 rows by four tiles.
  void for_stream(int rows) {
    if (shape_ == -rows) return;
    shape_ = -rows;
    TileConfig config;
    for (int tile : {0, 1, 2, 3, 4}) config.set(tile, rows, kTileBytes);
    for (int tile : {5, 6, 7}) config.set(tile, 16, kTileBytes);
    load_config(config);
  }

  // Sums in 0..3, queries in 4, keys in 5, weights in 6, values in 7; `group` keys a product.
  void for_attention(int rows, int group) {
    const int shape = 1000 + rows * 100 + group;
    if (shape_ == shape) return;
    shape_ = shape;
    TileConfig config;
    for (int tile : {0, 1, 2, 3, 4}) config.set(tile, rows, kTileBytes);
    config.set(5, 16, kTileBytes);
    config.set(6, rows, group * 2);
    config.set(7, group / 2, kTileBytes);
    load_config(config);
  }

 private:
  int shape_ = 0;
};

template <bool kFirstTouch>
void panel_two_by_two(const Bf16* x, int64_t x_stride, const Bf16* panel, int steps, float* c) {
  const int64_t bytes = x_stride * sizeof(Bf16);
  const Bf16* lower = x + 16 * x_stride;
  before_tile_loads();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < steps; ++step) {
    if (kFirstTouch) prefetch_tile(panel);
    _tile_loadd(6, panel, kTileBytes);
    _tile_loadd(4, x, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kFirstTouch) prefetch_tile(panel + kTileElements);
    _tile_loadd(7, panel + kTileElements, kTileBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower, bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    x += kStepInputs;
    lower += kStepInputs;
    panel += 2 * kTileElements;
  }
  constexpr int kStride = kPanelColumns * sizeof(float);
  _tile_stored(0, c, kStride);
  _tile_stored(1, c + 16, kStride);
  _tile_stored(2, c + 16 * kPanelColumns, kStride);
  _tile_stored(3, c + 16 * kPanelColumns + 16, kStride);
}

void panel_one_by_two(const Bf16* x, int64_t x_stride, const Bf16* panel, int steps, float* c) {
  const int64_t bytes = x_stride * sizeof(Bf16);
  before_tile_loads();
  _tile_zero(0);
  _tile_zero(1);
  for (int step = 0; step < steps; ++step) {
    _tile_loadd(6, panel, kTileBytes);
    _tile_loadd(7, panel + kTileElements, kTileBytes);
    _tile_loadd(4, x, bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    x += kStepInputs;
    panel += 2 * kTileElements;
  }
  constexpr int kStride = kPanelColumns * sizeof(float);
  _tile_stored(0, c, kStride);
  _tile_stored(1, c + 16, kStride);
}

template <bool kFirstTouch>
void two_panels(const Bf16* x, int64_t x_stride, int rows, const Bf16* first, const Bf16* second,
                int steps, float* c) {
  const int64_t bytes = x_stride * sizeof(Bf16);
  before_tile_loads();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < steps; ++step) {
    _tile_loadd(4, x, bytes);
    if (kFirstTouch) prefetch_tile(first);
    _tile_loadd(5, first, kTileBytes);
    _tile_dpbf16ps(0, 4, 5);
    if (kFirstTouch) prefetch_tile(second);
    _tile_loadd(6, second, kTileBytes);
    _tile_dpbf16ps(2, 4, 6);
    if (kFirstTouch) prefetch_tile(first + kTileElements);
    _tile_loadd(7, first + kTileElements, kTileBytes);
    _tile_dpbf16ps(1, 4, 7);
    if (kFirstTouch) prefetch_tile(second + kTileElements);
    _tile_loadd(5, second + kTileElements, kTileBytes);
    _tile_dpbf16ps(3, 4, 5);
    x += kStepInputs;
    first += 2 * kTileElements;
    second += 2 * kTileElements;
  }
  constexpr int kStride = kPanelColumns * sizeof(float);
  float* c_second = c + rows * kPanelColumns;
  _tile_stored(0, c, kStride);
  _tile_stored(1, c + 16, kStride);
  _tile_stored(2, c_second, kStride);
  _tile_stored(3, c_second + 16, kStride);
}

// Scores of 16 keys: `whole` steps of 32 head elements from the page, the rest (zero padded) from
// `rest`.
void score_16(const Bf16* queries, int64_t query_bytes, const Bf16* keys, int64_t key_bytes,
              int whole, const Bf16* rest) {
  _tile_zero(0);
  for (int step = 0; step < whole; ++step) {
    _tile_loadd(4, queries + step * kStepInputs, query_bytes);
    _tile_loadd(5, keys + step * 8 * key_bytes, key_bytes);
    _tile_dpbf16ps(0, 4, 5);
  }
  if (rest != nullptr) {
    _tile_loadd(4, queries + whole * kStepInputs, query_bytes);
    _tile_loadd(5, rest, kTileBytes);
    _tile_dpbf16ps(0, 4, 5);
  }
}

struct Amx {
  using Vector = Avx512Vector;
  using Integers = IntegerAvx512;
  using Thread = AmxThread;
  // Rows of activations that stay in the L2 cache while all panels pass over them.
  static constexpr int kResidentRows = 256;
  static constexpr int kRows = 32;
  static constexpr int kStreamRows = 32;
  static constexpr int kStreamBlock = 16;

  static void begin_panel(Thread&, const Bf16*, int) {}

  static void multiply_panel(Thread& thread, const Bf16* x, int64_t x_stride, int rows,
                             const Bf16* panel, int steps, bool first_touch, float* c) {
    thread.for_panel(rows);
    if (rows > 16 && first_touch) {
      panel_two_by_two<true>(x, x_stride, panel, steps, c);
    } else if (rows > 16) {
      panel_two_by_two<false>(x, x_stride, panel, steps, c);
    } else {
      panel_one_by_two(x, x_stride, panel, steps, c);
    }
  }

  static void multiply_two_panels(Thread& thread, const Bf16* x, int64_t x_stride, int rows,
                                  const Bf16* first, const Bf16* second, int steps,
                                  bool first_touch, float* c) {
    thread.for_stream(rows);
    const auto multiply = first_touch ? two_panels<true> : two_panels<false>;
    multiply(x, x_stride, rows, first, second, steps, c);
  }

  static void score(Thread& thread, const Bf16* queries, int query_stride, int rows,
                    const ChunkPages& pages, int page, int head_dim, float* scores) {
    thread.for_attention(rows, key_group(page));
    const int64_t query_bytes = query_stride * sizeof(Bf16);
    const int64_t key_bytes = page * 2 * sizeof(Bf16);
    const int whole = head_dim / kStepInputs;
    const int rest_pairs = head_dim % kStepInputs / 2;
    alignas(64) Bf16 rest[kTileElements] = {};
    for (int i = 0; i < pages.count; ++i) {
      for (int key = 0; key < page; key += 16) {
        const Bf16* from = pages.keys[i] + key * 2;
        for (int pair = 0; pair < rest_pairs; ++pair) {
          std::memcpy(rest + pair * 32, from + (whole * 16 + pair) * page * 2, kTileBytes);
        }
        if (pages.next_keys[i] != nullptr) {
          prefetch_lines(pages.next_keys[i], key / 16 * head_dim / 2, head_dim / 2);
        }
        before_tile_loads();
        score_16(queries, query_bytes, from, key_bytes, whole, rest_pairs > 0 ? rest : nullptr);
        _tile_stored(0, scores + i * page + key, kMaxChunk * sizeof(float));
      }
    }
  }

  static void combine(Thread& thread, const Bf16* weights, int rows, const ChunkPages& pages,
                      int page, int head_dim, float* outputs) {
    const int group = key_group(page);
    thread.for_attention(rows, group);
    const int64_t value_bytes = head_dim * 2 * sizeof(Bf16);
    for (int column = 0; column < head_dim; column += 16) {
      const int columns = std::min(16, head_dim - column);
      before_tile_loads();
      _tile_loadd(0, outputs + column, kMaxHeadDim * sizeof(float));
      for (int i = 0; i < pages.count; ++i) {
        if (pages.next_values[i] != nullptr) {
          prefetch_lines(pages.next_values[i], column * page / 32, columns * page / 32);
        }
        for (int key = 0; key < page; key += group) {
          const Bf16* from = pages.values[i] + key * head_dim + column * 2;
          _tile_loadd(6, weights + i * page + key, kMaxChunk * sizeof(Bf16));
          if (columns == 16) {
            _tile_loadd(7, from, value_bytes);
          } else {
            // A tile row would reach into the next head, or past the pool.
            alignas(64) Bf16 narrow[kTileElements] = {};
            for (int pair = 0; pair < group / 2; ++pair) {
              std::memcpy(narrow + pair * 32, from + pair * head_dim * 2, columns * 4);
            }
            before_tile_loads();
            _tile_loadd(7, narrow, kTileBytes);
          }
          _tile_dpbf16ps(0, 6, 7);
        }
      }
      _tile_stored(0, outputs + column, kMaxHeadDim * sizeof(float));
    }
  }

 private:
  static int key_group(int page) { return page % 32 == 0 ? 32 : 16; }
};

}  // namespace

void run_step_amx(Step& step, int thread) { run_step<Amx>(step, thread); }

}  // namespace fabric
