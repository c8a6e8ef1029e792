// Sixteen floats at a time, on whatever the machine has: one vector of AVX-512, two of AVX, four of NEON or SSE. Two element
// types: float, and bf16, whose arithmetic is done in float.
//
// Sixteen are made of the machine's own vectors here. Of a vector wider than the machine's GCC would compare one number
// at a time and keep all in memory: AVX2 then multiplies at a fifth of its speed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int OWN_LANES = 16;  // of one of the machine's vectors
#elif defined(__AVX__)
constexpr int OWN_LANES = 8;
#else
constexpr int OWN_LANES = 4;
#endif

typedef float Own __attribute__((vector_size(4 * OWN_LANES)));
typedef int32_t OwnI __attribute__((vector_size(4 * OWN_LANES)));
typedef uint32_t OwnU __attribute__((vector_size(4 * OWN_LANES)));
typedef uint16_t OwnH __attribute__((vector_size(2 * OWN_LANES)));
typedef int8_t OwnB __attribute__((vector_size(OWN_LANES)));

template <class Half>
struct Two {
    Half low, high;
};
template <int COUNT>
struct Wide {
    typedef Two<typename Wide<COUNT / 2>::type> type;
};
template <>
struct Wide<OWN_LANES> {
    typedef Own type;
};
typedef Wide<LANES>::type V;

#define FOR_TWO(OP)                                                                                      \
    template <class H>                                                                                   \
    inline Two<H> operator OP(Two<H> a, Two<H> b) { return {a.low OP b.low, a.high OP b.high}; }         \
    template <class H>                                                                                   \
    inline Two<H> operator OP(Two<H> a, float b) { return {a.low OP b, a.high OP b}; }                   \
    template <class H>                                                                                   \
    inline Two<H> operator OP(float a, Two<H> b) { return {a OP b.low, a OP b.high}; }                   \
    template <class H, class Other>                                                                      \
    inline Two<H>& operator OP##=(Two<H>& a, Other b) { return a = a OP b; }
FOR_TWO(+)
FOR_TWO(-)
FOR_TWO(*)
FOR_TWO(/)
#undef FOR_TWO
template <class H>
inline Two<H> operator-(Two<H> a) { return {-a.low, -a.high}; }

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

// What reads, writes or widens a vector, for the machine's own ones and for those made of two.
template <class T>
struct Lanes;

template <>
struct Lanes<Own> {
    static constexpr int COUNT = OWN_LANES;
    static Own load(const float* from) {
        Own value;
        memcpy(&value, from, sizeof value);
        return value;
    }
    static Own load(const bf16* from) { return of_bits(widened((const uint16_t*)from) << 16); }
    static Own load(const int8_t* from) {
#if defined(__AVX512F__)
        return (Own)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
        return (Own)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
        OwnB values;
        memcpy(&values, from, sizeof values);
        return __builtin_convertvector(values, Own);
#endif
    }
    // Four bits of each word, as numbers from 0 to 15.
    static Own load_four_bits(const uint16_t* words, int shift) {
        return __builtin_convertvector((OwnI)(widened(words) >> shift & 15), Own);
    }
    // The same four numbers again and again.
    static Own repeat(const float* four) {
#if defined(__AVX512F__)
        return (Own)_mm512_broadcast_f32x4(_mm_loadu_ps(four));
#elif defined(__AVX__)
        return (Own)_mm256_broadcast_ps((const __m128*)four);
#else
        return load(four);
#endif
    }
    static void store(float* to, Own value) { memcpy(to, &value, sizeof value); }
    static void store(bf16* to, Own value) {
#if defined(__AVX512BF16__)
        __m256bh half = _mm512_cvtneps_pbh((__m512)value);
        memcpy(to, &half, 32);
#else
        // To nearest, ties to even; NaN stays NaN whatever its payload.
        OwnU bits;
        memcpy(&bits, &value, sizeof bits);
        OwnU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        OwnI is_nan = value != value;
        OwnH half = __builtin_convertvector((OwnU)is_nan ? OwnU{} + 0x7fc0 : rounded, OwnH);
        memcpy(to, &half, sizeof half);
#endif
    }

   private:
    static OwnU widened(const uint16_t* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
        return (OwnU)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
        OwnH half;
        memcpy(&half, from, sizeof half);
        return __builtin_convertvector(half, OwnU);
#endif
    }
    static Own of_bits(OwnU bits) {
        Own value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
};

template <class H>
struct Lanes<Two<H>> {
    static constexpr int HALF = Lanes<H>::COUNT, COUNT = 2 * HALF;
    template <class E>
    static Two<H> load(const E* from) { return {Lanes<H>::load(from), Lanes<H>::load(from + HALF)}; }
    static Two<H> load_four_bits(const uint16_t* words, int shift) {
        return {Lanes<H>::load_four_bits(words, shift), Lanes<H>::load_four_bits(words + HALF, shift)};
    }
    static Two<H> repeat(const float* four) { return {Lanes<H>::repeat(four), Lanes<H>::repeat(four)}; }
    template <class E>
    static void store(E* to, Two<H> value) {
        Lanes<H>::store(to, value.low);
        Lanes<H>::store(to + HALF, value.high);
    }
};

template <class E>
inline V load(const E* from) { return Lanes<V>::load(from); }
template <class E>
inline void store(E* to, V value) { Lanes<V>::store(to, value); }
inline V splat(float value) { return V{} + value; }

// 0, 1, 2 and so on.
inline V lane_numbers() {
    static constexpr float NUMBERS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(NUMBERS);
}

// `then` in the lanes in which a < b.
inline Own where_less(Own a, Own b, Own then, Own otherwise) { return a < b ? then : otherwise; }
template <class H>
inline Two<H> where_less(Two<H> a, Two<H> b, Two<H> then, Two<H> otherwise) {
    return {where_less(a.low, b.low, then.low, otherwise.low), where_less(a.high, b.high, then.high, otherwise.high)};
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

// Half on half, whatever the vectors are: the same bits everywhere.
inline float sum(Own value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);
#else
    float lanes[OWN_LANES];
    Lanes<Own>::store(lanes, value);
    for (int width = OWN_LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
#endif
}
template <class H>
inline float sum(Two<H> value) { return sum(value.low + value.high); }

inline float largest(Own value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)value);
#else
    float lanes[OWN_LANES];
    Lanes<Own>::store(lanes, value);
    float most = lanes[0];
    for (int i = 1; i < OWN_LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
#endif
}
template <class H>
inline float largest(Two<H> value) { return largest(where_less(value.low, value.high, value.high, value.low)); }

// e^x to about one unit in the last place: 2^n times a polynomial in the rest (Cephes' expf). NaN stays NaN.
inline Own exponential(Own x) {
    const Own high = Own{} + 88.0f, low = Own{} - 87.0f;
    Own clamped = where_less(high, x, high, x);
    clamped = where_less(clamped, low, low, clamped);
    Own scaled = clamped * 1.44269504088896341f;
    Own rounded = (scaled + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
    Own rest = clamped - rounded * 0.693359375f;
    rest = rest + rounded * 2.12194440e-4f;
    Own value = Own{} + 1.9875691500e-4f;
    value = value * rest + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * rest * rest + rest + 1.0f;
    OwnI exponent = (__builtin_convertvector(rounded, OwnI) + 127) << 23;
    Own power;
    memcpy(&power, &exponent, sizeof power);
    Own result = where_less(x, low, Own{}, value * power);
    return x != x ? x : result;
}
template <class H>
inline Two<H> exponential(Two<H> x) { return {exponential(x.low), exponential(x.high)}; }
