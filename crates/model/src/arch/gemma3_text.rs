//! Gemma 3, text only: a norm before and after each sublayer, norms on queries and keys, an embedding scaled
//! by `sqrt(hidden_size)`, five sliding layers to each one that sees everything, with a rope base of their own.

use super::{CausalLm, TokenStep};
use crate::gpu::{self, Along, DecoderParts};
use crate::layers::{AttentionParts, DecoderLayer, Embedding, OutputHead, Residual, RmsNorm, Rope, Workspaces, name, stack};
use crate::weights::{Scope, Weights};
use crate::{Config, config::RopeConfig};
use candle_core::{DType, Device, Result, Tensor};
use sparse_attn::{KvCache, Place, RoutedAttention, Step};

#[derive(Debug)]
pub(super) struct Gemma3Text {
    config: Config,
    embedding: Embedding,
    rope: Rope,
    local_rope: Rope,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    head: OutputHead,
    workspaces: Workspaces,
}

pub(super) fn load(weights: &Weights) -> Result<Gemma3Text> {
    let (config, root) = (weights.config().clone(), weights.root());
    let rope = |rope: &RopeConfig| Rope::new(rope, config.heads.head_dim());
    let embedding = Embedding::load(&root, &config)?;
    Ok(Gemma3Text {
        rope: rope(&config.rope),
        local_rope: rope(config.local_rope.as_ref().unwrap_or(&config.rope)),
        layers: (0..config.num_layers).map(|layer| load_layer(layer, &weights.layer(layer), &config)).collect::<Result<_>>()?,
        norm: RmsNorm::load_plus_one(&root, name("model.norm", "output_norm"), config.hidden_size, config.rms_norm_eps)?,
        head: OutputHead::load(&root, &config, &embedding)?,
        embedding,
        config,
        workspaces: Workspaces::default(),
    })
}

fn load_layer(layer: usize, scope: &Scope<'_>, config: &Config) -> Result<DecoderLayer> {
    let norm = |name| RmsNorm::load_plus_one(scope, name, config.heads.head_dim(), config.rms_norm_eps);
    let qk_norm = Some((norm(name("self_attn.q_norm", "attn_q_norm"))?, norm(name("self_attn.k_norm", "attn_k_norm"))?));
    DecoderLayer::load_sandwich(layer, scope, config, AttentionParts { qk_norm, ..AttentionParts::load(scope, config)? })
}

impl CausalLm for Gemma3Text {
    fn config(&self) -> &Config {
        &self.config
    }

    fn device(&self) -> &Device {
        self.norm.weight().device()
    }

    fn hidden(&self, tokens: &Tensor, attention: &RoutedAttention, step: Step, cache: &mut KvCache) -> Result<Tensor> {
        let mut workspace = self.workspaces.take(&self.config);
        let factor = (self.config.hidden_size as f64).sqrt();
        let mut stream = Residual::new(self.embedding.forward(tokens, factor, &mut workspace.stream)?);
        let (global, local) = (self.rope.tables(step, tokens.device())?, self.local_rope.tables(step, tokens.device())?);
        let rope = |layer: usize| if self.config.sliding_window[layer].is_some() { &local } else { &global };
        stack::forward(&self.layers, rope, &mut stream, &mut workspace, attention, step, cache)?;
        let hidden = stream.norm(&self.norm, DType::F32, &mut Place::default(), Along::default())?;
        workspace.end(&self.workspaces, step, cache)?;
        Ok(hidden)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(hidden)
    }

    fn token_step(&self, attention: &RoutedAttention, cache: &KvCache) -> Result<Option<Box<dyn TokenStep>>> {
        let layers = self.layers.iter().zip(&self.config.sliding_window).map(|(layer, window)| {
            let rope = if window.is_some() { &self.local_rope } else { &self.rope };
            layer.parts(&self.config, rope)
        });
        let parts = DecoderParts {
            heads: self.config.heads,
            scale: self.config.attn_scale as f32,
            embedding: self.embedding.weight(),
            embedding_factor: (self.config.hidden_size as f32).sqrt(),
            layers: layers.collect(),
            norm: &self.norm,
            head: self.head.weight(),
        };
        gpu::record(&parts, attention, cache)
    }
}
