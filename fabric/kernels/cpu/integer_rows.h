// Rows of activations as integers: what a product with a QuantizedMatrix reads.
//
// Any instruction set computes the same bits here: every operation is exact or rounds each element
// by itself, and the reference is `quantize_activations` in fabric/kernels/quantized.py.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "bf16.h"
#include "quantized_matrix.h"

namespace fabric {

// A row, in the 2-byte elements of Rows: values, then for each group a scale and, for weights of 4
// bits, what their minimum is multiplied by: the sum of the values * the scale.
// Values lie in the order in which lanes meet them (see `lane_order`, `byte_order`).
struct IntegerRow {
  int16_t* values;
  float* scales;
  float* offsets;

  IntegerRow(Bf16* data, const QuantizedMatrix& weight)
      : values(reinterpret_cast<int16_t*>(data)),
        scales(reinterpret_cast<float*>(data + weight.padded_inputs())),
        offsets(scales + weight.groups()) {}
  // The values, where the weight takes bytes.
  int8_t* bytes() const { return reinterpret_cast<int8_t*>(values); }
};

// 2-byte elements of a row of `inputs`, at worst: groups of 32 inputs.
inline int integer_row_elements(int inputs) {
  const int padded = round_up(inputs, kIntegerStep);
  return padded + padded / 32 * 4;
}

// The largest magnitude of `count` bfloat16 (a multiple of 16). Magnitudes compare like their bits,
// NaN above all, so one NaN makes the scale NaN and with it every output.
inline float largest_magnitude(const Bf16* x, int count) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < count; i += 16) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)(x + i));
    largest = _mm256_max_epu16(largest, _mm256_and_si256(bits, magnitude));
  }
  alignas(32) Bf16 lanes[16];
  _mm256_store_si256((__m256i*)lanes, largest);
  Bf16 result = 0;
  for (const Bf16 lane : lanes) result = lane > result ? lane : result;
  return to_float(result);
}

// 16 values in the order of their lanes: a pair of lanes holds inputs (i, i + 2) of a word of
// 8-bit values, (i, i + 4) of a word of 4-bit values, so that shifts alone take a word apart.
inline __m256i lane_order(__m256i values, int bits) {
  const __m256i four = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  const __m256i eight = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  return _mm256_shuffle_epi8(values, bits == 8 ? four : eight);
}

// 16 values in 8 bits: of each word of 4-bit values the even inputs, then the odd ones.
inline __m128i byte_order(__m256i values) {
  const __m128i narrow =
      _mm_packs_epi16(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  return _mm_shuffle_epi8(narrow, order);
}

inline __m256i round_8(const Bf16* x, __m256 inverse, __m256i levels) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x));
  const __m256 value = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse));
  const __m256i low = _mm256_sub_epi32(_mm256_setzero_si256(), levels);
  return _mm256_max_epi32(_mm256_min_epi32(rounded, levels), low);
}

inline void add_offsets(const QuantizedMatrix& weight, int given, IntegerRow row) {
  for (int group = 0; group < weight.groups(); ++group) {
    __m256i sum = _mm256_setzero_si256();
    const InputGroup inputs = weight.group(group);
    const int end = inputs.end < given ? inputs.end : given;
    for (int i = inputs.begin; i < end; i += 16) {
      const __m256i values =
          weight.by_bytes()
              ? _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(row.bytes() + i)))
              : _mm256_loadu_si256((const __m256i*)(row.values + i));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(values, _mm256_set1_epi16(1)));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256((__m256i*)lanes, sum);
    int32_t total = 0;
    for (const int32_t lane : lanes) total += lane;
    row.offsets[group] = static_cast<float>(total) * row.scales[group];
  }
}

// Inputs [begin, end) with one scale, which is given back.
inline float quantize_inputs(const Bf16* x, const QuantizedMatrix& weight, IntegerRow row,
                             int begin, int end) {
  const auto levels = static_cast<float>(weight.levels());
  const __m256i most = _mm256_set1_epi32(weight.levels());
  float scale = weight.input_scale();
  float inverse = 1.0f / scale;
  if (scale == 0.0f) {
    const float largest = largest_magnitude(x + begin, end - begin);
    scale = largest / levels;
    inverse = largest == 0.0f ? 0.0f : levels / largest;
  }
  for (int i = begin; i < end; i += 16) {
    const __m256i low = round_8(x + i, _mm256_set1_ps(inverse), most);
    const __m256i high = round_8(x + i + 8, _mm256_set1_ps(inverse), most);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    if (weight.by_bytes()) {
      _mm_storeu_si128((__m128i*)(row.bytes() + i), byte_order(both));
    } else {
      _mm256_storeu_si256((__m256i*)(row.values + i), lane_order(both, weight.bits()));
    }
  }
  return scale;
}

// `x` holds the weight's inputs and zeros up to a multiple of 32; it may lie where `row` does.
// Scales and sums may lie where a plain row would have none of its values.
inline void quantize_row(const Bf16* x, const QuantizedMatrix& weight, IntegerRow row) {
  const int given = round_up(weight.inputs(), 32);
  for (int chunk = 0; chunk < weight.chunks(); ++chunk) {
    const int last = weight.first_group(chunk + 1);
    for (int group = weight.first_group(chunk); group < last;) {
      const int behind = weight.by_token() ? last : group + 1;  // up to there one scale
      const int end = weight.group(behind - 1).end;
      const float scale = quantize_inputs(x, weight, row, weight.group(group).begin,
                                          end < given ? end : given);
      for (; group < behind; ++group) row.scales[group] = scale;
    }
  }
  const int width_bytes = weight.by_bytes() ? 1 : 2;
  std::memset(row.bytes() + given * width_bytes, 0,
              (weight.padded_inputs() - given) * width_bytes);
  if (weight.bits() == 4) add_offsets(weight, given, row);
}

}  // namespace fabric
