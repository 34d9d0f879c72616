#!/usr/bin/env bash
# Makes crates/cli/tests/fixtures/llama_cpp.json anew: what llama.cpp makes of the models' text and prompts.
# Wants Python 3.10 or newer; fetches llama.cpp as a Python package and the models by `foveate pull`.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -d target/peer ] || { python3 -m venv target/peer && target/peer/bin/pip install -q xllamacpp==2026.10.11549 gguf==0.17.1; }
cargo build --release
fixture=crates/cli/tests/fixtures/llama_cpp.json
for model in smollm2-135m-instruct qwen2.5-coder-0.5b-instruct gemma-3-270m; do
    target/release/foveate pull -q "$model"
    target/peer/bin/python scripts/make_golden.py "$fixture" "$model" "$(target/release/foveate models path "$model")"
done
