use super::{AttentionParts, Embedding, GatedMlp, OutputHead, Residual, RmsNorm, Rope, RopeTables, SelfAttention, Workspace, name};
use crate::arch::{CausalLm, TokenStep};
use crate::config::Config;
use crate::gpu::{self, DecoderParts, LayerParts, Place};
use crate::weights::{Scope, Weights};
use candle_core::{DType, Device, Result, Tensor};
use sparse_attn::{KvCache, RoutedAttention, Step};

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Debug, Clone)]
pub struct PreNormLayer {
    attention_norm: RmsNorm,
    attention: SelfAttention,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
}

impl PreNormLayer {
    fn load(layer: usize, scope: &Scope<'_>, config: &Config, parts: AttentionParts) -> Result<Self> {
        let norm = |name| RmsNorm::load(scope, name, config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            attention_norm: norm(name("input_layernorm", "attn_norm"))?,
            attention: SelfAttention::new(layer, config, parts),
            mlp_norm: norm(name("post_attention_layernorm", "ffn_norm"))?,
            mlp: GatedMlp::load(scope, config)?,
        })
    }

    fn forward(
        &self,
        stream: &mut Residual<'_>,
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
        stream.add_product(&self.attention.parts().o_proj, workspace.output(), &x, None)?;
        let x = stream.norm(&self.mlp_norm, self.mlp.dtype_of_input(step.len), &mut workspace.normed, None)?;
        let x = self.mlp.forward(&x, workspace)?;
        stream.add_product(self.mlp.down(), workspace.down(), &x, None)
    }
}

/// The decoder that Llama, Mistral and Qwen share; they differ in the parts of their attention.
#[derive(Debug, Clone)]
pub struct PreNormDecoder {
    config: Config,
    embedding: Embedding,
    rope: Rope,
    layers: Vec<PreNormLayer>,
    norm: RmsNorm,
    head: OutputHead,
}

impl PreNormDecoder {
    /// Loads a decoder whose attention parts an architecture loads, layer by layer.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn load(weights: &Weights, attention_parts: impl Fn(&Scope<'_>, &Config) -> Result<AttentionParts>) -> Result<Self> {
        let (config, root) = (weights.config().clone(), weights.root());
        let embedding = Embedding::load(&root, &config)?;
        // The largest first: while a tensor is copied, it is in memory twice.
        let head = OutputHead::load(&root, &config, &embedding)?;
        let layers = (0..config.num_layers)
            .map(|layer| {
                let scope = weights.layer(layer);
                PreNormLayer::load(layer, &scope, &config, attention_parts(&scope, &config)?)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            rope: Rope::load(&root, &config.rope, config.heads.head_dim())?,
            norm: RmsNorm::load(&root, name("model.norm", "output_norm"), config.hidden_size, config.rms_norm_eps)?,
            head,
            embedding,
            layers,
            config,
        })
    }
}

impl CausalLm for PreNormDecoder {
    fn config(&self) -> &Config {
        &self.config
    }

    fn device(&self) -> &Device {
        self.norm.weight().device()
    }

    fn hidden(&self, tokens: &Tensor, attention: &RoutedAttention, step: Step, cache: &mut KvCache) -> Result<Tensor> {
        let mut stream = Residual::new(self.embedding.forward(tokens)?);
        let rope = self.rope.tables(step, tokens.device())?;
        let mut workspace = Workspace::new(&self.config);
        for layer in &self.layers {
            layer.forward(&mut stream, &mut workspace, &rope, attention, step, cache)?;
        }
        workspace.end(cache);
        stream.norm(&self.norm, DType::F32, &mut Place::default(), None)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(hidden)
    }

    fn token_step(&self, attention: &RoutedAttention, cache: &KvCache) -> Result<Option<Box<dyn TokenStep>>> {
        let layers = self
            .layers
            .iter()
            .map(|layer| LayerParts::new(&self.config, &self.rope, [&layer.attention_norm, &layer.mlp_norm], &layer.attention, &layer.mlp));
        let parts = DecoderParts {
            heads: self.config.heads,
            scale: self.config.attn_scale as f32,
            embedding: self.embedding.weight(),
            embedding_factor: 1.0,
            layers: layers.collect(),
            norm: &self.norm,
            head: self.head.weight(),
        };
        gpu::record(&parts, attention, cache)
    }
}
