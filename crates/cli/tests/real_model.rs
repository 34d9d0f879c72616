//! Published weights: fetched by the program itself, compared with what llama.cpp made of the same files.
//!
//! The default model runs everywhere; the two larger ones by `just test-models`.

mod common;

use common::{run, stderr, stdout};
use serde_json::Value;
use std::process::{Command, Stdio};

const SMOLLM2: &str = "smollm2-135m-instruct";

/// With the user's own cache: models are large, and fetching them is tested elsewhere.
fn foveate() -> Command {
    Command::new(env!("CARGO_BIN_EXE_foveate"))
}

fn golden(model: &str) -> (String, Value) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama_cpp.json");
    let all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    (all["text"].as_str().unwrap().to_string(), all["models"][model].clone())
}

fn generate(model: &str, args: &[&str]) -> Value {
    let output = run(foveate().args(["generate", "--json", "-q", "-m", model]).args(args), 0);
    serde_json::from_str(&stdout(&output)).unwrap()
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

/// A text with code, emoji, CJK, runs of spaces and newlines has the ids that llama.cpp gives it.
fn check_tokenizer(model: &str) {
    run(foveate().args(["pull", model]), 0);
    let (text, golden) = golden(model);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let document = generate(model, &["--raw", "--no-bos", "--greedy", "-n", "1", "-f", file.path().to_str().unwrap()]);
    assert_eq!(ids(&document["prompt_token_ids"]), ids(&golden["text_ids"]));
}

/// Greedy ids are llama.cpp's, up to the first position where its own two likeliest tokens are close, or the weights say another.
fn check_greedy(model: &str) {
    run(foveate().args(["pull", model]), 0);
    let (_, golden) = golden(model);
    for prompt in golden["prompts"].as_array().unwrap() {
        let document = generate(model, &["--raw", "--greedy", "-n", "32", "-p", prompt["prompt"].as_str().unwrap()]);
        assert_eq!(ids(&document["prompt_token_ids"]), ids(&prompt["prompt_ids"]), "{prompt}");
        let sure = prompt["first_close"].as_u64().unwrap() as usize;
        let (ours, theirs) = (ids(&document["token_ids"]), ids(&prompt["ids"]));
        assert_eq!(ours[..sure.min(ours.len())], theirs[..sure], "{prompt}");
    }
}

#[test]
fn the_default_model_knows_the_capital_of_france() {
    let output = run(foveate().args(["generate", "The capital of France is", "--raw", "--greedy", "-n", "8"]), 0);
    assert!(stdout(&output).starts_with(" Paris"), "{}", stdout(&output));
}

#[test]
fn smollm2_tokenizes_and_continues_as_llama_cpp() {
    check_tokenizer(SMOLLM2);
    check_greedy(SMOLLM2);
}

#[test]
#[ignore = "fetches 470 MB: just test-models"]
fn qwen_tokenizes_and_continues_as_llama_cpp() {
    check_tokenizer("qwen2.5-coder-0.5b-instruct");
    check_greedy("qwen2.5-coder-0.5b-instruct");
}

#[test]
#[ignore = "fetches 240 MB: just test-models"]
fn gemma_tokenizes_and_continues_as_llama_cpp() {
    check_tokenizer("gemma-3-270m");
    check_greedy("gemma-3-270m");
}

/// The very same binary on processors that lack instructions of this one.
#[test]
#[ignore = "emulates other processors, for minutes, with qemu-user: just test-models"]
fn older_processors_give_the_same_tokens() {
    if Command::new("qemu-x86_64").arg("-version").output().is_err() || cfg!(not(target_arch = "x86_64")) {
        println!("skipped: qemu-x86_64 is not here, or this is no x86-64");
        return;
    }
    run(foveate().args(["pull", SMOLLM2]), 0);
    // Long enough for the way that prompts take, and routed.
    let prompt = "The capital of France is Paris, that of Italy is Rome, that of Spain is Madrid, and the capital of Japan is";
    let flags = ["--raw", "--greedy", "-n", "6", "-t", "2", "--attn", "routed", "--min-ctx", "0", "--window", "8", "--budget", "16"];
    let here = generate(SMOLLM2, &[&["-p", prompt][..], &flags].concat());
    // Neither AVX nor FMA; AVX2; both without AVX-512.
    for processor in ["Westmere", "Haswell"] {
        let mut emulated = Command::new("qemu-x86_64");
        emulated.args(["-cpu", processor, env!("CARGO_BIN_EXE_foveate"), "generate", "--json", "-q", "-m", SMOLLM2, "-p", prompt]);
        let there: Value = serde_json::from_str(&stdout(&run(emulated.args(flags), 0))).unwrap();
        assert_eq!(ids(&here["token_ids"]), ids(&there["token_ids"]), "{processor}");
    }
}

#[test]
fn a_chat_computes_each_turn_once() {
    use std::io::Write;
    let mut child = foveate()
        .args(["chat", "--greedy", "-n", "24", "--show-prompt"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"What is the capital of Japan?\nAnd of Italy?\n/regen\nAnd of Spain?\n/bye\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = stdout(&output);
    for city in ["Tokyo", "Rome", "Madrid"] {
        assert!(text.contains(city), "{text}");
    }
    // Every later turn computes its own tokens, about twenty, and none of the hundred before them.
    let turns: Vec<usize> = stderr(&output).lines().filter_map(|line| line.split_once(" new in")?.0.parse().ok()).collect();
    assert_eq!(turns.len(), 4, "{}", stderr(&output));
    assert!(turns[0] > 30 && turns[1] < 25 && turns[2] == 1 && turns[3] < 25, "{turns:?}");
}
