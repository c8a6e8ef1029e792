// Packed weights: bf16, float, int8 and int4, and what the inner loop of a product makes of them.
//
// Sixteen outputs side by side, inputs in quads of two pairs: [ceil(out / 16)][ceil(in / 4)][2][32], so that a thread
// reads its share as one stream. The 32 numbers of a pair lie output by output where one instruction multiplies pairs,
// else sixteen even inputs before sixteen odd ones. int4 has two numbers in a byte, the first pair's low.
#pragma once
#include "team.h"
#include "vector.h"

#if defined(__AVX512BF16__)
constexpr bool PAIRED = true;  // one instruction multiplies pairs of bf16
#else
constexpr bool PAIRED = false;
#endif

enum Format : int64_t { PLAIN = 0, INT8 = 8, INT4 = 4 };

constexpr int64_t GROUP_INPUTS = 32;  // of int4, that share a scale

inline int64_t quads_of(int64_t inputs) { return (inputs + 3) / 4; }
inline int64_t blocks_of(int64_t outputs) { return (outputs + LANES - 1) / LANES; }

// Two inputs of one row, as they lie in memory.
template <class E>
struct Row;
template <>
struct Row<bf16> {
    typedef uint32_t Pair;
};
template <>
struct Row<float> {
    typedef uint64_t Pair;
};

struct Pairs {  // of sixteen outputs, in float
    V even, odd;
};

inline V multiply_pair(V sums, Pairs weights, uint64_t pair) {
    float both[2];
    memcpy(both, &pair, 8);
    sums += weights.even * both[0];
    return sums + weights.odd * both[1];
}
inline V multiply_pair(V sums, Pairs weights, uint32_t pair) {
    const uint32_t even_bits = pair << 16, odd_bits = pair & 0xffff0000u;
    float even, odd;
    memcpy(&even, &even_bits, 4);
    memcpy(&odd, &odd_bits, 4);
    sums += weights.even * even;
    return sums + weights.odd * odd;
}

typedef int8_t V8 __attribute__((vector_size(16)));
inline V widened(const void* sixteen) {
    V8 values;
    memcpy(&values, sixteen, 16);
    return __builtin_convertvector(values, V);
}

// load(quad, which): the first or second pair of a quad's weights, as multiply_pair wants them.
template <class E, Format FORMAT>
struct Weights;

template <>
struct Weights<float, PLAIN> {
    static constexpr int64_t QUAD_BYTES = 256;
    static Pairs load(const uint8_t* quad, int which) {
        const float* from = (const float*)quad + which * 32;
        return {::load(from), ::load(from + LANES)};
    }
};

template <class E>
struct Weights<E, INT8> {
    static constexpr int64_t QUAD_BYTES = 64;
    static Pairs load(const uint8_t* quad, int which) {
        return {widened(quad + which * 32), widened(quad + which * 32 + LANES)};
    }
};

template <class E>
struct Weights<E, INT4> {
    static constexpr int64_t QUAD_BYTES = 32;
    static Pairs load(const uint8_t* quad, int which) {
        uint8_t half[2][LANES];
        for (int i = 0; i < 32; i++) half[i / LANES][i % LANES] = uint8_t(((quad[i] >> (4 * which)) & 15) - 8);
        return {widened(half[0]), widened(half[1])};
    }
};

#if defined(__AVX512BF16__)
inline V multiply_pair(V sums, __m512i weights, uint32_t pair) {
    return (V)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(int(pair)));
}

template <>
struct Weights<bf16, PLAIN> {
    static constexpr int64_t QUAD_BYTES = 128;
    static __m512i load(const uint8_t* quad, int which) { return _mm512_loadu_si512(quad + which * 64); }
};

template <>
struct Weights<bf16, INT8> {
    static constexpr int64_t QUAD_BYTES = 64;
    static __m512i load(const uint8_t* quad, int which) {
        // Every int8 is a bf16.
        const __m128i* from = (const __m128i*)(quad + which * 32);
        const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
        const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
        return (__m512i)_mm512_cvtne2ps_pbh(second, first);
    }
};

template <>
struct Weights<bf16, INT4> {
    static constexpr int64_t QUAD_BYTES = 32;
    static __m512i load(const uint8_t* quad, int which) {
        // bf16 of -8 to 7, twice: the permutation reads five bits, of which the fifth belongs to the other number.
        const __m512i table = _mm512_set_epi16(
            0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0x0000, -0x4080, -0x4000, -0x3fc0, -0x3f80, -0x3f60,
            -0x3f40, -0x3f20, -0x3f00, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0x0000, -0x4080, -0x4000,
            -0x3fc0, -0x3f80, -0x3f60, -0x3f40, -0x3f20, -0x3f00);
        const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)quad));
        return _mm512_permutexvar_epi16(which ? _mm512_srli_epi16(both, 4) : both, table);
    }
};
#else
template <>
struct Weights<bf16, PLAIN> {
    static constexpr int64_t QUAD_BYTES = 128;
    static Pairs load(const uint8_t* quad, int which) {
        const bf16* from = (const bf16*)quad + which * 32;
        return {::load(from), ::load(from + LANES)};
    }
};
#endif

// Where input `which` of a pair, for one of sixteen outputs, lies among the pair's 32 numbers.
template <class E>
constexpr int place_in_pair(int lane, int which) {
    return PAIRED && sizeof(E) == 2 ? 2 * lane + which : which * LANES + lane;
}

// Calls `put(output, input, quad, pair of the quad, place in the pair)` for every number of a packed matrix.
template <class E, class Put>
void each_number(const Worker& worker, int64_t outputs, int64_t inputs, Put put) {
    const int64_t quads = quads_of(inputs), blocks = blocks_of(outputs);
    for (int64_t block = worker.begin(blocks); block < worker.end(blocks); block++)
        for (int lane = 0; lane < LANES; lane++)
            for (int64_t quad = 0; quad < quads; quad++)
                for (int i = 0; i < 4; i++)
                    put(block * LANES + lane, quad * 4 + i, block * quads + quad, i / 2, place_in_pair<E>(lane, i % 2));
}

template <class E>
void pack_plain(const Worker& worker, const E* weights, int64_t outputs, int64_t inputs, E* packed) {
    each_number<E>(worker, outputs, inputs, [=](int64_t o, int64_t i, int64_t quad, int pair, int place) {
        packed[quad * 64 + pair * 32 + place] = o < outputs && i < inputs ? weights[o * inputs + i] : E{};
    });
}
template <class E>
void pack_int8(const Worker& worker, const int8_t* weights, int64_t outputs, int64_t inputs, int8_t* packed) {
    each_number<E>(worker, outputs, inputs, [=](int64_t o, int64_t i, int64_t quad, int pair, int place) {
        packed[quad * 64 + pair * 32 + place] = o < outputs && i < inputs ? weights[o * inputs + i] : int8_t(0);
    });
}
// From two in a byte along the inputs, the even one low; each plus 8.
template <class E>
void pack_int4(const Worker& worker, const uint8_t* weights, int64_t outputs, int64_t inputs, uint8_t* packed) {
    each_number<E>(worker, outputs, inputs, [=](int64_t o, int64_t i, int64_t quad, int pair, int place) {
        const bool there = o < outputs && i < inputs;
        const uint8_t value = there ? (weights[(o * inputs + i) / 2] >> (4 * (i % 2))) & 15 : 8;
        uint8_t& byte = packed[quad * 32 + place];
        byte = pair ? uint8_t(byte | value << 4) : value;
    });
}

// One number of a packed matrix, its scale included.
template <class E>
float number_at(const void* packed, const float* scales, Format format, int64_t inputs, int64_t o, int64_t i) {
    const int64_t block = o / LANES, lane = o % LANES, quad = block * quads_of(inputs) + i / 4;
    const int pair = int(i % 4 / 2), place = place_in_pair<E>(int(lane), int(i % 2));
    if (format == PLAIN) return to_float(((const E*)packed)[quad * 64 + pair * 32 + place]);
    if (format == INT8) return float(((const int8_t*)packed)[quad * 64 + pair * 32 + place]) * scales[o];
    const int groups = int(inputs / GROUP_INPUTS);
    const int value = ((((const uint8_t*)packed)[quad * 32 + place] >> (4 * pair)) & 15) - 8;
    return float(value) * scales[(block * groups + i / GROUP_INPUTS) * LANES + lane];
}
