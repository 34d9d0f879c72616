#!/usr/bin/env python3
"""The table of what block routing costs a model (models/README.md): every budget, block and score, and the controls.

    zcat /usr/share/doc/jargon-text/jargon.txt.gz > jargon.txt   # Debian's package jargon-text 4.4.7
    python3 scripts/quality.py smollm2-135m-instruct -f jargon.txt -c 8192 --from 3840
    python3 scripts/quality.py qwen2.5-coder-0.5b-instruct -f jargon.txt -c 16384 --from 8192

Each setting reads the text once: 20 seconds at 8192 tokens of SmolLM2 on two cores, two minutes at 16384 of Qwen.
"""

import argparse
import json
import subprocess
import sys

BLOCKS = "--attn routed --min-ctx 0 --dense-layers {dense} --block-router {router} --block {block} --budget {budget}"


def settings():
    budgets = ("512", "1024", "2048", "12.5%")
    for router in ("mean", "bound", "spread"):
        for block in (16, 32) if router != "spread" else (16, 8):
            for budget in budgets:
                yield BLOCKS.format(dense=2, router=router, block=block, budget=budget)
    for budget in ("1024", "1280", "2048", "30%"):
        yield BLOCKS.format(dense=0, router="spread", block=8, budget=budget)
    yield BLOCKS.format(dense=2, router="oracle", block=16, budget="1024")
    yield BLOCKS.format(dense=2, router="recent", block=16, budget="1024")
    yield "--attn dense --cache-type q8_0"
    yield "--attn dense --token-router random --keep 0.5"
    yield "--attn dense --token-router sink_window --window 1024"


def name(setting):
    attn = setting["attn"]
    parts = ["dense"]
    if attn["mode"] != "dense":
        part = f"{100 * attn['budget_part']:g} %"
        budget = str(attn["budget"]) if attn["budget"] else part
        parts = [f"{attn['block_router']} b{budget} B{attn['block']}" if attn["block_router"] != "recent" else "recent"]
        if attn["dense_layers"] == 0:
            parts.append("no dense layers")
    if setting["kv_dtypes"]["k"] != "f16":
        parts.append(setting["kv_dtypes"]["k"])
    if attn["token_router"] == "random":
        parts.append("random half")
    if attn["token_router"] == "sink_window":
        parts.append(f"first {attn['sinks']} and newest {attn['window']}")
    return ", ".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-f", "--file", required=True)
    parser.add_argument("-c", "--context", default="8192")
    parser.add_argument("--from", dest="first", default="3840", help="the first position that is scored")
    parser.add_argument("--with", dest="extra", action="append", metavar="FLAGS", help="these settings instead of all")
    parser.add_argument("--binary", default="target/release/foveate")
    args = parser.parse_args()
    command = [args.binary, "eval", "ppl", "-m", args.model, "-f", args.file, "-c", args.context, "--from", args.first, "--exact", "--json"]
    for setting in args.extra or settings():
        command += ["--with", setting]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    result = json.loads(done.stdout)
    print(f"{result['model']}, {result['tokens']} tokens, {result['scored']} scored, dense perplexity {result['dense']['ppl']:.2f}\n")
    print("| setting | KL mean (p99) | same top-1 | perplexity | keys read | KV resident |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in result["settings"]:
        print(f"| {name(row)} | {row['kl_mean']:.4f} ({row['kl_p99']:.3f}) | {100 * row['same_top1']:.1f} % | {100 * row['ppl_change']:+.2f} % "
              f"| {100 * row['density']:.1f} % | {row['kv_bytes'] / 2**20:.2f} MiB |")


if __name__ == "__main__":
    main()
