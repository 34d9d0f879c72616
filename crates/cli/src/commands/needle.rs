//! `foveate eval needle`: facts hidden in a text, asked for after it.

use super::input::read_file;
use super::rates;
use crate::args::{EvalNeedle, NeedleTask};
use crate::engine::{Checkpoint, Engine};
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use crate::routing;
use crate::source::Hub;
use crate::ui::{Ui, stdout};
use anyhow::Result;
use clap::ValueEnum;
use model::score::Setting;
use model::{GenerateOptions, Sampler, SamplerOptions, Session};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use std::ops::{ControlFlow, Range};

/// Tokens that what is hidden, the question and the answer may take.
const RESERVED: usize = 400;

/// Tokens that a reply may take for each word that it should hold.
const TOKENS_OF_A_WORD: usize = 12;

/// Tokens of the passage that is to be copied, and how many of them are given again.
const PASSAGE: usize = 256;
const GIVEN: usize = 32;

const PLACES: [&str; 8] = ["library", "harbour", "museum", "observatory", "bakery", "old mill", "town hall", "lighthouse"];
const NAMES: [&str; 12] =
    ["Arthur", "Beatrice", "Clement", "Dorothy", "Edmund", "Florence", "Gregory", "Harriet", "Isidore", "Josephine", "Konrad", "Lavinia"];
const COLOURS: [&str; 10] = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white", "pink", "brown"];

/// A text with things hidden in it, as token ids, and what is asked after it.
struct Haystack {
    ids: Vec<u32>,
    questions: Vec<Question>,
}

/// What is asked after the text.
struct Question {
    task: NeedleTask,
    /// Another question, which is asked and answered before; its answer does not count.
    first: Option<Vec<u32>>,
    ids: Vec<u32>,
    answer: Answer,
}

enum Answer {
    /// Words that the reply must hold: each counts.
    Words(Vec<String>),
    /// Tokens that must be the likeliest, one after the other: each counts.
    Tokens(Vec<u32>),
}

/// What a setting found of one question, 0 to 1.
pub(super) struct Found {
    pub(super) setting: usize,
    pub(super) task: NeedleTask,
    pub(super) length: usize,
    pub(super) depth: u8,
    pub(super) score: f64,
}

/// What is hidden, where, and how often.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid<'a> {
    /// Of the texts, in tokens.
    pub(super) lengths: &'a [usize],
    /// In percent from their beginning.
    pub(super) depths: &'a [u8],
    /// Texts for each length and depth.
    pub(super) samples: u32,
    pub(super) tasks: &'a [NeedleTask],
    pub(super) seed: u64,
}

impl Grid<'_> {
    /// The tokens that the longest text, what is hidden in it and what is asked take.
    pub(super) fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0) + RESERVED
    }
}

pub(crate) fn run(args: &EvalNeedle, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    let text = read_file(&args.file)?;
    let checkpoint = Checkpoint::open(&args.model, &args.template, &args.attention, hub)?;
    // Dense first: what the others are measured against.
    let mut settings = vec![checkpoint.reference()];
    settings.extend(checkpoint.settings(&args.attention, &args.with)?);
    let context = checkpoint.context(&args.model, ui)?;
    let ids = checkpoint.tokenizer.encode(&text, false)?;
    let lengths: Vec<usize> = match args.length.as_slice() {
        [] => vec![(context.saturating_sub(RESERVED)).min(8192).min(ids.len())],
        lengths => lengths.iter().map(|length| *length as usize).collect(),
    };
    let grid = Grid { lengths: &lengths, depths: &args.depth, samples: args.samples, tasks: &args.tasks, seed: args.seed };
    let longest = grid.longest() - RESERVED;
    if ids.len() < longest {
        let why = format!("{} tokens for a length of {longest}", ids.len());
        return Err(Failure::new(Kind::Usage, "the text is too short").why(why).hint("a longer text, or a smaller --length").into());
    }
    if grid.longest() > context {
        let why = format!("{longest} tokens and {RESERVED} for what is hidden and asked > ctx {context}");
        return Err(Failure::new(Kind::ContextOverflow, "the longest text does not fit the context")
            .why(why)
            .hint("a smaller --length")
            .into());
    }
    // A sequence and a copy of it for the question.
    let engine = checkpoint.load(2 * grid.longest(), &args.model)?;
    ui.say(engine.banner(context));
    let found = search(&engine, &settings, &ids, grid, ui, interrupt)?;
    report(args, &engine, &settings, &found, &lengths, ui)
}

/// Hides things in the text `ids` and asks every setting for them.
pub(super) fn search(
    engine: &Engine,
    settings: &[Setting],
    ids: &[u32],
    grid: Grid<'_>,
    ui: Ui,
    interrupt: &Interrupt,
) -> Result<Vec<Found>> {
    let tokens = grid.lengths.iter().sum::<usize>() * grid.depths.len() * grid.samples as usize * settings.len();
    let bar = ui.token_bar("needle", tokens as u64);
    let mut found = Vec::new();
    for length in grid.lengths {
        for depth in grid.depths {
            for sample in 0..grid.samples {
                let haystack = hide(grid, engine, &ids[..*length], *depth, u64::from(sample))?;
                for (index, setting) in settings.iter().enumerate() {
                    let mut session = Session::new(
                        engine.model.clone(),
                        setting.attention.clone(),
                        setting.dtypes,
                        &engine.checkpoint.device,
                        haystack.ids.len(),
                    )
                    .map_err(unexpected)?;
                    rates::read(engine, &mut session, &haystack.ids, interrupt, || bar.tick())?;
                    for question in &haystack.questions {
                        let score = ask(engine, &mut session, question)?;
                        found.push(Found { setting: index, task: question.task, length: *length, depth: *depth, score });
                    }
                    bar.inc(*length as u64);
                }
            }
        }
    }
    bar.finish_and_clear();
    Ok(found)
}

/// The words of a text that something can be hidden in.
pub(super) const SHORTEST: usize = 256;

/// The length of a haystack: what is wanted, as far as the text and the context go.
pub(super) fn fitting(wanted: usize, text: usize, context: usize) -> usize {
    wanted.min(text).min(context.saturating_sub(RESERVED))
}

/// Puts the sentences of every task into the text, where `depth` says, and makes the questions.
fn hide(grid: Grid<'_>, engine: &Engine, ids: &[u32], depth: u8, sample: u64) -> Result<Haystack> {
    let tokenizer = &engine.checkpoint.tokenizer;
    // The same text for every setting and run; another for every place in the grid.
    let mut rng = ChaCha8Rng::seed_from_u64(grid.seed ^ (ids.len() as u64) << 24 ^ u64::from(depth) << 16 ^ sample);
    let mut number = || rng.random_range(10_000..100_000u32).to_string();
    let numbers: Vec<String> = (0..6).map(|_| number()).collect();
    let mut places = |count: usize| -> Vec<&str> { PLACES.choose_multiple(&mut rng, count).copied().collect() };
    let place = places(1)[0];
    let names: Vec<&str> = NAMES.choose_multiple(&mut rng, 5).copied().collect();
    let colours: Vec<&str> = COLOURS.choose_multiple(&mut rng, 3).copied().collect();
    let mut elsewhere = || f64::from(rng.random_range(2..98u8));
    let at = f64::from(depth);
    let mut hidden: Vec<(f64, String)> = Vec::new();
    let mut questions: Vec<(NeedleTask, Option<String>, String, Vec<String>)> = Vec::new();
    for task in grid.tasks {
        match task {
            NeedleTask::Single => {
                hidden.push((at, format!("The secret access code of the {place} is {}.", numbers[0])));
                let question = format!("What is the secret access code of the {place}?\nAnswer: The secret access code of the {place} is");
                questions.push((*task, None, question, vec![numbers[0].clone()]));
            }
            NeedleTask::MultiKey => {
                for (index, name) in names[..4].iter().enumerate() {
                    let place = if index == 0 { at } else { elsewhere() };
                    hidden.push((place, format!("The phone number of {name} is {}.", numbers[1 + index])));
                }
                let question = format!("What is the phone number of {0}?\nAnswer: The phone number of {0} is", names[0]);
                questions.push((*task, None, question, vec![numbers[1].clone()]));
            }
            NeedleTask::MultiValue => {
                for (index, colour) in colours.iter().enumerate() {
                    let place = if index == 0 { at } else { elsewhere() };
                    hidden.push((place, format!("One of the favourite colours of {} is {colour}.", names[4])));
                }
                let question = format!("What are the favourite colours of {0}?\nAnswer: The favourite colours of {0} are", names[4]);
                questions.push((*task, None, question, colours.iter().map(|colour| (*colour).to_string()).collect()));
            }
            NeedleTask::Variables => {
                for (index, sentence) in
                    [format!("VAR ALPHA = {}.", numbers[5]), "VAR BETA = VAR ALPHA.".into(), "VAR GAMMA = VAR BETA.".into()]
                        .into_iter()
                        .enumerate()
                {
                    hidden.push(((at + 5.0 * index as f64).min(99.0), sentence));
                }
                questions.push((
                    *task,
                    None,
                    "What is the number that VAR GAMMA stands for?\nAnswer: VAR GAMMA =".into(),
                    vec![numbers[5].clone()],
                ));
            }
            NeedleTask::Copy => {}
            NeedleTask::TwoTurn => {
                // Of its own, so that the other tasks are the same with and without it.
                let mut rng = ChaCha8Rng::seed_from_u64(!grid.seed ^ (ids.len() as u64) << 24 ^ u64::from(depth) << 16 ^ sample);
                let mut locker = || rng.random_range(10_000..100_000u32).to_string();
                let (number, other) = (locker(), locker());
                let names: Vec<&str> = NAMES.choose_multiple(&mut rng, 2).copied().collect();
                let fact = |name: &str, number: &str| format!("The locker number of {name} is {number}.");
                let question = |name: &str| format!("What is the locker number of {name}?\nAnswer: The locker number of {name} is");
                hidden.push((at, fact(names[0], &number)));
                hidden.push((elsewhere(), fact(names[1], &other)));
                questions.push((*task, Some(question(names[1])), question(names[0]), vec![number]));
            }
        }
    }
    let text = insert(tokenizer.decode(ids)?, hidden);
    let ids = tokenizer.encode(&text, true)?;
    let mut all = Vec::new();
    let asked = |question: &str| tokenizer.encode(&format!("\n\nQuestion: {question}"), false);
    for (task, first, question, words) in questions {
        let first = first.map(|question| asked(&question)).transpose()?;
        all.push(Question { task, first, ids: asked(&question)?, answer: Answer::Words(words) });
    }
    if grid.tasks.contains(&NeedleTask::Copy) {
        let passage = passage(ids.len(), depth);
        let (given, rest) = ids[passage].split_at(GIVEN);
        let mut question = tokenizer.encode("\n\n", false)?;
        question.extend(given);
        all.push(Question { task: NeedleTask::Copy, first: None, ids: question, answer: Answer::Tokens(rest.to_vec()) });
    }
    Ok(Haystack { ids, questions: all })
}

/// The tokens to copy: at `depth` percent, whole, and not so late that they are still in a window.
fn passage(tokens: usize, depth: u8) -> Range<usize> {
    let length = PASSAGE.min(tokens / 2);
    let start = (tokens * usize::from(depth) / 100).min(tokens - length);
    start..start + length
}

/// Puts sentences into a text, each after the sentence that ends next behind its place, in percent.
fn insert(text: String, mut hidden: Vec<(f64, String)>) -> String {
    hidden.sort_by(|a, b| a.0.total_cmp(&b.0));
    let ends: Vec<usize> = text.match_indices(". ").map(|(at, end)| at + end.len()).collect();
    let (mut out, mut done) = (String::with_capacity(text.len() + 64 * hidden.len()), 0);
    for (percent, sentence) in hidden {
        let target = (text.len() as f64 * percent / 100.0) as usize;
        let place = ends.iter().copied().find(|end| *end >= target.max(done)).unwrap_or(text.len());
        out.push_str(&text[done..place]);
        if !out.ends_with(char::is_whitespace) {
            out.push(' ');
        }
        out.push_str(&sentence);
        out.push(' ');
        done = place;
    }
    out.push_str(&text[done..]);
    out
}

/// Asks after the text, in a copy of the sequence: 0 to 1.
fn ask(engine: &Engine, session: &mut Session, question: &Question) -> Result<f64> {
    let mut session = session.fork().map_err(unexpected)?;
    let read = |session: &mut Session, ids: &[u32]| {
        session.prefill(ids, engine.checkpoint.chunk, |_, _| ControlFlow::Continue(())).map_err(unexpected)
    };
    if let Some(first) = &question.first {
        read(&mut session, first)?;
        reply(engine, &mut session, 1)?;
    }
    read(&mut session, &question.ids)?;
    match &question.answer {
        Answer::Words(words) => {
            let reply = reply(engine, &mut session, words.len())?;
            Ok(words.iter().filter(|word| reply.contains(word.as_str())).count() as f64 / words.len() as f64)
        }
        Answer::Tokens(tokens) => {
            let mut right = 0;
            for token in tokens {
                let logits = session.logits().map_err(unexpected)?;
                let likeliest = (0..logits.len()).fold(0, |best, id| if logits[id] > logits[best] { id } else { best });
                right += usize::from(likeliest == *token as usize);
                session.prefill(&[*token], 1, |_, _| ControlFlow::Continue(())).map_err(unexpected)?;
            }
            Ok(right as f64 / tokens.len() as f64)
        }
    }
}

/// What the model says next, in as many tokens as some words may take.
fn reply(engine: &Engine, session: &mut Session, words: usize) -> Result<String> {
    let mut sampler = Sampler::new(SamplerOptions::greedy()).map_err(unexpected)?;
    let (max_tokens, end_tokens) = (Some(TOKENS_OF_A_WORD * words), engine.checkpoint.end_tokens());
    let options = GenerateOptions { max_tokens, end_tokens, context: usize::MAX, logprobs: 0 };
    let ids = session.generate(&mut sampler, options).map(|token| token.map(|token| token.id)).collect::<candle_core::Result<Vec<_>>>();
    engine.checkpoint.tokenizer.decode(&ids.map_err(unexpected)?)
}

/// As users type it.
pub(super) fn task_name(task: NeedleTask) -> String {
    task.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
}

/// The mean of those that `keep`; `None`: there are none.
pub(super) fn mean(found: &[Found], keep: impl Fn(&Found) -> bool) -> Option<f64> {
    let scores: Vec<f64> = found.iter().filter(|found| keep(found)).map(|found| found.score).collect();
    (!scores.is_empty()).then(|| scores.iter().sum::<f64>() / scores.len() as f64)
}

fn report(args: &EvalNeedle, engine: &Engine, settings: &[Setting], found: &[Found], lengths: &[usize], ui: Ui) -> Result<u8> {
    let name = |setting: &Setting| routing::short(&setting.attention, setting.dtypes);
    let total = |index: usize| mean(found, |found| found.setting == index).unwrap_or(0.0);
    if ui.json {
        let rows: Vec<_> = found
            .iter()
            .map(|found| {
                json!({
                    "setting": found.setting, "task": task_name(found.task), "length": found.length, "depth": found.depth, "score": found.score,
                })
            })
            .collect();
        let settings: Vec<_> = settings
            .iter()
            .enumerate()
            .map(|(index, setting)| json!({"name": name(setting), "attn": routing::document(&setting.attention), "score": total(index)}))
            .collect();
        let document =
            json!({"schema": "foveate.eval.needle/1", "model": engine.checkpoint.located.id, "settings": settings, "rows": rows});
        stdout(&format!("{document}\n"))?;
    } else {
        for length in lengths {
            let depths: String = args.depth.iter().map(|depth| format!("{:>7}", format!("{depth} %"))).collect();
            stdout(&format!("{length} tokens{:>13}{depths}    mean\n", "depth"))?;
            for task in &args.tasks {
                for (index, setting) in settings.iter().enumerate() {
                    let here = |found: &Found| found.setting == index && found.task == *task && found.length == *length;
                    let score = |depth: u8| mean(found, |found| here(found) && found.depth == depth).unwrap_or(0.0);
                    let cells: String = args.depth.iter().map(|depth| format!("{:>7.2}", score(*depth))).collect();
                    let label = if index == 0 { task_name(*task) } else { String::new() };
                    let mean = mean(found, here).unwrap_or(0.0);
                    stdout(&format!("  {label:<12} {:>10}{cells} {mean:>7.3}   {}\n", "", name(setting)))?;
                }
            }
        }
        for (index, setting) in settings.iter().enumerate() {
            let relative = if index == 0 { String::new() } else { format!(" = {:.1} % of dense", 100.0 * total(index) / total(0)) };
            stdout(&format!("  all tasks {:.3}{relative}   {}\n", total(index), name(setting)))?;
        }
    }
    if let Some(least) = args.min_acc {
        for (index, setting) in settings.iter().enumerate().skip(1) {
            let part = total(index) / total(0);
            // A dense model that finds nothing lets nothing pass.
            if part.is_nan() || part < f64::from(least) {
                let what = format!("{} finds {part:.3} of what dense finds, below --min-acc {least}", name(setting));
                return Err(Failure::new(Kind::Gate, what).hint("a larger --budget").into());
            }
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_go_between_sentences_where_they_should() {
        let text = "One two. Three four. Five six. Seven eight.".to_string();
        let out = insert(text.clone(), vec![(50.0, "B.".into()), (0.0, "A.".into()), (100.0, "C.".into())]);
        assert_eq!(out, "One two. A. Three four. B. Five six. Seven eight. C. ");
        assert_eq!(insert(text.clone(), Vec::new()), text);
        assert_eq!(insert("nothing ends".into(), vec![(10.0, "A.".into())]), "nothing ends A. ");
    }

    #[test]
    fn a_passage_is_inside_the_text() {
        for tokens in [100, 600, 5000] {
            for depth in [0, 50, 99, 100] {
                let passage = passage(tokens, depth);
                assert!(passage.end <= tokens && passage.len() > GIVEN, "{passage:?} of {tokens}");
            }
        }
    }
}
