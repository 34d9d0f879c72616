//! `foveate completions`

use crate::args::Cli;
use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;

pub(crate) fn run(shell: Shell) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "foveate", &mut script);
    crate::ui::stdout(&String::from_utf8_lossy(&script))?;
    Ok(0)
}
