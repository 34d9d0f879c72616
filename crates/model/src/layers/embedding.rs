use super::name;
use crate::config::Config;
use crate::weights::{Matrix, Scope};
use candle_core::{Result, Tensor};
use sparse_attn::Place;

/// Token ids to the residual stream. Rows are unpacked as they are looked up.
#[derive(Debug, Clone)]
pub struct Embedding {
    weight: Matrix, // [vocab_size, hidden_size]
}

impl Embedding {
    /// Loads `model.embed_tokens` or `token_embd`.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn load(scope: &Scope<'_>, config: &Config) -> Result<Self> {
        let weight = scope.matrix(name("model.embed_tokens.weight", "token_embd.weight"), config.vocab_size, config.hidden_size)?;
        Ok(Self { weight })
    }

    /// `[vocab_size, hidden_size]`.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }

    /// `[tokens]` u32 -> `[tokens, hidden_size]`, times `factor`. On a GPU in `place`.
    ///
    /// # Errors
    /// If an id is beyond the vocabulary.
    pub(crate) fn forward(&self, tokens: &Tensor, factor: f64, place: &mut Place) -> Result<Tensor> {
        match &self.weight {
            Matrix::Device(weight) => weight.rows(tokens, factor as f32, place),
            weight if factor == 1.0 => weight.rows(tokens),
            weight => weight.rows(tokens)? * factor,
        }
    }
}

/// The residual stream to logits.
#[derive(Debug, Clone)]
pub struct OutputHead {
    weight: Matrix, // [vocab_size, hidden_size]
}

impl OutputHead {
    /// Loads `lm_head` or `output`, or takes the embedding where the two are tied.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn load(scope: &Scope<'_>, config: &Config, embedding: &Embedding) -> Result<Self> {
        let own = name("lm_head.weight", "output.weight");
        // Some untied checkpoints leave the head out and mean the embedding; some tied ones store it twice.
        let weight = if config.tied_embedding || !scope.has(own) {
            embedding.weight.clone()
        } else {
            scope.matrix(own, config.vocab_size, config.hidden_size)?
        };
        Ok(Self { weight })
    }

    /// `[vocab_size, hidden_size]`.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }

    /// `[tokens, hidden_size]` -> `[tokens, vocab_size]`.
    ///
    /// # Errors
    /// If the widths differ.
    pub fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        self.weight.multiply(hidden)
    }
}
