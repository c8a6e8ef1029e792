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
void normalize_rows(const float* x, const float* weights, int64_t rows, int64_t size, float epsilon, E* out) {
#pragma omp parallel for schedule(static) if (rows * size > 8192)
    for (int64_t r = 0; r < rows; r++) normalize(x + r * size, weights, size, epsilon, out + r * size);
}

// up [rows][2 between]: silu(gate) * up, gates first; or [rows][between]: squared ReLU.
template <class E>
void activate(const float* up, int64_t activation, int64_t rows, int64_t between, E* out) {
    const int64_t stride = activation == GATED_SILU ? 2 * between : between;
#pragma omp parallel for schedule(static) if (rows * between > 8192) collapse(2)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t start = 0; start < between; start += 1024) {
            const float* from = up + r * stride;
            for (int64_t i = start; i < between && i < start + 1024; i += LANES) {
                V value = load_some(from + i, between - i);
                if (activation == GATED_SILU)
                    value = value / (1.0f + exponential(-value)) * load_some(from + between + i, between - i);
                else
                    value = value < 0.0f ? V{} : value * value;
                store_some(out + r * between + i, value, between - i);
            }
        }
}

template <class E>
struct Buffers {
    std::vector<E> normed, attended, activated;
    std::vector<float> qkv, up;
};

template <class E>
void run_block(const Model& model, int64_t index, const Step& step, Buffers<E>& buffers) {
    const Block& block = model.blocks[index];
    const int64_t rows = step.tokens.count;
    const Heads& heads = model.heads;
    const Parts qkv{3, {heads.queries * heads.size, heads.keys * heads.size, heads.keys * heads.size}};
    const Parts hidden{1, {model.hidden, 0, 0}};
    const Parts up{model.activation == GATED_SILU ? 2 : 1, {model.between, model.between, 0}};
    E *normed = buffers.normed.data(), *attended = buffers.attended.data(), *activated = buffers.activated.data();

    normalize_rows(step.x, block.attention_norm, rows, model.hidden, model.norm_epsilon, normed);
    product(normed, rows, block.qkv, buffers.qkv.data(), false);
    add_mixtures(step.mixtures, 4 * index, qkv, normed, model.hidden, buffers.qkv.data(), block.qkv.outputs);
    store_heads<E>(buffers.qkv.data(), heads, block.heads, block.cache, step.tokens);
    attend(buffers.qkv.data(), heads, block.cache, step.tokens, attended);
    product(attended, rows, block.out, step.x, true);
    add_mixtures(step.mixtures, 4 * index + 1, hidden, attended, block.out.inputs, step.x, model.hidden);

    normalize_rows(step.x, block.feed_forward_norm, rows, model.hidden, model.norm_epsilon, normed);
    product(normed, rows, block.up, buffers.up.data(), false);
    add_mixtures(step.mixtures, 4 * index + 2, up, normed, model.hidden, buffers.up.data(), block.up.outputs);
    activate(buffers.up.data(), model.activation, rows, model.between, activated);
    product(activated, rows, block.down, step.x, true);
    add_mixtures(step.mixtures, 4 * index + 3, hidden, activated, model.between, step.x, model.hidden);
}

template <class E>
void run(const Model& model, const Step& step) {
    static thread_local Buffers<E> buffers;
    const int64_t rows = step.tokens.count;
    buffers.normed.resize(rows * model.hidden);
    buffers.qkv.resize(rows * model.blocks[0].qkv.outputs);
    buffers.attended.resize(rows * model.blocks[0].out.inputs);
    buffers.up.resize(rows * model.blocks[0].up.outputs);
    buffers.activated.resize(rows * model.between);
    for (int64_t index = 0; index < model.num_blocks; index++) run_block(model, index, step, buffers);
    for (int64_t i = 0; i < step.num_logits; i++)
        normalize(step.x + step.read_from[i] * model.hidden, model.last_norm, model.hidden, model.norm_epsilon,
                  buffers.normed.data() + i * model.hidden);
    if (step.num_logits) product(buffers.normed.data(), step.num_logits, model.head, step.logits, false);
}

}  // namespace

extern "C" {
void zephyra_run(const Model* model, const Step* step, int is_bf16) {
    is_bf16 ? run<bf16>(*model, *step) : run<float>(*model, *step);
}
// Row-major weights, in the type that `format` says, into the packed form.
void zephyra_pack(const void* weights, int64_t outputs, int64_t inputs, int64_t format, void* packed, int is_bf16) {
    const auto pack = [=](auto element) {
        typedef decltype(element) E;
        if (format == INT8)
            pack_int8<E>((const int8_t*)weights, outputs, inputs, (int8_t*)packed);
        else if (format == INT4)
            pack_int4<E>((const uint8_t*)weights, outputs, inputs, (uint8_t*)packed);
        else
            pack_plain((const E*)weights, outputs, inputs, (E*)packed);
    };
    is_bf16 ? pack(bf16{}) : pack(float{});
}
// Ask for pages of two megabytes: weights are read from end to end, and small pages cost a tenth of the speed.
void zephyra_prefer_large_pages(void* memory, size_t size) {
#if defined(__linux__)
    madvise(memory, size, MADV_HUGEPAGE);
#else
    (void)memory, (void)size;
#endif
}
// Some rows of a packed matrix, as float [count][inputs].
void zephyra_rows(const Matrix* matrix, const int64_t* rows, int64_t count, float* out, int is_bf16) {
    const int64_t inputs = matrix->inputs;
    const Format format = Format(matrix->format);
#pragma omp parallel for schedule(static) if (count * inputs > 4096)
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < inputs; i++)
            out[r * inputs + i] = is_bf16
                                      ? number_at<bf16>(matrix->weights, matrix->scales, format, inputs, rows[r], i)
                                      : number_at<float>(matrix->weights, matrix->scales, format, inputs, rows[r], i);
}
void zephyra_product(const void* x, int64_t rows, const Matrix* matrix, float* y, int add, int is_bf16) {
    is_bf16 ? product((const bf16*)x, rows, *matrix, y, add) : product((const float*)x, rows, *matrix, y, add);
}
}
