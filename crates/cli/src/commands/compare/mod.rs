//! `foveate compare`: two models, or one under two settings, in one report.
//!
//! Every measurement is a process of its own, one after the other and the sides by turns, so that one model at a time is in memory
//! and its peak is its own. What they print is kept as it comes (`journal`), so that an interrupted comparison goes on.

mod choices;
mod cost;
mod job;
mod journal;
mod measure;
mod page;
mod plot;
mod report;
mod results;

use super::energy::Meter;
use super::input::read_file;
use super::needle;
use super::rates;
use crate::args::{AttentionArgs, AttentionChoice, Compare, ModelArgs, NeedleTask, TemplateArgs};
use crate::device;
use crate::engine::Checkpoint;
use crate::failure::{Failure, Kind, Reported};
use crate::interrupt::Interrupt;
use crate::plan;
use crate::routing;
use crate::source::{Hub, cache};
use crate::ui::{Ui, bytes, stdout};
use anyhow::{Context, Result};
use job::{Job, Measured, Side};
use journal::Journal;
use model::weights::hex;
use report::Comparison;
use results::Facts;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

/// B where none is named.
const BASELINE: &str = "mistral-7b-instruct-v0.3";

/// What is hidden in the text, and where, in percent.
const NEEDLE_TASKS: [NeedleTask; 3] = [NeedleTask::Single, NeedleTask::MultiKey, NeedleTask::Copy];
const NEEDLE_DEPTHS: [u8; 3] = [10, 50, 90];

/// The least context that text is scored with, where none is asked for.
const LEAST_TEXT_CONTEXT: usize = 2048;

/// What both are asked where the user asks nothing.
const PROMPTS: [&str; 3] = [
    "Explain in two sentences why the sky is blue.",
    "Write a function in Python that returns the n-th Fibonacci number.",
    "A train leaves at 14:10 and arrives at 16:45. How long does the journey take?",
];

pub(crate) fn run(args: &Compare, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    if let Some(job) = &args.measure {
        let job: Job = serde_json::from_str(job).context("--measure is for processes that compare starts")?;
        return measure::run(args, &job, hub, ui, interrupt);
    }
    for path in &args.output {
        report::format_of(path)?;
    }
    let files = (0..args.choices.len()).map(|file| Ok(questions(args, file)?.len())).collect::<Result<Vec<_>>>()?;
    let facts = [facts(args, Side::A, hub, ui)?, facts(args, Side::B, hub, ui)?];
    if let Some(path) = &args.file {
        check_text(path)?;
    }
    let Some(directory) = cache::user_cache() else {
        return Err(Failure::new(Kind::Disk, "no place for what is measured: neither HOME nor XDG_CACHE_HOME is set").into());
    };
    let mut journal = Journal::open(&directory.join("foveate/compare"), &key(args), args.restart)?;
    if !journal.lines().is_empty() {
        ui.say(format!("going on after {} measurements of an interrupted run (--restart forgets them)", journal.lines().len()));
    }
    ui.say(format!("A: {}\nB: {}", facts[0].banner(), facts[1].banner()));
    let jobs = jobs(args, journal.lines(), facts[0].is_same_model(&facts[1]), &files);
    for (index, job) in jobs.iter().enumerate() {
        ui.say(format!("{} of {}: {}", index + 1, jobs.len(), describe(job)));
        measure(job, &mut journal, ui, interrupt)?;
    }
    let comparison = Comparison::new(args, facts, journal.lines());
    match ui.json {
        true => stdout(&format!("{}\n", comparison.document()))?,
        false => stdout(&comparison.table())?,
    }
    for path in &args.output {
        let text = match report::format_of(path)? {
            report::Format::Html => page::html(&comparison)?,
            report::Format::Markdown => comparison.markdown(),
            report::Format::Json => format!("{:#}\n", comparison.document()),
        };
        std::fs::write(path, &text).map_err(|error| Failure::new(Kind::Disk, format!("{}: {error}", path.display())))?;
        ui.say(format!("{} written ({})", path.display(), bytes(text.len() as u64)));
    }
    journal.close()?;
    Ok(0)
}

/// The model and the attention of a side.
fn side(args: &Compare, side: Side) -> (ModelArgs, AttentionArgs) {
    let model = |name: &str| ModelArgs { model: name.to_string(), revision: None, machine: args.machine.clone() };
    match side {
        Side::A => (model(&args.a), args.attention.clone()),
        Side::B => {
            let same = args.b_flags.is_some().then_some(&args.a);
            let name = args.b.as_ref().or(same).map_or(BASELINE, String::as_str);
            let dense = || AttentionArgs { attn: AttentionChoice::Dense, ..AttentionArgs::none() };
            (model(name), args.b_flags.clone().unwrap_or_else(dense))
        }
    }
}

/// The tokens that the longest timed sequence takes.
fn longest(args: &Compare) -> usize {
    let deepest = args.depth.iter().copied().max().unwrap_or(0).max(args.prompt);
    deepest as usize + args.generate as usize + 1
}

/// Tokens of context that scored text has.
fn text_context(args: &Compare) -> usize {
    let deepest = args.depth.iter().copied().max().unwrap_or(0) as usize;
    args.text_context.map_or(deepest.max(LEAST_TEXT_CONTEXT), |tokens| tokens as usize)
}

fn prompts(args: &Compare) -> Vec<String> {
    if args.ask.is_empty() { PROMPTS.map(String::from).to_vec() } else { args.ask.clone() }
}

/// The questions of a file of `--choices`.
fn questions(args: &Compare, file: usize) -> Result<Vec<choices::Question>> {
    let mut questions = choices::read(&args.choices[file])?;
    questions.truncate(args.limit.map_or(usize::MAX, |limit| limit as usize));
    Ok(questions)
}

/// What is known of a side before anything is measured; whatever would stop it later stops it now.
fn facts(args: &Compare, which: Side, hub: &Hub, ui: Ui) -> Result<Facts> {
    let (model, attention) = side(args, which);
    let checkpoint = Checkpoint::open(&model, &TemplateArgs::default(), &attention, hub);
    let checkpoint = match checkpoint {
        Err(error) if which == Side::B && model.model == BASELINE => return Err(without_baseline(error)),
        other => other?,
    };
    let (config, needed) = (checkpoint.config(), longest(args));
    if needed > config.context {
        let why = format!("depth and what is measured there take {needed} tokens, the context of {} is {}", model.model, config.context);
        let what = "the deepest test does not fit the context";
        return Err(Failure::new(Kind::ContextOverflow, what).why(why).hint("smaller -d").into());
    }
    let free = plan::available(model.machine.mem_limit, &checkpoint.device);
    plan::choose_context(Some(needed), config, checkpoint.weights_bytes(), checkpoint.storage(), free)
        .with_context(|| checkpoint.located.id.clone())?;
    if args.file.is_some() && text_context(args) > config.context {
        ui.warn(format!("{}: text is scored with {} tokens of context, all that it has", model.model, config.context));
    }
    let path = &checkpoint.located.path;
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
    let weights_files = || std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_weights = |path: &std::path::PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
    Ok(Facts {
        id: checkpoint.located.id.clone(),
        quant: checkpoint.weights.dtype_name(),
        architecture: config.model_type.clone(),
        sha256: checkpoint.located.sha256.clone(),
        revision: checkpoint.located.revision.clone(),
        path: path.clone(),
        parameters: checkpoint.weights.parameters(),
        file_bytes: if path.is_dir() { weights_files().filter(is_weights).map(|path| size(&path)).sum() } else { size(path) },
        weights_bytes: checkpoint.weights_bytes(),
        kv_bytes_per_token: checkpoint.kv_bytes_per_token(),
        context: config.context,
        attention: routing::short(&checkpoint.attention, checkpoint.dtypes),
        routing: routing::document(&checkpoint.attention),
        kv_dtypes: [checkpoint.dtypes.k.name(), checkpoint.dtypes.v.name()],
        backend: checkpoint.attention.backend_name(),
        processor: device::machine(&checkpoint.device),
        no_energy: Meter::open(&checkpoint.device).err(),
    })
}

/// The model that all are compared with is not to be had.
fn without_baseline(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<Failure>().map(|failure| failure.kind) {
        Some(kind @ (Kind::Network | Kind::NotFound)) => Failure::new(kind, format!("{BASELINE}, which A is compared with, is not to be had"))
            .why(format!("{error:#}"))
            .hint(format!(
                "foveate pull {BASELINE}, where there is a network (4.1 GiB), or name another as B:\na .gguf file or a directory, or --b --attn dense for A itself"
            ))
            .into(),
        _ => error,
    }
}

fn check_text(path: &Path) -> Result<()> {
    let words = read_file(path)?.split_whitespace().count();
    if words < needle::SHORTEST {
        let why = format!("{words} words in {}, {} at least are needed", path.display(), needle::SHORTEST);
        return Err(Failure::new(Kind::Usage, "the text is too short").why(why).hint("a longer text").into());
    }
    Ok(())
}

/// Names the comparison: whatever changes a measurement changes it.
fn key(args: &Compare) -> String {
    let stamp = |path: &std::path::PathBuf| {
        let file = std::fs::metadata(path).ok();
        (path.clone(), file.as_ref().map(std::fs::Metadata::len), file.and_then(|file| file.modified().ok()))
    };
    let models = Side::BOTH.map(|which| side(args, which));
    let speed = (&args.depth, args.prompt, args.generate, args.repeat);
    let quality = (args.text_bytes, args.text_context, args.limit, prompts(args), args.answer_tokens);
    let files: Vec<_> = args.file.iter().chain(&args.choices).map(stamp).collect();
    let text = format!("{} {models:?} {speed:?} {quality:?} {files:?}", crate::args::VERSION);
    hex(&Sha256::digest(text)[..8])
}

/// What is still to be measured, the sides by turns. `files`: questions in each file of choices.
fn jobs(args: &Compare, done: &[Measured], same_model: bool, files: &[usize]) -> Vec<Job> {
    let has = |is: &dyn Fn(&Measured) -> bool| done.iter().any(is);
    let count = |is: &dyn Fn(&Measured) -> bool| done.iter().filter(|measured| is(measured)).count();
    let mut jobs = Vec::new();
    for round in 0..args.repeat {
        for side in Side::BOTH {
            let known = |depth: usize| {
                has(
                    &|measured| matches!(measured, Measured::Speed(speed) if (speed.side, speed.round, speed.depth) == (side, round, depth)),
                )
            };
            let mut depths: Vec<usize> = args.depth.iter().map(|depth| *depth as usize).filter(|depth| !known(*depth)).collect();
            depths.sort_unstable();
            depths.dedup();
            if !depths.is_empty() {
                jobs.push(Job::Speed { side, round, depths });
            }
        }
    }
    for asked in Side::BOTH.into_iter().filter(|_| args.file.is_some()) {
        if !has(&|measured| matches!(measured, Measured::Likelihood(text) if text.side == asked)) {
            jobs.push(Job::Likelihood { side: asked });
        }
        if count(&|measured| matches!(measured, Measured::Needle { side, .. } if *side == asked)) < NEEDLE_TASKS.len() {
            jobs.push(Job::Needles { side: asked });
        }
    }
    if args.file.is_some() && same_model && !has(&|measured| matches!(measured, Measured::Divergence(_))) {
        jobs.push(Job::Divergence);
    }
    for (number, questions) in files.iter().enumerate() {
        for asked in Side::BOTH {
            let from = count(&|measured| matches!(measured, Measured::Choice { side, file, .. } if *side == asked && *file == number));
            if from < *questions {
                jobs.push(Job::Choices { side: asked, file: number, from });
            }
        }
    }
    for asked in Side::BOTH.into_iter().filter(|_| args.answer_tokens > 0) {
        let from = count(&|measured| matches!(measured, Measured::Answer { side, .. } if *side == asked));
        if from < prompts(args).len() {
            jobs.push(Job::Answers { side: asked, from });
        }
    }
    jobs
}

fn describe(job: &Job) -> String {
    let of = |side: &Side| if *side == Side::A { "A" } else { "B" };
    match job {
        Job::Speed { side, round, depths } => {
            let depths: Vec<String> = depths.iter().map(usize::to_string).collect();
            format!("speed of {}, round {}, depth {}", of(side), round + 1, depths.join(", "))
        }
        Job::Likelihood { side } => format!("likelihood of the text, {}", of(side)),
        Job::Needles { side } => format!("needles in the text, {}", of(side)),
        Job::Divergence => "predictions of A beside B's".to_string(),
        Job::Choices { side, .. } => format!("questions, {}", of(side)),
        Job::Answers { side, .. } => format!("answers, {}", of(side)),
    }
}

/// Runs a job in a process of its own and keeps what it prints.
fn measure(job: &Job, journal: &mut Journal, ui: Ui, interrupt: &Interrupt) -> Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .arg("--measure")
        .arg(serde_json::to_string(job)?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting a process to measure in")?;
    let lines = child.stdout.take().map(|out| BufReader::new(out).lines());
    let child = Mutex::new(child);
    let read = std::thread::scope(|scope| -> Result<()> {
        // Ctrl-C reaches both; what is sent to this process alone is passed on.
        scope.spawn(|| {
            while matches!(child.lock().map(|mut child| child.try_wait()), Ok(Ok(None))) {
                std::thread::sleep(Duration::from_millis(50));
                if interrupt.is_set() {
                    std::thread::sleep(Duration::from_secs(2));
                    // It may have ended by itself.
                    let _ = child.lock().map(|mut child| child.kill());
                }
            }
        });
        for line in lines.into_iter().flatten() {
            let line = line.context("reading what was measured")?;
            match serde_json::from_str(&line) {
                Ok(measured) => journal.push(measured)?,
                // With --json an error is a document: it is the user's.
                Err(_) if ui.json && serde_json::from_str::<Value>(&line).is_ok() => stdout(&format!("{line}\n"))?,
                Err(error) => return Err(anyhow::Error::new(error).context(format!("a process of ours printed {line:?}"))),
            }
        }
        Ok(())
    });
    // That it stopped reading may be why it ended.
    let status = child.into_inner().map_err(|_| rates::stopped())?.wait().context("waiting for what measures")?;
    read?;
    if status.success() {
        return Ok(());
    }
    let stopped = interrupt.is_set() || status.code() == Some(Kind::Interrupted as i32);
    if stopped {
        ui.say("what was measured is kept: the same command goes on from here");
    }
    // It has said what went wrong; one that was killed could not.
    match status.code() {
        Some(code) => Err(Reported(code as u8).into()),
        None if stopped => Err(Reported(Kind::Interrupted as u8).into()),
        None => Err(Failure::new(Kind::OutOfMemory, format!("a process that measured was killed: {status}"))
            .hint("less -d, or a --mem-limit: out of memory is the usual reason")
            .into()),
    }
}
