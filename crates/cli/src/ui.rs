//! Everything a person reads that is not the result: it goes to standard error.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// What may be printed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ui {
    /// Only errors.
    pub(crate) quiet: bool,
    /// One JSON document on standard output.
    pub(crate) json: bool,
    progress: bool,
}

impl Ui {
    pub(crate) fn new(quiet: bool, json: bool, no_progress: bool) -> Self {
        Self { quiet, json, progress: !quiet && !no_progress && std::io::stderr().is_terminal() }
    }

    /// A line of information.
    pub(crate) fn say(&self, line: impl AsRef<str>) {
        if !self.quiet {
            eprintln!("{}", line.as_ref());
        }
    }

    /// A line that a user should not miss.
    pub(crate) fn warn(&self, line: impl AsRef<str>) {
        if !self.quiet {
            eprintln!("warning: {}", line.as_ref());
        }
    }

    /// A bar of bytes: how many, how fast, how long still.
    pub(crate) fn byte_bar(&self, name: &str, total: u64) -> ProgressBar {
        self.bar(name, total, "  {msg} {wide_bar} {percent:>3} %  {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left")
    }

    /// A bar of tokens.
    pub(crate) fn token_bar(&self, name: &str, total: u64) -> ProgressBar {
        self.bar(name, total, "{msg} {wide_bar} {human_pos}/{human_len}  {rate}  {eta} left")
    }

    fn bar(&self, name: &str, total: u64, template: &str) -> ProgressBar {
        let bar = ProgressBar::new(total).with_message(name.to_string());
        bar.set_draw_target(if self.progress { ProgressDrawTarget::stderr_with_hz(10) } else { ProgressDrawTarget::hidden() });
        let rate = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = write!(out, "{:.0} t/s", state.per_sec());
        };
        bar.set_style(ProgressStyle::with_template(template).expect("a constant").with_key("rate", rate).progress_chars("━╸ "));
        if self.progress {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        bar
    }
}

/// The reader of standard output went away (`| head`): not an error, but the end.
#[derive(Debug)]
pub(crate) struct PipeClosed;

impl std::fmt::Display for PipeClosed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("standard output was closed")
    }
}

impl std::error::Error for PipeClosed {}

/// Writes to standard output and flushes.
pub(crate) fn stdout(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(PipeClosed.into()),
        Err(error) => Err(crate::failure::Failure::new(crate::failure::Kind::Disk, format!("standard output: {error}")).into()),
    }
}

/// Bytes as a person reads them: `1.1 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}
