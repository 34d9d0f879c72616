//! `foveate generate`: one prompt, one text.

use super::input::{prompt_ids, prompt_text};
use super::reply::{Reply, density, kv_use, reply};
use super::route_log::RouteLog;
use crate::args::Generate;
use crate::engine::{Checkpoint, Engine};
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use crate::plan;
use crate::routing;
use crate::source::Hub;
use crate::ui::{Ui, bytes, stdout};
use anyhow::Result;
use model::message;
use model::{FinishReason, GenerateOptions, Sampler, SamplerOptions, Session};
use serde_json::{Value, json};
use std::sync::Arc;

/// Base models never stop by themselves.
const DEFAULT_MAX_TOKENS: usize = 512;

pub(crate) fn run(args: &Generate, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    let text = prompt_text(&args.prompt)?;
    let checkpoint = Checkpoint::open(&args.model, &args.template, &args.attention, hub)?;
    let prompt = prompt_ids(&args.prompt, text.as_deref(), &args.template, &checkpoint, ui)?;
    let options = checkpoint.sampler_options(&args.sampling)?;
    let mut sampler = Sampler::new(options.clone()).map_err(|error| Failure::new(Kind::Usage, message(&error)))?;

    let context = checkpoint.context(&args.model, ui)?;
    let max_tokens = args.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    check_context(prompt.len(), args.max_tokens, context, &checkpoint)?;
    let room = context.min(prompt.len() + max_tokens);
    let engine = checkpoint.load(room, &args.model)?;
    ui.say(engine.banner(context));
    let recommended = engine.checkpoint.defaults.describe();
    if !recommended.is_empty() {
        ui.say(format!("the model's generation_config.json recommends {recommended}; flags win over it"));
    }

    let generate = GenerateOptions {
        max_tokens: Some(max_tokens),
        end_tokens: if args.ignore_eos { Vec::new() } else { engine.checkpoint.end_tokens() },
        context,
        logprobs: args.logprobs.map_or(0, usize::from),
    };
    let log = args.route_log.as_deref().map(RouteLog::create).transpose()?.map(Arc::new);
    let attention = engine.checkpoint.attention.clone();
    let attention = log.iter().fold(attention, |attention, log| attention.observed(log.clone()));
    let mut session = engine.session_with(attention, room)?;
    let streamed = !ui.json;
    let reply = reply(&engine, &mut session, &prompt, &mut sampler, &args.sampling.stop, generate, ui, interrupt, |text, token| {
        if !streamed {
            return Ok(());
        }
        if let Some((own, alternatives)) = &token.logprobs {
            let alternatives: Vec<String> =
                alternatives.iter().map(|(id, logprob)| format!("{:?} {logprob:.3}", engine.checkpoint.tokenizer.token(*id))).collect();
            eprintln!("{:?} {own:.3}  of  {}", engine.checkpoint.tokenizer.token(token.id), alternatives.join("  "));
        }
        stdout(text)
    })?;
    if streamed {
        if !reply.text.ends_with('\n') {
            stdout("\n")?;
        }
        announce(&reply, &mut session, &options, args, ui)?;
    } else {
        stdout(&format!("{}\n", document(&engine, &reply, &mut session, &prompt, &options)?))?;
    }
    if let Some(log) = log {
        log.finish()?;
    }
    Ok(match reply.finish {
        FinishReason::Stop | FinishReason::Length => 0,
        FinishReason::Overflow => Kind::ContextOverflow as u8,
        FinishReason::Interrupt => Kind::Interrupted as u8,
    })
}

fn check_context(prompt: usize, asked: Option<usize>, context: usize, checkpoint: &Checkpoint) -> Result<()> {
    let generate = asked.unwrap_or(1);
    if prompt + generate <= context {
        return Ok(());
    }
    let trained = checkpoint.config().context;
    let needed = prompt + generate;
    let hint = if needed <= trained {
        let kv = plan::Plan::new(checkpoint.config(), 0, checkpoint.storage(), needed).kv;
        format!("-c {needed}   ({} of KV)", bytes(kv))
    } else if prompt < context {
        format!("-n {}", context - prompt)
    } else {
        format!("a shorter prompt: this model was trained on {trained} tokens")
    };
    let what = "the prompt does not fit the context";
    Err(Failure::new(Kind::ContextOverflow, what)
        .why(format!("prompt {prompt} + {generate} to generate > ctx {context} (nothing was cut)"))
        .hint(hint)
        .into())
}

fn announce(reply: &Reply, session: &mut Session, options: &SamplerOptions, args: &Generate, ui: Ui) -> Result<()> {
    match reply.finish {
        FinishReason::Length if args.max_tokens.is_none() => ui.say(format!("[cut after {DEFAULT_MAX_TOKENS} tokens: -n N for more]")),
        FinishReason::Overflow => ui.say("[the context is full: -c N for more]"),
        FinishReason::Interrupt => ui.say("[stopped]"),
        FinishReason::Stop | FinishReason::Length => {}
    }
    let seed = if options.temperature == 0.0 { "greedy".to_string() } else { format!("seed {}", options.seed) };
    ui.say(format!(
        "{} in · {} out · ttft {:.2} s ({:.0} t/s) · {:.1} t/s · KV {} · {seed}",
        reply.prompt_tokens,
        reply.tokens.len(),
        reply.prefill.as_secs_f64(),
        reply.prompt_rate(),
        reply.decode_rate(),
        kv_use(session)?
    ));
    Ok(())
}

fn document(engine: &Engine, reply: &Reply, session: &mut Session, prompt: &[u32], options: &SamplerOptions) -> Result<Value> {
    let read = session.read_count().map_err(unexpected)?;
    let located = &engine.checkpoint.located;
    let mut document = json!({
        "schema": "foveate.generate/1",
        "model": {
            "id": located.id,
            "revision": located.revision,
            "sha256": located.sha256,
            "quant": engine.checkpoint.weights.dtype_name(),
        },
        "device": engine.checkpoint.attention.backend_name(),
        "attn": routing::document(&engine.checkpoint.attention),
        "prompt_tokens": prompt.len(),
        "output_tokens": reply.tokens.len(),
        "prompt_token_ids": prompt,
        "token_ids": reply.tokens.iter().map(|token| token.id).collect::<Vec<_>>(),
        "text": reply.text,
        "finish_reason": reply.finish.as_str(),
        "seed": options.seed,
        "timings": {
            "load_ms": engine.load_time.as_secs_f64() * 1e3,
            "ttft_ms": reply.prefill.as_secs_f64() * 1e3,
            "prompt_tps": reply.prompt_rate(),
            "decode_tps": reply.decode_rate(),
        },
        "kv_read_bytes_per_token": read.bytes,
        "density": density(read),
        "kv_dtypes": {"k": engine.checkpoint.dtypes.k.name(), "v": engine.checkpoint.dtypes.v.name()},
        "memory": {
            "weights_bytes": engine.plan.weights,
            "kv_bytes": session.kv_bytes(),
            "peak_bytes": plan::peak_bytes(),
            "resident_bytes": plan::resident_bytes(),
        },
    });
    if reply.tokens.iter().any(|token| token.logprobs.is_some()) {
        let entry = |id: u32, logprob: f32| json!({"id": id, "token": engine.checkpoint.tokenizer.token(id), "logprob": logprob});
        let rows: Vec<Value> = reply
            .tokens
            .iter()
            .filter_map(|token| {
                let (own, alternatives) = token.logprobs.as_ref()?;
                let mut row = entry(token.id, *own);
                row["top"] = alternatives.iter().map(|(id, logprob)| entry(*id, *logprob)).collect();
                Some(row)
            })
            .collect();
        document["logprobs"] = Value::Array(rows);
    }
    Ok(document)
}
