use super::{AttentionParts, GatedMlp, Residual, RmsNorm, Rope, RopeTables, SelfAttention, Workspace, name};
use crate::config::Config;
use crate::gpu::{Along, LayerParts};
use crate::weights::Scope;
use candle_core::Result;
use sparse_attn::{KvCache, RoutedAttention, Step};

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`; or what a part gives is normed, too, before it is added (Gemma).
#[derive(Debug, Clone)]
pub struct DecoderLayer {
    attention_norm: RmsNorm,
    attention: SelfAttention,
    post_attention_norm: Option<RmsNorm>,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
    post_mlp_norm: Option<RmsNorm>,
}

impl DecoderLayer {
    /// Loads a layer with norms before its parts only.
    pub(crate) fn load(layer: usize, scope: &Scope<'_>, config: &Config, parts: AttentionParts) -> Result<Self> {
        let norm = |name| RmsNorm::load(scope, name, config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            attention_norm: norm(name("input_layernorm", "attn_norm"))?,
            attention: SelfAttention::new(layer, config, parts),
            post_attention_norm: None,
            mlp_norm: norm(name("post_attention_layernorm", "ffn_norm"))?,
            mlp: GatedMlp::load(scope, config)?,
            post_mlp_norm: None,
        })
    }

    /// Loads one of Gemma, with norms after its parts, too, which multiply by one more than their weights.
    pub(crate) fn load_sandwich(layer: usize, scope: &Scope<'_>, config: &Config, parts: AttentionParts) -> Result<Self> {
        let norm = |name| RmsNorm::load_plus_one(scope, name, config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            attention_norm: norm(name("input_layernorm", "attn_norm"))?,
            attention: SelfAttention::new(layer, config, parts),
            post_attention_norm: Some(norm(name("post_attention_layernorm", "post_attention_norm"))?),
            mlp_norm: norm(name("pre_feedforward_layernorm", "ffn_norm"))?,
            mlp: GatedMlp::load(scope, config)?,
            post_mlp_norm: Some(norm(name("post_feedforward_layernorm", "post_ffw_norm"))?),
        })
    }

    /// Changes the stream in place.
    ///
    /// # Errors
    /// If a shape does not fit the cache, or memory runs out.
    pub(crate) fn forward<'a>(
        &'a self,
        stream: &mut Residual<'a>,
        workspace: &mut Workspace,
        rope: &RopeTables,
        attention: &RoutedAttention,
        step: Step,
        cache: &mut KvCache,
    ) -> Result<()> {
        workspace.begin(&self.attention, &self.mlp, attention, step, cache)?;
        let dtype = self.attention.dtype_of_input(step.len, attention);
        let (place, along) = workspace.attention_input();
        let x = stream.norm(&self.attention_norm, dtype, place, along)?;
        let x = self.attention.forward(&x, workspace, rope, attention, step, cache)?;
        stream.add_product(&self.attention.parts().o_proj, workspace.output(), &x, self.post_attention_norm.as_ref())?;
        let x = stream.norm(&self.mlp_norm, self.mlp.dtype_of_input(step.len), &mut workspace.normed, Along::default())?;
        let x = self.mlp.forward(&x, workspace)?;
        stream.add_product(self.mlp.down(), workspace.down(), &x, self.post_mlp_norm.as_ref())
    }

    /// Whether all that a GPU does beside attention with so many tokens, in a workspace that keeps its places, is to launch kernels.
    pub(crate) fn only_launches(&self, tokens: usize) -> bool {
        let (AttentionParts { q_proj, k_proj, v_proj, o_proj, .. }, [gate, up, down]) = (self.attention.parts(), self.mlp.projections());
        let are_unpacked =
            [q_proj, k_proj, v_proj, o_proj, gate, up, down].iter().all(|projection| projection.weight().is_unpacked(tokens));
        // Biases of queries, keys and values are added by who stores them.
        are_unpacked && [o_proj, gate, up, down].iter().all(|projection| projection.bias().is_none())
    }

    /// Its parts, for a device that runs steps as a whole.
    pub(crate) fn parts<'a>(&'a self, config: &Config, rope: &'a Rope) -> LayerParts<'a> {
        let (parts, [gate, up, down]) = (self.attention.parts(), self.mlp.projections());
        LayerParts {
            attention_norm: &self.attention_norm,
            qkv: [&parts.q_proj, &parts.k_proj, &parts.v_proj],
            qk_norm: parts.qk_norm.as_ref().map(|(q, k)| (q, k)),
            rope,
            output: &parts.o_proj,
            post_attention_norm: self.post_attention_norm.as_ref(),
            mlp_norm: &self.mlp_norm,
            gate,
            up,
            down,
            activation: config.activation,
            post_mlp_norm: self.post_mlp_norm.as_ref(),
        }
    }
}
