#!/usr/bin/env bash
# A CUDA 13.0 toolkit from Python packages, without root or a GPU, for `cargo build --features cuda` where none is installed.
# About 240 MB are fetched into DIR (default target/cuda-toolkit). Prints what to set:
#
#     eval "$(scripts/cuda_toolkit.sh)"
#     cargo build --release --features cuda
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-target/cuda-toolkit}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
root=$dir/nvidia/cu13

if [ ! -x "$root/bin/nvcc" ]; then
    python3 -m pip download -q --no-deps -d "$dir/wheels" \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
        nvidia-cuda-cccl==13.0.85 nvidia-curand==10.4.0.35 nvidia-cublas==13.0.2.14 nvidia-cuda-nvrtc==13.0.88 >&2
    for wheel in "$dir"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$dir"; done
    chmod +x "$root"/bin/* "$root"/nvvm/bin/*
    ln -sfn lib "$root/lib64"
    for library in "$root"/lib/lib*.so.*; do ln -sf "$(basename "$library")" "${library%.so.*}.so"; done
    rm -r "$dir/wheels"
fi

# The driver's library is in no package. cudarc's sources name its functions: a library of that name to link with, never to run.
if [ ! -e "$root/lib/stubs/libcuda.so" ]; then
    cargo fetch --locked >&2
    mkdir -p "$root/lib/stubs"
    python3 scripts/lazy_cuda.py --stub "$root/lib/stubs"
fi

echo "export CUDA_HOME=$root CUDA_PATH=$root CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=90 CUDAFORGE_THREADS=$(nproc)"
echo "export NVCC=$PWD/scripts/nvcc_portable.sh PATH=$root/bin:\$PATH LIBRARY_PATH=$root/lib:$root/lib/stubs"
