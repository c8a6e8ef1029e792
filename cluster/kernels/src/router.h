// The router from the n-grams of texts to logits: bags of vectors, two small networks, a sketch, prototypes.
//
// One call instead of some sixty small tensor operations, each of which costs more than what it computes. A text is
// encoded by itself and in one order, so its logits do not depend, in any bit, on the texts beside it.
#pragma once
#include "prototypes.h"
#include <algorithm>

// y = second(gelu(first(x))): rows of weights one after another.
struct FeedForward {
    const float *first, *first_bias, *second, *second_bias;
    int64_t inputs, hidden, outputs;
};

// Of features without a vector of their own too: how much each speaks for which domains, and where these point to.
struct Votes {
    const int32_t* numbers;  // [slots], negative for features that do not vote; null if none do
    const int32_t* starts;   // [features + 1]: where the pairs of each begin
    const int32_t* domains;  // [pairs]
    const float* weights;    // [pairs]
    const float* vectors;    // [num_domains][width]
    FeedForward block;       // beside the identity
    int64_t num_domains;
};

struct TextEncoder {
    const int32_t* lexicon;  // [slots]: the row of a feature, or one of the two below
    const float* rarities;   // [rows + 2]: of each row, of silent features, of unknown ones
    const float* table;      // [rows][width]
    FeedForward block;       // beside the identity
    const int32_t* word_numbers;   // [slots], negative for words without a vector; null if there are no word vectors
    const uint16_t* word_vectors;  // [words][words_block.inputs], half precision
    FeedForward words_block;
    float words_gain;
    float pad;
    const float* directions;  // [num_directions][sketch_width]
    const float* shares;      // [KINDS]: of the sketch's squared length
    Votes votes;
    int64_t num_rows, width, num_directions, sketch_width;
};

struct RouterHead {
    FeedForward none;
    const float *none_offset, *offsets, *temperature;
    Prototypes prototypes;
    float scale;
    float pad;
};

struct Texts {
    const int64_t *slots, *kinds;
    const int64_t* starts;  // [count + 1]: where the features of each text begin
    int64_t count;
};

constexpr int KINDS = 3, WORD_KIND = 0, EVIDENCE = KINDS + 2;
constexpr int32_t UNKNOWN = -1;
constexpr float LENGTH_FLOOR = 0.1f, SQUARE_FLOOR = 1e-12f, ONE_FIXED = 32768.0f;

inline float dot(const float* a, const float* b, int64_t count) {
    V total{};
    for (int64_t i = 0; i < count; i += LANES) total += load_some(a + i, count - i) * load_some(b + i, count - i);
    return sum(total);
}
inline void add_scaled(float* to, const float* from, float factor, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += factor * from[i];
}
inline float length_of(const float* x, int64_t count) { return std::sqrt(dot(x, x, count)); }
inline void make_unit(float* x, int64_t count) {
    const float length = std::max(length_of(x, count), 1e-12f);
    for (int64_t i = 0; i < count; i++) x[i] /= length;
}
inline float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }
inline float from_half(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &magnitude, 4);
    return (half & 0x8000 ? -0x1p112f : 0x1p112f) * value;  // finite, as all that is loaded
}

// out += second(gelu(first(x)))
inline void add_feed_forward(const FeedForward& layers, const float* x, float* out) {
    thread_local std::vector<float> between;
    between.resize(layers.hidden);
    for (int64_t i = 0; i < layers.hidden; i++)
        between[i] = gelu(dot(layers.first + i * layers.inputs, x, layers.inputs) + layers.first_bias[i]);
    for (int64_t i = 0; i < layers.outputs; i++)
        out[i] += dot(layers.second + i * layers.hidden, between.data(), layers.hidden) + layers.second_bias[i];
}

// z = unit(z + v / (1 + |v|)), v the vector of the domains' votes, of features whose kinds weigh so much.
inline void add_votes(const Votes& votes, const int64_t* slots, const int64_t* kinds, int64_t count,
                      const float* weights, int64_t width, float* z) {
    thread_local std::vector<float> of_domains, sum, vector;
    of_domains.assign(votes.num_domains, 0.0f);
    for (int64_t i = 0; i < count; i++) {
        const int32_t number = votes.numbers[slots[i]];
        if (number < 0) continue;
        for (int32_t pair = votes.starts[number]; pair < votes.starts[number + 1]; pair++)
            of_domains[votes.domains[pair]] += weights[kinds[i]] * votes.weights[pair];
    }
    sum.assign(width, 0.0f);
    for (int64_t d = 0; d < votes.num_domains; d++)
        if (of_domains[d]) add_scaled(sum.data(), votes.vectors + d * width, of_domains[d], width);
    vector = sum;
    add_feed_forward(votes.block, sum.data(), vector.data());
    add_scaled(z, vector.data(), 1.0f / (1.0f + length_of(vector.data(), width)), width);
    make_unit(z, width);
}

// What the head reads of one text.
struct EncodedText {
    std::vector<float> vector_and_evidence, sketch;
};

inline void encode(const TextEncoder& encoder, const int64_t* slots, const int64_t* kinds, int64_t count,
                   EncodedText& out) {
    const int64_t width = encoder.width, num_rows = encoder.num_rows;
    thread_local std::vector<int32_t> rows;
    thread_local std::vector<float> bag, words;
    rows.resize(count);
    float all[KINDS] = {}, known[KINDS] = {}, squares[KINDS] = {};
    for (int64_t i = 0; i < count; i++) {
        const int32_t row = rows[i] = encoder.lexicon[slots[i]];
        const float rarity = encoder.rarities[row >= 0 ? row : num_rows + 2 + row];
        all[kinds[i]] += 1;
        known[kinds[i]] += row != UNKNOWN;
        squares[kinds[i]] += rarity * rarity * rarity * rarity;
        if (row >= 0) __builtin_prefetch(encoder.table + row * width);
        __builtin_prefetch(encoder.directions + slots[i] % encoder.num_directions * encoder.sketch_width);
    }
    float weights[KINDS], sketch_weights[KINDS];
    for (int kind = 0; kind < KINDS; kind++) {
        weights[kind] = all[kind] ? 1.0f / std::sqrt(all[kind]) : 0.0f;
        sketch_weights[kind] = std::sqrt(encoder.shares[kind] / std::max(squares[kind], SQUARE_FLOOR));
    }
    bag.assign(width, 0.0f);
    words.assign(encoder.words_block.inputs, 0.0f);
    out.sketch.assign(encoder.sketch_width, 0.0f);
    for (int64_t i = 0; i < count; i++) {
        const int32_t row = rows[i];
        const float rarity = encoder.rarities[row >= 0 ? row : num_rows + 2 + row];
        if (row >= 0) add_scaled(bag.data(), encoder.table + row * width, weights[kinds[i]], width);
        const float* direction = encoder.directions + slots[i] % encoder.num_directions * encoder.sketch_width;
        add_scaled(out.sketch.data(), direction, rarity * rarity * sketch_weights[kinds[i]], encoder.sketch_width);
        const int32_t word = encoder.word_numbers && kinds[i] == WORD_KIND ? encoder.word_numbers[slots[i]] : -1;
        if (word < 0) continue;
        const int64_t word_width = encoder.words_block.inputs;
        for (int64_t j = 0; j < word_width; j++)
            words[j] += weights[WORD_KIND] * from_half(encoder.word_vectors[word * word_width + j]);
    }
    make_unit(out.sketch.data(), encoder.sketch_width);

    out.vector_and_evidence.resize(width + EVIDENCE);
    float *z = out.vector_and_evidence.data(), *evidence = z + width, total = 0;
    for (int kind = 0; kind < KINDS; kind++) {
        evidence[kind] = known[kind] / std::max(all[kind], 1.0f);
        total += all[kind];
    }
    evidence[KINDS] = std::log(length_of(bag.data(), width) + LENGTH_FLOOR);
    evidence[KINDS + 1] = std::log1p(total) / 4;
    if (encoder.word_numbers) {
        for (float& value : words) value *= encoder.words_gain;
        add_feed_forward(encoder.words_block, words.data(), bag.data());
    }
    std::copy(bag.begin(), bag.end(), z);
    add_feed_forward(encoder.block, bag.data(), z);
    make_unit(z, width);
    if (encoder.votes.numbers) add_votes(encoder.votes, slots, kinds, count, weights, width, z);
}

inline int16_t in_fixed_point(float value) {
    return int16_t(std::min(std::max(std::nearbyint(value * ONE_FIXED), -ONE_FIXED), ONE_FIXED - 1));
}

// [texts][groups + 1], none last.
inline void text_logits(const TextEncoder& encoder, const RouterHead& head, const Texts& texts, float* out) {
    const int64_t width = encoder.width, key_width = width + encoder.sketch_width, groups = head.prototypes.groups;
    std::vector<int16_t> keys(texts.count * key_width);
    std::vector<float> nones(texts.count, *head.none_offset), products(texts.count * groups);
    EncodedText text;
    for (int64_t t = 0; t < texts.count; t++) {
        const int64_t start = texts.starts[t];
        encode(encoder, texts.slots + start, texts.kinds + start, texts.starts[t + 1] - start, text);
        int16_t* key = &keys[t * key_width];
        std::transform(text.vector_and_evidence.begin(), text.vector_and_evidence.begin() + width, key, in_fixed_point);
        std::transform(text.sketch.begin(), text.sketch.end(), key + width, in_fixed_point);
        add_feed_forward(head.none, text.vector_and_evidence.data(), &nones[t]);
    }
    log_means(keys.data(), texts.count, head.prototypes, head.scale, products.data());
    for (int64_t t = 0; t < texts.count; t++) {
        float* logits = out + t * (groups + 1);
        for (int64_t g = 0; g < groups; g++)
            logits[g] = (products[t * groups + g] + head.offsets[g]) / *head.temperature;
        logits[groups] = nones[t] / *head.temperature;
    }
}
