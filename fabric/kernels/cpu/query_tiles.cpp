#include "query_tiles.h"

#include <algorithm>

namespace fabric {
namespace {

// Leading blocks that two sequences have in common.
int common_pages(const StepInput& input, int one, int other) {
  const int pages = std::min(input.pages_of(one), input.pages_of(other));
  const int32_t* table = input.block_table(one);
  return std::mismatch(table, table + pages, input.block_table(other)).first - table;
}

bool table_before(const StepInput& input, int one, int other) {
  const int32_t* table = input.block_table(one);
  const int32_t* other_table = input.block_table(other);
  const int pages = input.pages_of(one), other_pages = input.pages_of(other);
  const int common = common_pages(input, one, other);
  if (common < pages && common < other_pages) return table[common] < other_table[common];
  return pages != other_pages ? pages < other_pages : one < other;
}

}  // namespace

void cut_into_tiles(const StepInput& input, int group, std::vector<TileMember>& members,
                    std::vector<QueryTile>& tiles) {
  members.clear();
  tiles.clear();
  std::vector<int32_t> few;
  const auto add_tile = [&](const TileMember& member) {
    tiles.push_back({static_cast<int32_t>(members.size()), 1, member.rows, 0});
    members.push_back(member);
  };
  for (int sequence = 0; sequence < input.sequences; ++sequence) {
    const int rows = input.tokens_of(sequence) * group;
    if (rows <= kTileRows / 2) {
      few.push_back(sequence);
      continue;
    }
    for (int row = 0; row < rows; row += kTileRows) {
      add_tile({sequence, row, std::min(kTileRows, rows - row), 0});
    }
  }
  // Neighbours in this order have the most in common.
  std::sort(few.begin(), few.end(),
            [&](int one, int other) { return table_before(input, one, other); });
  const int chunk_pages = std::max(1, kChunkKeys / input.page);
  int before = -1;
  for (const int sequence : few) {
    const int rows = input.tokens_of(sequence) * group;
    const int common =
        before < 0 ? 0 : common_pages(input, before, sequence) / chunk_pages * chunk_pages;
    before = sequence;
    QueryTile* tile = tiles.empty() ? nullptr : &tiles.back();
    if (common > 0 && tile->rows + rows <= kTileRows) {
      // The newcomer's share is read once less, but whatever the others share beyond it again by
      // all but one of them.
      const int alone = tile->members == 1 ? common : tile->shared_pages;
      const int shared = std::min(common, alone);
      if (shared > (alone - shared) * (tile->members - 1)) {
        members.push_back({sequence, 0, rows, tile->rows});
        *tile = {tile->first_member, tile->members + 1, tile->rows + rows, shared};
        continue;
      }
    }
    add_tile({sequence, 0, rows, 0});
  }
  // Late tiles of a long prompt see the most keys: taken first, they do not end the op alone.
  std::reverse(tiles.begin(), tiles.end());
}

}  // namespace fabric
