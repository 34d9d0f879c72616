#!/usr/bin/env python3
"""A checkpoint of random weights in a published shape, as GGUF: for speed and memory where the real weights cannot be fetched.

    pip install gguf numpy
    python3 scripts/make_random_model.py mistral-7b mistral-7b-random.gguf
    python3 scripts/make_random_model.py qwen2.5-0.5b small.gguf --type q8_0 --layers 4

Matrices are random blocks of the type, with the scale of trained weights (standard deviation 0.02), so that nothing overflows;
`q4_k_m` has llama.cpp's mix (values and the down projection of half the layers, and the output, in Q6_K). The vocabulary is made up: what it
says means nothing. The same name and seed give the same file."""
import argparse

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

# hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, context, rope base, architecture, tied
SHAPES = {
    "mistral-7b": (4096, 14336, 32, 32, 8, 128, 32768, 32768, 1e6, "llama", False),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256, 131072, 5e5, "llama", False),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, 131072, 5e5, "llama", True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 64, 151936, 32768, 1e6, "qwen2", True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 128, 151936, 32768, 1e6, "qwen2", True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, 8192, 1e5, "llama", True),
}
DEVIATION = 0.02
NAMES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0, "q4_k": Type.Q4_K, "q6_k": Type.Q6_K}


def half(value: float) -> np.ndarray:
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def blocks(rng: np.random.Generator, kind: Type, rows: int, columns: int) -> np.ndarray:
    """Random numbers of this type: the bytes of each row, or the numbers themselves where they are plain."""
    if kind in (Type.F32, Type.F16):
        return (rng.standard_normal((rows, columns), np.float32) * DEVIATION).astype(np.float32 if kind == Type.F32 else np.float16)
    if kind == Type.BF16:  # random signs and fractions, exponents of 2^-9 to 2^-6
        bits = rng.integers(0, 1 << 16, (rows, columns), np.uint16)
        return ((bits & 0x807F) | (((bits >> 8 & 3) + 118) << 7).astype(np.uint16)).view(np.uint8)
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    if columns % per_block:
        raise SystemExit(f"{kind.name}: rows of {columns} do not divide into blocks of {per_block}; try --type q8_0")
    data = np.frombuffer(rng.bytes(rows * columns // per_block * size), np.uint8).reshape(-1, size).copy()
    if kind == Type.Q8_0:  # d, 32 int8
        data[:, :2] = half(DEVIATION / 74)
    elif kind == Type.Q4_0:  # d, 32 nibbles less 8
        data[:, :2] = half(DEVIATION / 4.6)
    elif kind == Type.Q4_K:  # d, dmin, 12 bytes of 6-bit scales and mins, 128 of nibbles; mins make the mean 0
        data[:, :2], data[:, 2:4] = half(DEVIATION / 250), half(DEVIATION / 250 * 7.5)
    elif kind == Type.Q6_K:  # 192 bytes of 6-bit numbers less 32, 16 int8 scales, d
        data[:, 192:208] = (data[:, 192:208] % 32).astype(np.int16).astype(np.uint8) - np.uint8(16)
        data[:, 208:] = half(DEVIATION / 170)
    return data.reshape(rows, columns // per_block * size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output")
    parser.add_argument("--type", default="q4_k_m", choices=[*NAMES, "q4_k_m"])
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    hidden, inner, layers, heads, kv_heads, head_dim, vocab, context, theta, arch, tied = SHAPES[args.shape]
    layers = args.layers or layers
    rng = np.random.default_rng(args.seed)
    mixed = args.type == "q4_k_m"
    small, large = (Type.Q4_K, Type.Q6_K) if mixed else (NAMES[args.type],) * 2

    writer = gguf.GGUFWriter(args.output, arch)
    writer.add_name(f"{args.shape}-random")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    if mixed:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    # SentencePiece's own: unknown, begin, end, every byte, then words that nobody says.
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    kinds = [2, 3, 3, *[6] * 256, 1]
    tokens += [f"\u2581w{index}" for index in range(vocab - len(tokens))]
    kinds += [1] * (vocab - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(vocab)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name: str, rows: int, columns: int, kind: Type):
        plain = kind in (Type.F32, Type.F16)
        writer.add_tensor(name, blocks(rng, kind, rows, columns), raw_dtype=None if plain else kind)

    def vector(name: str, width: int, value: float):
        writer.add_tensor(name, np.full(width, value, np.float32))

    writer.use_temp_file = True
    matrix("token_embd.weight", vocab, hidden, small)
    vector("output_norm.weight", hidden, 1.0)
    if not tied:
        matrix("output.weight", vocab, hidden, large)
    for layer in range(layers):
        # llama.cpp gives the first eighth, the last, and every third layer between them more bits.
        eighth = max(1, layers // 8)
        more = large if layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2 else small
        prefix = f"blk.{layer}."
        vector(prefix + "attn_norm.weight", hidden, 1.0)
        vector(prefix + "ffn_norm.weight", hidden, 1.0)
        matrix(prefix + "attn_q.weight", heads * head_dim, hidden, small)
        matrix(prefix + "attn_k.weight", kv_heads * head_dim, hidden, small)
        matrix(prefix + "attn_v.weight", kv_heads * head_dim, hidden, more)
        matrix(prefix + "attn_output.weight", hidden, heads * head_dim, small)
        matrix(prefix + "ffn_gate.weight", inner, hidden, small)
        matrix(prefix + "ffn_up.weight", inner, hidden, small)
        matrix(prefix + "ffn_down.weight", hidden, inner, more)
        if arch == "qwen2":
            for name, width in (("attn_q", heads * head_dim), ("attn_k", kv_heads * head_dim), ("attn_v", kv_heads * head_dim)):
                vector(f"{prefix}{name}.bias", width, 0.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()


if __name__ == "__main__":
    main()
