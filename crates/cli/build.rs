//! Embeds the manifests of `models/*.toml` and what `--version` says of the build.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../..");
    let models = root.join("models");
    println!("cargo::rerun-if-changed={}", models.display());
    let mut files: Vec<PathBuf> = std::fs::read_dir(&models)
        .expect("models/ is part of the tree")
        .map(|entry| entry.expect("models/ is readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    files.sort();
    let mut list = String::from("[\n");
    for file in files {
        let path = file.canonicalize().expect("just listed");
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        writeln!(list, "    ({name:?}, include_str!({path:?})),").expect("writing to a string");
    }
    list.push_str("]\n");
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets it"));
    std::fs::write(out.join("manifests.rs"), list).expect("OUT_DIR is writable");

    let commit = Command::new("git").args(["-C", &root.display().to_string(), "rev-parse", "--short=10", "HEAD"]).output();
    let commit = commit.ok().filter(|output| output.status.success()).and_then(|output| String::from_utf8(output.stdout).ok());
    println!("cargo::rustc-env=FOVEATE_COMMIT={}", commit.as_deref().map_or("unknown", str::trim));
    println!("cargo::rustc-env=FOVEATE_TARGET={}", std::env::var("TARGET").expect("cargo sets it"));
}
