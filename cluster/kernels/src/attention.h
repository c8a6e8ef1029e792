// Attention of new tokens over blocks of keys and values, and what comes before it: norms of heads, rotation, storing.
//
// A block holds 16 tokens of every head: keys [head size][16], so that sixteen scores are one vector; values
// [16][head size rounded up to 16]. Each token is computed alone, over its own context in order: its result does not
// depend on what else is in the step, nor on how its prompt was cut into chunks.
#pragma once
#include <vector>

#include "team.h"
#include "vector.h"

constexpr int64_t BLOCK_TOKENS = 16;

struct Heads {
    int64_t queries, keys, size;  // of queries, of keys and values; numbers in one
    int64_t rounded;              // size, rounded up to whole vectors
    float scaling, epsilon;
};

struct Cache {
    void* keys;    // [blocks][heads][size][16]
    void* values;  // [blocks][heads][16][rounded]
};

struct Tokens {  // of a step
    int64_t count;
    const int64_t* positions;   // [count]
    const int64_t* sequences;   // [count] row of the table
    const int64_t* table;       // [sequences][table_width] blocks in order of position
    int64_t table_width;
};

inline int64_t block_of(const Tokens& tokens, int64_t t, int64_t position) {
    return tokens.table[tokens.sequences[t] * tokens.table_width + position / BLOCK_TOKENS];
}

// Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) of `size` numbers; null weights leave them be.
template <class E>
void normalize(const float* x, const float* weights, int64_t size, float epsilon, E* out) {
    V squares = {};
    for (int64_t i = 0; i < size; i += LANES) {
        const V value = load_some(x + i, size - i);
        squares += value * value;
    }
    const float factor = 1.0f / sqrtf(sum(squares) / float(size) + epsilon);
    for (int64_t i = 0; i < size; i += LANES)
        store_some(out + i, load_some(x + i, size - i) * factor * load_some(weights + i, size - i), size - i);
}

// Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves against each other; null angles: none.
inline void rotate(float* x, const float* cosines, const float* sines, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cosines[i] - second * sines[i];
        x[i + half] = second * cosines[i + half] + first * sines[i + half];
    }
}

struct HeadWeights {
    const float *q_norm, *k_norm;  // [size] or null
    const float *cosines, *sines;  // [positions][size] or null
};

// qkv [tokens][(queries + 2 keys) * size]: queries are made ready in place, keys and values go into the cache.
template <class E>
void store_heads(const Worker& worker, float* qkv, const Heads& heads, const HeadWeights& weights, const Cache& cache,
                 const Tokens& tokens) {
    const int64_t size = heads.size, width = (heads.queries + 2 * heads.keys) * size;
    for (int64_t t = worker.begin(tokens.count); t < worker.end(tokens.count); t++) {
        const int64_t position = tokens.positions[t], offset = position % BLOCK_TOKENS;
        float* row = qkv + t * width;
        for (int64_t n = 0; n < heads.queries + heads.keys; n++) {
            float* head = row + n * size;
            const float* norm = n < heads.queries ? weights.q_norm : weights.k_norm;
            if (norm) normalize(head, norm, size, heads.epsilon, head);
            if (weights.cosines) rotate(head, weights.cosines + position * size, weights.sines + position * size, size);
        }
        const int64_t block = block_of(tokens, t, position);
        const float *k = row + heads.queries * size, *v = k + heads.keys * size;
        for (int64_t n = 0; n < heads.keys; n++) {
            E* keys = (E*)cache.keys + (block * heads.keys + n) * size * BLOCK_TOKENS + offset;
            E* values = (E*)cache.values + ((block * heads.keys + n) * BLOCK_TOKENS + offset) * heads.rounded;
            E rounded[LANES];
            for (int64_t i = 0; i < size; i += LANES) {
                store(rounded, load_some(k + n * size + i, size - i));
                for (int64_t j = 0; j < LANES && i + j < size; j++) keys[(i + j) * BLOCK_TOKENS] = rounded[j];
                store(values + i, load_some(v + n * size + i, size - i));
            }
        }
    }
    worker.wait();
}

constexpr int MAX_GROUP = 8;  // query heads at once that share a key head

// HEADS queries of one token over its context, running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).
template <int HEADS, class E>
void attend_heads(const float* q, const Heads& heads, const Cache& cache, const Tokens& tokens, int64_t t, int64_t key,
                  float* sums, E* out) {
    const int64_t size = heads.size, rounded = heads.rounded, length = tokens.positions[t] + 1;
    float most[HEADS], total[HEADS] = {};
    for (int g = 0; g < HEADS; g++) most[g] = -INFINITY;
    for (int64_t i = 0; i < HEADS * rounded; i++) sums[i] = 0;
    for (int64_t start = 0; start < length; start += BLOCK_TOKENS) {
        const int64_t block = block_of(tokens, t, start), there = length - start < LANES ? length - start : LANES;
        const E* k = (const E*)cache.keys + (block * heads.keys + key) * size * BLOCK_TOKENS;
        const E* v = (const E*)cache.values + (block * heads.keys + key) * BLOCK_TOKENS * rounded;
        V scores[HEADS] = {};
        for (int64_t i = 0; i < size; i++) {
            const V column = load(k + i * BLOCK_TOKENS);
            for (int g = 0; g < HEADS; g++) scores[g] += column * q[g * size + i];
        }
        float shares[HEADS][LANES];
        for (int g = 0; g < HEADS; g++) {
            V score = scores[g] * heads.scaling;
            // Selected, not added to: what lies beyond the context may be anything.
            score = where_less(lane_numbers(), splat(float(there)), score, splat(-INFINITY));
            const float peak = largest(score);
            if (peak > most[g]) {
                const float shrink = expf(most[g] - peak);
                total[g] *= shrink;
                for (int64_t i = 0; i < rounded; i++) sums[g * rounded + i] *= shrink;
                most[g] = peak;
            }
            const V share = exponential(score - most[g]);
            total[g] += sum(share);
            store(shares[g], share);
        }
        for (int64_t i = 0; i < rounded; i += LANES) {
            V part[HEADS];
            for (int g = 0; g < HEADS; g++) part[g] = load(sums + g * rounded + i);
            for (int64_t s = 0; s < there; s++) {
                const V value = load(v + s * rounded + i);
                for (int g = 0; g < HEADS; g++) part[g] += value * shares[g][s];
            }
            for (int g = 0; g < HEADS; g++) store(sums + g * rounded + i, part[g]);
        }
    }
    for (int g = 0; g < HEADS; g++)
        for (int64_t i = 0; i < size; i += LANES)
            store_some(out + g * size + i, load(sums + g * rounded + i) / total[g], size - i);
}

// out [tokens][queries * size] from the queries in qkv. All threads of a team call it.
template <class E>
void attend(const Worker& worker, const float* qkv, const Heads& heads, const Cache& cache, const Tokens& tokens,
            E* out) {
    const int64_t group = heads.queries / heads.keys, width = (heads.queries + 2 * heads.keys) * heads.size;
    static thread_local std::vector<float> sums;
    sums.resize(MAX_GROUP * heads.rounded);
    // Contexts differ in length: who is done takes the next.
    for (int64_t unit; (unit = worker.team.take()) < tokens.count * heads.keys;) {
        const int64_t t = unit / heads.keys, key = unit % heads.keys;
        for (int64_t g = 0; g < group; g += MAX_GROUP) {
            const int64_t n = key * group + g;
            const float* q = qkv + t * width + n * heads.size;
            E* to = out + (t * heads.queries + n) * heads.size;
            switch (group - g < MAX_GROUP ? group - g : MAX_GROUP) {
                case 1: attend_heads<1, E>(q, heads, cache, tokens, t, key, sums.data(), to); break;
                case 2: attend_heads<2, E>(q, heads, cache, tokens, t, key, sums.data(), to); break;
                case 3: attend_heads<3, E>(q, heads, cache, tokens, t, key, sums.data(), to); break;
                case 4: attend_heads<4, E>(q, heads, cache, tokens, t, key, sums.data(), to); break;
                case 5: attend_heads<5, E>(q, heads, cache, tokens, t, key, sums.data(), to); break;
                case 6: attend_heads<6, E>(q, heads, cache, tokens, t, key, sums.data(), to); break;
                case 7: attend_heads<7, E>(q, heads, cache, tokens, t, key, sums.data(), to); break;
                default: attend_heads<8, E>(q, heads, cache, tokens, t, key, sums.data(), to);
            }
        }
    }
    worker.wait();
}
