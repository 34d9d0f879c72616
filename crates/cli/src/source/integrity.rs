//! Whether a file holds the bytes it should.

use anyhow::{Context, Result};
use model::weights::hex;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::Path;

/// What a file's bytes must hash to. The Hub names large files by SHA-256 and small ones by git's blob SHA-1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Checksum {
    Sha256(String),
    GitBlob(String),
}

impl Checksum {
    /// Tells the two by their length; anything else is no checksum (and no file name either).
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let hex = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        match text.len() {
            64 if hex => Some(Self::Sha256(text.to_string())),
            40 if hex => Some(Self::GitBlob(text.to_string())),
            _ => None,
        }
    }

    pub(crate) fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }

    /// What `path` hashes to, in the same kind. `progress` is told the bytes read since it was last called.
    pub(crate) fn of_file(&self, path: &Path, progress: impl FnMut(u64)) -> Result<String> {
        match self {
            Self::Sha256(_) => digest(Sha256::new(), path, progress),
            Self::GitBlob(_) => {
                let size = path.metadata().with_context(|| path.display().to_string())?.len();
                digest(Sha1::new().chain_update(format!("blob {size}\0")), path, progress)
            }
        }
    }
}

fn digest(mut digest: impl Digest, path: &Path, mut progress: impl FnMut(u64)) -> Result<String> {
    let mut file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).with_context(|| path.display().to_string())?;
        if read == 0 {
            return Ok(hex(&digest.finalize()));
        }
        digest.update(&buffer[..read]);
        progress(read as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_agree_with_the_usual_tools() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "hello\n").unwrap();
        let of = |checksum: Checksum| checksum.of_file(file.path(), |_| {}).unwrap();
        assert_eq!(of(Checksum::Sha256(String::new())), "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03");
        assert_eq!(of(Checksum::GitBlob(String::new())), "ce013625030ba8dba906f756967f9e9ca394464a");
    }

    #[test]
    fn only_hashes_are_checksums() {
        assert!(Checksum::parse(&"a".repeat(64)).is_some() && Checksum::parse(&"0".repeat(40)).is_some());
        for text in ["", "../../x", &"g".repeat(40), &"A".repeat(64), &"a".repeat(41)] {
            assert_eq!(Checksum::parse(text), None, "{text}");
        }
    }
}
