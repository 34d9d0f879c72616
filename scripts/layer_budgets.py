#!/usr/bin/env python3
"""Budgets by layer: spends the same number of keys where they catch the most of dense attention.

Takes documents of `foveate route --json`, of one prompt at several --budget settings (layer budgets all 1), and prints factors
for `layer_budgets` of a manifest (or --layer-budgets), whose mean over the routed layers is 1.

    for b in 256 512 1024 2048 4096; do
        foveate route -m MODEL --raw -f TEXT --attn routed --min-ctx 0 --layer-budgets 1 --budget $b --no-files --json -q > $b.json
    done
    scripts/layer_budgets.py 1024 256.json 512.json 1024.json 2048.json 4096.json

The gain of a layer is the recall that the next larger budget adds per key; the budget is spent on the largest gains first.
"""
import json
import sys


def main(mean, paths):
    documents = sorted((json.load(open(path)) for path in paths), key=lambda d: d["attn"]["budget"])
    budgets = [document["attn"]["budget"] for document in documents]
    dense_layers = documents[0]["attn"]["dense_layers"]
    layers = range(dense_layers, len(documents[0]["layers"]))
    recall = {l: [document["layers"][l]["recall"] for document in documents] for l in layers}
    level = dict.fromkeys(layers, 0)
    left = mean * len(level) - budgets[0] * len(level)
    while True:
        # Steps over several levels count too: a recall curve need not be concave.
        steps = [
            ((recall[l][to] - recall[l][level[l]]) / (budgets[to] - budgets[level[l]]), l, to)
            for l in layers
            for to in range(level[l] + 1, len(budgets))
            if budgets[to] - budgets[level[l]] <= left
        ]
        if not steps or max(steps)[0] <= 0:
            break
        _, layer, to = max(steps)
        left -= budgets[to] - budgets[level[layer]]
        level[layer] = to
    chosen = [budgets[level[l]] if l in level else mean for l in range(len(documents[0]["layers"]))]
    before = sum(recall[l][budgets.index(mean)] for l in layers) / len(level) if mean in budgets else float("nan")
    after = sum(recall[l][level[l]] for l in layers) / len(level)
    print(f"# recall {before:.4f} -> {after:.4f} at a mean budget of {sum(chosen[l] for l in layers) / len(level):.0f}", file=sys.stderr)
    print("layer_budgets = [" + ", ".join(f"{budget / mean:g}" for budget in chosen) + "]")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(int(sys.argv[1]), sys.argv[2:])
