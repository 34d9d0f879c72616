//! From logits to a token.

use candle_core::{Result, bail};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen. Filters apply in the order of the fields, as in llama.cpp.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerOptions {
    /// Divides positive and multiplies negative logits of recent tokens (1: off).
    pub repeat_penalty: f32,
    /// Recent tokens that the three penalties look at.
    pub repeat_last_n: usize,
    /// Subtracted once from the logit of each recent token (0: off).
    pub presence_penalty: f32,
    /// Subtracted from the logit of a recent token for each time it occurs (0: off).
    pub frequency_penalty: f32,
    /// Keep this many of the likeliest tokens (0: all).
    pub top_k: usize,
    /// Keep the likeliest tokens that reach this probability together (1: all).
    pub top_p: f32,
    /// Drop tokens below this fraction of the likeliest one's probability (0: none).
    pub min_p: f32,
    /// Divides logits before drawing; 0 takes the likeliest token (greedy).
    pub temperature: f32,
    /// Same seed, same text.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            temperature: 0.8,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// The likeliest token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// # Errors
    /// If a number is out of its range; the message names it.
    pub fn check(&self) -> Result<()> {
        let range = |name: &str, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) { Ok(()) } else { bail!("{name} is {value}, expected {low} to {high}") }
        };
        range("repeat-penalty", self.repeat_penalty, f32::MIN_POSITIVE, 100.0)?;
        range("presence-penalty", self.presence_penalty, -100.0, 100.0)?;
        range("frequency-penalty", self.frequency_penalty, -100.0, 100.0)?;
        range("top-p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        range("min-p", self.min_p, 0.0, 1.0)?;
        range("temp", self.temperature, 0.0, 100.0)
    }
}

/// Draws tokens; holds the random state.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// # Errors
    /// If an option is out of its range.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.check()?;
        Ok(Self { rng: ChaCha8Rng::seed_from_u64(options.seed), options })
    }

    /// The next token. `history`: the tokens so far, newest last.
    ///
    /// # Errors
    /// If a logit is NaN or infinite: the weights or a kernel are broken.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        if let Some(id) = logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
            bail!("the logit of token {id} is {}: the weights are damaged, or a kernel is wrong", logits[id]);
        }
        let mut candidates: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
        self.penalise(&mut candidates, history);
        self.sample_of(candidates)
    }

    /// How many of the likeliest tokens are enough to choose from, whatever came before; `None`: all.
    pub fn enough(&self) -> Option<usize> {
        match (self.options.temperature, self.options.top_k) {
            _ if self.penalises() => None,
            (0.0, _) => Some(1),
            (_, 0) => None,
            (_, top_k) => Some(top_k),
        }
    }

    /// The next token, where `candidates` are at least the [`Sampler::enough`] likeliest and their logits: the one that
    /// [`Sampler::sample`] takes of all.
    ///
    /// # Errors
    /// If there is none.
    pub fn sample_of(&mut self, mut candidates: Vec<(u32, f32)>) -> Result<u32> {
        if candidates.is_empty() {
            bail!("no logits to sample from");
        }
        if self.options.temperature == 0.0 {
            return Ok(likeliest(&candidates));
        }
        self.filter(&mut candidates);
        Ok(self.draw(&candidates))
    }

    fn penalises(&self) -> bool {
        let options = &self.options;
        options.repeat_penalty != 1.0 || options.presence_penalty != 0.0 || options.frequency_penalty != 0.0
    }

    fn penalise(&self, candidates: &mut [(u32, f32)], history: &[u32]) {
        let options = &self.options;
        if !self.penalises() {
            return;
        }
        let mut recent = history[history.len().saturating_sub(options.repeat_last_n)..].to_vec();
        recent.sort_unstable();
        for run in recent.chunk_by(|a, b| a == b) {
            let Some((_, logit)) = candidates.get_mut(run[0] as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / options.repeat_penalty } else { *logit * options.repeat_penalty };
            *logit -= options.presence_penalty + options.frequency_penalty * run.len() as f32;
        }
    }

    /// Leaves what top-k, top-p and min-p leave, likeliest first; at least one.
    fn filter(&self, candidates: &mut Vec<(u32, f32)>) {
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if self.options.top_k > 0 && self.options.top_k < candidates.len() {
            candidates.select_nth_unstable_by(self.options.top_k - 1, order);
            candidates.truncate(self.options.top_k);
        }
        candidates.sort_unstable_by(order);
        if self.options.top_p < 1.0 {
            let weights = weights(candidates, 1.0);
            let reach = weights.iter().sum::<f64>() * f64::from(self.options.top_p);
            let mut sum = 0.0;
            let reaches = weights.iter().position(|weight| {
                sum += weight;
                sum >= reach
            });
            candidates.truncate(reaches.map_or(candidates.len(), |last| last + 1));
        }
        if self.options.min_p > 0.0 {
            let least = candidates[0].1 + self.options.min_p.ln();
            candidates.retain(|(_, logit)| *logit >= least);
        }
    }

    fn draw(&mut self, candidates: &[(u32, f32)]) -> u32 {
        let weights = weights(candidates, self.options.temperature);
        let mut at = self.rng.random::<f64>() * weights.iter().sum::<f64>();
        for ((id, _), weight) in candidates.iter().zip(&weights) {
            at -= weight;
            if at < 0.0 {
                return *id;
            }
        }
        candidates[0].0 // rounding left `at` at the very end
    }
}

/// `exp((logit - max) / temperature)`; `candidates` are sorted, likeliest first.
fn weights(candidates: &[(u32, f32)], temperature: f32) -> Vec<f64> {
    let max = candidates[0].1;
    candidates.iter().map(|(_, logit)| f64::from((logit - max) / temperature).exp()).collect()
}

/// The highest logit; of equal ones the lowest id.
fn likeliest(candidates: &[(u32, f32)]) -> u32 {
    let better = |a: (u32, f32), b: (u32, f32)| b.1 > a.1 || b.1 == a.1 && b.0 < a.0;
    candidates.iter().fold(candidates[0], |best, other| if better(best, *other) { *other } else { best }).0
}

/// The `n` likeliest tokens and their log-probabilities, likeliest first, and that of `id`.
pub fn logprobs(logits: &[f32], id: u32, n: usize) -> (f32, Vec<(u32, f32)>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total = logits.iter().map(|logit| f64::from(logit - max).exp()).sum::<f64>().ln() as f32 + max;
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let n = n.min(order.len());
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, by_logit);
    }
    order.truncate(n);
    order.sort_unstable_by(by_logit);
    (logits[id as usize] - total, order.into_iter().map(|id| (id, logits[id as usize] - total)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 3.0];

    fn drawn(options: SamplerOptions) -> Vec<u32> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut ids: Vec<u32> = (0..2000).map(|_| sampler.sample(&LOGITS, &[]).unwrap()).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    fn open() -> SamplerOptions {
        SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.0, temperature: 1.0, ..SamplerOptions::default() }
    }

    #[test]
    fn greedy_takes_the_first_of_the_highest() {
        assert_eq!(Sampler::new(SamplerOptions::greedy()).unwrap().sample(&LOGITS, &[]).unwrap(), 1);
    }

    #[test]
    fn the_likeliest_are_enough() {
        let logits: Vec<f32> = (0..200).map(|i| ((i * 7919) % 257) as f32 / 20.0).collect();
        for options in [SamplerOptions::default(), SamplerOptions { top_k: 7, top_p: 1.0, ..open() }, SamplerOptions::greedy()] {
            let (mut whole, mut part) = (Sampler::new(options.clone()).unwrap(), Sampler::new(options).unwrap());
            let mut best: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
            best.sort_by(|a, b| b.1.total_cmp(&a.1));
            best.truncate(part.enough().unwrap() + 5);
            best.reverse();
            for _ in 0..500 {
                assert_eq!(whole.sample(&logits, &[]).unwrap(), part.sample_of(best.clone()).unwrap());
            }
        }
        assert_eq!(Sampler::new(SamplerOptions { repeat_penalty: 1.1, ..SamplerOptions::default() }).unwrap().enough(), None);
        assert_eq!(Sampler::new(open()).unwrap().enough(), None);
    }

    #[test]
    fn each_filter_leaves_what_it_says() {
        assert_eq!(drawn(open()), [0, 1, 2, 3, 4]);
        assert_eq!(drawn(SamplerOptions { top_k: 3, ..open() }), [1, 2, 4]);
        // Probabilities: .40 .40 .15 .05 .01
        assert_eq!(drawn(SamplerOptions { top_p: 0.5, ..open() }), [1, 4]);
        assert_eq!(drawn(SamplerOptions { top_p: 0.3, ..open() }), [1]);
        assert_eq!(drawn(SamplerOptions { min_p: 0.3, ..open() }), [1, 2, 4]);
        assert_eq!(drawn(SamplerOptions { min_p: 1.0, ..open() }), [1, 4]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let mut sampler = Sampler::new(open()).unwrap();
        let hits = (0..20_000).filter(|_| sampler.sample(&LOGITS, &[]).unwrap() == 2).count();
        let total: f64 = LOGITS.iter().map(|logit| f64::from(*logit).exp()).sum();
        assert!((hits as f64 / 20_000.0 - 2f64.exp() / total).abs() < 0.01, "{hits}");
    }

    #[test]
    fn penalties_reach_only_recent_tokens() {
        let greedy = |options: SamplerOptions, history: &[u32]| Sampler::new(options).unwrap().sample(&LOGITS, history).unwrap();
        let base = SamplerOptions::greedy();
        assert_eq!(greedy(SamplerOptions { repeat_penalty: 2.0, ..base.clone() }, &[1]), 4);
        assert_eq!(greedy(SamplerOptions { repeat_penalty: 2.0, repeat_last_n: 1, ..base.clone() }, &[1, 0]), 1);
        assert_eq!(greedy(SamplerOptions { presence_penalty: 1.5, ..base.clone() }, &[1, 4]), 2);
        assert_eq!(greedy(SamplerOptions { frequency_penalty: 0.6, ..base }, &[1, 1, 4]), 4);
    }

    #[test]
    fn same_seed_same_draws() {
        let run = |seed| {
            let mut sampler = Sampler::new(SamplerOptions { seed, ..open() }).unwrap();
            (0..50).map(|_| sampler.sample(&LOGITS, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn broken_logits_and_settings_are_errors() {
        let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
        assert!(sampler.sample(&[0.0, f32::NAN], &[]).unwrap_err().to_string().contains("token 1"));
        for options in [
            SamplerOptions { temperature: f32::NAN, ..open() },
            SamplerOptions { temperature: -1.0, ..open() },
            SamplerOptions { top_p: 0.0, ..open() },
            SamplerOptions { min_p: 2.0, ..open() },
            SamplerOptions { repeat_penalty: 0.0, ..open() },
        ] {
            assert!(Sampler::new(options.clone()).is_err(), "{options:?}");
        }
    }

    #[test]
    fn logprobs_are_normalised_and_sorted() {
        let (own, top) = logprobs(&LOGITS, 2, 5);
        assert!((top.iter().map(|(_, p)| p.exp()).sum::<f32>() - 1.0).abs() < 1e-5);
        assert_eq!(top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 4, 2, 0, 3]);
        assert_eq!(own, top[2].1);
        assert!(logprobs(&LOGITS, 2, 0).1.is_empty());
    }
}
