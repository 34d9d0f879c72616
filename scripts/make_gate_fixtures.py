#!/usr/bin/env python3
"""Random gates in the files in which Fast KVzip and WG-KV publish theirs, and what they score.

Writes fast_kvzip.pt, wg_kv.safetensors and expected.safetensors. Needs PyTorch. The scores are computed in float64, by the
published formulas written down once more: nothing here is shared with the program.

    python3 scripts/make_gate_fixtures.py crates/model/tests/fixtures/gates
"""

import argparse
import json
import math
import pathlib

import torch

LAYERS, KV_HEADS, GROUP, HEAD_DIM, HIDDEN = 3, 2, 2, 16, 64  # those of the tiny llama
RANK, SINKS, WIDTH, TOKENS = 4, 5, 12, 20


def rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


class FastKvzip(torch.nn.Module):
    """prefill/attention/gate.py of Fast KVzip (arXiv:2601.17668)."""

    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(HIDDEN, KV_HEADS * GROUP * RANK, dtype=torch.bfloat16)
        self.k_proj = torch.nn.Linear(HIDDEN, KV_HEADS * RANK, bias=False, dtype=torch.bfloat16)
        self.q_norm = torch.nn.RMSNorm(RANK, eps=1e-6)
        self.k_norm = torch.nn.RMSNorm(RANK, eps=1e-6)
        self.k_base = torch.nn.Parameter(torch.randn(KV_HEADS, 1, SINKS, RANK))
        self.b = torch.nn.Parameter(torch.randn(KV_HEADS, 1, GROUP, dtype=torch.bfloat16))
        for norm in (self.q_norm, self.k_norm):
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)

    def score(self, x):
        w = {name: tensor.double() for name, tensor in self.state_dict().items()}
        q = (x @ w["q_proj.weight"].T + w["q_proj.bias"]).view(-1, KV_HEADS, GROUP, RANK)
        k = (x @ w["k_proj.weight"].T).view(-1, KV_HEADS, 1, RANK)
        q, k = rms_norm(q, w["q_norm.weight"]), rms_norm(k, w["k_norm.weight"])
        own = (q * k).sum(-1) / math.sqrt(RANK) + w["b"][:, 0]  # [tokens, kv_heads, group]
        sinks = torch.einsum("thgr,hsr->thgs", q, w["k_base"][:, 0]) / math.sqrt(RANK)
        return (1 / (1 + torch.exp(sinks - own[..., None]).sum(-1))).mean(-1)


class WgKv(torch.nn.Module):
    """The g_predictors of src/modeling_layers.py of WG-KV (arXiv:2512.17452)."""

    def __init__(self):
        super().__init__()
        self.pre_key_norm = torch.nn.RMSNorm(HEAD_DIM, eps=1e-6)
        self.post_key_norm = torch.nn.RMSNorm(HEAD_DIM, eps=1e-6)
        self.conv1 = torch.nn.Conv1d(KV_HEADS * 2 * HEAD_DIM, KV_HEADS * WIDTH, 1, groups=KV_HEADS)
        self.conv2 = torch.nn.Conv1d(KV_HEADS * WIDTH, KV_HEADS, 1, groups=KV_HEADS)
        for norm in (self.pre_key_norm, self.post_key_norm):
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)

    def score(self, before, after):
        gate = WgKv().double()
        gate.load_state_dict(self.double().state_dict())
        both = torch.cat([rms_norm(before, gate.pre_key_norm.weight), rms_norm(after, gate.post_key_norm.weight)], -1)
        columns = both.reshape(len(both), -1).T[None]  # [1, kv_heads * 2 * head_dim, tokens]
        return torch.sigmoid(gate.conv2(torch.nn.functional.gelu(gate.conv1(columns))))[0].T


def save_safetensors(path, tensors):
    """The format of https://huggingface.co/docs/safetensors, f32 only."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.detach().float().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    x = torch.randn(TOKENS, HIDDEN)
    before, after = torch.randn(2, TOKENS, KV_HEADS, HEAD_DIM)
    expected = {"hidden": x, "k_before_rope": before, "k": after}

    kvzip = [FastKvzip() for _ in range(LAYERS)]
    torch.save({"module": [gate.state_dict() for gate in kvzip]}, out / "fast_kvzip.pt")
    wg_kv = [WgKv() for _ in range(LAYERS)]
    named = {}
    for layer, (sink, keys) in enumerate(zip(kvzip, wg_kv)):
        expected[f"fast_kvzip.{layer}"] = sink.score(x.double())
        for name, tensor in keys.state_dict().items():
            named[f"model.layers.{layer}.self_attn.g_predictors.{name}"] = tensor.clone()
        expected[f"wg_kv.{layer}"] = keys.score(before.double(), after.double())
    # A checkpoint holds more than gates.
    named["model.norm.weight"] = torch.ones(HIDDEN)
    save_safetensors(out / "wg_kv.safetensors", named)
    save_safetensors(out / "expected.safetensors", expected)


if __name__ == "__main__":
    main()
