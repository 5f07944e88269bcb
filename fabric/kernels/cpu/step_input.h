// What a step is given.
#pragma once

#include <cstdint>

namespace fabric {

// Mirrored by StepRecord in executor.py; the arrays are those of fabric.kernels.program.StepBatch.
struct StepInput {
  const int32_t* token_ids;
  const int32_t* query_starts;
  const int32_t* first_positions;
  const int32_t* table_rows;
  const int32_t* block_tables;
  const int32_t* logit_rows;
  uint8_t* blocks;
  float* logits;
  int64_t block_bytes;
  int64_t block_count;
  int64_t logits_stride;  // floats, at least vocab rounded up to 32
  const float* entering;  // [tokens][hidden], for Enter
  float* leaving;         // [tokens][hidden], for Leave
  int32_t tokens;
  int32_t sequences;
  int32_t logit_row_count;
  int32_t table_height;
  int32_t table_width;
  int32_t page;

  const int32_t* block_table(int sequence) const {
    return block_tables + static_cast<int64_t>(table_rows[sequence]) * table_width;
  }
  int tokens_of(int sequence) const { return query_starts[sequence + 1] - query_starts[sequence]; }
  // Pages that hold the sequence up to its last token of this step.
  int pages_of(int sequence) const {
    return (first_positions[sequence] + tokens_of(sequence) - 1) / page + 1;
  }
};

}  // namespace fabric
