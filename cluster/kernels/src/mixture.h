// What the rows' mixtures add to a product: y += sum over a row's adapters of weight * scale * (x A^T) B.
//
// Adapter by adapter: each is read once and meets the rows that want it, no others, so a step costs what is active in it
// and one row's overflow stays its own. The adapters of a step come in an order that does not depend on the step, which
// keeps a row's sum the same, in every bit, whatever is beside it.
//
// Factors are read where the adapter lies, without copies, as streams. A is [ranks / 8][inputs / 4][8 ranks][4 inputs],
// both counts rounded up; B, per part, [width / 64][rank / 2][4][a pair of ranks for sixteen outputs, as in weights.h].
// The bottleneck has the weights' type, sums are float.
#pragma once
#include <vector>

#include "weights.h"

constexpr int MAX_PARTS = 3;       // q, k and v read the same rows
constexpr int64_t WIDTH = 64;      // columns of B that lie together
constexpr int VECTORS = WIDTH / LANES;
constexpr int64_t RANKS = 8;       // of A, that lie together
constexpr int64_t AHEAD_OF_A = 2048;
constexpr int64_t ROWS_OF_UNIT = 32;

struct Site {  // one adapter at one product
    const void* a;
    const float* scales;  // [ranks of all parts, rounded up to 8]
    const void* b[MAX_PARTS];
    int64_t ranks[MAX_PARTS];  // even; 0 where it changes nothing
};

struct Mixtures {  // of the rows of a step
    int64_t num_adapters;
    const int64_t* adapters;    // addresses of their sites, one per product of the model
    const int64_t* row_starts;  // [adapters + 1] into rows and weights
    const int64_t* rows;
    const float* weights;

    const Site& site(int64_t adapter, int64_t index) const { return ((const Site*)adapters[adapter])[index]; }
    int64_t num_rows(int64_t adapter) const { return row_starts[adapter + 1] - row_starts[adapter]; }
};

struct Parts {  // of a product's columns
    int64_t count;
    int64_t widths[MAX_PARTS];
};

inline int64_t rank_blocks_of(const Site& site) {
    return (site.ranks[0] + site.ranks[1] + site.ranks[2] + RANKS - 1) / RANKS;
}

inline void prefetch(const void* from, int64_t size) {
    for (int64_t at = 0; at < size; at += 64) __builtin_prefetch((const char*)from + at, 0, 2);
}

// How many rows to take together. Each has sums of its own: the choice changes no result.
inline int64_t tile_of(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// Dot products of one row with eight rows of A, four inputs at a time.
template <class E>
struct Dots {
    V low = {}, high = {};  // four ranks each, four inputs side by side

    void add(const E* a, const E* x) {
        const float four[4] = {to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
        const V inputs = Lanes<V>::repeat(four);
        low += load(a) * inputs;
        high += load(a + LANES) * inputs;
    }
    void sum(float* out) const {
        float lanes[2 * LANES];
        store(lanes, low);
        store(lanes + LANES, high);
        for (int rank = 0; rank < RANKS; rank++) {
            const float* four = lanes + 4 * rank;
            out[rank] = four[0] + four[1] + four[2] + four[3];
        }
    }
};
#if defined(__AVX512BF16__)
template <>
struct Dots<bf16> {
    V sums = {};  // of each rank, its pairs of inputs side by side

    void add(const bf16* a, const bf16* x) {
        int64_t inputs;
        memcpy(&inputs, x, 8);
        sums = (V)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_set1_epi64(inputs));
    }
    void sum(float* out) const {
        for (int rank = 0; rank < RANKS; rank++) out[rank] = sums[2 * rank] + sums[2 * rank + 1];
    }
};
#endif

// Dot products of ROWS rows with BLOCKS blocks of eight rows of A: out [rows][out_stride].
template <int ROWS, int BLOCKS, class E>
void dots(const E* const* x, const E* a, int64_t inputs, float* out, int64_t out_stride) {
    constexpr int64_t QUAD = RANKS * 4, AHEAD = AHEAD_OF_A / (QUAD * int64_t(sizeof(E)));
    const int64_t whole = inputs / 4, stride = (inputs + 3) / 4 * QUAD, turn = whole - AHEAD;
    Dots<E> sums[ROWS][BLOCKS];
    for (int64_t quad = 0; quad < whole; quad++) {
        // The end of a block asks for the beginning of the block that is read after it.
        const E* ahead = a + (quad + AHEAD) * QUAD + (quad < turn ? 0 : (BLOCKS - 1) * stride);
        for (int b = 0; b < BLOCKS; b++) {
            prefetch(ahead + b * stride, QUAD * sizeof(E));
            for (int r = 0; r < ROWS; r++) sums[r][b].add(a + b * stride + quad * QUAD, x[r] + 4 * quad);
        }
    }
    if (inputs % 4)
        for (int r = 0; r < ROWS; r++) {
            E last[4] = {};
            memcpy(last, x[r] + 4 * whole, (inputs % 4) * sizeof(E));
            for (int b = 0; b < BLOCKS; b++) sums[r][b].add(a + b * stride + whole * QUAD, last);
        }
    for (int r = 0; r < ROWS; r++)
        for (int b = 0; b < BLOCKS; b++) sums[r][b].sum(out + r * out_stride + b * RANKS);
}

template <int ROWS, class E>
void dots_of_rows(const E* const* x, const E* a, int64_t blocks, int64_t inputs, float* out, int64_t out_stride) {
    const int64_t stride = (inputs + 3) / 4 * RANKS * 4;
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2) dots<ROWS, 2>(x, a + b * stride, inputs, out + b * RANKS, out_stride);
    if (b < blocks) dots<ROWS, 1>(x, a + b * stride, inputs, out + b * RANKS, out_stride);
}

// The bottleneck of some rows that want an adapter, rank blocks [from, to), times weight and scale: h [rows][ranks].
template <class E>
void bottleneck(const Mixtures& m, const Site& site, int64_t first, int64_t rows, const E* x, int64_t inputs,
                int64_t from, int64_t to, E* h) {
    const int64_t stride = rank_blocks_of(site) * RANKS, ranks = (to - from) * RANKS;
    const E* a = (const E*)site.a + from * ((inputs + 3) / 4) * RANKS * 4;
    static thread_local std::vector<float> memory;
    memory.resize(4 * ranks);
    for (int64_t r = 0, tile; r < rows; r += tile) {
        tile = tile_of(rows - r);
        const E* inputs_of[4];
        for (int64_t i = 0; i < tile; i++) inputs_of[i] = x + m.rows[first + r + i] * inputs;
        switch (tile) {
            case 4: dots_of_rows<4>(inputs_of, a, to - from, inputs, memory.data(), ranks); break;
            case 2: dots_of_rows<2>(inputs_of, a, to - from, inputs, memory.data(), ranks); break;
            default: dots_of_rows<1>(inputs_of, a, to - from, inputs, memory.data(), ranks);
        }
        for (int64_t i = 0; i < tile; i++)
            for (int64_t c = 0; c < ranks; c += LANES) {
                const V scale = load_some(site.scales + from * RANKS + c, ranks - c) * m.weights[first + r + i];
                store_some(h + (r + i) * stride + from * RANKS + c,
                           load_some(memory.data() + i * ranks + c, ranks - c) * scale, ranks - c);
            }
    }
}

// Adds to WIDTH columns of ROWS rows what an adapter says: b [rank / 2][4][pair].
template <int ROWS, class E>
void expand(const E* b, int64_t rank, const E* h, int64_t h_stride, float* const* y, int64_t count) {
    typedef Weights<E, PLAIN> W;
    V sums[ROWS][VECTORS] = {};
    for (int64_t pair = 0; pair < rank / 2; pair++) {
        decltype(W::load(nullptr, 0)) columns[VECTORS];
        for (int v = 0; v < VECTORS; v++) columns[v] = W::load((const uint8_t*)b + (pair * VECTORS + v) * W::LINE_BYTES, 0);
        for (int r = 0; r < ROWS; r++) {
            typename Row<E>::Pair both;
            memcpy(&both, h + r * h_stride + 2 * pair, sizeof both);
            for (int v = 0; v < VECTORS; v++) sums[r][v] = multiply_pair(sums[r][v], columns[v], both);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS && v * LANES < count; v++) {
            float* to = y[r] + v * LANES;
            store_some(to, load_some(to, count - v * LANES) + sums[r][v], count - v * LANES);
        }
}

// Columns [block * WIDTH, ...) of a part, for every row that wants the adapter. `y` begins with that part.
template <class E>
void expand_block(const Mixtures& m, int64_t adapter, const E* b, int64_t rank, int64_t block, const E* h,
                  int64_t h_stride, float* y, int64_t outputs, int64_t width) {
    const int64_t first = m.row_starts[adapter], rows = m.num_rows(adapter);
    const int64_t left = width - block * WIDTH, count = left < WIDTH ? left : WIDTH;
    for (int64_t r = 0, tile; r < rows; r += tile) {
        tile = tile_of(rows - r);
        float* to[4];
        for (int64_t i = 0; i < tile; i++) to[i] = y + m.rows[first + r + i] * outputs + block * WIDTH;
        switch (tile) {
            case 4: expand<4>(b, rank, h + r * h_stride, h_stride, to, count); break;
            case 2: expand<2>(b, rank, h + r * h_stride, h_stride, to, count); break;
            default: expand<1>(b, rank, h + r * h_stride, h_stride, to, count);
        }
    }
}

// The first half's work, divided: a unit is one block of ranks for up to 32 rows of an adapter. Reading the block costs
// about as much as twelve rows' sums.
inline int64_t unit_cost(int64_t rows) { return (rows < ROWS_OF_UNIT ? rows : ROWS_OF_UNIT) + 12; }
inline int64_t num_row_units(int64_t rows) { return (rows + ROWS_OF_UNIT - 1) / ROWS_OF_UNIT; }

template <class E>
void all_bottlenecks(const Worker& worker, const Mixtures& m, int64_t index, const E* x, int64_t inputs, E* h) {
    int64_t total = 0, start = 0;
    for (int64_t i = 0; i < m.num_adapters; i++)
        total += rank_blocks_of(m.site(i, index)) * num_row_units(m.num_rows(i)) * unit_cost(m.num_rows(i));
    const int64_t low = worker.begin(total), high = worker.end(total);
    for (int64_t i = 0; i < m.num_adapters; i++) {
        const Site& site = m.site(i, index);
        const int64_t rows = m.num_rows(i), blocks = rank_blocks_of(site), cost = unit_cost(rows);
        if (i + 1 < m.num_adapters) prefetch(m.site(i + 1, index).a, AHEAD_OF_A);
        for (int64_t from_row = 0; from_row < rows; from_row += ROWS_OF_UNIT) {
            // Those that begin in this thread's share of the cost.
            int64_t from = low <= start ? 0 : (low - start + cost - 1) / cost;
            int64_t to = high <= start ? 0 : (high - start + cost - 1) / cost;
            if (to > blocks) to = blocks;
            const int64_t left = rows - from_row, count = left < ROWS_OF_UNIT ? left : ROWS_OF_UNIT;
            if (from < to)
                bottleneck(m, site, m.row_starts[i] + from_row, count, x, inputs, from, to,
                           h + from_row * blocks * RANKS);
            start += blocks * cost;
        }
        h += rows * blocks * RANKS;
    }
}

// y [rows][outputs] += what the rows' mixtures say of x [rows][inputs], at the product `index` of the model; `h` holds
// the bottlenecks. All threads of a team call it.
template <class E>
void add_mixtures(const Worker& worker, const Mixtures& m, int64_t index, const Parts& parts, const E* x,
                  int64_t inputs, float* y, int64_t outputs, E* h) {
    if (!m.num_adapters) return;
    all_bottlenecks(worker, m, index, x, inputs, h);
    worker.wait();
    int64_t blocks[MAX_PARTS + 1] = {0};
    for (int64_t p = 0; p < parts.count; p++) blocks[p + 1] = blocks[p] + (parts.widths[p] + WIDTH - 1) / WIDTH;
    const int64_t first = worker.begin(blocks[parts.count]), last = worker.end(blocks[parts.count]);
    for (int64_t i = 0; i < m.num_adapters; i++) {
        const Site& site = m.site(i, index);
        const int64_t stride = rank_blocks_of(site) * RANKS;
        const E* from = h;
        float* to = y;
        for (int64_t p = 0; p < parts.count; from += site.ranks[p], to += parts.widths[p], p++) {
            const int64_t size = site.ranks[p] * WIDTH;
            for (int64_t u = blocks[p] > first ? blocks[p] : first; u < blocks[p + 1] && u < last && size; u++) {
                const E* b = (const E*)site.b[p] + (u - blocks[p]) * size;
                prefetch(b + size, size * sizeof(E));
                expand_block(m, i, b, site.ranks[p], u - blocks[p], from, stride, to, outputs, parts.widths[p]);
            }
        }
        h += m.num_rows(i) * stride;
    }
    worker.wait();
}
