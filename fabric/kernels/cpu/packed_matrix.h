// A weight matrix in the one order that all instruction sets read.
//
//   panel   32 output columns (for a gated matrix 16 of the gate and the same 16 of up)
//   step    32 inputs
//   tile    [16 input pairs][16 columns][2 inputs of the pair], 1 KB: two tiles make panel x step
//
// A tile is what AMX multiplies by, its 64-byte rows are what vdpbf16ps takes, and AVX2 widens each
// row to the even and the odd inputs. Panels follow each other, so a thread that owns a range of
// panels reads one run of memory. Rows and columns that do not exist are zero.
#pragma once

#include "bf16.h"
#include "memory.h"
#include "thread_pool.h"

namespace fabric {

constexpr int kPanelColumns = 32;
constexpr int kStepInputs = 32;
constexpr int kTileColumns = 16;
constexpr int kTileElements = 512;

// A gated panel makes 16 columns, and the next matrix reads its inputs in steps of 32.
inline int panel_count(int outputs, bool gated) {
  return gated ? round_up(outputs / 2, kStepInputs) / kTileColumns
               : round_up(outputs, kPanelColumns) / kPanelColumns;
}

// Which output of the original is column `column` of panel `panel`; -1: none.
inline int output_of(int panel, int column, int outputs, bool gated) {
  if (!gated) {
    const int row = panel * kPanelColumns + column;
    return row < outputs ? row : -1;
  }
  const int within = panel * kTileColumns + column % kTileColumns;
  const int half = outputs / 2;
  return within < half ? column / kTileColumns * half + within : -1;
}

class PackedMatrix {
 public:
  PackedMatrix() = default;
  // `weight` is row-major [outputs][inputs]; it is not kept.
  PackedMatrix(const Bf16* weight, int outputs, int inputs, bool gated, Arena& arena,
               ThreadPool& pool);

  int panels() const { return panels_; }
  int steps() const { return steps_; }
  const Bf16* panel(int index) const {
    return data_ + static_cast<size_t>(index) * steps_ * 2 * kTileElements;
  }

  // Where output `row` of the original lies: column `panel * 32 + tile * 16 + column`.
  int packed_column(int row) const;

  // Copies output `row` back to `inputs` plain elements (a tied embedding's lookup).
  void unpack_row(int row, int inputs, float* out) const;

 private:
  void pack_panel(const Bf16* weight, int panel) const;

  int outputs_ = 0;
  int inputs_ = 0;
  bool gated_ = false;
  int panels_ = 0;
  int steps_ = 0;
  Bf16* data_ = nullptr;
};

}  // namespace fabric
