// Products with FMA: a pair of bfloat16 widens to the even and the odd input as floats.
#include "integer_avx2.h"
#include "kernels.h"
#include "run_step.h"
#include "vector_avx2.h"

namespace fabric {
namespace {

struct Pair {
  __m256 even;
  __m256 odd;
};

Pair widen(__m256i pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)))};
}

Pair broadcast_pair(const Bf16* pair) {
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return widen(_mm256_set1_epi32(static_cast<int>(bits)));
}

// c[row][8 columns a vector] = (add ? c : 0) + a[row][2 pairs] * b[pairs][columns][2]. Strides in
// elements. The order within a sum is even input, odd input, next pair, for any number of rows.
template <int kRowCount, int kVectors>
void dot_block(const Bf16* a, int64_t a_stride, int pairs, const Bf16* b, int64_t b_stride,
               bool add, float* c, int64_t c_stride) {
  __m256 sums[kRowCount][kVectors];
  for (int row = 0; row < kRowCount; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      sums[row][v] = add ? _mm256_loadu_ps(c + row * c_stride + v * 8) : _mm256_setzero_ps();
    }
  }
  for (int pair = 0; pair < pairs; ++pair) {
    Pair b_vector[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      b_vector[v] = widen(_mm256_loadu_si256((const __m256i*)(b + pair * b_stride + v * 16)));
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRowCount; ++row) {
      const Pair a_pair = broadcast_pair(a + row * a_stride + pair * 2);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] = _mm256_fmadd_ps(a_pair.even, b_vector[v].even, sums[row][v]);
        sums[row][v] = _mm256_fmadd_ps(a_pair.odd, b_vector[v].odd, sums[row][v]);
      }
    }
  }
  for (int row = 0; row < kRowCount; ++row) {
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(c + row * c_stride + v * 8, sums[row][v]);
  }
}

using DotBlock = decltype(&dot_block<1, 2>);
constexpr int kBlockRows = 4;
constexpr DotBlock kWide[] = {dot_block<1, 2>, dot_block<2, 2>, dot_block<3, 2>, dot_block<4, 2>};
constexpr DotBlock kNarrow[] = {dot_block<1, 1>, dot_block<2, 1>, dot_block<3, 1>, dot_block<4, 1>};

// Any number of rows; columns a multiple of 8.
void dot_any(const Bf16* a, int64_t a_stride, int rows, int pairs, const Bf16* b, int64_t b_stride,
             int columns, bool add, float* c, int64_t c_stride) {
  for (int column = 0; column < columns;) {
    const bool wide = columns - column >= 16;
    for (int row = 0; row < rows; row += kBlockRows) {
      // Not `(wide ? kWide : kNarrow)[std::min(...) - 1]`, which g++ 12 miscompiles.
      const int last = std::min(kBlockRows, rows - row) - 1;
      const DotBlock block = wide ? kWide[last] : kNarrow[last];
      block(a + row * a_stride, a_stride, pairs, b + column * 2, b_stride, add,
            c + row * c_stride + column, c_stride);
    }
    column += wide ? 16 : 8;
  }
}

struct Avx2 {
  using Vector = Avx2Vector;
  using Integers = IntegerAvx2;
  static constexpr int kRows = 12;
  static constexpr int kStreamRows = 4;
  static constexpr int kStreamBlock = 4;
  struct Thread {
    Thread(const Step&, int) {}
  };

  static void multiply_panel(Thread&, const Bf16* x, int64_t x_stride, int rows, const Bf16* panel,
                             int steps, bool, float* c) {
    // A tile's 16 columns at a time; the two tiles of a step alternate in memory.
    for (int step = 0; step < steps; ++step) {
      for (int tile = 0; tile < 2; ++tile) {
        dot_any(x + step * kStepInputs, x_stride, rows, kStepInputs / 2,
                panel + (step * 2 + tile) * kTileElements, 32, kTileColumns, step > 0,
                c + tile * kTileColumns, kPanelColumns);
      }
    }
  }

  static void multiply_two_panels(Thread& thread, const Bf16* x, int64_t x_stride, int rows,
                                  const Bf16* first, const Bf16* second, int steps, bool,
                                  float* c) {
    multiply_panel(thread, x, x_stride, rows, first, steps, true, c);
    multiply_panel(thread, x, x_stride, rows, second, steps, true, c + rows * kPanelColumns);
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

void run_step_avx2(Step& step, int thread) { run_step<Avx2>(step, thread); }

}  // namespace fabric
