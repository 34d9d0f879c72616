//! The report as a page of its own: no file beside it, no network.

use super::plot::{Curve, svg};
use super::report::{Comparison, ratio};
use super::results::AtDepth;
use crate::args::VERSION;
use anyhow::{Context, Result};
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, context};

const TEMPLATE: &str = include_str!("page.html");

pub(super) fn html(comparison: &Comparison<'_>) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("page.html", TEMPLATE).context("the page's template")?;
    let plots = plots(comparison)?;
    environment.add_filter("ratio", ratio);
    let [ours, theirs] = &comparison.results;
    let answers: Vec<Value> = (comparison.prompts.iter().zip(ours.answers.iter().zip(&theirs.answers)))
        .map(|(prompt, (a, b))| context! { prompt, a => a.trim(), b => b.trim() })
        .collect();
    let page = environment.get_template("page.html")?.render(context! {
        title => comparison.title(),
        heads => Value::from(Serde(&comparison.facts)),
        rows => Value::from(Serde(&comparison.rows)),
        answers,
        notes => &comparison.notes,
        plots => plots.into_iter().map(Value::from_safe_string).collect::<Vec<_>>(),
        machine => &comparison.machine,
        command => &comparison.command,
        version => VERSION,
    });
    page.context("the page")
}

/// Speed and memory against depth.
fn plots(comparison: &Comparison<'_>) -> Result<Vec<String>> {
    const MIB: f64 = (1u64 << 20) as f64;
    let same = comparison.is_same_model();
    let curves = |value: &dyn Fn(&AtDepth) -> f64| {
        [0, 1].map(|which| {
            let facts = &comparison.facts[which];
            let points = comparison.results[which].depths.iter().map(|at| (at.depth as f64, value(at))).collect();
            Curve { name: if same { facts.attention.clone() } else { facts.id.clone() }, points }
        })
    };
    Ok(vec![
        svg("Decoding after a context", "tokens/s", &curves(&|at| 1.0 / at.decode_seconds.median))?,
        svg("Time to first token", "seconds", &curves(&|at| if at.depth == 0 { 0.0 } else { at.prompt_seconds.median }))?,
        svg("KV memory", "MiB", &curves(&|at| at.kv_resident_bytes as f64 / MIB))?,
        svg("KV read for each token", "MiB", &curves(&|at| at.kv_read_bytes as f64 / MIB))?,
    ])
}
