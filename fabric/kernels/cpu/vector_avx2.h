// Eight floats, for the code that all instruction sets share.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "bf16.h"

namespace fabric {

struct Avx2Vector {
  using F = __m256;
  static constexpr int kLanes = 8;

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  // Past the caches, to a multiple of 32 bytes: for what is not read again in this step.
  static void stream(float* to, F value) { _mm256_stream_ps(to, value); }
  static F load_bf16(const Bf16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load_half(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  }
  static void store_bf16(Bf16* to, F value) { _mm_storeu_si128((__m128i*)to, narrow(value)); }

  // The first `count` lanes (may be more than there are); the rest read as zero or stay unwritten.
  static F load_first(const float* from, int count) {
    if (count >= kLanes) return load(from);
    alignas(32) float all[8] = {};
    if (count > 0) std::memcpy(all, from, count * sizeof(float));
    return _mm256_load_ps(all);
  }
  static F load_bf16_first(const Bf16* from, int count) {
    if (count >= kLanes) return load_bf16(from);
    alignas(16) Bf16 all[8] = {};
    if (count > 0) std::memcpy(all, from, count * sizeof(Bf16));
    return load_bf16(all);
  }
  static void store_bf16_first(Bf16* to, F value, int count) {
    if (count >= kLanes) return store_bf16(to, value);
    alignas(16) Bf16 all[8];
    store_bf16(all, value);
    if (count > 0) std::memcpy(to, all, count * sizeof(Bf16));
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(F value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static float maximum(F value) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }

  // Lanes [begin, end) of `value`, `other` elsewhere.
  static F between(F value, int begin, int end, F other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i before_end = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane);
    const __m256i from_begin = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(begin - 1));
    return _mm256_blendv_ps(other, value,
                            _mm256_castsi256_ps(_mm256_and_si256(before_end, from_begin)));
  }

  // As Avx512Vector::exp; 2^n is built in the exponent field, so n is held within it.
  static F exp(F x) {
    x = _mm256_min_ps(_mm256_max_ps(x, set(-87.0f)), set(88.0f));
    const F t = _mm256_mul_ps(x, set(1.44269504f));
    const F n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F f = _mm256_sub_ps(t, n);
    F p = set(1.535336188319500e-4f);
    p = _mm256_fmadd_ps(p, f, set(1.339887440266574e-3f));
    p = _mm256_fmadd_ps(p, f, set(9.618437357674640e-3f));
    p = _mm256_fmadd_ps(p, f, set(5.550332471162809e-2f));
    p = _mm256_fmadd_ps(p, f, set(2.402264791363012e-1f));
    p = _mm256_fmadd_ps(p, f, set(6.931472028550421e-1f));
    p = _mm256_fmadd_ps(p, f, set(1.0f));
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
  }

 private:
  // Round to nearest even, NaN stays NaN.
  static __m128i narrow(F value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_add_epi32(bits, bias);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

}  // namespace fabric
