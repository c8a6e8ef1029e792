// y = x W^T for the few rows of a decode step and the many of a prefill, from weights packed once.
//
// Each output is one running sum over the inputs in their order (of int4: over the groups, each such a sum): a row's
// result does not depend, in any bit, on how many other rows are beside it.
#pragma once
#include "weights.h"

#if defined(__AVX512F__)
constexpr int MAX_SUMS = 28;  // of 32 registers
constexpr int WIDE_TILE = 14;  // the most of many rows: two blocks at once
#define EACH_TILE(DO) DO(1) DO(2) DO(4) DO(6) DO(8) DO(10) DO(12) DO(14) DO(16) DO(20) DO(24) DO(28)
constexpr int TILES[] = {1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28};
#else
constexpr int MAX_SUMS = 6;  // each takes two of 16
constexpr int WIDE_TILE = 6;
#define EACH_TILE(DO) DO(1) DO(2) DO(3) DO(4) DO(6)
constexpr int TILES[] = {1, 2, 3, 4, 6};
#endif

// Of the weights, kept in a core's second cache while many rows pass by.
constexpr int64_t CACHED_BYTES = 512 * 1024;

// How far ahead of the sums weights are asked for: memory answers after some hundred cycles.
constexpr int64_t AHEAD_BYTES = 4096;

struct Matrix {
    const void* weights;  // packed
    const void* scales;   // int8: float [outputs]; int4: bf16 [blocks][inputs / 32][16]; else null
    const float* bias;    // [outputs] or null
    int64_t inputs, outputs, format;
};

struct Output {
    float* y;  // [rows][outputs]
    bool add;  // to what is there
};

// How many blocks of sixteen outputs are summed at once for so many rows.
constexpr int blocks_at_once(int rows, Format format) {
    const int sums = format == INT4 ? MAX_SUMS / 2 : MAX_SUMS, blocks = sums / rows;
    return blocks < 1 ? 1 : blocks > 4 ? 4 : blocks;
}

// Adds the products of lines [from, to) of some blocks, and asks for what lies `ahead` bytes further.
template <class E, Format FORMAT, int ROWS, int BLOCKS>
inline void sum_lines(V (&sums)[BLOCKS][ROWS], const typename Row<E>::Pair* x, const uint8_t* weights, int64_t stride,
                      int64_t from, int64_t to, int64_t ahead) {
    typedef Weights<E, FORMAT> W;
    for (int64_t line = from; line < to; line++) {
        const uint8_t* at = weights + line * W::LINE_BYTES;
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++)
            for (int64_t byte = 0; byte < W::LINE_BYTES; byte += 64)
                __builtin_prefetch(at + b * stride + ahead + byte, 0, 2);
#pragma GCC unroll 4
        for (int which = 0; which < W::LINE_PAIRS; which++) {
            decltype(W::load(weights, 0)) w[BLOCKS];
#pragma GCC unroll 4
            for (int b = 0; b < BLOCKS; b++) w[b] = W::load(at + b * stride, which);
#pragma GCC unroll 28
            for (int r = 0; r < ROWS; r++) {
                const typename Row<E>::Pair pair = x[(W::LINE_PAIRS * line + which) * ROWS + r];
#pragma GCC unroll 4
                for (int b = 0; b < BLOCKS; b++) sums[b][r] = multiply_pair(sums[b][r], w[b], pair);
            }
        }
    }
}

template <class E, Format FORMAT, int ROWS, int BLOCKS>
void product_tile(const typename Row<E>::Pair* x, const Matrix& matrix, int64_t block, int rows, const Output& out) {
    typedef Weights<E, FORMAT> W;
    const int64_t lines = lines_of(matrix.inputs, FORMAT), stride = lines * W::LINE_BYTES;
    const uint8_t* weights = (const uint8_t*)matrix.weights + block * stride;
    // The last lines of a block ask for the first of the block that is read after it.
    const int64_t last_lines = AHEAD_BYTES / W::LINE_BYTES, turn = lines < last_lines ? 0 : lines - last_lines;
    const int64_t past_turn = AHEAD_BYTES + (BLOCKS - 1) * stride;
    V sums[BLOCKS][ROWS] = {};
    if constexpr (FORMAT == INT4) {
        const int64_t groups = matrix.inputs / GROUP_INPUTS, lines_of_group = GROUP_INPUTS / 2 / W::LINE_PAIRS;
        const bf16* scales = (const bf16*)matrix.scales + block * groups * LANES;
        for (int64_t g = 0; g < groups; g++) {
            V part[BLOCKS][ROWS] = {};
            const int64_t line = g * lines_of_group;
            sum_lines<E, FORMAT>(part, x, weights, stride, line, line + lines_of_group,
                                 line < turn ? AHEAD_BYTES : past_turn);
            for (int b = 0; b < BLOCKS; b++) {
                const bf16* at = scales + (b * groups + g) * LANES;
                __builtin_prefetch(at + BLOCKS * groups * LANES, 0, 2);
                const V scale = load(at);
                for (int r = 0; r < ROWS; r++) sums[b][r] += part[b][r] * scale;
            }
        }
    } else {
        sum_lines<E, FORMAT>(sums, x, weights, stride, 0, turn, AHEAD_BYTES);
        sum_lines<E, FORMAT>(sums, x, weights, stride, turn, lines, past_turn);
    }
    for (int b = 0; b < BLOCKS; b++) {
        const int64_t column = (block + b) * LANES, count = matrix.outputs - column;
        const V bias = matrix.bias ? load_some(matrix.bias + column, count) : V{};
        const V scale = FORMAT == INT8 ? load_some((const float*)matrix.scales + column, count) : splat(1.0f);
        for (int r = 0; r < rows && r < ROWS; r++) {
            float* y = out.y + r * matrix.outputs + column;
            V value = sums[b][r] * scale + bias;
            if (out.add) value += load_some(y, count);
            store_some(y, value, count);
        }
    }
}

template <class E, Format FORMAT, int ROWS>
void product_rows(const typename Row<E>::Pair* x, const Matrix& matrix, int64_t first, int64_t last, int rows,
                  const Output& out) {
    constexpr int BLOCKS = blocks_at_once(ROWS, FORMAT);
    int64_t block = first;
    for (; block + BLOCKS <= last; block += BLOCKS)
        product_tile<E, FORMAT, ROWS, BLOCKS>(x, matrix, block, rows, out);
    for (; block < last; block++) product_tile<E, FORMAT, ROWS, 1>(x, matrix, block, rows, out);
}

inline int tile_for(int64_t rows) {
    for (int size : TILES)
        if (size >= rows) return size;
    return WIDE_TILE;
}

// Rows as [pairs][tile]: what one step of the inner loop reads lies together. Missing rows and inputs are zero.
template <class E>
void pack_rows(const E* x, int64_t inputs, int rows, int tile, typename Row<E>::Pair* packed, int64_t from,
               int64_t to) {
    for (int r = 0; r < tile; r++)
        for (int64_t k = from; k < to; k++) {
            E both[2] = {};
            for (int64_t which = 0; which < 2; which++)
                if (r < rows && 2 * k + which < inputs) both[which] = x[r * inputs + 2 * k + which];
            memcpy(&packed[k * tile + r], both, sizeof both);
        }
}

// Memory for the rows of a product in the order of its inner loop: of so many rows and inputs at most.
inline int64_t panel_bytes(int64_t rows, int64_t inputs) { return (rows + 2 * MAX_SUMS) * pairs_of(inputs) * 8; }

template <class E, Format FORMAT>
void product_of(const Worker& worker, const E* x, int64_t rows, const Matrix& matrix, const Output& out, void* memory) {
    typedef typename Row<E>::Pair Pair;
    const int64_t pairs = pairs_of(matrix.inputs), blocks = blocks_of(matrix.outputs);
    // Twice as many sums of int4: those of a group, and of all.
    constexpr int ONE_PASS = FORMAT == INT4 ? MAX_SUMS / 2 : MAX_SUMS;
    constexpr int MOST = WIDE_TILE < ONE_PASS ? WIDE_TILE : ONE_PASS;
    const int64_t tiles = rows <= ONE_PASS ? 1 : (rows + MOST - 1) / MOST;
    const int tile = tile_for((rows + tiles - 1) / tiles);
    const bool packed_already = rows == 1 && matrix.inputs % 4 == 0;
    Pair* panel = (Pair*)memory;
    if (!packed_already) {
        const int64_t chunks = (pairs + 63) / 64, units = tiles * chunks;
        for (int64_t unit = worker.begin(units); unit < worker.end(units); unit++) {
            const int64_t t = unit / chunks, from = unit % chunks * 64;
            const int64_t left = rows - t * tile, to = from + 64 < pairs ? from + 64 : pairs;
            pack_rows(x + t * tile * matrix.inputs, matrix.inputs, int(left < 0 ? 0 : left < tile ? left : tile), tile,
                      panel + t * tile * pairs, from, to);
        }
        worker.wait();
    }
    const int64_t first = worker.begin(blocks), last = worker.end(blocks);
    // Few rows: one pass over the weights. Many: some blocks at a time stay in the cache for all tiles.
    const int64_t fitting = CACHED_BYTES / (lines_of(matrix.inputs, FORMAT) * Weights<E, FORMAT>::LINE_BYTES);
    const int64_t at_once = tiles == 1 ? blocks : fitting < 2 ? 2 : fitting;
    for (int64_t block = first; block < last; block += at_once) {
        const int64_t end = block + at_once < last ? block + at_once : last;
        for (int64_t t = 0; t < tiles; t++) {
            const Pair* in = packed_already ? (const Pair*)x : panel + t * tile * pairs;
            const Output part{out.y + t * tile * matrix.outputs, out.add};
            const int left = int(rows - t * tile < tile ? rows - t * tile : tile);
            switch (tile) {
#define CASE(ROWS)                                                             \
    case ROWS:                                                                 \
        if constexpr (ROWS <= ONE_PASS)                                        \
            product_rows<E, FORMAT, ROWS>(in, matrix, block, end, left, part); \
        break;
                EACH_TILE(CASE)
#undef CASE
            }
        }
    }
    worker.wait();
}

// y [rows][outputs] from x [rows][inputs]; `panel` holds panel_bytes. All threads of a team call it.
template <class E>
void product(const Worker& worker, const E* x, int64_t rows, const Matrix& matrix, float* y, bool add, void* panel) {
    const Output out{y, add};
    switch (matrix.format) {
        case INT8: return product_of<E, INT8>(worker, x, rows, matrix, out, panel);
        case INT4: return product_of<E, INT4>(worker, x, rows, matrix, out, panel);
        default: return product_of<E, PLAIN>(worker, x, rows, matrix, out, panel);
    }
}
