// Attention's unit of work: up to 16 query rows, for each kv head.
//
// A row is a (token, head of the group) pair. The rows of one sequence fill as many tiles as they
// need. Sequences with few rows (decodes) that begin with the same blocks, because a prefix was
// found in the cache or a request asked for several choices, share a tile: their common pages are
// then read once for all of them, and the tile's rows, of which one sequence fills three, are put
// to use.
#pragma once

#include <cstdint>
#include <vector>

#include "step_input.h"

namespace fabric {

constexpr int kTileRows = 16;
constexpr int kChunkKeys = 64;  // attention takes so many keys at once; or one page, if longer

// Rows [first_row, first_row + rows) of one sequence, token-major, counted from its first token in
// the step; in the tile they begin at `base`.
struct TileMember {
  int32_t sequence;
  int32_t first_row;
  int32_t rows;
  int32_t base;
};

struct QueryTile {
  int32_t first_member;
  int32_t members;
  int32_t rows;
  int32_t shared_pages;  // leading pages that all members have in common, in whole chunks
};

// Replaces `members` and `tiles`. `group`: query heads of one kv head.
void cut_into_tiles(const StepInput& input, int group, std::vector<TileMember>& members,
                    std::vector<QueryTile>& tiles);

}  // namespace fabric
