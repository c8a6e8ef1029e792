// Sixteen floats at a time, on whatever the machine has: GCC's and Clang's vector extensions become AVX-512, AVX2,
// NEON or plain code. Two element types: float, and bf16, whose arithmetic is done in float.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float V __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
typedef uint32_t VU __attribute__((vector_size(64)));
typedef uint16_t VH __attribute__((vector_size(32)));
constexpr int LANES = 16;

struct bf16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

inline VU bits_of(V value) {
    VU bits;
    memcpy(&bits, &value, 64);
    return bits;
}
inline V of_bits(VU bits) {
    V value;
    memcpy(&value, &bits, 64);
    return value;
}
inline V splat(float value) { return V{} + value; }

inline V load(const float* from) {
    V value;
    memcpy(&value, from, 64);
    return value;
}
inline V load(const bf16* from) {
    VH half;
    memcpy(&half, from, 32);
    return of_bits(__builtin_convertvector(half, VU) << 16);
}
inline void store(float* to, V value) { memcpy(to, &value, 64); }
inline void store(bf16* to, V value) {
#if defined(__AVX512BF16__)
    __m256bh half = _mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &half, 32);
#else
    // To nearest, ties to even; NaN stays NaN whatever its payload.
    VU bits = bits_of(value);
    VU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    VI is_nan = value != value;
    VH half = __builtin_convertvector((VU)is_nan ? VU{} + 0x7fc0 : rounded, VH);
    memcpy(to, &half, 32);
#endif
}

// The first `count` of sixteen; what is not there reads as zero and is not written.
template <class E>
inline V load_some(const E* from, int64_t count) {
    if (count >= LANES) return load(from);
    E part[LANES] = {};
    memcpy(part, from, count * sizeof(E));
    return load(part);
}
template <class E>
inline void store_some(E* to, V value, int64_t count) {
    if (count >= LANES) return store(to, value);
    E part[LANES];
    store(part, value);
    memcpy(to, part, count * sizeof(E));
}

inline float sum(V value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);  // in the order below
#endif
    float lanes[LANES];
    store(lanes, value);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}
inline float largest(V value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)value);
#endif
    float lanes[LANES];
    store(lanes, value);
    float most = lanes[0];
    for (int i = 1; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

// e^x to about one unit in the last place: 2^n times a polynomial in the rest (Cephes' expf). NaN stays NaN.
inline V exponential(V x) {
    V clamped = x > splat(88.0f) ? splat(88.0f) : x;
    clamped = clamped < splat(-87.0f) ? splat(-87.0f) : clamped;
    V scaled = clamped * 1.44269504088896341f;
    V rounded = (scaled + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
    V rest = clamped - rounded * 0.693359375f;
    rest = rest + rounded * 2.12194440e-4f;
    V value = splat(1.9875691500e-4f);
    value = value * rest + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * rest * rest + rest + 1.0f;
    VI exponent = (__builtin_convertvector(rounded, VI) + 127) << 23;
    V power;
    memcpy(&power, &exponent, 64);
    V result = value * power;
    result = x < splat(-87.0f) ? V{} : result;
    return x != x ? x : result;
}
