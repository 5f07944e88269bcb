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
  template <class Value>  // two of 16 bits, or four of 8
  static I word(const Value* values) {
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

  // Levels 4 bits wide, the even inputs of a word (0) or its odd ones (1), as bytes.
  template <int kPart>
  static I levels(I words) {
    if constexpr (kPart == 1) words = _mm512_srli_epi16(words, 4);
    return _mm512_and_si512(words, _mm512_set1_epi8(15));
  }
  // Four products of a column: all of them stay below 32 bits.
  static I dot_bytes(I narrow, I levels, I inputs) {
    return _mm512_dpbusd_epi32(narrow, levels, inputs);
  }
  static I widen(I narrow) { return narrow; }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static F to_float(I sum) { return _mm512_cvtepi32_ps(sum); }
};

}  // namespace fabric
