//! A decode step of one token, recorded once as a CUDA graph and replayed: some ten kernels a layer, in buffers that stay where they
//! are. What changes from token to token (its id, its position, how many blocks it may read) is in device memory.

use super::super::{DecoderParts, LayerParts};
use super::graph::Graph;
use super::matrix::{Product, activation_bytes, product};
use super::norm::WIDEST;
use super::pack::Format;
use super::params::{Ahead, BestParams, FetchParams, GatedParams, LikeliestParams, NormParams, WriteParams};
use super::{DeviceMatrix, gated};
use crate::arch::TokenStep;
use crate::layers::{self, Linear, RmsNorm};
use crate::weights::Matrix;
use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Result, Tensor, TensorId, bail};
use sparse_attn::backend::cuda::{
    Budgeted, DecodeCall, DecodeLists, DecodeScratch, Kernels, Pinned, SelectCall, SelectScratch, Spread, address, decode, kind_of,
    queries_of, scales_of, score_and_select,
};
use sparse_attn::cache::Summary;
use sparse_attn::token_router::GateLayer;
use sparse_attn::{HeadShape, KvCache, LayerStore, RoutedAttention, Step};
use std::sync::Arc;

/// Rows that a thread block of `gated_product` makes, and its threads.
const GATED_ROWS: usize = 32;
const GATED_THREADS: usize = 512;

/// Most warps of a thread block of `write_kv`.
const WRITE_WARPS: usize = 16;

/// Positions that selection makes room for at a time: with more, everything is recorded anew.
const ROOM: usize = 16 * 1024;

/// Most tokens whose verdicts and block summaries are made at once. Nobody asks for those of the newest tokens.
const MOST_WAITING: usize = 64;

/// Room for the likeliest tokens; some more than asked for are found.
const MOST_BEST: usize = 512;

/// A layer's weights. Tensors are handles: the memory is the model's.
#[derive(Debug, Clone)]
struct Layer {
    attention_norm: Tensor,
    qkv: [Projection; 3],
    qk_norm: Option<(Tensor, Tensor)>,
    frequencies: Tensor,
    magnitude: f32,
    output: Projection,
    post_attention_norm: Option<Tensor>,
    mlp_norm: Tensor,
    gate: Arc<DeviceMatrix>,
    up: Arc<DeviceMatrix>,
    down: Projection,
    post_mlp_norm: Option<Tensor>,
    /// Where attention's input goes, by which a token router decides, `[rows, hidden_size]` bf16: that of the token at `position` to row
    /// `position % rows`.
    input: Option<Tensor>,
}

/// The newest tokens, of which verdicts and block summaries are still to be made.
#[derive(Debug)]
struct Newest {
    /// How many there may be, a power of two.
    most: usize,
    /// Of each of the gate's stacks the attention inputs of its layers, `[layers, most, hidden_size]` bf16. None: no token router decides.
    inputs: Vec<Option<Arc<Tensor>>>,
    routes_tokens: bool,
    /// What the cache said of its changes after the step before.
    seen: Option<u64>,
}

#[derive(Debug, Clone)]
struct Projection {
    weight: Arc<DeviceMatrix>,
    bias: Option<Tensor>,
}

/// The step, and where it works.
#[derive(Debug)]
struct CudaStep {
    kernels: Arc<Kernels>,
    device: Device,
    heads: HeadShape,
    scale: f32,
    eps: f32,
    activation: i32,
    embedding: Arc<DeviceMatrix>,
    embedding_factor: f32,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Arc<DeviceMatrix>,
    attention: Arc<RoutedAttention>,
    newest: Newest,
    buffers: Buffers,
    recorded: Option<Recorded>,
    /// The kernels that were run before: of a step without selections, and of those for that many scores.
    loaded: Vec<Option<usize>>,
    /// Whether the newest step may still run.
    is_running: bool,
}

/// What the kernels of a step hand on.
#[derive(Debug)]
struct Buffers {
    orders: Pinned<u32>, // what `state` is to be
    state: Tensor,       // u32: token, position, then what each layer and head may take
    x: Tensor,           // [hidden_size]
    normed: [Tensor; 2],
    qkv: Tensor,       // [q_heads + 2 kv_heads, head_dim]
    q: Option<Tensor>, // [q_heads, head_dim], see `queries_of`
    attended: [Tensor; 2],
    projected: Tensor, // [hidden_size]
    inner: [Tensor; 2],
    logits: Tensor,      // [vocab_size]
    report: Pinned<u32>, // see `Report`
    told: Tensor,        // u32: the rest of it, until the last kernel
    best: Tensor,        // [1 + 2 MOST_BEST] u32: how many, ids, bits of scores
}

/// What a step tells the host, all numbers in one list: the likeliest token, whether a logit is broken, then for each layer and head how many
/// kept tokens the chosen blocks have.
#[derive(Debug)]
struct Report<'a>(&'a [u32]);

impl<'a> Report<'a> {
    fn likeliest(&self) -> Result<u32> {
        if self.0[1] != 0 {
            bail!("a logit is NaN or infinite: the weights are damaged, or a kernel is wrong");
        }
        Ok(self.0[0])
    }

    /// The tokens of a layer's chosen blocks.
    fn of_layer(&self, layer: usize, kv_heads: usize) -> &'a [u32] {
        &self.0[2..][layer * kv_heads..][..kv_heads]
    }
}

/// A graph, and what it holds for.
struct Recorded {
    graph: Graph,
    key: Key,
    // Memory of the graph's own.
    _scratch: DecodeScratch,
    _select: Option<SelectScratch>,
}

impl std::fmt::Debug for Recorded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorded").field("key", &self.key).finish_non_exhaustive()
    }
}

/// What a graph was recorded with: where keys, values, pages and summaries are, which layers select, and for how many positions.
#[derive(Debug)]
struct Key {
    tensors: Vec<TensorId>,
    selects: Vec<bool>,
    room: usize,
}

/// The tensors of a cache that a graph has the addresses of, where these layers select.
fn tensors_of<'a>(cache: &'a KvCache, selects: &'a [bool]) -> impl Iterator<Item = TensorId> + 'a {
    selects.iter().enumerate().flat_map(|(layer, selects)| {
        let store = cache.layer(layer);
        // What a token router keeps is looked up in tables that are made with the pages', all of them anew.
        let rows = store.k().tensors().chain(store.v().tensors()).chain(store.device_pages().ok());
        let summaries = store.summaries().filter(|_| *selects).map(|summaries| summaries.pool().values());
        rows.chain(summaries).map(Tensor::id)
    })
}

/// A step of the decoder made of `parts`; `None` where some part has no kernel, and layers run one operation at a time.
pub(crate) fn record(parts: &DecoderParts<'_>, attention: &RoutedAttention, cache: &KvCache) -> Result<Option<Box<dyn TokenStep>>> {
    let device = cache.device();
    if !device.is_cuda() || attention.is_observed() {
        return Ok(None);
    }
    let Some(layers) = parts.layers.iter().map(|layer| of_layer(layer, device)).collect::<Option<Result<Vec<Layer>>>>() else {
        return Ok(None);
    };
    let (Some(embedding), Some(head), Some(first)) = (on_device(parts.embedding), on_device(parts.head), parts.layers.first()) else {
        return Ok(None);
    };
    let mut layers = layers?;
    let (hidden_size, inner) = (embedding.columns(), layers[0].gate.height());
    if hidden_size > WIDEST || !inner.is_multiple_of(GATED_ROWS) {
        return Ok(None);
    }
    let Some(newest) = Newest::of(attention, &mut layers, hidden_size, device)? else { return Ok(None) };
    let heads = parts.heads;
    let (q_heads, kv_heads, head_dim) = (heads.q_heads(), heads.kv_heads(), heads.head_dim());
    let plain = |count: usize| Tensor::zeros(count, DType::F32, device);
    let both = |count: usize| Ok::<_, candle_core::Error>([plain(count)?, Tensor::zeros(activation_bytes(count), DType::U8, device)?]);
    let buffers = Buffers {
        orders: Pinned::zeros(device, 2 + layers.len() * kv_heads)?,
        state: Tensor::zeros(2 + layers.len() * kv_heads, DType::U32, device)?,
        x: plain(hidden_size)?,
        normed: both(hidden_size)?,
        qkv: plain((q_heads + 2 * kv_heads) * head_dim)?,
        q: None,
        attended: both(q_heads * head_dim)?,
        projected: plain(hidden_size)?,
        inner: both(inner)?,
        logits: plain(head.height())?,
        report: Pinned::zeros(device, 2 + layers.len() * kv_heads)?,
        told: Tensor::zeros(layers.len() * kv_heads, DType::U32, device)?,
        best: Tensor::zeros(1 + 2 * MOST_BEST, DType::U32, device)?,
    };
    Ok(Some(Box::new(CudaStep {
        kernels: Kernels::of(device)?,
        device: device.clone(),
        heads,
        scale: parts.scale,
        eps: parts.norm.eps(),
        activation: gated::code(first.activation),
        embedding,
        embedding_factor: parts.embedding_factor,
        layers,
        norm: parts.norm.weight().clone(),
        head,
        attention: Arc::new(attention.clone()),
        newest,
        buffers,
        recorded: None,
        loaded: Vec::new(),
        is_running: false,
    })))
}

impl Newest {
    /// Gives layers where their attention inputs go. `None`: the token router decides by something that there is no kernel for.
    fn of(attention: &RoutedAttention, layers: &mut [Layer], hidden_size: usize, device: &Device) -> Result<Option<Self>> {
        let routing = attention.routing();
        let routes_tokens = routing.token_router.kept_fraction() < 1.0;
        let (limits, mut inputs) = (routing.limits, Vec::new());
        // A block that was selected from has its summary, of tokens that were decided on.
        let mut most = (limits.window + 1).saturating_sub(if routes_tokens { limits.block_size } else { 0 });
        if routing.block_router.summary() == Summary::None {
            most = MOST_WAITING;
        }
        let most = most.min(routing.token_window()).clamp(1, MOST_WAITING);
        let most = 1 << most.ilog2();
        if routes_tokens {
            let Some(gate) = routing.token_router.as_gate().filter(|gate| gate.layers().len() == layers.len()) else { return Ok(None) };
            let is_known = |(index, layer): (usize, &GateLayer)| matches!(layer, GateLayer::Open) || gate.stacked(index).is_some();
            if !gate.layers().iter().enumerate().all(is_known) {
                return Ok(None);
            }
            for stack in gate.stacks() {
                let of_stack = Tensor::zeros((stack.layers.len(), most, hidden_size), DType::BF16, device)?;
                for (index, layer) in stack.layers.iter().enumerate() {
                    layers[*layer].input = Some(of_stack.get(index)?);
                }
                inputs.push(Some(Arc::new(of_stack)));
            }
        }
        Ok(Some(Self { most, inputs, routes_tokens, seen: None }))
    }
}

fn on_device(matrix: &Matrix) -> Option<Arc<DeviceMatrix>> {
    match matrix {
        Matrix::Device(matrix) => Some(matrix.clone()),
        _ => None,
    }
}

fn of_layer(parts: &LayerParts<'_>, device: &Device) -> Option<Result<Layer>> {
    let projection = |linear: &Linear| Some(Projection { weight: on_device(linear.weight())?, bias: linear.bias().cloned() });
    // Gate and up are joined with the activation, where no bias fits in.
    let bare = |linear: &Linear| if linear.bias().is_none() { on_device(linear.weight()) } else { None };
    let weight = |norm: &RmsNorm| norm.weight().clone();
    let [q, k, v] = parts.qkv;
    let frequencies = match parts.rope.frequencies_on(device) {
        Ok(frequencies) => frequencies,
        Err(error) => return Some(Err(error)),
    };
    Some(Ok(Layer {
        attention_norm: weight(parts.attention_norm),
        qkv: [projection(q)?, projection(k)?, projection(v)?],
        qk_norm: parts.qk_norm.map(|(q, k)| (weight(q), weight(k))),
        frequencies,
        magnitude: parts.rope.magnitude() as f32,
        output: projection(parts.output)?,
        post_attention_norm: parts.post_attention_norm.map(weight),
        mlp_norm: weight(parts.mlp_norm),
        gate: bare(parts.gate)?,
        up: bare(parts.up)?,
        down: projection(parts.down)?,
        post_mlp_norm: parts.post_mlp_norm.map(weight),
        input: None,
    }))
}

impl TokenStep for CudaStep {
    fn run(&mut self, token: u32, cache: &mut KvCache) -> Result<bool> {
        let attention = self.attention.clone();
        let routing = attention.routing();
        let next = Step { start: cache.len(), len: 1 };
        let selects = |layer| attention.selects(layer, next, cache.layer(layer));
        let selects: Vec<bool> = (0..self.layers.len()).map(selects).collect();
        // Somebody else was here, and may have left something to be done: after this step, unless it is asked for in it.
        let is_behind = self.newest.seen.take() != Some(cache.changes());
        if is_behind && (cache.waiting().is_none() || cache.needs_verdicts(next) || selects.contains(&true)) {
            layers::settle(&attention, cache)?;
            cache.summarise()?;
        }
        let step = cache.reserve_token()?;
        // What each layer selects from; `None`: it reads everything.
        let mut calls = Vec::with_capacity(self.layers.len());
        for (layer, selects) in selects.iter().enumerate() {
            if !selects {
                calls.push(None);
                continue;
            }
            let call = Budgeted::new(&*routing.block_router, routing.limits_of(layer), cache.layer(layer), step);
            let Some(call) = call else { return Ok(false) };
            calls.push(Some(call));
        }
        for layer in 0..self.layers.len() {
            let routed = attention.is_routed(layer, cache.layer(layer));
            let kind = if routed { routing.block_router.summary() } else { Summary::None };
            if !cache.layer_mut(layer).begin_device_write(step, kind, routing.limits.block_size) {
                return Ok(false);
            }
        }
        let mut state = vec![token, step.start as u32];
        for (layer, call) in calls.iter().enumerate() {
            match call {
                Some(_) => state.extend(Budgeted::takes(&routing.limits_of(layer), &(step.start..step.end()), false, cache.layer(layer))),
                None => state.resize(state.len() + self.heads.kv_heads(), 0),
            }
        }
        self.report()?; // once the step before is done, it has read its orders
        self.buffers.orders.numbers_mut().copy_from_slice(&state);
        let room = (step.end() + 1).next_multiple_of(ROOM);
        let fits = |key: &Key| key.room == room && key.selects == selects && key.tensors.iter().copied().eq(tensors_of(cache, &selects));
        if self.recorded.as_ref().is_none_or(|recorded| !fits(&recorded.key)) {
            let key = Key { tensors: tensors_of(cache, &selects).collect(), selects, room };
            // Of the same kernels, or it could not be brought up to date.
            let last = self.recorded.take().filter(|last| last.key.selects == key.selects && last.key.room == key.room);
            let last = last.map(|last| last.graph);
            self.recorded = Some(self.record(key, cache, last)?);
        }
        let Some(recorded) = &self.recorded else { bail!("cuda: no step was recorded") };
        recorded.graph.launch()?;
        self.is_running = true;
        // While it runs. What there is no memory for is asked for again by the next step, which then fails.
        let _ = cache.reserve_next(step);
        for (layer, call) in calls.iter().enumerate() {
            let Some(call) = call else {
                cache.count_visible_later(layer, step);
                continue;
            };
            let routes_tokens = self.newest.routes_tokens;
            let picked = if routes_tokens { self.report()?.of_layer(layer, cache.layer(layer).shape().kv_heads()) } else { &[] };
            let count = call.count(cache.layer(layer), picked);
            cache.count_read(count);
        }
        if is_behind {
            layers::settle(&attention, cache)?;
        }
        if self.newest.routes_tokens {
            for layer in 0..self.layers.len() {
                let store = cache.layer_mut(layer);
                if store.may_wait_for_verdict() {
                    store.wait_for_verdict(step)?;
                }
            }
            cache.wait_for_verdicts(step, &self.newest.inputs, step.start % self.newest.most)?;
        }
        let are_most = step.end().is_multiple_of(self.newest.most);
        if are_most {
            layers::decide(&attention, cache)?;
        }
        if is_behind || are_most {
            cache.summarise()?;
        }
        cache.commit_untold(step)?;
        self.newest.seen = Some(cache.changes());
        Ok(true)
    }

    fn likeliest(&mut self) -> Result<u32> {
        self.report()?.likeliest()
    }

    fn best(&mut self, count: usize) -> Result<Option<Vec<(u32, f32)>>> {
        let Buffers { logits, report, best, .. } = &self.buffers;
        let (found, ids) = (address(best)?, address(best)? + size_of::<u32>() as u64);
        let params = BestParams {
            logits: address(logits)?,
            likeliest: report.address(),
            found,
            ids,
            scores: ids + (MOST_BEST * size_of::<u32>()) as u64,
            count: logits.elem_count() as i32,
            wanted: count.min(logits.elem_count()) as i32,
            room: MOST_BEST as i32,
        };
        // SAFETY: the buffers are of these shapes, and live as long as `self`.
        unsafe { self.kernels.launch("best_tokens", Spread::new([1, 1, 1], 1024), &params) }?;
        self.likeliest()?; // fails where the logits are broken
        let best = self.buffers.best.to_vec1::<u32>()?;
        let (ids, scores) = best[1..].split_at(MOST_BEST);
        let found = best[0] as usize;
        Ok((found <= MOST_BEST).then(|| ids.iter().copied().zip(scores.iter().map(|bits| f32::from_bits(*bits))).take(found).collect()))
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        self.kernels.fetch(&self.buffers.logits, || Ok(()))
    }
}

impl CudaStep {
    /// What the newest step tells, once it is done.
    fn report(&mut self) -> Result<Report<'_>> {
        if std::mem::take(&mut self.is_running) {
            self.kernels.stream().synchronize().w()?;
        }
        Ok(Report(self.buffers.report.numbers()))
    }

    /// Records the kernels of a step. `last` is what was recorded before.
    fn record(&mut self, key: Key, cache: &KvCache, last: Option<Graph>) -> Result<Recorded> {
        let first = cache.layer(0);
        let q = match &self.buffers.q {
            Some(q) => q.clone(),
            None => Tensor::zeros(self.heads.q_heads() * self.heads.head_dim(), queries_of(first).tensor_dtype(), &self.device)?,
        };
        self.buffers.q = Some(q.clone());
        let scratch = DecodeScratch::new(&self.kernels, first, &self.device)?;
        let block_size = self.attention.routing().limits.block_size;
        let select = key
            .selects
            .contains(&true)
            .then(|| SelectScratch::new(self.heads.kv_heads(), key.room, block_size, &self.device))
            .transpose()?;
        // Kernels load when they first run, and not while a graph is recorded: run the step once. It is written again, the same.
        let kind = select.as_ref().map(|select| select.max_scores);
        if !self.loaded.contains(&kind) {
            self.launch_all(&key, cache, &q, &scratch, select.as_ref())?;
            self.device.synchronize()?;
        }
        let launch = || self.launch_all(&key, cache, &q, &scratch, select.as_ref());
        let graph = Graph::record(self.kernels.stream(), last, launch)?;
        self.loaded.push(kind);
        Ok(Recorded { graph, key, _scratch: scratch, _select: select })
    }

    fn launch_all(&self, key: &Key, cache: &KvCache, q: &Tensor, scratch: &DecodeScratch, select: Option<&SelectScratch>) -> Result<()> {
        let Buffers { orders, state, x, normed, attended, projected, logits, report, told, .. } = &self.buffers;
        let (token, position) = (address(state)?, address(state)? + 4);
        // Neither this one nor the next overlaps with what is before it: attention reads the position before it waits for anything.
        let fetch = FetchParams { from: orders.address(), to: address(state)?, count: state.elem_count() as i32 };
        // SAFETY: here and below: the buffers were made for this model's shapes, and live as long as `self`, which the graph does
        // not outlive; weights are kept by `self`, keys and values by the cache, whose tensors the graph is keyed by.
        unsafe { self.kernels.launch("fetch_orders", Spread::new([1, 1, 1], 256), &fetch) }?;
        // SAFETY: as above.
        unsafe { self.embedding.put_rows(token, 1, address(x)?, self.embedding_factor) }?;
        let mut pending: Option<Option<&Tensor>> = None; // a product that is not added yet, and the norm over it
        for (index, layer) in self.layers.iter().enumerate() {
            let store = cache.layer(index);
            self.add_norm(pending, &layer.attention_norm, &self.looked_up(layer, store)?)?;
            self.project_qkv(layer)?;
            self.write(layer, store, q, position)?;
            let lists = match select {
                Some(select) if key.selects[index] => Some(self.select(index, store, select, q, position)?),
                _ => None,
            };
            let call = DecodeCall {
                q: address(q)?,
                position,
                lists,
                out: address(&attended[0])?,
                out_q8: address(&attended[1])?,
                scale: self.scale,
            };
            // SAFETY: as above.
            unsafe { decode(&self.kernels, call, scratch, store) }?;
            self.project(&layer.output, attended, projected)?;
            self.add_norm(Some(layer.post_attention_norm.as_ref()), &layer.mlp_norm, &[])?;
            self.feed(layer)?;
            self.project(&layer.down, &self.buffers.inner, projected)?;
            pending = Some(layer.post_mlp_norm.as_ref());
        }
        self.add_norm(pending, &self.norm, &[])?;
        let products = [Product { matrix: &self.head, out: address(logits)?, bias: 0 }];
        self.multiply(&products, normed, self.head.columns())?;
        let tells = select.is_some() && self.newest.routes_tokens;
        let params = LikeliestParams {
            logits: address(logits)?,
            told: address(told)?,
            id: report.address(),
            count: logits.elem_count() as i32,
            told_count: if tells { told.elem_count() as i32 } else { 0 },
        };
        // SAFETY: as above.
        unsafe { self.kernels.launch_following("likeliest", Spread::new([1, 1, 1], 1024), &params) }
    }

    /// What a layer's attention looks up before it knows what to read.
    fn looked_up(&self, layer: &Layer, store: &LayerStore) -> Result<Vec<Ahead>> {
        let mut tables = vec![store.device_pages()?];
        if let Some(kept) = store.device_kept() {
            tables.extend([&kept.counts, &kept.pages, &kept.masks]);
        }
        if let Some((q, k)) = &layer.qk_norm {
            tables.extend([q, k]);
        }
        let ahead =
            |table: &Tensor| Ok(Ahead { from: address(table)?, bytes: (table.elem_count() * table.dtype().size_in_bytes()) as i32 });
        tables.into_iter().map(ahead).collect()
    }

    /// Adds the newest product to the residual stream, and norms that. Meanwhile it brings `ahead` to the L2 cache.
    fn add_norm(&self, pending: Option<Option<&Tensor>>, weight: &Tensor, ahead: &[Ahead]) -> Result<()> {
        let Buffers { x, normed, projected, .. } = &self.buffers;
        let mut params = NormParams {
            x: address(x)?,
            y: if pending.is_some() { address(projected)? } else { 0 },
            y_weight: pending.flatten().map_or(Ok(0), address)?,
            weight: address(weight)?,
            out: address(&normed[0])?,
            out_q8: address(&normed[1])?,
            columns: x.elem_count() as i32,
            eps: self.eps,
            ..NormParams::default()
        };
        params.ahead.iter_mut().zip(ahead).for_each(|(to, ahead)| *to = *ahead);
        // SAFETY: as in `launch_all`.
        unsafe { self.kernels.launch_following("add_norm", Spread::new([1, 1, 1], 1024), &params) }
    }

    fn project_qkv(&self, layer: &Layer) -> Result<()> {
        let mut out = address(&self.buffers.qkv)?;
        let mut products = Vec::with_capacity(3);
        for projection in &layer.qkv {
            let bias = projection.bias.as_ref().map_or(Ok(0), address)?;
            products.push(Product { matrix: &projection.weight, out, bias });
            out += (projection.weight.height() * size_of::<f32>()) as u64;
        }
        self.multiply(&products, &self.buffers.normed, layer.qkv[0].weight.columns())
    }

    fn project(&self, projection: &Projection, x: &[Tensor; 2], out: &Tensor) -> Result<()> {
        let bias = projection.bias.as_ref().map_or(Ok(0), address)?;
        let product = Product { matrix: &projection.weight, out: address(out)?, bias };
        self.multiply(&[product], x, projection.weight.columns())
    }

    fn multiply(&self, products: &[Product<'_>], x: &[Tensor; 2], columns: usize) -> Result<()> {
        // SAFETY: as in `launch_all`.
        unsafe { product(&self.kernels, products, [address(&x[0])?, address(&x[1])?], columns, 1) }
    }

    /// Norms, rotates and stores the token's query, key and value, and the input that they were made of, where a token router decides by it.
    fn write(&self, layer: &Layer, store: &LayerStore, q: &Tensor, position: u64) -> Result<()> {
        let pages = store.device_pages()?;
        let (q_norm, k_norm) =
            layer.qk_norm.as_ref().map_or(Ok((0, 0)), |(q, k)| Ok::<_, candle_core::Error>((address(q)?, address(k)?)))?;
        let params = WriteParams {
            qkv: address(&self.buffers.qkv)?,
            q_norm,
            k_norm,
            frequencies: address(&layer.frequencies)?,
            position,
            pages: address(pages)?,
            q: address(q)?,
            k: address(store.k().values())?,
            v: address(store.v().values())?,
            k_scales: scales_of(store.k())?,
            v_scales: scales_of(store.v())?,
            input: address(&self.buffers.normed[0])?,
            inputs: layer.input.as_ref().map_or(Ok(0), address)?,
            rows: self.newest.most as i32,
            columns: layer.qkv[0].weight.columns() as i32,
            max_pages: pages.dim(1)? as i32,
            group_size: self.heads.group_size() as i32,
            head_dim: self.heads.head_dim() as i32,
            eps: self.eps,
            magnitude: layer.magnitude,
        };
        let name = format!("write_kv_{}", store.k().dtype().name());
        // A warp for each query of a head, its key, and its value.
        let warps = (self.heads.group_size() + 2).min(WRITE_WARPS);
        let blocks = self.heads.kv_heads() + usize::from(layer.input.is_some());
        // SAFETY: as in `launch_all`.
        unsafe { self.kernels.launch_following(&name, Spread::new([blocks, 1, 1], 32 * warps), &params) }
    }

    fn select(&self, index: usize, store: &LayerStore, scratch: &SelectScratch, q: &Tensor, position: u64) -> Result<DecodeLists> {
        let routing = self.attention.routing();
        let lists = DecodeLists {
            octets: address(&scratch.octets)?,
            counts: address(&scratch.counts)?,
            most: scratch.most,
            local_window: routing.limits.local_window(store).unwrap_or(0),
        };
        let call = SelectCall {
            q: address(q)?,
            expanded: false,
            position,
            takes: address(&self.buffers.state)? + ((2 + index * self.heads.kv_heads()) * size_of::<u32>()) as u64,
            scores: address(&scratch.scores)?,
            lists,
            picked: address(&self.buffers.told)? + (index * self.heads.kv_heads() * size_of::<u32>()) as u64,
            blocks: 0,
            kind: kind_of(&*routing.block_router).unwrap_or(0),
            max_scores: scratch.max_scores,
            tokens: 1,
            tile: 1,
            tiles: 0..1,
        };
        // SAFETY: as in `launch_all`.
        unsafe { score_and_select(&self.kernels, &call, &routing.limits_of(index), store) }?;
        Ok(lists)
    }

    /// `activation(gate) * up`
    fn feed(&self, layer: &Layer) -> Result<()> {
        let Buffers { normed, inner, .. } = &self.buffers;
        let params = GatedParams {
            gate: layer.gate.params(0, 0),
            up: layer.up.params(0, 0),
            x: address(&normed[0])?,
            x_q8: address(&normed[1])?,
            out: address(&inner[0])?,
            out_q8: address(&inner[1])?,
            columns: layer.gate.columns() as i32,
            activation: self.activation,
        };
        let spread = Spread::new([layer.gate.height() / GATED_ROWS, 1, 1], GATED_THREADS);
        let name = Format::kernel("gated_product", [layer.gate.format(), layer.up.format()]);
        // SAFETY: as in `launch_all`.
        unsafe { self.kernels.launch_following(&name, spread, &params) }
    }
}
