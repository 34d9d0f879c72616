//! What was measured, projected to a request of the user's kind, in seconds, joules and money.

use super::results::SideResults;
use crate::args::Mix;

/// A request on one side.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Request {
    pub(super) prompt_seconds: f64,
    pub(super) output_seconds: f64,
    pub(super) joules: Option<f64>,
    /// Whether it is longer than what was measured.
    pub(super) extrapolated: bool,
}

impl Request {
    pub(super) fn seconds(&self) -> f64 {
        self.prompt_seconds + self.output_seconds
    }
}

/// A request of `mix`, between the depths that were measured; beyond them, as the last two go on.
pub(super) fn request(side: &SideResults, mix: Mix) -> Option<Request> {
    let depths = side.depths();
    let deepest = *depths.last()?;
    let (prompt, output) = (f64::from(mix.prompt), f64::from(mix.output));
    let mut prompts = vec![(0.0, 0.0)];
    let (mut tokens, mut energy, mut prompt_energy) = (Vec::new(), Vec::new(), vec![(0.0, 0.0)]);
    for depth in depths {
        let at = side.at(depth)?;
        prompts.push((at.prompt_tokens as f64, at.prompt_seconds.median));
        tokens.push((depth as f64, at.decode_seconds.median));
        energy.extend(at.decode_joules.map(|joules| (depth as f64, joules)));
        prompt_energy.extend(at.prompt_joules.map(|joules| (at.prompt_tokens as f64, joules)));
    }
    // Output tokens find the prompt and, on average, half of the output before them.
    let middle = prompt + output / 2.0;
    let joules = (!energy.is_empty()).then(|| interpolated(&mut prompt_energy, prompt) + output * interpolated(&mut energy, middle));
    Some(Request {
        prompt_seconds: interpolated(&mut prompts, prompt),
        output_seconds: output * interpolated(&mut tokens, middle),
        joules,
        extrapolated: middle > deepest.max(side.at(0).map_or(0, |at| at.prompt_tokens)) as f64,
    })
}

/// The value at `x` of the lines between `points`; outside them, of the nearest line.
fn interpolated(points: &mut [(f64, f64)], x: f64) -> f64 {
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let [.., before, last] = &*points else { return points.first().map_or(f64::NAN, |point| point.1) };
    let (a, b) = points.windows(2).map(|pair| (&pair[0], &pair[1])).find(|(_, b)| x <= b.0).unwrap_or((before, last));
    if b.0 == a.0 { b.1 } else { a.1 + (b.1 - a.1) * (x - a.0) / (b.0 - a.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_points_lines_and_beyond_them_the_last_one() {
        let mut points = [(4.0, 8.0), (0.0, 0.0), (2.0, 2.0)];
        for (x, want) in [(0.0, 0.0), (1.0, 1.0), (3.0, 5.0), (4.0, 8.0), (6.0, 14.0)] {
            assert_eq!(interpolated(&mut points, x), want);
        }
        assert_eq!(interpolated(&mut [(0.0, 3.0)], 9.0), 3.0);
    }
}
