//! `foveate route`: what the routers kept and read of a prompt.

use super::input::{prompt_ids, prompt_text};
use crate::args::Route;
use crate::engine::{Checkpoint, Engine, FEW_AT_ONCE};
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use crate::routing;
use crate::source::Hub;
use crate::ui::{Ui, stdout};
use anyhow::{Context, Result};
use model::trace::{LayerTrace, Trace, trace};
use serde_json::{Value, json};
use std::fmt::Write;
use std::ops::Range;
use std::path::Path;

/// Columns of the map in a terminal, and in the page.
const TERMINAL_COLUMNS: usize = 44;
const PAGE_COLUMNS: usize = 240;

/// Blocks whose text is shown.
const TOP_BLOCKS: usize = 5;

/// Characters of a block's text that are shown.
const EXCERPT: usize = 60;

const PAGE: &str = include_str!("route.html");

pub(crate) fn run(args: &Route, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    let text = prompt_text(&args.prompt)?;
    let checkpoint = Checkpoint::open(&args.model, &args.template, &args.attention, hub)?;
    if !routing::is_routed(&checkpoint.attention) {
        let what = "this attention reads and keeps everything: there is nothing to show";
        return Err(Failure::new(Kind::Usage, what).hint("--attn routed, or a --token-router").into());
    }
    let prompt = prompt_ids(&args.prompt, text.as_deref(), &args.template, &checkpoint, ui)?;
    let context = checkpoint.context(&args.model, ui)?;
    let needed = prompt.len() + args.steps as usize;
    if needed > context {
        let why = format!("prompt {} + {} decoded > ctx {context}", prompt.len(), args.steps);
        return Err(Failure::new(Kind::ContextOverflow, "the prompt does not fit the context").why(why).hint("a shorter prompt").into());
    }
    // A dense sequence runs beside it.
    let engine = checkpoint.load(2 * needed, &args.model)?;
    ui.say(engine.banner(context));
    let bar = ui.token_bar("prefill", 2 * prompt.len() as u64);
    let attention = &engine.checkpoint.attention;
    let seen = trace(
        &engine.model,
        attention,
        engine.checkpoint.dtypes,
        &prompt,
        args.steps as usize,
        engine.checkpoint.chunk.min(FEW_AT_ONCE),
        |done| {
            bar.set_position(done as u64);
            interrupt.flow()
        },
    );
    bar.finish_and_clear();
    let Some(seen) = seen.map_err(unexpected)? else { return Err(Failure::new(Kind::Interrupted, "stopped").into()) };
    if ui.json {
        stdout(&format!("{}\n", document(&engine, &seen)?))?;
    } else {
        stdout(&picture(&engine, &seen)?)?;
    }
    if !args.no_files {
        let (page, lines) = (args.output.with_extension("html"), args.output.with_extension("jsonl"));
        write(&page, &html(&engine, &seen)?)?;
        write(&lines, &json_lines(&engine, &seen)?)?;
        ui.say(format!("Written: {} (point at a cell to read its text), {}", page.display(), lines.display()));
    }
    Ok(0)
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|error| Failure::new(Kind::Disk, format!("{}: {error}", path.display())).into())
}

/// Positions of each of at most `most` columns: whole blocks.
fn columns(seen: &Trace, most: usize) -> Vec<Range<usize>> {
    let blocks = seen.tokens.len().div_ceil(seen.block_size);
    let per_column = blocks.div_ceil(most);
    (0..blocks).step_by(per_column).map(|block| block..(block + per_column).min(blocks)).collect()
}

fn mean(values: &[f32], blocks: &Range<usize>) -> f32 {
    let values = &values[blocks.start.min(values.len())..blocks.end.min(values.len())];
    values.iter().sum::<f32>() / values.len().max(1) as f32
}

/// Of the layers that do not read everything: mean recall, and the worst.
fn recall(layers: &[LayerTrace]) -> Option<(f64, (usize, f64))> {
    let sparse: Vec<(usize, f64)> =
        layers.iter().enumerate().filter(|(_, layer)| !layer.reads_everything).map(|(index, layer)| (index, layer.recall)).collect();
    let worst = sparse.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1))?;
    Some((sparse.iter().map(|(_, recall)| recall).sum::<f64>() / sparse.len() as f64, worst))
}

fn summary(engine: &Engine, seen: &Trace) -> String {
    let setting = routing::short(&engine.checkpoint.attention, engine.checkpoint.dtypes);
    let density = seen.layers.iter().map(|layer| layer.density).sum::<f64>() / seen.layers.len() as f64;
    let blocks = seen.tokens.len().div_ceil(seen.block_size);
    let mut text = format!(
        "{} tokens, {blocks} blocks of {} · {setting} · {} decoded · keys read {:.1} %",
        seen.prompt_tokens,
        seen.block_size,
        seen.steps.len(),
        100.0 * density
    );
    match recall(&seen.layers) {
        Some((mean, (layer, worst))) => {
            let _ = write!(text, " · recall of dense attention {mean:.3} (worst: layer {layer}, {worst:.3})");
        }
        None => text.push_str(" · everything was read: the prompt is short, or the budget large"),
    }
    text
}

/// The blocks that were read most by layers that choose, outside the window and the sinks: share, and block.
fn most_read(engine: &Engine, seen: &Trace) -> Vec<(f32, usize)> {
    let limits = engine.checkpoint.attention.routing().limits;
    let last = seen.prompt_tokens.saturating_sub(limits.window) / seen.block_size;
    let sparse: Vec<&LayerTrace> = seen.layers.iter().filter(|layer| !layer.reads_everything).collect();
    let share = |block: usize| sparse.iter().map(|layer| layer.read[block]).sum::<f32>() / sparse.len().max(1) as f32;
    let mut blocks: Vec<(f32, usize)> = (1..last).map(|block| (share(block), block)).collect();
    blocks.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    blocks.truncate(if sparse.is_empty() { 0 } else { TOP_BLOCKS });
    blocks
}

fn text_of(engine: &Engine, seen: &Trace, blocks: &Range<usize>) -> Result<String> {
    let end = (blocks.end * seen.block_size).min(seen.tokens.len());
    engine.checkpoint.tokenizer.decode(&seen.tokens[blocks.start * seen.block_size..end])
}

fn picture(engine: &Engine, seen: &Trace) -> Result<String> {
    let columns = columns(seen, TERMINAL_COLUMNS);
    let routes_tokens = engine.checkpoint.attention.routing().token_router.kept_fraction() < 1.0;
    let mut out = summary(engine, seen) + "\n";
    let ruler: String = (0..5).map(|quarter| format!("{:<width$}", format!("{}%", 25 * quarter), width = columns.len() / 4)).collect();
    let _ =
        writeln!(out, "       {:<width$}  recall{}", ruler.trim_end(), if routes_tokens { "  kept" } else { "" }, width = columns.len());
    for (index, layer) in seen.layers.iter().enumerate() {
        let cells: String = columns.iter().map(|blocks| shade(mean(&layer.read, blocks))).collect();
        let recall = if layer.reads_everything { "dense".to_string() } else { format!("{:.3}", layer.recall) };
        let kept = if routes_tokens {
            format!("   {:>3.0} %", 100.0 * mean(&layer.kept, &(0..seen.prompt_tokens / seen.block_size)))
        } else {
            String::new()
        };
        let _ = writeln!(out, " L{index:<4} {cells}  {recall}{kept}");
    }
    for (share, block) in most_read(engine, seen) {
        let text = text_of(engine, seen, &(block..block + 1))?;
        let excerpt: String = text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(EXCERPT).collect();
        let positions = block * seen.block_size;
        let _ =
            writeln!(out, " read by {:>5.1} %  {excerpt:?}  (positions {positions} to {})", 100.0 * share, positions + seen.block_size - 1);
    }
    Ok(out)
}

fn shade(part: f32) -> char {
    const SHADES: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let step = (part * 8.0).ceil().clamp(0.0, 8.0) as usize;
    SHADES[step]
}

fn html(engine: &Engine, seen: &Trace) -> Result<String> {
    let columns = columns(seen, PAGE_COLUMNS);
    let texts = columns.iter().map(|blocks| text_of(engine, seen, blocks)).collect::<Result<Vec<_>>>()?;
    let ends = |blocks: &Range<usize>| (blocks.start * seen.block_size, (blocks.end * seen.block_size).min(seen.tokens.len()));
    let part = |values: &[f32], blocks: &Range<usize>| (f64::from(mean(values, blocks)) * 1e4).round() / 1e4;
    let layers: Vec<Value> = seen
        .layers
        .iter()
        .map(|layer| {
            json!({
                "reads_everything": layer.reads_everything,
                "recall": layer.recall,
                "read": columns.iter().map(|blocks| part(&layer.read, blocks)).collect::<Vec<_>>(),
                "kept": columns.iter().map(|blocks| part(&layer.kept, blocks)).collect::<Vec<_>>(),
            })
        })
        .collect();
    let columns: Vec<Value> =
        columns.iter().zip(texts).map(|(blocks, text)| json!({"from": ends(blocks).0, "to": ends(blocks).1, "text": text})).collect();
    let data =
        json!({"summary": format!("{} · {}", engine.checkpoint.located.id, summary(engine, seen)), "columns": columns, "layers": layers});
    // A prompt may say </script>.
    Ok(PAGE.replace("DATA", &data.to_string().replace('<', "\\u003c")))
}

/// A line on the run, one for each layer's kept tokens where a token router is at work, one for each decoded token.
fn json_lines(engine: &Engine, seen: &Trace) -> Result<String> {
    let mut out = format!("{}\n", document(engine, seen)?);
    for step in &seen.steps {
        let line = json!({
            "t": "step", "position": step.position, "token": step.token,
            "text": engine.checkpoint.tokenizer.decode(&[step.token])?, "recall": step.recall, "reads": step.reads,
        });
        let _ = writeln!(out, "{line}");
    }
    Ok(out)
}

fn document(engine: &Engine, seen: &Trace) -> Result<Value> {
    let layers: Vec<Value> = seen
        .layers
        .iter()
        .map(|layer| {
            json!({
                "reads_everything": layer.reads_everything, "recall": layer.recall, "density": layer.density,
                "read": layer.read, "kept": layer.kept,
            })
        })
        .collect();
    let most_read = most_read(engine, seen).into_iter().map(|(share, block)| {
        let text = text_of(engine, seen, &(block..block + 1)).context("the text of a block")?;
        Ok(json!({"block": block, "read": share, "text": text}))
    });
    Ok(json!({
        "schema": "foveate.route/1",
        "model": engine.checkpoint.located.id,
        "attn": routing::document(&engine.checkpoint.attention),
        "prompt_tokens": seen.prompt_tokens,
        "steps": seen.steps.len(),
        "block": seen.block_size,
        "recall": recall(&seen.layers).map(|(mean, _)| mean),
        "layers": layers,
        "most_read": most_read.collect::<Result<Vec<_>>>()?,
    }))
}
