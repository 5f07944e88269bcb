#include "quantized_matrix.h"

#include <algorithm>
#include <cstring>

namespace fabric {

QuantizedMatrix::QuantizedMatrix(const QuantizedSource& source, const std::vector<Chunk>& chunks,
                                 int outputs, int inputs, bool gated, Arena& arena,
                                 ThreadPool& pool)
    : panels_(panel_count(outputs, gated)),
      inputs_(inputs),
      padded_inputs_(round_up(inputs, kIntegerStep)),
      bits_(source.bits),
      levels_(source.levels),
      by_token_(source.by_token != 0),
      input_scale_(source.input_scale),
      number_bytes_(source.number_bytes) {
  cut_into_groups(chunks, source.cut);
  const size_t columns = static_cast<size_t>(panels_) * kPanelColumns;
  words_ = reinterpret_cast<uint32_t*>(arena.allocate(columns * lines() * sizeof(uint32_t)));
  scales_ = arena.allocate(static_cast<size_t>(panels_) * groups() * group_bytes());
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

void QuantizedMatrix::cut_into_groups(const std::vector<Chunk>& chunks, int cut) {
  first_groups_.push_back(0);
  for (const Chunk& chunk : chunks) {
    int begin = chunk.first_step * kStepInputs;
    const int end = std::min(begin + chunk.steps * kStepInputs, inputs_);
    int width = cut > 0 ? cut : end - begin;
    if (levels_ > 127) width = std::min(width, kWideInputs);
    for (; begin < end; begin += width) groups_.push_back({begin, std::min(begin + width, end)});
    first_groups_.push_back(groups());
  }
  groups_.back().end = padded_inputs_;
}

void QuantizedMatrix::pack_panel(const QuantizedSource& source, int outputs, bool gated,
                                 int panel) {
  const int64_t row_bytes = static_cast<int64_t>(inputs_) * bits_ / 8;
  for (int column = 0; column < kPanelColumns; ++column) {
    const int row = output_of(panel, column, outputs, gated);
    uint32_t* target = words_ + static_cast<size_t>(panel) * lines() * kPanelColumns +
                       column / kTileColumns * lines() * kTileColumns + column % kTileColumns;
    for (int word = 0; word < lines(); ++word, target += kTileColumns) {
      uint32_t bits = 0;
      const int64_t left = row_bytes - word * 4;
      if (row >= 0 && left > 0) {
        std::memcpy(&bits, source.values + row * row_bytes + word * 4, std::min<int64_t>(left, 4));
      }
      *target = bits;
    }
    pack_scales(source, row, panel, column);
  }
}

// Those of an output that is padding stay zero, as the arena gave them.
void QuantizedMatrix::pack_scales(const QuantizedSource& source, int row, int panel, int column) {
  if (row < 0) return;
  const int source_groups = (inputs_ + source.group - 1) / source.group;
  const auto numbers = [&](const void* all) {
    return static_cast<const std::byte*>(all) + int64_t{row} * source_groups * number_bytes_;
  };
  for (int group = 0; group < groups(); ++group) {
    const int from = groups_[group].begin / source.group * number_bytes_;
    std::byte* to = scales_ + (size_t{1} * panel * groups() + group) * group_bytes() +
                    column * number_bytes_;
    std::memcpy(to, numbers(source.scales) + from, number_bytes_);
    if (bits_ != 4) continue;
    std::memcpy(to + kPanelColumns * number_bytes_, numbers(source.minimums) + from,
                number_bytes_);
  }
}

}  // namespace fabric
