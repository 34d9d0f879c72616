//! `foveate generate`: one prompt, one text.

use super::input::{read_file, read_stdin};
use super::reply::{Reply, density, kv_use, reply};
use crate::args::Generate;
use crate::engine::{Checkpoint, Engine, chat_prompt};
use crate::failure::{Failure, Kind};
use crate::interrupt::Interrupt;
use crate::plan;
use crate::routing;
use crate::source::Hub;
use crate::text::Message;
use crate::ui::{Ui, bytes, stdout};
use anyhow::Result;
use model::message;
use model::{FinishReason, GenerateOptions, Sampler, SamplerOptions, Session};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::path::Path;

/// Base models never stop by themselves.
const DEFAULT_MAX_TOKENS: usize = 512;

pub(crate) fn run(args: &Generate, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    let text = if args.prompt_ids.is_empty() { Some(prompt_text(args)?) } else { None };
    let checkpoint = Checkpoint::open(&args.model, &args.template, &args.attention, hub)?;
    let prompt = prompt_ids(args, text.as_deref(), &checkpoint, ui)?;
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
    let mut session = engine.session(room)?;
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
        announce(&reply, &session, &options, args, ui);
    } else {
        stdout(&format!("{}\n", document(&engine, &reply, &session, &prompt, &options)))?;
    }
    Ok(match reply.finish {
        FinishReason::Stop | FinishReason::Length => 0,
        FinishReason::Overflow => Kind::ContextOverflow as u8,
        FinishReason::Interrupt => Kind::Interrupted as u8,
    })
}

/// The prompt: file first, then text; a pipe if neither is given.
fn prompt_text(args: &Generate) -> Result<String> {
    let text = args.prompt.as_ref().or(args.positional.as_ref());
    let piped = || !std::io::stdin().is_terminal();
    let file = match (&args.file, text) {
        (Some(path), _) if path == Path::new("-") => Some(read_stdin()?),
        (Some(path), _) => Some(read_file(path)?),
        (None, Some(text)) if text == "-" => return read_stdin(),
        (None, None) if piped() => Some(read_stdin()?),
        (None, None) => {
            return Err(Failure::new(Kind::Usage, "no prompt")
                .hint("foveate generate \"The capital of France is\", or -f FILE, or a pipe")
                .into());
        }
        (None, Some(_)) => None,
    };
    let prompt = match (file, text) {
        (Some(file), Some(text)) => format!("{file}\n{text}"),
        (Some(file), None) => file,
        (None, text) => text.cloned().unwrap_or_default(),
    };
    if prompt.is_empty() {
        return Err(Failure::new(Kind::Usage, "the prompt is empty").into());
    }
    Ok(prompt)
}

fn prompt_ids(args: &Generate, text: Option<&str>, checkpoint: &Checkpoint, ui: Ui) -> Result<Vec<u32>> {
    let vocab_size = checkpoint.config().vocab_size;
    if let Some(id) = args.prompt_ids.iter().find(|id| **id as usize >= vocab_size) {
        return Err(Failure::new(Kind::Usage, format!("--prompt-ids: {id} is beyond the vocabulary of {vocab_size}")).into());
    }
    let Some(text) = text else { return Ok(args.prompt_ids.clone()) };
    let template = if args.raw { None } else { checkpoint.template.as_ref() };
    let (shown, ids) = match template {
        Some(template) => {
            let system = args.template.system.iter().map(|text| Message::new("system", text));
            let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
            chat_prompt(checkpoint, template, &messages)?
        }
        None => {
            if !args.raw {
                ui.say("this model has no chat template: it continues the text as it stands (--raw says so)");
            }
            if args.template.system.is_some() {
                ui.warn("--system is ignored: there is no chat template to put it in");
            }
            (text.to_string(), checkpoint.tokenizer.encode(text, !args.no_bos)?)
        }
    };
    if args.template.show_prompt {
        ui.say(format!("prompt: {shown:?}\n{} tokens: {ids:?}", ids.len()));
    }
    if args.file.is_some() {
        ui.say(format!("read {} tokens", ids.len()));
    }
    Ok(ids)
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

fn announce(reply: &Reply, session: &Session, options: &SamplerOptions, args: &Generate, ui: Ui) {
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
        kv_use(session)
    ));
}

fn document(engine: &Engine, reply: &Reply, session: &Session, prompt: &[u32], options: &SamplerOptions) -> Value {
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
        "kv_read_bytes_per_token": session.read_count().bytes,
        "density": density(session),
        "kv_dtypes": {"k": engine.checkpoint.dtypes.k.name(), "v": engine.checkpoint.dtypes.v.name()},
        "memory": {"weights_bytes": engine.plan.weights, "kv_bytes": session.kv_bytes(), "peak_bytes": plan::peak_bytes()},
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
    document
}
