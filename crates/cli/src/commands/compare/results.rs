//! What is known and was measured of each side, the rounds together.

use super::job::{Likelihood, Measured, Side, Speed};
use crate::args::Compare;
use crate::ui::bytes;
use serde::Serialize;
use serde_json::Value;
use std::path::PathBuf;

/// What is known of a side without measuring.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Facts {
    pub(super) id: String,
    pub(super) quant: String,
    pub(super) architecture: String,
    pub(super) sha256: Option<String>,
    pub(super) revision: Option<String>,
    #[serde(skip)]
    pub(super) path: PathBuf,
    pub(super) parameters: u64,
    pub(super) file_bytes: u64,
    pub(super) weights_bytes: u64,
    pub(super) kv_bytes_per_token: u64,
    pub(super) context: usize,
    /// In a few letters.
    pub(super) attention: String,
    pub(super) routing: Value,
    pub(super) kv_dtypes: [&'static str; 2],
    pub(super) backend: &'static str,
    /// What computes, and with how many threads.
    #[serde(skip)]
    pub(super) processor: String,
    /// Why its energy cannot be measured, if so.
    #[serde(skip)]
    pub(super) no_energy: Option<String>,
}

impl Facts {
    pub(super) fn banner(&self) -> String {
        format!("{} {} · {} · weights {}", self.id, self.quant, self.attention, bytes(self.weights_bytes))
    }

    /// Whether both are one checkpoint, under two settings.
    pub(super) fn is_same_model(&self, other: &Self) -> bool {
        self.path == other.path && self.quant == other.quant
    }
}

/// A measurement that was repeated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Repeated {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Repeated {
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { median, least, most })
    }

    /// `of / value`: a rate of a time.
    pub(super) fn rate(self, of: f64) -> Self {
        Self { median: of / self.median, least: of / self.most, most: of / self.least }
    }
}

/// A side at one depth, over all rounds. Times and joules of decoding are per token.
#[derive(Debug, Clone, Serialize)]
pub(super) struct AtDepth {
    pub(super) depth: usize,
    pub(super) prompt_tokens: usize,
    pub(super) prompt_seconds: Repeated,
    pub(super) decode_seconds: Repeated,
    pub(super) kv_resident_bytes: u64,
    pub(super) kv_read_bytes: u64,
    pub(super) prompt_joules: Option<f64>,
    pub(super) decode_joules: Option<f64>,
    /// Without what the machine draws when it does nothing.
    pub(super) decode_net_joules: Option<f64>,
}

/// Right answers in a file of choices.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Accuracy {
    pub(super) file: String,
    pub(super) questions: usize,
    pub(super) acc: f64,
    pub(super) acc_norm: f64,
}

/// All that was measured of a side.
#[derive(Debug, Clone, Serialize)]
pub(super) struct SideResults {
    pub(super) load_seconds: Option<Repeated>,
    pub(super) peak_bytes: Option<u64>,
    pub(super) depths: Vec<AtDepth>,
    pub(super) likelihood: Option<Likelihood>,
    /// Task, part found, questions.
    pub(super) needles: Vec<(String, f64, usize)>,
    pub(super) choices: Vec<Accuracy>,
    pub(super) answers: Vec<String>,
}

impl SideResults {
    pub(super) fn new(side: Side, args: &Compare, lines: &[Measured]) -> Self {
        let speeds: Vec<&Speed> = lines
            .iter()
            .filter_map(|line| match line {
                Measured::Speed(speed) if speed.side == side => Some(speed),
                _ => None,
            })
            .collect();
        let mut depths: Vec<usize> = speeds.iter().map(|speed| speed.depth).collect();
        depths.sort_unstable();
        depths.dedup();
        let at_depth = |depth: usize| {
            let here: Vec<&&Speed> = speeds.iter().filter(|speed| speed.depth == depth).collect();
            let all = |value: &dyn Fn(&Speed) -> f64| Repeated::of(here.iter().map(|speed| value(speed)).collect());
            let some = |value: &dyn Fn(&Speed) -> Option<f64>| {
                Repeated::of(here.iter().filter_map(|speed| value(speed)).collect()).map(|repeated| repeated.median)
            };
            let per_token = |speed: &Speed, joules: f64| joules / speed.decode_tokens as f64;
            let net = |speed: &Speed| {
                let joules = speed.decode_joules? - speed.idle_watts? * speed.decode_seconds;
                Some(per_token(speed, joules))
            };
            let last = here.last()?;
            Some(AtDepth {
                depth,
                prompt_tokens: last.prompt_tokens,
                prompt_seconds: all(&|speed| speed.prompt_seconds)?,
                decode_seconds: all(&|speed| speed.decode_seconds / speed.decode_tokens as f64)?,
                kv_resident_bytes: last.kv_resident_bytes,
                kv_read_bytes: last.kv_read_bytes,
                prompt_joules: some(&|speed| speed.prompt_joules),
                decode_joules: some(&|speed| Some(per_token(speed, speed.decode_joules?))),
                decode_net_joules: some(&net),
            })
        };
        let loads = lines.iter().filter_map(|line| match line {
            Measured::Load { side: of, seconds, .. } if *of == side => Some(*seconds),
            _ => None,
        });
        let likelihood = lines.iter().rev().find_map(|line| match line {
            Measured::Likelihood(text) if text.side == side => Some(text.clone()),
            _ => None,
        });
        let mut needles: Vec<(String, f64, usize)> = Vec::new();
        let mut answers = Vec::new();
        for line in lines {
            match line {
                Measured::Needle { side: of, task, score, questions } if *of == side => {
                    needles.retain(|(known, ..)| known != task);
                    needles.push((task.clone(), *score, *questions));
                }
                Measured::Answer { side: of, text, .. } if *of == side => answers.push(text.clone()),
                _ => {}
            }
        }
        let accuracy = |file: usize| {
            let verdicts: Vec<[bool; 2]> = lines
                .iter()
                .filter_map(|line| match line {
                    Measured::Choice { side: of, file: in_file, right, right_by_length, .. } if (*of, *in_file) == (side, file) => {
                        Some([*right, *right_by_length])
                    }
                    _ => None,
                })
                .collect();
            let part = |which: usize| verdicts.iter().filter(|verdict| verdict[which]).count() as f64 / verdicts.len() as f64;
            let name = args.choices[file].file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            (!verdicts.is_empty()).then(|| Accuracy { file: name, questions: verdicts.len(), acc: part(0), acc_norm: part(1) })
        };
        Self {
            load_seconds: Repeated::of(loads.collect()),
            peak_bytes: speeds.iter().filter_map(|speed| speed.peak_bytes).max(),
            depths: depths.into_iter().filter_map(at_depth).collect(),
            likelihood,
            needles,
            choices: (0..args.choices.len()).filter_map(accuracy).collect(),
            answers,
        }
    }

    pub(super) fn depths(&self) -> Vec<usize> {
        self.depths.iter().map(|at| at.depth).collect()
    }

    pub(super) fn at(&self, depth: usize) -> Option<&AtDepth> {
        self.depths.iter().find(|at| at.depth == depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_measurements_have_a_median_and_ends() {
        let repeated = Repeated::of(vec![4.0, 1.0, 2.0]).unwrap();
        assert_eq!(repeated, Repeated { median: 2.0, least: 1.0, most: 4.0 });
        assert_eq!(repeated.rate(8.0), Repeated { median: 4.0, least: 2.0, most: 8.0 });
        assert_eq!(Repeated::of(vec![1.0, 2.0]).unwrap().median, 1.5);
        assert_eq!(Repeated::of(Vec::new()), None);
    }
}
