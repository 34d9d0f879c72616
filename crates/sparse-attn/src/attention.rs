//! Attention of one layer in one step: admit, write, score, select, attend.

use crate::backend::{AttentionBackend, Routed, RoutedJob, cuda};
use crate::block_router::{self, BlockRouter, Queries};
use crate::cache::{KvCache, KvDtypes, LayerSpec, LayerStore, Local, Pool, ReadCount, Step, Waiting};
use crate::place::{Destination, Place};
use crate::select::{Budget, Limits, Selection, TILE, select};
use crate::token_router::{self, GateLayer, RouterInput, TokenRouter};
use crate::{HeadShape, parallel};
use candle_core::{DType, Result, Tensor, bail};
use std::sync::Arc;

/// The tensors of one layer in one step.
#[derive(Debug, Clone, Copy)]
pub struct AttentionInput<'a> {
    /// The attention input (after the layer's norm), `[tokens, hidden_size]`: what token routers see.
    pub hidden: &'a Tensor,
    /// Its product with [`TokenRouter::projection`], `[tokens, rows]`, f32, where that was made: rows may lie apart.
    pub projected: Option<&'a Tensor>,
    /// Queries after rope, `[tokens, q_heads, head_dim]`, f32 or as [`RoutedAttention::dtype_of_queries`] says.
    pub q: &'a Tensor,
    /// Keys after rope, `[tokens, kv_heads, head_dim]`.
    pub k: &'a Tensor,
    /// The same before rope: what some token routers see, too.
    pub k_before_rope: &'a Tensor,
    /// Values, `[tokens, kv_heads, head_dim]`.
    pub v: &'a Tensor,
    /// Factor of `q . k`, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// What a model's products gave for the tokens of a step, f32: a backend may make queries, keys and values of it while it stores them.
#[derive(Debug, Clone, Copy)]
pub struct Products<'a> {
    /// Of queries, `[tokens, q_heads, head_dim]`. What there is of a token is contiguous, here and below.
    pub q: &'a Tensor,
    /// Of keys, `[tokens, kv_heads, head_dim]`.
    pub k: &'a Tensor,
    /// Of values, `[tokens, kv_heads, head_dim]`.
    pub v: &'a Tensor,
    /// What is added to each token's, `[heads * head_dim]`.
    pub biases: [Option<&'a Tensor>; 3],
    /// Weights of the norms of queries and of keys, `[head_dim]`, and what those add to mean squares.
    pub norms: Option<([&'a Tensor; 2], f32)>,
    /// cos and sin, `[tokens, head_dim / 2]`, of the angles that pairs `(x[i], x[i + head_dim / 2])` of queries and keys are rotated by.
    pub angles: [&'a Tensor; 2],
}

/// The tensors of one layer in one step, where the backend makes queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub struct ProductsInput<'a> {
    /// As in [`AttentionInput`], here and below.
    pub hidden: &'a Tensor,
    /// Products of a token router.
    pub projected: Option<&'a Tensor>,
    /// What queries, keys and values are made of.
    pub products: Products<'a>,
    /// Factor of `q . k`.
    pub scale: f32,
    /// Whether the token router decides when all layers are done, by [`RoutedAttention::decide`]: only where [`RoutedAttention::decides_later`].
    pub decides_later: bool,
}

/// What is routed, and how far.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Which tokens keep full attention.
    pub token_router: Arc<dyn TokenRouter>,
    /// Which blocks a query reads.
    pub block_router: Arc<dyn BlockRouter>,
    /// Window, block, budget, and the length below which all is dense.
    pub limits: Limits,
    /// The newest tokens that stay in memory whatever the token router says of them: at least the window of `limits`, and that if `None`.
    /// A query that selects blocks sees the dropped ones in its own window only; where it reads everything, all that are there.
    pub token_window: Option<usize>,
    /// Queries before this position see every token, whatever the token router says of it: short contexts are dense. Tiles of queries
    /// ([`Limits::tile`]) are not cut: those that are before it as a whole.
    pub token_dense_len: usize,
    /// And all queries of a prompt (see [`KvCache::begin_prompt`]) that begins before that, or with the first token, and has none at this position or
    /// beyond. Tokens that follow it miss what is dropped.
    pub token_dense_prompt: usize,
    /// The first layers stay dense: their attention is diffuse (Quest, arXiv:2406.10774).
    pub dense_layers: usize,
    /// What the budget is multiplied by in each layer; 1 where the list is over. Layers that attend diffusely want more.
    pub layer_budgets: Vec<f32>,
}

impl Routing {
    /// The newest tokens that stay in memory, of any verdict.
    pub fn token_window(&self) -> usize {
        self.token_window.unwrap_or(self.limits.window)
    }

    /// The first position of which the query does not see every token by its position alone: of a whole number of tiles.
    pub fn token_dense_len(&self) -> usize {
        self.token_dense_len / self.limits.tile * self.limits.tile
    }

    /// The limits in a layer. What fits a budget that is filled is read whole, as what is short is: it needs no scores.
    pub fn limits_of(&self, layer: usize) -> Limits {
        let factor = self.layer_budgets.get(layer).copied().unwrap_or(1.0);
        let budget = self.limits.budget.times(factor);
        let fits = if self.block_router.fills_budget() { budget.limit(0) } else { 0 };
        Limits { budget, dense_len: self.limits.dense_len.max(fits), ..self.limits }
    }

    /// Every token kept, every block read.
    pub fn dense() -> Self {
        Self {
            token_router: Arc::new(token_router::All),
            block_router: Arc::new(block_router::All),
            limits: Limits { window: 256, sinks: 4, block_size: 32, budget: Budget::ALL, dense_len: usize::MAX, tile: TILE },
            token_window: None,
            token_dense_len: 0,
            token_dense_prompt: 0,
            dense_layers: 0,
            layer_budgets: Vec::new(),
        }
    }
}

/// A layer's queries, once the step's keys and values are written.
#[derive(Debug, Clone, Copy)]
struct Written<'a> {
    hidden: &'a Tensor,
    q: &'a Tensor,
    scale: f32,
}

/// What a layer read in a step.
#[derive(Debug, Clone, Copy)]
pub struct Attended<'a> {
    /// The decoder layer.
    pub layer: usize,
    /// The step.
    pub step: Step,
    /// The attention input, `[tokens, hidden_size]`.
    pub hidden: &'a Tensor,
    /// Queries after rope, `[tokens, q_heads, head_dim]`.
    pub q: &'a Tensor,
    /// Factor of `q . k`.
    pub scale: f32,
    /// The layer's keys and values, those of the step included.
    pub store: &'a LayerStore,
    /// What its queries read of them.
    pub selection: &'a Selection,
}

/// Sees what every layer reads: for pictures, logs and measurements.
pub trait Observer: std::fmt::Debug + Send + Sync {
    /// Called after each layer of each step.
    ///
    /// # Errors
    /// If what it does with it fails; the step fails then too.
    fn attended(&self, seen: Attended<'_>) -> Result<()>;
}

/// The two routers and the backend that computes. Holds no state of a sequence: the cache is passed.
#[derive(Debug, Clone)]
pub struct RoutedAttention {
    routing: Routing,
    backend: Arc<dyn AttentionBackend>,
    observer: Option<Arc<dyn Observer>>,
}

impl RoutedAttention {
    /// Attention by `routing` on `backend`.
    ///
    /// # Errors
    /// If the window, the block or the tile is 0.
    pub fn new(routing: Routing, backend: Arc<dyn AttentionBackend>) -> Result<Self> {
        let Limits { window, block_size, tile, .. } = routing.limits;
        if window == 0 || block_size == 0 || tile == 0 {
            bail!("routing: window {window}, block {block_size} and tile {tile} must be above 0");
        }
        if let Some(tokens) = routing.token_window.filter(|tokens| *tokens < window) {
            bail!("routing: the token router's window of {tokens} must hold that of queries, {window}");
        }
        Ok(Self { routing, backend, observer: None })
    }

    /// Dense attention: every token kept, every block read.
    pub fn dense(backend: Arc<dyn AttentionBackend>) -> Self {
        Self { routing: Routing::dense(), backend, observer: None }
    }

    /// Dense attention on the same backend.
    pub fn to_dense(&self) -> Self {
        Self::dense(self.backend.clone())
    }

    /// The same attention with someone watching.
    pub fn observed(&self, observer: Arc<dyn Observer>) -> Self {
        Self { observer: Some(observer), ..self.clone() }
    }

    /// Attention by `routing` on the same backend.
    ///
    /// # Errors
    /// As [`RoutedAttention::new`].
    pub fn with_routing(&self, routing: Routing) -> Result<Self> {
        Self::new(routing, self.backend.clone())
    }

    /// What is routed.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// What a cache must store for this attention, where the model's layers are `specs`.
    pub fn layer_specs(&self, specs: &[LayerSpec]) -> Vec<LayerSpec> {
        let kept_fraction = self.routing.token_router.kept_fraction();
        let (dense_len, dense_prompt) = (self.routing.token_dense_len(), self.routing.token_dense_prompt);
        let local = Local { window: self.routing.token_window(), dense_len, dense_prompt, kept_fraction };
        let local = (kept_fraction < 1.0).then_some(local);
        specs.iter().map(|spec| LayerSpec { local, ..*spec }).collect()
    }

    /// Bytes that a cache takes for `capacity` tokens, block summaries included, where the model's layers are `specs`.
    pub fn planned_bytes(&self, specs: &[LayerSpec], dtypes: KvDtypes, capacity: usize) -> usize {
        let specs = self.layer_specs(specs);
        let Routing { block_router, limits, dense_layers, .. } = &self.routing;
        let summaries = specs
            .iter()
            .skip(*dense_layers)
            .filter(|spec| spec.sliding_window.is_none())
            .map(|spec| block_router.summary().planned_bytes(dtypes.k, spec.shape, capacity, limits.block_size));
        KvCache::planned_bytes(&specs, dtypes, capacity) + summaries.sum::<usize>()
    }

    /// Bytes of keys and values of a layer that are read in the time that selecting takes: where no more would be spared, routing is
    /// slower than dense.
    pub fn selection_bytes(&self) -> usize {
        self.backend.selection_bytes()
    }

    /// See [`Routing::token_dense_len`]: from where on hiding tokens saves the backend time.
    pub fn preferred_token_dense_len(&self) -> usize {
        self.backend.preferred_token_dense_len()
    }

    /// See [`Routing::token_dense_prompt`]: of how many tokens a prompt is no faster with some of them hidden, where layers have heads of this shape.
    pub fn preferred_token_dense_prompt(&self, shape: HeadShape) -> usize {
        self.backend.preferred_token_dense_prompt(shape)
    }

    /// Queries that best share a selection in steps of several, where `group_size` query heads share keys.
    pub fn preferred_tile(&self, group_size: usize) -> usize {
        self.backend.preferred_tile(group_size)
    }

    /// Whether the backend can attend with heads of this shape to keys and values stored like this.
    ///
    /// # Errors
    /// What it cannot, and what it can instead.
    pub fn supports(&self, shape: HeadShape, dtypes: KvDtypes) -> Result<()> {
        self.backend.supports(shape, dtypes)
    }

    /// How queries may come to a layer with this store: f32 where someone watches, else what the backend would round them to.
    pub fn dtype_of_queries(&self, store: &LayerStore) -> DType {
        if self.is_observed() { DType::F32 } else { self.backend.dtype_of_queries(store) }
    }

    /// The backend's name.
    pub fn backend_name(&self) -> &'static str {
        self.backend.name()
    }

    /// Writes the step's keys and values to the cache and attends.
    ///
    /// `out[t, h] = softmax(scale * q[t, h] . K') V` over the keys that are selected for `t` at positions
    /// `<= t`, and inside the layer's sliding window where it has one. Sums are f32.
    ///
    /// Returns `[tokens, q_heads, head_dim]`, f32.
    ///
    /// # Errors
    /// If a shape does not fit the layer. The cache's committed tokens never change here.
    pub fn forward(&self, layer: usize, input: AttentionInput<'_>, step: Step, cache: &mut KvCache) -> Result<Tensor> {
        self.forward_to(layer, input, step, cache, Destination { dtype: DType::F32, place: &mut Place::default() })
    }

    /// [`RoutedAttention::forward`] for a product that rounds what it gets: it may come so.
    ///
    /// # Errors
    /// As there.
    pub fn forward_to(
        &self,
        layer: usize,
        input: AttentionInput<'_>,
        step: Step,
        cache: &mut KvCache,
        to: Destination<'_>,
    ) -> Result<Tensor> {
        let AttentionInput { hidden, projected, q, k, k_before_rope, v, scale } = input;
        cache.bring_tables()?;
        let store = cache.layer_mut(layer);
        self.admit(layer, RouterInput { hidden, projected, k, k_before_rope, step }, store)?;
        // A device may decide while it writes.
        self.backend.write(k, v, step, store)?;
        self.attend_written(layer, Written { hidden, q, scale }, step, cache, to)
    }

    /// [`RoutedAttention::forward_to`] where the backend makes queries, keys and values by itself and nobody else asks for them, queries in a place of
    /// their own; `None`: they are to be made first.
    ///
    /// # Errors
    /// As there.
    pub fn forward_products(
        &self,
        layer: usize,
        input: ProductsInput<'_>,
        step: Step,
        cache: &mut KvCache,
        queries: &mut Place,
        to: Destination<'_>,
    ) -> Result<Option<Tensor>> {
        if !self.backend.takes_products() || self.is_observed() || self.routing.token_router.reads_keys(layer) {
            return Ok(None);
        }
        let ProductsInput { hidden, projected, products, scale, decides_later } = input;
        cache.bring_tables()?;
        let store = cache.layer_mut(layer);
        if decides_later {
            store.wait_for_verdict(step)?;
        } else {
            self.admit(layer, RouterInput { hidden, projected, k: products.k, k_before_rope: products.k, step }, store)?;
        }
        let q = self.backend.write_products(&products, step, store, queries)?;
        self.attend_written(layer, Written { hidden, q: &q, scale }, step, cache, to).map(Some)
    }

    /// Whether the verdicts on `step` may be made when all its layers are done: each query of it has all of its tokens in the window, they follow from
    /// attention inputs alone, and a device makes them.
    pub fn decides_later(&self, layer: usize, step: Step, store: &LayerStore) -> bool {
        let is_stacked = self.routing.token_router.as_gate().is_some_and(|gate| gate.stacked(layer).is_some());
        let sees_all = store.local().is_some_and(|local| step.len <= local.window_at(step.end() - 1));
        is_stacked
            && sees_all
            && !self.selects(layer, step, store)
            && !self.is_observed()
            && self.backend.takes_products()
            && store.may_wait_for_verdict()
    }

    /// Whether all that [`RoutedAttention::forward_products`] does with several tokens in this layer is to launch kernels that read and write what is there:
    /// with the places that it is given once they have room, and the page tables where they are to be. It can be recorded then.
    pub fn only_launches(&self, layer: usize, step: Step, store: &LayerStore) -> bool {
        let hides = store.local().is_some();
        let is_decided_there = match self.routing.token_router.as_gate() {
            Some(gate) if gate.stacked(layer).is_some() => !hides || store.may_wait_for_verdict(),
            Some(gate) => !hides && matches!(gate.layers().get(layer), Some(GateLayer::Open)),
            None => !hides,
        };
        let selects = self.selects(layer, step, store);
        step.len > 1 && is_decided_there && !selects && !self.is_observed() && self.backend.only_launches(store)
    }

    /// Makes the verdicts that tokens wait for, and has the host told. `multiply`: products of weights `[layers, rows, hidden_size]`, bf16
    /// ([`token_router::GateStack::projection`]), and inputs `[layers, tokens, hidden_size]`, bf16: `[layers, tokens, rows]`, f32.
    ///
    /// # Errors
    /// If a shape does not fit, or the device fails.
    pub fn decide(&self, cache: &mut KvCache, multiply: impl Fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<()> {
        let Some(Waiting { step, inputs, first }) = cache.waiting_by().cloned() else { return Ok(()) };
        let Some(gate) = self.routing.token_router.as_gate() else {
            bail!("attention: {} tokens from {} on wait for verdicts of another token router", step.len, step.start)
        };
        let sinks = self.routing.limits.sinks;
        for (stack, inputs) in gate.stacks().iter().zip(&inputs) {
            let waiting = stack.layers.iter().map(|layer| cache.layer(*layer)).enumerate().filter(|(_, store)| store.waiting().is_some());
            let masks: Vec<_> = waiting.filter_map(|(index, store)| Some((index, store.device_kept()?.verdicts))).collect();
            match inputs {
                _ if masks.is_empty() => {}
                Some(inputs) => cuda::decide(stack, (&multiply(&stack.projection, inputs)?, first), step, (sinks, gate.tau()), &masks)?,
                None => bail!("attention: {} tokens wait for verdicts, and their inputs were not kept", step.len),
            }
        }
        for layer in (0..cache.layers()).filter(|layer| gate.stacked(*layer).is_none()) {
            cache.layer_mut(layer).keep_waiting(sinks)?;
        }
        cache.is_given_verdicts();
        cache.tell()
    }

    /// Has the token router decide on the tokens of a step.
    fn admit(&self, layer: usize, input: RouterInput<'_>, store: &mut LayerStore) -> Result<()> {
        // First, so that a device is at work while the host waits for the verdict.
        store.apply_moves()?;
        let admission = self.routing.token_router.admit(layer, input)?;
        store.admit(input.step, admission, self.routing.limits_of(layer).sinks)
    }

    /// Attends to what is written, the step's own keys and values included.
    fn attend_written(&self, layer: usize, input: Written<'_>, step: Step, cache: &mut KvCache, to: Destination<'_>) -> Result<Tensor> {
        let block_router = &self.routing.block_router;
        let limits = self.routing.limits_of(layer);
        let store = cache.layer_mut(layer);
        store.ask(step)?;
        // Layers with a sliding window read no more than that anyway.
        let (routed, selects) = (self.is_routed(layer, store), self.selects(layer, step, store));
        if self.observer.is_some() || selects {
            // How many tokens fit a budget is counted by the host.
            store.decide()?;
        }
        let selection = if routed {
            if !selects && !self.is_observed() && self.backend.takes_products() {
                store.finish_write_later(step, block_router.summary(), limits.block_size);
            } else {
                store.finish_write(step, block_router.summary(), limits.block_size)?;
            }
            if !selects {
                Selection::Every
            } else {
                let wants_selection = self.observer.is_some();
                let (q, router) = (input.q, &**block_router);
                let job = RoutedJob { q, scale: input.scale, store, step, limits, router, wants_selection, dtype: to.dtype };
                if let Some(Routed { out, selection, count }) = self.backend.attend_routed(&job)? {
                    if let Some(selection) = selection {
                        self.show(layer, &input, step, store, &selection)?;
                    }
                    cache.count_read(count);
                    return Ok(out);
                }
                let q = input.q.to_dtype(DType::F32)?;
                let scores = block_router.score(&Queries { q: &q, step, block_size: limits.block_size, tile: limits.tile }, store)?;
                select(&scores, &limits, step, store)
            }
        } else {
            Selection::Every
        };
        let out = self.backend.attend_to(input.q, input.scale, store, step, &selection, to)?;
        self.show(layer, &input, step, store, &selection)?;
        if store.is_decided() {
            self.count(layer, step, &selection, cache);
        } else {
            cache.count_visible_later(layer, step);
        }
        Ok(out)
    }

    /// Whether the blocks of a layer are summarised.
    pub fn is_routed(&self, layer: usize, store: &LayerStore) -> bool {
        layer >= self.routing.dense_layers && store.sliding_window().is_none()
    }

    /// Whether queries of `step` read only some blocks in a layer.
    pub fn selects(&self, layer: usize, step: Step, store: &LayerStore) -> bool {
        self.is_routed(layer, store) && step.end() > self.routing.limits_of(layer).dense_len
    }

    fn show(&self, layer: usize, input: &Written<'_>, step: Step, store: &LayerStore, selection: &Selection) -> Result<()> {
        let Some(observer) = &self.observer else { return Ok(()) };
        let Written { hidden, q, scale } = *input;
        observer.attended(Attended { layer, step, hidden, q, scale, store, selection })
    }

    /// Whether someone watches.
    pub fn is_observed(&self) -> bool {
        self.observer.is_some()
    }

    /// Adds what the layer read to the cache's count.
    fn count(&self, layer: usize, step: Step, selection: &Selection, cache: &mut KvCache) {
        let store = cache.layer(layer);
        if matches!(selection, Selection::Every) {
            cache.count_read(store.count_visible(step));
            return;
        }
        let kv_heads = store.shape().kv_heads();
        let mut pieces = Vec::new();
        selection.each_piece(step, usize::MAX, store, |queries| pieces.push(queries));
        let counts = parallel::map(pieces.len() * kv_heads, |index| {
            let (queries, head) = (pieces[index / kv_heads].clone(), index % kv_heads);
            let mut ranges = Vec::new();
            selection.set_ranges(queries.start, head, queries.end, store, &mut ranges);
            let Some((tail, blocks)) = ranges.split_last() else { return (0, 0) };
            let blocks: usize = blocks.iter().map(|range| store.count_admitted(head, range.clone())).sum();
            let local_window = selection.local_window(queries.start, store);
            let count = |t: usize| {
                let from = tail.start.max(store.first_visible(t));
                let in_tail = match local_window {
                    None => t + 1 - from,
                    Some(window) => {
                        let window = (t + 1).saturating_sub(window).max(from);
                        store.count_admitted(head, from..window) + t + 1 - window
                    }
                };
                ((blocks + in_tail) as u64, (t + 1 - store.first_visible(t)) as u64)
            };
            queries.map(count).fold((0, 0), |(read, visible), (more, of)| (read + more, visible + of))
        });
        let (read, visible) = counts.into_iter().fold((0, 0), |(read, visible), (more, of)| (read + more, visible + of));
        let row = |pool: &Pool| pool.dtype().row_bytes(pool.width()) as u64;
        let scored = match (selection, store.summaries()) {
            (Selection::Blocks(_), Some(summaries)) => (step.len * kv_heads * summaries.blocks()) as u64 * row(summaries.pool()),
            _ => 0,
        };
        let bytes = read * (row(store.k()) + row(store.v())) + scored;
        cache.count_read(ReadCount { read, visible, bytes });
    }
}
