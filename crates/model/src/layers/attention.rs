use super::{Linear, RmsNorm, RopeTables, Workspace, name};
use crate::config::Config;
use crate::gpu::Group;
use crate::weights::{Matrix, Name, Scope};
use candle_core::{DType, Result, Tensor};
use sparse_attn::{AttentionInput, Destination, HeadShape, KvCache, Products, ProductsInput, RoutedAttention, Step};

/// Projections around [`RoutedAttention`].
#[derive(Debug, Clone)]
pub struct SelfAttention {
    layer: usize,
    shape: HeadShape,
    scale: f32,
    parts: AttentionParts,
}

/// What an architecture's attention is made of.
#[derive(Debug, Clone)]
pub struct AttentionParts {
    /// `hidden_size` -> `q_heads * head_dim`
    pub q_proj: Linear,
    /// `hidden_size` -> `kv_heads * head_dim`
    pub k_proj: Linear,
    /// `hidden_size` -> `kv_heads * head_dim`
    pub v_proj: Linear,
    /// `q_heads * head_dim` -> `hidden_size`
    pub o_proj: Linear,
    /// Norms of queries and keys over head_dim, before rope (Qwen 3, Gemma 3).
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
}

impl AttentionParts {
    /// Loads the four projections, and their biases where the checkpoint has them; no norms.
    ///
    /// # Errors
    /// If a matrix is missing or has another shape.
    pub fn load(scope: &Scope<'_>, config: &Config) -> Result<Self> {
        let (hidden, heads) = (config.hidden_size, config.heads);
        let rotary = |projection: Name<'_>, count: usize| -> Result<Linear> {
            let full = super::linear::suffixed(projection, "weight");
            let weight = scope.rotary_matrix(full.name(), count, heads.head_dim(), hidden)?;
            Ok(Linear::new(weight, Linear::load_bias(scope, projection, count * heads.head_dim())?))
        };
        Ok(Self {
            q_proj: rotary(name("self_attn.q_proj", "attn_q"), heads.q_heads())?,
            k_proj: rotary(name("self_attn.k_proj", "attn_k"), heads.kv_heads())?,
            v_proj: Linear::load(scope, name("self_attn.v_proj", "attn_v"), heads.kv_heads() * heads.head_dim(), hidden)?,
            o_proj: Linear::load(scope, name("self_attn.o_proj", "attn_output"), hidden, heads.q_heads() * heads.head_dim())?,
            qk_norm: None,
        })
    }
}

impl SelfAttention {
    /// The attention of decoder layer `layer`.
    pub fn new(layer: usize, config: &Config, parts: AttentionParts) -> Self {
        Self { layer, shape: config.heads, scale: config.attn_scale as f32, parts }
    }

    /// The decoder layer that it is of.
    pub(crate) fn index(&self) -> usize {
        self.layer
    }

    /// What it is made of.
    pub fn parts(&self) -> &AttentionParts {
        &self.parts
    }

    /// How the input of so many tokens may come: where someone watches, as it is.
    pub fn dtype_of_input(&self, tokens: usize, attention: &RoutedAttention) -> DType {
        let AttentionParts { q_proj, k_proj, v_proj, .. } = &self.parts;
        if attention.is_observed() { DType::F32 } else { Linear::dtype_of_activations([q_proj, k_proj, v_proj], tokens) }
    }

    /// `x` `[tokens, hidden_size]`, after the layer's norm -> what `o_proj` is to be multiplied with, `[tokens, q_heads * head_dim]`.
    ///
    /// # Errors
    /// If a shape does not fit the cache.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        workspace: &mut Workspace,
        rope: &RopeTables,
        attention: &RoutedAttention,
        step: Step,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let (q_heads, kv_heads, head_dim) = (self.shape.q_heads(), self.shape.kv_heads(), self.shape.head_dim());
        let parts = &self.parts;
        let projections = [&parts.q_proj, &parts.k_proj, &parts.v_proj];
        let decides_later = workspace.decides_later();
        let qkv = workspace.qkv_or(|| self.qkv_group(attention, decides_later), x)?;
        let asked = self.beside(attention, decides_later).map_or(Ok(0), |asked| asked.dim(0))?;
        let heads = [q_heads, kv_heads, kv_heads];
        let (products, projected) = Linear::products(projections, qkv.as_ref(), x, heads, head_dim, asked, &mut workspace.product)?;
        let dtype = parts.o_proj.weight().dtype_of_activations(step.len);
        let (hidden, projected, scale) = (x, projected.as_ref(), self.scale);
        let input = ProductsInput { hidden, projected, products: self.products(&products, rope), scale, decides_later };
        let (queries, to) = (&mut workspace.queries, Destination { dtype, place: &mut workspace.attended });
        let out = match attention.forward_products(self.layer, input, step, cache, queries, to)? {
            Some(out) => out,
            None => {
                let [mut q, mut k, v] = Linear::add_biases(projections, products)?;
                if let Some((q_norm, k_norm)) = &parts.qk_norm {
                    (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
                }
                let (q, rotated) = rope.apply(&q, &k, attention.dtype_of_queries(cache.layer(self.layer)))?;
                let input = AttentionInput { hidden, projected, q: &q, k: &rotated, k_before_rope: &k, v: &v, scale };
                attention.forward_to(self.layer, input, step, cache, Destination { dtype, place: &mut workspace.attended })?
            }
        };
        out.reshape((step.len, q_heads * head_dim))
    }

    /// What a token router wants multiplied beside its weights, unless it decides when all layers are done.
    fn beside<'a>(&self, attention: &'a RoutedAttention, decides_later: bool) -> Option<&'a Tensor> {
        if decides_later { None } else { attention.routing().token_router.projection(self.layer) }
    }

    /// The weights that its input is multiplied with, those of a token router among them, to whole heads.
    pub(crate) fn qkv_group<'a>(&'a self, attention: &'a RoutedAttention, decides_later: bool) -> Group<'a, Matrix> {
        let AttentionParts { q_proj, k_proj, v_proj, .. } = &self.parts;
        let beside = self.beside(attention, decides_later);
        Group { matrices: vec![q_proj.weight(), k_proj.weight(), v_proj.weight()], beside, whole: self.shape.head_dim() }
    }

    /// The weights that its output is multiplied with.
    pub(crate) fn output_group(&self) -> Group<'_, Matrix> {
        self.parts.o_proj.group()
    }

    /// What queries, keys and values are made of.
    fn products<'a>(&'a self, [q, k, v]: &'a [Tensor; 3], rope: &'a RopeTables) -> Products<'a> {
        let AttentionParts { q_proj, k_proj, v_proj, qk_norm, .. } = &self.parts;
        let norms = qk_norm.as_ref().map(|(q, k)| ([q.weight(), k.weight()], q.eps()));
        Products { q, k, v, biases: [q_proj, k_proj, v_proj].map(Linear::bias), norms, angles: rope.angles() }
    }
}
