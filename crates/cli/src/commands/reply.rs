//! Prefill with a progress bar, then tokens as text: what `generate` and `chat` share.

use crate::engine::Engine;
use crate::failure::unexpected;
use crate::interrupt::Interrupt;
use crate::text::TextStream;
use crate::ui::{Ui, bytes};
use anyhow::Result;
use model::{FinishReason, GenerateOptions, Sampler, Session, Token};
use sparse_attn::cache::ReadCount;
use std::time::{Duration, Instant};

/// Prompts longer than this get a progress bar.
const LONG_PROMPT: usize = 1024;

/// A finished reply.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) text: String,
    pub(crate) tokens: Vec<Token>,
    pub(crate) finish: FinishReason,
    /// Tokens of the prompt that were computed: all of them, or fewer after an interrupt.
    pub(crate) prompt_tokens: usize,
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
}

impl Reply {
    /// Prompt tokens per second.
    pub(crate) fn prompt_rate(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill.as_secs_f64().max(1e-9)
    }

    /// Generated tokens per second; the first came with the prompt.
    pub(crate) fn decode_rate(&self) -> f64 {
        self.tokens.len().saturating_sub(1) as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

/// Of the keys that the newest token could have read, the part that it read.
pub(crate) fn density(count: ReadCount) -> f64 {
    count.read as f64 / count.visible.max(1) as f64
}

/// Both savings by name: what is resident, and what the newest token read of it.
pub(crate) fn kv_use(session: &mut Session) -> Result<String> {
    let (resident, count) = (bytes(session.kv_bytes() as u64), session.read_count().map_err(unexpected)?);
    Ok(format!("{resident} resident, {} read/token ({:.1} %)", bytes(count.bytes), 100.0 * density(count)))
}

/// Computes `prompt` after what `session` holds and generates. `print` gets the text as it is certain.
///
/// An interrupt ends the reply and keeps what is there; the caller clears it.
#[expect(clippy::too_many_arguments, reason = "what a reply needs, each a different thing")]
pub(crate) fn reply(
    engine: &Engine,
    session: &mut Session,
    prompt: &[u32],
    sampler: &mut Sampler,
    stops: &[String],
    options: GenerateOptions,
    ui: Ui,
    interrupt: &Interrupt,
    mut print: impl FnMut(&str, &Token) -> Result<()>,
) -> Result<Reply> {
    let started = Instant::now();
    let bar = (prompt.len() > LONG_PROMPT).then(|| ui.token_bar("prefill", prompt.len() as u64));
    let mut computed = 0;
    let whole = session
        .prefill(prompt, engine.checkpoint.chunk, |done, _| {
            computed = done.min(prompt.len());
            if let Some(bar) = &bar {
                bar.set_position(done as u64);
            }
            interrupt.flow()
        })
        .map_err(unexpected)?;
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    let mut reply = Reply {
        text: String::new(),
        tokens: Vec::new(),
        finish: FinishReason::Interrupt,
        prompt_tokens: computed,
        prefill: started.elapsed(),
        decode: Duration::ZERO,
    };
    if !whole {
        return Ok(reply);
    }
    let mut stream = TextStream::after(session.tokens(), &engine.checkpoint.tokenizer, stops)?;
    let mut generation = session.generate(sampler, options);
    let mut first = None;
    loop {
        if interrupt.is_set() {
            break;
        }
        let Some(token) = generation.next() else {
            reply.finish = generation.finish_reason().unwrap_or(FinishReason::Stop);
            break;
        };
        let token = token.map_err(unexpected)?;
        let began = *first.get_or_insert_with(Instant::now);
        if token.is_end {
            reply.tokens.push(token);
            reply.finish = FinishReason::Stop;
            reply.decode = began.elapsed();
            break;
        }
        let (text, stopped) = stream.push(token.id)?;
        reply.decode = began.elapsed();
        if !text.is_empty() || token.logprobs.is_some() {
            reply.text.push_str(&text);
            print(&text, &token)?;
        }
        reply.tokens.push(token);
        if stopped {
            reply.finish = FinishReason::Stop;
            return Ok(reply);
        }
    }
    let rest = stream.finish()?;
    if let (false, Some(last)) = (rest.is_empty(), reply.tokens.last()) {
        reply.text.push_str(&rest);
        // Its log-probabilities were printed when it came.
        print(&rest, &Token { logprobs: None, ..last.clone() })?;
    }
    Ok(reply)
}
