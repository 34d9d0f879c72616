//! What is measured, and what came of it: the lines that measuring processes print, and that are kept.

use serde::{Deserialize, Serialize};

/// One of the two that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Side {
    A,
    B,
}

impl Side {
    pub(super) const BOTH: [Self; 2] = [Self::A, Self::B];
}

/// What one process measures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
pub(super) enum Job {
    /// Load, prefill and decode at these depths.
    Speed { side: Side, round: u32, depths: Vec<usize> },
    /// The likelihood of the text.
    Likelihood { side: Side },
    /// What is hidden in the text.
    Needles { side: Side },
    /// How far A's predictions are from B's, of one model.
    Divergence,
    /// Questions of a file from this one on.
    Choices { side: Side, file: usize, from: usize },
    /// Answers to the prompts from this one on.
    Answers { side: Side, from: usize },
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "measured", rename_all = "snake_case")]
pub(super) enum Measured {
    Load { side: Side, round: u32, seconds: f64 },
    Speed(Speed),
    Likelihood(Likelihood),
    Needle { side: Side, task: String, score: f64, questions: usize },
    Divergence(Divergence),
    Choice { side: Side, file: usize, index: usize, right: bool, right_by_length: bool },
    Answer { side: Side, index: usize, text: String },
}

/// One round at one depth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Speed {
    pub(super) side: Side,
    pub(super) round: u32,
    pub(super) depth: usize,
    /// Tokens of the prompt that was timed: the depth, or `--prompt` of them at depth 0.
    pub(super) prompt_tokens: usize,
    pub(super) prompt_seconds: f64,
    pub(super) decode_tokens: usize,
    pub(super) decode_seconds: f64,
    pub(super) kv_resident_bytes: u64,
    pub(super) kv_read_bytes: u64,
    /// The most that the process ever held.
    pub(super) peak_bytes: Option<u64>,
    pub(super) prompt_joules: Option<f64>,
    pub(super) decode_joules: Option<f64>,
    /// What the machine draws when it does nothing.
    pub(super) idle_watts: Option<f64>,
}

/// The text, as a model sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Likelihood {
    pub(super) side: Side,
    /// `-ln p` of all of it.
    pub(super) nats: f64,
    pub(super) tokens: usize,
    pub(super) bytes: usize,
    pub(super) words: usize,
}

impl Likelihood {
    pub(super) fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes as f64
    }

    pub(super) fn byte_perplexity(&self) -> f64 {
        (self.nats / self.bytes as f64).exp()
    }

    pub(super) fn word_perplexity(&self) -> f64 {
        (self.nats / self.words.max(1) as f64).exp()
    }
}

/// A's next-token distributions beside B's, on the same tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Divergence {
    /// `KL(B || A)`, nats.
    pub(super) kl_mean: f64,
    pub(super) kl_p99: f64,
    pub(super) same_top: f64,
    /// Of A's perplexity against B's.
    pub(super) perplexity_change: f64,
    /// Of the keys that A could have read, the part that it read.
    pub(super) density: f64,
    pub(super) scored: usize,
}
