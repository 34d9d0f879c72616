//! `foveate bench`: prefill and decode rates at depths, in llama-bench's words.

use super::energy::Meter;
use super::rates;
use super::statistics::mean_and_deviation;
use crate::args::{Bench, OutputFormat};
use crate::device;
use crate::engine::{Checkpoint, Engine};
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use crate::routing;
use crate::source::Hub;
use crate::ui::{Ui, bytes, stdout};
use anyhow::Result;
use comfy_table::{Table, presets};
use model::Session;
use serde_json::{Value, json};
use sparse_attn::RoutedAttention;
use std::time::Duration;

/// One test: a rate per repetition.
struct Row {
    attn: &'static str,
    prompt: usize,
    generated: usize,
    depth: usize,
    rates: Vec<f64>,
    /// Joules that a token took, where the machine tells.
    joules: Option<f64>,
    kv_resident: u64,
    kv_read: u64,
}

impl Row {
    /// Mean and deviation.
    fn rate(&self) -> (f64, f64) {
        mean_and_deviation(&self.rates)
    }

    fn name(&self) -> String {
        let test = if self.generated == 0 { format!("pp{}", self.prompt) } else { format!("tg{}", self.generated) };
        if self.depth == 0 { test } else { format!("{test} @ d{}", self.depth) }
    }
}

pub(crate) fn run(args: &Bench, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    if args.crossover {
        return super::crossover::run(args, hub, ui, interrupt);
    }
    let checkpoint = Checkpoint::open(&args.model, &args.template, &args.attention, hub)?;
    let context = checkpoint.context(&args.model, ui)?;
    let deepest = args.depth.iter().copied().max().unwrap_or(0) as usize;
    let longest = deepest + args.prompt.max(args.generate) as usize + 1;
    if longest > context {
        let why = format!("depth {deepest} and what is measured there take {longest} tokens, ctx is {context}");
        return Err(Failure::new(Kind::ContextOverflow, "the deepest test does not fit the context").why(why).hint("smaller -d").into());
    }
    let engine = checkpoint.load(longest, &args.model)?;
    ui.say(engine.banner(context));
    let attention = &engine.checkpoint.attention;
    let mut attentions = vec![("dense", attention.to_dense())];
    if routing::is_routed(attention) {
        attentions.push(("routed", attention.clone()));
    }
    if engine.checkpoint.device.is_cuda() {
        // A GPU loads its kernels as they are first launched.
        let ids = rates::fixed_ids(0..(args.prompt as usize).max(1), &engine);
        let mut session = engine.session(ids.len() + 4)?;
        rates::read(&engine, &mut session, &ids, interrupt, || ())?;
        rates::decode(&mut session, 2, interrupt)?;
    }
    let mut rows = Vec::new();
    for depth in &args.depth {
        for (attn, attention) in &attentions {
            rows.extend(measure(args, &engine, attn, attention, *depth as usize, longest, ui, interrupt)?);
        }
    }
    print(args, &engine, &rows, ui)?;
    Ok(0)
}

/// Both tests of one attention at one depth.
#[expect(clippy::too_many_arguments, reason = "what a measurement needs, each a different thing")]
fn measure(
    args: &Bench,
    engine: &Engine,
    attn: &'static str,
    attention: &RoutedAttention,
    depth: usize,
    capacity: usize,
    ui: Ui,
    interrupt: &Interrupt,
) -> Result<Vec<Row>> {
    let ids = rates::fixed_ids(0..capacity, engine);
    let (prompt, generated) = (args.prompt as usize, args.generate as usize);
    let bar = ui.token_bar(&format!("{attn} @ d{depth}"), (depth + (prompt + generated) * args.repeat as usize) as u64);
    let mut session = engine.session_with(attention.clone(), capacity)?;
    let feed = |session: &mut Session, part: &[u32]| -> Result<Duration> {
        let time = rates::read(engine, session, part, interrupt, || bar.tick());
        bar.inc(part.len() as u64);
        time
    };
    // Back to the depth; where a sliding layer forgot, everything is computed again, untimed.
    let back = |session: &mut Session| -> Result<Duration> {
        let kept = session.rewind(depth.min(session.tokens().len())).map_err(unexpected)?;
        feed(session, &ids[kept..depth])
    };
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    let mut kv_read = [0, 0];
    let meter = Meter::open(&engine.checkpoint.device).ok();
    let mut joules = [0.0; 2];
    let before = || meter.as_ref().map(Meter::read);
    let since = |before: Option<Vec<u64>>| meter.as_ref().zip(before).map_or(0.0, |(meter, before)| meter.since(&before));
    for _ in 0..args.repeat {
        if prompt > 0 {
            back(&mut session)?;
            let counters = before();
            let time = feed(&mut session, &ids[depth..depth + prompt])?;
            joules[0] += since(counters);
            prefill.push(prompt as f64 / time.as_secs_f64());
            // Of the last chunk, per token.
            kv_read[0] = session.read_count().bytes / ((prompt - 1) % engine.checkpoint.chunk + 1) as u64;
        }
        if generated > 0 {
            back(&mut session)?;
            // One token more than the depth, so that there is something to continue.
            feed(&mut session, &ids[depth..=depth])?;
            let counters = before();
            let time = rates::decode(&mut session, generated, interrupt)?;
            joules[1] += since(counters);
            decode.push(generated as f64 / time.as_secs_f64());
            kv_read[1] = session.read_count().bytes;
            bar.inc(generated as u64);
        }
    }
    bar.finish_and_clear();
    let kv_resident = session.kv_bytes() as u64;
    let row = |prompt: usize, generated: usize, rates: Vec<f64>, kv_read, joules: f64| {
        let tokens = (prompt + generated) * rates.len();
        let joules = meter.as_ref().map(|_| joules / tokens as f64);
        Row { attn, prompt, generated, depth, rates, joules, kv_resident, kv_read }
    };
    let rows = [row(prompt, 0, prefill, kv_read[0], joules[0]), row(0, generated, decode, kv_read[1], joules[1])];
    Ok(rows.into_iter().filter(|row| !row.rates.is_empty()).collect())
}

fn print(args: &Bench, engine: &Engine, rows: &[Row], ui: Ui) -> Result<()> {
    let model = format!("{} {}", engine.checkpoint.located.id, engine.checkpoint.weights.dtype_name());
    let device = device::short(&engine.checkpoint.device, engine.checkpoint.attention.backend_name());
    let format = if ui.json { OutputFormat::Json } else { args.output };
    match format {
        OutputFormat::Md => {
            let mut table = Table::new();
            table.load_style(presets::ASCII_MARKDOWN).set_header([
                "model",
                "size",
                "device",
                "attn",
                "test",
                "t/s",
                "KV res",
                "KV read/tok",
                "J/tok",
            ]);
            for row in rows {
                table.add_row([
                    model.clone(),
                    bytes(engine.plan.weights),
                    device.clone(),
                    row.attn.to_string(),
                    row.name(),
                    format!("{:.2} ± {:.2}", row.rate().0, row.rate().1),
                    bytes(row.kv_resident),
                    bytes(row.kv_read),
                    row.joules.map_or_else(|| "-".to_string(), |joules| format!("{joules:.3}")),
                ]);
            }
            stdout(&format!("{table}\n"))
        }
        OutputFormat::Csv => {
            let mut text = String::from(
                "model,device,attn,n_prompt,n_gen,n_depth,avg_ts,stddev_ts,kv_resident_bytes,kv_read_bytes_per_token,joules_per_token\n",
            );
            for row in rows {
                text.push_str(&format!(
                    "\"{model}\",\"{device}\",{},{},{},{},{:.4},{:.4},{},{},{}\n",
                    row.attn,
                    row.prompt,
                    row.generated,
                    row.depth,
                    row.rate().0,
                    row.rate().1,
                    row.kv_resident,
                    row.kv_read,
                    row.joules.map_or_else(String::new, |joules| format!("{joules:.4}"))
                ));
            }
            stdout(&text)
        }
        OutputFormat::Json => {
            let document: Vec<Value> = rows
                .iter()
                .map(|row| {
                    json!({
                        "schema": "foveate.bench/1",
                        "model": model,
                        "device": device,
                        "attn": row.attn,
                        "n_prompt": row.prompt,
                        "n_gen": row.generated,
                        "n_depth": row.depth,
                        "avg_ts": row.rate().0,
                        "stddev_ts": row.rate().1,
                        "samples_ts": row.rates,
                        "kv_resident_bytes": row.kv_resident,
                        "kv_read_bytes_per_token": row.kv_read,
                        "joules_per_token": row.joules,
                    })
                })
                .collect();
            stdout(&format!("{}\n", Value::Array(document)))
        }
    }
}
