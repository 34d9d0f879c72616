//! Block routing against golden cases of the numpy definition, and its laws.

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use sparse_attn::backend::{AttentionBackend, Cpu, Reference};
use sparse_attn::block_router::{self, BlockScores, Queries};
use sparse_attn::select::{Budget, Limits, Selection, TILE, select};
use sparse_attn::token_router::{self, Admission, RouterInput, Scored, TokenRouter};
use sparse_attn::{AttentionInput, HeadShape, KvCache, KvDtype, LayerSpec, RoutedAttention, Routing, Step};
use std::path::PathBuf;
use std::sync::Arc;

fn backends() -> [Arc<dyn AttentionBackend>; 2] {
    [Arc::new(Reference), Arc::new(Cpu)]
}

fn routed(router: &str, limits: Limits, backend: Arc<dyn AttentionBackend>) -> Result<RoutedAttention> {
    let block_router = block_router::by_name(router).expect("a listed router");
    RoutedAttention::new(Routing { block_router, limits, ..Routing::dense() }, backend)
}

/// One layer's tensors, `[tokens, heads, head_dim]`.
#[derive(Clone)]
struct Data {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Data {
    /// About normal numbers, the same every time.
    fn new(tokens: usize, q_heads: usize, kv_heads: usize, head_dim: usize) -> Result<Self> {
        let mut state = 42u64;
        let mut tensor = |heads: usize| {
            let mut uniform = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 24) as f32
            };
            let values: Vec<f32> = (0..tokens * heads * head_dim).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
            Tensor::from_vec(values, (tokens, heads, head_dim), &Device::Cpu)
        };
        Ok(Self { q: tensor(q_heads)?, k: tensor(kv_heads)?, v: tensor(kv_heads)? })
    }

    fn tokens(&self) -> usize {
        self.q.dims()[0]
    }

    fn cache(&self, attention: &RoutedAttention, dtype: KvDtype) -> Result<KvCache> {
        let shape = HeadShape::new(self.q.dim(1)?, self.k.dim(1)?, self.q.dim(2)?)?;
        KvCache::new(&attention.layer_specs(&[LayerSpec::full(shape)]), dtype.into(), &Device::Cpu, 0)
    }

    /// Attends in chunks; `look` sees each step's queries and the cache right after it.
    fn run_with(&self, attention: &RoutedAttention, chunk: usize, mut look: impl FnMut(Step, &Tensor, &KvCache)) -> Result<Tensor> {
        self.run_stored(attention, KvDtype::F32, chunk, &mut look)
    }

    fn run_stored(
        &self,
        attention: &RoutedAttention,
        dtype: KvDtype,
        chunk: usize,
        look: &mut dyn FnMut(Step, &Tensor, &KvCache),
    ) -> Result<Tensor> {
        let scale = (self.q.dim(2)? as f32).powf(-0.5);
        let mut cache = self.cache(attention, dtype)?;
        let mut parts = Vec::new();
        while cache.len() < self.tokens() {
            let step = cache.reserve(chunk.min(self.tokens() - cache.len()))?;
            let part = |x: &Tensor| x.narrow(0, step.start, step.len);
            let (q, k, v) = (part(&self.q)?, part(&self.k)?, part(&self.v)?);
            parts.push(attention.forward(
                0,
                AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale },
                step,
                &mut cache,
            )?);
            look(step, &q, &cache);
            cache.commit(step)?;
        }
        Tensor::cat(&parts, 0)
    }

    fn run(&self, attention: &RoutedAttention, chunk: usize) -> Result<Tensor> {
        self.run_with(attention, chunk, |_, _, _| {})
    }

    /// The selected blocks of every query and head; `None`: it reads everything.
    fn selections(&self, router: &str, limits: Limits, chunk: usize) -> Result<Vec<Vec<Option<Vec<usize>>>>> {
        self.selections_of(&routed(router, limits, Arc::new(Cpu))?, chunk)
    }

    fn selections_of(&self, attention: &RoutedAttention, chunk: usize) -> Result<Vec<Vec<Option<Vec<usize>>>>> {
        let limits = attention.routing().limits;
        let mut all = Vec::new();
        self.run_with(attention, chunk, |step, q, cache| {
            let store = cache.layer(0);
            let scores = attention
                .routing()
                .block_router
                .score(&Queries { q, step, block_size: limits.block_size, tile: limits.tile }, store)
                .unwrap();
            let selection = select(&scores, &limits, step, store);
            for t in step.start..step.end() {
                let of_head = |head| match &selection {
                    Selection::Every => None,
                    Selection::Blocks(blocks) => blocks.blocks(t, head),
                };
                all.push((0..store.shape().kv_heads()).map(of_head).collect());
            }
        })?;
        Ok(all)
    }
}

fn max_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

const LIMITS: Limits = Limits { window: 40, sinks: 4, block_size: 16, budget: Budget { tokens: 96, part: 0.0 }, dense_len: 0, tile: TILE };

/// Admits what a list says.
#[derive(Debug, Clone)]
struct Listed(Vec<Vec<bool>>); // [tokens][kv_heads]

impl TokenRouter for Listed {
    fn name(&self) -> &'static str {
        "listed"
    }

    fn kept_fraction(&self) -> f32 {
        0.5
    }

    fn admit(&self, _layer: usize, input: RouterInput<'_>) -> Result<Admission> {
        Ok(Admission::Some(self.0[input.step.start..input.step.end()].concat()))
    }
}

#[test]
fn every_golden_case_gives_its_selection_and_its_output() -> Result<()> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/attention");
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<_>>()?;
    files.sort();
    assert_eq!(files.len(), 40);
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let bytes = std::fs::read(&file)?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a fixture");
        let meta = header.metadata().clone().expect("a fixture has its settings");
        let number = |key: &str| meta[key].parse::<usize>().expect("a count");
        let limits = Limits {
            window: number("window"),
            sinks: number("sinks"),
            block_size: number("block"),
            budget: Budget::tokens(number("budget")),
            dense_len: 0,
            tile: number("tile"),
        };
        let tensors = candle_core::safetensors::load(&file, &Device::Cpu)?;
        let data = Data { q: tensors["q"].clone(), k: tensors["k"].clone(), v: tensors["v"].clone() };
        let admit: Vec<Vec<bool>> = tensors["admit"].to_vec2::<u8>()?.iter().map(|row| row.iter().map(|x| *x != 0).collect()).collect();
        let token_router: Arc<dyn TokenRouter> =
            if name.contains("keep100") { Arc::new(token_router::All) } else { Arc::new(Listed(admit)) };
        let attention = |backend: Arc<dyn AttentionBackend>| {
            let block_router = block_router::by_name(&meta["router"]).expect("a listed router");
            RoutedAttention::new(Routing { token_router: token_router.clone(), block_router, limits, ..Routing::dense() }, backend)
        };
        let mut chunks = vec![data.tokens(), 64, 128];
        // Token by token each query selects for itself. A block that reaches beyond its query would count tokens to come.
        if limits.tile == 1 && limits.window + 1 >= limits.block_size {
            chunks.extend([1, 7]);
        }
        for chunk in chunks {
            for backend in backends() {
                let out = data.run(&attention(backend.clone())?, chunk)?;
                let difference = max_difference(&out, &tensors["out"])?;
                assert!(difference < 1e-5, "{name}, {} backend, chunks of {chunk}: off by {difference}", backend.name());
            }
            if meta["router"] == "all" {
                continue; // it selects nothing: it reads everything
            }
            let table = tensors["selected_blocks"].to_dtype(DType::F32)?.to_vec3::<f32>()?;
            for (t, heads) in data.selections_of(&attention(Arc::new(Cpu))?, chunk)?.into_iter().enumerate() {
                for (head, got) in heads.into_iter().enumerate() {
                    let want: Vec<usize> = table[t][head].iter().filter(|block| **block >= 0.0).map(|block| *block as usize).collect();
                    assert_eq!(got.expect("dense_len is 0"), want, "{name}, chunks of {chunk}, query {t}, head {head}");
                }
            }
        }
    }
    Ok(())
}

/// The same by scores, as devices have them.
#[derive(Debug)]
struct Scores(Listed);

impl TokenRouter for Scores {
    fn name(&self) -> &'static str {
        "scores"
    }

    fn kept_fraction(&self) -> f32 {
        self.0.kept_fraction()
    }

    fn admit(&self, layer: usize, input: RouterInput<'_>) -> Result<Admission> {
        let Admission::Some(keeps) = self.0.admit(layer, input)? else { panic!("a list") };
        // The threshold itself is kept, NaN is not.
        let scores: Vec<f32> = keeps.iter().enumerate().map(|(i, keeps)| if *keeps { 0.5 } else { [0.4, f32::NAN][i % 2] }).collect();
        let scores = Tensor::from_vec(scores, input.k.dims()[..2].to_vec(), &Device::Cpu)?;
        Ok(Admission::Scored(Scored { scores: token_router::Scores::Made(scores), tau: 0.5 }))
    }
}

#[test]
fn a_verdict_by_scores_is_the_same_verdict() -> Result<()> {
    let data = Data::new(300, 4, 2, 32)?;
    let listed = Listed((0..300).map(|t| vec![t % 3 == 0, t % 5 < 2]).collect());
    let routers: [Arc<dyn TokenRouter>; 2] = [Arc::new(listed.clone()), Arc::new(Scores(listed))];
    for block_router in ["all", "spread"] {
        let [a, b] = routers.clone().map(|token_router| {
            let block_router = block_router::by_name(block_router).expect("a listed router");
            let attention =
                RoutedAttention::new(Routing { token_router, block_router, limits: LIMITS, ..Routing::dense() }, Arc::new(Cpu))?;
            let mut counts = Vec::new();
            let out = data.run_with(&attention, 64, |_, _, cache| counts.push((cache.read_count(), cache.allocated_bytes())))?;
            Ok::<_, candle_core::Error>((out, counts))
        });
        let ((a, of_a), (b, of_b)) = (a?, b?);
        assert!(max_difference(&a, &b)? == 0.0 && of_a == of_b, "{block_router}: {of_a:?} {of_b:?}");
    }
    Ok(())
}

#[test]
fn every_router_runs_on_every_backend_in_parity() -> Result<()> {
    let data = Data::new(700, 6, 2, 32)?;
    for token_router in token_router::all() {
        for block_router in block_router::all() {
            let outs = backends().map(|backend| {
                let routing =
                    Routing { token_router: token_router.clone(), block_router: block_router.clone(), limits: LIMITS, ..Routing::dense() };
                let attention = RoutedAttention::new(routing, backend)?;
                Ok::<_, candle_core::Error>([data.run(&attention, 64)?, data.run(&attention, 1)?])
            });
            let [reference, cpu] = outs;
            for (a, b) in reference?.iter().zip(&cpu?) {
                let difference = max_difference(a, b)?;
                assert!(difference < 2e-5, "{}: {difference}", block_router.name());
            }
        }
    }
    Ok(())
}

#[test]
fn what_fits_is_dense_bit_for_bit() -> Result<()> {
    let data = Data::new(700, 6, 2, 32)?;
    for chunk in [700, 64, 1] {
        let dense = data.run(&RoutedAttention::dense(Arc::new(Cpu)), chunk)?;
        for router in ["mean", "bound", "spread", "oracle"] {
            for limits in [
                Limits { budget: Budget::ALL, ..LIMITS },
                Limits { budget: Budget::tokens(700), ..LIMITS },
                Limits { dense_len: 700, ..LIMITS },
            ] {
                let out = data.run(&routed(router, limits, Arc::new(Cpu))?, chunk)?;
                assert_eq!(max_difference(&out, &dense)?, 0.0, "{router} {limits:?} chunks of {chunk}");
            }
            let out = data.run(&routed(router, LIMITS, Arc::new(Cpu))?, chunk)?;
            assert!(max_difference(&out, &dense)? > 1e-3, "{router} with a small budget is not dense");
        }
    }
    Ok(())
}

#[test]
fn below_dense_len_the_same_queries_are_dense_however_the_prompt_is_cut() -> Result<()> {
    let data = Data::new(700, 6, 2, 32)?;
    let limits = Limits { dense_len: 256, ..LIMITS };
    let dense = data.run(&RoutedAttention::dense(Arc::new(Cpu)), 64)?;
    let mut outs = Vec::new();
    for chunk in [700, 128, 64] {
        let out = data.run(&routed("bound", limits, Arc::new(Cpu))?, chunk)?;
        assert!(max_difference(&out.narrow(0, 0, 256)?, &dense.narrow(0, 0, 256)?)? < 1e-6);
        assert!(max_difference(&out.narrow(0, 256, 444)?, &dense.narrow(0, 256, 444)?)? > 1e-3);
        outs.push(out);
    }
    for out in &outs[1..] {
        assert!(max_difference(out, &outs[0])? < 1e-5, "chunks of whole tiles change nothing");
    }
    Ok(())
}

#[test]
fn a_larger_budget_selects_a_superset_and_the_budget_holds() -> Result<()> {
    let data = Data::new(500, 4, 2, 16)?;
    for chunk in [64, 1] {
        let mut smaller: Option<Vec<Vec<Option<Vec<usize>>>>> = None;
        for budget in [64, 96, 160, 320] {
            let now = data.selections("bound", Limits { budget: Budget::tokens(budget), ..LIMITS }, chunk)?;
            for (t, heads) in now.iter().enumerate() {
                for (head, blocks) in heads.iter().enumerate() {
                    let blocks = blocks.as_ref().expect("dense_len is 0");
                    // A tile's forced blocks, 0 and up to five edges, may be more than a small budget.
                    assert!(blocks.len() * 16 <= budget.max(6 * 16), "query {t}: {blocks:?} of {budget}");
                    if let Some(smaller) = &smaller {
                        let before = smaller[t][head].as_ref().expect("dense_len is 0");
                        assert!(before.iter().all(|block| blocks.contains(block)), "query {t}: {before:?} then {blocks:?}");
                    }
                }
            }
            smaller = Some(now);
        }
    }
    Ok(())
}

#[test]
fn the_bound_is_never_below_a_true_score() -> Result<()> {
    let data = Data::new(200, 4, 2, 16)?;
    data.run_with(&routed("bound", LIMITS, Arc::new(Cpu))?, 200, |step, q, cache| {
        let store = cache.layer(0);
        let score =
            |name: &str| match block_router::by_name(name).unwrap().score(&Queries { q, step, block_size: 16, tile: 1 }, store).unwrap() {
                BlockScores::PerQuery(scores) => scores,
                other => panic!("{name} gives {other:?}"),
            };
        let (bound, exact) = (score("bound"), score("oracle"));
        for query in 0..200 {
            for head in 0..2 {
                for block in 0..200 / 16 {
                    let (bound, exact) = (bound.row(query, head)[block], exact.row(query, head)[block]);
                    assert!(bound >= exact - 1e-4, "query {query}, head {head}, block {block}: {bound} < {exact}");
                }
            }
        }
    })?;
    Ok(())
}

#[test]
fn spread_is_the_mean_and_a_deviation_in_every_dimension() -> Result<()> {
    let data = Data::new(200, 4, 2, 16)?;
    let (all, keys) = (data.q.to_vec3::<f32>()?, data.k.to_vec3::<f32>()?);
    data.run_with(&routed("spread", LIMITS, Arc::new(Cpu))?, 200, |step, q, cache| {
        let queries = Queries { q, step, block_size: 16, tile: 1 };
        let BlockScores::PerQuery(scores) = block_router::by_name("spread").unwrap().score(&queries, cache.layer(0)).unwrap() else {
            panic!("spread gives no scores")
        };
        for (query, head, block) in [(0, 0, 0), (7, 1, 3), (199, 0, 11), (150, 1, 5)] {
            let of_row = |q: &[f32]| -> f32 {
                let dimension = |d: usize| {
                    let column = || (block * 16..(block + 1) * 16).map(|t| keys[t][head][d]);
                    let mean = column().sum::<f32>() / 16.0;
                    let variance = column().map(|x| (x - mean) * (x - mean)).sum::<f32>() / 16.0;
                    q[d] * mean + q[d].abs() * variance.sqrt()
                };
                (0..16).map(dimension).sum()
            };
            let expected = of_row(&all[query][2 * head]).max(of_row(&all[query][2 * head + 1]));
            let got = scores.row(query, head)[block];
            assert!((got - expected).abs() < 1e-4, "query {query}, head {head}, block {block}: {got}, not {expected}");
        }
    })?;
    Ok(())
}

#[test]
fn ties_go_to_the_later_block() -> Result<()> {
    let mut data = Data::new(400, 2, 1, 16)?;
    data.k = data.k.zeros_like()?; // every block scores 0
    let last = data.selections("mean", Limits { budget: Budget::tokens(80), ..LIMITS }, 1)?.pop().unwrap();
    // The edge of query 399 is block 22; block 0 is forced; three more fit.
    assert_eq!(last[0].as_deref(), Some(&[0, 19, 20, 21, 22][..]));
    Ok(())
}

#[test]
fn a_planted_key_is_found() -> Result<()> {
    let data = Data::new(600, 4, 2, 32)?;
    // Key 200 of head 1 is ten times the last query of its group.
    let planted = (data.q.i((599, 2))? * 10.0)?;
    let mut keys = data.k.to_vec3::<f32>()?;
    keys[200][1] = planted.to_vec1()?;
    let data = Data { k: Tensor::new(keys, &Device::Cpu)?, ..data };
    for router in ["mean", "bound", "spread", "oracle"] {
        let last = data.selections(router, LIMITS, 1)?.pop().unwrap();
        assert!(last[1].as_ref().unwrap().contains(&(200 / 16)), "{router}: {last:?}");
    }
    Ok(())
}

#[test]
fn a_block_that_is_not_selected_changes_nothing_even_full_of_nan() -> Result<()> {
    let data = Data::new(600, 4, 2, 32)?;
    for backend in backends() {
        let attention = routed("recent", LIMITS, backend.clone())?;
        let clean = data.run(&attention, 1)?.i(599)?;
        let poison = |x: &Tensor| -> Result<Tensor> {
            // Blocks 5 to 20: outside block 0, the edge and the window of query 599.
            let poisoned = (x.narrow(0, 80, 256)? * f64::NAN)?;
            Tensor::cat(&[&x.narrow(0, 0, 80)?, &poisoned, &x.narrow(0, 336, 264)?], 0)
        };
        let poisoned = Data { q: data.q.clone(), k: poison(&data.k)?, v: poison(&data.v)? };
        let dirty = poisoned.run(&attention, 1)?.i(599)?;
        assert_eq!(max_difference(&clean, &dirty)?, 0.0, "{}", backend.name());
    }
    Ok(())
}

#[test]
fn after_a_rewind_or_a_failed_step_summaries_are_those_of_the_tokens_that_are_there() -> Result<()> {
    let data = Data::new(600, 4, 2, 32)?;
    let attention = routed("bound", LIMITS, Arc::new(Cpu))?;
    let feed = |cache: &mut KvCache, source: usize, len: usize, commit: bool| -> Result<Tensor> {
        let step = cache.reserve(len)?;
        let part = |x: &Tensor| x.narrow(0, source, len);
        let (q, k, v) = (part(&data.q)?, part(&data.k)?, part(&data.v)?);
        let out = attention.forward(
            0,
            AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale: 0.2 },
            step,
            cache,
        )?;
        if commit {
            cache.commit(step)?;
        }
        Ok(out)
    };
    let mut straight = data.cache(&attention, KvDtype::F32)?;
    feed(&mut straight, 0, 320, true)?;
    let want = feed(&mut straight, 320, 64, true)?;

    let mut detour = data.cache(&attention, KvDtype::F32)?;
    feed(&mut detour, 0, 320, true)?;
    feed(&mut detour, 400, 200, true)?;
    detour.truncate(320)?;
    feed(&mut detour, 450, 128, false)?; // a step that failed in a later layer
    assert_eq!(max_difference(&feed(&mut detour, 320, 64, true)?, &want)?, 0.0);
    Ok(())
}

#[test]
fn the_count_of_keys_read_is_that_of_the_selection() -> Result<()> {
    let data = Data::new(600, 4, 2, 32)?;
    let mut last = None;
    data.run_with(&routed("bound", LIMITS, Arc::new(Cpu))?, 1, |_, _, cache| last = Some(cache.read_count()))?;
    let count = last.unwrap();
    assert_eq!(count.visible, 2 * 600);
    // Six blocks of 16, of which the edge, block 34, reaches from 544 to 559 and its end into the window from 560 on.
    assert_eq!(count.read, 2 * (6 * 16 + 40));
    // Keys and values of 32 numbers; and for each head 37 blocks, each with a largest and a smallest value of 32.
    assert_eq!(count.bytes, count.read * 2 * 32 * 4 + 2 * 37 * 2 * 32 * 4);
    Ok(())
}

#[test]
fn keeping_half_takes_little_more_than_half_the_memory_and_reports_what_is_allocated() -> Result<()> {
    let shape = HeadShape::new(3, 3, 64)?;
    let token = |len: usize, heads: usize| Tensor::zeros((len, heads, 64), DType::F32, &Device::Cpu);
    let limits = Limits { window: 256, dense_len: usize::MAX, ..LIMITS };
    let bytes = |router: Arc<dyn TokenRouter>| -> Result<usize> {
        let attention = RoutedAttention::new(Routing { token_router: router, limits, ..Routing::dense() }, Arc::new(Cpu))?;
        let mut cache = KvCache::new(&attention.layer_specs(&[LayerSpec::full(shape)]), KvDtype::F16.into(), &Device::Cpu, 8192)?;
        let planned = cache.allocated_bytes();
        while cache.len() < 8192 {
            let step = cache.reserve(512)?;
            let x = token(512, 3)?;
            attention.forward(
                0,
                AttentionInput { hidden: &x, projected: None, q: &x, k: &x, k_before_rope: &x, v: &x, scale: 1.0 },
                step,
                &mut cache,
            )?;
            cache.commit(step)?;
        }
        cache.trim()?;
        let store = cache.layer(0);
        let kept: usize = (0..3).map(|head| store.count_admitted(head, 0..store.frontier())).sum();
        let recent = 3 * (8192 - store.frontier());
        // A page of slack for each head, and bits and tables.
        let least = (kept + recent) * 2 * 64 * 2;
        let got = cache.allocated_bytes();
        assert!((least..least + 3 * 64 * 256 + 8192).contains(&got), "{got} bytes for {kept} kept and {recent} recent tokens");
        assert!(planned <= got + got / 8, "{planned} planned, {got} used");
        Ok(got)
    };
    let (half, all) = (bytes(Arc::new(token_router::Random { keep: 0.5 }))?, bytes(Arc::new(token_router::All))?);
    assert!(half as f64 <= 0.58 * all as f64, "{half} of {all}");
    Ok(())
}

#[test]
fn a_short_context_is_dense_and_a_long_one_is_as_it_would_be_without_that() -> Result<()> {
    let (data, dense_len) = (Data::new(600, 4, 2, 32)?, 320);
    let limits = Limits { window: 64, dense_len: usize::MAX, ..LIMITS };
    let attention = |token_router: Arc<dyn TokenRouter>, token_dense_len: usize, backend: &Arc<dyn AttentionBackend>| {
        RoutedAttention::new(Routing { token_router, limits, token_dense_len, ..Routing::dense() }, backend.clone())
    };
    let random = || Arc::new(token_router::Random { keep: 0.3 });
    for backend in backends() {
        let dense = data.run(&attention(Arc::new(token_router::All), 0, &backend)?, 600)?;
        let routed = data.run(&attention(random(), 0, &backend)?, 600)?;
        for chunk in [600, 100, 7, 1] {
            // Not cut: tiles that are before it as a whole.
            let out = data.run(&attention(random(), dense_len + TILE - 1, &backend)?, chunk)?;
            let (short, long) = ((0, dense_len), (dense_len, 600 - dense_len));
            let difference = |want: &Tensor, (from, len)| max_difference(&out.narrow(0, from, len)?, &want.narrow(0, from, len)?);
            let (of_short, of_long) = (difference(&dense, short)?, difference(&routed, long)?);
            assert!(of_short < 1e-5 && of_long < 1e-5, "{} in {chunk}: {of_short} and {of_long}", backend.name());
            assert!(difference(&dense, long)? > 1e-2, "{} in {chunk}: nothing is hidden", backend.name());
        }
    }
    // Nothing leaves as long as a query may ask for it, and nobody goes back to where it would.
    let routed = attention(random(), dense_len, &backends()[1])?;
    let mut cache = data.cache(&routed, KvDtype::F16)?;
    let mut frontiers = Vec::new();
    for len in [200, 120, 1, 99] {
        let step = cache.reserve(len)?;
        let part = |x: &Tensor| x.narrow(0, step.start, len);
        let (q, k, v) = (part(&data.q)?, part(&data.k)?, part(&data.v)?);
        let input = AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale: 0.2 };
        routed.forward(0, input, step, &mut cache)?;
        frontiers.push((cache.layer(0).frontier(), cache.oldest_restorable()));
        cache.commit(step)?;
    }
    assert_eq!(frontiers, [(0, 0), (0, 0), (256, 320), (256, 320)]);
    assert!(cache.truncate(319).is_err() && cache.truncate(330).is_ok());
    Ok(())
}

#[test]
fn a_prompt_that_misses_nothing_keeps_what_waits_for_verdicts_until_the_next_query_asks() -> Result<()> {
    let data = Data::new(300, 4, 2, 32)?;
    let limits = Limits { window: 64, dense_len: usize::MAX, ..LIMITS };
    let token_router = Arc::new(token_router::Random { keep: 0.3 });
    let routed = RoutedAttention::new(Routing { token_router, limits, token_dense_prompt: 300, ..Routing::dense() }, Arc::new(Cpu))?;
    // The last `wait` tokens of a prompt of `len`, of which `read` are read, wait; the others are decided on.
    let prompt = |len: usize, read: usize, wait: usize| -> Result<KvCache> {
        let mut cache = data.cache(&routed, KvDtype::F16)?;
        cache.begin_prompt(len);
        for part in [read - wait, wait].into_iter().filter(|part| *part > 0) {
            let step = cache.reserve(part)?;
            let of = |x: &Tensor| x.narrow(0, step.start, part);
            let (q, k, v) = (of(&data.q)?, of(&data.k)?, of(&data.v)?);
            let input = AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale: 0.2 };
            routed.forward(0, input, step, &mut cache)?;
            if step.end() == read && wait > 0 {
                cache.wait_for_verdicts(step, &[], 0)?;
            }
            cache.commit_untold(step)?;
        }
        cache.end_prompt();
        Ok(cache)
    };
    let dense_len = |cache: &KvCache| cache.layer(0).local().expect("it is routed").dense_len;
    let asks = |cache: &KvCache| cache.needs_verdicts(Step { start: cache.len(), len: 1 });
    let all_read = |cache: &KvCache| cache.read_count().read == cache.read_count().visible;
    // All of it waits, or what is hidden from the next query does not.
    let mut whole = prompt(300, 300, 300)?;
    assert!(dense_len(&whole) == 300 && asks(&whole) && all_read(&whole) && whole.layer(0).frontier() == 0);
    whole.truncate(280)?;
    assert!(dense_len(&whole) == 280 && asks(&whole), "gone back");
    whole.truncate(50)?;
    assert!(dense_len(&whole) == 0 && !asks(&whole), "to where nothing is hidden");
    for (len, wait) in [(300, 0), (300, 40), (200, 0)] {
        let cache = prompt(len, len, wait)?;
        assert!(dense_len(&cache) == 0 && !asks(&cache) && all_read(&cache), "{len}, of which {wait} wait");
    }
    // One that is stopped is as one that ends there, and a longer one is routed.
    let stopped = prompt(300, 200, 200)?;
    assert!(dense_len(&stopped) == 200 && asks(&stopped) && all_read(&stopped));
    assert!(!all_read(&prompt(301, 300, 0)?));
    Ok(())
}

#[test]
fn a_fork_goes_its_own_way() -> Result<()> {
    let data = Data::new(400, 4, 2, 32)?;
    let routing = Routing { token_router: Arc::new(token_router::Random::default()), limits: LIMITS, ..Routing::dense() };
    let routing = Routing { block_router: block_router::by_name("mean").expect("listed"), ..routing };
    let attention = RoutedAttention::new(routing, Arc::new(Cpu))?;
    let feed = |cache: &mut KvCache, source: usize, len: usize| -> Result<Tensor> {
        let step = cache.reserve(len)?;
        let part = |x: &Tensor| x.narrow(0, source, len);
        let (q, k, v) = (part(&data.q)?, part(&data.k)?, part(&data.v)?);
        let out = attention.forward(
            0,
            AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale: 0.2 },
            step,
            cache,
        )?;
        cache.commit(step)?;
        Ok(out)
    };
    let mut trunk = data.cache(&attention, KvDtype::F16)?;
    feed(&mut trunk, 0, 256)?;
    let mut branch = trunk.fork()?;
    let other = feed(&mut branch, 300, 64)?;
    let own = feed(&mut trunk, 256, 64)?;
    assert!(max_difference(&other, &own)? > 1e-3);
    let mut straight = data.cache(&attention, KvDtype::F16)?;
    feed(&mut straight, 0, 256)?;
    assert_eq!(max_difference(&feed(&mut straight, 256, 64)?, &own)?, 0.0);
    Ok(())
}

#[test]
fn a_layer_may_have_a_budget_of_its_own() -> Result<()> {
    let data = Data::new(600, 4, 2, 32)?;
    let read = |layer_budgets: Vec<f32>| -> Result<u64> {
        let mut attention = routed("bound", LIMITS, Arc::new(Cpu))?;
        attention = attention.with_routing(Routing { layer_budgets, ..attention.routing().clone() })?;
        let mut last = 0;
        data.run_with(&attention, 1, |_, _, cache| last = cache.read_count().read)?;
        Ok(last)
    };
    // Of 96 tokens beyond the window; twice that is six blocks more, half is three fewer.
    let (own, double, half) = (read(vec![])?, read(vec![2.0])?, read(vec![0.5, 7.0])?);
    assert_eq!((double - own, own - half), (2 * 96, 2 * 48));
    Ok(())
}
