# The verbs of this project: `just --list`.

# everything that CI checks
check:
    scripts/check.sh

# the tests alone
test *ARGS:
    cargo test --workspace {{ARGS}}

# the tests on published models that are too large for CI: 700 MB are fetched once
test-models:
    cargo test --release -p foveate --test real_model -- --include-ignored

# the default model on a prompt
run *ARGS:
    cargo run --release -- {{ARGS}}

# the expected ids of tests/real_model.rs, anew from llama.cpp
golden:
    scripts/make_golden.sh

# the CUDA kernels against float64, and their times beside cuDNN's: needs nvcc, a GPU and PyTorch
test-cuda:
    python3 scripts/test_cuda_kernels.py --time
