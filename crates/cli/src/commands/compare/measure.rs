//! A process of its own measures one thing and prints what came of it, a line each: its memory is its own, and what it printed
//! is kept however it ends.

use super::super::energy::Meter;
use super::super::eval::Summary;
use super::super::input::read_file;
use super::super::needle::{self, Grid, mean, task_name};
use super::super::rates;
use super::super::reply::reply;
use super::job::{Divergence, Job, Likelihood, Measured, Side, Speed};
use super::{NEEDLE_DEPTHS, NEEDLE_TASKS, choices, prompts, text_context};
use crate::args::{Compare, TemplateArgs};
use crate::engine::{Checkpoint, Engine, chat_prompt};
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use crate::plan;
use crate::source::Hub;
use crate::text::Message;
use crate::ui::{Ui, stdout};
use anyhow::Result;
use model::score::{self, Setting};
use model::{GenerateOptions, Sampler, SamplerOptions};
use std::time::Duration;

/// Tokens that are read and generated before anything is timed.
const WARM_UP: usize = 32;

/// For how long nothing is done, to see what the machine draws then.
const IDLE: Duration = Duration::from_secs(2);

/// What everything here is given.
struct Context<'a> {
    args: &'a Compare,
    hub: &'a Hub,
    ui: Ui,
    interrupt: &'a Interrupt,
}

pub(super) fn run(args: &Compare, job: &Job, hub: &Hub, ui: Ui, interrupt: &Interrupt) -> Result<u8> {
    let context = Context { args, hub, ui, interrupt };
    match job {
        Job::Speed { side, round, depths } => context.speed(*side, *round, depths),
        Job::Likelihood { side } => context.likelihood(*side),
        Job::Needles { side } => context.needles(*side),
        Job::Divergence => context.divergence(),
        Job::Choices { side, file, from } => context.choices(*side, *file, *from),
        Job::Answers { side, from } => context.answers(*side, *from),
    }?;
    Ok(0)
}

fn emit(measured: &Measured) -> Result<()> {
    stdout(&format!("{}\n", serde_json::to_string(measured)?))
}

impl Context<'_> {
    fn open(&self, side: Side) -> Result<Checkpoint> {
        let (model, attention) = super::side(self.args, side);
        Checkpoint::open(&model, &TemplateArgs::default(), &attention, self.hub)
    }

    fn load(&self, checkpoint: Checkpoint, side: Side, tokens: usize) -> Result<Engine> {
        checkpoint.load(tokens, &super::side(self.args, side).0)
    }

    fn stop(&self) -> Result<()> {
        if self.interrupt.is_set() { Err(rates::stopped()) } else { Ok(()) }
    }

    fn speed(&self, side: Side, round: u32, depths: &[usize]) -> Result<()> {
        let (prompt, generated) = (self.args.prompt as usize, self.args.generate as usize);
        let longest = super::longest(self.args);
        let checkpoint = self.open(side)?;
        let meter = Meter::open(&checkpoint.device).ok();
        let idle_watts = meter.as_ref().map(|meter| {
            let before = meter.read();
            std::thread::sleep(IDLE);
            meter.since(&before) / IDLE.as_secs_f64()
        });
        let engine = self.load(checkpoint, side, longest)?;
        emit(&Measured::Load { side, round, seconds: engine.load_time.as_secs_f64() })?;
        let mut warm = engine.session(2 * WARM_UP)?;
        rates::read(&engine, &mut warm, &rates::fixed_ids(0..WARM_UP, &engine), self.interrupt, || ())?;
        rates::decode(&mut warm, WARM_UP / 2, self.interrupt)?;
        drop(warm);
        for depth in depths {
            let depth = *depth;
            let bar = self.ui.token_bar(&format!("{} @ d{depth}", engine.checkpoint.located.id), (depth + prompt + generated) as u64);
            let mut session = engine.session(depth.max(prompt) + generated + 1)?;
            let timed = |work: &mut dyn FnMut() -> Result<Duration>| -> Result<(f64, Option<f64>)> {
                let before = meter.as_ref().map(Meter::read);
                let time = work()?;
                let joules = meter.as_ref().zip(before).map(|(meter, before)| meter.since(&before));
                Ok((time.as_secs_f64(), joules))
            };
            let prompt_tokens = if depth == 0 { prompt } else { depth };
            let ids = rates::fixed_ids(0..prompt_tokens + 1, &engine);
            let (prompt_seconds, prompt_joules) =
                timed(&mut || rates::read(&engine, &mut session, &ids[..prompt_tokens], self.interrupt, || bar.tick()))?;
            // One token more than the depth, so that there is something to continue.
            let kept = session.rewind(depth.min(session.tokens().len())).map_err(unexpected)?;
            rates::read(&engine, &mut session, &ids[kept..=depth], self.interrupt, || bar.tick())?;
            let (decode_seconds, decode_joules) = timed(&mut || rates::decode(&mut session, generated, self.interrupt))?;
            bar.finish_and_clear();
            emit(&Measured::Speed(Speed {
                side,
                round,
                depth,
                prompt_tokens,
                prompt_seconds,
                decode_tokens: generated,
                decode_seconds,
                kv_resident_bytes: session.kv_bytes() as u64,
                kv_read_bytes: session.read_count().map_err(unexpected)?.bytes,
                peak_bytes: plan::peak_bytes(),
                prompt_joules,
                decode_joules,
                idle_watts,
            }))?;
        }
        Ok(())
    }

    fn whole_text(&self) -> Result<String> {
        let Some(path) = &self.args.file else { return Err(Failure::new(Kind::Usage, "there is no text").hint("-f FILE").into()) };
        read_file(path)
    }

    /// The part of the text that is scored.
    fn text(&self) -> Result<String> {
        let text = self.whole_text()?;
        let most = self.args.text_bytes as usize;
        let end = (0..=most.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        Ok(text[..end].to_string())
    }

    /// What a setting is, for scoring.
    fn setting(checkpoint: &Checkpoint) -> Setting {
        Setting { attention: checkpoint.attention.clone(), dtypes: checkpoint.dtypes }
    }

    fn likelihood(&self, side: Side) -> Result<()> {
        let text = self.text()?;
        let checkpoint = self.open(side)?;
        let tokens = checkpoint.tokenizer.encode(&text, false)?;
        let window = text_context(self.args).min(checkpoint.config().context);
        // What the model's texts begin with; where nothing does, what ends them.
        let prefix = checkpoint.tokenizer.encode("", true)?.first().copied().or(checkpoint.end_tokens().first().copied()).unwrap_or(0);
        let engine = self.load(checkpoint, side, window.min(tokens.len()))?;
        let setting = Self::setting(&engine.checkpoint);
        let bar = self.ui.token_bar(&format!("{}: text", engine.checkpoint.located.id), tokens.len() as u64);
        let go_on = |done: usize| {
            bar.set_position(done as u64);
            self.interrupt.flow()
        };
        let chunk = engine.checkpoint.chunk;
        let sum = score::log_likelihood(engine.model.as_ref(), &setting, prefix, &tokens, window, chunk, go_on).map_err(unexpected)?;
        bar.finish_and_clear();
        let Some(sum) = sum else { return Err(rates::stopped()) };
        let words = text.split_whitespace().count();
        emit(&Measured::Likelihood(Likelihood { side, nats: -sum, tokens: tokens.len(), bytes: text.len(), words }))
    }

    fn needles(&self, side: Side) -> Result<()> {
        let checkpoint = self.open(side)?;
        let ids = checkpoint.tokenizer.encode(&self.whole_text()?, false)?;
        let lengths = [needle::fitting(text_context(self.args), ids.len(), checkpoint.config().context)];
        let grid = Grid { lengths: &lengths, depths: &NEEDLE_DEPTHS, samples: 1, tasks: &NEEDLE_TASKS, seed: 0 };
        let engine = self.load(checkpoint, side, 2 * grid.longest())?;
        let settings = [Self::setting(&engine.checkpoint)];
        let found = needle::search(&engine, &settings, &ids, grid, self.ui, self.interrupt)?;
        for task in NEEDLE_TASKS {
            let score = mean(&found, |found| found.task == task).unwrap_or(0.0);
            let questions = found.iter().filter(|found| found.task == task).count();
            emit(&Measured::Needle { side, task: task_name(task), score, questions })?;
        }
        Ok(())
    }

    fn divergence(&self) -> Result<()> {
        let text = self.text()?;
        let [a, b] = [self.open(Side::A)?, self.open(Side::B)?];
        let (other, reference) = (Self::setting(&a), Self::setting(&b));
        let mut tokens = a.tokenizer.encode(&text, true)?;
        tokens.truncate(text_context(self.args).min(a.config().context));
        let from = tokens.len() / 2;
        let engine = self.load(a, Side::A, 2 * tokens.len())?;
        let bar = self.ui.token_bar("A beside B", tokens.len() as u64);
        let scores = score::compare(engine.model.as_ref(), &reference, &[other], &tokens, from, engine.checkpoint.chunk, |done| {
            bar.set_position(done as u64);
            self.interrupt.flow()
        });
        bar.finish_and_clear();
        let scores = scores.map_err(unexpected)?;
        self.stop()?;
        let [score] = &scores[..] else { return Ok(()) };
        let Summary { change, kl: [kl_mean, kl_p99, _], same_top, density, .. } = Summary::new(score);
        let scored = score.positions.len();
        emit(&Measured::Divergence(Divergence { kl_mean, kl_p99, same_top, perplexity_change: change, density, scored }))
    }

    fn choices(&self, side: Side, file: usize, from: usize) -> Result<()> {
        let questions = super::questions(self.args, file)?;
        let checkpoint = self.open(side)?;
        let mut pairs = Vec::new();
        for question in questions.iter().skip(from) {
            // As the harness cuts them: the tokens of prompt and choice together, of which those after the prompt's own count.
            let prompt = checkpoint.tokenizer.encode(question.prompt.trim_end(), true)?;
            let whole = |choice: &String| checkpoint.tokenizer.encode(&format!("{} {choice}", question.prompt.trim_end()), true);
            let tails = question.choices.iter().map(|choice| Ok(whole(choice)?.split_off(prompt.len()))).collect::<Result<Vec<_>>>()?;
            pairs.push((prompt, tails));
        }
        let longest = pairs.iter().map(|(prompt, tails)| prompt.len() + tails.iter().map(Vec::len).max().unwrap_or(0)).max().unwrap_or(0);
        if longest > checkpoint.config().context {
            let what = format!("a question takes {longest} tokens, and the model's context is {}", checkpoint.config().context);
            return Err(Failure::new(Kind::ContextOverflow, what).hint("shorter questions, or --limit").into());
        }
        let engine = self.load(checkpoint, side, 2 * longest)?;
        let setting = Self::setting(&engine.checkpoint);
        let bar = self.ui.token_bar(&format!("{}: questions", engine.checkpoint.located.id), pairs.len() as u64);
        for (index, ((prompt, tails), question)) in (from..).zip(pairs.iter().zip(&questions[from..])) {
            self.stop()?;
            let scores =
                score::continuations(engine.model.as_ref(), &setting, prompt, tails, engine.checkpoint.chunk).map_err(unexpected)?;
            let [right, right_by_length] = choices::is_right(question, &scores);
            emit(&Measured::Choice { side, file, index, right, right_by_length })?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn answers(&self, side: Side, from: usize) -> Result<()> {
        let checkpoint = self.open(side)?;
        let prompts = prompts(self.args);
        let ids_of = |prompt: &String| match &checkpoint.template {
            Some(template) => Ok(chat_prompt(&checkpoint, template, &[Message::new("user", prompt.as_str())])?.1),
            None => checkpoint.tokenizer.encode(prompt, true),
        };
        let ids = prompts.iter().map(ids_of).collect::<Result<Vec<_>>>()?;
        let most = self.args.answer_tokens as usize;
        let longest = ids.iter().map(Vec::len).max().unwrap_or(0) + most;
        if longest > checkpoint.config().context {
            let what = format!("a prompt and its answer take {longest} tokens, and the model's context is {}", checkpoint.config().context);
            return Err(Failure::new(Kind::ContextOverflow, what).hint("a shorter --ask, or fewer --answer-tokens").into());
        }
        let engine = self.load(checkpoint, side, longest)?;
        for (index, ids) in ids.iter().enumerate().skip(from) {
            let mut session = engine.session(longest)?;
            let mut sampler = Sampler::new(SamplerOptions::greedy()).map_err(unexpected)?;
            let end_tokens = engine.checkpoint.end_tokens();
            let options = GenerateOptions { max_tokens: Some(most), end_tokens, context: longest, logprobs: 0 };
            let done = reply(&engine, &mut session, ids, &mut sampler, &[], options, self.ui, self.interrupt, |_, _| Ok(()))?;
            self.stop()?;
            emit(&Measured::Answer { side, index, text: done.text })?;
        }
        Ok(())
    }
}
