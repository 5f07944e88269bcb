// Products with FMA, of floats: activations widen ahead of a product, weights and KV pages as they
// are read (a pair's even input by a shift, its odd one by a mask), or a panel once for many rows.
#include <vector>

#include "integer_avx2.h"
#include "kernels.h"
#include "run_step.h"
#include "vector_avx2.h"

namespace fabric {
namespace {

constexpr int kLanes = Avx2Vector::kLanes;

__m256 even(const Bf16* pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)pairs), 16));
}

__m256 odd(const Bf16* pairs) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)pairs), mask));
}

// sums[row][vector] += a[row] * b[vector], one input of each of kRowCount rows.
template <int kRowCount, int kVectors>
inline __attribute__((always_inline)) void multiply_add(const float* a, int64_t a_stride,
                                                        const __m256 (&b)[kVectors],
                                                        __m256 (&sums)[kRowCount][kVectors]) {
#pragma GCC unroll 8
  for (int row = 0; row < kRowCount; ++row) {
    const __m256 input = _mm256_broadcast_ss(a + row * a_stride);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[row][v] = _mm256_fmadd_ps(input, b[v], sums[row][v]);
  }
}

// c[row][8 columns a vector] = (add ? c : 0) + a[row][2 pairs] * b[pairs][columns][2]. Strides in
// elements. The order within a sum is even input, odd input, next pair, for any number of rows.
template <int kRowCount, int kVectors>
void dot_block(const float* a, int64_t a_stride, int pairs, const Bf16* b, int64_t b_stride,
               bool add, float* c, int64_t c_stride) {
  __m256 sums[kRowCount][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRowCount; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[row][v] = add ? _mm256_loadu_ps(c + row * c_stride + v * kLanes) : _mm256_setzero_ps();
    }
  }
  for (int pair = 0; pair < pairs; ++pair, a += 2, b += b_stride) {
    __m256 column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = even(b + v * 2 * kLanes);
    multiply_add(a, a_stride, column, sums);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = odd(b + v * 2 * kLanes);
    multiply_add(a + 1, a_stride, column, sums);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRowCount; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      _mm256_storeu_ps(c + row * c_stride + v * kLanes, sums[row][v]);
    }
  }
}

// Twelve sums, a weight, an input and the mask are what sixteen registers hold.
using DotBlock = decltype(&dot_block<1, 2>);
constexpr int kBlockRows = 6;
constexpr DotBlock kWide[] = {dot_block<1, 2>, dot_block<2, 2>, dot_block<3, 2>,
                              dot_block<4, 2>, dot_block<5, 2>, dot_block<6, 2>};
constexpr DotBlock kNarrow[] = {dot_block<1, 1>, dot_block<2, 1>, dot_block<3, 1>,
                                dot_block<4, 1>, dot_block<5, 1>, dot_block<6, 1>};

// The rows of the next block when `rows` are left: two rows alone would wait for their sums.
int next_rows(int rows) { return even_block(rows, kBlockRows); }

// Any number of rows; columns a multiple of 8.
void dot_any(const float* a, int64_t a_stride, int rows, int pairs, const Bf16* b, int64_t b_stride,
             int columns, bool add, float* c, int64_t c_stride) {
  for (int column = 0; column < columns;) {
    const bool wide = columns - column >= 2 * kLanes;
    const DotBlock* blocks = wide ? kWide : kNarrow;
    for (int row = 0; row < rows;) {
      const int count = next_rows(rows - row);
      blocks[count - 1](a + row * a_stride, a_stride, pairs, b + column * 2, b_stride, add,
                        c + row * c_stride + column, c_stride);
      row += count;
    }
    column += wide ? 2 * kLanes : kLanes;
  }
}

// How far ahead of a stream of weights to ask for it. The hardware's prefetcher stops at each 4 KB.
constexpr int kAheadElements = 1024;

// The sums of kPanels whole panels, straight from their pairs; c is [panel][row][32].
template <int kRowCount, int kPanels>
void stream_rows(const float* x, int64_t x_stride, const Bf16* const* panels, int steps, float* c) {
  constexpr int kVectors = 4 * kPanels;
  __m256 sums[kRowCount][kVectors];
  for (auto& row : sums) {
    for (__m256& sum : row) sum = _mm256_setzero_ps();
  }
  for (int step = 0; step < steps; ++step) {
    for (int pair = 0; pair < kStepInputs / 2; ++pair, x += 2) {
      const int64_t at = step * 2 * kTileElements + pair * 2 * kTileColumns;
#pragma GCC unroll 2
      for (int parity = 0; parity < 2; ++parity) {
        __m256 input[kRowCount];
#pragma GCC unroll 2
        for (int row = 0; row < kRowCount; ++row) {
          input[row] = _mm256_broadcast_ss(x + row * x_stride + parity);
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const Bf16* w = panels[v / 4] + at + v % 4 / 2 * kTileElements + v % 2 * 2 * kLanes;
          if (parity == 0 && v % 2 == 0) {
            _mm_prefetch(reinterpret_cast<const char*>(w + kAheadElements), _MM_HINT_T0);
          }
          const __m256 weight = parity == 0 ? even(w) : odd(w);
#pragma GCC unroll 2
          for (int row = 0; row < kRowCount; ++row) {
            sums[row][v] = _mm256_fmadd_ps(input[row], weight, sums[row][v]);
          }
        }
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int row = 0; row < kRowCount; ++row) {
      float* to = c + (v / 4 * kRowCount + row) * kPanelColumns + v % 4 * kLanes;
      _mm256_storeu_ps(to, sums[row][v]);
    }
  }
}

// A panel as floats, [step][tile][input][16 columns]: element by element where its pairs are, so
// that a chunk of its steps begins at the same place in both. Worth it when many rows multiply it.
void widen_panel(const Bf16* panel, int steps, float* wide) {
  const Bf16* end = panel + steps * 2 * kTileElements;
  for (; panel < end; panel += 2 * kTileColumns, wide += 4 * kLanes) {
    _mm_prefetch(reinterpret_cast<const char*>(panel + kAheadElements), _MM_HINT_T0);
    _mm256_storeu_ps(wide, even(panel));
    _mm256_storeu_ps(wide + kLanes, even(panel + 2 * kLanes));
    _mm256_storeu_ps(wide + 2 * kLanes, odd(panel));
    _mm256_storeu_ps(wide + 3 * kLanes, odd(panel + 2 * kLanes));
  }
}

// The sums of one tile's 16 columns, from floats.
template <int kRowCount>
void wide_rows(const float* x, int64_t x_stride, const float* wide, int steps, float* c) {
  __m256 sums[kRowCount][2];
  for (auto& row : sums) row[0] = row[1] = _mm256_setzero_ps();
  for (int step = 0; step < steps; ++step, wide += 2 * kTileElements) {
#pragma GCC unroll 2
    for (int input = 0; input < kStepInputs; ++input, ++x) {
      const float* weights = wide + input * kTileColumns;
      const __m256 column[2] = {_mm256_loadu_ps(weights), _mm256_loadu_ps(weights + kLanes)};
      multiply_add(x, x_stride, column, sums);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRowCount; ++row) {
    _mm256_storeu_ps(c + row * kPanelColumns, sums[row][0]);
    _mm256_storeu_ps(c + row * kPanelColumns + kLanes, sums[row][1]);
  }
}

using WideRows = decltype(&wide_rows<1>);
constexpr WideRows kWideRows[] = {wide_rows<1>, wide_rows<2>, wide_rows<3>,
                                  wide_rows<4>, wide_rows<5>, wide_rows<6>};

// What a thread widens into. It outlives the step: its memory is touched once.
struct Wide {
  std::vector<float> rows;
  std::vector<float> panel;
  const Bf16* widened = nullptr;  // the panel there, `panel.size()` elements
};

thread_local Wide wide_of_thread;

struct Avx2 {
  using Vector = Avx2Vector;
  using Integers = IntegerAvx2;
  // So many rows of 576 floats and a panel fit the L2 cache.
  static constexpr int kResidentRows = 96;
  static constexpr int kRows = 24;
  // Up to so many rows widen each pair anew for every block of them: cheaper than a panel of floats
  // that so few rows read. A block of six would spill its sums.
  static constexpr int kStreamRows = 24;
  static constexpr int kStreamBlock = 5;
  struct Thread {
    Thread(const Step&, int) : wide(wide_of_thread) { wide.widened = nullptr; }
    Wide& wide;
  };

  static void begin_panel(Thread& thread, const Bf16* panel, int steps) {
    Wide& wide = thread.wide;
    wide.panel.resize(static_cast<size_t>(steps) * 2 * kTileElements);
    widen_panel(panel, steps, wide.panel.data());
    wide.widened = panel;
  }

  static void multiply_panel(Thread& thread, const Bf16* x, int64_t x_stride, int rows,
                             const Bf16* panel, int steps, bool, float* c) {
    const int inputs = steps * kStepInputs;
    const float* wide_x = widen_rows(thread, x, x_stride, rows, inputs);
    const int64_t at = panel - thread.wide.widened;
    const bool widened = thread.wide.widened != nullptr && at >= 0 &&
                         at < static_cast<int64_t>(thread.wide.panel.size());
    for (int row = 0; row < rows;) {
      const int count = next_rows(rows - row);
      const float* x_rows = wide_x + row * inputs;
      if (!widened) {
        stream_steps(x_rows, inputs, count, panel, steps, c);
      } else {
        for (int tile = 0; tile < 2; ++tile) {
          const float* weights = thread.wide.panel.data() + at + tile * kTileElements;
          kWideRows[count - 1](x_rows, inputs, weights, steps, c + tile * kTileColumns);
        }
      }
      c += count * kPanelColumns;
      row += count;
    }
  }

  static void multiply_two_panels(Thread& thread, const Bf16* x, int64_t x_stride, int rows,
                                  const Bf16* first, const Bf16* second, int steps, bool,
                                  float* c) {
    const int inputs = steps * kStepInputs;
    const float* wide_x = widen_rows(thread, x, x_stride, rows, inputs);
    const Bf16* panels[] = {first, second};
    if (rows == 1) return stream_rows<1, 2>(wide_x, inputs, panels, steps, c);
    for (const Bf16*& panel : panels) {
      if (rows == 2) {
        stream_rows<2, 1>(wide_x, inputs, &panel, steps, c);
      } else {
        stream_steps(wide_x, inputs, rows, panel, steps, c);
      }
      c += rows * kPanelColumns;
    }
  }

  static void score(Thread& thread, const Bf16* queries, int query_stride, int rows,
                    const ChunkPages& pages, int page, int head_dim, float* scores) {
    const float* wide = widen_rows(thread, queries, query_stride, rows, head_dim);
    for (int i = 0; i < pages.count; ++i) {
      if (pages.next_keys[i] != nullptr) {
        prefetch_lines(pages.next_keys[i], 0, page * head_dim / 32);
      }
      dot_any(wide, head_dim, rows, head_dim / 2, pages.keys[i], page * 2, page, false,
              scores + i * page, kMaxChunk);
    }
  }

  static void combine(Thread& thread, const Bf16* weights, int rows, const ChunkPages& pages,
                      int page, int head_dim, float* outputs) {
    const int keys = pages.count * page;
    const float* wide = widen_rows(thread, weights, kMaxChunk, rows, keys);
    for (int i = 0; i < pages.count; ++i) {
      if (pages.next_values[i] != nullptr) {
        prefetch_lines(pages.next_values[i], 0, page * head_dim / 32);
      }
      dot_any(wide + i * page, keys, rows, page / 2, pages.values[i], head_dim * 2,
              head_dim, true, outputs, kMaxHeadDim);
    }
  }

 private:
  // `count` elements, a multiple of 8, of each row, row behind row.
  static const float* widen_rows(Thread& thread, const Bf16* x, int64_t x_stride, int rows,
                                 int count) {
    std::vector<float>& wide = thread.wide.rows;
    if (wide.size() < static_cast<size_t>(rows) * count) wide.resize(rows * count);
    for (int row = 0; row < rows; ++row) {
      for (int i = 0; i < count; i += kLanes) {
        Vector::store(wide.data() + row * count + i, Vector::load_bf16(x + row * x_stride + i));
      }
    }
    return wide.data();
  }

  // Three rows and more: tile by tile in memory's order, the sums kept in memory meanwhile.
  static void stream_steps(const float* x, int64_t x_stride, int rows, const Bf16* panel, int steps,
                           float* c) {
    for (int step = 0; step < steps; ++step, x += kStepInputs) {
      for (int tile = 0; tile < 2; ++tile, panel += kTileElements) {
        for (int line = 0; line < kTileElements; line += 32) {
          _mm_prefetch(reinterpret_cast<const char*>(panel + kAheadElements + line), _MM_HINT_T0);
        }
        kWide[rows - 1](x, x_stride, kStepInputs / 2, panel, 2 * kTileColumns, step > 0,
                        c + tile * kTileColumns, kPanelColumns);
      }
    }
  }
};

}  // namespace

void run_step_avx2(Step& step, int thread) { run_step<Avx2>(step, thread); }

}  // namespace fabric
