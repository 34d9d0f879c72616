//! The CUDA backend equals the plain one, and keeps the laws. Without a GPU these tests say so and pass: `just test-cuda` runs them.
#![cfg(feature = "cuda")]

use candle_core::{DType, Device, Result, Tensor, bail};
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};
use sparse_attn::backend::cuda::Cuda;
use sparse_attn::backend::{AttentionBackend, Cpu, Reference};
use sparse_attn::block_router::{self, Bound, Mean, Spread};
use sparse_attn::select::{Budget, Limits, Selection};
use sparse_attn::token_router::{self, Feedforward, Gate, GateLayer, Random, TokenRouter};
use sparse_attn::{
    Attended, AttentionInput, Destination, HeadShape, KvCache, KvDtype, LayerSpec, Observer, Place, Products, ProductsInput,
    RoutedAttention, Routing, Step,
};
use std::sync::{Arc, Mutex};

/// `q_heads, kv_heads, head_dim, sliding_window`: SmolLM2, Qwen 0.5B, Gemma 3, Mistral, Qwen 1.5B, odd ones, and one that fills a device.
const SHAPES: [(usize, usize, usize, Option<usize>); 9] = [
    (9, 3, 64, None),
    (14, 2, 64, None),
    (4, 1, 256, Some(100)),
    (8, 2, 128, None),
    (12, 2, 128, Some(33)),
    (3, 3, 64, Some(1)),
    (16, 1, 64, None),
    (4, 2, 256, None),
    (24, 24, 64, None),
];

const TOKENS: usize = 700;

fn gpu() -> Option<Device> {
    match Device::new_cuda_with_stream(0) {
        Ok(device) => Some(device),
        Err(error) => {
            eprintln!("skipped: no GPU ({error})");
            None
        }
    }
}

fn tolerance(dtype: KvDtype) -> f32 {
    match dtype {
        KvDtype::F16 => 4e-3,
        // Both sides hold the same bytes.
        KvDtype::Q8_0 => 1e-2,
        _ => 3e-2,
    }
}

/// Where queries and outcomes go, one step's after the other.
fn places() -> [Place; 2] {
    let mut places = [Place::default(), Place::default()];
    places.iter_mut().for_each(|place| place.keep(true));
    places
}

/// About normal numbers, the same every time, that f16 and bf16 hold: both sides attend with the same ones.
fn normal(seed: u64, shape: &[usize]) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| (0..12).map(|_| next()).sum::<f32>() - 6.0).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)
}

struct Case {
    spec: LayerSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Case {
    fn new((q_heads, kv_heads, head_dim, sliding_window): (usize, usize, usize, Option<usize>), tokens: usize) -> Result<Self> {
        let spec = LayerSpec { sliding_window, ..LayerSpec::full(HeadShape::new(q_heads, kv_heads, head_dim)?) };
        let random = |seed, heads| normal(seed, &[tokens, heads, head_dim]);
        Ok(Self { spec, q: random(1, q_heads)?, k: random(2, kv_heads)?, v: random(3, kv_heads)? })
    }

    /// What `attention` makes of the tokens in these chunks, one after the other, and the cache.
    fn run(&self, attention: &RoutedAttention, dtype: KvDtype, device: &Device, chunks: &[usize]) -> Result<(Tensor, KvCache)> {
        let tokens = self.q.dim(0)?;
        let specs = attention.layer_specs(&[self.spec]);
        let mut cache = KvCache::new(&specs, dtype.into(), device, 0)?;
        let (mut parts, mut chunks) = (Vec::new(), chunks.iter().copied().cycle());
        while cache.len() < tokens {
            let step = cache.reserve(chunks.next().unwrap_or(1).min(tokens - cache.len()))?;
            let part = |x: &Tensor| x.narrow(0, step.start, step.len)?.to_device(device);
            let (q, k, v) = (part(&self.q)?, part(&self.k)?, part(&self.v)?);
            let scale = 1.0 / (self.spec.shape.head_dim() as f32).sqrt();
            let input = AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale };
            parts.push(attention.forward(0, input, step, &mut cache)?.to_device(&Device::Cpu)?);
            cache.commit(step)?;
            if step.start.is_multiple_of(3) {
                cache.trim()?;
            }
        }
        Ok((Tensor::cat(&parts, 0)?, cache))
    }
}

impl Case {
    /// Whether `got`, which `routing` made, is what the host reads of the selections seen.
    fn check(&self, routing: &Routing, dtype: KvDtype, got: &Tensor, seen: &Seen) -> Result<()> {
        let plain = Routing { block_router: Routing::dense().block_router, ..routing.clone() };
        let plain = RoutedAttention::new(plain, Arc::new(Cpu))?;
        let mut cache = KvCache::new(&plain.layer_specs(&[self.spec]), dtype.into(), &Device::Cpu, 0)?;
        let scale = 1.0 / (self.spec.shape.head_dim() as f32).sqrt();
        for (step, selection) in seen.0.lock().unwrap().iter() {
            cache.reserve(step.len)?;
            let part = |x: &Tensor| x.narrow(0, step.start, step.len);
            let (q, k, v) = (part(&self.q)?, part(&self.k)?, part(&self.v)?);
            plain.forward(
                0,
                AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale },
                *step,
                &mut cache,
            )?;
            let want = Cpu.attend(&q, scale, cache.layer(0), *step, selection)?;
            cache.commit(*step)?;
            let error = far(&part(got)?, &want)?;
            if error >= tolerance(dtype) {
                let of_query = |t| far(&part(got)?.narrow(0, t, 1)?, &want.narrow(0, t, 1)?);
                let each: Vec<f32> = (0..step.len).map(of_query).collect::<Result<_>>()?;
                bail!("{:?} {dtype:?} {:?}, {step:?}: off by {error} ({each:?}), reading {selection:?}", self.spec, routing.limits);
            }
        }
        Ok(())
    }
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    let difference = (a - b)?.abs()?.flatten_all()?;
    // NaN is not far from anything, and must not pass.
    let sum = difference.sum_all()?.to_scalar::<f32>()?;
    Ok(if sum.is_nan() { f32::INFINITY } else { difference.max(0)?.to_scalar()? })
}

fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(a.flatten_all()?.to_vec1::<f32>()? == b.flatten_all()?.to_vec1::<f32>()?)
}

fn on_gpu(device: &Device, routing: Routing) -> Result<RoutedAttention> {
    RoutedAttention::new(routing, Arc::new(Cuda::new(device)?))
}

/// What was selected in each step, and the steps.
#[derive(Debug, Default)]
struct Seen(Mutex<Vec<(Step, Selection)>>);

impl Observer for Seen {
    fn attended(&self, seen: Attended<'_>) -> Result<()> {
        self.0.lock().unwrap().push((seen.step, seen.selection.clone()));
        Ok(())
    }
}

fn routed(block_size: usize, budget: usize, tile: usize) -> Routing {
    let limits = Limits { window: 64, sinks: 4, block_size, budget: Budget::tokens(budget), dense_len: 100, tile };
    Routing { block_router: Arc::new(Spread), limits, ..Routing::dense() }
}

#[test]
fn dense_attention_is_that_of_the_host() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for shape in SHAPES {
        let case = Case::new(shape, TOKENS)?;
        for dtype in [KvDtype::F16, KvDtype::Bf16, KvDtype::Q8_0] {
            let (want, _) = case.run(&RoutedAttention::dense(Arc::new(Cpu)), dtype, &Device::Cpu, &[TOKENS])?;
            for chunks in [&[TOKENS][..], &[64], &[1], &[300, 7, 1, 1]] {
                let (got, _) = case.run(&on_gpu(&device, Routing::dense())?, dtype, &device, chunks)?;
                let error = far(&got, &want)?;
                assert!(error < tolerance(dtype), "{shape:?} {dtype:?} in {chunks:?}: {error}");
            }
        }
    }
    Ok(())
}

/// What is done to products on the host, all `[tokens, heads, head_dim]`.
fn made(x: &Tensor, bias: Option<&Tensor>, norm: Option<&Tensor>, angles: Option<&[Tensor; 2]>) -> Result<Tensor> {
    let (_, heads, head_dim) = x.dims3()?;
    let mut x = x.clone();
    if let Some(bias) = bias {
        x = x.broadcast_add(&bias.reshape((heads, head_dim))?)?;
    }
    if let Some(norm) = norm {
        let squares = (x.sqr()?.mean_keepdim(2)? + f64::from(EPS))?;
        x = x.broadcast_div(&squares.sqrt()?)?.broadcast_mul(norm)?;
    }
    let Some([cos, sin]) = angles else { return Ok(x) };
    let half = |first| x.narrow(2, first, head_dim / 2);
    let (a, b, cos, sin) = (half(0)?, half(head_dim / 2)?, cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let high = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    Tensor::cat(&[low, high], 2)
}

const EPS: f32 = 1e-3;

#[test]
fn products_become_the_queries_keys_and_values_that_the_host_makes() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for ((index, shape), dtype) in SHAPES.into_iter().enumerate().zip([KvDtype::F16, KvDtype::Bf16, KvDtype::Q8_0].into_iter().cycle()) {
        let (q_heads, kv_heads, head_dim, _) = shape;
        let case = Case::new(shape, 200)?;
        let tokens = case.q.dim(0)?;
        let heads = [q_heads, kv_heads, kv_heads];
        // With biases, with norms, with both, with neither.
        let biases = if index % 2 == 0 { heads.map(|heads| normal(4, &[heads * head_dim]).ok()) } else { [None, None, None] };
        let norms = if index / 2 % 2 == 0 { Some([normal(5, &[head_dim])?, normal(6, &[head_dim])?]) } else { None };
        let turns = normal(7, &[tokens, head_dim / 2])?;
        let angles = [turns.cos()?, turns.sin()?];
        let norm = |index: usize| norms.as_ref().map(|norms| &norms[index]);
        let host = Case {
            spec: case.spec,
            q: made(&case.q, biases[0].as_ref(), norm(0), Some(&angles))?,
            k: made(&case.k, biases[1].as_ref(), norm(1), Some(&angles))?,
            v: made(&case.v, biases[2].as_ref(), None, None)?,
        };
        let chunks = [37, 1, 64, 3];
        let (want, _) = host.run(&RoutedAttention::dense(Arc::new(Cpu)), dtype, &Device::Cpu, &chunks)?;
        let attention = on_gpu(&device, Routing::dense())?;
        let mut cache = KvCache::new(&[case.spec], dtype.into(), &device, 0)?;
        let here = |x: &Tensor| x.to_device(&device);
        let biases = biases.iter().map(|bias| bias.as_ref().map(here).transpose()).collect::<Result<Vec<_>>>()?;
        let norms = norms.map(|[q, k]| Ok::<_, candle_core::Error>([here(&q)?, here(&k)?])).transpose()?;
        let (mut parts, mut chunks) = (Vec::new(), chunks.into_iter().cycle());
        let [mut queries, mut attended] = places();
        while cache.len() < tokens {
            let step = cache.reserve(chunks.next().unwrap_or(1).min(tokens - cache.len()))?;
            // Side by side, as one product gives them.
            let part = |x: &Tensor| here(&x.narrow(0, step.start, step.len)?);
            let all = Tensor::cat(&[part(&case.q)?, part(&case.k)?, part(&case.v)?], 1)?;
            let (q, k) = (all.narrow(1, 0, q_heads)?, all.narrow(1, q_heads, kv_heads)?);
            let v = all.narrow(1, q_heads + kv_heads, kv_heads)?;
            let [cos, sin] = [part(&angles[0])?, part(&angles[1])?];
            let products = Products {
                q: &q,
                k: &k,
                v: &v,
                biases: [biases[0].as_ref(), biases[1].as_ref(), biases[2].as_ref()],
                norms: norms.as_ref().map(|[q, k]| ([q, k], EPS)),
                angles: [&cos, &sin],
            };
            let scale = 1.0 / (head_dim as f32).sqrt();
            let input = ProductsInput { hidden: &q, projected: None, products, scale, decides_later: false };
            let to = Destination { dtype: DType::F32, place: &mut attended };
            let out = attention.forward_products(0, input, step, &mut cache, &mut queries, to)?;
            parts.push(out.expect("a GPU takes products").to_device(&Device::Cpu)?);
            cache.commit(step)?;
        }
        let error = far(&Tensor::cat(&parts, 0)?, &want)?;
        assert!(error < 2.0 * tolerance(dtype), "{shape:?} {dtype:?}: off by {error}");
    }
    Ok(())
}

#[test]
fn rows_that_begin_anywhere_are_stored_as_others() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let case = Case::new((4, 1, 64, None), 50)?;
    let attention = on_gpu(&device, Routing::dense())?;
    for dtype in [KvDtype::F16, KvDtype::Q8_0] {
        let attend = |k: Tensor, v: Tensor| -> Result<Tensor> {
            let q = case.q.to_device(&device)?;
            let mut cache = KvCache::new(&[case.spec], dtype.into(), &device, 0)?;
            let step = cache.reserve(50)?;
            let input = AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale: 0.125 };
            attention.forward(0, input, step, &mut cache)?.to_device(&Device::Cpu)
        };
        // With a number before each row.
        let shifted = |x: &Tensor| Tensor::cat(&[&x.narrow(2, 0, 1)?, x], 2)?.to_device(&device)?.narrow(2, 1, 64);
        let want = attend(case.k.to_device(&device)?, case.v.to_device(&device)?)?;
        assert!(equal(&attend(shifted(&case.k)?, shifted(&case.v)?)?, &want)?, "{dtype:?}");
    }
    Ok(())
}

#[test]
fn a_selection_is_read_as_the_plain_backend_reads_it() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (shape, block_size, tile, chunks) in [
        ((8, 2, 128, None), 16, 32, &[TOKENS][..]),
        ((14, 2, 64, None), 8, 4, &[64]),
        ((9, 3, 64, None), 32, 64, &[256, 1, 1]),
        ((4, 1, 256, None), 16, 1, &[TOKENS]),
        ((8, 2, 128, None), 16, 32, &[1]),
        ((8, 2, 128, None), 12, 8, &[64]), // blocks that are no octets: selected on the host
    ] {
        let case = Case::new(shape, TOKENS)?;
        for dtype in [KvDtype::F16, KvDtype::Bf16, KvDtype::Q8_0] {
            let seen = Arc::new(Seen::default());
            let attention = on_gpu(&device, routed(block_size, 160, tile))?.observed(seen.clone());
            let (got, _) = case.run(&attention, dtype, &device, chunks)?;
            let (_, cache) = case.run(&RoutedAttention::dense(Arc::new(Cpu)), dtype, &Device::Cpu, &[TOKENS])?;
            let scale = 1.0 / (shape.2 as f32).sqrt();
            let mut some = false;
            for (step, selection) in seen.0.lock().unwrap().iter() {
                some |= matches!(selection, Selection::Blocks(_));
                let q = case.q.narrow(0, step.start, step.len)?;
                let want = Cpu.attend(&q, scale, cache.layer(0), *step, selection)?;
                let error = far(&got.narrow(0, step.start, step.len)?, &want)?;
                assert!(error < tolerance(dtype), "{shape:?} {dtype:?} blocks of {block_size} in tiles of {tile}, {step:?}: {error}");
            }
            assert!(some, "nothing was selected");
        }
    }
    Ok(())
}

#[test]
fn the_device_selects_what_the_host_selects() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (router, token_router, tile, chunks) in [
        (Arc::new(Spread) as Arc<dyn block_router::BlockRouter>, Routing::dense().token_router, 32, &[64, 64, 1][..]),
        (Arc::new(Spread), Routing::dense().token_router, 4, &[TOKENS]),
        (Arc::new(Bound), Routing::dense().token_router, 1, &[TOKENS]),
        (Arc::new(Mean), Routing::dense().token_router, 1, &[32, 1, 1]),
        (Arc::new(Bound), Routing::dense().token_router, 32, &[TOKENS]),
        (Arc::new(Spread), Arc::new(Random { keep: 0.4 }), 32, &[TOKENS]),
        (Arc::new(Bound), Arc::new(Random { keep: 0.6 }), 1, &[64, 1, 1]),
        (Arc::new(Spread), Arc::new(Random { keep: 0.5 }), 16, &[300, 1]),
    ] {
        let case = Case::new((8, 2, 128, None), TOKENS)?;
        let drops = token_router.kept_fraction() < 1.0;
        let run =
            |backend: Arc<dyn AttentionBackend>, device: &Device| -> Result<(Vec<(Step, Selection)>, sparse_attn::cache::ReadCount)> {
                let seen = Arc::new(Seen::default());
                let routing = Routing {
                    block_router: router.clone(),
                    token_router: token_router.clone(),
                    ..routed(16, if drops { 100 } else { 200 }, tile)
                };
                let attention = RoutedAttention::new(routing, backend)?.observed(seen.clone());
                let (_, cache) = case.run(&attention, KvDtype::F16, device, chunks)?;
                let selections = seen.0.lock().unwrap().clone();
                Ok((selections, cache.read_count()))
            };
        let (host, host_count) = run(Arc::new(Cpu), &Device::Cpu)?;
        let (own, own_count) = run(Arc::new(Cuda::new(&device)?), &device)?;
        assert_eq!(host_count.visible, own_count.visible, "{router:?}");
        // Blocks hold as many tokens as they do, where some are dropped: another near one, another number.
        let apart = host_count.read.abs_diff(own_count.read);
        assert!(if drops { apart * 50 < host_count.read } else { apart == 0 }, "{router:?}: {host_count:?}, {own_count:?}");
        let (mut same, mut all) = (0, 0);
        for ((step, host), (_, own)) in host.iter().zip(&own) {
            let (Selection::Blocks(host), Selection::Blocks(own)) = (host, own) else {
                assert_eq!(host, own);
                continue;
            };
            for (t, head) in (step.start..step.end()).flat_map(|t| [(t, 0), (t, 1)]) {
                let (Some(host), Some(own)) = (host.blocks(t, head), own.blocks(t, head)) else { continue };
                assert!(drops || host.len() == own.len(), "{router:?} at {t}");
                all += host.len();
                same += host.iter().filter(|block| own.contains(block)).count();
            }
        }
        // Queries are rounded to 16 bits here, and not at all there: a few near ones change places.
        assert!(all > 0 && same as f32 > 0.97 * all as f32, "{router:?} in tiles of {tile}: {same} of {all}");
    }
    Ok(())
}

#[test]
fn all_blocks_selected_is_dense_bit_for_bit_and_runs_are_alike() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for shape in [(8, 2, 128, None), (14, 2, 64, None), (4, 1, 256, None)] {
        let case = Case::new(shape, TOKENS)?;
        for chunks in [&[TOKENS][..], &[64], &[1]] {
            // Tiles so small that a thread block has the keys in two halves, as it has them of all where there are few tiles.
            let all = Routing {
                limits: Limits { budget: Budget { tokens: TOKENS - 100, part: 0.0 }, ..routed(16, 0, 8).limits },
                ..routed(16, 0, 8)
            };
            let (dense, _) = case.run(&on_gpu(&device, Routing::dense())?, KvDtype::F16, &device, chunks)?;
            let (full, _) = case.run(&on_gpu(&device, all.clone())?, KvDtype::F16, &device, chunks)?;
            let (again, _) = case.run(&on_gpu(&device, all)?, KvDtype::F16, &device, chunks)?;
            assert!(equal(&full, &again)?, "{shape:?} in {chunks:?}: two runs differ");
            // Up to here every block fits the budget.
            let fits = TOKENS - 100;
            assert!(equal(&full.narrow(0, 0, fits)?, &dense.narrow(0, 0, fits)?)?, "{shape:?} in {chunks:?}");
        }
    }
    Ok(())
}

#[test]
fn a_token_router_is_followed() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (shape, chunks) in [((8, 2, 128, None), &[TOKENS][..]), ((9, 3, 64, None), &[100, 1, 1]), ((14, 2, 64, None), &[1])] {
        let case = Case::new(shape, TOKENS)?;
        let routing = || Routing { token_router: Arc::new(Random { keep: 0.4 }), ..Routing::dense() };
        let narrow = Routing { limits: Limits { window: 70, ..routing().limits }, ..routing() };
        let (want, _) = case.run(&RoutedAttention::new(narrow.clone(), Arc::new(Reference))?, KvDtype::F16, &Device::Cpu, &[TOKENS])?;
        let (got, cache) = case.run(&on_gpu(&device, narrow.clone())?, KvDtype::F16, &device, chunks)?;
        let error = far(&got, &want)?;
        assert!(error < tolerance(KvDtype::F16), "{shape:?} in {chunks:?}: {error}");
        assert_eq!(cache.layer(0).local().map(|local| local.window), Some(70));
        // With blocks on top: selected from what was admitted.
        let both = Routing {
            limits: Limits { window: 70, dense_len: 100, ..routed(16, 120, 8).limits },
            token_router: Arc::new(Random { keep: 0.4 }),
            ..routed(16, 120, 8)
        };
        let seen = Arc::new(Seen::default());
        let (got, _) = case.run(&on_gpu(&device, both.clone())?.observed(seen.clone()), KvDtype::F16, &device, chunks)?;
        case.check(&both, KvDtype::F16, &got, &seen)?;
    }
    Ok(())
}

#[test]
fn a_long_prompt_reads_what_is_kept_of_itself() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    // Of what no window of a tile has, kept tokens are gathered: of the longest ones in several goes.
    for (shape, chunks) in [
        ((16, 2, 128, None), &[1000][..]),
        ((24, 8, 64, None), &[2, 998]),
        ((8, 2, 256, None), &[1000]),
        ((24, 24, 128, None), &[130, 870]),
        ((3, 1, 64, None), &[2500]),
        ((4, 1, 128, None), &[1030, 1570]),
        ((2, 1, 256, None), &[2600]),
    ] {
        let tokens = chunks.iter().sum();
        let case = Case::new(shape, tokens)?;
        for (keep, window, dtype) in
            [(0.4, 70, KvDtype::F16), (0.02, 64, KvDtype::Bf16), (0.9, 20, KvDtype::Q8_0), (0.0, 129, KvDtype::F16)]
        {
            // All of them, and those that come after some that see everything: as a whole number of tiles.
            for token_dense_len in [0, if keep < 0.5 { 640 } else { tokens }] {
                let routing = Routing { token_router: Arc::new(Random { keep }), token_dense_len, ..Routing::dense() };
                let routing = Routing { limits: Limits { window, ..routing.limits }, ..routing };
                let (want, _) = case.run(&RoutedAttention::new(routing.clone(), Arc::new(Cpu))?, dtype, &Device::Cpu, &[tokens])?;
                let (got, _) = case.run(&on_gpu(&device, routing)?, dtype, &device, chunks)?;
                let error = far(&got, &want)?;
                let what = format!("{keep} kept beyond {window}, after {token_dense_len}");
                assert!(error < tolerance(dtype), "{shape:?} {dtype:?} in {chunks:?}, {what}: {error}");
            }
        }
    }
    Ok(())
}

#[test]
fn gates_score_and_decide_as_on_the_host() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    // More heads than lanes share a token.
    [3, 9].into_iter().try_for_each(|kv_heads| gates_decide_as_on_the_host(kv_heads, &device))
}

fn gates_decide_as_on_the_host(kv_heads: usize, device: &Device) -> Result<()> {
    let width = 576;
    // No numbers that bf16 holds.
    let odd = |seed, shape: &[usize]| normal(seed, shape)? * 0.7;
    let linear = Feedforward { hidden: None, weight: odd(1, &[kv_heads, width])?, bias: odd(2, &[kv_heads])? };
    let deep =
        Feedforward { hidden: Some((odd(3, &[68, width])?, odd(4, &[68])?)), weight: odd(5, &[kv_heads, 68])?, bias: odd(6, &[kv_heads])? };
    let x = odd(7, &[500, width])?;
    for gate in [linear, deep] {
        // As it is on the device, whose other rounding is far smaller.
        let (gate, on_device) = (gate.rounded()?, gate.to_device(device)?);
        let want = gate.score(&x)?;
        let scale = want.abs()?.max_all()?.to_scalar::<f32>()?;
        for dtype in [DType::BF16, DType::F32] {
            let x = x.to_dtype(dtype)?;
            let (want, got) = (gate.score(&x)?, on_device.score(&x.to_device(device)?)?.to_device(&Device::Cpu)?);
            assert!(far(&got, &want)? < 3e-4 * scale, "{dtype:?}: {} of {scale}", far(&got, &want)?);
        }
        let sinks = Routing::dense().limits.sinks;
        let (want, tau) = (want.to_vec2::<f32>()?, 0.1 * scale);
        let gate = Arc::new(Gate::new(vec![GateLayer::Feedforward(gate)], tau, 0.5)?.to_device(device)?);
        // What a model makes beside its other products, rows with others between them.
        let asked = gate.projection(0).expect("a GPU's gate asks for products").to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let products = x.matmul(&asked.t()?)?.pad_with_zeros(1, 5, 3)?.to_device(device)?.narrow(1, 5, asked.dim(0)?)?;
        let routing = Routing { token_router: gate, limits: Limits { window: 64, ..Routing::dense().limits }, ..Routing::dense() };
        let attention = on_gpu(device, routing)?;
        for (chunks, projected) in [&[500][..], &[3, 30, 1, 200], &[17]].into_iter().flat_map(|chunks| [(chunks, false), (chunks, true)]) {
            let spec = LayerSpec::full(HeadShape::new(9, kv_heads, 64)?);
            let mut cache = KvCache::new(&attention.layer_specs(&[spec]), KvDtype::F16.into(), device, 0)?;
            let mut chunks = chunks.iter().copied().cycle();
            while cache.len() < 500 {
                let step = cache.reserve(chunks.next().unwrap_or(1).min(500 - cache.len()))?;
                let rows = |heads| normal(8, &[step.len, heads, 64])?.to_device(device);
                let (q, k, hidden) = (rows(9)?, rows(kv_heads)?, x.narrow(0, step.start, step.len)?.to_device(device)?);
                let products = products.narrow(0, step.start, step.len)?;
                let projected = projected.then_some(&products);
                attention.forward(
                    0,
                    AttentionInput { hidden: &hidden, projected, q: &q, k: &k, k_before_rope: &k, v: &k, scale: 0.1 },
                    step,
                    &mut cache,
                )?;
                cache.commit(step)?;
                cache.trim()?;
            }
            let mut kept = 0;
            for (t, head) in (0..500).flat_map(|t| (0..kv_heads).map(move |head| (t, head))) {
                let admitted = cache.layer(0).admitted(head).is_some_and(|admitted| admitted.contains(t));
                let score = want[t][head];
                kept += usize::from(admitted);
                assert!(
                    (score - tau).abs() < 3e-4 * scale || admitted == (t < sinks || score >= tau),
                    "{chunks:?}, {projected}, token {t}, head {head}: {score} of {tau}"
                );
            }
            assert!((70 * kv_heads..430 * kv_heads).contains(&kept), "{kept} of {}", 500 * kv_heads);
        }
    }
    Ok(())
}

#[test]
fn verdicts_on_all_layers_at_once_are_those_of_each() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    const LAYERS: usize = 3;
    let (width, kv_heads, tokens) = (64, 3, 500);
    let odd = |seed, shape: &[usize]| normal(seed, shape)? * 0.7;
    let of_layer = |layer: u64, is_deep: bool| -> Result<Feedforward> {
        let hidden = is_deep.then(|| Ok::<_, candle_core::Error>((odd(10 + layer, &[68, width])?, odd(20 + layer, &[68])?)));
        let columns = if is_deep { 68 } else { width };
        Ok(Feedforward { hidden: hidden.transpose()?, weight: odd(30 + layer, &[kv_heads, columns])?, bias: odd(40 + layer, &[kv_heads])? })
    };
    for is_deep in [false, true] {
        let gates = (0..LAYERS as u64).map(|layer| of_layer(layer, is_deep).map(GateLayer::Feedforward)).collect::<Result<Vec<_>>>()?;
        let gate = Arc::new(Gate::new(gates, 0.5, 0.5)?.to_device(&device)?);
        let [stack] = gate.stacks() else { panic!("layers that are alike are together") };
        assert_eq!(stack.layers, [0, 1, 2]);
        let routing =
            Routing { token_router: gate.clone(), limits: Limits { window: tokens, ..Routing::dense().limits }, ..Routing::dense() };
        let attention = on_gpu(&device, routing)?;
        let spec = LayerSpec::full(HeadShape::new(9, kv_heads, 64)?);
        let inputs = (0..LAYERS as u64).map(|layer| odd(50 + layer, &[tokens, width])).collect::<Result<Vec<_>>>()?;
        let projected = |projection: &Tensor, x: &Tensor| {
            x.to_dtype(DType::BF16)?.to_dtype(DType::F32)?.matmul(&projection.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.t()?)
        };
        let run = |chunks: &[usize], decides_later: bool| -> Result<Vec<bool>> {
            let mut cache = KvCache::new(&attention.layer_specs(&[spec; LAYERS]), KvDtype::F16.into(), &device, 0)?;
            let [mut queries, mut attended] = places();
            for len in chunks {
                let step = cache.reserve(*len)?;
                let part = |x: &Tensor| x.narrow(0, step.start, step.len)?.to_device(&device);
                let rows = |heads| normal(8, &[step.len, heads, 64])?.to_device(&device);
                let (q, k) = (rows(9)?, rows(kv_heads)?);
                let turns = Tensor::zeros((step.len, 32), DType::F32, &device)?;
                let products = Products { q: &q, k: &k, v: &k, biases: [None; 3], norms: None, angles: [&turns, &turns] };
                for (layer, x) in inputs.iter().enumerate() {
                    assert!(attention.decides_later(layer, step, cache.layer(layer)));
                    let own = projected(gate.projection(layer).expect("of a gate on a GPU"), &x.narrow(0, step.start, step.len)?)?
                        .to_device(&device)?;
                    let input = ProductsInput { hidden: &part(x)?, projected: Some(&own), products, scale: 0.1, decides_later };
                    let to = Destination { dtype: DType::F32, place: &mut attended };
                    attention.forward_products(layer, input, step, &mut cache, &mut queries, to)?.expect("a GPU takes products");
                }
                if decides_later {
                    // In rows that begin with others.
                    let rows =
                        inputs.iter().map(|x| x.narrow(0, step.start, step.len)?.pad_with_zeros(0, 5, 2)).collect::<Result<Vec<_>>>()?;
                    let rows = Tensor::stack(&rows, 0)?.to_dtype(DType::BF16)?.to_device(&device)?;
                    cache.wait_for_verdicts(step, &[Some(Arc::new(rows))], 5)?;
                }
                cache.commit(step)?;
                if decides_later {
                    assert_eq!(cache.waiting(), Some(step));
                    let error = cache.reserve(2).unwrap_err().to_string();
                    assert!(error.contains("wait for verdicts") && cache.fork().is_err(), "{error}");
                    attention.decide(&mut cache, |weights, x| {
                        let plain = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
                        plain(x)?.matmul(&plain(weights)?.transpose(1, 2)?.contiguous()?)?.to_device(&device)
                    })?;
                    cache.learn()?;
                }
            }
            let admitted = |layer, head, t| cache.layer(layer).admitted(head).is_some_and(|admitted| admitted.contains(t));
            let all = (0..LAYERS).flat_map(|layer| (0..kv_heads).flat_map(move |head| (0..tokens).map(move |t| (layer, head, t))));
            Ok(all.map(|(layer, head, t)| admitted(layer, head, t)).collect())
        };
        let want = run(&[tokens], false)?;
        assert!((100..LAYERS * kv_heads * tokens - 100).contains(&want.iter().filter(|kept| **kept).count()));
        for chunks in [&[tokens][..], &[3, 290, 207]] {
            assert!(run(chunks, true)? == want, "{is_deep}, {chunks:?}");
        }
        // A token that leaves the window is asked for at once.
        let mut cache = KvCache::new(&attention.layer_specs(&[spec]), KvDtype::F16.into(), &device, 0)?;
        let step = cache.reserve(tokens + 1)?;
        assert!(!attention.decides_later(0, step, cache.layer(0)));
    }
    Ok(())
}

#[test]
fn what_is_not_read_changes_nothing() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    // A step of one: tiles of many queries see each other's newest keys, and hide them by weights of 0.
    let mut case = Case::new((8, 2, 128, None), 300)?;
    let attention = on_gpu(&device, Routing::dense())?;
    let (want, _) = case.run(&attention, KvDtype::F16, &device, &[299, 1])?;
    let broken = Tensor::full(f32::NAN, (1, 2, 128), &Device::Cpu)?;
    case.k = Tensor::cat(&[case.k.narrow(0, 0, 299)?, broken.clone()], 0)?;
    case.v = Tensor::cat(&[case.v.narrow(0, 0, 299)?, broken], 0)?;
    let (got, _) = case.run(&attention, KvDtype::F16, &device, &[299, 1])?;
    assert!(equal(&want.narrow(0, 0, 299)?, &got.narrow(0, 0, 299)?)?);
    Ok(())
}

#[test]
fn what_there_is_no_kernel_for_is_refused() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let case = Case::new((4, 2, 64, None), 10)?;
    let attention = on_gpu(&device, Routing::dense())?;
    let error = case.run(&attention, KvDtype::F32, &device, &[10]).unwrap_err().to_string();
    assert!(error.contains("f32") && error.contains("f16"), "{error}");
    let odd = Case::new((4, 2, 80, None), 10)?;
    let error = odd.run(&attention, KvDtype::F16, &device, &[10]).unwrap_err().to_string();
    assert!(error.contains("80") && error.contains("128"), "{error}");
    Ok(())
}

/// Shapes that have kernels, settings and numbers at will.
#[derive(Debug, Clone)]
struct Generated {
    shape: (usize, usize, usize, Option<usize>),
    tokens: usize,
    limits: Limits,
    dtype: KvDtype,
    token_router: usize,
    block_router: usize,
    chunk: usize,
}

fn generated() -> impl Strategy<Value = Generated> {
    let shape = (1..=3usize, 1..=16usize, prop::sample::select(vec![64, 128, 256]), prop::option::weighted(0.2, 1..=200usize));
    let block_size = prop_oneof![2 => prop::sample::select(vec![8, 16, 32, 64]), 1 => 1..=40usize];
    let limits = (1..=80usize, 0..=8usize, block_size, 1..=300usize, 0..=150usize, 1..=64usize);
    let limits = limits.prop_map(|(window, sinks, block_size, budget, dense_len, tile)| Limits {
        window,
        sinks,
        block_size,
        budget: Budget::tokens(budget),
        dense_len,
        tile,
    });
    let dtype = prop::sample::select(vec![KvDtype::F16, KvDtype::Bf16, KvDtype::Q8_0]);
    let routers = (0..token_router::all().len(), 0..block_router::all().len());
    (shape, 1..=600usize, limits, dtype, routers, prop_oneof![Just(1), 1..=130usize, Just(600)]).prop_map(
        |((kv_heads, group_size, head_dim, sliding), tokens, limits, dtype, (token_router, block_router), chunk)| Generated {
            shape: (kv_heads * group_size, kv_heads, head_dim, sliding),
            tokens,
            limits,
            dtype,
            token_router,
            block_router,
            chunk,
        },
    )
}

impl Generated {
    fn routing(&self) -> Routing {
        let (token_router, block_router) = (token_router::all()[self.token_router].clone(), block_router::all()[self.block_router].clone());
        let token_window = self.tokens.is_multiple_of(2).then_some(self.limits.window + self.tokens / 5);
        let token_dense_len = self.tokens % 3 * 70;
        Routing { token_router, block_router, limits: self.limits, token_window, token_dense_len, ..Routing::dense() }
    }

    fn laws(&self, device: &Device) -> Result<()> {
        let case = Case::new(self.shape, self.tokens)?;
        let run = |routing: &Routing| -> Result<(Tensor, Arc<Seen>)> {
            let seen = Arc::new(Seen::default());
            let (got, _) = case.run(&on_gpu(device, routing.clone())?.observed(seen.clone()), self.dtype, device, &[self.chunk])?;
            Ok((got, seen))
        };
        let routing = self.routing();
        let (got, seen) = run(&routing)?;
        case.check(&routing, self.dtype, &got, &seen)?;
        // A larger budget selects a superset.
        let larger =
            Routing { limits: Limits { budget: Budget::tokens(self.limits.budget.tokens + 100), ..self.limits }, ..routing.clone() };
        let more = run(&larger)?.1;
        let (few, more) = (seen.0.lock().unwrap(), more.0.lock().unwrap());
        for ((step, few), (_, more)) in few.iter().zip(more.iter()) {
            let (Selection::Blocks(few), Selection::Blocks(more)) = (few, more) else { continue };
            for (t, head) in (step.start..step.end()).flat_map(|t| (0..self.shape.1).map(move |head| (t, head))) {
                let (Some(few), Some(more)) = (few.blocks(t, head), more.blocks(t, head)) else { continue };
                if !few.is_sorted() || few.iter().any(|block| !more.contains(block)) {
                    bail!("the query at {t}, head {head}: {few:?} of a smaller budget, {more:?} of a larger one");
                }
            }
        }
        if !routing.block_router.fills_budget() {
            return Ok(());
        }
        // What fits is read as if nothing was selected, bit for bit.
        let fits = Routing { limits: Limits { budget: Budget::tokens(2 * self.tokens), ..self.limits }, ..routing.clone() };
        let dense = Routing { block_router: Routing::dense().block_router, ..routing };
        if !equal(&run(&fits)?.0, &run(&dense)?.0)? {
            bail!("a budget of all tokens is not dense");
        }
        Ok(())
    }
}

#[test]
fn laws_hold_on_generated_shapes_and_settings() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let Some(device) = gpu() else { return Ok(()) };
    let config = ProptestConfig { cases: 200, failure_persistence: None, rng_seed: RngSeed::Fixed(7), ..ProptestConfig::default() };
    TestRunner::new(config).run(&generated(), |case| case.laws(&device).map_err(|error| TestCaseError::fail(error.to_string())))?;
    Ok(())
}
