//! `foveate compare` on tiny checkpoints: beside what transformers computes, interrupted, and mistaken.

mod common;

use common::{foveate, run, stderr, stdout, tiny};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/compare").join(name)
}

/// A short comparison.
fn compare(home: &Path, args: &[&str]) -> Command {
    let mut command = foveate(home);
    command.arg("compare").arg(tiny("llama")).args(args).args(["-d", "0,100", "-p", "32", "-n", "4", "-r", "2", "--answer-tokens", "4"]);
    command.stdin(Stdio::null());
    command
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn likelihoods_and_choices_are_what_transformers_computes() {
    let home = tempfile::tempdir().unwrap();
    let expected: Value = serde_json::from_str(&std::fs::read_to_string(fixture("expected.json")).unwrap()).unwrap();
    for pair in [["llama", "qwen2"], ["gemma3_text", "llama"]] {
        let mut command = foveate(home.path());
        command.arg("compare").args(pair.map(tiny)).args([
            "--json",
            "-q",
            "-d",
            "0",
            "-p",
            "8",
            "-n",
            "2",
            "-r",
            "1",
            "--answer-tokens",
            "0",
        ]);
        command.arg("-f").arg(fixture("text.txt")).args(["--text-context", "64"]).arg("--choices").arg(fixture("choices.jsonl"));
        // As exact as PyTorch's f32: keys and values too.
        command.args(["--attn", "dense", "--cache-type", "f32", "--b", "--attn", "dense", "--cache-type", "f32"]);
        let document: Value = serde_json::from_slice(&run(&mut command, 0).stdout).unwrap();
        for (name, side) in pair.iter().zip(document["results"].as_array().unwrap()) {
            let want = &expected[*name];
            let (nats, want_nats) = (side["likelihood"]["nats"].as_f64().unwrap(), -want["log_likelihood"].as_f64().unwrap());
            assert!((nats / want_nats - 1.0).abs() < 1e-5, "{name}: {nats} nats, transformers has {want_nats}");
            for count in ["tokens", "bytes", "words"] {
                assert_eq!(side["likelihood"][count], want[count], "{name}, {count}");
            }
            let verdicts = want["verdicts"].as_array().unwrap();
            let part = |which: usize| verdicts.iter().filter(|verdict| verdict[which] == true).count() as f64 / verdicts.len() as f64;
            let choices = &side["choices"][0];
            assert_eq!(
                (choices["questions"].as_u64(), choices["acc"].as_f64(), choices["acc_norm"].as_f64()),
                (Some(100), Some(part(0)), Some(part(1)))
            );
        }
    }
}

#[test]
fn a_report_has_every_row_in_every_form() {
    let home = tempfile::tempdir().unwrap();
    let report = |ending: &str| home.path().join(format!("report.{ending}"));
    let [html, markdown, json] = ["html", "md", "json"].map(report);
    let mut command = compare(home.path(), &["-f", text(&fixture("text.txt")), "--text-context", "300", "--price-per-hour", "2"]);
    command.args(["--ask", "Is <b> & \"c\" text?", "-o", text(&html), "-o", text(&markdown), "-o", text(&json)]);
    // Flags of B, then others.
    command.args([
        "--attn",
        "routed",
        "--min-ctx",
        "0",
        "--budget",
        "32",
        "--window",
        "32",
        "--block",
        "8",
        "--b",
        "--attn",
        "dense",
        "--mix",
        "prompt=50,output=20",
    ]);
    let output = run(&mut command, 0);
    let document: Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!((document["schema"].as_str(), document["same_model"].as_bool()), (Some("foveate.compare/1"), Some(true)));
    let divergence = &document["divergence"];
    assert!(divergence["kl_mean"].as_f64().unwrap() > 0.0 && divergence["density"].as_f64().unwrap() < 1.0, "{divergence}");
    let rows = document["rows"].as_array().unwrap();
    let value = |name: &str, side: &str| {
        let row = rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no {name:?} in {rows:?}"));
        row[side].as_str().unwrap().to_string()
    };
    assert_eq!(value("parameters in the file", "a"), value("parameters in the file", "b"));
    assert_ne!(value("KV read per token @ d100", "a"), value("KV read per token @ d100", "b"));
    let names = ["pp32 @ d0, tokens/s", "tg4 @ d100, tokens/s", "prefill of 100, tokens/s", "perplexity per word", "needle, single (3)"];
    names.iter().for_each(|name| assert!(!value(name, "a").is_empty()));
    assert!(rows.iter().any(|row| row["section"] == "Cost" && row["name"].as_str().unwrap().contains("1000 such at 2 an hour")));
    let energy = &document["energy"];
    assert!(energy.is_null() || energy["reason"].is_string(), "{energy}");
    let (page, markdown) = (std::fs::read_to_string(&html).unwrap().replace("&#x2f;", "/"), std::fs::read_to_string(&markdown).unwrap());
    for row in rows {
        let name = row["name"].as_str().unwrap();
        assert!(page.contains(name) && markdown.contains(name) && stdout(&output).contains(name), "{name}");
    }
    assert!(page.contains("Is &lt;b&gt; &amp; &quot;c&quot; text?") && page.matches("<svg").count() == 4, "{page}");
    assert!(
        !page.contains("http://") || page.matches("http").count() == page.matches("http://www.w3.org").count(),
        "nothing comes from elsewhere"
    );
}

#[test]
fn an_interrupted_comparison_goes_on_where_it_stopped() {
    let home = tempfile::tempdir().unwrap();
    let file = fixture("text.txt");
    let args = ["-f", text(&file), "--text-context", "300", "--b", "--attn", "dense"];
    // Long enough to be interrupted.
    let slow = |home: &Path| {
        let mut command = compare(home, &args);
        command.args(["--batch-size", "16"]);
        command
    };
    let mut child = slow(home.path()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let journal = home.path().join("foveate/compare");
    let lines = || {
        let entry = std::fs::read_dir(&journal).ok()?.flatten().next()?;
        Some(std::fs::read_to_string(entry.path()).ok()?.lines().count())
    };
    let started = Instant::now();
    while lines().unwrap_or(0) < 2 {
        assert!(started.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none(), "nothing was measured");
        std::thread::sleep(Duration::from_millis(2));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    if output.status.code() == Some(0) {
        return; // It was done before the signal came: nothing to go on with.
    }
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("the same command goes on"), "{}", stderr(&output));
    let kept = lines().unwrap();
    assert!(kept >= 2);
    let output = run(&mut slow(home.path()), 0);
    assert!(stderr(&output).contains(&format!("going on after {kept} measurements")), "{}", stderr(&output));
    assert!(lines().is_none(), "a whole comparison leaves nothing behind");
    let output = run(slow(home.path()).arg("--restart"), 0);
    assert!(!stderr(&output).contains("going on"), "{}", stderr(&output));
}

#[test]
fn mistakes_are_told_before_anything_is_measured() {
    let home = tempfile::tempdir().unwrap();
    let fails = |args: &[&str], code: i32, says: &str| {
        let output = run(&mut compare(home.path(), args), code);
        assert!(stderr(&output).contains(says) && !stderr(&output).contains("1 of"), "{args:?}: {}", stderr(&output));
    };
    let wrong = home.path().join("wrong.jsonl");
    std::fs::write(&wrong, "{\"question\":\"Why?\",\"choices\":[\"a\",\"b\"],\"answer\":0}\n{\"question\":1}\n").unwrap();
    let short = home.path().join("short.txt");
    std::fs::write(&short, "a few words").unwrap();
    fails(&["--offline"], 3, "name another as B");
    fails(&["--b", "--attn", "dense", "-o", "report.pdf"], 2, ".html, .md or .json");
    fails(&["--b", "--attn", "dense", "--choices", text(&wrong)], 5, "line 2");
    fails(&["--b", "--attn", "dense", "-f", text(&short)], 2, "too short");
    fails(&["--b", "--attn", "dense", "--price-per-hour", "0"], 2, "price");
    let deep = foveate(home.path()).arg("compare").arg(tiny("llama")).args(["-d", "100000", "--b", "--attn", "dense"]).output().unwrap();
    assert_eq!(deep.status.code(), Some(7), "{}", stderr(&deep));
}
