// Eight columns of 32-bit sums, for products of integers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fabric {

struct IntegerAvx2 {
  using I = __m256i;
  using F = __m256;
  static constexpr int kColumns = 8;
  static constexpr int kRows = 6;  // of a block with two vectors of columns: 12 sums

  static I zero() { return _mm256_setzero_si256(); }
  static I load(const uint32_t* words) { return _mm256_loadu_si256((const __m256i*)words); }
  // Volatile, so that g++ reads it again for the next vector instead of keeping all of them: it
  // runs out of registers and spills sums (measured: 2 times slower).
  template <class Value>  // two of 16 bits, or four of 8
  static I word(const Value* values) {
    I result;
    asm volatile("vpbroadcastd %1, %0"
                 : "=x"(result)
                 : "m"(*reinterpret_cast<const char(*)[4]>(values)));
    return result;
  }

  // Part `kPart` of words of 8-bit values, or of 4-bit values (with 8 added), as lanes of 16 bits.
  template <int kBits, int kPart>
  static I part(I words) {
    if constexpr (kBits == 8 && kPart == 0) words = _mm256_slli_epi16(words, 8);
    if constexpr (kBits == 8) return _mm256_srai_epi16(words, 8);
    if constexpr (kPart == 3) return _mm256_srli_epi16(words, 12);
    return _mm256_and_si256(_mm256_srli_epi16(words, 4 * kPart), _mm256_set1_epi16(15));
  }

  static I dot(I sum, I weights, I inputs) {
    // The plain intrinsic is an addition to g++, which it reorders until the products spill.
    const I product = _mm256_madd_epi16(weights, inputs);
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
    return sum;
  }

  // Levels 4 bits wide, the even inputs of a word (0) or its odd ones (1), as bytes.
  template <int kPart>
  static I levels(I words) {
    if constexpr (kPart == 1) words = _mm256_srli_epi16(words, 4);
    return _mm256_and_si256(words, _mm256_set1_epi8(15));
  }
  // Four products of a column, in two lanes of 16 bits: eight times 2 * 15 * 127 fit there.
  static I dot_bytes(I narrow, I levels, I inputs) {
    const I product = _mm256_maddubs_epi16(levels, inputs);
    asm("vpaddw %1, %0, %0" : "+x"(narrow) : "x"(product));
    return narrow;
  }
  static I widen(I narrow) { return _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static F to_float(I sum) { return _mm256_cvtepi32_ps(sum); }
};

}  // namespace fabric
