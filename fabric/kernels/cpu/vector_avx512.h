// Sixteen floats, for the code that all instruction sets share.
#pragma once

#include <immintrin.h>

#include "bf16.h"

namespace fabric {

struct Avx512Vector {
  using F = __m512;
  static constexpr int kLanes = 16;

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  // Past the caches, to a multiple of 64 bytes: for what is not read again in this step.
  static void stream(float* to, F value) { _mm512_stream_ps(to, value); }
  static F load_bf16(const Bf16* from) { return widen(_mm256_loadu_si256((const __m256i*)from)); }
  static F load_half(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
  }
  static void store_bf16(Bf16* to, F value) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(value));
  }

  // The first `count` lanes (may be more than there are); the rest read as zero or stay unwritten.
  static F load_first(const float* from, int count) {
    return _mm512_maskz_loadu_ps(first(count), from);
  }
  static F load_bf16_first(const Bf16* from, int count) {
    return widen(_mm256_maskz_loadu_epi16(first(count), from));
  }
  static void store_bf16_first(Bf16* to, F value, int count) {
    _mm256_mask_storeu_epi16(to, first(count), (__m256i)_mm512_cvtneps_pbh(value));
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(F value) { return _mm512_reduce_add_ps(value); }
  static float maximum(F value) { return _mm512_reduce_max_ps(value); }

  // Lanes [begin, end) of `value`, `other` elsewhere.
  static F between(F value, int begin, int end, F other) {
    return _mm512_mask_blend_ps(first(end) & ~first(begin), other, value);
  }

  // 2^n * p(f) with a degree-6 polynomial on [-1/2, 1/2]: relative error about 1e-6, far below the
  // 4e-3 of the bfloat16 it is rounded to. Overflows to infinity; below -87 it stays at 1.6e-38.
  static F exp(F x) {
    const F t = _mm512_mul_ps(_mm512_max_ps(x, set(-87.0f)), set(1.44269504f));
    const F n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F f = _mm512_sub_ps(t, n);
    F p = set(1.535336188319500e-4f);
    p = _mm512_fmadd_ps(p, f, set(1.339887440266574e-3f));
    p = _mm512_fmadd_ps(p, f, set(9.618437357674640e-3f));
    p = _mm512_fmadd_ps(p, f, set(5.550332471162809e-2f));
    p = _mm512_fmadd_ps(p, f, set(2.402264791363012e-1f));
    p = _mm512_fmadd_ps(p, f, set(6.931472028550421e-1f));
    p = _mm512_fmadd_ps(p, f, set(1.0f));
    return _mm512_scalef_ps(p, n);
  }

 private:
  static F widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static __mmask16 first(int count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
  }
};

}  // namespace fabric
