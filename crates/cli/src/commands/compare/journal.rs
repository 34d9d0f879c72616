//! What was measured so far, line after line in a file: an interrupted comparison goes on from there.

use super::job::Measured;
use crate::failure::{Failure, Kind};
use anyhow::Result;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The lines of a file and those that are added to it.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    lines: Vec<Measured>,
}

impl Journal {
    /// Opens the journal of the comparison that `key` names, empty if there is none.
    pub(super) fn open(directory: &Path, key: &str, restart: bool) -> Result<Self> {
        let path = directory.join(format!("{key}.jsonl"));
        let fail = |error: std::io::Error| Failure::new(Kind::Disk, format!("{}: {error}", path.display()));
        std::fs::create_dir_all(directory).map_err(fail)?;
        if restart && path.exists() {
            std::fs::remove_file(&path).map_err(fail)?;
        }
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let (mut lines, mut whole) = (Vec::new(), 0);
        // A line that was cut was never measured.
        for line in text.split_inclusive('\n').take_while(|line| line.ends_with('\n')) {
            let Ok(measured) = serde_json::from_str(line) else { break };
            lines.push(measured);
            whole += line.len();
        }
        let file = File::options().create(true).append(true).open(&path).map_err(fail)?;
        file.set_len(whole as u64).map_err(fail)?;
        Ok(Self { file, lines, path })
    }

    /// What is known.
    pub(super) fn lines(&self) -> &[Measured] {
        &self.lines
    }

    /// Adds a line; it is on disk when this returns.
    pub(super) fn push(&mut self, line: Measured) -> Result<()> {
        let fail = |error: std::io::Error| Failure::new(Kind::Disk, format!("{}: {error}", self.path.display()));
        writeln!(self.file, "{}", serde_json::to_string(&line)?).and_then(|()| self.file.flush()).map_err(fail)?;
        self.lines.push(line);
        Ok(())
    }

    /// The comparison is whole: another of the same is measured anew.
    pub(super) fn close(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(|error| Failure::new(Kind::Disk, format!("{}: {error}", self.path.display())))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::job::Side;
    use super::*;

    #[test]
    fn what_was_pushed_is_there_again_and_a_torn_line_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let load = |round| Measured::Load { side: Side::A, round, seconds: 0.25 };
        let mut journal = Journal::open(dir.path(), "k", false).unwrap();
        journal.push(load(0)).unwrap();
        journal.push(load(1)).unwrap();
        let path = journal.path.clone();
        drop(journal);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 5]).unwrap();
        let mut journal = Journal::open(dir.path(), "k", false).unwrap();
        assert_eq!(journal.lines(), [load(0)]);
        journal.push(load(2)).unwrap();
        assert_eq!(Journal::open(dir.path(), "k", false).unwrap().lines(), [load(0), load(2)]);
        let journal = Journal::open(dir.path(), "k", true).unwrap();
        assert!(journal.lines().is_empty());
        journal.close().unwrap();
        assert!(!path.exists());
    }
}
