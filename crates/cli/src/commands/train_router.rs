//! `foveate train-router`: a token router for any model, from texts.

use super::input::read_file;
use crate::args::{AttentionArgs, GateKind, TemplateArgs, TrainRouter};
use crate::engine::{Checkpoint, FEW_AT_ONCE};
use crate::failure::{Failure, Kind, damaged, unexpected};
use crate::interrupt::Interrupt;
use crate::plan;
use crate::source::Hub;
use crate::ui::{Ui, bytes, stdout};
use anyhow::Result;
use model::calibrate::{CalibrateOptions, calibrate};
use model::train::{TrainOptions, sample_bytes, train};
use model::{Published, RouterFile};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Of the sequences, every so-manieth is held out.
const HELD_OUT: usize = 8;

/// Tokens of a sequence, where nothing is asked for.
const LENGTH: usize = 4096;

/// The part that is kept, where nothing is asked for.
const KEEP: f32 = 0.5;

/// Asks for the text once more.
const REPEAT: &str = "\n\nRepeat the previous context exactly:\n\n";

/// Numbers of the hidden layer of `--kind mlp`.
const HIDDEN: usize = 64;

/// Tokens of the longer sequences, where nothing is asked for and the context allows them.
const LONG: usize = 16384;

pub(crate) fn run(args: &TrainRouter, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    let texts = args.file.iter().map(|path| read_file(path)).collect::<Result<Vec<_>>>()?;
    let checkpoint = Checkpoint::open(&args.model, &TemplateArgs::default(), &AttentionArgs::none(), hub)?;
    if let Some(gates) = &args.gates {
        return of_published(args, gates, &texts, checkpoint, ui, interrupt);
    }
    let state = state_beside(&args.output);
    let repeat = if args.once { Vec::new() } else { checkpoint.tokenizer.encode(REPEAT, false)? };
    let options = TrainOptions {
        repeat,
        window: args.window as usize,
        keep: args.keep.unwrap_or(KEEP),
        ridge: args.ridge,
        hidden: (args.kind == GateKind::Mlp).then_some(HIDDEN),
        chunk: checkpoint.chunk.min(FEW_AT_ONCE),
        state: Some(state.clone()),
        ..TrainOptions::default()
    };
    let context = checkpoint.context(&args.model, ui)?;
    // A text and its repetition share the context.
    let most = if options.repeat.is_empty() { context } else { context.saturating_sub(options.repeat.len()) / 2 };
    let length = args.length.map_or(LENGTH, |length| length as usize).min(most);
    // A quarter of the tokens in longer ones: what is missed late differs from what is missed early.
    let long = args.long.map_or(LONG, |long| long as usize).clamp(length, most.max(length));
    if length <= 4 * options.window {
        let what = format!("sequences of {length} tokens are too short for a window of {}", options.window);
        return Err(Failure::new(Kind::Usage, what).hint("a larger --length, or a smaller --window").into());
    }
    let mut sequences: Vec<Vec<u32>> = Vec::new();
    for text in &texts {
        let ids = checkpoint.tokenizer.encode(text, true)?;
        sequences.extend(cut(&ids, [length, long]).filter(|part| part.len() > 4 * options.window).map(<[u32]>::to_vec));
    }
    let total = sequences.len();
    let (mut learn, mut held_out) = (Vec::new(), Vec::new());
    for (index, sequence) in sequences.into_iter().enumerate() {
        // The last one too, so that two are enough.
        let hold = index % HELD_OUT == HELD_OUT - 1 || (index + 1 == total && held_out.is_empty());
        if hold { held_out.push(sequence) } else { learn.push(sequence) }
    }
    if learn.is_empty() || held_out.is_empty() {
        let why = format!("{total} sequences of up to {length} tokens; one to learn from and one to set the threshold on are the least");
        return Err(Failure::new(Kind::Usage, "the texts are too short").why(why).hint("more text, or a smaller --length").into());
    }
    let longest = learn.iter().chain(&held_out).map(Vec::len).max().unwrap_or(length);
    let read = if options.repeat.is_empty() { longest } else { 2 * longest + options.repeat.len() };
    let tokens = |texts: &[Vec<u32>]| texts.iter().map(Vec::len).sum::<usize>();
    let (learn_tokens, held_out_tokens) = (tokens(&learn), tokens(&held_out));
    check_memory(&checkpoint, read, options.hidden.map_or(0, |_| learn_tokens), args)?;
    let fingerprint = checkpoint.weights.fingerprint().map_err(damaged)?;
    let names: Vec<String> = args.file.iter().filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect();
    let engine = checkpoint.load(read, &args.model)?;
    ui.say(engine.banner(context));
    ui.say(format!(
        "{learn_tokens} tokens to learn from, {held_out_tokens} held out, in sequences of up to {length}, a quarter of up to {longest}"
    ));
    let training = json!({
        "command": "foveate train-router", "texts": names, "tokens": learn_tokens, "held_out_tokens": held_out_tokens, "length": length, "longest": longest,
        "label": "mean square of later attention beyond the window, logarithm of its root", "repeated": !options.repeat.is_empty(), "ridge": options.ridge, "hidden": options.hidden, "floor": options.floor,
        "model": engine.checkpoint.located.id, "quant": engine.checkpoint.weights.dtype_name(),
    });
    let bar = ui.token_bar("train", (learn_tokens + held_out_tokens) as u64);
    let lengths: Vec<u64> = learn.iter().chain(&held_out).map(|text| text.len() as u64).collect();
    let started = Instant::now();
    let dense = engine.checkpoint.attention.to_dense();
    let mut first = true;
    let trained = train(engine.model.as_ref(), &dense, [&learn, &held_out], &options, fingerprint, training, |done| {
        if std::mem::take(&mut first) && done > 0 {
            ui.say(format!("goes on after {done} of {} sequences, which were read before ({})", learn.len(), state.display()));
        }
        bar.set_position(lengths[..done].iter().sum());
        interrupt.flow()
    });
    bar.finish_and_clear();
    let Some(trained) = trained.map_err(unexpected)? else {
        let failure = Failure::new(Kind::Interrupted, "stopped: no router was written");
        return Err(match args.kind {
            GateKind::Linear => failure.hint(format!("the same command goes on from {}", state.display())),
            GateKind::Mlp => failure.hint("the same command starts again: a hidden layer wants all tokens; --kind linear goes on"),
        }
        .into());
    };
    let path = &args.output;
    save(&trained.router, path)?;
    // What is left of it is of no use; that it cannot be deleted is no reason to fail.
    let _ = std::fs::remove_file(&state);
    let seconds = started.elapsed().as_secs_f64();
    if ui.json {
        let document = json!({
            "schema": "foveate.train_router/1", "router": path, "model": engine.checkpoint.located.id, "tokens": learn_tokens,
            "held_out_tokens": held_out_tokens, "correlation": trained.correlation, "tau": trained.router.tau, "keep": options.keep,
            "curve": trained.router.curve, "seconds": seconds,
        });
        stdout(&format!("{document}\n"))?;
    } else {
        stdout(&format!(
            "{}: keeps {:.0} % beyond {} tokens; correlation with the labels of held-out text {:.3}; {seconds:.0} s\n",
            path.display(),
            100.0 * options.keep,
            options.window,
            trained.correlation
        ))?;
        ui.say(how_to_use(args));
    }
    Ok(0)
}

/// Where an interrupted training is kept: beside its router, so that it is found again, and never the router itself.
fn state_beside(router: &Path) -> PathBuf {
    let mut name = router.as_os_str().to_owned();
    name.push(".training");
    name.into()
}

fn save(router: &RouterFile, path: &Path) -> Result<()> {
    router.save(path).map_err(|error| Failure::new(Kind::Disk, format!("{}: {}", path.display(), model::message(&error))).into())
}

fn how_to_use(args: &TrainRouter) -> String {
    format!("use it: foveate generate -m {} --token-router {} ...", args.model.model, args.output.display())
}

/// A router of gates that others trained.
fn of_published(args: &TrainRouter, gates: &Path, texts: &[String], checkpoint: Checkpoint, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    let refused = |error: candle_core::Error| Failure::malformed(format!("{}: {}", gates.display(), model::message(&error)));
    let published = Published::open(gates).map_err(refused)?;
    let (whose, tau) = (published.name, published.tau);
    let layers = published.into_layers(checkpoint.config()).map_err(refused)?;
    let context = checkpoint.context(&args.model, ui)?;
    let length = args.length.map_or(LENGTH, |length| length as usize).min(context);
    let mut sequences: Vec<Vec<u32>> = Vec::new();
    for text in texts {
        sequences.extend(checkpoint.tokenizer.encode(text, true)?.chunks(length).map(<[u32]>::to_vec));
    }
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    let options = CalibrateOptions {
        sinks: TrainOptions::default().sinks,
        keep: args.keep.unwrap_or(KEEP),
        chunk: checkpoint.chunk.min(FEW_AT_ONCE),
    };
    let fingerprint = checkpoint.weights.fingerprint().map_err(damaged)?;
    let engine = checkpoint.load(length, &args.model)?;
    ui.say(engine.banner(context));
    let bar = ui.token_bar("calibrate", tokens as u64);
    let dense = engine.checkpoint.attention.to_dense();
    let found = calibrate(engine.model.as_ref(), &dense, &layers, &sequences, &options, |done| {
        bar.set_position(sequences[..done].iter().map(|text| text.len() as u64).sum());
        interrupt.flow()
    });
    bar.finish_and_clear();
    let Some(found) = found.map_err(unexpected)? else {
        return Err(Failure::new(Kind::Interrupted, "stopped: no router was written").into());
    };
    let file_name = gates.file_name().map(|name| name.to_string_lossy().into_owned());
    let router = RouterFile {
        fingerprint,
        window: args.window as usize,
        sinks: options.sinks,
        // Who asks for a part gets it; else gates keep what they were trained to keep.
        tau: if args.keep.is_some() { found.tau } else { tau.unwrap_or(found.tau) },
        curve: found.curve,
        training: json!({
            "command": "foveate train-router --gates", "gates": whose, "file": file_name, "tokens": tokens, "length": length,
            "model": engine.checkpoint.located.id, "quant": engine.checkpoint.weights.dtype_name(),
        }),
        layers,
    };
    save(&router, &args.output)?;
    let kept = router.kept_at(router.tau);
    if ui.json {
        let document = json!({
            "schema": "foveate.train_router/1", "router": args.output, "model": engine.checkpoint.located.id, "gates": whose, "tokens": tokens,
            "tau": router.tau, "keep": kept, "curve": router.curve,
        });
        stdout(&format!("{document}\n"))?;
    } else {
        let (path, kept) = (args.output.display(), 100.0 * kept);
        stdout(&format!("{path}: gates of {whose}, keep {kept:.0} % of {tokens} tokens beyond the newest {}\n", args.window))?;
        ui.say(how_to_use(args));
    }
    Ok(0)
}

/// `ids` in sequences of the first length, and about a quarter of them in sequences of the second.
fn cut(ids: &[u32], [length, long]: [usize; 2]) -> impl Iterator<Item = &[u32]> {
    let (mut at, mut in_long) = (0, 0);
    std::iter::from_fn(move || {
        let takes_long = 4 * (in_long + long) <= at + long || at == 0 && ids.len() >= 2 * long;
        let end = ids.len().min(at + if takes_long { long } else { length });
        in_long += if takes_long { end - at } else { 0 };
        let part = &ids[at..end];
        at = end;
        (!part.is_empty()).then_some(part)
    })
}

/// The sums of all layers, the attention inputs and labels of one sequence, and what a hidden layer learns from: of `sampled` tokens.
fn check_memory(checkpoint: &Checkpoint, length: usize, sampled: usize, args: &TrainRouter) -> Result<()> {
    let config = checkpoint.config();
    let (layers, width) = (config.num_layers as u64, config.hidden_size as u64);
    let sums = layers * (width + 1) * (width + 1) * 8;
    let sequence = layers * length as u64 * (width + config.heads.kv_heads() as u64) * 4;
    let samples = layers * sample_bytes(sampled, config.hidden_size, config.heads.kv_heads()) as u64;
    let scores = 3 * (checkpoint.chunk.min(FEW_AT_ONCE) * config.heads.q_heads() * length * 4) as u64;
    let (needed, free) = (
        checkpoint.weights_bytes() + sums + samples + sequence + scores,
        plan::available(args.model.machine.mem_limit, &checkpoint.device),
    );
    if needed <= free {
        return Ok(());
    }
    let why = format!(
        "weights {} + sums {} + samples {} + a sequence {} + attention {}, and {} may be used",
        bytes(checkpoint.weights_bytes()),
        bytes(sums),
        bytes(samples),
        bytes(sequence),
        bytes(scores),
        bytes(free)
    );
    Err(Failure::new(Kind::OutOfMemory, "training this model does not fit in memory").why(why).hint("a smaller --length").into())
}

#[cfg(test)]
mod tests {
    use super::{cut, state_beside};
    use std::path::Path;

    #[test]
    fn what_is_left_of_a_training_is_never_its_router() {
        for router in ["router.safetensors", "dir/router.training", "router"] {
            assert_eq!(state_beside(Path::new(router)).display().to_string(), format!("{router}.training"));
        }
    }

    #[test]
    fn a_quarter_of_a_text_is_in_long_sequences() {
        let ids: Vec<u32> = (0..100_000).collect();
        let parts: Vec<&[u32]> = cut(&ids, [1000, 8000]).collect();
        assert_eq!(parts.concat(), ids);
        let long: usize = parts.iter().filter(|part| part.len() > 1000).map(|part| part.len()).sum();
        assert!((20_000..=30_000).contains(&long), "{long}");
        assert!(cut(&ids[..3000], [1000, 8000]).all(|part| part.len() == 1000));
        assert!(cut(&[], [1000, 8000]).next().is_none());
    }
}
