// Drawing tokens from logits on the CPU: the twin of the torch reference in fabric/kernels/sampling.py.
//
// A row is worked on by one thread, in one fixed order of float operations that depends on the row's
// values and on nothing else: the same row gives the same token in any batch, bit for bit.
// Nothing is ever fully sorted. A first pass keeps the maximum of every chunk of 64 logits; from then on
// only chunks whose maximum reaches a threshold are looked at again.
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

float maximum_of(Floats lanes) {
  float best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// Always in this order: halves are folded until one lane is left.
float sum_of(Floats lanes) {
  float parts[kLanes];
  std::memcpy(parts, &lanes, sizeof(parts));
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// e^x for x <= 0, about 1 ulp; 0 below -87 (and for -inf). Cephes' polynomial after range reduction.
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
  float weight;  // e^((logit - maximum) / temperature); set by Scale::weigh
  int32_t token;
};

// Likeliest first; equal logits: the lowest id first.
bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

struct Scratch {
  std::vector<float> chunk_maxima, chunk_sums, order;
  std::vector<Candidate> candidates, selection;
};

Scratch& scratch() {
  static thread_local Scratch instance;
  return instance;
}

// One row of logits with the maximum of each chunk.
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
      const float* source = logits + chunk * kChunk;
      const int64_t left = vocab - chunk * kChunk;
      Floats best = load(source, left);
      for (int64_t lane = kLanes; lane < kChunk; lane += kLanes) {
        const Floats other = load(source + lane, left - lane);
        best = other > best ? other : best;
      }
      maxima[chunk] = maximum_of(best);
      maximum = maxima[chunk] > maximum ? maxima[chunk] : maximum;
    }
  }

  // A row without one finite logit (NaN weights, say) has nothing to draw.
  bool drawable() const { return maximum > kMinusInfinity && maximum < -kMinusInfinity; }

  int64_t chunk_end(int64_t chunk) const { return std::min(vocab, (chunk + 1) * kChunk); }

  int32_t argmax() const {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (maxima[chunk] != maximum) continue;
      for (int64_t i = chunk * kChunk; i < chunk_end(chunk); ++i)
        if (logits[i] == maximum) return static_cast<int32_t>(i);
    }
    return -1;
  }

  // All tokens with a logit of at least `threshold`, in order of id.
  void collect(float threshold, std::vector<Candidate>& out) const {
    out.clear();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (!(maxima[chunk] >= threshold)) continue;
      for (int64_t i = chunk * kChunk; i < chunk_end(chunk); ++i)
        if (logits[i] >= threshold) out.push_back({logits[i], 0.0f, static_cast<int32_t>(i)});
    }
  }

  // All tokens of one chunk.
  void collect_chunk(int64_t chunk, std::vector<Candidate>& out) const {
    out.clear();
    for (int64_t i = chunk * kChunk; i < chunk_end(chunk); ++i)
      out.push_back({logits[i], 0.0f, static_cast<int32_t>(i)});
  }

  // A threshold that at least `count` logits reach: the count-th largest of the chunks' maxima.
  float threshold_for(int64_t count) const {
    if (count > chunks) return kMinusInfinity;
    std::vector<float>& order = scratch().order;
    order.assign(maxima.begin(), maxima.end());
    std::nth_element(order.begin(), order.begin() + (count - 1), order.end(), std::greater<float>());
    return order[count - 1];
  }

  // Sum of e^((logit - maximum) * inverse_temperature); each chunk's part into `sums`.
  double weigh(float inverse_temperature, std::vector<float>& sums) const {
    sums.resize(chunks);
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* source = logits + chunk * kChunk;
      const int64_t left = vocab - chunk * kChunk;
      Floats part{};
      for (int64_t lane = 0; lane < kChunk; lane += kLanes)
        part += exponential((load(source + lane, left - lane) - maximum) * inverse_temperature);
      sums[chunk] = sum_of(part);
      total += sums[chunk];
    }
    return total;
  }
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): 53 bits in [0, 1).
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

// Keeps the `count` likeliest of `candidates`; their order stays.
void keep_top(std::vector<Candidate>& candidates, int64_t count) {
  if (count >= static_cast<int64_t>(candidates.size())) return;
  std::vector<Candidate>& selection = scratch().selection;
  selection.assign(candidates.begin(), candidates.end());
  const auto end = selection.begin() + (count - 1);
  std::nth_element(selection.begin(), end, selection.end(), likelier);
  const auto beyond = [&end](const Candidate& one) { return likelier(*end, one); };
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), beyond), candidates.end());
}

struct Scale {
  float maximum, inverse_temperature;

  // Fills in the weights and returns their sum. The same element-wise arithmetic as Row::weigh.
  double weigh(std::vector<Candidate>& candidates) const {
    double total = 0.0;
    const int64_t count = static_cast<int64_t>(candidates.size());
    for (int64_t from = 0; from < count; from += kLanes) {
      const int64_t lanes = std::min(kLanes, count - from);
      Floats logits = splat(kMinusInfinity);
      for (int64_t i = 0; i < lanes; ++i) logits[i] = candidates[from + i].logit;
      const Floats weights = exponential((logits - maximum) * inverse_temperature);
      for (int64_t i = 0; i < lanes; ++i) total += candidates[from + i].weight = weights[i];
    }
    return total;
  }
};

// The last member of the smallest set of likeliest candidates whose weight reaches `wanted`: a quickselect
// by weight. `selection` is reordered.
Candidate nucleus_end(std::vector<Candidate>& selection, double wanted) {
  auto low = selection.begin(), high = selection.end();
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
  return *low;
}

// The first candidate at which the running weight passes `noise` (in [0, 1)) of the whole.
int32_t draw_from(const std::vector<Candidate>& kept, double noise) {
  double total = 0.0;
  for (const Candidate& candidate : kept) total += candidate.weight;
  const double target = noise * total;
  double passed = 0.0;
  for (const Candidate& candidate : kept) {
    passed += candidate.weight;
    if (passed > target) return candidate.token;
  }
  return kept.back().token;  // not reached: target < total, and both sums run in one order
}

int32_t draw_from_all(const Row& row, double noise, float inverse_temperature) {
  Scratch& memory = scratch();
  const double target = noise * row.weigh(inverse_temperature, memory.chunk_sums);
  const Scale scale{row.maximum, inverse_temperature};
  double passed = 0.0;
  for (int64_t chunk = 0; chunk < row.chunks; ++chunk) {
    const double beyond = passed + memory.chunk_sums[chunk];
    if (beyond > target) {
      row.collect_chunk(chunk, memory.candidates);
      scale.weigh(memory.candidates);
      int32_t last = -1;
      for (const Candidate& candidate : memory.candidates) {
        passed += candidate.weight;
        if (candidate.weight > 0.0f) last = candidate.token;
        if (passed > target) break;
      }
      return last;  // the chunk's last possible one if its sum was a hair above its parts
    }
    passed = beyond;
  }
  return row.argmax();  // not reached: target < total, and both sums run in one order
}

// Into `candidates`, in order of id: some of the likeliest, which together hold at least top_p of the
// row's weight. Returns the weight that top_p means.
double collect_nucleus(const Row& row, const Scale& scale, float top_p,
                       std::vector<Candidate>& candidates) {
  const double wanted = top_p * row.weigh(scale.inverse_temperature, scratch().chunk_sums);
  const float depths[] = {2.0f, 4.0f, 7.0f, 11.0f};  // most rows need one or two looks
  for (const float depth : depths) {
    row.collect(row.maximum - depth / scale.inverse_temperature, candidates);
    if (scale.weigh(candidates) >= wanted) return wanted;
  }
  row.collect(kMinusInfinity, candidates);
  scale.weigh(candidates);
  return wanted;
}

int32_t draw_filtered(const Row& row, const FabricSampleRow& entry, const Scale& scale, double noise) {
  std::vector<Candidate>& candidates = scratch().candidates;
  const bool by_mass = entry.top_p < 1.0f;
  const float floor = entry.min_p > 0.0f
                          ? row.maximum + std::log(entry.min_p) * entry.temperature
                          : kMinusInfinity;
  double wanted;  // the weight that the nucleus must reach
  if (entry.top_k <= 0 && entry.min_p <= 0.0f) {
    wanted = collect_nucleus(row, scale, entry.top_p, candidates);
  } else {
    const int64_t count = entry.top_k > 0 ? std::min<int64_t>(entry.top_k, row.vocab) : row.vocab;
    row.collect(std::max(floor, row.threshold_for(count)), candidates);
    keep_top(candidates, count);
    wanted = entry.top_p * scale.weigh(candidates);
  }
  if (by_mass) {
    std::vector<Candidate>& selection = scratch().selection;
    selection.assign(candidates.begin(), candidates.end());
    const Candidate end = nucleus_end(selection, wanted);
    const auto beyond = [&end](const Candidate& one) { return likelier(end, one); };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), beyond), candidates.end());
  }
  return draw_from(candidates, noise);
}

}  // namespace

extern "C" {

// One row whose chosen token's log-probability is wanted, and `top` likeliest ones from `offset` of the outputs.
struct FabricLogprobRow {
  int64_t row;
  int64_t offset;
  int32_t token;
  int32_t top;
};

// tokens[r] = argmax of row r, the lowest id of equals. Returns the first row that has no finite logit, or -1.
int64_t fabric_greedy(const float* logits_RV, int64_t rows, int64_t vocab, int64_t* tokens) {
  for (int64_t r = 0; r < rows; ++r) {
    const Row row(logits_RV + r * vocab, vocab);
    if (!row.drawable()) return r;
    tokens[r] = row.argmax();
  }
  return -1;
}

// Filters in this order: temperature, min_p, top_k, top_p; then the inverse of the cumulative distribution
// in order of id. Returns the index of the first entry that has no finite logit, or -1.
int64_t fabric_sample(const float* logits_RV, int64_t vocab, const FabricSampleRow* entries, int64_t count,
                      int64_t* tokens) {
  for (int64_t e = 0; e < count; ++e) {
    const FabricSampleRow& entry = entries[e];
    const Row row(logits_RV + entry.row * vocab, vocab);
    if (!row.drawable()) return e;
    if (entry.temperature < kGreedyBelow) {
      tokens[e] = row.argmax();
      continue;
    }
    const double noise = uniform(entry.seed, entry.choice, entry.position);
    const Scale scale{row.maximum, 1.0f / entry.temperature};
    if (entry.top_k <= 0 && entry.top_p >= 1.0f && entry.min_p <= 0.0f) {
      tokens[e] = draw_from_all(row, noise, scale.inverse_temperature);
      continue;
    }
    tokens[e] = draw_filtered(row, entry, scale, noise);
  }
  return -1;
}

// Natural log-probabilities under softmax of the row as it is; rank 1 is the likeliest, equals by id.
// Returns the index of the first entry that has no finite logit, or -1.
int64_t fabric_logprobs(const float* logits_RV, int64_t vocab, const FabricLogprobRow* entries, int64_t count,
                        double* logprobs, int64_t* ranks, int64_t* top_tokens, double* top_logprobs) {
  for (int64_t e = 0; e < count; ++e) {
    const FabricLogprobRow& entry = entries[e];
    const Row row(logits_RV + entry.row * vocab, vocab);
    if (!row.drawable()) return e;
    const double logsum = row.maximum + std::log(row.weigh(1.0f, scratch().chunk_sums));
    const float chosen = row.logits[entry.token];
    int64_t rank = 1;
    for (int64_t i = 0; i < vocab; ++i) rank += row.logits[i] > chosen;
    for (int64_t i = 0; i < entry.token; ++i) rank += row.logits[i] == chosen;
    logprobs[e] = chosen - logsum;
    ranks[e] = rank;
    if (entry.top <= 0) continue;
    std::vector<Candidate>& candidates = scratch().candidates;
    row.collect(row.threshold_for(entry.top), candidates);
    keep_top(candidates, entry.top);
    std::sort(candidates.begin(), candidates.end(), likelier);
    for (int32_t i = 0; i < entry.top; ++i) {
      top_tokens[entry.offset + i] = candidates[i].token;
      top_logprobs[entry.offset + i] = candidates[i].logit - logsum;
    }
  }
  return -1;
}

// For tests: the noise of one token.
double fabric_uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  return uniform(seed, choice, position);
}
}
