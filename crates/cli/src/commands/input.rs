//! Text of the user's: files and pipes.

use crate::failure::{Failure, Kind};
use crate::ui::bytes;
use anyhow::Result;
use std::io::Read;
use std::path::Path;

/// Longest prompt that is read: some 50 million tokens.
const MAX_PROMPT_BYTES: u64 = 256 << 20;

/// All of standard input.
pub(super) fn read_stdin() -> Result<String> {
    read_text(std::io::stdin(), "standard input")
}

/// All of `source`, unless it does not end.
fn read_text(source: impl Read, name: &str) -> Result<String> {
    let mut content = Vec::new();
    source
        .take(MAX_PROMPT_BYTES + 1)
        .read_to_end(&mut content)
        .map_err(|error| Failure::new(Kind::NotFound, format!("{name}: {error}")))?;
    if content.len() as u64 > MAX_PROMPT_BYTES {
        return Err(
            Failure::new(Kind::Usage, format!("{name} holds more than {}, too much for any context", bytes(MAX_PROMPT_BYTES))).into()
        );
    }
    decode(content, name)
}

/// A text file of the user's, UTF-8 or UTF-16 with a byte order mark.
pub(super) fn read_file(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    if path.is_dir() {
        return Err(Failure::new(Kind::NotFound, format!("{name} is a directory, expected a text file")).into());
    }
    read_text(std::fs::File::open(path).map_err(|error| Failure::new(Kind::NotFound, format!("{name}: {error}")))?, &name)
}

fn decode(bytes: Vec<u8>, name: &str) -> Result<String> {
    let wide = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let units: Vec<u16> = bytes.chunks_exact(2).map(|pair| unit([pair[0], pair[1]])).collect();
        String::from_utf16(&units).map_err(|error| Failure::malformed(format!("{name}: UTF-16 by its first bytes, but {error}")).into())
    };
    match bytes.as_slice() {
        [0xff, 0xfe, rest @ ..] => wide(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => wide(rest, u16::from_be_bytes),
        [0xef, 0xbb, 0xbf, ..] | [..] => {
            let text = String::from_utf8(bytes).map_err(|error| {
                let at = error.utf8_error().valid_up_to();
                Failure::malformed(format!("{name} is not text: byte {at} is not UTF-8"))
                    .hint("convert it first, e.g. iconv -f latin1 -t utf-8")
            })?;
            Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
        }
    }
}
