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
import re
import statistics
import subprocess
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE, OCTET = 64, 8
P, I, F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float




def structs():
    """The structs of kernels/params.h, by name."""
    found = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", (ROOT / "kernels/params.h").read_text(), re.S):
        fields = []
        for line in body.splitlines():
            field = re.match(r"\s*(?:const )?(\w+) (\*?)(\w+);", line)
            if field:
                fields.append((field[3], P if field[2] else {"int": I, "float": F, "int64_t": ctypes.c_int64, **found}[field[1]]))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


STRUCTS = structs()


class LaunchConfig(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")] + [("stream", P), ("attributes", P), ("count", ctypes.c_uint)]


class Attribute(ctypes.Structure):
    _fields_ = [("id", I), ("pad", ctypes.c_char * 4), ("value", I), ("rest", ctypes.c_char * 60)]


class Kernels:
    """The kernels, loaded through the driver as Foveate does."""

    def __init__(self):
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        major, minor = torch.cuda.get_device_capability()
        self.has_wgmma = (major, minor) == (9, 0)
        arch = f"{major}{minor}{'a' if self.has_wgmma else ''}"
        out = pathlib.Path(tempfile.mkdtemp()) / "kernels.cubin"
        command = ["nvcc", "-cubin", "-O3", "-std=c++20", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-o", out, ROOT / "kernels/cuda/all.cu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        slow = lambda line: "spill" in line and "0 bytes spill stores" not in line or "serialized" in line
        spills = [line for line in done.stderr.splitlines() if slow(line)]
        if spills:
            print("spills, or products that wait:", *spills, sep="\n")
        self.driver, self.module, self.functions = ctypes.CDLL("libcuda.so.1"), P(), {}
        check(self.driver.cuModuleLoadData(ctypes.byref(self.module), out.read_bytes()))

    def launch(self, name, grid, threads, shared, params, stream=None):
        if name not in self.functions:
            function = P()
            check(self.driver.cuModuleGetFunction(ctypes.byref(function), self.module, name.encode()))
            self.functions[name] = function
        function = self.functions[name]
        if shared > 32 << 10:
            check(self.driver.cuFuncSetAttribute(function, 8, shared))
        overlaps = Attribute(6, b"", 1, b"")
        config = LaunchConfig(*grid, threads, 1, 1, shared, P(stream), ctypes.addressof(overlaps), 1)
        arguments = (P * 1)(ctypes.addressof(params))
        check(self.driver.cuLaunchKernelEx(ctypes.byref(config), function, arguments, None))


def name_of(stem, dtype, dim):
    return f"{stem}_{'bf16' if dtype == torch.bfloat16 else 'f16'}_{dim}"


class Layer:
    """Keys and values of one layer in shuffled pages, and what a step needs beside them."""

    def __init__(self, tokens, kv_heads, group, dim, dtype, block=32, seed=0, window=256):
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
        self.out = torch.empty(kv_heads * group, dim, device="cuda")
        self.position = torch.tensor([tokens - 1], device="cuda", dtype=torch.int32)
        self.takes = torch.zeros(kv_heads, device="cuda", dtype=torch.int32)
        self.window = window
        blocks = tokens // block
        self.summaries = torch.empty(kv_heads, blocks, 2 * dim, device="cuda", dtype=dtype)
        for head in range(kv_heads if blocks else 0):
            keys = self.k[self.rows(head)[: blocks * block]].view(blocks, block, dim).float()
            self.summaries[head] = torch.cat([keys.mean(1), keys.std(1, correction=0)], -1).to(dtype)
        # As the cache has them: pages of 64 blocks, head by head.
        rows = torch.zeros(kv_heads, (blocks + PAGE) // PAGE * PAGE, 2 * dim, device="cuda", dtype=dtype)
        rows[:, :blocks] = self.summaries
        self.paged = rows.view(kv_heads, -1, PAGE, 2 * dim).transpose(0, 1).contiguous()
        groups = self.paged.float().unflatten(-1, (-1, 32))
        self.scales = (groups.abs().amax(-1) / 127).half()
        self.bytes = (groups / self.scales.float().clamp(min=1e-30)[..., None]).round().clamp(-127, 127).flatten(-2).to(torch.int8)
        octets = (tokens + OCTET - 1) // OCTET
        self.scores = torch.empty(kv_heads, (blocks + 4) // 4 * 4, device="cuda")
        self.octets = torch.full((kv_heads, octets + 1, 2), -7, device="cuda", dtype=torch.int32)
        self.counts = torch.zeros(kv_heads, device="cuda", dtype=torch.int32)
        parts = kv_heads * ((group + 7) // 8)
        self.partial = torch.empty(parts * 256 * 8 * (dim + 2), device="cuda")
        self.tickets = torch.zeros(parts, device="cuda", dtype=torch.int32)

    def rows(self, head):
        """Of all slots of a head."""
        slots = torch.arange(self.pages.shape[1] * PAGE, device="cuda")
        return (self.pages[head][slots // PAGE] * PAGE + slots % PAGE).long()

    def attend(self, lib, splits, listed=False, stream=None):
        tokens, kv_heads, group, dim = self.shape
        p = STRUCTS["DecodeParams"](q=self.q.data_ptr(), k=self.k.data_ptr(), v=self.v.data_ptr(), pages=self.pages.data_ptr(),
            octets=self.octets.data_ptr() if listed else None, counts=self.counts.data_ptr(), position=self.position.data_ptr(),
            partial=self.partial.data_ptr(), tickets=self.tickets.data_ptr(), out=self.out.data_ptr(), max_pages=self.pages.shape[1],
            max_octets=self.octets.shape[1], group_size=group, scale=dim**-0.5)
        shared = max(4 * 3 * 2 * 16 * dim * 2, 4 * 8 * (dim + 2) * 4, 8 * splits * 4)
        lib.launch(name_of("attend_decode", self.dtype, dim), (splits, kv_heads, (group + 7) // 8), 128, shared, p, stream)

    def score(self, lib, ranges=False, stream=None):
        """By means and deviations in bytes, or by `ranges`, as if these were largest and smallest values."""
        _, kv_heads, group, dim = self.shape
        summaries, scales = (self.paged, None) if ranges else (self.bytes, self.scales.data_ptr())
        p = STRUCTS["ScoreParams"](q=self.q.data_ptr(), summaries=summaries.data_ptr(), scales=scales, position=self.position.data_ptr(), scores=self.scores.data_ptr(),
            kind=1 if ranges else 2, group_size=group, max_scores=self.scores.shape[1], window=self.window, block_size=self.block, tile=1)
        lib.launch(name_of("score_blocks" if ranges else "score_bytes", self.dtype, dim), ((self.scores.shape[1] + 63) // 64, kv_heads, 1), 128, 0, p, stream)

    def select(self, lib, take, stream=None):
        self.takes.fill_(take * self.block)
        self.select_again(lib, stream)

    def select_again(self, lib, stream=None):
        most = self.scores.shape[1]
        p = STRUCTS["SelectParams"](scores=self.scores.data_ptr(), pages=self.pages.data_ptr(), position=self.position.data_ptr(), takes=self.takes.data_ptr(),
            octets=self.octets.data_ptr(), counts=self.counts.data_ptr(), max_scores=most, max_pages=self.pages.shape[1],
            max_octets=self.octets.shape[1], rows=1, tokens=1, window=self.window, block_size=self.block, tile=1)
        each = next(each for each in (1, 4, 8, 16, 32) if each * 1024 >= most - self.window // self.block)
        lib.launch(f"select_blocks_{each}", (self.shape[1], 1, 1), 1024, (most + 1) * 4, p, stream)

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
        self.out = torch.full(self.q.shape, math.nan, device="cuda")
        tiles = (self.count + tile - 1) // tile
        firsts = start + tile * torch.arange(tiles, device="cuda")
        self.octets = self.counts = self.edges = None
        if blocks is not None:
            size = layer.block // OCTET
            edges = (firsts - window).clamp(min=0) // layer.block  # everything from here on is read
            self.edges = edges * layer.block
            taken = edges.clamp(max=blocks)
            # Random blocks before the edge, ascending.
            rank = torch.rand(tiles, kv_heads, int(edges.max()) + 1, device="cuda", generator=random)
            rank.masked_fill_(torch.arange(rank.shape[-1], device="cuda") >= edges[:, None, None], 2)
            self.chosen = rank.argsort(-1)[..., :blocks]
            self.chosen.masked_fill_(torch.arange(self.chosen.shape[-1], device="cuda") >= taken[:, None, None], 1 << 30)
            self.chosen = self.chosen.sort(-1).values
            # The chosen ones, then everything from the edge on to the tile's newest query.
            listed, tails = taken * size, edges * size
            newest = (firsts + tile).clamp(max=tokens) - 1
            counts = listed + newest // OCTET + 1 - tails
            j = torch.arange(int(counts.max()), device="cuda")[None, :]
            before = j < listed[:, None]
            picked = torch.where(before, j // size, 0).clamp(max=blocks - 1)
            blocks_of = torch.gather(self.chosen, 2, picked[:, None, :].expand(-1, kv_heads, -1))
            logical = torch.where(before[:, None, :], blocks_of * size + (j % size)[:, None, :], (tails[:, None] + j - listed[:, None])[:, None, :])
            logical = torch.where((j < counts[:, None])[:, None, :], logical, 0)
            pages = layer.pages[torch.arange(kv_heads, device="cuda")[None, :, None], logical // 8]
            rows = (pages * 8 + logical % 8) << 8 | 0xFF
            self.octets = torch.stack([rows, logical * OCTET], -1).int().contiguous()
            self.counts = counts[:, None].expand(tiles, kv_heads).int().contiguous()

    def attend(self, lib, stream=None, wgmma=True):
        """`wgmma`: by warpgroups, where there is a kernel that does."""
        layer, none = self.layer, lambda x: None if x is None else x.data_ptr()
        _, kv_heads, group, dim = layer.shape
        p = STRUCTS["PrefillParams"](q=self.q.data_ptr(), k=layer.k.data_ptr(), v=layer.v.data_ptr(), pages=layer.pages.data_ptr(), octets=none(self.octets),
            counts=none(self.counts), out=self.out.data_ptr(), max_pages=layer.pages.shape[1], max_octets=0 if self.octets is None else self.octets.shape[2],
            start=self.start, tokens=self.count, tile=self.tile, kv_heads=kv_heads, group_size=group, scale=dim**-0.5)
        tiles = (self.count + self.tile - 1) // self.tile
        if wgmma and lib.has_wgmma and dim <= 128:
            stem, threads, shared = "attend_prefill_wgmma_halves" if self.tile * group <= 64 else "attend_prefill_wgmma", 384, 7 * 128 * dim * 2 + 1024
        else:
            stem, threads, shared = "attend_prefill", 256, 2 * 2 * (32 if dim > 128 else 64) * dim * 2
        lib.launch(name_of(stem, layer.dtype, dim), (tiles, kv_heads, 1), threads, shared, p, stream)

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
                allowed = keys[None] >= self.edges[tile, None]
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
    shapes = [(8, 4, 128), (2, 7, 64), (3, 3, 64), (1, 8, 128), (1, 4, 256), (4, 1, 64), (2, 2, 256), (8, 5, 128), (2, 16, 64)]
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
            layer = Layer(tokens, kv_heads, group, dim, dtype, block, window=window)
            edge = (tokens - 1 - window) // block
            q, blocks = layer.q.double().view(kv_heads, group, dim), tokens // block
            widened = (layer.bytes.double().unflatten(-1, (-1, 32)) * layer.scales.double()[..., None]).flatten(-2).transpose(0, 1).flatten(1, 2)
            for ranges in (False, True):
                summaries = layer.summaries.double() if ranges else widened[:, :blocks]
                layer.score(lib, ranges)
                torch.cuda.synchronize()
                parts = (q.clamp(min=0), q.clamp(max=0)) if ranges else (q, q.abs())
                want = (parts[0] @ summaries[..., :dim].mT + parts[1] @ summaries[..., dim:].mT).amax(1)
                difference = far(layer.scores[:, :edge], want[:, :edge])
                # Widened bytes are rounded once more.
                assert difference < (1e-3 if dtype == torch.float16 else 8e-3) * want.abs().max().item(), (dtype, block, ranges, difference)
            # Equal scores: the later block wins. Scores of very different sizes, and infinite ones.
            layer.scores[0, 1:edge] = (layer.scores[0, 1:edge] * 2).round() / 2
            layer.scores[1, 1 : edge : 3] *= 1e-30
            layer.scores[1, 5 : edge : 97] = -math.inf
            layer.scores[1, 7 : edge : 301] = math.inf
            for take in (0, 1, 60, edge // 2, edge - 1, edge + 5):
                layer.select(lib, take)
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
                    assert torch.equal(layer.octets[head, :count, 0], rows << 8 | 0xFF), (dtype, block, take, head)
                    assert torch.equal(layer.octets[head, :count, 1], (logical * OCTET).int()), (dtype, block, take, head)
                    chosen[head] = [o * OCTET + i for o in octets for i in range(OCTET) if o * OCTET + i < tokens]
                if tokens > 100000 and take not in (1, 60):
                    continue
                expected = layer.reference(lambda head: torch.tensor(chosen[head], device="cuda"))
                for splits in (1, 16):
                    layer.attend(lib, splits, listed=True)
                    torch.cuda.synchronize()
                    assert far(layer.out, expected) < (2e-3 if dtype == torch.float16 else 1.6e-2), (dtype, block, take, splits)
            # What is all selected is dense, bit for bit; and a run is like another.
            layer.select(lib, edge)
            layer.attend(lib, 24, listed=True)
            listed = layer.out.clone()
            layer.attend(lib, 24)
            torch.cuda.synchronize()
            assert torch.equal(listed, layer.out)
    print("score, select, attend to a selection: exact selections, ties to the later block, full selection is dense bit for bit")


def test_prefill(lib):
    worst = {}
    for dtype in (torch.float16, torch.bfloat16):
        for kv_heads, group, dim in [(2, 4, 128), (2, 7, 64), (1, 3, 64), (1, 8, 128), (2, 1, 64), (1, 4, 256)]:
            for tokens, start, blocks in [(2, 0, None), (77, 0, None), (1000, 0, None), (1500, 1300, None), (1500, 0, 8), (2000, 1111, 20), (1500, 1490, 8)]:
                for tile in {128 // group, 16}:
                    prompt = Prompt(Layer(tokens, kv_heads, group, dim, dtype, 16, seed=tokens), start, tile, blocks)
                    expected = prompt.reference()
                    for wgmma in (True, False):
                        prompt.out.fill_(math.nan)
                        prompt.attend(lib, wgmma=wgmma)
                        torch.cuda.synchronize()
                        difference = far(prompt.out, expected)
                        worst[str(dtype)] = max(worst.get(str(dtype), 0), difference)
                        case = (dtype, kv_heads, group, dim, tokens, start, blocks, tile, wgmma, difference)
                        assert difference < (4e-3 if dtype == torch.float16 else 3e-2), case
    print("attend, many queries: largest difference", {name: f"{x:.1e}" for name, x in worst.items()})


def timed(run, layers, repeats=30):
    """The median time of `run(layer, stream)`, in microseconds, as a part of CUDA graphs over all layers."""
    torch.cuda.synchronize()  # what the layers are made of comes from another stream
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
        take = budget // block - 2
        size = tokens * kv_heads * dim * 4
        for layer in layers:
            layer.takes.fill_(take * block)

        def dense(splits):
            return timed(lambda layer, stream: layer.attend(lib, splits, stream=stream.cuda_stream), layers)

        def routed(layer, stream, splits=16):
            layer.score(lib, stream=stream.cuda_stream)
            layer.select_again(lib, stream=stream.cuda_stream)
            layer.attend(lib, splits, listed=True, stream=stream.cuda_stream)

        best, splits = min((dense(splits), splits) for splits in (8, 16, 33, 48, 66))
        whole, routed_splits = min((timed(lambda l, s: routed(l, s, n), layers), n) for n in (8, 12, 16, 24, 33))
        parts = [
            timed(lambda l, s: l.score(lib, stream=s.cuda_stream), layers),
            timed(lambda l, s: l.select_again(lib, stream=s.cuda_stream), layers),
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
        run = lambda prompt, stream: prompt.attend(lib, stream.cuda_stream)
        dense = timed(run, [Prompt(layer, 0, 32)], 10)
        without = timed(lambda prompt, stream: prompt.attend(lib, stream.cuda_stream, wgmma=False), [Prompt(layer, 0, 32)], 10)
        routed = {tile: timed(run, [Prompt(layer, 0, tile, budget // block)], 10) for tile in (32, 16)}
        rows.append({"prompt": tokens, "dense_us": dense, "mma_us": without, "cudnn_us": peer, "routed_us": routed})
        print(f"{tokens:7} queries: dense {dense / 1e3:6.2f} ms ({flops / dense / 1e6:4.0f} TFLOP/s), by mma {without / 1e3:6.2f} ms, cuDNN {peer / 1e3:6.2f} ms "
              f"= {peer / dense:.2f}; routed {routed[32] / 1e3:5.2f} ms, tiles of 16 {routed[16] / 1e3:5.2f} ms", flush=True)
        del layer, q, kv
        torch.cuda.empty_cache()
    if path:
        path.write_text(json.dumps({"device": device.name, "copy_gb_s": copy, "rows": rows}, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    lib = Kernels()
    test(lib)
    test_prefill(lib)
    if args.time:
        time(lib, args.json)


if __name__ == "__main__":
    main()
