//! Fetching from a Hub that cuts, lies, changes and damages: nothing is lost and nothing wrong is kept.

mod common;
#[path = "../../model/tests/common/mod.rs"]
mod gguf;

use common::{Faults, HubServer, etag, foveate, run, stderr, stdout, tiny};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

const FILE: &str = "m-q4_k_m.gguf";

/// A GGUF of about `kib` KiB that loads: a tiny model and a tensor that nothing reads.
fn big(kib: usize) -> Vec<u8> {
    let mut file = gguf::tiny_llama();
    let values: Vec<f32> = (0..kib * 256).map(|i| (i as u32).wrapping_mul(2_654_435_761) as f32).collect();
    file.tensors.push(gguf::TensorEntry::f32("unused.weight", &[kib, 256], &values));
    file.bytes()
}

fn one_file(kib: usize) -> (HubServer, Vec<u8>, tempfile::TempDir) {
    let bytes = big(kib);
    let server = HubServer::start(BTreeMap::from([(FILE.to_string(), bytes.clone()), ("README.md".to_string(), b"hello".to_vec())]));
    (server, bytes, tempfile::tempdir().unwrap())
}

fn blobs(home: &Path) -> PathBuf {
    home.join("hub/models--user--tiny/blobs")
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| !name.ends_with(".lock"));
    names.sort();
    names
}

fn check_whole(home: &Path, bytes: &[u8]) {
    let sum = etag(FILE, bytes);
    assert_eq!(names(&blobs(home)), [sum.as_str()]);
    assert!(std::fs::read(blobs(home).join(sum)).unwrap() == bytes, "the blob is not the file");
}

#[test]
fn a_pull_that_is_cut_again_and_again_goes_on_where_it_stopped() {
    let (server, bytes, home) = one_file(600);
    // Pseudo-random cuts, some before the first byte.
    let cuts: Vec<usize> = (0..20u64).map(|i| (i.wrapping_mul(7919) % 90_000) as usize * usize::from(i % 5 != 0)).collect();
    server.set(Faults { cuts: cuts.clone(), ..Faults::default() });
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 0);
    check_whole(home.path(), &bytes);
    let starts = server.transfers(FILE);
    let mut at = 0;
    for (start, cut) in starts.iter().zip(&cuts) {
        assert_eq!(*start, at, "each transfer goes on where the one before it stopped");
        at = (at + cut).min(bytes.len());
    }
    let output = run(server.foveate(home.path()).args(["generate", "-m", "user/tiny", "--raw", "--greedy", "-n", "1", "ab"]), 0);
    assert_eq!(starts.len(), server.transfers(FILE).len(), "what is here is not fetched again: {}", stderr(&output));
}

#[test]
fn a_server_that_is_gone_leaves_the_partial_file_and_says_how_to_go_on() {
    let (server, bytes, home) = one_file(200);
    server.set(Faults { cuts: [60_000].into_iter().chain([0; 10]).collect(), ..Faults::default() });
    let output = run(server.foveate(home.path()).args(["pull", "user/tiny"]), 4);
    assert!(stderr(&output).contains("run it again to resume from"), "{}", stderr(&output));
    assert_eq!(std::fs::metadata(blobs(home.path()).join(format!("{}.incomplete", etag(FILE, &bytes)))).unwrap().len(), 60_000);
    server.set(Faults::default());
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 0);
    assert_eq!(server.transfers(FILE).last(), Some(&60_000));
    check_whole(home.path(), &bytes);
}

#[test]
fn a_flipped_bit_is_found_before_the_file_gets_its_name() {
    let (server, bytes, home) = one_file(100);
    server.set(Faults { flip: Some(50_000), ..Faults::default() });
    let output = run(server.foveate(home.path()).args(["pull", "user/tiny"]), 5);
    let sum = etag(FILE, &bytes);
    assert!(stderr(&output).contains(&sum), "{}", stderr(&output));
    assert_eq!(names(&blobs(home.path())), [format!("{sum}.bad")]);
    run(server.foveate(home.path()).args(["generate", "--offline", "-m", "user/tiny", "--raw", "x"]), 3);
    server.set(Faults::default());
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 0);
    assert!(std::fs::read(blobs(home.path()).join(&sum)).unwrap() == bytes);
    run(server.foveate(home.path()).args(["models", "verify", "user/tiny"]), 0);
    // Damage on the disk, later.
    let mut damaged = bytes;
    damaged[77_777] ^= 4;
    std::fs::write(blobs(home.path()).join(&sum), damaged).unwrap();
    let output = run(server.foveate(home.path()).args(["models", "verify", "user/tiny"]), 10);
    assert!(stdout(&output).contains("damaged") && stdout(&output).contains(FILE));
}

#[test]
fn a_server_that_lies_about_the_length_is_not_believed() {
    let (server, bytes, home) = one_file(100);
    server.set(Faults { lie: Some(1000), ..Faults::default() });
    let output = run(server.foveate(home.path()).args(["pull", "user/tiny"]), 4);
    let text = stderr(&output);
    assert!(text.contains(&bytes.len().to_string()) && text.contains(&(bytes.len() + 1000).to_string()), "{text}");
    // And when it goes on with a range of another file.
    server.set(Faults { cuts: [9000].into_iter().chain([0; 10]).collect(), ..Faults::default() });
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 4);
    server.set(Faults { lie: Some(1000), ..Faults::default() });
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 4);
    server.set(Faults::default());
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 0);
    check_whole(home.path(), &bytes);
}

#[test]
fn a_file_that_changes_midway_is_fetched_anew_and_never_mixed() {
    let (server, old, home) = one_file(200);
    server.set(Faults { cuts: [60_000].into_iter().chain([0; 10]).collect(), ..Faults::default() });
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 4);
    let new = big(201);
    server.change(FILE, new.clone());
    server.set(Faults::default());
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 0);
    let sum = etag(FILE, &new);
    assert!(std::fs::read(blobs(home.path()).join(&sum)).unwrap() == new);
    assert_ne!(sum, etag(FILE, &old));
    assert_eq!(server.transfers(FILE).last(), Some(&0), "the new file starts from its beginning");
}

#[test]
fn a_server_without_ranges_starts_again_and_says_so() {
    let (server, bytes, home) = one_file(100);
    server.set(Faults { cuts: vec![40_000], no_ranges: true, ..Faults::default() });
    let output = run(server.foveate(home.path()).args(["pull", "user/tiny"]), 0);
    assert!(stderr(&output).contains("starting again"), "{}", stderr(&output));
    check_whole(home.path(), &bytes);
}

#[test]
fn a_pull_killed_twice_resumes_and_verifies() {
    let (server, bytes, home) = one_file(800);
    server.set(Faults { slow: Some(Duration::from_millis(30)), ..Faults::default() });
    let partial = blobs(home.path()).join(format!("{}.incomplete", etag(FILE, &bytes)));
    let size = || std::fs::metadata(&partial).map_or(0, |metadata| metadata.len());
    for _ in 0..2 {
        let before = size();
        let mut child = server.foveate(home.path()).args(["pull", "-q", "user/tiny"]).stderr(Stdio::null()).spawn().unwrap();
        while size() < before + 100_000 {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
    }
    server.set(Faults::default());
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 0);
    let starts = server.transfers(FILE);
    assert!(starts.len() == 3 && starts[1] >= 100_000 && starts[2] >= 200_000, "{starts:?}");
    check_whole(home.path(), &bytes);
}

#[test]
fn of_two_pulls_at_once_one_waits() {
    let (server, bytes, home) = one_file(300);
    server.set(Faults { slow: Some(Duration::from_millis(40)), ..Faults::default() });
    let start = || server.foveate(home.path()).args(["pull", "user/tiny"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (first, second) = (start(), start());
    let outputs = [first.wait_with_output().unwrap(), second.wait_with_output().unwrap()];
    assert!(outputs.iter().all(|output| output.status.success()), "{outputs:?}");
    assert_eq!(outputs.iter().filter(|output| stderr(output).contains("waiting")).count(), 1, "{outputs:?}");
    assert_eq!(server.transfers(FILE), [0], "the file came once");
    check_whole(home.path(), &bytes);
}

#[test]
fn every_refusal_is_explained_in_one_line() {
    let (server, _, home) = one_file(1);
    for (status, code, words) in [(401, 4, "wants a token"), (403, 4, "licence"), (404, 3, "no such repository"), (500, 4, "500")] {
        server.set(Faults { status: Some(status), ..Faults::default() });
        let output = run(server.foveate(home.path()).args(["pull", "user/tiny"]), code);
        let text = stderr(&output);
        assert!(text.contains(words) && text.lines().count() <= 3, "{status}: {text}");
    }
    let output = run(foveate(home.path()).env("HF_ENDPOINT", "http://127.0.0.1:9").args(["pull", "user/tiny"]), 4);
    assert!(stderr(&output).contains("no connection to http://127.0.0.1:9"), "{}", stderr(&output));
    let output = run(server.foveate(home.path()).env("HF_HUB_OFFLINE", "1").args(["generate", "-m", "user/tiny", "hello"]), 3);
    assert!(stderr(&output).contains("foveate pull user/tiny"), "{}", stderr(&output));
    let output = run(server.foveate(home.path()).args(["--json", "pull", "user/tiny", "--offline"]), 3);
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((json["error"]["exit"].as_u64(), json["error"]["code"].as_str()), (Some(3), Some("not_found")));
}

#[test]
fn without_a_hub_the_mirror_wants_python_and_says_so() {
    let home = tempfile::tempdir().unwrap();
    let output = run(foveate(home.path()).env("HF_ENDPOINT", "http://127.0.0.1:9").env("PATH", "/nowhere").args(["pull"]), 4);
    let text = stderr(&output);
    assert!(text.contains("no connection to http://127.0.0.1:9") && text.contains("python3 does not start"), "{text}");
}

#[test]
fn a_name_that_climbs_out_of_the_snapshot_is_not_fetched() {
    let (server, _, home) = one_file(1);
    server.change("../../../../outside-q8_0.gguf", big(1));
    run(server.foveate(home.path()).args(["pull", "user/tiny:q8_0"]), 3);
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 0);
    assert!(server.transfers("../../../../outside-q8_0.gguf").is_empty());
}

#[test]
fn an_architecture_that_cannot_run_is_refused_before_its_weights_are_fetched() {
    let config =
        r#"{"model_type":"mamba","hidden_size":8,"intermediate_size":8,"num_hidden_layers":1,"vocab_size":8,"num_attention_heads":1}"#;
    let files = [("config.json", config.as_bytes()), ("tokenizer.json", b"{}"), ("model.safetensors", b"large")];
    let server = HubServer::start(files.map(|(name, bytes)| (name.to_string(), bytes.to_vec())).into());
    let home = tempfile::tempdir().unwrap();
    let output = run(server.foveate(home.path()).args(["pull", "user/tiny"]), 5);
    assert!(stderr(&output).contains("mamba") && stderr(&output).contains("qwen3"), "{}", stderr(&output));
    assert!(server.transfers("model.safetensors").is_empty());
}

#[test]
fn a_directory_that_cannot_be_written_is_named() {
    let (server, _, home) = one_file(1);
    let file = home.path().join("a-file");
    std::fs::write(&file, "").unwrap();
    let output = run(server.foveate(home.path()).args(["pull", "user/tiny", "--cache-dir"]).arg(file.join("cache")), 9);
    assert!(stderr(&output).contains("a-file") && stderr(&output).contains("--cache-dir"), "{}", stderr(&output));
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_keeps_what_came_and_tells_the_numbers() {
    let (server, _, home) = one_file(9 << 10);
    let small = tempfile::tempdir().unwrap();
    let mount = |size: &str| {
        std::process::Command::new("mount").args(["-t", "tmpfs", "-o", size, "tmpfs"]).arg(small.path()).stderr(Stdio::null()).status()
    };
    if !mount("size=8m").is_ok_and(|status| status.success()) {
        println!("skipped: this user cannot mount a small file system");
        return;
    }
    let output = server.foveate(home.path()).args(["pull", "user/tiny", "--cache-dir"]).arg(small.path()).output().unwrap();
    std::process::Command::new("umount").arg(small.path()).status().unwrap();
    assert_eq!(output.status.code(), Some(9), "{}", stderr(&output));
    assert!(stderr(&output).contains("not enough space") && stderr(&output).contains("8.00 MiB free"), "{}", stderr(&output));
}

#[test]
fn a_sharded_checkpoint_is_fetched_at_one_commit_and_runs_offline() {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(tiny("llama")).unwrap().flatten() {
        files.insert(entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).unwrap());
    }
    let (server, home) = (HubServer::start(files), tempfile::tempdir().unwrap());
    run(server.foveate(home.path()).args(["pull", "user/tiny"]), 0);
    assert!(server.transfers("golden.safetensors").is_empty(), "only what the index names is fetched");
    let snapshot = home.path().join("hub/models--user--tiny/snapshots").join("c".repeat(40));
    assert_eq!(std::fs::read_to_string(home.path().join("hub/models--user--tiny/refs/main")).unwrap(), "c".repeat(40));
    assert_eq!(names(&snapshot).iter().filter(|name| name.ends_with(".safetensors")).count(), 4);
    let local = tiny("llama");
    let generate = |model: &str| {
        let output = run(
            foveate(home.path()).args(["generate", "--offline", "--json", "--greedy", "-n", "12", "--prompt-ids", "5,6,7,8", "-m", model]),
            0,
        );
        serde_json::from_str::<serde_json::Value>(&stdout(&output)).unwrap()
    };
    let (fetched, own) = (generate("user/tiny"), generate(local.to_str().unwrap()));
    assert_eq!(fetched["token_ids"], own["token_ids"]);
    assert_eq!(fetched["model"]["revision"], "c".repeat(40));

    let listed = stdout(&run(foveate(home.path()).arg("ls"), 0));
    assert!(listed.contains("user/tiny") && listed.contains("complete"), "{listed}");
    // A shard gone: then the model is not here.
    std::fs::remove_file(snapshot.join("model-00002-of-00004.safetensors")).unwrap();
    run(foveate(home.path()).args(["generate", "--offline", "-m", "user/tiny", "x"]), 3);
    let output = run(foveate(home.path()).args(["rm", "user/tiny"]).stdin(Stdio::null()), 2);
    assert!(stderr(&output).contains("--yes"));
    run(foveate(home.path()).args(["rm", "user/tiny", "--yes"]), 0);
    assert!(!home.path().join("hub/models--user--tiny").exists());
    run(foveate(home.path()).args(["rm", "user/tiny", "--yes"]), 3);
}
