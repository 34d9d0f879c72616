//! `foveate eval`: what routing costs in quality.

use super::input::read_file;
use super::statistics::mean_and_deviation;
use crate::args::{AttentionArgs, AttentionChoice, EvalPpl};
use crate::engine::Checkpoint;
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use crate::plan::CHUNK;
use crate::source::Hub;
use crate::ui::{Ui, stdout};
use anyhow::Result;
use model::score::{PositionScore, compare};
use serde_json::json;
use std::ops::ControlFlow;

/// Positions after the first routed one that are not scored, so that short contexts do not flatter.
const SETTLING: usize = 1024;

pub(crate) fn ppl(args: &EvalPpl, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    let text = read_file(&args.file)?;
    let checkpoint = Checkpoint::open(&args.model, &args.template, hub)?;
    let context = checkpoint.context(&args.model, ui)?;
    let mut tokens = checkpoint.tokenizer.encode(&text, true)?;
    let from = args.from.unwrap_or(args.attention.min_ctx.max(args.attention.window) as usize + SETTLING);
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

    let kv_dtype = checkpoint.kv_dtype;
    // Two caches: the memory of a context of twice the length.
    let engine =
        checkpoint.load(2 * tokens.len(), &args.model, &AttentionArgs { attn: AttentionChoice::Routed, ..args.attention.clone() })?;
    ui.say(engine.banner(context));
    let dense = engine.attention.to_dense();
    let bar = ui.token_bar("eval", tokens.len() as u64);
    let scores = compare(engine.model.as_ref(), [&dense, &engine.attention], &tokens, from, kv_dtype, CHUNK, |done| {
        bar.set_position(done as u64);
        if interrupt.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let scores = scores.map_err(unexpected)?;
    if interrupt.is_set() {
        return Err(Failure::new(Kind::Interrupted, format!("stopped after {} positions", scores.len())).into());
    }
    report(args, &scores, tokens.len(), &engine.checkpoint.located.id, ui)
}

fn report(args: &EvalPpl, scores: &[PositionScore], tokens: usize, model: &str, ui: Ui) -> Result<u8> {
    let dense = perplexity(scores.iter().map(|score| score.nll[0]));
    let routed = perplexity(scores.iter().map(|score| score.nll[1]));
    let mut kl: Vec<f64> = scores.iter().map(|score| score.kl).collect();
    kl.sort_unstable_by(f64::total_cmp);
    let mean = kl.iter().sum::<f64>() / kl.len() as f64;
    let (p99, max) = (kl[(kl.len() * 99 / 100).min(kl.len() - 1)], kl[kl.len() - 1]);
    let top = scores.iter().filter(|score| score.same_top).count() as f64 / scores.len() as f64;
    let change = routed.0 / dense.0 - 1.0;
    let attention = &args.attention;
    let name = format!("{} b{} B{} W{}", attention.block_router, attention.budget, attention.block, attention.window);
    if ui.json {
        let document = json!({
            "schema": "foveate.eval.ppl/1",
            "model": model,
            "tokens": tokens,
            "scored": scores.len(),
            "dense": {"ppl": dense.0, "stderr": dense.1},
            "routed": {
                "block_router": attention.block_router, "budget": attention.budget, "block": attention.block,
                "window": attention.window, "min_ctx": attention.min_ctx,
                "ppl": routed.0, "stderr": routed.1, "ppl_change": change,
                "kl_mean": mean, "kl_p99": p99, "kl_max": max, "same_top1": top,
            },
        });
        stdout(&format!("{document}\n"))?;
    } else {
        stdout(&format!("{tokens} tokens, the last {} scored\n", scores.len()))?;
        stdout(&format!("  dense   PPL {:.4} ± {:.4}\n", dense.0, dense.1))?;
        stdout(&format!(
            "  routed  PPL {:.4} ± {:.4} ({:+.2} %)   KL {mean:.4} (p99 {p99:.3}, max {max:.2})   same top-1 {:.1} %   [{name}]\n",
            routed.0,
            routed.1,
            100.0 * change,
            100.0 * top
        ))?;
    }
    if let Some(most) = args.max_kld.filter(|most| mean > *most) {
        return Err(Failure::new(Kind::Gate, format!("KL {mean:.4} is above --max-kld {most}")).hint("a larger --budget").into());
    }
    Ok(0)
}

/// `exp(mean)` and its standard error.
fn perplexity(nll: impl Iterator<Item = f64>) -> (f64, f64) {
    let nll: Vec<f64> = nll.collect();
    let (mean, deviation) = mean_and_deviation(&nll);
    (mean.exp(), mean.exp() * deviation / (nll.len() as f64).sqrt())
}
