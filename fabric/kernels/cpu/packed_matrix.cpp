#include "packed_matrix.h"

#include <cstring>

namespace fabric {

PackedMatrix::PackedMatrix(const Bf16* weight, int outputs, int inputs, bool gated, Arena& arena,
                           ThreadPool& pool)
    : outputs_(outputs),
      inputs_(inputs),
      gated_(gated),
      panels_(panel_count(outputs, gated)),
      steps_(round_up(inputs, kStepInputs) / kStepInputs),
      data_(reinterpret_cast<Bf16*>(arena.allocate(static_cast<size_t>(panels_) * steps_ * 2 *
                                                   kTileElements * sizeof(Bf16)))) {
  struct Work {
    const PackedMatrix* matrix;
    const Bf16* weight;
    int threads;
  } work{this, weight, pool.size()};
  pool.run(
      [](void* argument, int thread) {
        const Work& mine = *static_cast<Work*>(argument);
        for (int panel = thread; panel < mine.matrix->panels_; panel += mine.threads) {
          mine.matrix->pack_panel(mine.weight, panel);
        }
      },
      &work);
}

void PackedMatrix::pack_panel(const Bf16* weight, int panel_index) const {
  Bf16* panel = data_ + static_cast<size_t>(panel_index) * steps_ * 2 * kTileElements;
  for (int tile = 0; tile < 2; ++tile) {
    for (int column = 0; column < kTileColumns; ++column) {
      const int row = output_of(panel_index, tile * kTileColumns + column, outputs_, gated_);
      if (row < 0) continue;
      const Bf16* source = weight + static_cast<size_t>(row) * inputs_;
      for (int input = 0; input < inputs_; ++input) {
        const int step = input / kStepInputs;
        const int pair = input % kStepInputs / 2;
        const int place = pair * 32 + column * 2 + input % 2;
        panel[(step * 2 + tile) * kTileElements + place] = source[input];
      }
    }
  }
}

int PackedMatrix::packed_column(int row) const {
  if (!gated_) return row;
  const int half = outputs_ / 2;
  const int within = row % half;
  return within / kTileColumns * kPanelColumns + row / half * kTileColumns + within % kTileColumns;
}

void PackedMatrix::unpack_row(int row, int inputs, float* out) const {
  const int packed = packed_column(row);
  const int tile = packed % kPanelColumns / kTileColumns;
  const int column = packed % kTileColumns;
  const Bf16* source = panel(packed / kPanelColumns) + tile * kTileElements + column * 2;
  for (int input = 0; input < inputs; input += 2) {
    const int step = input / kStepInputs;
    const int pair = input % kStepInputs / 2;
    const Bf16* both = source + step * 2 * kTileElements + pair * 32;
    out[input] = to_float(both[0]);
    if (input + 1 < inputs) out[input + 1] = to_float(both[1]);
  }
}

}  // namespace fabric
