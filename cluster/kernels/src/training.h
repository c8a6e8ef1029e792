// What training needs beside matrix products, forwards and backwards, in float: attention within documents that lie one
// after the other, and RMS normalisation. Rows of heads lie as [token][head][size].
//
// Attention takes 32 queries at a time as the lanes of two vectors, so that a softmax is a lane's own affair. Keys and
// values are read where they lie. Scores are computed again on the way back.
#pragma once
#include <vector>

#include "team.h"
#include "vector.h"

namespace training {

constexpr int64_t BLOCK = 2 * LANES;  // queries at a time
// A tile's sums stay in registers: of AVX-512 there are 32, of shorter vectors fewer, and sixteen numbers take several.
constexpr bool MANY_SUMS = OWN_LANES == LANES;
constexpr int64_t AT_ONCE = MANY_SUMS ? 2 : 1;  // vectors of a block, beside the tile's rows

struct Shape {
    int64_t queries, keys, size;  // heads, and numbers of one
    float scaling;
};

// out[r][lane] = sum over h of rows[r][h] * block[h][lane], for `count` rows; `stride` numbers apart.
inline void rows_times_block(const float* rows, int64_t stride, int64_t count, int64_t size, const float* block,
                             float* out) {
    constexpr int64_t TILE = 6;
    for (int64_t first = 0; first < count; first += TILE)
        for (int64_t part = 0; part < BLOCK; part += AT_ONCE * LANES) {
            V sums[TILE][AT_ONCE] = {};
            const float* from[TILE];
            for (int64_t t = 0; t < TILE; t++) from[t] = rows + (first + t < count ? first + t : count - 1) * stride;
            for (int64_t h = 0; h < size; h++)
                for (int64_t i = 0; i < AT_ONCE; i++) {
                    const V lanes = load(block + h * BLOCK + part + i * LANES);
                    for (int64_t t = 0; t < TILE; t++) sums[t][i] += from[t][h] * lanes;
                }
            for (int64_t t = 0; t < TILE && first + t < count; t++)
                for (int64_t i = 0; i < AT_ONCE; i++)
                    store(out + (first + t) * BLOCK + part + i * LANES, sums[t][i]);
        }
}

// out[h][lane] = sum over r of rows[r][h] * lanes[r][lane], for `size` values of h.
inline void columns_times_lanes(const float* rows, int64_t stride, int64_t count, int64_t size, const float* lanes,
                                float* out) {
    constexpr int64_t TILE = MANY_SUMS ? 8 : 4;
    for (int64_t first = 0; first < size; first += TILE)
        for (int64_t part = 0; part < BLOCK; part += AT_ONCE * LANES) {
            V sums[TILE][AT_ONCE] = {};
            const float* from = rows + first;
            for (int64_t r = 0; r < count; r++, from += stride)
                for (int64_t i = 0; i < AT_ONCE; i++) {
                    const V left = load(lanes + r * BLOCK + part + i * LANES);
                    for (int64_t t = 0; t < TILE; t++) sums[t][i] += from[t] * left;
                }
            for (int64_t t = 0; t < TILE; t++)
                for (int64_t i = 0; i < AT_ONCE; i++)
                    store(out + (first + t) * BLOCK + part + i * LANES, sums[t][i]);
        }
}

// out[r][h] += sum over the block's queries i of lanes[r][i] * rows[i][h].
inline void add_lanes_times_rows(const float* lanes, int64_t count, const float* rows, int64_t row_stride,
                                 int64_t queries, int64_t size, float* out, int64_t out_stride) {
    constexpr int64_t TILE = 6;
    for (int64_t h = 0; h < size; h += LANES)
        for (int64_t first = 0; first < count; first += TILE) {
            V sums[TILE] = {};
            const float* from[TILE];
            for (int64_t t = 0; t < TILE; t++) from[t] = lanes + (first + t < count ? first + t : count - 1) * BLOCK;
            for (int64_t i = 0; i < queries; i++) {
                const V row = load(rows + i * row_stride + h);
                for (int64_t t = 0; t < TILE; t++) sums[t] += from[t][i] * row;
            }
            for (int64_t t = 0; t < TILE && first + t < count; t++) {
                float* to = out + (first + t) * out_stride + h;
                store(to, load(to) + sums[t]);
            }
        }
}

// Queries as lanes: block[h][lane], zero where there are none.
inline void pack(const float* rows, int64_t stride, int64_t queries, int64_t size, float* block) {
    for (int64_t h = 0; h < size; h++)
        for (int64_t i = 0; i < BLOCK; i++) block[h * BLOCK + i] = i < queries ? rows[i * stride + h] : 0.0f;
}

inline void unpack(const float* block, int64_t queries, int64_t size, float scale, float* rows, int64_t stride) {
    for (int64_t i = 0; i < queries; i++)
        for (int64_t h = 0; h < size; h++) rows[i * stride + h] = scale * block[h * BLOCK + i];
}

// Lanes that see a key: 1, and 0 for those whose query lies before it.
inline V sees(int64_t key, int64_t first_query) {
    return where_less(lane_numbers(), splat(float(key - first_query)), V{}, splat(1.0f));
}

struct Block32 {  // what one thread needs for a block of queries
    std::vector<V> query, gradient, scores, slopes, result;
    Block32(int64_t size, int64_t longest)
        : query(size * 2), gradient(size * 2), scores(longest * 2), slopes(longest * 2), result(size * 2) {}
};
inline float* floats(std::vector<V>& of) { return reinterpret_cast<float*>(of.data()); }

// One query head of one document. Pointers are at the document's first token and at the head.
inline void attend(const Shape& s, const float* q, const float* k, const float* v, int64_t length, float* out,
                   float* log_sums, Block32& b) {
    const int64_t q_stride = s.queries * s.size, k_stride = s.keys * s.size;
    for (int64_t start = 0; start < length; start += BLOCK) {
        const int64_t queries = length - start < BLOCK ? length - start : BLOCK, seen = start + queries;
        pack(q + start * q_stride, q_stride, queries, s.size, floats(b.query));
        rows_times_block(k, k_stride, seen, s.size, floats(b.query), floats(b.scores));
        for (int half = 0; half < 2; half++) {
            V most = splat(-INFINITY), total = {};
            const int64_t first = start + half * LANES;
            for (int64_t j = 0; j < seen; j++) {
                V& score = b.scores[2 * j + half];
                score *= s.scaling;
                if (j > first) score = where_less(lane_numbers(), splat(float(j - first)), splat(-1e30f), score);
                most = where_less(most, score, score, most);
            }
            for (int64_t j = 0; j < seen; j++) {
                V& score = b.scores[2 * j + half];
                score = exponential(score - most);
                total += score;
            }
            const V share = 1.0f / total;
            for (int64_t j = 0; j < seen; j++) b.scores[2 * j + half] *= share;
            float peaks[LANES], totals[LANES];
            store(peaks, most);
            store(totals, total);
            for (int64_t i = 0; i < LANES && half * LANES + i < queries; i++)
                log_sums[(first + i) * s.queries] = peaks[i] + logf(totals[i]);
        }
        columns_times_lanes(v, k_stride, seen, s.size, floats(b.scores), floats(b.result));
        unpack(floats(b.result), queries, s.size, 1.0f, out + start * q_stride, q_stride);
    }
}

// The same on the way back; adds to dk and dv, which the other query heads of a key head share.
inline void attend_back(const Shape& s, const float* q, const float* k, const float* v, const float* out,
                        const float* d_out, const float* log_sums, int64_t length, float* dq, float* dk, float* dv,
                        Block32& b) {
    const int64_t q_stride = s.queries * s.size, k_stride = s.keys * s.size;
    for (int64_t start = 0; start < length; start += BLOCK) {
        const int64_t queries = length - start < BLOCK ? length - start : BLOCK, seen = start + queries;
        const float* d_rows = d_out + start * q_stride;
        pack(q + start * q_stride, q_stride, queries, s.size, floats(b.query));
        pack(d_rows, q_stride, queries, s.size, floats(b.gradient));
        rows_times_block(k, k_stride, seen, s.size, floats(b.query), floats(b.scores));
        rows_times_block(v, k_stride, seen, s.size, floats(b.gradient), floats(b.slopes));
        for (int half = 0; half < 2; half++) {
            const int64_t first = start + half * LANES;
            float log_sum_of[LANES], mean_of[LANES] = {};
            store(log_sum_of, splat(INFINITY));
            for (int64_t i = 0; i < LANES && half * LANES + i < queries; i++) {
                log_sum_of[i] = log_sums[(first + i) * s.queries];
                const float* row = out + (first + i) * q_stride;
                const float* d_row = d_out + (first + i) * q_stride;
                V products = {};
                for (int64_t h = 0; h < s.size; h += LANES) products += load(row + h) * load(d_row + h);
                mean_of[i] = sum(products);
            }
            const V log_sum = load(log_sum_of), mean = load(mean_of);
            for (int64_t j = 0; j < seen; j++) {
                V share = exponential(b.scores[2 * j + half] * s.scaling - log_sum);
                if (j > first) share *= sees(j, first);
                b.scores[2 * j + half] = share;
                b.slopes[2 * j + half] = share * (b.slopes[2 * j + half] - mean) * s.scaling;
            }
        }
        add_lanes_times_rows(floats(b.scores), seen, d_rows, q_stride, queries, s.size, dv, k_stride);
        add_lanes_times_rows(floats(b.slopes), seen, q + start * q_stride, q_stride, queries, s.size, dk, k_stride);
        columns_times_lanes(k, k_stride, seen, s.size, floats(b.slopes), floats(b.result));
        unpack(floats(b.result), queries, s.size, 1.0f, dq + start * q_stride, q_stride);
    }
}

// Calls work(start, length, key head, scratch) for every document and key head, longest documents as they come.
template <class Work>
void each_document(const Shape& s, const int64_t* starts, int64_t documents, int64_t threads, Work work) {
    int64_t longest = 0;
    for (int64_t d = 0; d < documents; d++)
        if (starts[d + 1] - starts[d] > longest) longest = starts[d + 1] - starts[d];
    with_team(threads, [&](const Worker& worker) {
        Block32 scratch(s.size, longest + BLOCK);
        for (int64_t unit; (unit = worker.team.take()) < documents * s.keys;) {
            const int64_t d = unit / s.keys;
            work(starts[d], starts[d + 1] - starts[d], unit % s.keys, scratch);
        }
    });
}

inline void normalize_rows(const float* x, const float* weights, int64_t row, int64_t size, float epsilon, float* out) {
    const float* from = x + row * size;
    V squares = {};
    for (int64_t i = 0; i < size; i += LANES) {
        const V value = load_some(from + i, size - i);
        squares += value * value;
    }
    const float scale = 1.0f / sqrtf(sum(squares) / float(size) + epsilon);
    for (int64_t i = 0; i < size; i += LANES)
        store_some(out + row * size + i, load_some(from + i, size - i) * scale * load_some(weights + i, size - i),
                   size - i);
}

inline void normalize_rows_back(const float* x, const float* weights, const float* d_out, int64_t row, int64_t size,
                                float epsilon, float* dx) {
    const float *from = x + row * size, *slopes = d_out + row * size;
    V squares = {}, products = {};
    for (int64_t i = 0; i < size; i += LANES) {
        const V value = load_some(from + i, size - i);
        squares += value * value;
        products += value * load_some(weights + i, size - i) * load_some(slopes + i, size - i);
    }
    const float scale = 1.0f / sqrtf(sum(squares) / float(size) + epsilon);
    const float shift = sum(products) / float(size) * scale * scale;
    for (int64_t i = 0; i < size; i += LANES) {
        const V slope = load_some(weights + i, size - i) * load_some(slopes + i, size - i);
        store_some(dx + row * size + i, (slope - load_some(from + i, size - i) * shift) * scale, size - i);
    }
}

}  // namespace training

extern "C" {

// Heads [tokens][heads][size]; document d has the tokens starts[d] to starts[d + 1]. log_sums [tokens][queries].
void zephyra_attend(const training::Shape* s, const float* q, const float* k, const float* v, const int64_t* starts,
                    int64_t documents, float* out, float* log_sums, int threads) {
    training::each_document(*s, starts, documents, threads, [&](int64_t at, int64_t length, int64_t head, auto& scratch) {
        const int64_t group = s->queries / s->keys, key = (at * s->keys + head) * s->size;
        for (int64_t n = head * group; n < (head + 1) * group; n++) {
            const int64_t query = (at * s->queries + n) * s->size;
            training::attend(*s, q + query, k + key, v + key, length, out + query, log_sums + at * s->queries + n,
                             scratch);
        }
    });
}

// dk and dv must be zero.
void zephyra_attend_back(const training::Shape* s, const float* q, const float* k, const float* v, const int64_t* starts,
                         int64_t documents, const float* out, const float* log_sums, const float* d_out, float* dq,
                         float* dk, float* dv, int threads) {
    training::each_document(*s, starts, documents, threads, [&](int64_t at, int64_t length, int64_t head, auto& scratch) {
        const int64_t group = s->queries / s->keys, key = (at * s->keys + head) * s->size;
        for (int64_t n = head * group; n < (head + 1) * group; n++) {
            const int64_t query = (at * s->queries + n) * s->size;
            training::attend_back(*s, q + query, k + key, v + key, out + query, d_out + query,
                                  log_sums + at * s->queries + n, length, dq + query, dk + key, dv + key, scratch);
        }
    });
}

void zephyra_normalize(const float* x, const float* weights, int64_t rows, int64_t size, float epsilon, float* out,
                       int threads) {
    with_team(threads, [&](const Worker& worker) {
        for (int64_t row = worker.begin(rows); row < worker.end(rows); row++)
            training::normalize_rows(x, weights, row, size, epsilon, out);
    });
}

void zephyra_normalize_back(const float* x, const float* weights, const float* d_out, int64_t rows, int64_t size,
                            float epsilon, float* dx, int threads) {
    with_team(threads, [&](const Worker& worker) {
        for (int64_t row = worker.begin(rows); row < worker.end(rows); row++)
            training::normalize_rows_back(x, weights, d_out, row, size, epsilon, dx);
    });
}
}
