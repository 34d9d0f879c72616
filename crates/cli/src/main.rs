//! `foveate`: text in, text out.

mod args;
mod commands;
mod crossover;
mod device;
mod engine;
mod failure;
mod interrupt;
mod memory;
mod plan;
mod routing;
mod source;
mod text;
mod ui;

use anyhow::Result;
use args::{Cli, Command, Eval, Models};
use clap::Parser;
use failure::Reported;
use interrupt::Interrupt;
use source::Hub;
use std::process::ExitCode;
use ui::{PipeClosed, Ui};

fn main() -> ExitCode {
    let cli = Cli::parse_from(args::gather_flags_of_b(std::env::args_os()));
    log_to_stderr(cli.global.verbose);
    set_threads(&cli.command);
    let json = cli.global.json;
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => match error.downcast_ref() {
            _ if error.is::<PipeClosed>() => ExitCode::SUCCESS,
            Some(Reported(code)) => ExitCode::from(*code),
            None => ExitCode::from(failure::report(&error, json)),
        },
    }
}

fn run(cli: Cli) -> Result<u8> {
    let ui = Ui::new(cli.global.quiet, cli.global.json, cli.global.no_progress);
    let interrupt = Interrupt::listen()?;
    let hub = || Hub::from_environment(&cli.global, ui, interrupt.clone());
    match cli.command {
        Command::Generate(args) => commands::generate::run(&args, &hub()?, ui, &interrupt),
        Command::Chat(args) => commands::chat::run(&args, &hub()?, ui, &interrupt),
        Command::Models(Models::Pull(args)) | Command::Pull(args) => commands::models::pull(&args, &hub()?, ui),
        Command::Models(Models::Ls) | Command::Ls => commands::models::ls(&hub()?, ui),
        Command::Models(Models::Show(args)) | Command::Show(args) => commands::models::show(&args, &hub()?, ui),
        Command::Models(Models::Rm(args)) | Command::Rm(args) => commands::models::rm(&args, &hub()?, ui),
        Command::Models(Models::Verify(args)) => commands::models::verify(&args, &hub()?, ui),
        Command::Models(Models::Path(args)) => commands::models::path(&args, &hub()?, ui),
        Command::Bench(args) => commands::bench::run(&args, &hub()?, ui, &interrupt),
        Command::Eval(Eval::Ppl(args)) => commands::eval::ppl(&args, &hub()?, ui, &interrupt),
        Command::Eval(Eval::Needle(args)) => commands::needle::run(&args, &hub()?, ui, &interrupt),
        Command::Compare(args) => commands::compare::run(&args, &hub()?, ui, &interrupt),
        Command::TrainRouter(args) => commands::train_router::run(&args, &hub()?, ui, &interrupt),
        Command::Route(args) => commands::route::run(&args, &hub()?, ui, &interrupt),
        Command::Doctor => commands::doctor::run(&hub()?, ui),
        Command::Completions { shell } => commands::completions::run(shell),
    }
}

fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => return,
        1 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).without_time().init();
}

/// Tells candle's pools, which read the environment when they start, how many threads to have.
fn set_threads(command: &Command) {
    let threads = match command {
        Command::Generate(args) => args.model.machine.threads,
        Command::Chat(args) => args.model.machine.threads,
        Command::Bench(args) => args.model.machine.threads,
        Command::Eval(Eval::Ppl(args)) => args.model.machine.threads,
        Command::Eval(Eval::Needle(args)) => args.model.machine.threads,
        Command::Route(args) => args.model.machine.threads,
        Command::TrainRouter(args) => args.model.machine.threads,
        Command::Compare(args) => args.machine.threads,
        _ => None,
    };
    if let Some(threads) = threads {
        for name in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
            // SAFETY: nothing else runs yet: this is the start of main, before any thread.
            unsafe { std::env::set_var(name, threads.to_string()) };
        }
    }
}
