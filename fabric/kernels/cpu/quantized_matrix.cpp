#include "quantized_matrix.h"

#include <algorithm>
#include <cstring>

namespace fabric {

QuantizedMatrix::QuantizedMatrix(const QuantizedSource& source, int outputs, int inputs, bool gated,
                                 Arena& arena, ThreadPool& pool)
    : panels_(panel_count(outputs, gated)),
      inputs_(inputs),
      padded_inputs_(round_up(inputs, kIntegerStep)),
      bits_(source.bits),
      levels_(source.levels),
      by_token_(source.by_token != 0),
      input_scale_(source.input_scale),
      group_(source.group) {
  if (levels_ > 127) group_ = std::min(group_, kWideInputs);
  groups_ = (inputs + group_ - 1) / group_;
  if (groups_ == 1) group_ = padded_inputs_;
  const size_t columns = static_cast<size_t>(panels_) * kPanelColumns;
  words_ = reinterpret_cast<uint32_t*>(arena.allocate(columns * lines() * sizeof(uint32_t)));
  scales_ = reinterpret_cast<float*>(arena.allocate(columns * groups_ * sizeof(float)));
  struct Work {
    QuantizedMatrix* matrix;
    const QuantizedSource* source;
    int outputs;
    bool gated;
    int threads;
  } work{this, &source, outputs, gated, pool.size()};
  pool.run(
      [](void* argument, int thread) {
        const Work& mine = *static_cast<Work*>(argument);
        for (int panel = thread; panel < mine.matrix->panels_; panel += mine.threads) {
          mine.matrix->pack_panel(*mine.source, mine.outputs, mine.gated, panel);
        }
      },
      &work);
}

void QuantizedMatrix::pack_panel(const QuantizedSource& source, int outputs, bool gated,
                                 int panel) {
  const int64_t row_bytes = static_cast<int64_t>(inputs_) * bits_ / 8;
  const int source_groups = (inputs_ + source.group - 1) / source.group;
  const uint32_t nothing = bits_ == 4 ? 0x88888888u : 0u;
  float* scales = scales_ + static_cast<size_t>(panel) * groups_ * kPanelColumns;
  for (int column = 0; column < kPanelColumns; ++column) {
    const int row = output_of(panel, column, outputs, gated);
    uint32_t* target = words_ + static_cast<size_t>(panel) * lines() * kPanelColumns +
                       column / kTileColumns * lines() * kTileColumns + column % kTileColumns;
    for (int word = 0; word < lines(); ++word, target += kTileColumns) {
      uint32_t bits = nothing;
      const int64_t left = row_bytes - word * 4;
      if (row >= 0 && left > 0) {
        std::memcpy(&bits, source.values + row * row_bytes + word * 4, std::min<int64_t>(left, 4));
      }
      *target = bits;
    }
    for (int group = 0; group < groups_; ++group) {
      const int from = std::min(group * group_ / source.group, source_groups - 1);
      scales[group * kPanelColumns + column] =
          row < 0 ? 0.0f : source.scales[static_cast<int64_t>(row) * source_groups + from];
    }
  }
}

}  // namespace fabric
