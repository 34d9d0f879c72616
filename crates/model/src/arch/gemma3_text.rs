//! Gemma 3, text only: a norm before and after each sublayer, norms on queries and keys, an embedding scaled
//! by `sqrt(hidden_size)`, five sliding layers to each one that sees everything, with a rope base of their own.

use super::{CausalLm, TokenStep};
use crate::gpu::{self, DecoderParts, LayerParts, Place};
use crate::layers::{AttentionParts, Embedding, GatedMlp, OutputHead, Residual, RmsNorm, Rope, RopeTables, SelfAttention, Workspace, name};
use crate::weights::{Scope, Weights};
use crate::{Config, config::RopeConfig};
use candle_core::{DType, Device, Result, Tensor};
use sparse_attn::{KvCache, RoutedAttention, Step};

/// `x + norm(attention(norm(x)))`, then `x + norm(mlp(norm(x)))`.
#[derive(Debug)]
struct SandwichLayer {
    attention_norm: RmsNorm,
    attention: SelfAttention,
    post_attention_norm: RmsNorm,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
    post_mlp_norm: RmsNorm,
}

#[derive(Debug)]
pub(super) struct Gemma3Text {
    config: Config,
    embedding: Embedding,
    rope: Rope,
    local_rope: Rope,
    layers: Vec<SandwichLayer>,
    norm: RmsNorm,
    head: OutputHead,
}

pub(super) fn load(weights: &Weights) -> Result<Gemma3Text> {
    let (config, root) = (weights.config().clone(), weights.root());
    let rope = |rope: &RopeConfig| Rope::new(rope, config.heads.head_dim());
    let embedding = Embedding::load(&root, &config)?;
    Ok(Gemma3Text {
        rope: rope(&config.rope),
        local_rope: rope(config.local_rope.as_ref().unwrap_or(&config.rope)),
        layers: (0..config.num_layers).map(|layer| SandwichLayer::load(layer, &weights.layer(layer), &config)).collect::<Result<_>>()?,
        norm: RmsNorm::load_plus_one(&root, name("model.norm", "output_norm"), config.hidden_size, config.rms_norm_eps)?,
        head: OutputHead::load(&root, &config, &embedding)?,
        embedding,
        config,
    })
}

impl SandwichLayer {
    fn load(layer: usize, scope: &Scope<'_>, config: &Config) -> Result<Self> {
        let norm = |name, width| RmsNorm::load_plus_one(scope, name, width, config.rms_norm_eps);
        let (hidden, head_dim) = (config.hidden_size, config.heads.head_dim());
        let qk_norm =
            Some((norm(name("self_attn.q_norm", "attn_q_norm"), head_dim)?, norm(name("self_attn.k_norm", "attn_k_norm"), head_dim)?));
        let parts = AttentionParts { qk_norm, ..AttentionParts::load(scope, config)? };
        Ok(Self {
            attention_norm: norm(name("input_layernorm", "attn_norm"), hidden)?,
            attention: SelfAttention::new(layer, config, parts),
            post_attention_norm: norm(name("post_attention_layernorm", "post_attention_norm"), hidden)?,
            mlp_norm: norm(name("pre_feedforward_layernorm", "ffn_norm"), hidden)?,
            mlp: GatedMlp::load(scope, config)?,
            post_mlp_norm: norm(name("post_feedforward_layernorm", "post_ffw_norm"), hidden)?,
        })
    }

    fn forward<'a>(
        &'a self,
        stream: &mut Residual<'a>,
        workspace: &mut Workspace,
        rope: &RopeTables,
        attention: &RoutedAttention,
        step: Step,
        cache: &mut KvCache,
    ) -> Result<()> {
        workspace.begin(&self.attention, &self.mlp, attention, step, cache)?;
        let x = stream.norm(
            &self.attention_norm,
            self.attention.dtype_of_input(step.len, attention),
            &mut workspace.normed,
            Some(&mut workspace.inputs),
        )?;
        let x = self.attention.forward(&x, workspace, rope, attention, step, cache)?;
        stream.add_product(&self.attention.parts().o_proj, workspace.output(), &x, Some(&self.post_attention_norm))?;
        let x = stream.norm(&self.mlp_norm, self.mlp.dtype_of_input(step.len), &mut workspace.normed, None)?;
        let x = self.mlp.forward(&x, workspace)?;
        stream.add_product(self.mlp.down(), workspace.down(), &x, Some(&self.post_mlp_norm))
    }
}

impl CausalLm for Gemma3Text {
    fn config(&self) -> &Config {
        &self.config
    }

    fn device(&self) -> &Device {
        self.norm.weight().device()
    }

    fn hidden(&self, tokens: &Tensor, attention: &RoutedAttention, step: Step, cache: &mut KvCache) -> Result<Tensor> {
        let mut stream = Residual::new((self.embedding.forward(tokens)? * (self.config.hidden_size as f64).sqrt())?);
        let (global, local) = (self.rope.tables(step, tokens.device())?, self.local_rope.tables(step, tokens.device())?);
        let mut workspace = Workspace::new(&self.config);
        for (layer, window) in self.layers.iter().zip(&self.config.sliding_window) {
            let rope = if window.is_some() { &local } else { &global };
            layer.forward(&mut stream, &mut workspace, rope, attention, step, cache)?;
        }
        workspace.end(cache);
        stream.norm(&self.norm, DType::F32, &mut Place::default(), None)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(hidden)
    }

    fn token_step(&self, attention: &RoutedAttention, cache: &KvCache) -> Result<Option<Box<dyn TokenStep>>> {
        let layers = self.layers.iter().zip(&self.config.sliding_window).map(|(layer, window)| {
            let rope = if window.is_some() { &self.local_rope } else { &self.rope };
            LayerParts {
                post_attention_norm: Some(&layer.post_attention_norm),
                post_mlp_norm: Some(&layer.post_mlp_norm),
                ..LayerParts::new(&self.config, rope, [&layer.attention_norm, &layer.mlp_norm], &layer.attention, &layer.mlp)
            }
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
