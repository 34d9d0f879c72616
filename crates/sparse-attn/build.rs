//! With the feature `cuda`: kernels/cuda as one binary, which the crate embeds. Nothing is linked, so no CUDA library is needed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
    println!("cargo:rerun-if-changed={}", kernels.display());
    for name in ["CUDA_HOME", "CUDA_PATH", "FOVEATE_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let home = env::var_os("CUDA_HOME").or_else(|| env::var_os("CUDA_PATH"));
    let nvcc = home.map_or_else(|| PathBuf::from("nvcc"), |home| Path::new(&home).join("bin/nvcc"));
    // Machine code for these (8.6 and 8.9 run that of 8.0), and PTX of the lowest for what comes later. 90a: 9.0 and what only it has.
    let archs = env::var("FOVEATE_CUDA_ARCHS").unwrap_or_else(|_| "80,90a".into());
    let mut archs: Vec<&str> = archs.split(',').map(str::trim).collect();
    archs.sort_unstable();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("kernels.fatbin");
    let mut command = Command::new(&nvcc);
    command.args(["-fatbin", "-O3", "-std=c++20", "--compress-mode=size", "--threads", "2"]);
    for arch in &archs {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    command.arg(format!("-gencode=arch=compute_{0},code=compute_{0}", archs[0]));
    command.arg("-o").arg(&out).arg(kernels.join("cuda/all.cu"));
    let done = command.output().unwrap_or_else(|error| {
        panic!("{}: {error}; set CUDA_HOME to a CUDA toolkit, or get one with scripts/cuda_toolkit.sh", nvcc.display())
    });
    assert!(done.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&done.stderr));
    assert!(fs::metadata(&out).is_ok_and(|file| file.len() > 0), "nvcc made no {}", out.display());
}
