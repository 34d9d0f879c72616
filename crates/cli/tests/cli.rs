//! The command line on tiny checkpoints: what goes where, and how each mistake ends.

mod common;
#[path = "../../model/tests/common/mod.rs"]
mod gguf;

use common::{foveate, run, stderr, stdout, tiny};
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

struct Case {
    home: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.home.path().join(name).display().to_string()
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        std::fs::write(self.home.path().join(name), bytes).unwrap();
        self.path(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = foveate(self.home.path());
        command.args(args).stdin(Stdio::null());
        command
    }

    fn llama(&self, args: &[&str]) -> Command {
        let mut command = self.command(args);
        command.arg("-m").arg(tiny("llama"));
        command
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = run(self.llama(args).arg("--json"), 0);
        serde_json::from_str(&stdout(&output)).unwrap()
    }
}

fn with_input(mut command: Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn generated_text_is_all_that_goes_to_standard_output() {
    let case = Case::new();
    let args = ["generate", "--raw", "--greedy", "-n", "8", "hello there"];
    let (plain, json) = (run(&mut case.llama(&args), 0), case.json(&args));
    assert_eq!(stdout(&plain).trim_end_matches('\n'), json["text"].as_str().unwrap().trim_end_matches('\n'));
    assert!(stderr(&plain).contains("8 out"), "{}", stderr(&plain));
    let quiet = run(case.llama(&args).arg("-q"), 0);
    assert!(quiet.stderr.is_empty() && quiet.stdout == plain.stdout);
}

#[test]
fn the_json_document_has_what_it_promises() {
    let case = Case::new();
    let document = case.json(&["generate", "--prompt-ids", "5,6,7", "-n", "4", "-s", "11", "--logprobs", "3", "--ignore-eos"]);
    assert_eq!(document["schema"], "foveate.generate/1");
    assert_eq!(document["prompt_token_ids"], serde_json::json!([5, 6, 7]));
    assert_eq!((document["prompt_tokens"].as_u64(), document["output_tokens"].as_u64()), (Some(3), Some(4)));
    assert_eq!((document["finish_reason"].as_str(), document["seed"].as_u64()), (Some("length"), Some(11)));
    assert_eq!(document["token_ids"].as_array().unwrap().len(), 4);
    assert!(document["memory"]["weights_bytes"].as_u64().unwrap() > 0 && document["memory"]["kv_bytes"].as_u64().unwrap() > 0);
    assert!(document["timings"]["decode_tps"].as_f64().unwrap() > 0.0);
    for (row, id) in document["logprobs"].as_array().unwrap().iter().zip(document["token_ids"].as_array().unwrap()) {
        assert_eq!((&row["id"], row["top"].as_array().unwrap().len()), (id, 3));
        assert!(row["logprob"].as_f64().unwrap() <= row["top"][0]["logprob"].as_f64().unwrap());
    }
}

#[test]
fn the_same_seed_gives_the_same_text_and_threads_do_not_matter() {
    let case = Case::new();
    let text = |seed: &str, threads: &str| {
        let args = ["generate", "--raw", "once upon", "-n", "24", "--temp", "1.5", "--ignore-eos", "-s", seed, "-t", threads];
        case.json(&args)["token_ids"].clone()
    };
    let first = text("7", "1");
    assert_eq!(text("7", "1"), first);
    assert_eq!(text("7", "2"), first);
    assert_ne!(text("8", "1"), first);
    let output = run(&mut case.llama(&["generate", "--raw", "once upon", "-n", "2"]), 0);
    assert!(stderr(&output).contains("seed "), "a random seed is printed: {}", stderr(&output));
}

#[test]
fn prompts_come_from_arguments_files_and_pipes() {
    let case = Case::new();
    let prompt = |command: &mut Command| -> Value {
        let output = run(command.args(["--raw", "--json", "--greedy", "-n", "1"]), 0);
        serde_json::from_str::<Value>(&stdout(&output)).unwrap()["prompt_token_ids"].clone()
    };
    let want = prompt(&mut case.llama(&["generate", "hello world"]));
    assert_eq!(prompt(&mut case.llama(&["generate", "-p", "hello world"])), want);
    let file = case.file("prompt.txt", "hello world");
    assert_eq!(prompt(&mut case.llama(&["gen", "-f", &file])), want);
    let wide: Vec<u8> = [0xff, 0xfe].into_iter().chain("hello world".encode_utf16().flat_map(u16::to_le_bytes)).collect();
    assert_eq!(prompt(&mut case.llama(&["gen", "-f", &case.file("wide.txt", wide)])), want);
    let half = case.file("half.txt", "hello");
    assert_eq!(prompt(&mut case.llama(&["gen", "-f", &half, "-p", "world"])), prompt(&mut case.llama(&["gen", "hello\nworld"])));
    for args in [&["generate"][..], &["generate", "-"], &["generate", "-f", "-"]] {
        let mut command = case.llama(args);
        command.args(["--raw", "--json", "--greedy", "-n", "1"]);
        let output = with_input(command, b"hello world");
        assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["prompt_token_ids"], want, "{args:?}");
    }
}

#[test]
fn routed_attention_reads_less_and_is_dense_while_all_fits() {
    let case = Case::new();
    let ids: Vec<String> = (0..700).map(|i| (5 + i * 31 % 500).to_string()).collect();
    let ids = ids.join(",");
    let args = ["generate", "--greedy", "--ignore-eos", "-n", "6", "--prompt-ids", &ids];
    let routed = |extra: &[&str]| case.json(&[&args[..], &["--attn", "routed", "--window", "64", "--block", "16"], extra].concat());
    let dense = case.json(&[&args[..], &["--attn", "dense"]].concat());
    assert_eq!((dense["attn"]["mode"].as_str(), dense["density"].as_f64()), (Some("dense"), Some(1.0)));
    // By default it is routed, from a length on that this prompt does not reach.
    let auto = case.json(&args);
    assert_eq!((auto["attn"]["mode"].as_str(), &auto["token_ids"]), (Some("routed"), &dense["token_ids"]));
    // Below --min-ctx, and where the budget holds everything, it is the dense text.
    for fits in [&["--min-ctx", "4096"][..], &["--min-ctx", "0", "--budget", "4096"]] {
        let document = routed(fits);
        assert_eq!((&document["token_ids"], document["density"].as_f64()), (&dense["token_ids"], Some(1.0)), "{fits:?}");
    }
    let percent = routed(&["--min-ctx", "0", "--budget", "100%"]);
    assert_eq!((&percent["token_ids"], percent["density"].as_f64()), (&dense["token_ids"], Some(1.0)));
    let sparse = routed(&["--min-ctx", "0", "--budget", "128"]);
    assert_eq!(sparse["attn"]["block_router"], "spread");
    // Each of three layers reads 128 + 64 of 705 at the most, less what the edge reaches into the window.
    let density = sparse["density"].as_f64().unwrap();
    assert!((0.24..0.275).contains(&density), "{density}");
    let two_dense = routed(&["--min-ctx", "0", "--budget", "128", "--dense-layers", "2"])["density"].as_f64().unwrap();
    assert!((two_dense - (2.0 + density) / 3.0).abs() < 1e-6, "{two_dense}, {density}");
    assert!(sparse["kv_read_bytes_per_token"].as_u64() < dense["kv_read_bytes_per_token"].as_u64());
    // Neither the chunks of a prompt nor the threads change what is selected.
    let log = case.home.path().join("log.jsonl");
    let selected = |batch: &str, threads: &str| {
        let flags = ["--min-ctx", "0", "--budget", "128", "-b", batch, "-t", threads, "--route-log"];
        let document = routed(&[&flags[..], &[log.to_str().unwrap()]].concat());
        // Of every tile of queries, layer by layer.
        let mut tiles: Vec<String> = Vec::new();
        for line in std::fs::read_to_string(&log).unwrap().lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            // A step in which all fits the budget says so without a list.
            let chosen = line["selected"].as_array().into_iter().flatten().filter(|tile| tile["from"].as_u64().unwrap() >= 192);
            tiles.extend(chosen.map(|tile| format!("{} {tile}", line["layer"])));
        }
        tiles.sort();
        (tiles, document["token_ids"].clone())
    };
    let whole = selected("1024", "1");
    assert!(whole.0.len() > 100, "{}", whole.0.len());
    for (batch, threads) in [("64", "2"), ("128", "1")] {
        assert!(selected(batch, threads) == whole, "chunks of {batch}, {threads} threads");
    }
    for router in ["recent", "mean", "spread", "oracle"] {
        assert_eq!(routed(&["--min-ctx", "0", "--budget", "128", "--block-router", router])["attn"]["block_router"], router);
    }
    run(&mut case.llama(&["generate", "hi", "--attn", "routed", "--block-router", "magic"]), 2);
    for wrong in [&["--block", "0"][..], &["--budget", "0"], &["--budget", "0%"], &["--keep", "2"], &["--keep", "0.5"]] {
        run(case.llama(&["generate", "hi", "--attn", "routed"]).args(wrong), 2);
    }
    // Global layers beside sliding ones stay dense unless asked.
    let gemma = |extra: &[&str]| {
        let mut command = foveate(case.home.path());
        command.args(["generate", "-m"]).arg(tiny("gemma3_text")).args(["--prompt-ids", "5,6", "-n", "1", "--json"]).args(extra);
        serde_json::from_slice::<Value>(&run(&mut command, 0).stdout).unwrap()["attn"]["mode"].as_str().map(str::to_string)
    };
    assert_eq!((gemma(&[]).as_deref(), gemma(&["--attn", "routed"]).as_deref()), (Some("dense"), Some("routed")));
}

#[test]
fn a_token_router_keeps_less_and_q8_keys_take_half() {
    let case = Case::new();
    let ids: Vec<String> = (0..900).map(|i| (5 + i * 31 % 500).to_string()).collect();
    let ids = ids.join(",");
    let run_with = |extra: &[&str]| {
        let args = ["generate", "--greedy", "--ignore-eos", "-n", "6", "--attn", "dense", "--window", "64", "--prompt-ids", &ids];
        case.json(&[&args[..], extra].concat())
    };
    let kv = |document: &Value| document["memory"]["kv_bytes"].as_f64().unwrap();
    let dense = run_with(&[]);
    let half = run_with(&["--token-router", "random", "--keep", "0.5"]);
    let none = run_with(&["--token-router", "sink_window"]);
    // Half of 836 tokens and the window, in whole pages of 64.
    assert!((0.5..0.65).contains(&(kv(&half) / kv(&dense))), "{} of {}", kv(&half), kv(&dense));
    assert!(kv(&none) < 0.25 * kv(&dense), "{} of {}", kv(&none), kv(&dense));
    assert_eq!(half["attn"]["token_router"], "random");
    let density = half["density"].as_f64().unwrap();
    assert!((0.5..0.6).contains(&density), "{density}");
    assert_eq!(run_with(&["--token-router", "all"])["token_ids"], dense["token_ids"]);

    let q8 = run_with(&["--cache-type", "q8_0"]);
    // Heads of 16 dimensions: 18 bytes for 32.
    assert!((0.56..0.57).contains(&(kv(&q8) / kv(&dense))), "{} of {}", kv(&q8), kv(&dense));
    let mixed = run_with(&["--ctk", "q8_0", "--ctv", "f32"]);
    assert_eq!((&mixed["kv_dtypes"]["k"], &mixed["kv_dtypes"]["v"]), (&"q8_0".into(), &"f32".into()));
    // 18 and 64 bytes for twice 32.
    assert!((1.28..1.29).contains(&(kv(&mixed) / kv(&dense))), "{} of {}", kv(&mixed), kv(&dense));
    let missing = run(&mut case.llama(&["generate", "hi", "--token-router", "nosuch"]), 3);
    assert!(stderr(&missing).contains("sink_window"), "{}", stderr(&missing));
}

#[test]
fn a_crossover_that_was_measured_is_what_auto_uses() {
    let case = Case::new();
    let ids = "5,6,7";
    let min_ctx_with = |extra: &[&str]| {
        let args = ["generate", "-n", "1", "--prompt-ids", ids];
        case.json(&[&args[..], extra].concat())["attn"]["min_ctx"].as_u64()
    };
    let min_ctx = || min_ctx_with(&[]);
    // Twice what a query reads, its window included.
    assert_eq!((min_ctx(), min_ctx_with(&["--budget", "500", "--window", "100"])), (Some(4608), Some(1200)));
    let output = run(case.llama(&["bench", "--crossover", "-c", "2000", "-r", "1", "--json"]).arg("-q"), 0);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let crossover = document["crossover"].as_u64().unwrap();
    assert!([512, 1024, 1536].contains(&crossover), "{document}");
    assert_eq!(min_ctx(), Some(crossover));
    run(&mut case.llama(&["bench", "--crossover", "--attn", "dense"]), 2);
}

#[test]
fn eval_measures_what_routing_costs() {
    let case = Case::new();
    let text: String = (0..700).map(|i| format!("word{} ", i * 7919 % 97)).collect();
    let file = case.file("text.txt", text);
    let eval = |extra: &[&str], code: i32| {
        run(case.llama(&["eval", "ppl", "-f", &file, "-c", "900", "--window", "64", "--block", "16"]).args(extra), code)
    };
    let routed = |extra: &[&str]| -> Value {
        let args = [&["--json", "--min-ctx", "0", "--from", "300"][..], extra].concat();
        serde_json::from_slice::<Value>(&eval(&args, 0).stdout).unwrap()["settings"][0].clone()
    };
    let (all, some, none) = (routed(&["--budget", "4096"]), routed(&["--budget", "256"]), routed(&["--block-router", "recent"]));
    // Everything fits: the same numbers. The less is read, the farther off.
    assert_eq!((all["kl_mean"].as_f64(), all["same_top1"].as_f64(), all["ppl_change"].as_f64()), (Some(0.0), Some(1.0), Some(0.0)));
    let kl = |row: &Value| row["kl_mean"].as_f64().unwrap();
    assert!(0.0 < kl(&some) && kl(&some) < kl(&none), "{some} {none}");
    // Several settings at once are what each is alone; 8-bit keys and values are a setting too.
    let with = [
        "--json",
        "--from",
        "300",
        "--with",
        "--min-ctx 0 --budget 256 --window 64 --block 16",
        "--with",
        "--attn dense --cache-type q8_0",
    ];
    let both = serde_json::from_slice::<Value>(&eval(&with, 0).stdout).unwrap();
    assert_eq!(both["settings"][0], some);
    let q8 = &both["settings"][1];
    assert!(kl(q8) < 1e-3 && q8["kv_dtypes"]["k"] == "q8_0" && q8["density"] == 1.0, "{q8}");
    run(&mut case.llama(&["eval", "ppl", "-f", &file, "--with", "--budget 0"]), 2);
    let output = eval(&["--min-ctx", "0", "--from", "300"], 0);
    assert!(stdout(&output).contains("900 tokens, the last 599 scored"), "{}", stdout(&output));
    let gate = eval(&["--min-ctx", "0", "--from", "300", "--block-router", "recent", "--max-kld", "0"], 10);
    assert!(stderr(&gate).contains("--max-kld"), "{}", stderr(&gate));
    let short = eval(&[], 2);
    assert!(stderr(&short).contains("too short"), "{}", stderr(&short));
}

#[test]
fn bench_names_its_tests_as_llama_bench_does() {
    let case = Case::new();
    let args = ["bench", "-p", "64", "-n", "8", "-d", "0,512", "-r", "2", "--attn", "routed", "--min-ctx", "256", "--budget", "64"];
    let rows: Vec<Value> = serde_json::from_slice(&run(case.llama(&args).arg("--json"), 0).stdout).unwrap();
    let names: Vec<String> = rows
        .iter()
        .map(|row| format!("{} {} {} {}", row["attn"].as_str().unwrap(), row["n_prompt"], row["n_gen"], row["n_depth"]))
        .collect();
    let want = [
        "dense 64 0 0",
        "dense 0 8 0",
        "routed 64 0 0",
        "routed 0 8 0",
        "dense 64 0 512",
        "dense 0 8 512",
        "routed 64 0 512",
        "routed 0 8 512",
    ];
    assert_eq!(names, want);
    assert!(rows.iter().all(|row| row["samples_ts"].as_array().unwrap().len() == 2 && row["avg_ts"].as_f64().unwrap() > 0.0));
    let read = |row: usize| rows[row]["kv_read_bytes_per_token"].as_u64().unwrap();
    assert!(read(1) == read(3) && read(7) < read(5), "routed reads less where it routes: {rows:?}");
    let table = stdout(&run(&mut case.llama(&args), 0));
    assert!(table.contains("pp64 @ d512") && table.contains("tg8 ") && table.lines().count() == 10, "{table}");
    let csv = stdout(&run(case.llama(&args).args(["-o", "csv"]), 0));
    assert!(csv.starts_with("model,device,attn,n_prompt") && csv.lines().count() == 9, "{csv}");
    // A window that forgets: the depth is computed again.
    run(case.command(&["bench", "-p", "16", "-n", "4", "-d", "300", "-r", "2", "-m"]).arg(tiny("mistral-swa")), 0);
    run(&mut case.llama(&["bench", "-d", "5000"]), 7);
}

#[test]
fn a_stop_string_ends_the_text_before_itself() {
    let case = Case::new();
    let args = ["generate", "--raw", "hello", "--greedy", "-n", "40", "--ignore-eos"];
    let whole = case.json(&args)["text"].as_str().unwrap().to_string();
    // A string from the middle of it, so that it spans tokens.
    let boundaries: Vec<usize> = whole.char_indices().map(|(at, _)| at).collect();
    let (from, to) = (boundaries[boundaries.len() / 2], boundaries[boundaries.len() / 2 + 3]);
    let stop = &whole[from..to];
    let stopped = case.json(&[&args[..], &["--stop", stop]].concat());
    assert_eq!(stopped["text"].as_str().unwrap(), &whole[..whole.find(stop).unwrap()]);
    assert_eq!(stopped["finish_reason"], "stop");
}

#[test]
fn a_full_context_is_announced_and_nothing_is_cut() {
    let case = Case::new();
    let ids: Vec<String> = (0..20).map(|i| (5 + i).to_string()).collect();
    let ids = ids.join(",");
    let run_with = |context: &str, extra: &[&str], code: i32| {
        run(case.llama(&["generate", "--greedy", "--ignore-eos", "--json", "--prompt-ids", &ids, "-c", context]).args(extra), code)
    };
    // One below, at, and one above what is needed.
    let output = run_with("24", &["-n", "5"], 7);
    let error: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let why = error["error"]["why"].as_str().unwrap();
    assert!(why.contains("20") && why.contains("24"), "{why}");
    run_with("25", &["-n", "5"], 0);
    run_with("20", &[], 7);
    // No -n: it runs until the context is full, and keeps the text.
    let full: Value = serde_json::from_str(&stdout(&run_with("26", &[], 7))).unwrap();
    assert_eq!((full["finish_reason"].as_str(), full["output_tokens"].as_u64()), (Some("overflow"), Some(6)));
}

#[test]
fn what_does_not_fit_in_memory_is_refused_with_what_does() {
    let case = Case::new();
    let output = run(&mut case.llama(&["generate", "--raw", "hello", "--mem-limit", "1MiB"]), 6);
    assert!(stderr(&output).contains("weights") && stderr(&output).contains("1.00 MiB"), "{}", stderr(&output));
    let output = run(&mut case.llama(&["generate", "--raw", "hello", "--mem-limit", "36MiB", "-c", "200000"]), 6);
    let text = stderr(&output);
    let proposed: String = text.split("try: -c ").nth(1).expect("a context that fits").chars().take_while(char::is_ascii_digit).collect();
    run(&mut case.llama(&["generate", "--raw", "hello", "-n", "1", "--mem-limit", "36MiB", "-c", &proposed]), 0);
}

#[test]
fn every_mistake_has_its_exit_code_and_one_message() {
    let case = Case::new();
    let llama = tiny("llama").display().to_string();
    let binary = case.file("binary.txt", [0u8, 159, 146, 150]);
    let empty = case.file("empty.txt", "");
    let cases: Vec<(Vec<&str>, i32, &str)> = vec![
        (vec!["generate", "-m", "no-such-model", "hi"], 3, "no-such-model"),
        (vec!["generate", "-m", "./nowhere.gguf", "hi"], 3, "nowhere.gguf"),
        (vec!["generate", "-m", "../../etc/x", "hi"], 3, "../../etc/x"),
        (vec!["generate", "--offline", "hi"], 3, "foveate pull"),
        (vec!["generate", "-m", &llama, "-f", "/nowhere/prompt.txt"], 3, "/nowhere/prompt.txt"),
        (vec!["generate", "-m", &llama, "-f", "/"], 3, "directory"),
        (vec!["generate", "-m", &llama, "-f", &binary], 5, "not UTF-8"),
        (vec!["generate", "-m", &llama, "-f", &empty], 2, "empty"),
        (vec!["generate", "-m", &llama], 2, "empty"),
        (vec!["generate", "-m", &llama, "-f", "/dev/zero"], 2, "256.00 MiB"),
        (vec!["generate", "-m", "/dev/zero", "hi"], 5, "not a regular file"),
        (vec!["generate", "-m", &llama, "hi", "--temp", "-1"], 2, "temp is -1"),
        (vec!["generate", "-m", &llama, "hi", "--temp", "NaN"], 2, "temp"),
        (vec!["generate", "-m", &llama, "hi", "--top-p", "0"], 2, "top-p"),
        (vec!["generate", "-m", &llama, "hi", "--min-p", "7"], 2, "min-p"),
        (vec!["generate", "-m", &llama, "hi", "--threads", "0"], 2, "--threads"),
        (vec!["generate", "-m", &llama, "hi", "--threads", "1000000"], 2, "--threads"),
        (vec!["generate", "-m", &llama, "hi", "-c", "0"], 2, "--ctx-size"),
        (vec!["generate", "-m", &llama, "--prompt-ids", "1,512"], 2, "512"),
        (vec!["generate", "-m", &llama, "hi", "--device", "cuda"], 8, "cuda"),
        (vec!["generate", "-m", &llama, "hi", "--chat-template", "/nowhere.jinja"], 3, "/nowhere.jinja"),
        (vec!["models", "path", "smollm2-135m-instruct"], 3, "foveate pull"),
        (vec!["rm", &llama, "--yes"], 2, "your own file"),
    ];
    for (args, code, word) in cases {
        let output = run(&mut case.command(&args), code);
        assert!(stderr(&output).contains(word), "{args:?}: the message lacks {word:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?}: an error is no result");
    }
    // With --json the error is the document.
    let output = run(&mut case.command(&["chat", "-m", &llama, "--json"]), 2);
    assert!(stdout(&output).contains("generate --json") && output.stderr.is_empty(), "{}", stdout(&output));
}

#[test]
fn n_0_computes_the_prompt_and_generates_nothing() {
    let document = Case::new().json(&["generate", "--raw", "hello", "-n", "0"]);
    assert_eq!((document["output_tokens"].as_u64(), document["finish_reason"].as_str()), (Some(0), Some("length")));
}

#[test]
fn a_damaged_gguf_ends_with_5_and_names_the_field() {
    let case = Case::new();
    for (what, bytes, word) in gguf::damaged() {
        let path = case.file("damaged.gguf", bytes);
        let output = run(&mut case.command(&["generate", "-m", &path, "--raw", "ab"]), 5);
        assert!(stderr(&output).contains(word), "{what}: {}", stderr(&output));
        assert!(stderr(&output).lines().count() <= 3, "{what}: {}", stderr(&output));
    }
}

#[test]
fn a_damaged_tokenizer_ends_with_5() {
    use gguf::Meta;
    let case = Case::new();
    let whole = gguf::tiny_llama();
    let path = case.file("whole.gguf", whole.bytes());
    // The file, or the directory that holds only it.
    for model in [path.as_str(), case.home.path().to_str().unwrap()] {
        run(&mut case.command(&["generate", "-m", model, "--raw", "ab", "-n", "1"]), 0);
    }
    let strings = |values: &[&str]| Meta::Strs(values.iter().map(|value| value.to_string()).collect());
    let types = |count: usize| Meta::I32s(vec![1; count]);
    for (key, value, word) in [
        ("tokenizer.ggml.model", Meta::Str("wordpiece".into()), "wordpiece"),
        ("tokenizer.ggml.pre", Meta::Str("unheard-of".into()), "unheard-of"),
        ("tokenizer.ggml.merges", strings(&["ab"]), "tokenizer.ggml.merges"),
        ("tokenizer.ggml.merges", strings(&["a x"]), "tokenizer.ggml.merges"),
        ("tokenizer.ggml.merges", Meta::U32(3), "tokenizer.ggml.merges"),
        ("tokenizer.ggml.token_type", types(3), "tokenizer.ggml.token_type"),
        ("tokenizer.ggml.tokens", strings(&["a", "b", "ab", "c", "d"]), "token"),
        ("tokenizer.chat_template", Meta::Str("{% for x in %}".into()), "chat template"),
    ] {
        let path = case.file("damaged.gguf", whole.clone().with(key, value).bytes());
        let output = run(&mut case.command(&["generate", "-m", &path, "ab"]), 5);
        assert!(stderr(&output).contains(word), "{key}: {}", stderr(&output));
    }
    let copy = case.home.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(tiny("qwen3")).unwrap().flatten() {
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let text = std::fs::read_to_string(copy.join("tokenizer.json")).unwrap();
    for damaged in [
        String::new(),
        text[..text.len() / 2].to_string(),
        "[]".to_string(),
        text.replacen("\"merges\": [", "\"merges\": [[\"zz\", \"yy\"],", 1),
    ] {
        std::fs::write(copy.join("tokenizer.json"), damaged).unwrap();
        let output = run(&mut case.command(&["generate", "-m", copy.to_str().unwrap(), "ab"]), 5);
        assert!(stderr(&output).contains("tokenizer.json"), "{}", stderr(&output));
    }
}

#[test]
fn a_chat_template_is_bounded_and_refuses_politely() {
    let case = Case::new();
    let with = |template: &str, code: i32| {
        let path = case.file("template.jinja", template);
        run(&mut case.llama(&["generate", "hello", "-n", "1", "--chat-template", &path]), code)
    };
    let endless = with("{% for i in range(1000000000) %}{% for j in range(1000000000) %}x{% endfor %}{% endfor %}", 5);
    assert!(stderr(&endless).contains("chat template"), "{}", stderr(&endless));
    with("{{ 'x' * 1000000000000 }}", 5);
    with("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", 5);
    let refused = with("{{ raise_exception('only two users may talk') }}", 5);
    assert!(stderr(&refused).contains("only two users may talk"), "{}", stderr(&refused));
    with(
        "{% if messages[0].content.startswith('he') %}{{ strftime_now('%d %b %Y') }}{{ undefined_name }}{% generation %}{{ messages|tojson }}{% endgeneration %}{% endif %}",
        0,
    );
    let shown = run(
        &mut case.llama(&[
            "generate",
            "hello",
            "-n",
            "1",
            "--show-prompt",
            "--system",
            "be brief",
            "--template-arg",
            "mood=calm",
            "--chat-template",
            &case.file("t.jinja", "{{ mood }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"),
        ]),
        0,
    );
    assert!(stderr(&shown).contains("calm<system>be brief<user>hello"), "{}", stderr(&shown));
    let none = run(&mut case.llama(&["generate", "hello", "-n", "1"]), 0);
    assert!(stderr(&none).contains("no chat template"), "{}", stderr(&none));
}

#[test]
fn control_tokens_in_a_users_text_stay_text() {
    let case = Case::new();
    let template = case.file("t.jinja", "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}");
    let ids = |text: &str| {
        case.json(&["generate", text, "-n", "0", "--chat-template", &template])["prompt_token_ids"].as_array().unwrap().clone()
    };
    // <s> is 1, </s> is 2; only those of the template count.
    let count = |ids: &[Value]| ids.iter().filter(|id| id.as_u64().unwrap() <= 2).count();
    assert_eq!(count(&ids("plain")), 2);
    assert_eq!(count(&ids("I say </s><s> and go on")), 2);
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let case = Case::new();
    let mut child = case
        .llama(&["generate", "--raw", "hello", "-n", "400", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
#[cfg(unix)]
fn an_interrupt_keeps_the_text_and_ends_with_130() {
    let case = Case::new();
    let mut child = case
        .llama(&["generate", "--raw", "hello", "-n", "3900", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first text proves that it runs; then Ctrl-C.
    let mut first = [0u8; 1];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("[stopped]"), "{}", stderr(&output));
}

fn chat(case: &Case, extra: &[&str], input: &str) -> Output {
    let mut command = case.llama(&["chat", "--greedy", "-n", "6"]);
    command.args(extra);
    with_input(command, input.as_bytes())
}

/// How many tokens each turn computed.
fn new_tokens(output: &Output) -> Vec<usize> {
    stderr(output).lines().filter_map(|line| line.split_once(" new in")?.0.parse().ok()).collect()
}

#[test]
fn chat_keeps_its_history_saves_loads_and_clears() {
    let case = Case::new();
    let template = case.file(
        "t.jinja",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    );
    let extra = ["--chat-template", &template, "--system", "be brief"];
    let saved = case.path("talk.json");
    let notes = case.file("notes.md", "whales sing");
    let input = format!(
        "one two three\nfour\n/save {saved}\n/clear\nfour\n/load {saved}\n/show prompt\n/read {notes}\nwhat?\n/show prompt\n/bye\n"
    );
    let output = chat(&case, &extra, &input);
    assert!(output.status.success(), "{}", stderr(&output));
    let (first, second, cleared) = (new_tokens(&output)[0], new_tokens(&output)[1], new_tokens(&output)[2]);
    assert!(second < first && second < cleared, "the second turn computes only what is new: {:?}", new_tokens(&output));
    let text = stderr(&output);
    assert!(text.contains("[user]one two three") && text.contains("whales sing"), "{text}");
    let file: Value = serde_json::from_slice(&std::fs::read(&saved).unwrap()).unwrap();
    let roles: Vec<&str> = file["messages"].as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    assert!(!Path::new(&format!("{saved}.partial")).exists());
}

#[test]
fn chat_makes_an_answer_again_from_the_same_place() {
    let case = Case::new();
    let output = chat(&case, &[], "one two three\n/regen\n/regen\n/bye\n");
    let lines: Vec<String> = stdout(&output).lines().map(str::to_string).collect();
    let third = lines.len() / 3;
    assert_eq!(lines[..third], lines[third..2 * third], "greedy answers are the same: {lines:?}");
    assert_eq!(new_tokens(&output)[1..], [1, 1]);
}

#[test]
fn chat_survives_mistakes() {
    let case = Case::new();
    let damaged = case.file("damaged.json", "{\"schema\": 1}");
    let input = format!(
        "/nonsense\n/set temp hot\n/set temp -1\n/set\n/read /nowhere\n/load {damaged}\n/regen\n/show nothing\n/set top-k 5\n/show settings\nhello\n"
    );
    let output = chat(&case, &[], &input);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stderr(&output);
    assert_eq!(text.matches("error:").count(), 8, "{text}");
    assert!(text.contains("top-k 5") && text.contains("6 out"), "{text}");
}

#[test]
fn chat_announces_a_full_context_and_goes_on() {
    let case = Case::new();
    let output = chat(
        &case,
        &["-c", "48"],
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen\n/clear\nhi\n",
    );
    let text = stderr(&output);
    assert!(output.status.success() && text.contains("does not fit the context") && text.contains("6 out"), "{text}");
}

#[test]
fn doctor_completions_version_and_show_answer() {
    let case = Case::new();
    let doctor = run(&mut case.command(&["doctor", "--offline"]), 0);
    assert!(stdout(&doctor).contains("kernels") && stdout(&doctor).contains("0 errors"), "{}", stdout(&doctor));
    let json: Value = serde_json::from_slice(&run(&mut case.command(&["doctor", "--offline", "--json"]), 0).stdout).unwrap();
    assert_eq!((json["schema"].as_str(), json["errors"].as_u64()), (Some("foveate.doctor/1"), Some(0)));
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        assert!(stdout(&run(&mut case.command(&["completions", shell]), 0)).contains("foveate"), "{shell}");
    }
    assert!(stdout(&run(&mut case.command(&["--version"]), 0)).starts_with("foveate 0.1.0 ("));
    let shown = run(&mut case.command(&["show", tiny("gemma3_text").to_str().unwrap()]), 0);
    assert!(stdout(&shown).contains("6 of 7 layers, window 8"), "{}", stdout(&shown));
    let listed = run(&mut case.command(&["ls"]), 0);
    assert!(stdout(&listed).contains("smollm2-135m-instruct") && stdout(&listed).contains("not pulled"), "{}", stdout(&listed));
}

#[test]
fn a_directory_brings_its_own_template_and_sampling() {
    let case = Case::new();
    let copy = case.home.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(tiny("qwen3").join(name), copy.join(name)).unwrap();
    }
    let model = copy.to_str().unwrap();
    let write = |name: &str, text: &str| std::fs::write(copy.join(name), text).unwrap();
    let shown = || stderr(&run(&mut case.command(&["generate", "hello", "-n", "12", "--show-prompt", "-m", model]), 0));
    let named =
        r#"[{"name": "tool_use", "template": "no"}, {"name": "default", "template": "<named>{{ bos_token }}{{ messages[0].content }}"}]"#;
    write("tokenizer_config.json", &format!(r#"{{"bos_token": {{"content": "<s>"}}, "chat_template": {named}}}"#));
    assert!(shown().contains("<named><s>hello"), "{}", shown());
    write("chat_template.jinja", "<file>{{ messages[0].content }}");
    assert!(shown().contains("<file>hello"), "{}", shown());

    write("generation_config.json", r#"{"temperature": 0.25, "top_k": 7, "do_sample": true}"#);
    assert!(shown().contains("recommends temp 0.25, top-k 7") && shown().contains("seed "), "{}", shown());
    write("generation_config.json", r#"{"do_sample": false}"#);
    assert!(shown().contains("· greedy"), "{}", shown());
    // Every token ends the text: then the first one does.
    let every: Vec<String> = (0..512).map(|id| id.to_string()).collect();
    write("generation_config.json", &format!(r#"{{"eos_token_id": [{}]}}"#, every.join(",")));
    assert!(shown().contains(" 1 out"), "{}", shown());
    write("generation_config.json", r#"{"top_k": "many"}"#);
    let output = run(&mut case.command(&["generate", "hello", "-m", model]), 5);
    assert!(stderr(&output).contains("generation_config.json"), "{}", stderr(&output));
}

#[test]
fn a_directory_takes_a_quant() {
    let case = Case::new();
    let model = format!("{}:q8_0", tiny("llama").display());
    let document: Value =
        serde_json::from_slice(&run(&mut case.command(&["generate", "--raw", "hello", "-n", "2", "--json", "-m", &model]), 0).stdout)
            .unwrap();
    assert_eq!(document["model"]["quant"], "q8_0");
    let wrong = format!("{}:q9_9", tiny("llama").display());
    let output = run(&mut case.command(&["generate", "--raw", "hello", "-m", &wrong]), 2);
    assert!(stderr(&output).contains("q9_9") && stderr(&output).contains("q8_0"), "{}", stderr(&output));
}

#[test]
fn route_shows_what_was_read_and_writes_a_page_and_lines() {
    let case = Case::new();
    let text: String = (0..700).map(|i| format!("</script> word{} ", i * 7919 % 97)).collect();
    let file = case.file("text.txt", text);
    let output = case.home.path().join("map");
    let route = |extra: &[&str], code: i32| {
        let mut command = case.llama(&["route", "--raw", "-f", &file, "-c", "20000", "-n", "3", "--window", "64", "--block", "16"]);
        run(command.args(["--min-ctx", "0", "--dense-layers", "2", "-o"]).arg(&output).args(extra), code)
    };
    let seen = route(&["--budget", "256", "--token-router", "random", "--keep", "0.7"], 0);
    let picture = stdout(&seen);
    assert!(picture.contains("recall of dense attention 0.") && picture.contains(" L2 "), "{picture}");
    assert!(picture.lines().filter(|line| line.starts_with(" read by")).count() == 5, "{picture}");
    let page = std::fs::read_to_string(output.with_extension("html")).unwrap();
    // Self-contained, and the prompt cannot end its script.
    assert!(page.matches("</script>").count() == 1 && !page.contains("http"), "{}", &page[..2000]);
    let lines = std::fs::read_to_string(output.with_extension("jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4);
    assert_eq!((&lines[0]["schema"], &lines[0]["steps"]), (&"foveate.route/1".into(), &3.into()));
    let layers = lines[0]["layers"].as_array().unwrap();
    let recall = |layer: usize| layers[layer]["recall"].as_f64().unwrap();
    // The token router drops in every layer, the block router chooses in the third: it catches the least.
    assert!(0.0 < recall(2) && recall(2) < recall(1) && recall(1) < 1.0, "{} {}", recall(1), recall(2));
    let kept = layers[0]["kept"][20].as_f64().unwrap();
    assert!((0.3..1.0).contains(&kept), "{kept}");
    // What was read stands in the lines: position by position, up to the query itself.
    let reads = &lines[1]["reads"][2][0];
    let last = reads.as_array().unwrap().last().unwrap();
    assert_eq!(last[1].as_u64().unwrap(), lines[1]["position"].as_u64().unwrap() + 1);

    let whole = route(&["--budget", "100%", "--no-files", "--json"], 0);
    let whole: Value = serde_json::from_slice(&whole.stdout).unwrap();
    assert!(whole["layers"].as_array().unwrap().iter().all(|layer| layer["reads_everything"] == true && layer["recall"] == 1.0), "{whole}");
    route(&["--attn", "dense"], 2);
    let log = case.home.path().join("log.jsonl");
    let log_name = log.display().to_string();
    let mut command =
        case.llama(&["generate", "--raw", "-f", &file, "-c", "20000", "-n", "2", "--min-ctx", "0", "--budget", "256", "--block", "32"]);
    run(command.args(["--route-log", &log_name]), 0);
    let lines = std::fs::read_to_string(&log).unwrap();
    let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert!(last["layer"] == 2 && last["selected"][0]["blocks"][0].as_array().unwrap().len() <= 8, "{last}");
    run(case.llama(&["generate", "hi", "--route-log", "/nonexistent/log"]).arg("-q"), 9);
}

#[test]
fn needles_are_asked_for_dense_and_routed() {
    let case = Case::new();
    let text: String = (0..900).map(|i| format!("The word number {} is here. ", i * 7919 % 997)).collect();
    let file = case.file("text.txt", text);
    let needle = |extra: &[&str], code: i32| {
        run(
            case.llama(&["eval", "needle", "-f", &file, "-c", "4000", "-l", "700", "-d", "20,60", "--window", "64", "--block", "16"])
                .args(extra),
            code,
        )
    };
    let document = |extra: &[&str]| serde_json::from_slice::<Value>(&needle(&[&["--json"], extra].concat(), 0).stdout).unwrap();
    let same = document(&["--budget", "100%", "--min-ctx", "0"]);
    assert_eq!(same["settings"].as_array().unwrap().len(), 2);
    assert_eq!(same["rows"].as_array().unwrap().len(), 2 * 6 * 2);
    // The whole budget finds exactly what dense finds.
    let scores = |setting: u64| -> Vec<f64> {
        let rows = same["rows"].as_array().unwrap().iter().filter(|row| row["setting"] == setting);
        rows.map(|row| row["score"].as_f64().unwrap()).collect()
    };
    assert_eq!(scores(0), scores(1));
    assert_eq!(document(&["--budget", "100%", "--min-ctx", "0"])["rows"], same["rows"], "the same texts every time");
    let table = stdout(&needle(&["--tasks", "single,copy", "--min-ctx", "0", "--budget", "128"], 0));
    assert!(
        table.contains("700 tokens") && table.contains("copy") && !table.contains("variables") && table.contains("% of dense"),
        "{table}"
    );
    let long = needle(&["-l", "900000"], 2);
    assert!(stderr(&long).contains("too short"), "{}", stderr(&long));
}

#[test]
fn a_router_that_was_trained_here_is_used_here_and_nowhere_else() {
    let case = Case::new();
    let text: String = (0..900).map(|i| format!("word{} ", i * 7919 % 97)).collect();
    let file = case.file("text.txt", text);
    let router = case.home.path().join("router.safetensors").display().to_string();
    let train = ["train-router", "-f", &file, "-o", &router, "--length", "600", "--window", "64", "-c", "4000", "--json"];
    let output = run(&mut case.llama(&train), 0);
    let trained: Value = serde_json::from_slice(&output.stdout).unwrap();
    // Random weights attend at random, but what is learnt is better than nothing.
    assert!((0.0..=1.0).contains(&trained["correlation"].as_f64().unwrap()), "{trained}");
    let ids: Vec<String> = (0..900).map(|i| (5 + i * 31 % 500).to_string()).collect();
    let ids = ids.join(",");
    let generate = |extra: &[&str]| {
        let args = ["generate", "--greedy", "-n", "2", "--attn", "dense", "--prompt-ids", &ids, "--token-router", &router];
        case.json(&[&args[..], extra].concat())
    };
    let (half, some) = (generate(&[]), generate(&["--keep", "0.2"]));
    assert_eq!((&half["attn"]["token_router"], &half["attn"]["token_window"]), (&"gate".into(), &256.into()));
    let narrow = generate(&["--token-window", "64", "--window", "32"]);
    assert_eq!((&narrow["attn"]["window"], &narrow["attn"]["token_window"]), (&32.into(), &64.into()));
    assert!(narrow["memory"]["kv_bytes"].as_u64() < half["memory"]["kv_bytes"].as_u64(), "{narrow}");
    assert!(some["memory"]["kv_bytes"].as_u64() < half["memory"]["kv_bytes"].as_u64(), "{some}");
    // Short contexts are dense, up to a length that follows from the device, or this one; of as many tokens as a text has.
    assert_eq!(half["attn"]["token_min_ctx"], 0);
    let short = generate(&["--token-min-ctx", "1001"]);
    assert_eq!(short["attn"]["token_min_ctx"], 1000, "of whole tiles");
    assert!(short["memory"]["kv_bytes"].as_u64() > half["memory"]["kv_bytes"].as_u64(), "{short}");
    // A system message is never dropped.
    let system = (0..60).map(|i| format!("rule{i}")).collect::<Vec<_>>().join(" ");
    let kept = case.json(&["generate", "hi", "--greedy", "-n", "1", "--token-router", &router, "--system", &system]);
    assert!(kept["attn"]["sinks"].as_u64().unwrap() > 60 && half["attn"]["sinks"] == 4, "{}", kept["attn"]);
    // Nor one that is set in a chat.
    let resident = |input: &str, extra: &[&str]| {
        let mut command = case.llama(&["chat", "--greedy", "-n", "1", "--attn", "dense", "--token-router", &router, "--keep", "0.2"]);
        command.args(extra);
        let output = with_input(command, input.as_bytes());
        let line = stderr(&output).lines().find(|line| line.contains("in the cache")).map(str::to_string);
        line.unwrap_or_else(|| panic!("{}", stderr(&output)))
    };
    let system = (0..400).map(|i| format!("rule{i}")).collect::<Vec<_>>().join(" ");
    let template = case.file("t.jinja", "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}");
    let with_template = ["--chat-template", &template, "-c", "4096"];
    let set = resident(&format!("/system {system}\nhi\n/show stats\n/bye\n"), &with_template);
    let flag = resident("hi\n/show stats\n/bye\n", &[&with_template[..], &["--system", &system]].concat());
    assert_eq!(set, flag);
    let once = run(case.llama(&train).args(["--once"]), 0);
    assert_ne!(serde_json::from_slice::<Value>(&once.stdout).unwrap()["tau"], trained["tau"], "a repetition teaches something else");
    let deep = run(case.llama(&train).args(["--kind", "mlp"]), 0);
    let deep: Value = serde_json::from_slice(&deep.stdout).unwrap();
    assert_ne!(deep["tau"], trained["tau"]);
    assert_ne!(generate(&[])["token_ids"], Value::Null, "a router with a hidden layer is read and used");
    let narrow = run(&mut case.llama(&["generate", "hi", "--token-router", &router, "--window", "8", "--token-window", "32"]), 2);
    assert!(stderr(&narrow).contains("--token-window 64"), "{}", stderr(&narrow));
    run(&mut case.llama(&["generate", "hi", "--token-router", &router, "--keep", "0.01"]), 2);
    let mut other = foveate(case.home.path());
    other.args(["generate", "hi", "-m"]).arg(tiny("qwen2")).args(["--token-router", &router]);
    let refused = run(&mut other, 5);
    assert!(stderr(&refused).contains("another model"), "{}", stderr(&refused));
    let damaged = case.file("damaged.safetensors", &std::fs::read(&router).unwrap()[..100]);
    let refused = run(&mut case.llama(&["generate", "hi", "--token-router", &damaged]), 5);
    assert!(stderr(&refused).contains("no token router") && stderr(&refused).contains("train-router"), "{}", stderr(&refused));
    let short = case.file("short.txt", "too short");
    run(&mut case.llama(&["train-router", "-f", &short, "-o", &router]), 2);
}

#[test]
fn published_gates_become_a_router() {
    let case = Case::new();
    let text: String = (0..900).map(|i| format!("word{} ", i * 7919 % 97)).collect();
    let file = case.file("text.txt", text);
    let router = case.home.path().join("router.safetensors").display().to_string();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/gates");
    let ids: Vec<String> = (0..900).map(|i| (5 + i * 31 % 500).to_string()).collect();
    for (name, whose) in [("fast_kvzip.pt", "Fast KVzip"), ("wg_kv.safetensors", "WG-KV")] {
        let gates = fixtures.join(name).display().to_string();
        let calibrate = |extra: &[&str]| {
            let args = ["train-router", "--gates", &gates, "-f", &file, "-o", &router, "--window", "64", "--length", "600", "--json"];
            let output = run(&mut case.llama(&[&args[..], extra].concat()), 0);
            serde_json::from_slice::<Value>(&output.stdout).unwrap()
        };
        let half = calibrate(&["--keep", "0.5"]);
        assert_eq!((&half["gates"], half["keep"].as_f64()), (&whose.into(), Some(0.5)), "{half}");
        // WG-KV's own threshold is another one; Fast KVzip has none.
        let own = calibrate(&[]);
        assert_eq!(own["tau"] == half["tau"], whose == "Fast KVzip", "{own}");
        calibrate(&["--keep", "0.3"]);
        let generate = |extra: &[&str]| {
            let args = ["generate", "--greedy", "-n", "2", "--attn", "dense", "--prompt-ids", &ids.join(",")];
            case.json(&[&args[..], extra].concat())
        };
        let (all, some) = (generate(&[]), generate(&["--token-router", &router]));
        assert_eq!(some["attn"]["token_router"], "gate");
        assert!(some["memory"]["kv_bytes"].as_u64() < all["memory"]["kv_bytes"].as_u64(), "{some}");
        let mut other = foveate(case.home.path());
        other.args(["train-router", "--gates", &gates, "-f", &file, "-o", &router, "-m"]).arg(tiny("gemma3_text"));
        assert!(stderr(&run(&mut other, 5)).contains(name), "gates of another model");
    }
    run(&mut case.llama(&["train-router", "--gates", &file, "-f", &file, "-o", &router]), 5);
    run(&mut case.llama(&["train-router", "--gates", "/nowhere.pt", "-f", &file, "-o", &router]), 5);
}
