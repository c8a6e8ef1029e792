// One forward pass over the tokens of a step: the blocks of a decoder in their order, each row with its own mixture.
//
// Pre-norm blocks of grouped-query attention and a feed-forward, as Llama's, Qwen2's, Qwen3's, SmolLM3's and Zephyra
// Fusion's are. The stream between blocks is float; the inputs of products have the weights' type.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention.h"
#include "mixture.h"
#include "product.h"
#include "router.h"
#include "training.h"

namespace {

enum Activation : int64_t { GATED_SILU = 0, SQUARED_RELU = 1 };

struct Block {
    const float *attention_norm, *feed_forward_norm;
    Matrix qkv, out, up, down;
    HeadWeights heads;
    Cache cache;
};

struct Model {
    int64_t num_blocks, hidden, between;
    int64_t activation;
    float norm_epsilon, unused;
    Heads heads;
    const Block* blocks;
    const float* last_norm;
    Matrix head;
};

struct Step {
    Tokens tokens;
    float* x;                  // [tokens][hidden], the embeddings; overwritten
    Mixtures mixtures;
    const int64_t* read_from;  // [num_logits] tokens whose logits are wanted
    int64_t num_logits;
    float* logits;             // [num_logits][vocabulary]
};

template <class E>
void normalize_rows(const Worker& worker, const float* x, const float* weights, int64_t rows, int64_t size,
                    float epsilon, E* out) {
    for (int64_t r = worker.begin(rows); r < worker.end(rows); r++)
        normalize(x + r * size, weights, size, epsilon, out + r * size);
    worker.wait();
}

// up [rows][2 between]: silu(gate) * up, gates first; or [rows][between]: squared ReLU.
template <class E>
void activate(const Worker& worker, const float* up, int64_t activation, int64_t rows, int64_t between, E* out) {
    constexpr int64_t CHUNK = 1024;
    const int64_t stride = activation == GATED_SILU ? 2 * between : between, chunks = (between + CHUNK - 1) / CHUNK;
    for (int64_t unit = worker.begin(rows * chunks); unit < worker.end(rows * chunks); unit++) {
        const int64_t r = unit / chunks, start = unit % chunks * CHUNK;
        const float* from = up + r * stride;
        for (int64_t i = start; i < between && i < start + CHUNK; i += LANES) {
            V value = load_some(from + i, between - i);
            if (activation == GATED_SILU)
                value = value / (1.0f + exponential(-value)) * load_some(from + between + i, between - i);
            else
                value = where_less(value, V{}, V{}, value * value);
            store_some(out + r * between + i, value, between - i);
        }
    }
    worker.wait();
}

template <class E>
struct Buffers {
    std::vector<E> normed, attended, activated, bottlenecks;
    std::vector<float> qkv, up;
    std::vector<V> panel;  // V: aligned to whole vectors

    void make_room(const Model& model, const Step& step) {
        const int64_t rows = step.tokens.count > step.num_logits ? step.tokens.count : step.num_logits;
        const int64_t widest = model.between > model.hidden ? model.between : model.hidden;
        const int64_t attended_width = model.heads.queries * model.heads.size;
        normed.resize(rows * model.hidden);
        qkv.resize(rows * (attended_width + 2 * model.heads.keys * model.heads.size));
        attended.resize(rows * attended_width);
        up.resize(rows * 2 * model.between);
        activated.resize(rows * model.between);
        panel.resize(panel_bytes(rows, widest > attended_width ? widest : attended_width) / int64_t(sizeof(V)) + 1);
        int64_t most = 0;
        for (int64_t site = 0; site < 4 * model.num_blocks; site++) {
            int64_t size = 0;
            for (int64_t i = 0; i < step.mixtures.num_adapters; i++)
                size += step.mixtures.num_rows(i) * rank_blocks_of(step.mixtures.site(i, site)) * RANKS;
            most = size > most ? size : most;
        }
        bottlenecks.resize(most);
    }
};

template <class E>
void run_block(const Worker& worker, const Model& model, int64_t index, const Step& step, Buffers<E>& buffers) {
    const Block& block = model.blocks[index];
    const int64_t rows = step.tokens.count, hidden = model.hidden, between = model.between;
    const Heads& heads = model.heads;
    const Parts qkv_parts{3, {heads.queries * heads.size, heads.keys * heads.size, heads.keys * heads.size}};
    const Parts hidden_parts{1, {hidden, 0, 0}};
    const Parts up_parts{model.activation == GATED_SILU ? 2 : 1, {between, between, 0}};
    E *normed = buffers.normed.data(), *attended = buffers.attended.data(), *activated = buffers.activated.data();
    E* h = buffers.bottlenecks.data();
    float *x = step.x, *qkv = buffers.qkv.data(), *up = buffers.up.data();
    void* panel = buffers.panel.data();

    normalize_rows(worker, x, block.attention_norm, rows, hidden, model.norm_epsilon, normed);
    product(worker, normed, rows, block.qkv, qkv, false, panel);
    add_mixtures(worker, step.mixtures, 4 * index, qkv_parts, normed, hidden, qkv, block.qkv.outputs, h);
    store_heads<E>(worker, qkv, heads, block.heads, block.cache, step.tokens);
    attend(worker, qkv, heads, block.cache, step.tokens, attended);
    product(worker, attended, rows, block.out, x, true, panel);
    add_mixtures(worker, step.mixtures, 4 * index + 1, hidden_parts, attended, block.out.inputs, x, hidden, h);

    normalize_rows(worker, x, block.feed_forward_norm, rows, hidden, model.norm_epsilon, normed);
    product(worker, normed, rows, block.up, up, false, panel);
    add_mixtures(worker, step.mixtures, 4 * index + 2, up_parts, normed, hidden, up, block.up.outputs, h);
    activate(worker, up, model.activation, rows, between, activated);
    product(worker, activated, rows, block.down, x, true, panel);
    add_mixtures(worker, step.mixtures, 4 * index + 3, hidden_parts, activated, between, x, hidden, h);
}

template <class E>
void run(const Model& model, const Step& step, int64_t num_threads) {
    static thread_local Buffers<E> buffers;
    buffers.make_room(model, step);
    Buffers<E>* shared = &buffers;
    with_team(num_threads, [&, shared](const Worker& worker) {
        for (int64_t index = 0; index < model.num_blocks; index++) run_block(worker, model, index, step, *shared);
        if (!step.num_logits) return;
        E* normed = shared->normed.data();
        for (int64_t i = worker.begin(step.num_logits); i < worker.end(step.num_logits); i++)
            normalize(step.x + step.read_from[i] * model.hidden, model.last_norm, model.hidden, model.norm_epsilon,
                      normed + i * model.hidden);
        worker.wait();
        product(worker, normed, step.num_logits, model.head, step.logits, false, shared->panel.data());
    });
}

}  // namespace

extern "C" {
void zephyra_run(const Model* model, const Step* step, int64_t num_threads, int is_bf16) {
    is_bf16 ? run<bf16>(*model, *step, num_threads) : run<float>(*model, *step, num_threads);
}
// Whether the two numbers of a pair lie side by side in packed matrices of this type.
int zephyra_is_paired(int is_bf16) { return PAIRED && is_bf16; }
// Row-major weights, in the type that `format` says, into the packed form.
void zephyra_pack(const void* weights, int64_t outputs, int64_t inputs, int64_t format, void* packed,
                  int64_t num_threads, int is_bf16) {
    with_team(num_threads, [=](const Worker& worker) {
        const auto pack = [&](auto element) {
            typedef decltype(element) E;
            if (format == INT8)
                pack_numbers<E>(worker, (const int8_t*)weights, outputs, inputs, (int8_t*)packed);
            else if (format == INT4)
                pack_int4<E>(worker, (const uint8_t*)weights, outputs, inputs, (uint16_t*)packed);
            else
                pack_numbers<E>(worker, (const E*)weights, outputs, inputs, (E*)packed);
        };
        is_bf16 ? pack(bf16{}) : pack(float{});
    });
}
// Some rows of a packed matrix, as float [count][inputs].
void zephyra_rows(const Matrix* matrix, const int64_t* rows, int64_t count, float* out, int64_t num_threads,
                  int is_bf16) {
    const int64_t inputs = matrix->inputs;
    const Format format = Format(matrix->format);
    with_team(count * inputs > 16384 ? num_threads : 1, [=](const Worker& worker) {
        for (int64_t r = worker.begin(count); r < worker.end(count); r++)
            for (int64_t i = 0; i < inputs; i++)
                out[r * inputs + i] = is_bf16
                                          ? number_at<bf16>(matrix->weights, matrix->scales, format, inputs, rows[r], i)
                                          : number_at<float>(matrix->weights, matrix->scales, format, inputs, rows[r], i);
    });
}
void zephyra_product(const void* x, int64_t rows, const Matrix* matrix, float* y, int add, int64_t num_threads,
                     int is_bf16) {
    std::vector<V> panel(panel_bytes(rows, matrix->inputs) / int64_t(sizeof(V)) + 1);
    with_team(num_threads, [&](const Worker& worker) {
        is_bf16 ? product(worker, (const bf16*)x, rows, *matrix, y, add, panel.data())
                : product(worker, (const float*)x, rows, *matrix, y, add, panel.data());
    });
}
void zephyra_log_means(const int16_t* keys, int64_t num_keys, const Prototypes* prototypes, float scale, float* out) {
    log_means(keys, num_keys, *prototypes, scale, out);
}
void zephyra_text_logits(const TextEncoder* encoder, const RouterHead* head, const Texts* texts, float* out) {
    text_logits(*encoder, *head, *texts, out);
}
// Ask for pages of two megabytes: weights are read from end to end, and small pages cost a tenth of the speed.
void zephyra_prefer_large_pages(void* memory, size_t size) {
#if defined(__linux__)
    madvise(memory, size, MADV_HUGEPAGE);
#else
    (void)memory, (void)size;
#endif
}
}
