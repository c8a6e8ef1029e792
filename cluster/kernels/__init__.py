"""Native kernels for the CPU: the products, the mixtures and the attention of one step, written in C++ under `src/`.

Built once on each machine with the compiler that is there (`library`); `decoder` packs a Hugging Face decoder for them.
Without a compiler, on a GPU, or for a model they do not know, the engine runs the same step in torch.
"""
