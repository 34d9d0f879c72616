//! Embeds the manifests of `models/*.toml`, the token routers of `models/routers/` and what `--version` says of the build.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../..");
    let models = root.join("models");
    println!("cargo::rerun-if-changed={}", models.display());
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets it"));
    std::fs::write(out.join("manifests.rs"), embedded(&models, "toml", "include_str")).expect("OUT_DIR is writable");
    let routers = embedded(&models.join("routers"), "safetensors", "include_bytes");
    std::fs::write(out.join("routers.rs"), routers).expect("OUT_DIR is writable");

    // Grows with every commit. Cargo takes a file that is not there for one that changed: then it is not watched.
    let commits = root.join(".git/logs/HEAD");
    if commits.is_file() {
        println!("cargo::rerun-if-changed={}", commits.display());
    }
    let commit = Command::new("git").args(["-C", &root.display().to_string(), "rev-parse", "--short=10", "HEAD"]).output();
    let commit = commit.ok().filter(|output| output.status.success()).and_then(|output| String::from_utf8(output.stdout).ok());
    println!("cargo::rustc-env=FOVEATE_COMMIT={}", commit.as_deref().map_or("unknown", str::trim));
    let cuda = std::env::var_os("CARGO_FEATURE_CUDA").is_some();
    println!("cargo::rustc-env=FOVEATE_BACKENDS={}", if cuda { "cpu, cuda" } else { "cpu" });
    println!("cargo::rustc-env=FOVEATE_TARGET={}", std::env::var("TARGET").expect("cargo sets it"));
}

/// A list of the names and contents of the files of `dir` with this extension.
fn embedded(dir: &Path, extension: &str, macro_name: &str) -> String {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .expect("the directory is part of the tree")
        .map(|entry| entry.expect("the directory is readable").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    let mut list = String::from("[\n");
    for file in files {
        let path = file.canonicalize().expect("just listed");
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        writeln!(list, "    ({name:?}, {macro_name}!({path:?})),").expect("writing to a string");
    }
    list.push_str("]\n");
    list
}
