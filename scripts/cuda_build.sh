#!/usr/bin/env bash
# target/release/foveate for CPUs and NVIDIA GPUs, starting on machines without CUDA too: there it runs on the CPU. Takes the toolkit of
# CUDA_HOME, or fetches one. Ten minutes on two cores: most of it is candle's own kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${CUDA_HOME:-}" ]; then eval "$(scripts/cuda_toolkit.sh)"; fi
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} NVCC=${NVCC:-$PWD/scripts/nvcc_portable.sh}
python3 scripts/lazy_cuda.py target/lazy-cuda
cargo rustc --release --features cuda -p foveate --bin foveate -- -L native="$PWD/target/lazy-cuda"
