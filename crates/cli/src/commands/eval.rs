//! `foveate eval`: what a setting costs in quality.

use super::input::read_file;
use super::statistics::mean_and_deviation;
use crate::args::EvalPpl;
use crate::engine::Checkpoint;
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use crate::routing;
use crate::source::Hub;
use crate::ui::{Ui, bytes, stdout};
use anyhow::Result;
use model::score::{Setting, SettingScore, compare};
use serde_json::{Value, json};

/// Positions after the first routed one that are not scored, so that short contexts do not flatter.
const SETTLING: usize = 1024;

pub(crate) fn ppl(args: &EvalPpl, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    let text = read_file(&args.file)?;
    let checkpoint = Checkpoint::open(&args.model, &args.template, &args.attention, hub)?;
    let checkpoint = if args.exact { checkpoint.exact() } else { checkpoint };
    let settings = checkpoint.settings(&args.attention, &args.with)?;
    let context = checkpoint.context(&args.model, ui)?;
    let mut tokens = checkpoint.tokenizer.encode(&text, true)?;
    let begins = |setting: &Setting| {
        let routing = setting.attention.routing();
        if routing.limits.dense_len == usize::MAX {
            routing.token_window().max(routing.token_dense_len())
        } else {
            routing.limits.dense_len.max(routing.limits.window)
        }
    };
    let from = args.from.unwrap_or_else(|| settings.iter().map(begins).max().unwrap_or(0) + SETTLING);
    if tokens.len() < from + 2 {
        let why = format!("{} tokens; scored are those after position {from}", tokens.len());
        return Err(Failure::new(Kind::Usage, "the text is too short").why(why).hint("a longer text, or --from N").into());
    }
    if context < from + 2 {
        let why = format!("ctx {context}; scored are positions after {from}");
        return Err(Failure::new(Kind::ContextOverflow, "the context is too short").why(why).hint("a smaller --min-ctx or --from").into());
    }
    if tokens.len() > context {
        ui.say(format!("the first {context} of the text's {} tokens are used: -c sets how many", tokens.len()));
        tokens.truncate(context);
    }

    // A cache for each: the memory of a context that many times as long.
    let engine = checkpoint.load((1 + settings.len()) * tokens.len(), &args.model)?;
    ui.say(engine.banner(context));
    let reference = engine.checkpoint.reference();
    let bar = ui.token_bar("eval", tokens.len() as u64);
    let scores = compare(engine.model.as_ref(), &reference, &settings, &tokens, from, engine.checkpoint.chunk, |done| {
        bar.set_position(done as u64);
        interrupt.flow()
    });
    bar.finish_and_clear();
    let scores = scores.map_err(unexpected)?;
    if interrupt.is_set() {
        let scored = scores.first().map_or(0, |score| score.positions.len());
        return Err(Failure::new(Kind::Interrupted, format!("stopped after {scored} positions")).into());
    }
    report(args, &settings, &scores, tokens.len(), &engine.checkpoint.located.id, ui)
}

/// What a setting's positions say together.
pub(super) struct Summary {
    ppl: (f64, f64),
    pub(super) change: f64,
    pub(super) kl: [f64; 3], // mean, p99, max
    pub(super) same_top: f64,
    difference: f32,
    pub(super) density: f64,
}

impl Summary {
    pub(super) fn new(score: &SettingScore) -> Self {
        let positions = &score.positions;
        let (dense, ppl) =
            (perplexity(positions.iter().map(|position| position.nll[0])), perplexity(positions.iter().map(|position| position.nll[1])));
        let mut kl: Vec<f64> = positions.iter().map(|position| position.kl).collect();
        kl.sort_unstable_by(f64::total_cmp);
        let mean = kl.iter().sum::<f64>() / kl.len() as f64;
        Self {
            ppl,
            change: ppl.0 / dense.0 - 1.0,
            kl: [mean, kl[(kl.len() * 99 / 100).min(kl.len() - 1)], kl[kl.len() - 1]],
            same_top: positions.iter().filter(|position| position.same_top).count() as f64 / positions.len() as f64,
            difference: positions.iter().fold(0.0, |most, position| position.difference.max(most)),
            density: score.read.read as f64 / score.read.visible.max(1) as f64,
        }
    }

    fn document(&self, setting: &Setting, score: &SettingScore) -> Value {
        json!({
            "attn": routing::document(&setting.attention),
            "kv_dtypes": {"k": setting.dtypes.k.name(), "v": setting.dtypes.v.name()},
            "ppl": self.ppl.0, "stderr": self.ppl.1, "ppl_change": self.change,
            "kl_mean": self.kl[0], "kl_p99": self.kl[1], "kl_max": self.kl[2], "same_top1": self.same_top,
            "logits_max_difference": self.difference,
            "density": self.density, "kv_bytes": score.kv_bytes,
        })
    }
}

fn report(args: &EvalPpl, settings: &[Setting], scores: &[SettingScore], tokens: usize, model: &str, ui: Ui) -> Result<u8> {
    let summaries: Vec<Summary> = scores.iter().map(Summary::new).collect();
    let dense = perplexity(scores[0].positions.iter().map(|position| position.nll[0]));
    let scored = scores[0].positions.len();
    if ui.json {
        let rows = settings.iter().zip(scores).zip(&summaries);
        let rows: Vec<Value> = rows.map(|((setting, score), summary)| summary.document(setting, score)).collect();
        let document = json!({
            "schema": "foveate.eval.ppl/1", "model": model, "tokens": tokens, "scored": scored,
            "dense": {"ppl": dense.0, "stderr": dense.1}, "settings": rows,
        });
        stdout(&format!("{document}\n"))?;
    } else {
        stdout(&format!("{tokens} tokens, the last {scored} scored\n"))?;
        stdout(&format!("  PPL {:.4} ± {:.4}   dense, f16 KV\n", dense.0, dense.1))?;
        for ((setting, score), summary) in settings.iter().zip(scores).zip(&summaries) {
            let same = if summary.difference == 0.0 { "   every logit the same" } else { "" };
            stdout(&format!(
                "  PPL {:.4} ± {:.4} ({:+.2} %)   KL {:.4} (p99 {:.3}, max {:.2})   same top-1 {:.1} %{same}   keys read {:.1} %   KV {}   [{}]\n",
                summary.ppl.0,
                summary.ppl.1,
                100.0 * summary.change,
                summary.kl[0],
                summary.kl[1],
                summary.kl[2],
                100.0 * summary.same_top,
                100.0 * summary.density,
                bytes(score.kv_bytes as u64),
                routing::short(&setting.attention, setting.dtypes)
            ))?;
        }
    }
    let worst = summaries.iter().map(|summary| summary.kl[0]).fold(0.0, f64::max);
    if let Some(most) = args.max_kld.filter(|most| worst > *most) {
        return Err(Failure::new(Kind::Gate, format!("KL {worst:.4} is above --max-kld {most}")).hint("a larger --budget").into());
    }
    Ok(0)
}

/// `exp(mean)` and its standard error.
fn perplexity(nll: impl Iterator<Item = f64>) -> (f64, f64) {
    let nll: Vec<f64> = nll.collect();
    let (mean, deviation) = mean_and_deviation(&nll);
    (mean.exp(), mean.exp() * deviation / (nll.len() as f64).sqrt())
}
