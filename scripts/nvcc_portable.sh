#!/usr/bin/env bash
# nvcc for candle's kernels, as `NVCC`: candle's build asks for one architecture, and what it makes for compute
# capability 9.0 (sm_90a) runs nowhere else. Here an object holds machine code for 8.0 (8.6 and 8.9 run it) and 9.0
# and PTX for what comes later, and a PTX text is that of 8.0.
set -euo pipefail
kind=other
for argument in "$@"; do
    case "$argument" in
        --ptx) kind=ptx ;;
        -c) kind=object ;;
    esac
done
arguments=()
for argument in "$@"; do
    case "$kind $argument" in
        "ptx -gencode="*) arguments+=(-gencode=arch=compute_80,code=compute_80) ;;
        "object -gencode="*)
            arguments+=(-gencode=arch=compute_80,code=[sm_80,compute_80] -gencode=arch=compute_90,code=sm_90 --compress-mode=size)
            ;;
        *) arguments+=("$argument") ;;
    esac
done
exec "${CUDA_HOME:?the CUDA toolkit}/bin/nvcc" "${arguments[@]}"
