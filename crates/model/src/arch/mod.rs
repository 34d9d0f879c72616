//! Architectures, one file each, named after `model_type` in `config.json`.

mod gemma3_text;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use crate::{Config, Weights};
use crate::{gpu, layers};
use candle_core::{Device, Result, Tensor, bail};
use sparse_attn::{KvCache, RoutedAttention, Step};
use std::sync::Arc;

/// Every architecture that [`load`] knows.
pub const NAMES: [&str; 5] = ["gemma3_text", "llama", "mistral", "qwen2", "qwen3"];

/// A decoder-only language model. It has no state: the cache is the caller's.
pub trait CausalLm: std::fmt::Debug + Send + Sync {
    /// The checkpoint's shape.
    fn config(&self) -> &Config;

    /// Where its weights are.
    fn device(&self) -> &Device;

    /// The residual stream after the last norm: tokens `[step.len]` u32 -> `[step.len, hidden_size]` f32.
    ///
    /// Writes keys and values of the step; the caller commits it.
    ///
    /// # Errors
    /// If an id is beyond the vocabulary or a shape does not fit the cache.
    fn hidden(&self, tokens: &Tensor, attention: &RoutedAttention, step: Step, cache: &mut KvCache) -> Result<Tensor>;

    /// Scores of the next token: `[tokens, hidden_size]` -> `[tokens, vocab_size]` f32.
    ///
    /// # Errors
    /// If the width differs.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor>;

    /// A step of one token that runs as a whole, where the device can; `None`: through [`CausalLm::forward`] only.
    ///
    /// # Errors
    /// If the device has no memory for it.
    fn token_step(&self, _attention: &RoutedAttention, _cache: &KvCache) -> Result<Option<Box<dyn TokenStep>>> {
        Ok(None)
    }

    /// Feeds `tokens` and returns the residual stream `[tokens, hidden_size]`. On an error the cache is as it was.
    ///
    /// # Errors
    /// If `tokens` is empty, an id is beyond the vocabulary, or memory runs out.
    fn forward(&self, tokens: &[u32], attention: &RoutedAttention, cache: &mut KvCache) -> Result<Tensor> {
        let (step, hidden) = self.feed(tokens, attention, cache)?;
        layers::decide(attention, cache)?;
        cache.commit(step)?;
        Ok(hidden)
    }

    /// Feeds `tokens` and returns the scores of the token that follows, `[vocab_size]`, when they are there: verdicts of a token router may come later
    /// ([`KvCache::learn`]), or be still to be made ([`KvCache::waiting`]). On an error the cache is as it was.
    ///
    /// # Errors
    /// As [`CausalLm::forward`].
    fn forward_last(&self, tokens: &[u32], attention: &RoutedAttention, cache: &mut KvCache) -> Result<Vec<f32>> {
        let (step, hidden) = self.feed(tokens, attention, cache)?;
        let logits = self.logits(&hidden.narrow(0, step.len - 1, 1)?.contiguous()?)?;
        let logits = if logits.device().is_cuda() {
            // Verdicts that are made the host looks through meanwhile.
            gpu::fetch(&logits, || cache.learn())?
        } else {
            logits.flatten_all()?.to_vec1()?
        };
        cache.commit_untold(step)?;
        Ok(logits)
    }

    /// Checks `tokens`, makes places for them and feeds them, with the verdicts of token routers on their way to the host, or still to be made where
    /// nobody asks for them yet. The step is to be committed.
    ///
    /// # Errors
    /// As [`CausalLm::forward`].
    fn feed(&self, tokens: &[u32], attention: &RoutedAttention, cache: &mut KvCache) -> Result<(Step, Tensor)> {
        let vocab_size = self.config().vocab_size;
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab_size) {
            bail!("token id {id} is beyond the vocabulary of {vocab_size}");
        }
        layers::decide(attention, cache)?;
        let step = cache.reserve(tokens.len())?;
        let device = cache.device().clone();
        let hidden = self.hidden(&Tensor::new(tokens, &device)?, attention, step, cache)?;
        cache.tell()?;
        Ok((step, hidden))
    }
}

/// A forward pass of one token up to its logits, which the device does without the host. It equals [`CausalLm::forward`] as far as
/// rounding goes.
pub trait TokenStep: std::fmt::Debug {
    /// Feeds `token` to `cache`, the same one every time. Returns whether it could: if not, the cache is as it was, and
    /// [`CausalLm::forward`] can.
    ///
    /// # Errors
    /// If memory runs out, or the device fails. The cache is then as it was.
    fn run(&mut self, token: u32, cache: &mut KvCache) -> Result<bool>;

    /// The likeliest token that follows.
    ///
    /// # Errors
    /// If a logit is NaN or infinite: the weights or a kernel are broken.
    fn likeliest(&mut self) -> Result<u32>;

    /// At least the `count` likeliest tokens and their scores, in no order; `None`: only [`TokenStep::logits`] can tell.
    ///
    /// # Errors
    /// As [`TokenStep::likeliest`].
    fn best(&mut self, count: usize) -> Result<Option<Vec<(u32, f32)>>>;

    /// The scores of all tokens, `[vocab_size]`.
    ///
    /// # Errors
    /// If they cannot be fetched.
    fn logits(&mut self) -> Result<Vec<f32>>;
}

/// Loads the weights of any known architecture.
///
/// # Errors
/// If the architecture is unknown, or a tensor is missing or has another shape.
pub fn load(weights: &Weights) -> Result<Arc<dyn CausalLm>> {
    Ok(match weights.config().model_type.as_str() {
        "gemma3_text" => Arc::new(gemma3_text::load(weights)?),
        "llama" => Arc::new(llama::load(weights)?),
        "mistral" => Arc::new(mistral::load(weights)?),
        "qwen2" => Arc::new(qwen2::load(weights)?),
        "qwen3" => Arc::new(qwen3::load(weights)?),
        other => bail!("architecture {other:?} is not supported ({} are)", NAMES.join(", ")),
    })
}
