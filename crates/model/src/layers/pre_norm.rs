use super::{AttentionParts, DecoderLayer, Embedding, OutputHead, Residual, RmsNorm, Rope, Workspaces, name, stack};
use crate::arch::{CausalLm, TokenStep};
use crate::config::Config;
use crate::gpu::{self, Along, DecoderParts};
use crate::weights::{Scope, Weights};
use candle_core::{DType, Device, Result, Tensor};
use sparse_attn::{KvCache, Place, RoutedAttention, Step};

/// The decoder that Llama, Mistral and Qwen share; they differ in the parts of their attention.
#[derive(Debug, Clone)]
pub struct PreNormDecoder {
    config: Config,
    embedding: Embedding,
    rope: Rope,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    head: OutputHead,
    workspaces: Workspaces,
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
                DecoderLayer::load(layer, &scope, &config, attention_parts(&scope, &config)?)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            rope: Rope::load(&root, &config.rope, config.heads.head_dim())?,
            norm: RmsNorm::load(&root, name("model.norm", "output_norm"), config.hidden_size, config.rms_norm_eps)?,
            head,
            embedding,
            layers,
            config,
            workspaces: Workspaces::default(),
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
        let mut workspace = self.workspaces.take(&self.config);
        let mut stream = Residual::new(self.embedding.forward(tokens, 1.0, &mut workspace.stream)?);
        let rope = self.rope.tables(step, tokens.device())?;
        stack::forward(&self.layers, |_| &rope, &mut stream, &mut workspace, attention, step, cache)?;
        let hidden = stream.norm(&self.norm, DType::F32, &mut Place::default(), Along::default())?;
        workspace.end(&self.workspaces, step, cache)?;
        Ok(hidden)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(hidden)
    }

    fn token_step(&self, attention: &RoutedAttention, cache: &KvCache) -> Result<Option<Box<dyn TokenStep>>> {
        let parts = DecoderParts {
            heads: self.config.heads,
            scale: self.config.attn_scale as f32,
            embedding: self.embedding.weight(),
            embedding_factor: 1.0,
            layers: self.layers.iter().map(|layer| layer.parts(&self.config, &self.rope)).collect(),
            norm: &self.norm,
            head: self.head.weight(),
        };
        gpu::record(&parts, attention, cache)
    }
}
