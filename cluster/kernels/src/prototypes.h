// How near keys are to groups of prototypes, each group one domain of the router.
//
// Both are whole numbers, in fixed point: their sums are exact in any order, so a group's result does not depend, in any
// bit, on which groups and keys are beside it, nor on how the machine adds.
#pragma once
#include "vector.h"
#include <vector>

struct Prototypes {
    const int16_t* rows;    // [rows][width]
    const int64_t* starts;  // [groups + 1]: where the rows of each group begin; no group is empty
    int64_t groups, width;
};

// Rows that are passed by all keys before the next ones: they stay in a core's caches.
constexpr int64_t ROWS_AT_ONCE = 64;

inline int32_t product_of_row(const int16_t* a, const int16_t* b, int64_t width) {
    int32_t total = 0;
    for (int64_t i = 0; i < width; i++) total += int32_t(a[i]) * b[i];
    return total;
}

// [keys][groups]: the logarithm of the mean over a group's rows of exp(scale * product).
inline void log_means(const int16_t* keys, int64_t num_keys, const Prototypes& prototypes, float scale, float* out) {
    const int64_t groups = prototypes.groups, width = prototypes.width, *starts = prototypes.starts;
    std::vector<float> buffer;
    for (int64_t first = 0, last; first < groups; first = last) {
        for (last = first + 1; last < groups && starts[last + 1] - starts[first] <= ROWS_AT_ONCE;) last++;
        const int64_t begin = starts[first], count = starts[last] - begin;
        if (int64_t(buffer.size()) < count + LANES) buffer.resize(count + LANES);  // sixteen at a time, so some beyond
        float* powers = buffer.data();
        for (int64_t k = 0; k < num_keys; k++) {
            for (int64_t r = 0; r < count; r++)
                powers[r] =
                    scale * float(product_of_row(keys + k * width, prototypes.rows + (begin + r) * width, width));
            for (int64_t r = 0; r < count; r += LANES) store(&powers[r], exponential(load(&powers[r])));
            for (int64_t g = first; g < last; g++) {
                float total = 0;
                for (int64_t r = starts[g] - begin; r < starts[g + 1] - begin; r++) total += powers[r];
                out[k * groups + g] = std::log(total / float(starts[g + 1] - starts[g]));
            }
        }
    }
}
