// Sixteen columns of 32-bit sums, for products of integers: VNNI multiplies pairs and adds in one.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fabric {

struct IntegerAvx512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int kColumns = 16;
  static constexpr int kRows = 8;

  static I zero() { return _mm512_setzero_si512(); }
  static I load(const uint32_t* words) { return _mm512_loadu_si512(words); }
  static I pair(const int16_t* values) {
    int32_t bits;
    std::memcpy(&bits, values, sizeof bits);
    return _mm512_set1_epi32(bits);
  }

  template <int kBits, int kPart>
  static I part(I words) {
    if constexpr (kBits == 8 && kPart == 0) words = _mm512_slli_epi16(words, 8);
    if constexpr (kBits == 8) return _mm512_srai_epi16(words, 8);
    if constexpr (kPart == 3) return _mm512_srli_epi16(words, 12);
    return _mm512_and_si512(_mm512_srli_epi16(words, 4 * kPart), _mm512_set1_epi16(15));
  }

  static I dot(I sum, I weights, I inputs) { return _mm512_dpwssd_epi32(sum, weights, inputs); }
  static I less_eights(I sum, int32_t inputs) {
    return _mm512_sub_epi32(sum, _mm512_set1_epi32(inputs * 8));
  }
  static void add_scaled(float* total, bool first, I sum, float input_scale, const float* scales) {
    const F scale = _mm512_mul_ps(_mm512_set1_ps(input_scale), _mm512_loadu_ps(scales));
    const F product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
    const F before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(total);
    _mm512_storeu_ps(total, _mm512_add_ps(before, product));
  }
};

}  // namespace fabric
