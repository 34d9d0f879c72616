"""A decoder in plain numpy, from a GGUF's unpacked weights: what they say where nothing is rounded to 8 or 16 bits.

Llama, Qwen2 and Gemma 3 as far as the models of make_golden.py go: no sliding window is as short as its texts."""
import numpy as np
from gguf import GGUFReader, dequantize


class Model:
    def __init__(self, path):
        reader = GGUFReader(path)
        field = lambda name, default=None: reader.fields[name].contents() if name in reader.fields else default
        self.arch = field("general.architecture")
        key = lambda name, default=None: field(f"{self.arch}.{name}", default)
        self.layers, self.heads, self.kv_heads = key("block_count"), key("attention.head_count"), key("attention.head_count_kv")
        self.eps, self.base = key("attention.layer_norm_rms_epsilon"), key("rope.freq_base", 10000.0)
        self.weights = {tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float32) for tensor in reader.tensors}
        self.width = self.weights["token_embd.weight"].shape[1]
        self.head_dim = key("attention.key_length", self.width // self.heads)

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.weights[name] if name in self.weights else x

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", np.float32(0))

    def rotate(self, x, base):
        angles = np.arange(x.shape[0])[:, None] * base ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        cos, sin = (part(angles)[:, None].astype(np.float32) for part in (np.cos, np.sin))
        # llama.cpp's converter puts the pairs of Llama's side by side.
        pairs = (slice(0, None, 2), slice(1, None, 2)) if self.arch == "llama" else (slice(0, self.head_dim // 2), slice(self.head_dim // 2, None))
        a, b = (x[..., pair] for pair in pairs)
        out = np.empty_like(x)
        out[..., pairs[0]], out[..., pairs[1]] = a * cos - b * sin, a * sin + b * cos
        return out

    def logits(self, ids):
        """Scores of the token after each of `ids`: [ids, vocabulary]."""
        is_gemma, count = self.arch == "gemma3", len(ids)
        x = self.weights["token_embd.weight"][ids] * (np.float32(np.sqrt(self.width)) if is_gemma else np.float32(1))
        past = np.tril(np.ones((count, count), bool))
        for layer in range(self.layers):
            name = f"blk.{layer}."
            base = 10000.0 if is_gemma and (layer + 1) % 6 else self.base
            y = self.norm(x, name + "attn_norm.weight")
            q, k, v = (self.linear(y, name + f"attn_{part}").reshape(count, -1, self.head_dim) for part in "qkv")
            q = self.rotate(self.norm(q, name + "attn_q_norm.weight"), base)
            k = self.rotate(self.norm(k, name + "attn_k_norm.weight"), base)
            k, v = (np.repeat(part, self.heads // self.kv_heads, 1) for part in (k, v))
            scores = np.where(past, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.head_dim), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            y = self.linear(np.einsum("hqk,khd->qhd", weights, v).reshape(count, -1), name + "attn_output")
            x = x + self.norm(y, name + "post_attention_norm.weight")
            y = self.norm(x, name + "ffn_norm.weight")
            gate, up = self.linear(y, name + "ffn_gate"), self.linear(y, name + "ffn_up")
            gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
            y = self.linear((gelu(gate) if is_gemma else gate / (1 + np.exp(-gate))) * up, name + "ffn_down")
            x = x + self.norm(y, name + "post_ffw_norm.weight")
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return self.norm(x, "output_norm.weight") @ head.T
