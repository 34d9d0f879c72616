//! `foveate bench --crossover`: from which context on routed attention decodes faster than dense.

use super::rates;
use crate::args::Bench;
use crate::crossover;
use crate::engine::{Checkpoint, Engine};
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use crate::source::Hub;
use crate::ui::{Ui, stdout};
use anyhow::Result;
use model::Session;
use serde_json::json;
use std::ops::ControlFlow;

/// Where both are measured, as far as the context goes.
const DEPTHS: [usize; 9] = [512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288];

/// Tokens that are timed; the fastest of as many runs as `--repeat` says counts.
const TOKENS: usize = 16;

/// Routed must be faster by this much, so that noise does not decide.
const MARGIN: f64 = 1.02;

pub(crate) fn run(args: &Bench, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    let checkpoint = Checkpoint::open(&args.model, &args.template, &args.attention, hub)?;
    let context = checkpoint.context(&args.model, ui)?;
    let routing = checkpoint.attention.routing();
    if routing.limits.dense_len == usize::MAX {
        let what = "this attention reads every block: there is nothing to compare";
        return Err(Failure::new(Kind::Usage, what).hint("--attn routed").into());
    }
    let depths: Vec<usize> = DEPTHS.into_iter().filter(|depth| depth + TOKENS < context).collect();
    let Some(deepest) = depths.last().copied() else {
        let what = format!("ctx {context} is too short to measure a crossover");
        return Err(Failure::new(Kind::ContextOverflow, what).hint("a larger -c").into());
    };
    // Both sides must route or not at every depth: the limit of auto is what is looked for.
    let mut always = routing.clone();
    always.limits.dense_len = 0;
    let capacity = deepest + TOKENS + 1;
    let engine = checkpoint.load(2 * capacity, &args.model)?;
    let attention = &engine.checkpoint.attention;
    let mut sessions = [
        engine.session_with(attention.to_dense(), capacity)?,
        engine.session_with(attention.with_routing(always).map_err(unexpected)?, capacity)?,
    ];
    let bar = ui.token_bar("crossover", 2 * deepest as u64);
    let mut rows: Vec<(usize, [f64; 2])> = Vec::new();
    for depth in depths {
        let mut rates = [0f64; 2];
        for session in &mut sessions {
            extend(&engine, session, depth, interrupt)?;
            bar.inc((depth - rows.last().map_or(0, |row| row.0)) as u64);
        }
        // By turns, so that what else the machine does hits both.
        for _ in 0..args.repeat {
            for (session, rate) in sessions.iter_mut().zip(&mut rates) {
                *rate = rate.max(decode(session, depth, interrupt)?);
            }
        }
        rows.push((depth, rates));
    }
    bar.finish_and_clear();
    let crossover = crossover_of(&rows);
    let path = crossover::remember(&engine.checkpoint, crossover)?;
    if ui.json {
        let rows: Vec<_> =
            rows.iter().map(|(depth, [dense, routed])| json!({"n_depth": depth, "dense_ts": dense, "routed_ts": routed})).collect();
        let document = json!({
            "schema": "foveate.bench.crossover/1", "model": engine.checkpoint.located.id, "crossover": crossover, "rows": rows, "file": path,
        });
        stdout(&format!("{document}\n"))?;
    } else {
        stdout("  depth   dense t/s  routed t/s\n")?;
        for (depth, [dense, routed]) in &rows {
            stdout(&format!("{depth:>7}  {dense:>10.2}  {routed:>10.2}\n"))?;
        }
        stdout(&format!("crossover: auto is routed above {crossover} tokens here ({})\n", path.display()))?;
    }
    Ok(0)
}

/// The smallest depth from which on routed is always faster; the deepest one if it never was.
fn crossover_of(rows: &[(usize, [f64; 2])]) -> usize {
    let faster = rows.iter().rev().take_while(|(_, [dense, routed])| *routed > dense * MARGIN);
    faster.last().or(rows.last()).map_or(0, |(depth, _)| *depth)
}

/// Computes tokens until `depth` are there.
fn extend(engine: &Engine, session: &mut Session, depth: usize, interrupt: &Interrupt) -> Result<()> {
    session.rewind(session.cached().min(depth)).map_err(unexpected)?;
    let ids = rates::fixed_ids(session.tokens().len()..depth, engine);
    rates::read(engine, session, &ids, interrupt, || ())?;
    Ok(())
}

/// Tokens per second after `depth` tokens, which are all that is there again afterwards.
fn decode(session: &mut Session, depth: usize, interrupt: &Interrupt) -> Result<f64> {
    // The last token again, so that there is something to continue.
    let last = session.tokens()[depth - 1];
    session.rewind(depth - 1).map_err(unexpected)?;
    session.prefill(&[last], 1, |_, _| ControlFlow::Continue(())).map_err(unexpected)?;
    let rate = TOKENS as f64 / rates::decode(session, TOKENS, interrupt)?.as_secs_f64();
    session.rewind(depth).map_err(unexpected)?;
    Ok(rate)
}

#[cfg(test)]
mod tests {
    use super::crossover_of;

    #[test]
    fn the_crossover_is_where_routed_begins_to_stay_faster() {
        let rows = |routed: [f64; 4]| [512, 1024, 2048, 4096].into_iter().zip(routed.map(|rate| [100.0, rate])).collect::<Vec<_>>();
        assert_eq!(crossover_of(&rows([120.0, 90.0, 110.0, 150.0])), 2048);
        assert_eq!(crossover_of(&rows([120.0, 110.0, 110.0, 150.0])), 512);
        assert_eq!(crossover_of(&rows([90.0, 90.0, 90.0, 101.0])), 4096);
    }
}
