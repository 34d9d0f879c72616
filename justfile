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

# target/release/foveate with CUDA, which starts anywhere
build-cuda:
    scripts/cuda_build.sh

# that all code of the CUDA feature compiles and is clean: no GPU needed
check-cuda:
    eval "$(scripts/cuda_toolkit.sh)" && cargo clippy --release --workspace --all-targets --features cuda -- -D warnings

# the CUDA backend against the plain one and the model against the host; then the kernels against float64 and beside cuDNN: needs nvcc, a
# GPU and PyTorch. Without a GPU the first two say that they were skipped.
test-cuda:
    cargo test --release --workspace --features cuda --test cuda -- --nocapture
    python3 scripts/test_cuda_kernels.py --time
