// What the rows' mixtures add to a product: y += sum over a row's adapters of weight * scale * (x A^T) B.
//
// Rows come in groups of the same mixture; a group meets its own adapters only, so a step costs what is active in it,
// and one row's overflow stays its own. Factors are read where the adapter lies, without copies: A is
// [ranks of all parts][inputs]; B, per part, [ceil(width / 64)][rank][64]. Bottleneck and sums are float.
#pragma once
#include <vector>

#include "team.h"
#include "vector.h"

constexpr int MAX_PARTS = 3;       // q, k and v read the same rows
constexpr int64_t WIDTH = 64;      // columns of B that lie together
constexpr int VECTORS = WIDTH / LANES;

struct Site {  // one adapter at one product
    const void* a;
    const void* b[MAX_PARTS];
    int64_t ranks[MAX_PARTS];  // 0 where it changes nothing
    float scales[MAX_PARTS + 1];
};

struct Mixtures {  // of the rows of a step
    int64_t num_groups;
    const int64_t* row_starts;     // [groups + 1] into rows
    const int64_t* rows;
    const int64_t* member_starts;  // [groups + 1] into members and weights
    const int64_t* members;        // addresses of the adapters' sites, one per product of the model
    const float* weights;
};

struct Parts {  // of a product's columns
    int64_t count;
    int64_t widths[MAX_PARTS];
};

inline const Site& site_of(const Mixtures& m, int64_t member, int64_t index) {
    return ((const Site*)m.members[member])[index];
}
inline int64_t rank_of(const Site& site, const Parts& parts) {
    int64_t rank = 0;
    for (int64_t p = 0; p < parts.count; p++) rank += site.ranks[p];
    return rank;
}

// How many rows to take together.
inline int64_t tile_of(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// Dot products of ROWS rows with COLUMNS rows of A. Each has a sum of its own, whatever is computed beside it.
template <int ROWS, int COLUMNS, class E>
void dots(const E* const* x, const E* a, int64_t inputs, float* out, int64_t out_stride) {
    V sums[ROWS][COLUMNS] = {};
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(E) == 2) {
        for (; i < inputs; i += 32) {
            const __mmask32 there = inputs - i >= 32 ? ~0u : (1u << (inputs - i)) - 1;
            __m512i columns[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) {
                columns[c] = _mm512_maskz_loadu_epi16(there, a + c * inputs + i);
                __builtin_prefetch(a + (COLUMNS + c) * inputs + i);  // those of the next call
            }
            for (int r = 0; r < ROWS; r++) {
                const __m512i row = _mm512_maskz_loadu_epi16(there, x[r] + i);
                for (int c = 0; c < COLUMNS; c++)
                    sums[r][c] = (V)_mm512_dpbf16_ps((__m512)sums[r][c], (__m512bh)row, (__m512bh)columns[c]);
            }
        }
    }
#endif
    for (; i < inputs; i += LANES)
        for (int c = 0; c < COLUMNS; c++) {
            const V column = load_some(a + c * inputs + i, inputs - i);
            for (int r = 0; r < ROWS; r++) sums[r][c] += load_some(x[r] + i, inputs - i) * column;
        }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) out[r * out_stride + c] = sum(sums[r][c]);
}

template <int ROWS, class E>
void dots_of_rows(const E* const* x, const E* a, int64_t columns, int64_t inputs, float* out, int64_t out_stride) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) dots<ROWS, 4>(x, a + c * inputs, inputs, out + c, out_stride);
    for (; c < columns; c++) dots<ROWS, 1>(x, a + c * inputs, inputs, out + c, out_stride);
}

// The bottleneck of one group and one of its adapters, columns [from, to), times weight and scale.
template <class E>
void bottleneck(const Mixtures& m, int64_t group, const Site& site, const Parts& parts, float weight, const E* x,
                int64_t inputs, int64_t from, int64_t to, float* h, int64_t h_stride) {
    const int64_t first = m.row_starts[group], rows = m.row_starts[group + 1] - first;
    for (int64_t r = 0, count; r < rows; r += count) {
        count = tile_of(rows - r);
        const E* inputs_of[4];
        for (int64_t i = 0; i < count; i++) inputs_of[i] = x + m.rows[first + r + i] * inputs;
        float* out = h + r * h_stride + from;
        const E* a = (const E*)site.a + from * inputs;
        switch (count) {
            case 4: dots_of_rows<4>(inputs_of, a, to - from, inputs, out, h_stride); break;
            case 2: dots_of_rows<2>(inputs_of, a, to - from, inputs, out, h_stride); break;
            default: dots_of_rows<1>(inputs_of, a, to - from, inputs, out, h_stride);
        }
        int64_t column = 0;
        for (int64_t p = 0; p < parts.count; column += site.ranks[p++])
            for (int64_t c = column; c < column + site.ranks[p]; c++)
                if (c >= from && c < to)
                    for (int64_t i = 0; i < count; i++) out[i * h_stride + c - from] *= weight * site.scales[p];
    }
}

// Adds to WIDTH columns of ROWS rows what all adapters of their group say.
template <int ROWS, class E>
void expand(const Mixtures& m, int64_t group, int64_t index, const Parts& parts, int64_t part, int64_t block,
            const float* h, int64_t h_stride, float* const* y, int64_t count) {
    V sums[ROWS][VECTORS] = {};
    for (int64_t j = m.member_starts[group]; j < m.member_starts[group + 1]; j++) {
        const Site& site = site_of(m, j, index);
        int64_t column = 0;
        for (int64_t p = 0; p < part; p++) column += site.ranks[p];
        const int64_t rank = site.ranks[part];
        const E* b = (const E*)site.b[part] + block * rank * WIDTH;
        for (int64_t c = 0; c < rank; c++) {
            V columns[VECTORS];
            for (int v = 0; v < VECTORS; v++) columns[v] = load(b + c * WIDTH + v * LANES);
            for (int r = 0; r < ROWS; r++) {
                const float value = h[r * h_stride + column + c];
                for (int v = 0; v < VECTORS; v++) sums[r][v] += columns[v] * value;
            }
        }
        h += rank_of(site, parts);
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS && v * LANES < count; v++) {
            float* to = y[r] + v * LANES;
            store_some(to, load_some(to, count - v * LANES) + sums[r][v], count - v * LANES);
        }
}

// Ask for the columns of B that one adapter adds: each lies alone in memory, too short to be foreseen.
template <class E>
void prefetch_block(const Site& site, int64_t part, int64_t block) {
    const int64_t size = site.ranks[part] * WIDTH * int64_t(sizeof(E));
    const char* from = (const char*)site.b[part] + block * size;
    for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(from + at);
}

// One unit of the second half: WIDTH columns of every row that has a mixture.
template <class E>
void expand_block(const Mixtures& m, int64_t index, const Parts& parts, int64_t part, int64_t offset, int64_t block,
                  const float* h, const int64_t* h_starts, const int64_t* h_strides, float* y, int64_t outputs) {
    const int64_t left = parts.widths[part] - block * WIDTH, count = left < WIDTH ? left : WIDTH;
    for (int64_t g = 0; g < m.num_groups; g++) {
        if (!h_strides[g]) continue;
        if (g + 1 < m.num_groups) prefetch_block<E>(site_of(m, m.member_starts[g + 1], index), part, block);
        const int64_t first = m.row_starts[g], rows = m.row_starts[g + 1] - first, stride = h_strides[g];
        for (int64_t r = 0, tile; r < rows; r += tile) {
            tile = tile_of(rows - r);
            float* to[4];
            for (int64_t i = 0; i < tile; i++) to[i] = y + m.rows[first + r + i] * outputs + offset + block * WIDTH;
            const float* from = h + h_starts[g] + r * stride;
            switch (tile) {
                case 4: expand<4, E>(m, g, index, parts, part, block, from, stride, to, count); break;
                case 2: expand<2, E>(m, g, index, parts, part, block, from, stride, to, count); break;
                default: expand<1, E>(m, g, index, parts, part, block, from, stride, to, count);
            }
        }
    }
}

struct Bottleneck {  // one unit of the first half: some columns of one adapter for one group
    int64_t group, member, from, to, column;
};

// The bottlenecks of a step at one product: which there are, and where each lies in the memory for them.
struct Bottlenecks {
    std::vector<int64_t> starts, strides;  // of each group
    std::vector<Bottleneck> units;
    int64_t size = 0;  // in floats

    void lay_out(const Mixtures& m, int64_t index, const Parts& parts) {
        starts.assign(m.num_groups, 0), strides.assign(m.num_groups, 0), units.clear(), size = 0;
        for (int64_t g = 0; g < m.num_groups; g++) {
            starts[g] = size;
            for (int64_t j = m.member_starts[g]; j < m.member_starts[g + 1]; j++) {
                const int64_t rank = rank_of(site_of(m, j, index), parts);
                for (int64_t c = 0; c < rank; c += 8)
                    units.push_back({g, j, c, c + 8 < rank ? c + 8 : rank, strides[g]});
                strides[g] += rank;
            }
            size += strides[g] * (m.row_starts[g + 1] - m.row_starts[g]);
        }
    }
};

// y [rows][outputs] += what the rows' mixtures say of x [rows][inputs], at the product `index` of the model; `h` holds
// the bottlenecks. All threads of a team call it.
template <class E>
void add_mixtures(const Worker& worker, const Mixtures& m, int64_t index, const Parts& parts, const E* x,
                  int64_t inputs, float* y, int64_t outputs, float* h) {
    if (!m.num_groups) return;
    static thread_local Bottlenecks all;
    all.lay_out(m, index, parts);
    if (!all.size) return;
    const int64_t num_units = int64_t(all.units.size());
    for (int64_t u = worker.begin(num_units); u < worker.end(num_units); u++) {
        const Bottleneck& unit = all.units[u];
        bottleneck(m, unit.group, site_of(m, unit.member, index), parts, m.weights[unit.member], x, inputs, unit.from,
                   unit.to, h + all.starts[unit.group] + unit.column, all.strides[unit.group]);
    }
    worker.wait();
    int64_t blocks[MAX_PARTS + 1] = {0};
    for (int64_t p = 0; p < parts.count; p++) blocks[p + 1] = blocks[p] + (parts.widths[p] + WIDTH - 1) / WIDTH;
    for (int64_t u = worker.begin(blocks[parts.count]); u < worker.end(blocks[parts.count]); u++) {
        int64_t part = 0, offset = 0;
        while (u >= blocks[part + 1]) offset += parts.widths[part++];
        expand_block<E>(m, index, parts, part, offset, u - blocks[part], h, all.starts.data(), all.strides.data(), y,
                        outputs);
    }
    worker.wait();
}
