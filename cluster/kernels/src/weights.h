// Packed weights: bf16, float, int8 and int4, and what the inner loop of a product makes of them.
//
// Sixteen outputs side by side, two inputs (a pair) at a time, in lines of 64 bytes (of float: 128) that hold one pair,
// or two of int8, or four of int4: [ceil(out / 16)][lines][line], so that a thread reads its share as one stream. The 32
// numbers of a pair lie output by output where one instruction multiplies pairs, else sixteen even inputs before sixteen
// odd ones. Of int4, the four pairs of a line share 32 words of 16 bits, the first pair's four bits lowest.
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

inline int64_t blocks_of(int64_t outputs) { return (outputs + LANES - 1) / LANES; }
// Even, as a line of int8 wants it; of int4, inputs come in whole groups.
inline int64_t pairs_of(int64_t inputs) { return (inputs + 3) / 4 * 2; }
inline int64_t lines_of(int64_t inputs, Format format) {
    return pairs_of(inputs) / (format == INT4 ? 4 : format == INT8 ? 2 : 1);
}

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

// load(line, which): one pair of a line's weights, as multiply_pair wants them.
template <class E, Format FORMAT>
struct Weights;

template <>
struct Weights<float, PLAIN> {
    static constexpr int64_t LINE_BYTES = 128, LINE_PAIRS = 1;
    static Pairs load(const uint8_t* line, int) {
        return {::load((const float*)line), ::load((const float*)line + LANES)};
    }
};

template <class E>
struct Weights<E, INT8> {
    static constexpr int64_t LINE_BYTES = 64, LINE_PAIRS = 2;
    static Pairs load(const uint8_t* line, int which) {
        const int8_t* from = (const int8_t*)line + which * 32;
        return {::load(from), ::load(from + LANES)};
    }
};

template <class E>
struct Weights<E, INT4> {
    static constexpr int64_t LINE_BYTES = 64, LINE_PAIRS = 4;
    static Pairs load(const uint8_t* line, int which) {
        const uint16_t* words = (const uint16_t*)line;
        return {Lanes<V>::load_four_bits(words, 4 * which) - 8.0f,
                Lanes<V>::load_four_bits(words + LANES, 4 * which) - 8.0f};
    }
};

#if defined(__AVX512BF16__)
inline V multiply_pair(V sums, __m512i weights, uint32_t pair) {
    return (V)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(int(pair)));
}

template <>
struct Weights<bf16, PLAIN> {
    static constexpr int64_t LINE_BYTES = 64, LINE_PAIRS = 1;
    static __m512i load(const uint8_t* line, int) { return _mm512_loadu_si512(line); }
};

template <>
struct Weights<bf16, INT8> {
    static constexpr int64_t LINE_BYTES = 64, LINE_PAIRS = 2;
    static __m512i load(const uint8_t* line, int which) {
        // Every int8 is a bf16.
        const __m128i* from = (const __m128i*)(line + which * 32);
        const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
        const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
        return (__m512i)_mm512_cvtne2ps_pbh(second, first);
    }
};

template <>
struct Weights<bf16, INT4> {
    static constexpr int64_t LINE_BYTES = 64, LINE_PAIRS = 4;
    static __m512i load(const uint8_t* line, int which) {
        // bf16 of -8 to 7, twice: the permutation reads five bits, of which the fifth belongs to the next number.
        const __m512i table = _mm512_set_epi16(
            0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0x0000, -0x4080, -0x4000, -0x3fc0, -0x3f80, -0x3f60,
            -0x3f40, -0x3f20, -0x3f00, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0x0000, -0x4080, -0x4000,
            -0x3fc0, -0x3f80, -0x3f60, -0x3f40, -0x3f20, -0x3f00);
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_loadu_si512(line), 4 * which), table);
    }
};
#else
template <>
struct Weights<bf16, PLAIN> {
    static constexpr int64_t LINE_BYTES = 64, LINE_PAIRS = 1;
    static Pairs load(const uint8_t* line, int) { return {::load((const bf16*)line), ::load((const bf16*)line + LANES)}; }
};
#endif

// Where input `which` of a pair, for one of sixteen outputs, lies among the pair's 32 numbers.
template <class E>
constexpr int place_in_pair(int lane, int which) {
    return PAIRED && sizeof(E) == 2 ? 2 * lane + which : which * LANES + lane;
}

// Calls `put(output, input, pair of all, place in the pair)` for every number of a packed matrix.
template <class E, class Put>
void each_number(const Worker& worker, int64_t outputs, int64_t inputs, Put put) {
    const int64_t pairs = pairs_of(inputs), blocks = blocks_of(outputs);
    for (int64_t block = worker.begin(blocks); block < worker.end(blocks); block++)
        for (int lane = 0; lane < LANES; lane++)
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int i = 0; i < 2; i++)
                    put(block * LANES + lane, pair * 2 + i, block * pairs + pair, place_in_pair<E>(lane, i));
}

// float, bf16 or int8.
template <class E, class Number>
void pack_numbers(const Worker& worker, const Number* weights, int64_t outputs, int64_t inputs, Number* packed) {
    each_number<E>(worker, outputs, inputs, [=](int64_t o, int64_t i, int64_t pair, int place) {
        packed[pair * 32 + place] = o < outputs && i < inputs ? weights[o * inputs + i] : Number{};
    });
}
// From two in a byte along the inputs, the even one low; each plus 8.
template <class E>
void pack_int4(const Worker& worker, const uint8_t* weights, int64_t outputs, int64_t inputs, uint16_t* packed) {
    each_number<E>(worker, outputs, inputs, [=](int64_t o, int64_t i, int64_t pair, int place) {
        const int value = o < outputs ? (weights[(o * inputs + i) / 2] >> (4 * (i % 2))) & 15 : 8;
        uint16_t& word = packed[pair / 4 * 32 + place];
        word = uint16_t(pair % 4 ? word | value << (4 * (pair % 4)) : value);
    });
}

// One number of a packed matrix, its scale included.
template <class E>
float number_at(const void* packed, const void* scales, Format format, int64_t inputs, int64_t o, int64_t i) {
    const int64_t block = o / LANES, lane = o % LANES, pair = block * pairs_of(inputs) + i / 2;
    const int place = place_in_pair<E>(int(lane), int(i % 2));
    if (format == PLAIN) return to_float(((const E*)packed)[pair * 32 + place]);
    if (format == INT8) return float(((const int8_t*)packed)[pair * 32 + place]) * ((const float*)scales)[o];
    const int value = ((((const uint16_t*)packed)[pair / 4 * 32 + place] >> (4 * (pair % 4))) & 15) - 8;
    const int64_t group = block * (inputs / GROUP_INPUTS) + i / GROUP_INPUTS;
    return float(value) * to_float(((const bf16*)scales)[group * LANES + lane]);
}
