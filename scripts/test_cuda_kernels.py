#!/usr/bin/env python3
"""Builds kernels/cuda, checks every kernel against float64, and times a decode step's attention beside cuDNN's.

Needs a CUDA toolkit (nvcc), a GPU of compute capability 8.0 or newer, and PyTorch.

    python3 scripts/test_cuda_kernels.py [--time] [--json FILE]

Shapes of the timings: Mistral 7B (8 key/value heads, groups of 4, head_dim 128), f16. Each is the median of CUDA graphs that run
through the caches of several layers, so that none is found in the L2 cache.
"""

import argparse
import ctypes
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE, OCTET = 64, 8
P, I, F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class Attend(ctypes.Structure):
    _fields_ = [("q", P), ("k", P), ("v", P), ("pages", P), ("octets", P), ("counts", P), ("max_pages", I), ("max_octets", I), ("len", I)] + [
        ("splits", I), ("scale", F), ("partial", P), ("tickets", P), ("out", P)]


class Score(ctypes.Structure):
    _fields_ = [("q", P), ("summaries", P), ("blocks", I), ("max_blocks", I), ("max_scores", I), ("scores", P)]


class Select(ctypes.Structure):
    _fields_ = [("scores", P), ("max_blocks", I), ("edge", I), ("take", I), ("block_octets", I), ("pages", P), ("max_pages", I), ("len", I), ("max_octets", I)] + [
        ("octets", P), ("counts", P)]


class Prefill(ctypes.Structure):
    _fields_ = [("q", P), ("k", P), ("v", P), ("pages", P), ("octets", P), ("counts", P), ("tails", P), ("max_pages", I), ("max_octets", I)] + [
        ("start", I), ("tokens", I), ("tile", I), ("kv_heads", I), ("scale", F), ("out", P)]


def build():
    major, minor = torch.cuda.get_device_capability()
    out = pathlib.Path(tempfile.mkdtemp()) / "kernels.so"
    command = ["nvcc", "-O3", "-std=c++20", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}", "-Xptxas", "-v", "-o", out]
    done = subprocess.run([*command, *sorted((ROOT / "kernels/cuda").glob("*.cu"))], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    spills = [line for line in done.stderr.splitlines() if "spill" in line and "0 bytes spill stores" not in line]
    if spills:
        print("spills:", *spills, sep="\n")
    return ctypes.CDLL(str(out))


class Layer:
    """Keys and values of one layer in shuffled pages, and what a step needs beside them."""

    def __init__(self, tokens, kv_heads, group, dim, dtype, block=32, seed=0):
        self.shape = (tokens, kv_heads, group, dim)
        self.dtype, self.block = dtype, block
        random = torch.Generator("cuda").manual_seed(seed)
        per_head = (tokens + PAGE - 1) // PAGE
        self.pages = torch.randperm(per_head * kv_heads, device="cuda", generator=random).int().view(kv_heads, per_head)
        normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype, generator=random)
        # What lies beyond the last token may be anything.
        self.k, self.v = (normal(per_head * kv_heads * PAGE, dim) for _ in range(2))
        for head in range(kv_heads):
            unused = self.rows(head)[tokens:]
            self.k[unused], self.v[unused] = math.nan, math.nan
        self.q = normal(kv_heads * group, dim)
        self.out = torch.empty_like(self.q)
        blocks = tokens // block
        self.summaries = torch.empty(kv_heads, blocks, 2 * dim, device="cuda", dtype=dtype)
        for head in range(kv_heads if blocks else 0):
            keys = self.k[self.rows(head)[: blocks * block]].view(blocks, block, dim).float()
            self.summaries[head] = torch.cat([keys.mean(1), keys.std(1, correction=0)], -1).to(dtype)
        octets = (tokens + OCTET - 1) // OCTET
        self.scores = torch.empty(kv_heads, (blocks + 3) // 4 * 4, device="cuda")
        self.octets = torch.full((kv_heads, octets + 1), -7, device="cuda", dtype=torch.int32)
        self.counts = torch.zeros(kv_heads, device="cuda", dtype=torch.int32)
        self.partial = torch.empty(kv_heads * 1024 * group * (dim + 2), device="cuda")
        self.tickets = torch.zeros(kv_heads, device="cuda", dtype=torch.int32)

    def rows(self, head):
        """Of all slots of a head."""
        slots = torch.arange(self.pages.shape[1] * PAGE, device="cuda")
        return (self.pages[head][slots // PAGE] * PAGE + slots % PAGE).long()

    def codes(self):
        _, kv_heads, group, dim = self.shape
        return int(self.dtype == torch.bfloat16), dim, group, kv_heads

    def attend(self, lib, splits, listed=False, stream=None):
        p = Attend(*(x.data_ptr() for x in (self.q, self.k, self.v, self.pages)), self.octets.data_ptr() if listed else None)
        p.counts, p.max_pages, p.max_octets, p.len = self.counts.data_ptr(), self.pages.shape[1], self.octets.shape[1], self.shape[0]
        p.splits, p.scale = splits, self.shape[3] ** -0.5
        p.partial, p.tickets, p.out = self.partial.data_ptr(), self.tickets.data_ptr(), self.out.data_ptr()
        check(lib.foveate_attend_decode(ctypes.byref(p), *self.codes(), P(stream)))

    def score(self, lib, blocks, ranges=False, stream=None):
        p = Score(self.q.data_ptr(), self.summaries.data_ptr(), blocks, self.summaries.shape[1], self.scores.shape[1], self.scores.data_ptr())
        check(lib.foveate_score_blocks(ctypes.byref(p), *self.codes(), int(ranges), P(stream)))

    def select(self, lib, edge, take, stream=None):
        p = Select(self.scores.data_ptr(), self.scores.shape[1], edge, take, self.block // OCTET, self.pages.data_ptr(), self.pages.shape[1])
        p.len, p.max_octets = self.shape[0], self.octets.shape[1]
        p.octets, p.counts = self.octets.data_ptr(), self.counts.data_ptr()
        check(lib.foveate_select_blocks(ctypes.byref(p), self.shape[1], P(stream)))

    def reference(self, slots_of):
        """Attention of every head over the slots that `slots_of(head)` names, in float64."""
        _, kv_heads, group, dim = self.shape
        out = []
        for head in range(kv_heads):
            rows = self.rows(head)[slots_of(head)]
            q = self.q[head * group : (head + 1) * group].double()
            weights = torch.softmax(q @ self.k[rows].double().T * dim**-0.5, -1)
            out.append(weights @ self.v[rows].double())
        return torch.cat(out)


class Prompt:
    """The queries from `start` on of a layer, in tiles that share their blocks."""

    def __init__(self, layer, start, tile, blocks=None, window=256, seed=0):
        tokens, kv_heads, group, dim = layer.shape
        self.layer, self.start, self.tile, self.count = layer, start, tile, tokens - start
        random = torch.Generator("cuda").manual_seed(seed)
        self.q = torch.randn(self.count, kv_heads * group, dim, device="cuda", dtype=layer.dtype, generator=random)
        self.out = torch.full_like(self.q, math.nan)
        tiles = (self.count + tile - 1) // tile
        firsts = start + tile * torch.arange(tiles, device="cuda")
        self.octets = self.counts = self.tails = None
        if blocks is not None:
            size = layer.block // OCTET
            edges = (firsts - window).clamp(min=0) // layer.block  # everything from here on is read
            self.tails = (edges * size).int()
            taken = edges.clamp(max=blocks)
            # Random blocks before the edge, ascending.
            rank = torch.rand(tiles, kv_heads, int(edges.max()) + 1, device="cuda", generator=random)
            rank.masked_fill_(torch.arange(rank.shape[-1], device="cuda") >= edges[:, None, None], 2)
            self.chosen = rank.argsort(-1)[..., :blocks]
            self.chosen.masked_fill_(torch.arange(self.chosen.shape[-1], device="cuda") >= taken[:, None, None], 1 << 30)
            self.chosen = self.chosen.sort(-1).values
            logical = (self.chosen[..., None].clamp(max=int(edges.max())) * size + torch.arange(size, device="cuda")).flatten(2)
            pages = layer.pages[torch.arange(kv_heads, device="cuda")[None, :, None], logical // 8]
            self.octets = (pages * 8 + logical % 8).int().contiguous()
            self.counts = (taken * size)[:, None].expand(tiles, kv_heads).int().contiguous()

    def attend(self, lib, stream=None):
        layer, none = self.layer, lambda x: None if x is None else x.data_ptr()
        p = Prefill(self.q.data_ptr(), layer.k.data_ptr(), layer.v.data_ptr(), layer.pages.data_ptr(), none(self.octets), none(self.counts), none(self.tails))
        p.max_pages, p.max_octets = layer.pages.shape[1], 0 if self.octets is None else self.octets.shape[-1]
        p.start, p.tokens, p.tile, p.kv_heads = self.start, self.count, self.tile, layer.shape[1]
        p.scale, p.out = layer.shape[3] ** -0.5, self.out.data_ptr()
        check(lib.foveate_attend_prefill(ctypes.byref(p), *layer.codes()[:3], P(stream)))

    def reference(self):
        tokens, kv_heads, group, dim = self.layer.shape
        out = torch.empty(self.count, kv_heads * group, dim, device="cuda", dtype=torch.float64)
        positions = self.start + torch.arange(self.count, device="cuda")
        keys = torch.arange(tokens, device="cuda")
        for head in range(kv_heads):
            rows = self.layer.rows(head)[:tokens]
            seen = keys <= positions[:, None]
            if self.octets is not None:
                tile = torch.arange(self.count, device="cuda") // self.tile
                allowed = keys[None] >= self.tails[tile, None] * OCTET
                blocks = self.chosen[tile, head]  # [count, blocks]
                for column in blocks.unbind(-1):
                    allowed |= keys[None] // self.layer.block == column[:, None]
                seen &= allowed
            for member in range(group):
                index = head * group + member
                scores = self.q[:, index].double() @ self.layer.k[rows].double().T * dim**-0.5
                out[:, index] = torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ self.layer.v[rows].double()
        return out


def check(code):
    if code:
        sys.exit(f"a launch failed: {code}")


def far(a, b):
    return (a.double() - b).abs().max().item()


def test(lib):
    worst = {}
    shapes = [(8, 4, 128), (2, 7, 64), (3, 3, 64), (1, 8, 128), (1, 4, 256), (4, 1, 64), (2, 2, 256), (8, 5, 128)]
    for dtype in (torch.float16, torch.bfloat16):
        tolerance = 2e-3 if dtype == torch.float16 else 1.6e-2
        for kv_heads, group, dim in shapes:
            for tokens in (1, 7, 16, 300, 4099):
                layer = Layer(tokens, kv_heads, group, dim, dtype, seed=tokens)
                expected = layer.reference(lambda head: slice(0, tokens))
                for splits in (1, 3, 40, 256):
                    layer.attend(lib, splits)
                    torch.cuda.synchronize()
                    difference = far(layer.out, expected)
                    worst[str(dtype)] = max(worst.get(str(dtype), 0), difference)
                    assert difference < tolerance, (dtype, kv_heads, group, dim, tokens, splits, difference)
                    assert not layer.tickets.any()
    print("attend, dense: largest difference", {name: f"{x:.1e}" for name, x in worst.items()})

    for dtype in (torch.float16, torch.bfloat16):
        for (kv_heads, group, dim), block, tokens, window in [((8, 4, 128), 32, 9000, 256), ((2, 7, 64), 16, 5003, 256), ((3, 3, 64), 8, 7600, 256)] + [
            ((2, 2, 256), 64, 4100, 100), ((8, 4, 128), 32, 131072, 256), ((2, 4, 128), 16, 131072, 256), ((2, 1, 64), 8, 200000, 256)]:
            layer = Layer(tokens, kv_heads, group, dim, dtype, block)
            edge = (tokens - window) // block
            summaries, q = layer.summaries.double(), layer.q.double().view(kv_heads, group, dim)
            for ranges in (False, True):
                layer.score(lib, edge, ranges)
                torch.cuda.synchronize()
                parts = (q.clamp(min=0), q.clamp(max=0)) if ranges else (q, q.abs())
                want = (parts[0] @ summaries[..., :dim].mT + parts[1] @ summaries[..., dim:].mT).amax(1)
                difference = far(layer.scores[:, :edge], want[:, :edge])
                assert difference < 1e-3 * want.abs().max().item(), (dtype, block, ranges, difference)
            # Equal scores: the later block wins. Scores of very different sizes, and infinite ones.
            layer.scores[0, 1:edge] = (layer.scores[0, 1:edge] * 2).round() / 2
            layer.scores[1, 1 : edge : 3] *= 1e-30
            layer.scores[1, 5 : edge : 97] = -math.inf
            layer.scores[1, 7 : edge : 301] = math.inf
            for take in (0, 1, 60, edge // 2, edge - 1, edge + 5):
                layer.select(lib, edge, take)
                torch.cuda.synchronize()
                chosen = {}
                for head in range(kv_heads):
                    scores = layer.scores[head, 1:edge].tolist()
                    best = sorted(range(1, edge), key=lambda b: (scores[b - 1], b), reverse=True)[: max(take, 0)]
                    blocks, size = sorted([0, *best]), block // OCTET
                    octets = [b * size + i for b in blocks for i in range(size)] + list(range(edge * size, (tokens + OCTET - 1) // OCTET))
                    count = layer.counts[head].item()
                    assert count == len(octets), (dtype, block, take, head, count, len(octets))
                    logical = torch.tensor(octets, device="cuda")
                    rows = layer.pages[head][logical // 8] * 8 + logical % 8
                    assert torch.equal(layer.octets[head, :count], rows), (dtype, block, take, head)
                    chosen[head] = [o * OCTET + i for o in octets for i in range(OCTET) if o * OCTET + i < tokens]
                if tokens > 100000 and take not in (1, 60):
                    continue
                expected = layer.reference(lambda head: torch.tensor(chosen[head], device="cuda"))
                for splits in (1, 16):
                    layer.attend(lib, splits, listed=True)
                    torch.cuda.synchronize()
                    assert far(layer.out, expected) < (2e-3 if dtype == torch.float16 else 1.6e-2), (dtype, block, take, splits)
            # What is all selected is dense, bit for bit; and a run is like another.
            layer.select(lib, edge, edge)
            layer.attend(lib, 24, listed=True)
            listed = layer.out.clone()
            layer.attend(lib, 24)
            torch.cuda.synchronize()
            assert torch.equal(listed, layer.out)
    print("score, select, attend to a selection: exact selections, ties to the later block, full selection is dense bit for bit")


def test_prefill(lib):
    worst = {}
    for dtype in (torch.float16, torch.bfloat16):
        for kv_heads, group, dim in [(2, 4, 128), (2, 7, 64), (1, 3, 64), (1, 8, 128), (2, 1, 64)]:
            for tokens, start, blocks in [(1, 0, None), (77, 0, None), (1000, 0, None), (1500, 1300, None), (1500, 0, 8), (2000, 1111, 20), (1500, 1490, 8)]:
                for tile in {128 // group, 16}:
                    prompt = Prompt(Layer(tokens, kv_heads, group, dim, dtype, 16, seed=tokens), start, tile, blocks)
                    prompt.attend(lib)
                    torch.cuda.synchronize()
                    difference = far(prompt.out, prompt.reference())
                    worst[str(dtype)] = max(worst.get(str(dtype), 0), difference)
                    assert difference < (4e-3 if dtype == torch.float16 else 3e-2), (dtype, kv_heads, group, dim, tokens, start, blocks, tile, difference)
    print("attend, many queries: largest difference", {name: f"{x:.1e}" for name, x in worst.items()})


def timed(run, layers, repeats=30):
    """The median time of `run(layer, stream)`, in microseconds, as a part of CUDA graphs over all layers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in layers:
            run(layer, stream)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for layer in layers:
                run(layer, stream)
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / len(layers))
    return statistics.median(times[3:])


def time(lib, path):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = torch.cuda.get_device_properties(0)
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    copy = 2 * big.numel() / timed(lambda _, stream: other.copy_(big), [None, None]) / 1e3
    del big, other
    print(f"{device.name}, {device.multi_processor_count} SMs, copy {copy:.0f} GB/s")
    kv_heads, group, dim, block, budget, window = 8, 4, 128, 32, 2048, 256
    rows = []
    for tokens in (4096, 8192, 32768, 131072):
        count = max(2, min(16, (1 << 31) // (tokens * kv_heads * dim * 4)))
        layers = [Layer(tokens, kv_heads, group, dim, torch.float16, block, seed) for seed in range(count)]
        edge = (tokens - window) // block
        take = budget // block - 2
        size = tokens * kv_heads * dim * 4

        def dense(splits):
            return timed(lambda layer, stream: layer.attend(lib, splits, stream=stream.cuda_stream), layers)

        def routed(layer, stream, splits=16):
            layer.score(lib, edge, stream=stream.cuda_stream)
            layer.select(lib, edge, take, stream=stream.cuda_stream)
            layer.attend(lib, splits, listed=True, stream=stream.cuda_stream)

        best, splits = min((dense(splits), splits) for splits in (8, 16, 32, 48, 64))
        whole, routed_splits = min((timed(lambda l, s: routed(l, s, n), layers), n) for n in (8, 12, 16, 24, 32))
        parts = [
            timed(lambda l, s: l.score(lib, edge, stream=s.cuda_stream), layers),
            timed(lambda l, s: l.select(lib, edge, take, stream=s.cuda_stream), layers),
            timed(lambda l, s: l.attend(lib, routed_splits, listed=True, stream=s.cuda_stream), layers),
        ]
        contiguous = [[torch.randn(1, kv_heads, tokens, dim, device="cuda", dtype=torch.float16) for _ in range(2)] for _ in layers]
        q = torch.randn(1, kv_heads * group, 1, dim, device="cuda", dtype=torch.float16)

        def cudnn(kv, _):
            return torch.nn.functional.scaled_dot_product_attention(q, *kv, enable_gqa=True)

        peers = {}
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    peers[backend.name] = timed(cudnn, contiguous)
            except RuntimeError as error:
                print(backend.name, str(error).splitlines()[0])
        peer = min(peers.values()) if peers else math.nan
        rows.append({"tokens": tokens, "dense_us": best, "splits": splits, "dense_gb_s": size / best / 1e3, "routed_us": whole, "parts_us": parts, "peers_us": peers})
        print(f"{tokens:7} tokens: dense {best:6.1f} us ({size / best / 1e3:5.0f} GB/s, {splits} splits), PyTorch {peer:6.1f} us = {peer / best:.2f}; "
              f"routed {whole:5.1f} us (score {parts[0]:.1f}, select {parts[1]:.1f}, attend {parts[2]:.1f}; {routed_splits} splits)", flush=True)
        del layers, contiguous
        torch.cuda.empty_cache()
    for tokens in (8192, 32768):
        layer = Layer(tokens, kv_heads, group, dim, torch.float16, block)
        flops = 4 * kv_heads * group * dim * tokens * tokens / 2
        q = torch.randn(1, kv_heads * group, tokens, dim, device="cuda", dtype=torch.float16)
        kv = [torch.randn(1, kv_heads * group, tokens, dim, device="cuda", dtype=torch.float16) for _ in range(2)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            peer = timed(lambda _, __: torch.nn.functional.scaled_dot_product_attention(q, *kv, is_causal=True), [None], 10)
        dense = timed(lambda prompt, stream: prompt.attend(lib, stream.cuda_stream), [Prompt(layer, 0, 32)], 10)
        routed = timed(lambda prompt, stream: prompt.attend(lib, stream.cuda_stream), [Prompt(layer, 0, 32, budget // block)], 10)
        rows.append({"prompt": tokens, "dense_us": dense, "cudnn_us": peer, "routed_us": routed})
        print(f"{tokens:7} queries: dense {dense / 1e3:6.2f} ms ({flops / dense / 1e6:4.0f} TFLOP/s), cuDNN {peer / 1e3:6.2f} ms = {peer / dense:.2f}; "
              f"routed {routed / 1e3:5.2f} ms", flush=True)
        del layer, q, kv
        torch.cuda.empty_cache()
    if path:
        path.write_text(json.dumps({"device": device.name, "copy_gb_s": copy, "rows": rows}, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    lib = build()
    test(lib)
    test_prefill(lib)
    if args.time:
        time(lib, args.json)


if __name__ == "__main__":
    main()
