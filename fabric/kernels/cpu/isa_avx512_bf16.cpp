// Products with vdpbf16ps: 16 columns a vector, two inputs a step, up to 24 sums in registers.
#include "integer_avx512.h"
#include "kernels.h"
#include "run_step.h"
#include "vector_avx512.h"

namespace fabric {
namespace {

__m512i broadcast_pair(const Bf16* pair) {
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return _mm512_set1_epi32(static_cast<int>(bits));
}

// sums[row][vector] += a[row][2 pairs] * b[pairs][16 columns a vector][2]. Strides in elements;
// columns from `columns` on are not read and count as zero.
template <int kRowCount, int kVectors>
void dot(const Bf16* a, int64_t a_stride, int pairs, const Bf16* b, int64_t b_stride, int columns,
         __m512 (&sums)[kRowCount][kVectors]) {
  for (int pair = 0; pair < pairs; ++pair) {
    __m512bh b_vector[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Bf16* from = b + pair * b_stride + v * 32;
      const int left = columns - v * 16;
      b_vector[v] = (__m512bh)(left >= 16 ? _mm512_loadu_si512(from)
                                          : _mm512_maskz_loadu_epi32((1u << left) - 1, from));
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRowCount; ++row) {
      const auto a_pair = (__m512bh)broadcast_pair(a + row * a_stride + pair * 2);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] = _mm512_dpbf16_ps(sums[row][v], a_pair, b_vector[v]);
      }
    }
  }
}

// c[row][column] = (add ? c : 0) + a * b, one vector group of one block of rows.
template <int kRowCount, int kVectors>
void dot_block(const Bf16* a, int64_t a_stride, int pairs, const Bf16* b, int64_t b_stride,
               int columns, bool add, float* c, int64_t c_stride) {
  __m512 sums[kRowCount][kVectors];
  for (int row = 0; row < kRowCount; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      sums[row][v] = add ? _mm512_loadu_ps(c + row * c_stride + v * 16) : _mm512_setzero_ps();
    }
  }
  dot<kRowCount, kVectors>(a, a_stride, pairs, b, b_stride, columns, sums);
  for (int row = 0; row < kRowCount; ++row) {
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + row * c_stride + v * 16, sums[row][v]);
  }
}

using DotBlock = decltype(&dot_block<1, 1>);
constexpr int kBlockRows = 6;
constexpr DotBlock kWide[] = {dot_block<1, 4>, dot_block<2, 4>, dot_block<3, 4>,
                              dot_block<4, 4>, dot_block<5, 4>, dot_block<6, 4>};
constexpr DotBlock kNarrow[] = {dot_block<1, 1>, dot_block<2, 1>, dot_block<3, 1>,
                                dot_block<4, 1>, dot_block<5, 1>, dot_block<6, 1>};

// Any number of rows and columns; c is written up to the next multiple of 16 columns.
void dot_any(const Bf16* a, int64_t a_stride, int rows, int pairs, const Bf16* b, int64_t b_stride,
             int columns, bool add, float* c, int64_t c_stride) {
  for (int column = 0; column < columns;) {
    const bool wide = columns - column >= 64;
    for (int row = 0; row < rows; row += kBlockRows) {
      // Not `(wide ? kWide : kNarrow)[std::min(...) - 1]`, which g++ 12 miscompiles.
      const int last = std::min(kBlockRows, rows - row) - 1;
      const DotBlock block = wide ? kWide[last] : kNarrow[last];
      block(a + row * a_stride, a_stride, pairs, b + column * 2, b_stride, columns - column, add,
            c + row * c_stride + column, c_stride);
    }
    column += wide ? 64 : 16;
  }
}

// How far ahead of a stream of weights to ask for it. The hardware's prefetcher stops at each 4 KB.
constexpr int kAheadElements = 1024;

// The sums of kPanels panels, c is [panel][row][32].
template <int kRowCount, int kPanels>
void panel_rows(const Bf16* x, int64_t x_stride, const Bf16* const* panels, int steps, float* c) {
  __m512 sums[kPanels][kRowCount][2];
  for (auto& panel : sums) {
    for (auto& row : panel) row[0] = row[1] = _mm512_setzero_ps();
  }
  for (int step = 0; step < steps; ++step) {
#pragma GCC unroll 2
    for (int pair = 0; pair < 16; ++pair) {
#pragma GCC unroll 2
      for (int panel = 0; panel < kPanels; ++panel) {
        const Bf16* w = panels[panel] + step * 2 * kTileElements + pair * 32;
        _mm_prefetch(reinterpret_cast<const char*>(w + kAheadElements), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w + kAheadElements + kTileElements),
                     _MM_HINT_T0);
        const auto w0 = (__m512bh)_mm512_loadu_si512(w);
        const auto w1 = (__m512bh)_mm512_loadu_si512(w + kTileElements);
#pragma GCC unroll 16
        for (int row = 0; row < kRowCount; ++row) {
          const auto x_pair = (__m512bh)broadcast_pair(x + row * x_stride + pair * 2);
          sums[panel][row][0] = _mm512_dpbf16_ps(sums[panel][row][0], x_pair, w0);
          sums[panel][row][1] = _mm512_dpbf16_ps(sums[panel][row][1], x_pair, w1);
        }
      }
    }
    x += kStepInputs;
  }
  for (auto& panel : sums) {
    for (auto& row : panel) {
      _mm512_store_ps(c, row[0]);
      _mm512_store_ps(c + 16, row[1]);
      c += kPanelColumns;
    }
  }
}

using PanelRows = decltype(&panel_rows<1, 1>);
constexpr PanelRows kOnePanel[] = {
    panel_rows<1, 1>, panel_rows<2, 1>,  panel_rows<3, 1>,  panel_rows<4, 1>,
    panel_rows<5, 1>, panel_rows<6, 1>,  panel_rows<7, 1>,  panel_rows<8, 1>,
    panel_rows<9, 1>, panel_rows<10, 1>, panel_rows<11, 1>, panel_rows<12, 1>};
constexpr PanelRows kTwoPanels[] = {panel_rows<1, 2>, panel_rows<2, 2>, panel_rows<3, 2>,
                                    panel_rows<4, 2>, panel_rows<5, 2>, panel_rows<6, 2>};

struct Avx512Bf16 {
  using Vector = Avx512Vector;
  using Integers = IntegerAvx512;
  // Rows of activations that stay in the L2 cache while all panels pass over them.
  static constexpr int kResidentRows = 256;
  static constexpr int kRows = 12;
  static constexpr int kStreamRows = 6;
  static constexpr int kStreamBlock = 6;
  struct Thread {
    Thread(const Step&, int) {}
  };

  static void begin_panel(Thread&, const Bf16*, int) {}

  static void multiply_panel(Thread&, const Bf16* x, int64_t x_stride, int rows, const Bf16* panel,
                             int steps, bool, float* c) {
    kOnePanel[rows - 1](x, x_stride, &panel, steps, c);
  }

  static void multiply_two_panels(Thread&, const Bf16* x, int64_t x_stride, int rows,
                                  const Bf16* first, const Bf16* second, int steps, bool,
                                  float* c) {
    const Bf16* panels[] = {first, second};
    kTwoPanels[rows - 1](x, x_stride, panels, steps, c);
  }

  static void score(Thread&, const Bf16* queries, int query_stride, int rows,
                    const ChunkPages& pages, int page, int head_dim, float* scores) {
    for (int i = 0; i < pages.count; ++i) {
      if (pages.next_keys[i] != nullptr) {
        prefetch_lines(pages.next_keys[i], 0, page * head_dim / 32);
      }
      dot_any(queries, query_stride, rows, head_dim / 2, pages.keys[i], page * 2, page, false,
              scores + i * page, kMaxChunk);
    }
  }

  static void combine(Thread&, const Bf16* weights, int rows, const ChunkPages& pages, int page,
                      int head_dim, float* outputs) {
    for (int i = 0; i < pages.count; ++i) {
      if (pages.next_values[i] != nullptr) {
        prefetch_lines(pages.next_values[i], 0, page * head_dim / 32);
      }
      dot_any(weights + i * page, kMaxChunk, rows, page / 2, pages.values[i], head_dim * 2,
              head_dim, true, outputs, kMaxHeadDim);
    }
  }
};

}  // namespace

void run_step_avx512_bf16(Step& step, int thread) { run_step<Avx512Bf16>(step, thread); }

}  // namespace fabric
