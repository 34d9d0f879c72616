//! What was measured, as rows: for a terminal, Markdown, JSON and the page.

use super::cost::{Request, request};
use super::job::{Divergence, Likelihood, Measured, Side};
use super::results::{Accuracy, Facts, Repeated, SideResults};
use super::{NEEDLE_DEPTHS, prompts, text_context};
use crate::args::{Compare, VERSION};
use crate::failure::{Failure, Kind};
use crate::plan;
use crate::ui::bytes;
use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::{Value, json};
use std::path::Path;

/// How a report is written, by the file's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Html,
    Markdown,
    Json,
}

pub(super) fn format_of(path: &Path) -> Result<Format> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("html" | "htm") => Ok(Format::Html),
        Some("md") => Ok(Format::Markdown),
        Some("json") => Ok(Format::Json),
        _ => {
            Err(Failure::new(Kind::Usage, format!("-o {}: a report is .html, .md or .json", path.display())).hint("-o report.html").into())
        }
    }
}

/// One line of the report.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) section: &'static str,
    pub(super) name: String,
    pub(super) a: String,
    pub(super) b: String,
    /// `a / b`
    pub(super) ratio: Option<f64>,
}

/// A comparison that is whole.
#[derive(Debug)]
pub(super) struct Comparison<'a> {
    pub(super) args: &'a Compare,
    pub(super) facts: [Facts; 2],
    pub(super) results: [SideResults; 2],
    pub(super) divergence: Option<Divergence>,
    pub(super) prompts: Vec<String>,
    pub(super) rows: Vec<Row>,
    /// What is compared and how, and what could not be measured.
    pub(super) notes: Vec<String>,
    pub(super) machine: String,
    pub(super) command: String,
    /// Why energy was not measured, if so.
    no_energy: Option<String>,
}

impl<'a> Comparison<'a> {
    pub(super) fn new(args: &'a Compare, facts: [Facts; 2], lines: &[Measured]) -> Self {
        let results = Side::BOTH.map(|side| SideResults::new(side, args, lines));
        let divergence = lines.iter().rev().find_map(|line| match line {
            Measured::Divergence(divergence) => Some(divergence.clone()),
            _ => None,
        });
        let memory = plan::machine().map_or_else(String::new, |(total, _)| format!(", {} of memory", bytes(total)));
        let command: Vec<String> = std::env::args().skip(1).map(|arg| if arg.contains(' ') { format!("{arg:?}") } else { arg }).collect();
        let mut comparison = Self {
            prompts: prompts(args),
            machine: format!("{} {}{memory}, {}", facts[0].backend, facts[0].processor, std::env::consts::OS),
            command: format!("foveate {}", command.join(" ")),
            no_energy: facts[0].no_energy.clone(),
            args,
            facts,
            results,
            divergence,
            rows: Vec::new(),
            notes: Vec::new(),
        };
        comparison.rows = comparison.make_rows();
        comparison.notes = comparison.make_notes();
        comparison
    }

    pub(super) fn is_same_model(&self) -> bool {
        self.facts[0].is_same_model(&self.facts[1])
    }

    fn make_rows(&self) -> Vec<Row> {
        let mut rows = Rows::default();
        let [a, b] = &self.results;
        let facts = |value: &dyn Fn(&Facts) -> f64| self.facts.each_ref().map(|facts| Some(value(facts)));
        let results = |value: &dyn Fn(&SideResults) -> Option<f64>| self.results.each_ref().map(value);

        rows.section = "Size";
        rows.add("parameters in the file", facts(&|facts| facts.parameters as f64), &count);
        rows.add("file", facts(&|facts| facts.file_bytes as f64), &size);
        rows.add("weights in memory", facts(&|facts| facts.weights_bytes as f64), &size);
        rows.add("KV per token, all read", facts(&|facts| facts.kv_bytes_per_token as f64), &size);

        rows.section = "Memory";
        let depths: Vec<usize> = a.depths().into_iter().filter(|depth| b.at(*depth).is_some()).collect();
        for depth in &depths {
            rows.add(format!("KV resident @ d{depth}"), results(&|side| Some(side.at(*depth)?.kv_resident_bytes as f64)), &size);
            rows.add(format!("KV read per token @ d{depth}"), results(&|side| Some(side.at(*depth)?.kv_read_bytes as f64)), &size);
        }
        rows.add("peak memory of the process", results(&|side| side.peak_bytes.map(|bytes| bytes as f64)), &size);

        rows.section = "Speed";
        rows.add_repeated("load, seconds", [a.load_seconds, b.load_seconds]);
        for depth in &depths {
            let rate = |side: &SideResults| side.at(*depth).map(|at| at.prompt_seconds.rate(at.prompt_tokens as f64));
            if *depth == 0 {
                rows.add_repeated(format!("pp{} @ d0, tokens/s", self.args.prompt), [rate(a), rate(b)]);
            } else {
                let time = |side: &SideResults| side.at(*depth).map(|at| at.prompt_seconds);
                rows.add_repeated(format!("time to first token, prompt of {depth}, seconds"), [time(a), time(b)]);
                rows.add_repeated(format!("prefill of {depth}, tokens/s"), [rate(a), rate(b)]);
            }
        }
        for depth in &depths {
            let rate = |side: &SideResults| side.at(*depth).map(|at| at.decode_seconds.rate(1.0));
            rows.add_repeated(format!("tg{} @ d{depth}, tokens/s", self.args.generate), [rate(a), rate(b)]);
        }

        rows.section = "Energy";
        for depth in &depths {
            rows.add(format!("joules per output token @ d{depth}"), results(&|side| side.at(*depth)?.decode_joules), &plain);
            rows.add(format!("the same, net of idle @ d{depth}"), results(&|side| side.at(*depth)?.decode_net_joules), &plain);
        }

        rows.section = "Quality";
        let text = |value: &dyn Fn(&Likelihood) -> f64| results(&|side| side.likelihood.as_ref().map(value));
        rows.add("perplexity per byte", text(&Likelihood::byte_perplexity), &plain);
        rows.add("bits per byte", text(&Likelihood::bits_per_byte), &plain);
        rows.add("perplexity per word", text(&Likelihood::word_perplexity), &plain);
        for (task, _, questions) in &a.needles {
            let found = |side: &SideResults| side.needles.iter().find(|(of, ..)| of == task).map(|(_, score, _)| *score);
            rows.add(format!("needle, {task} ({questions})"), [found(a), found(b)], &percent);
        }
        for (file, accuracy) in a.choices.iter().enumerate() {
            let of = |value: &dyn Fn(&Accuracy) -> f64| results(&|side| side.choices.get(file).map(value));
            rows.add(format!("{} acc ({})", accuracy.file, accuracy.questions), of(&|accuracy| accuracy.acc), &percent);
            rows.add(format!("{} acc_norm ({})", accuracy.file, accuracy.questions), of(&|accuracy| accuracy.acc_norm), &percent);
        }
        if let Some(divergence) = &self.divergence {
            rows.alone("KL to B, mean (p99), nats", format!("{:.4} ({:.3})", divergence.kl_mean, divergence.kl_p99));
            rows.alone("same likeliest token as B", percent(divergence.same_top));
            rows.alone("perplexity against B", format!("{:+.2} %", 100.0 * divergence.perplexity_change));
            rows.alone("keys read", percent(divergence.density));
        }

        rows.section = "Efficiency";
        let deepest = depths.last().copied().unwrap_or(0);
        let billions = |which: usize| self.facts[which].parameters as f64 / 1e9;
        let rate = |which: usize| self.results[which].at(deepest).map(|at| 1.0 / at.decode_seconds.median);
        let per_billion = |which: usize| rate(which).map(|rate| rate / billions(which));
        rows.add(format!("tokens/s for each billion parameters @ d{deepest}"), [per_billion(0), per_billion(1)], &plain);
        let saved = |which: usize| {
            // A model that knows nothing needs 8 bits for each byte.
            self.results[which].likelihood.as_ref().map(|text| (8.0 - text.bits_per_byte()) / billions(which))
        };
        rows.add("bits per byte predicted, for each billion parameters", [saved(0), saved(1)], &plain);
        rows.add(
            format!("tokens per joule @ d{deepest}"),
            results(&|side| side.at(deepest)?.decode_joules.map(|joules| 1.0 / joules)),
            &plain,
        );

        rows.section = "Cost";
        let mix = self.args.mix;
        let requests = self.requests();
        let of = |value: &dyn Fn(Request) -> Option<f64>| requests.map(|request| request.and_then(value));
        let name = format!("request of {} + {} tokens", mix.prompt, mix.output);
        rows.add(format!("{name}, seconds"), of(&|request| Some(request.seconds())), &plain);
        if let Some(price) = self.args.price_per_hour {
            let million = 1e6 * price / 3600.0;
            rows.add(format!("1000 such at {price} an hour"), of(&|request| Some(1e3 * request.seconds() * price / 3600.0)), &plain);
            rows.add("a million tokens of prompt", of(&|request| Some(million * request.prompt_seconds / f64::from(mix.prompt))), &plain);
            rows.add("a million tokens of output", of(&|request| Some(million * request.output_seconds / f64::from(mix.output))), &plain);
        }
        if let Some(price) = self.args.price_per_kwh {
            rows.add(format!("1000 such at {price} a kWh"), of(&|request| Some(1e3 * request.joules? / 3.6e6 * price)), &plain);
        }
        rows.rows
    }

    pub(super) fn requests(&self) -> [Option<Request>; 2] {
        self.results.each_ref().map(|side| request(side, self.args.mix))
    }

    fn make_notes(&self) -> Vec<String> {
        let args = self.args;
        let [a, b] = &self.facts;
        let mut notes = vec![if self.is_same_model() {
            format!("One model, two settings of attention: methods are compared. A is {}, B {}.", a.attention, b.attention)
        } else {
            format!(
                "Two models of {} and {} parameters: products are compared, not methods. To isolate attention: foveate compare {} --b --attn dense",
                count(a.parameters as f64),
                count(b.parameters as f64),
                args.a
            )
        }];
        notes.push(format!(
            "One model at a time in memory, each measurement a process of its own, the sides by turns; medians of {} (least to most), greedy, after a \
             warm-up. Prompts of the speed tests are pseudo-random token ids.",
            args.repeat
        ));
        if args.file.is_some() {
            notes.push(format!(
                "Perplexity: every token of the text's first {} bytes predicted once, in windows of {} tokens; per byte and per whitespace-separated word, so that \
                 tokenizers do not matter. Needles: at {:?} % of as many tokens of the text, one each; copy: the part of the words that come back.",
                self.results[0].likelihood.as_ref().map_or(0, |text| text.bytes),
                text_context(args),
                NEEDLE_DEPTHS
            ));
        } else {
            notes.push("Quality on a text was not measured: -f FILE.".to_string());
        }
        if let Some(divergence) = &self.divergence {
            notes.push(format!("KL and likeliest tokens: {} positions of the text, after as many that are not scored.", divergence.scored));
        }
        for (path, accuracy) in args.choices.iter().zip(&self.results[0].choices) {
            notes.push(format!(
                "{}: {} questions, asked and scored as by lm-evaluation-harness without examples: acc by the likeliest choice, acc_norm by its likelihood over its characters.",
                path.display(),
                accuracy.questions
            ));
        }
        if let Some(reason) = &self.no_energy {
            notes.push(format!("Energy was not measured: {reason}."));
            if args.price_per_kwh.is_some() {
                notes.push("So --price-per-kwh says nothing here.".to_string());
            }
        }
        if let [Some(ours), Some(theirs)] = self.requests() {
            let ratio = theirs.seconds() / ours.seconds();
            let (cheaper, other, times) = if ratio >= 1.0 { ("A", "B", ratio) } else { ("B", "A", 1.0 / ratio) };
            notes.push(format!(
                "A request of {} + {} tokens takes {cheaper} 1/{times:.2} of {other}'s time: break-even is where {other} runs on a machine that costs {times:.2} times less an hour{}.",
                args.mix.prompt,
                args.mix.output,
                if ours.extrapolated { "; it is longer than what was measured (-d), so extrapolated" } else { "" }
            ));
        }
        notes
    }

    fn heads(&self) -> [String; 2] {
        self.facts.each_ref().map(|facts| format!("{} {} ({})", facts.id, facts.quant, facts.attention))
    }

    /// For a terminal.
    pub(super) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        let [a, b] = self.heads();
        table.set_header([String::new(), format!("A: {a}"), format!("B: {b}"), "A/B".to_string()]);
        let mut section = "";
        for row in &self.rows {
            if row.section != section {
                section = row.section;
                table.add_row([section.to_uppercase()]);
            }
            table.add_row([format!("  {}", row.name), row.a.clone(), row.b.clone(), ratio(row.ratio)]);
        }
        for column in 1..4 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let mut text = format!("{table}\n");
        let [ours, theirs] = &self.results;
        for (index, prompt) in self.prompts.iter().enumerate() {
            if let (Some(a), Some(b)) = (ours.answers.get(index), theirs.answers.get(index)) {
                text.push_str(&format!("\n> {prompt}\nA: {}\nB: {}\n", a.trim(), b.trim()));
            }
        }
        text.push('\n');
        for note in &self.notes {
            text.push_str(&format!("{note}\n"));
        }
        text
    }

    pub(super) fn title(&self) -> String {
        match self.is_same_model() {
            true => format!("{}: {} beside {}", self.facts[0].id, self.facts[0].attention, self.facts[1].attention),
            false => format!("{} beside {}", self.facts[0].id, self.facts[1].id),
        }
    }

    pub(super) fn markdown(&self) -> String {
        let [a, b] = self.heads();
        let mut text = format!("# {}\n\n`{}`\n\n{}, foveate {VERSION}\n\n", self.title(), self.command, self.machine);
        text.push_str(&format!("| | A: {a} | B: {b} | A/B |\n| --- | ---: | ---: | ---: |\n"));
        let mut section = "";
        for row in &self.rows {
            if row.section != section {
                section = row.section;
                text.push_str(&format!("| **{section}** | | | |\n"));
            }
            text.push_str(&format!("| {} | {} | {} | {} |\n", row.name, row.a, row.b, ratio(row.ratio)));
        }
        let [ours, theirs] = &self.results;
        let quoted = |text: &str| text.trim().lines().map(|line| format!("> {line}\n")).collect::<String>();
        for (index, prompt) in self.prompts.iter().enumerate() {
            if let (Some(a), Some(b)) = (ours.answers.get(index), theirs.answers.get(index)) {
                text.push_str(&format!("\n**{prompt}**\n\nA:\n\n{}\nB:\n\n{}", quoted(a), quoted(b)));
            }
        }
        text.push('\n');
        for note in &self.notes {
            text.push_str(&format!("- {note}\n"));
        }
        text
    }

    pub(super) fn document(&self) -> Value {
        let requests = self.requests().map(|request| {
            request.map(|request| {
                json!({
                    "prompt_seconds": request.prompt_seconds, "output_seconds": request.output_seconds, "joules": request.joules,
                    "extrapolated": request.extrapolated,
                })
            })
        });
        json!({
            "schema": "foveate.compare/1",
            "command": self.command,
            "version": VERSION,
            "machine": self.machine,
            "same_model": self.is_same_model(),
            "models": self.facts,
            "results": self.results,
            "energy": self.no_energy.as_ref().map(|reason| json!({"joules": null, "reason": reason})),
            "divergence": self.divergence,
            "mix": {"prompt": self.args.mix.prompt, "output": self.args.mix.output, "requests": requests},
            "rows": self.rows,
            "prompts": self.prompts,
            "notes": self.notes,
        })
    }
}

/// Rows as they are made.
#[derive(Default)]
struct Rows {
    section: &'static str,
    rows: Vec<Row>,
}

impl Rows {
    /// A row of two numbers; none where neither was measured.
    fn add(&mut self, name: impl Into<String>, [a, b]: [Option<f64>; 2], show: &dyn Fn(f64) -> String) {
        if a.is_none() && b.is_none() {
            return;
        }
        let cell = |value: Option<f64>| value.map_or_else(|| "not measured".to_string(), show);
        let ratio = a.zip(b).map(|(a, b)| a / b).filter(|ratio| ratio.is_finite());
        self.rows.push(Row { section: self.section, name: name.into(), a: cell(a), b: cell(b), ratio });
    }

    /// A row of two medians with what they lie between.
    fn add_repeated(&mut self, name: impl Into<String>, [a, b]: [Option<Repeated>; 2]) {
        let cell = |value: Option<Repeated>| {
            value.map_or_else(
                || "not measured".to_string(),
                |Repeated { median, least, most }| format!("{} ({}-{})", plain(median), plain(least), plain(most)),
            )
        };
        let ratio = a.zip(b).map(|(a, b)| a.median / b.median).filter(|ratio| ratio.is_finite());
        self.rows.push(Row { section: self.section, name: name.into(), a: cell(a), b: cell(b), ratio });
    }

    /// A row of A against B.
    fn alone(&mut self, name: &str, a: String) {
        self.rows.push(Row { section: self.section, name: name.to_string(), a, b: String::new(), ratio: None });
    }
}

/// Three digits or so.
fn plain(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_string(),
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        size if size >= 0.01 => format!("{value:.4}"),
        _ => format!("{value:.2e}"),
    }
}

fn percent(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

fn size(count: f64) -> String {
    bytes(count as u64)
}

/// `135 M`, `7.2 B`
fn count(value: f64) -> String {
    if value >= 1e9 { format!("{:.2} B", value / 1e9) } else { format!("{:.0} M", value / 1e6) }
}

pub(super) fn ratio(ratio: Option<f64>) -> String {
    ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_follow_the_files_name() {
        assert_eq!(format_of(Path::new("a/r.html")).unwrap(), Format::Html);
        assert_eq!(format_of(Path::new("r.md")).unwrap(), Format::Markdown);
        assert!(format_of(Path::new("report")).unwrap_err().to_string().contains(".html, .md or .json"));
    }
}
