use super::{Admission, RouterInput, TokenRouter};
use candle_core::Result;

/// Keeps tokens by a hash of layer, head and position: what any trained router must beat.
#[derive(Debug, Clone, Copy)]
pub struct Random {
    /// The part of the tokens that is kept, 0 to 1.
    pub keep: f32,
}

impl Default for Random {
    fn default() -> Self {
        Self { keep: 0.5 }
    }
}

impl TokenRouter for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn kept_fraction(&self) -> f32 {
        self.keep.min(0.999)
    }

    fn reads_keys(&self, _layer: usize) -> bool {
        false
    }

    fn admit(&self, layer: usize, input: RouterInput<'_>) -> Result<Admission> {
        let kv_heads = input.k.dim(1)?;
        let verdict = |index: usize| {
            let position = input.step.start + index / kv_heads;
            uniform([layer as u64, (index % kv_heads) as u64, position as u64]) < self.keep
        };
        Ok(Admission::Some((0..input.step.len * kv_heads).map(verdict).collect()))
    }
}

/// A number in `[0, 1)` that looks random: the finaliser of splitmix64 over each part.
fn uniform(parts: [u64; 3]) -> f32 {
    let hash = parts.into_iter().fold(0x9e37_79b9_7f4a_7c15_u64, |hash, part| {
        let mut z = hash.wrapping_add(part).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    });
    (hash >> 40) as f32 / (1u64 << 24) as f32
}
