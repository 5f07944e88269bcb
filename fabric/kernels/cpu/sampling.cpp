// Drawing tokens from logits on the CPU: twin of the torch reference in fabric/kernels/sampling.py.
//
// A row is worked on by one thread, in one fixed order of float operations that depends on the
// row's values and on nothing else: the same row gives the same token in any batch, bit for bit.
// Nothing is ever fully sorted. A first pass keeps the maximum of every chunk of 64 logits; from
// then on only chunks whose maximum reaches a threshold are looked at again.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// One row to draw. temperature < 1e-5: greedy. top_k 0, top_p 1 and min_p 0 are off.
struct FabricSampleRow {
  int64_t row;
  uint64_t seed;
  uint32_t choice;
  uint32_t position;
  float temperature;
  float top_p;
  float min_p;
  int32_t top_k;
};

namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
constexpr int64_t kChunk = 64;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kGreedyBelow = 1e-5f;  // a colder temperature is greedy

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

Floats splat(float value) { return Floats{} + value; }

// Loads kLanes floats; past `available`, -inf.
Floats load(const float* source, int64_t available) {
  Floats lanes;
  if (available >= kLanes) {
    std::memcpy(&lanes, source, sizeof(lanes));
    return lanes;
  }
  lanes = splat(kMinusInfinity);
  if (available > 0) std::memcpy(&lanes, source, available * sizeof(float));
  return lanes;
}

Ints iota() {
  Ints lanes;
  for (int32_t i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

bool any(const Ints& mask) {
  uint64_t words[sizeof(Ints) / 8], joined = 0;
  std::memcpy(words, &mask, sizeof(words));
  for (const uint64_t word : words) joined |= word;
  return joined != 0;
}

float maximum_of(Floats lanes) {
  float parts[kLanes];
  std::memcpy(parts, &lanes, sizeof(parts));
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i)
      parts[i] = parts[i + width] > parts[i] ? parts[i + width] : parts[i];
  return parts[0];
}

// Always in this order: halves are folded until one lane is left.
float sum_of(Floats lanes) {
  float parts[kLanes];
  std::memcpy(parts, &lanes, sizeof(parts));
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// e^x for x <= 0, about 1 ulp; 0 below -87 and for -inf. Cephes' polynomial after range reduction.
Floats exponential(Floats x) {
  const Floats lowest = splat(-87.0f);
  const Floats clamped = x > lowest ? x : lowest;
  const Floats magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const Floats power = (clamped * 1.44269504088896341f + magic) - magic;
  const Floats rest = (clamped - power * 0.693359375f) + power * 2.12194440e-4f;
  Floats series = splat(1.9875691500e-4f);
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * (rest * rest) + rest + 1.0f;
  const Ints exponent = (__builtin_convertvector(power, Ints) + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return x > lowest ? series * scale : Floats{};
}

struct Candidate {
  float logit;
  float weight;
  int32_t token;
};

// Likeliest first; equal logits: the lowest id first.
bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// Everything from the likeliest token down to this one stays. By default: all.
struct Cut {
  float logit = kMinusInfinity;
  int32_t token = std::numeric_limits<int32_t>::max();
};

struct Scratch {
  std::vector<float> chunk_maxima, chunk_sums, order, weights;
  std::vector<Candidate> candidates;
};

Scratch& scratch() {
  static thread_local Scratch instance;
  return instance;
}

// Tokens and weight of a part of a row.
struct Mass {
  double weight = 0.0;
  int64_t tokens = 0;
};

// One row of logits with the maximum of each chunk of them.
struct Row {
  const float* logits;
  int64_t vocab;
  int64_t chunks;
  float maximum;
  std::vector<float>& maxima;

  Row(const float* logits_V, int64_t vocab_size)
      : logits(logits_V),
        vocab(vocab_size),
        chunks((vocab_size + kChunk - 1) / kChunk),
        maximum(kMinusInfinity),
        maxima(scratch().chunk_maxima) {
    maxima.resize(chunks);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      Floats best = splat(kMinusInfinity);
      for (int64_t lane = 0; lane < kChunk; lane += kLanes) {
        const Floats other = raw_lanes(chunk, lane);  // NaN is never larger
        best = other > best ? other : best;
      }
      maxima[chunk] = maximum_of(best);
      maximum = maxima[chunk] > maximum ? maxima[chunk] : maximum;
    }
  }

  // A row without one finite logit (NaN weights, say) has nothing to draw.
  bool drawable() const { return maximum > kMinusInfinity && maximum < -kMinusInfinity; }

  Floats raw_lanes(int64_t chunk, int64_t lane) const {
    const int64_t first = chunk * kChunk + lane;
    return load(logits + first, vocab - first);
  }

  // NaN counts as -inf, here and in `at`: everything below relies on an order of logits.
  Floats lanes(int64_t chunk, int64_t lane) const {
    const Floats some = raw_lanes(chunk, lane);
    return some == some ? some : splat(kMinusInfinity);
  }

  float at(int64_t token) const {
    return logits[token] == logits[token] ? logits[token] : kMinusInfinity;
  }

  int64_t chunk_end(int64_t chunk) const { return std::min(vocab, (chunk + 1) * kChunk); }

  int32_t argmax() const {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (maxima[chunk] != maximum) continue;
      for (int64_t i = chunk * kChunk; i < chunk_end(chunk); ++i)
        if (logits[i] == maximum) return static_cast<int32_t>(i);
    }
    return -1;
  }

  // All tokens with a logit in [low, high), with their weights if those are given.
  std::vector<Candidate>& collect(float low, float high, const float* weights) const {
    std::vector<Candidate>& out = scratch().candidates;
    out.clear();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (!(maxima[chunk] >= low)) continue;
      for (int64_t lane = 0; lane < kChunk; lane += kLanes) {
        const Floats some = lanes(chunk, lane);
        if (!any((some >= low) & (some < high))) continue;
        const int64_t first = chunk * kChunk + lane;
        for (int64_t i = first; i < std::min(vocab, first + kLanes); ++i)
          if (at(i) >= low && at(i) < high)
            out.push_back({at(i), weights ? weights[i] : 0.0f, static_cast<int32_t>(i)});
      }
    }
    return out;
  }

  // The `count` likeliest tokens, in any order. At least `count` logits reach the count-th largest
  // of the chunks' maxima, and seldom many more do.
  std::vector<Candidate>& top(int64_t count) const {
    float threshold = kMinusInfinity;
    if (count <= chunks) {
      std::vector<float>& order = scratch().order;
      order.assign(maxima.begin(), maxima.end());
      const auto last = order.begin() + (count - 1);
      std::nth_element(order.begin(), last, order.end(), std::greater<float>());
      threshold = *last;
    }
    std::vector<Candidate>& found = collect(threshold, -kMinusInfinity, nullptr);
    count = std::min(count, static_cast<int64_t>(found.size()));  // more than the vocabulary
    std::nth_element(found.begin(), found.begin() + (count - 1), found.end(), likelier);
    found.resize(count);
    return found;
  }
};

// What a token weighs: e^((logit - maximum) / temperature).
struct Weighing {
  const Row& row;
  float inverse_temperature;

  Floats of(const Floats& logits) const {
    return exponential((logits - row.maximum) * inverse_temperature);
  }

  // Weights of 16 (8) tokens, 0 for those that the cut leaves out.
  Floats kept(int64_t chunk, int64_t lane, const Cut& cut) const {
    const Floats logits = row.lanes(chunk, lane);
    const Ints tokens = iota() + static_cast<int32_t>(chunk * kChunk + lane);
    const Ints stays = (logits > cut.logit) | ((logits == cut.logit) & (tokens <= cut.token));
    return stays ? of(logits) : Floats{};
  }

  // The weight of all tokens that the cut leaves; each chunk's part goes into `sums`, each
  // token's, if wanted, into `weights` (whole chunks of those that are not below the cut).
  double total(const Cut& cut, std::vector<float>& sums, float* weights) const {
    sums.resize(row.chunks);
    double total = 0.0;
    for (int64_t chunk = 0; chunk < row.chunks; ++chunk) {
      sums[chunk] = 0.0f;
      if (row.maxima[chunk] < cut.logit) continue;
      Floats part{};
      for (int64_t lane = 0; lane < kChunk; lane += kLanes) {
        const Floats weight = kept(chunk, lane, cut);
        if (weights) std::memcpy(weights + chunk * kChunk + lane, &weight, sizeof(weight));
        part += weight;
      }
      sums[chunk] = sum_of(part);
      total += sums[chunk];
    }
    return total;
  }

  // What the tokens with a logit of at least `low` weigh: float sums of 8 chunks, added in double.
  Mass above(float low, const float* weights) const {
    Mass mass;
    Ints count{};
    Floats part{};
    for (int64_t chunk = 0; chunk < row.chunks; ++chunk) {
      if (chunk % 8 == 0) {
        mass.weight += sum_of(part);
        part = Floats{};
      }
      if (!(row.maxima[chunk] >= low)) continue;
      for (int64_t lane = 0; lane < kChunk; lane += kLanes) {
        const Ints reaches = row.lanes(chunk, lane) >= low;
        part += reaches ? load(weights + chunk * kChunk + lane, kLanes) : Floats{};
        count -= reaches;  // true is -1
      }
    }
    mass.weight += sum_of(part);
    for (int64_t i = 0; i < kLanes; ++i) mass.tokens += count[i];
    return mass;
  }
};

// In [0, 1), 53 bits: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011).
double uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  uint32_t counter[4] = {position, choice, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * counter[0];
    const uint64_t second = 0xCD9E8D57ull * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0],
                              static_cast<uint32_t>(second),
                              static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1],
                              static_cast<uint32_t>(first)};
    std::memcpy(counter, next, sizeof(counter));
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  const uint64_t bits = (static_cast<uint64_t>(counter[0]) << 32) | counter[1];
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

// The last member of the smallest set of likeliest candidates that weighs `wanted`: a quickselect
// by weight.
Cut lightest_cut(std::vector<Candidate>& candidates, double wanted) {
  auto low = candidates.begin(), high = candidates.end();
  double before = 0.0;  // weight of all that is likelier than *low
  while (high - low > 16) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high, likelier);
    double half = 0.0;
    for (auto candidate = low; candidate != middle; ++candidate) half += candidate->weight;
    if (before + half >= wanted) {
      high = middle;
    } else {
      before += half;
      low = middle;
    }
  }
  std::sort(low, high, likelier);
  for (; low + 1 != high; ++low) {
    before += low->weight;
    if (before >= wanted) break;
  }
  return {low->logit, low->token};
}

// top_p: within what `cut` leaves, the smallest set of likeliest tokens that holds top_p of the
// weight. Narrows a band of logits [low, high) in which that set ends, then looks into the band.
Cut nucleus_cut(const Weighing& weighing, const Cut& cut, float top_p) {
  constexpr int64_t kBandTokens = 128;  // that few are sorted out one by one
  const Row& row = weighing.row;
  std::vector<float>& weights = scratch().weights;
  weights.resize(row.chunks * kChunk);
  weighing.total(cut, scratch().chunk_sums, weights.data());
  const double wanted = top_p * weighing.above(cut.logit, weights.data()).weight;
  float depth = 1.0f / weighing.inverse_temperature;
  float high = std::nextafter(row.maximum, -kMinusInfinity);
  float low = row.maximum - depth;
  Mass beyond, within = weighing.above(low, weights.data());
  // A token 128 temperatures below the maximum weighs nothing, so `low` gets there in 7 turns.
  for (int turn = 0; turn < 8 && within.weight < wanted; ++turn) {
    high = low;
    beyond = within;
    depth *= 2.0f;
    low = row.maximum - depth;
    within = weighing.above(low, weights.data());
  }
  for (int turn = 0; turn < 32 && within.tokens - beyond.tokens > kBandTokens; ++turn) {
    const float middle = low + (high - low) * 0.5f;
    if (!(middle > low && middle < high)) break;  // a crowd of equal logits
    const Mass mass = weighing.above(middle, weights.data());
    if (mass.weight >= wanted) {
      low = middle;
      within = mass;
    } else {
      high = middle;
      beyond = mass;
    }
  }
  // Below an earlier cut tokens weigh 0 and were never wanted; their chunks' weights are stale.
  low = std::max(low, cut.logit);
  return lightest_cut(row.collect(low, high, weights.data()), wanted - beyond.weight);
}

// Of what the cut leaves, in order of id: the token at which the running weight passes `noise`
// (in [0, 1)) of the whole.
int32_t draw_within(const Weighing& weighing, const Cut& cut, double noise) {
  const Row& row = weighing.row;
  std::vector<float>& sums = scratch().chunk_sums;
  const double target = noise * weighing.total(cut, sums, nullptr);
  double passed = 0.0;
  for (int64_t chunk = 0; chunk < row.chunks; ++chunk) {
    if (passed + sums[chunk] <= target) {
      passed += sums[chunk];
      continue;
    }
    int32_t last = -1;
    for (int64_t lane = 0; lane < kChunk && passed <= target; lane += kLanes) {
      const Floats weights = weighing.kept(chunk, lane, cut);
      for (int64_t i = 0; i < kLanes && passed <= target; ++i) {
        passed += weights[i];
        if (weights[i] > 0.0f) last = static_cast<int32_t>(chunk * kChunk + lane + i);
      }
    }
    return last;  // the chunk's last possible one, if its sum was a hair above its parts
  }
  return row.argmax();  // not reached: target < total, and both sums run in the same order
}

int32_t draw_one(const Row& row, const FabricSampleRow& entry) {
  if (entry.temperature < kGreedyBelow) return row.argmax();
  const Weighing weighing{row, 1.0f / entry.temperature};
  Cut cut;
  if (entry.min_p > 0.0f) {
    const float floor = row.maximum + std::log(entry.min_p) * entry.temperature;
    cut.logit = std::min(floor, row.maximum);
  }
  if (entry.top_k > 0 && entry.top_k < row.vocab) {
    const std::vector<Candidate>& kept = row.top(entry.top_k);
    const Candidate& last = *std::max_element(kept.begin(), kept.end(), likelier);
    if (last.logit >= cut.logit) cut = {last.logit, last.token};
  }
  if (entry.top_p < 1.0f) cut = nucleus_cut(weighing, cut, entry.top_p);
  return draw_within(weighing, cut, uniform(entry.seed, entry.choice, entry.position));
}

}  // namespace

// Everywhere: logits_RV are rows of `vocab` floats, `stride` floats apart.
extern "C" {

// One row whose chosen token's log-probability is wanted; its `top` likeliest go to the outputs,
// from `offset` on.
struct FabricLogprobRow {
  int64_t row;
  int64_t offset;
  int32_t token;
  int32_t top;
};

// tokens[r] = argmax of row r, the lowest id of equals. Returns the first row that has no finite
// logit, or -1.
int64_t fabric_greedy(const float* logits_RV, int64_t stride, int64_t vocab, int64_t rows,
                      int64_t* tokens) {
  for (int64_t r = 0; r < rows; ++r) {
    const Row row(logits_RV + r * stride, vocab);
    if (!row.drawable()) return r;
    tokens[r] = row.argmax();
  }
  return -1;
}

// Filters in this order: temperature, min_p, top_k, top_p; then the inverse of the cumulative
// distribution in order of id. Returns the index of the first entry without a finite logit, or -1.
int64_t fabric_sample(const float* logits_RV, int64_t stride, int64_t vocab,
                      const FabricSampleRow* entries, int64_t count, int64_t* tokens) {
  for (int64_t e = 0; e < count; ++e) {
    const FabricSampleRow& entry = entries[e];
    const Row row(logits_RV + entry.row * stride, vocab);
    if (!row.drawable()) return e;
    tokens[e] = draw_one(row, entry);
  }
  return -1;
}

// Natural log-probabilities under softmax of the row as it is; rank 1 is the likeliest.
// Returns the index of the first entry that has no finite logit, or -1.
int64_t fabric_logprobs(const float* logits_RV, int64_t stride, int64_t vocab,
                        const FabricLogprobRow* entries, int64_t count, double* logprobs,
                        int64_t* ranks, int64_t* top_tokens, double* top_logprobs) {
  for (int64_t e = 0; e < count; ++e) {
    const FabricLogprobRow& entry = entries[e];
    const Row row(logits_RV + entry.row * stride, vocab);
    if (!row.drawable()) return e;
    const double weight = Weighing{row, 1.0f}.total(Cut{}, scratch().chunk_sums, nullptr);
    const double logsum = row.maximum + std::log(weight);
    const float chosen = row.at(entry.token);
    int64_t rank = 1;
    for (int64_t i = 0; i < vocab; ++i) rank += row.at(i) > chosen;
    for (int64_t i = 0; i < entry.token; ++i) rank += row.at(i) == chosen;
    logprobs[e] = chosen - logsum;
    ranks[e] = rank;
    if (entry.top <= 0) continue;
    std::vector<Candidate>& likeliest = row.top(entry.top);
    std::sort(likeliest.begin(), likeliest.end(), likelier);
    for (size_t i = 0; i < likeliest.size(); ++i) {
      top_tokens[entry.offset + i] = likeliest[i].token;
      top_logprobs[entry.offset + i] = likeliest[i].logit - logsum;
    }
  }
  return -1;
}

// For tests: the noise of one token.
double fabric_uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  return uniform(seed, choice, position);
}
}
