//! What the routers did with a prompt: which tokens were kept, which blocks were read, and how much attention that caught.

use crate::CausalLm;
use crate::generate::{GenerateOptions, Session};
use crate::sampler::{Sampler, SamplerOptions};
use candle_core::{DType, Result};
use sparse_attn::{Attended, KvDtypes, Observer, RoutedAttention};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

/// What was seen of one layer, over all decoded tokens and heads.
#[derive(Debug, Clone, Default)]
pub struct LayerTrace {
    /// Whether every visible block was read, always.
    pub reads_everything: bool,
    /// Of the attention that dense gives (softmax over all keys), the part that fell on keys that were read; the mean.
    pub recall: f64,
    /// Keys read over keys visible.
    pub density: f64,
    /// Per block of positions: the part of (token, head) pairs that read some of it.
    pub read: Vec<f32>,
    /// Per block of positions: the part of its tokens that the token router kept, over all heads.
    pub kept: Vec<f32>,
}

/// One decoded token.
#[derive(Debug, Clone)]
pub struct StepTrace {
    /// Its position; it is the query.
    pub position: usize,
    /// Its id.
    pub token: u32,
    /// Per layer and key/value head: the positions read, as ranges.
    pub reads: Vec<Vec<Vec<[usize; 2]>>>,
    /// Per layer: recall of this token.
    pub recall: Vec<f64>,
}

/// What was seen of a prompt and the tokens that followed.
#[derive(Debug, Clone)]
pub struct Trace {
    /// The prompt and what was generated.
    pub tokens: Vec<u32>,
    /// Of these, the prompt's.
    pub prompt_tokens: usize,
    /// Positions per block of [`LayerTrace::read`].
    pub block_size: usize,
    /// All layers.
    pub layers: Vec<LayerTrace>,
    /// All decoded tokens.
    pub steps: Vec<StepTrace>,
}

/// Per layer and head, what the newest token read; then what dense attention would have given to it.
#[derive(Debug, Default)]
struct Reads(Mutex<Vec<Vec<Vec<usize>>>>);

impl Observer for Reads {
    fn attended(&self, seen: Attended<'_>) -> Result<()> {
        if seen.step.len == 1
            && let Ok(mut layers) = self.0.lock()
        {
            let heads = 0..seen.store.shape().kv_heads();
            layers.push(heads.map(|head| seen.selection.positions(seen.store, seen.step.start, head)).collect());
        }
        Ok(())
    }
}

/// Per layer, the dense attention of the newest token that falls on what the routed one read.
#[derive(Debug)]
struct Recall {
    reads: Arc<Reads>,
    layers: Mutex<Vec<f64>>,
}

impl Observer for Recall {
    fn attended(&self, seen: Attended<'_>) -> Result<()> {
        let (Ok(reads), Ok(mut layers)) = (self.reads.0.lock(), self.layers.lock()) else { return Ok(()) };
        let Some(heads) = reads.get(seen.layer).filter(|_| seen.step.len == 1) else { return Ok(()) };
        let shape = seen.store.shape();
        let q = seen.q.to_dtype(DType::F32)?.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        let (head_dim, group_size, t) = (shape.head_dim(), shape.group_size(), seen.step.start);
        let mut total = 0f64;
        for (head, read) in heads.iter().enumerate() {
            let (positions, keys) = seen.store.admitted_keys(head, seen.store.first_visible(t)..t + 1)?;
            for q in q[head * group_size * head_dim..][..group_size * head_dim].chunks_exact(head_dim) {
                let scores: Vec<f32> = keys.chunks_exact(head_dim).map(|key| dot(q, key) * seen.scale).collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let (mut all, mut caught) = (0f64, 0f64);
                let mut read = read.iter().peekable();
                for (position, score) in positions.iter().zip(&scores) {
                    let weight = f64::from((score - max).exp());
                    all += weight;
                    if read.next_if(|next| *next == position).is_some() {
                        caught += weight;
                    }
                }
                total += caught / all;
            }
        }
        layers.push(total / shape.q_heads() as f64);
        Ok(())
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Computes `prompt`, decodes `steps` tokens (the likeliest ones) and watches what they read. Beside the sequence runs a dense one
/// of the same tokens, whose attention the recall is measured in. `progress` is told how many tokens of the prompt are
/// done, and may stop it there: then there is no trace.
///
/// # Errors
/// If the prompt is empty or memory runs out.
pub fn trace(
    model: &Arc<dyn CausalLm>,
    attention: &RoutedAttention,
    dtypes: KvDtypes,
    prompt: &[u32],
    steps: usize,
    chunk: usize,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Trace>> {
    let reads = Arc::new(Reads::default());
    let recall = Arc::new(Recall { reads: reads.clone(), layers: Mutex::default() });
    let capacity = prompt.len() + steps;
    let session = |attention| Session::new(model.clone(), attention, dtypes, model.device(), capacity);
    let mut routed = session(attention.observed(reads.clone()))?;
    let mut dense = session(attention.to_dense().observed(recall.clone()))?;
    for (session, before) in [(&mut routed, 0), (&mut dense, prompt.len())] {
        if !session.prefill(prompt, chunk, |done, _| progress(before + done))? {
            return Ok(None);
        }
    }
    let block_size = attention.routing().limits.block_size;
    let (layers, kv_heads) = (model.config().num_layers, model.config().heads.kv_heads());
    let blocks = capacity.div_ceil(block_size);
    let mut seen = vec![LayerTrace { reads_everything: true, read: vec![0.0; blocks], ..LayerTrace::default() }; layers];
    let mut made = Vec::with_capacity(steps);
    let mut sampler = Sampler::new(SamplerOptions::greedy())?;
    for step in 0..steps {
        let options = GenerateOptions { max_tokens: Some(1), end_tokens: Vec::new(), context: usize::MAX, logprobs: 0 };
        let Some(token) = routed.generate(&mut sampler, options).next().transpose()? else { break };
        clear(&reads.0);
        clear(&recall.layers);
        routed.logits()?;
        dense.prefill(&[token.id], 1, |_, _| ControlFlow::Continue(()))?;
        let position = prompt.len() + step;
        let (Ok(reads), Ok(recall)) = (reads.0.lock(), recall.layers.lock()) else { break };
        for (layer, (heads, recall)) in reads.iter().zip(recall.iter()).enumerate() {
            let layer = &mut seen[layer];
            layer.recall += recall;
            for positions in heads {
                layer.density += positions.len() as f64 / (position + 1) as f64 / kv_heads as f64;
                layer.reads_everything &= positions.len() == position + 1;
                let mut last = None;
                for block in positions.iter().map(|position| position / block_size) {
                    if last != Some(block) {
                        layer.read[block] += 1.0 / kv_heads as f32;
                        last = Some(block);
                    }
                }
            }
        }
        let ranges = reads.iter().map(|heads| heads.iter().map(|positions| ranges(positions)).collect()).collect();
        made.push(StepTrace { position, token: token.id, reads: ranges, recall: recall.clone() });
    }
    let count = made.len().max(1);
    for (index, layer) in seen.iter_mut().enumerate() {
        layer.recall /= count as f64;
        layer.density /= count as f64;
        layer.read.iter_mut().for_each(|read| *read /= count as f32);
        let cached = routed.cached();
        let store = routed.cache()?.layer(index);
        layer.kept = (0..blocks)
            .map(|block| {
                let range = block * block_size..((block + 1) * block_size).min(cached);
                let kept: usize = (0..kv_heads).map(|head| store.count_admitted(head, range.clone())).sum();
                kept as f32 / (range.len().max(1) * kv_heads) as f32
            })
            .collect();
    }
    Ok(Some(Trace { tokens: routed.tokens().to_vec(), prompt_tokens: prompt.len(), block_size, layers: seen, steps: made }))
}

fn clear<T>(list: &Mutex<Vec<T>>) {
    if let Ok(mut list) = list.lock() {
        list.clear();
    }
}

/// Ascending positions as ranges `[first, after]`.
pub fn ranges(positions: &[usize]) -> Vec<[usize; 2]> {
    let mut ranges: Vec<[usize; 2]> = Vec::new();
    for position in positions {
        match ranges.last_mut() {
            Some(last) if last[1] == *position => last[1] += 1,
            _ => ranges.push([*position, position + 1]),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn neighbours_join() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), [[0, 3], [5, 6], [7, 9]]);
        assert!(ranges(&[]).is_empty());
    }
}
