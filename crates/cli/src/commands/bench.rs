//! `foveate bench`: prefill and decode rates at depths, in llama-bench's words.

use super::energy::Meter;
use super::rates;
use super::statistics::mean_and_deviation;
use crate::args::{Bench, OutputFormat};
use crate::device;
use crate::engine::{Checkpoint, Engine};
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use crate::plan;
use crate::routing;
use crate::source::Hub;
use crate::ui::{Ui, bytes, stdout};
use anyhow::Result;
use comfy_table::{Table, presets};
use indicatif::ProgressBar;
use model::Session;
use serde_json::{Value, json};
use sparse_attn::RoutedAttention;
use std::ops::Range;
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
    // By turns, so that a machine that warms up is fair to both, where both sequences fit.
    let planned = |attention: &RoutedAttention| {
        attention.planned_bytes(&engine.checkpoint.config().layer_specs(), engine.checkpoint.dtypes, longest) as u64
    };
    let free = plan::available(args.model.machine.mem_limit, &engine.checkpoint.device);
    let at_once = if attentions.iter().map(|(_, attention)| planned(attention)).sum::<u64>() + engine.plan.work <= free { 2 } else { 1 };
    let ids = rates::fixed_ids(0..longest, &engine);
    let mut rows = Vec::new();
    for depth in args.depth.iter().map(|depth| *depth as usize) {
        for attentions in attentions.chunks(at_once) {
            let names = attentions.iter().map(|(attn, _)| *attn).collect::<Vec<_>>().join(", ");
            let tokens = (depth + (args.prompt + args.generate) as usize * args.repeat as usize) * attentions.len();
            let bar = ui.token_bar(&format!("{names} @ d{depth}"), tokens as u64);
            let run = |(attn, attention): &(&'static str, RoutedAttention)| -> Result<Run<'_>> {
                let session = engine.session_with(attention.clone(), longest)?;
                Ok(Run::new(args, &engine, attn, session, &ids, depth))
            };
            let mut runs = attentions.iter().map(run).collect::<Result<Vec<_>>>()?;
            for _ in 0..args.repeat {
                runs.iter_mut().try_for_each(|run| run.repeat(&bar, interrupt))?;
            }
            bar.finish_and_clear();
            for run in &mut runs {
                rows.extend(run.rows()?);
            }
        }
    }
    print(args, &engine, &rows, ui)?;
    Ok(0)
}

/// Both tests of one attention at one depth.
struct Run<'a> {
    args: &'a Bench,
    engine: &'a Engine,
    attn: &'static str,
    session: Session,
    ids: &'a [u32],
    depth: usize,
    meter: Option<Meter>,
    prompt: Measured,
    generated: Measured,
}

/// What came of a test.
#[derive(Default)]
struct Measured {
    rates: Vec<f64>,
    joules: f64,
    kv_read: u64,
}

impl<'a> Run<'a> {
    fn new(args: &'a Bench, engine: &'a Engine, attn: &'static str, session: Session, ids: &'a [u32], depth: usize) -> Self {
        let meter = Meter::open(&engine.checkpoint.device).ok();
        Self { args, engine, attn, session, ids, depth, meter, prompt: Measured::default(), generated: Measured::default() }
    }

    fn repeat(&mut self, bar: &ProgressBar, interrupt: &Interrupt) -> Result<()> {
        let (depth, prompt, generated) = (self.depth, self.args.prompt as usize, self.args.generate as usize);
        if prompt > 0 {
            self.back(bar, interrupt)?;
            let before = self.meter.as_ref().map(Meter::read);
            let time = self.feed(depth..depth + prompt, bar, interrupt)?;
            self.prompt.joules += self.joules_since(before);
            self.prompt.rates.push(prompt as f64 / time.as_secs_f64());
            // Of the last chunk, per token.
            self.prompt.kv_read =
                self.session.read_count().map_err(unexpected)?.bytes / ((prompt - 1) % self.engine.checkpoint.chunk + 1) as u64;
        }
        if generated > 0 {
            self.back(bar, interrupt)?;
            // One token more than the depth, so that there is something to continue.
            self.feed(depth..depth + 1, bar, interrupt)?;
            let before = self.meter.as_ref().map(Meter::read);
            let time = rates::decode(&mut self.session, generated, interrupt)?;
            self.generated.joules += self.joules_since(before);
            self.generated.rates.push(generated as f64 / time.as_secs_f64());
            self.generated.kv_read = self.session.read_count().map_err(unexpected)?.bytes;
            bar.inc(generated as u64);
        }
        Ok(())
    }

    /// Back to the depth; where a sliding layer forgot, everything is computed again, untimed.
    fn back(&mut self, bar: &ProgressBar, interrupt: &Interrupt) -> Result<()> {
        let kept = self.session.rewind(self.depth.min(self.session.tokens().len())).map_err(unexpected)?;
        self.feed(kept..self.depth, bar, interrupt).map(drop)
    }

    fn feed(&mut self, part: Range<usize>, bar: &ProgressBar, interrupt: &Interrupt) -> Result<Duration> {
        let part = &self.ids[part];
        let time = rates::read(self.engine, &mut self.session, part, interrupt, || bar.tick());
        bar.inc(part.len() as u64);
        time
    }

    fn joules_since(&self, before: Option<Vec<u64>>) -> f64 {
        self.meter.as_ref().zip(before).map_or(0.0, |(meter, before)| meter.since(&before))
    }

    fn rows(&mut self) -> Result<Vec<Row>> {
        self.session.trim().map_err(unexpected)?;
        let row = |prompt: u32, generated: u32, measured: &Measured| Row {
            attn: self.attn,
            prompt: prompt as usize,
            generated: generated as usize,
            depth: self.depth,
            rates: measured.rates.clone(),
            joules: self.meter.as_ref().map(|_| measured.joules / ((prompt + generated) as usize * measured.rates.len()) as f64),
            kv_resident: self.session.kv_bytes() as u64,
            kv_read: measured.kv_read,
        };
        let rows = [row(self.args.prompt, 0, &self.prompt), row(0, self.args.generate, &self.generated)];
        Ok(rows.into_iter().filter(|row| !row.rates.is_empty()).collect())
    }
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
