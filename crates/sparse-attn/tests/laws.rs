//! The laws of routed attention on generated shapes, settings and numbers, over every router and storage.

use candle_core::{Device, Result, Tensor};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use sparse_attn::backend::{AttentionBackend, Cpu, Reference};
use sparse_attn::block_router::Queries;
use sparse_attn::select::{Budget, Limits, Selection, TILE, select};
use sparse_attn::{AttentionInput, HeadShape, KvCache, KvDtype, LayerSpec, RoutedAttention, Routing, block_router, token_router};
use std::sync::Arc;

#[derive(Debug, Clone)]
struct Case {
    kv_heads: usize,
    group_size: usize,
    head_dim: usize,
    tokens: usize,
    limits: Limits,
    dtype: KvDtype,
    token_router: usize,
    block_router: usize,
    chunk: usize,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let shape = (1..=3usize, 1..=16usize, prop::sample::select(vec![16, 64, 80, 96, 128, 256]), 1..=260usize);
    let limits = (1..=80usize, 0..=8usize, 1..=40usize, 1..=200usize, 0..=150usize, prop::sample::select(vec![1, TILE, 64]));
    let limits = limits.prop_map(|(window, sinks, block_size, budget, dense_len, tile)| Limits {
        window,
        sinks,
        block_size,
        budget: Budget::tokens(budget),
        dense_len,
        tile,
    });
    let choices = (prop::sample::select(KvDtype::ALL.to_vec()), 0..token_router::all().len(), 0..block_router::all().len());
    (shape, limits, choices, 1..=130usize, any::<u64>()).prop_map(|(shape, limits, choices, chunk, seed)| {
        let ((kv_heads, group_size, head_dim, tokens), (dtype, token_router, block_router)) = (shape, choices);
        Case { kv_heads, group_size, head_dim, tokens, limits, dtype, token_router, block_router, chunk, seed }
    })
}

/// Of one query: the selected blocks of each head; `None`: everything.
type Selected = Vec<Option<Vec<usize>>>;

impl Case {
    fn tensor(&self, heads: usize, stream: u64) -> Result<Tensor> {
        let mut state = self.seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        };
        let values: Vec<f32> = (0..self.tokens * heads * self.head_dim).map(|_| next()).collect();
        Tensor::from_vec(values, (self.tokens, heads, self.head_dim), &Device::Cpu)
    }

    fn attention(&self, limits: Limits, backend: Arc<dyn AttentionBackend>) -> Result<RoutedAttention> {
        let (token_router, block_router) = (token_router::all()[self.token_router].clone(), block_router::all()[self.block_router].clone());
        // What is dropped stays longer than queries that select see it, in some cases.
        let token_window = self.seed.is_multiple_of(2).then_some(limits.window + (self.seed / 2 % 90) as usize);
        // Short contexts are dense, in some cases.
        let token_dense_len = (self.seed / 180 % 4 * 50) as usize;
        RoutedAttention::new(Routing { token_router, block_router, limits, token_window, token_dense_len, ..Routing::dense() }, backend)
    }

    /// The output, the selection of every query, and the cache.
    fn run(&self, attention: &RoutedAttention, chunk: usize) -> Result<(Tensor, Vec<Selected>, KvCache)> {
        let q_heads = self.kv_heads * self.group_size;
        let (q, k, v) = (self.tensor(q_heads, 1)?, self.tensor(self.kv_heads, 2)?, self.tensor(self.kv_heads, 3)?);
        let spec = LayerSpec::full(HeadShape::new(q_heads, self.kv_heads, self.head_dim)?);
        let mut cache = KvCache::new(&attention.layer_specs(&[spec]), self.dtype.into(), &Device::Cpu, 0)?;
        let (mut parts, mut selections) = (Vec::new(), Vec::new());
        while cache.len() < self.tokens {
            let step = cache.reserve(chunk.min(self.tokens - cache.len()))?;
            let part = |x: &Tensor| x.narrow(0, step.start, step.len);
            let (q, k, v) = (part(&q)?, part(&k)?, part(&v)?);
            let scale = (self.head_dim as f32).powf(-0.5);
            parts.push(attention.forward(
                0,
                AttentionInput { hidden: &q, projected: None, q: &q, k: &k, k_before_rope: &k, v: &v, scale },
                step,
                &mut cache,
            )?);
            let (limits, store) = (&attention.routing().limits, cache.layer(0));
            let selection = if step.end() <= limits.dense_len {
                Selection::Every
            } else {
                select(
                    &attention
                        .routing()
                        .block_router
                        .score(&Queries { q: &q, step, block_size: limits.block_size, tile: limits.tile }, store)?,
                    limits,
                    step,
                    store,
                )
            };
            for t in step.start..step.end() {
                let of_head = |head| match &selection {
                    Selection::Every => None,
                    Selection::Blocks(blocks) => blocks.blocks(t, head),
                };
                selections.push((0..self.kv_heads).map(of_head).collect());
            }
            cache.commit(step)?;
            if chunk > 1 && step.start % 3 == 0 {
                cache.trim()?;
            }
        }
        Ok((Tensor::cat(&parts, 0)?, selections, cache))
    }
}

fn max_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, rng_seed: RngSeed::Fixed(7), ..ProptestConfig::default() })]

    #[test]
    fn the_cpu_is_the_reference(case in cases()) {
        let reference = case.run(&case.attention(case.limits, Arc::new(Reference)).unwrap(), case.chunk).unwrap();
        let cpu = case.run(&case.attention(case.limits, Arc::new(Cpu)).unwrap(), case.chunk).unwrap();
        let difference = max_difference(&reference.0, &cpu.0).unwrap();
        prop_assert!(difference < 2e-5, "{difference}");
        prop_assert_eq!(&reference.1, &cpu.1);
    }

    #[test]
    fn admissions_and_selections_do_not_depend_on_chunks(case in cases()) {
        let attention = case.attention(case.limits, Arc::new(Cpu)).unwrap();
        // A block that reaches beyond its query would count tokens to come (see Limits).
        prop_assume!(case.limits.window + 1 >= case.limits.block_size);
        // Shared selections: whole tiles. Selections of their own: any chunks.
        let chunks = if case.limits.tile == 1 { [case.tokens, case.chunk, 1] } else { [case.tokens, 64, 128] };
        let runs: Vec<_> = chunks.iter().map(|chunk| case.run(&attention, *chunk).unwrap()).collect();
        let all = |selected: &Selected| selected.iter().all(Option::is_none);
        for run in &runs[1..] {
            let difference = max_difference(&run.0, &runs[0].0).unwrap();
            prop_assert!(difference < 2e-5, "{difference}");
            for (a, b) in run.1.iter().zip(&runs[0].1) {
                // A step that fits whole says so in another way.
                prop_assert!(a == b || all(a) || all(b), "{a:?} {b:?}");
            }
            for head in 0..case.kv_heads {
                let admitted = |cache: &KvCache| cache.layer(0).count_admitted(head, 0..case.tokens);
                prop_assert_eq!(admitted(&run.2), admitted(&runs[0].2));
            }
        }
    }

    #[test]
    fn a_larger_budget_selects_a_superset_and_an_endless_one_is_dense_bit_for_bit(case in cases()) {
        let with = |budget| case.run(&case.attention(Limits { budget, ..case.limits }, Arc::new(Cpu)).unwrap(), case.chunk).unwrap();
        let (small, large) = (with(case.limits.budget), with(Budget::tokens(case.limits.budget.tokens + 64)));
        for (small, large) in small.1.iter().flatten().zip(large.1.iter().flatten()) {
            if let (Some(small), Some(large)) = (small, large) {
                prop_assert!(small.iter().all(|block| large.contains(block)), "{small:?} {large:?}");
            }
        }
        if block_router::all()[case.block_router].name() != "recent" {
            let everything = with(Budget::ALL).0;
            let dense = Case { block_router: 0, ..case.clone() };
            let dense = dense.run(&dense.attention(case.limits, Arc::new(Cpu)).unwrap(), case.chunk).unwrap().0;
            prop_assert_eq!(max_difference(&everything, &dense).unwrap(), 0.0);
        }
    }
}
