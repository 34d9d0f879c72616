//! One sequence: prefill in chunks, then a token at a time.

use crate::CausalLm;
use crate::arch::TokenStep;
use crate::layers;
use crate::sampler::{Sampler, logprobs};
use crate::weights::MANY_TOKENS;
use candle_core::{Device, Result, bail};
use sparse_attn::cache::ReadCount;
use sparse_attn::{KvCache, KvDtypes, RoutedAttention, Step};
use std::ops::ControlFlow;
use std::sync::Arc;

/// A sequence of tokens, the cache that holds them, and the model that reads them.
#[derive(Debug)]
pub struct Session {
    model: Arc<dyn CausalLm>,
    attention: RoutedAttention,
    cache: KvCache,
    tokens: Vec<u32>,
    next_logits: Option<Vec<f32>>,
    token_step: OneToken,
    is_roomy: bool, // whether a prompt took room that single tokens do not need
}

/// How single tokens are fed.
#[derive(Debug)]
enum OneToken {
    /// Nobody asked yet.
    Unknown,
    /// As prompts are.
    Forward,
    /// As a whole.
    Step(Box<dyn TokenStep>),
}

/// Limits of one generation.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Stop after this many tokens (`None`: at an end token or a full context).
    pub max_tokens: Option<usize>,
    /// Tokens that end the text. They are returned, flagged, and not fed back.
    pub end_tokens: Vec<u32>,
    /// Most tokens the sequence may have in all.
    pub context: usize,
    /// Alternatives whose log-probabilities are returned with each token (0: none).
    pub logprobs: usize,
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Whether it is one of the end tokens.
    pub is_end: bool,
    /// Its log-probability, and the likeliest tokens with theirs; where asked for.
    pub logprobs: Option<(f32, Vec<(u32, f32)>)>,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens`.
    Length,
    /// The user.
    Interrupt,
    /// The context is full.
    Overflow,
}

impl FinishReason {
    /// As in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Interrupt => "interrupt",
            Self::Overflow => "overflow",
        }
    }
}

impl Session {
    /// An empty sequence with room for `capacity` tokens, keys and values stored as `dtypes`.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn new(model: Arc<dyn CausalLm>, attention: RoutedAttention, dtypes: KvDtypes, device: &Device, capacity: usize) -> Result<Self> {
        let cache = KvCache::new(&attention.layer_specs(&model.config().layer_specs()), dtypes, device, capacity)?;
        Ok(Self { model, attention, cache, tokens: Vec::new(), next_logits: None, token_step: OneToken::Unknown, is_roomy: false })
    }

    /// The tokens of the sequence. The newest may be not in the cache yet.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The model.
    pub fn model(&self) -> &Arc<dyn CausalLm> {
        &self.model
    }

    /// Its keys and values, and what a token router decided on them.
    ///
    /// # Errors
    /// If the device that decided fails.
    pub fn cache(&mut self) -> Result<&KvCache> {
        layers::settle(&self.attention, &mut self.cache)?;
        Ok(&self.cache)
    }

    /// Bytes allocated for keys and values.
    pub fn kv_bytes(&self) -> usize {
        self.cache.allocated_bytes()
    }

    /// Keys that the newest step read, over all layers and heads.
    ///
    /// # Errors
    /// As [`Session::cache`].
    pub fn read_count(&mut self) -> Result<ReadCount> {
        Ok(self.cache()?.read_count())
    }

    /// Tokens whose keys and values are in the cache.
    pub fn cached(&self) -> usize {
        self.cache.len()
    }

    /// Appends `prompt` and computes it in chunks of `chunk` tokens. `progress` is told how many tokens of
    /// how many are done, before the first chunk and after each, and may stop it there.
    ///
    /// Returns whether all was computed. What was not is no longer part of the sequence.
    ///
    /// # Errors
    /// If nothing is there to compute, an id is beyond the vocabulary, or memory runs out; chunks before
    /// the failing one stay.
    pub fn prefill(&mut self, prompt: &[u32], chunk: usize, mut progress: impl FnMut(usize, usize) -> ControlFlow<()>) -> Result<bool> {
        // A generated token that was not fed back yet goes first.
        let mut waiting = self.tokens.split_off(self.cache.len());
        waiting.extend_from_slice(prompt);
        if waiting.is_empty() {
            if self.next_logits.is_some() {
                return Ok(true);
            }
            bail!("the prompt is empty: nothing to continue");
        }
        if let [token] = waiting[..]
            && !matches!(self.token_step, OneToken::Forward)
            && progress(0, 1).is_continue()
            && self.feed(token)?
        {
            self.next_logits = match &mut self.token_step {
                OneToken::Step(step) => Some(step.logits()?),
                _ => None,
            };
            let _ = progress(1, 1);
            return Ok(true);
        }
        if waiting.len() == 1 {
            self.trim()?;
        }
        self.cache.begin_prompt(waiting.len());
        let is_done = self.read(&waiting, chunk.max(1), &mut progress);
        self.cache.end_prompt();
        if !is_done? {
            return Ok(false);
        }
        self.is_roomy = true;
        if self.cache.device().is_cpu() {
            self.trim()?;
        }
        let _ = progress(waiting.len(), waiting.len());
        Ok(true)
    }

    /// Computes `prompt` in chunks. Returns whether `progress` let all of it be done.
    fn read(&mut self, prompt: &[u32], chunk: usize, progress: &mut impl FnMut(usize, usize) -> ControlFlow<()>) -> Result<bool> {
        let mut done = 0;
        while done < prompt.len() {
            if progress(done, prompt.len()).is_break() {
                return Ok(false);
            }
            let part = &prompt[done..done + next_chunk(prompt.len() - done, chunk)];
            self.next_logits = None;
            let is_last = done + part.len() == prompt.len();
            if is_last {
                self.next_logits = Some(self.model.forward_last(part, &self.attention, &mut self.cache)?);
            } else {
                self.model.forward(part, &self.attention, &mut self.cache)?;
            }
            self.tokens.extend_from_slice(part);
            done += part.len();
        }
        Ok(true)
    }

    /// Gives memory back that a long prompt took and single tokens do not need. It is done before one of those is fed, which on a GPU is when the
    /// first one of a reply is out.
    ///
    /// # Errors
    /// If memory for a copy of a few layers runs out.
    pub fn trim(&mut self) -> Result<()> {
        if std::mem::take(&mut self.is_roomy) {
            // What is to be dropped has its memory until that is decided; the next token asks for it.
            if self.cache.needs_verdicts(Step { start: self.cache.len(), len: 1 }) {
                layers::settle(&self.attention, &mut self.cache)?;
            }
            self.cache.trim()?;
        }
        Ok(())
    }

    /// Feeds one token by a step that runs as a whole. Returns whether there is one, and it could.
    fn feed(&mut self, token: u32) -> Result<bool> {
        self.trim()?;
        if let OneToken::Unknown = self.token_step {
            let step = self.model.token_step(&self.attention, &self.cache)?;
            self.token_step = step.map_or(OneToken::Forward, OneToken::Step);
        }
        let OneToken::Step(step) = &mut self.token_step else { return Ok(false) };
        let vocab_size = self.model.config().vocab_size;
        if token as usize >= vocab_size {
            bail!("token id {token} is beyond the vocabulary of {vocab_size}");
        }
        self.next_logits = None;
        let done = step.run(token, &mut self.cache)?;
        if done {
            self.tokens.push(token);
        }
        Ok(done)
    }

    /// At least the `count` likeliest tokens that follow, where a device finds them by itself: it feeds the newest token if that is not in
    /// the cache yet.
    fn best(&mut self, count: usize) -> Result<Option<Vec<(u32, f32)>>> {
        if self.next_logits.is_some() || self.tokens.len() != self.cache.len() + 1 {
            return Ok(None);
        }
        let Some(token) = self.tokens.pop() else { return Ok(None) };
        let fed = self.feed(token);
        if !matches!(fed, Ok(true)) {
            self.tokens.push(token);
        }
        if !fed? {
            return Ok(None);
        }
        let OneToken::Step(step) = &mut self.token_step else { return Ok(None) };
        let best = if count == 1 { Some(vec![(step.likeliest()?, 0.0)]) } else { step.best(count)? };
        if best.is_none() {
            self.next_logits = Some(step.logits()?);
        }
        Ok(best)
    }

    /// Goes back to the first `len` tokens, so that what follows can be computed anew.
    ///
    /// Returns how many tokens are left: 0 where the cache cannot go back that far (a sliding layer forgot
    /// what they see), and the caller has to prefill from the start.
    ///
    /// # Errors
    /// If `len` is beyond the sequence.
    pub fn rewind(&mut self, len: usize) -> Result<usize> {
        if len > self.tokens.len() {
            bail!("cannot rewind to {len} tokens, the sequence has {}", self.tokens.len());
        }
        if len == self.tokens.len() {
            return Ok(len);
        }
        let kept = if len >= self.cache.oldest_restorable() { len } else { 0 };
        self.cache.truncate(kept.min(self.cache.len()))?;
        self.tokens.truncate(kept);
        self.next_logits = None;
        Ok(kept)
    }

    /// A sequence of its own that begins with the same tokens.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn fork(&mut self) -> Result<Self> {
        layers::settle(&self.attention, &mut self.cache)?;
        Ok(Self {
            model: self.model.clone(),
            attention: self.attention.clone(),
            cache: self.cache.fork()?,
            tokens: self.tokens.clone(),
            next_logits: self.next_logits.clone(),
            token_step: OneToken::Unknown,
            is_roomy: self.is_roomy,
        })
    }

    /// Scores of the token that follows, `[vocab_size]`, computing what is not in the cache yet.
    ///
    /// # Errors
    /// If nothing was prefilled, or memory runs out.
    pub fn logits(&mut self) -> Result<&[f32]> {
        if self.next_logits.is_none() {
            self.prefill(&[], 1, |_, _| ControlFlow::Continue(()))?;
        }
        match &self.next_logits {
            Some(logits) => Ok(logits),
            None => bail!("nothing was prefilled: nothing to continue"),
        }
    }

    /// Generates tokens after a [`Session::prefill`]; the iterator ends at an end token or a limit.
    pub fn generate<'a>(&'a mut self, sampler: &'a mut Sampler, options: GenerateOptions) -> Generation<'a> {
        Generation { session: self, sampler, options, made: 0, finished: None }
    }
}

/// How many of `left` tokens to compute next, at most `chunk`: so that no short rest is left, of which products would add in another
/// order than those of whole chunks.
fn next_chunk(left: usize, chunk: usize) -> usize {
    match left.saturating_sub(chunk) {
        1..MANY_TOKENS if chunk >= 2 * MANY_TOKENS => chunk - MANY_TOKENS,
        _ => left.min(chunk),
    }
}

/// An iterator of tokens, each computed when it is asked for.
#[derive(Debug)]
pub struct Generation<'a> {
    session: &'a mut Session,
    sampler: &'a mut Sampler,
    options: GenerateOptions,
    made: usize,
    finished: Option<FinishReason>,
}

impl Generation<'_> {
    /// Why it ended; `None` while it has not.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finished
    }

    /// The sequence so far.
    pub fn tokens(&self) -> &[u32] {
        &self.session.tokens
    }

    fn step(&mut self) -> Result<Token> {
        let enough = self.sampler.enough().filter(|_| self.options.logprobs == 0);
        let best = enough.map(|count| self.session.best(count)).transpose()?.flatten();
        let (id, logits) = match best {
            Some(best) => (self.sampler.sample_of(best)?, Vec::new()),
            None => {
                let logits = self.session.logits()?.to_vec();
                (self.sampler.sample(&logits, &self.session.tokens)?, logits)
            }
        };
        let is_end = self.options.end_tokens.contains(&id);
        self.session.tokens.push(id);
        self.session.next_logits = None;
        self.made += 1;
        let logprobs = (self.options.logprobs > 0).then(|| logprobs(&logits, id, self.options.logprobs));
        Ok(Token { id, is_end, logprobs })
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finished.is_some() {
            return None;
        }
        if self.options.max_tokens.is_some_and(|most| self.made >= most) {
            self.finished = Some(FinishReason::Length);
            return None;
        }
        if self.session.tokens.len() >= self.options.context {
            self.finished = Some(FinishReason::Overflow);
            return None;
        }
        let token = self.step();
        match &token {
            Ok(token) if token.is_end => self.finished = Some(FinishReason::Stop),
            Ok(_) => {}
            Err(_) => self.finished = Some(FinishReason::Interrupt),
        }
        Some(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_chunk_is_as_large_as_products_of_whole_chunks_want() {
        for chunk in [1, 16, 32, 64, 512] {
            for len in 1..1200usize {
                let (mut left, mut parts) = (len, Vec::new());
                while left > 0 {
                    parts.push(next_chunk(left, chunk));
                    left -= parts[parts.len() - 1];
                }
                assert!(parts.iter().all(|part| (1..=chunk).contains(part)), "{len} in {chunk}: {parts:?}");
                let shortest = MANY_TOKENS.min(len);
                assert!(chunk < 2 * MANY_TOKENS || parts.iter().all(|part| *part >= shortest), "{len} in {chunk}: {parts:?}");
                // All but the last end where tiles of queries do.
                assert!(parts.iter().rev().skip(1).all(|part| part.is_multiple_of(MANY_TOKENS.min(chunk))), "{len} in {chunk}");
            }
        }
    }
}
