//! What a checkpoint says of its own shape, from `config.json` or from GGUF metadata.

mod from_gguf;
mod from_json;

use candle_core::{Result, bail};
use sparse_attn::HeadShape;
use sparse_attn::cache::LayerSpec;

/// The activation of the gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

/// How rotary frequencies are stretched beyond the length that was trained.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The stretch.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The stretch of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The trained length.
        original_context: usize,
    },
    /// YaRN, arXiv:2309.00071.
    Yarn {
        /// The stretch.
        factor: f64,
        /// The trained length.
        original_context: usize,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is stretched in full.
        beta_slow: f64,
        /// Factor of cos and sin.
        attention_factor: f64,
    },
}

/// Rotary position embedding of a kind of layer.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
}

/// A checkpoint's shape. Every count is checked when it is read.
#[derive(Debug, Clone)]
pub struct Config {
    /// The architecture's name: a member of [`crate::arch::NAMES`].
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Heads of every layer.
    pub heads: HeadShape,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Tokens the model was trained on.
    pub context: usize,
    /// Rope of layers that see everything.
    pub rope: RopeConfig,
    /// Rope of sliding layers, where it differs (Gemma 3).
    pub local_rope: Option<RopeConfig>,
    /// Each layer's own sliding window in tokens.
    pub sliding_window: Vec<Option<usize>>,
    /// Factor of `q . k`.
    pub attn_scale: f64,
    /// Activation of the MLP.
    pub activation: Activation,
    /// Whether the output head is the embedding.
    pub tied_embedding: bool,
    /// The token that starts a sequence.
    pub bos: Option<u32>,
    /// The tokens that end one.
    pub eos: Vec<u32>,
}

impl Config {
    /// Reads the text of `config.json`.
    ///
    /// # Errors
    /// If a field is missing, of the wrong type, out of range, or names what is not supported.
    pub fn from_json(text: &str) -> Result<Self> {
        from_json::from_json(text)
    }

    /// What the cache must know of every layer.
    pub fn layer_specs(&self) -> Vec<LayerSpec> {
        self.sliding_window.iter().map(|window| LayerSpec { sliding_window: *window, ..LayerSpec::full(self.heads) }).collect()
    }

    /// Rope of one layer.
    pub fn rope_of_layer(&self, layer: usize) -> &RopeConfig {
        match (&self.local_rope, self.sliding_window[layer]) {
            (Some(local), Some(_)) => local,
            _ => &self.rope,
        }
    }

    /// Refuses shapes that no real checkpoint has, before anything is allocated for them.
    pub(crate) fn check(self) -> Result<Self> {
        let bounded = |name: &str, value: usize, most: usize| {
            if value == 0 || value > most { bail!("config: {name} is {value}, expected 1 to {most}") } else { Ok(()) }
        };
        bounded("hidden_size", self.hidden_size, 1 << 20)?;
        bounded("intermediate_size", self.intermediate_size, 1 << 22)?;
        bounded("num_hidden_layers", self.num_layers, 4096)?;
        bounded("vocab_size", self.vocab_size, 1 << 24)?;
        bounded("head_dim", self.heads.head_dim(), 4096)?;
        bounded("num_attention_heads", self.heads.q_heads(), 1 << 16)?;
        bounded("max_position_embeddings", self.context, 1 << 30)?;
        if !self.heads.head_dim().is_multiple_of(2) {
            bail!("config: head_dim is {}, rope needs an even one", self.heads.head_dim());
        }
        for rope in std::iter::once(&self.rope).chain(&self.local_rope) {
            if !rope.theta.is_finite() || rope.theta <= 0.0 {
                bail!("config: rope_theta is {}, expected a positive number", rope.theta);
            }
            rope.scaling.check()?;
        }
        if !self.rms_norm_eps.is_finite() || self.rms_norm_eps < 0.0 {
            bail!("config: rms_norm_eps is {}, expected a small positive number", self.rms_norm_eps);
        }
        if self.sliding_window.len() != self.num_layers {
            bail!("config: layer_types names {} layers, num_hidden_layers is {}", self.sliding_window.len(), self.num_layers);
        }
        if let Some(id) = self.eos.iter().chain(&self.bos).find(|id| **id as usize >= self.vocab_size) {
            bail!("config: special token {id} is beyond vocab_size {}", self.vocab_size);
        }
        Ok(self)
    }
}

impl RopeScaling {
    fn check(&self) -> Result<()> {
        let factor = match self {
            Self::None => return Ok(()),
            Self::Linear { factor } => factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                if *original_context == 0
                    || low_freq_factor.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater)
                    || high_freq_factor <= low_freq_factor
                {
                    bail!(
                        "config: llama3 rope wants original_max_position_embeddings above 0 and 0 < low_freq_factor < high_freq_factor, \
                         not {original_context}, {low_freq_factor}, {high_freq_factor}"
                    );
                }
                factor
            }
            Self::Yarn { factor, original_context, .. } => {
                if *original_context == 0 {
                    bail!("config: yarn rope wants original_max_position_embeddings above 0");
                }
                factor
            }
        };
        if !factor.is_finite() || *factor <= 0.0 {
            bail!("config: rope factor is {factor}, expected a positive number");
        }
        Ok(())
    }
}

/// Every `period`-th layer sees everything, the others slide (Gemma 3: 6).
fn sliding_pattern(num_layers: usize, window: usize, period: usize) -> Vec<Option<usize>> {
    (0..num_layers).map(|layer| if (layer + 1) % period == 0 { None } else { Some(window) }).collect()
}
