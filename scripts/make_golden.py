#!/usr/bin/env python3
"""Updates one model's part of the fixture: make_golden.py FIXTURE.json NAME MODEL.gguf

Reads the text and the prompts that are there, asks llama.cpp, writes the same file. Its ids count up to the first that its own second
likeliest token is close to, or that the weights do not say: llama.cpp rounds activations to 8 bits, which decides some tokens by itself.
One model a process: llama.cpp keeps one server."""
import json
import sys
import urllib.request

import xllamacpp
from exact_logits import Model

CLOSE = 0.15  # log-probability: below it either of the two likeliest tokens is right
TOKENS = 32

fixture_path, name, model_path = sys.argv[1:4]
fixture = json.load(open(fixture_path, encoding="utf-8"))
params = xllamacpp.CommonParams()
params.model.path = model_path
params.n_ctx = 1024
params.n_parallel = 1
params.n_gpu_layers = 0
server = xllamacpp.Server(params)


def tokenize(text, add_special):
    body = json.dumps({"content": text, "add_special": add_special, "parse_special": False}).encode()
    url = server.listening_address.rstrip("/") + "/tokenize"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]


exact = Model(model_path)
rows = []
for old in fixture["models"][name]["prompts"]:
    prompt_ids = tokenize(old["prompt"], True)
    request = {"prompt": prompt_ids, "n_predict": TOKENS, "cache_prompt": False, "temperature": 0, "logprobs": 2}
    steps = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    margins = [step["top_logprobs"][0]["logprob"] - step["top_logprobs"][1]["logprob"] for step in steps]
    ids = [step["id"] for step in steps]
    likeliest = exact.logits(prompt_ids + ids)[len(prompt_ids) - 1 : -1].argmax(-1)
    first_close = next((i for i, margin in enumerate(margins) if margin < CLOSE or likeliest[i] != ids[i]), len(steps))
    rows.append({"prompt": old["prompt"], "prompt_ids": prompt_ids, "ids": ids, "first_close": first_close})
fixture["models"][name] = {"text_ids": tokenize(fixture["text"], False), "prompts": rows}
json.dump(fixture, open(fixture_path, "w", encoding="utf-8"), ensure_ascii=False, separators=(",", ":"))
