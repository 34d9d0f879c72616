//! One file over HTTP: resumed where it stopped, checked before it gets its name.

use super::Checksum;
use super::cache::{commit_blob, ensure_space, io_failure, lock};
use crate::failure::{Failure, Kind};
use crate::interrupt::Interrupt;
use crate::ui::{Ui, bytes};
use anyhow::{Context, Result};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;
use ureq::Agent;
use ureq::http::Response;

/// Attempts in a row that bring no byte before giving up.
const MAX_FRUITLESS: u32 = 5;

/// A file to fetch. Its checksum names it, so a partial file of another content is another file.
#[derive(Debug)]
pub(crate) struct Download<'a> {
    pub(crate) url: &'a str,
    pub(crate) size: u64,
    pub(crate) checksum: &'a Checksum,
    /// Where it goes once it is whole; what is partial lies beside it, with `.incomplete` appended.
    pub(crate) blob: &'a Path,
    /// How the user knows it.
    pub(crate) name: &'a str,
}

/// What fetching needs besides the file.
#[derive(Debug)]
pub(crate) struct Transport<'a> {
    pub(crate) agent: &'a Agent,
    pub(crate) token: Option<&'a str>,
    pub(crate) ui: Ui,
    pub(crate) interrupt: &'a Interrupt,
}

/// Fetches `download` unless it is there already.
pub(crate) fn fetch(download: &Download<'_>, with: &Transport<'_>) -> Result<()> {
    let _lock = lock(download.blob, download.name, with.ui, with.interrupt)?;
    if download.blob.exists() {
        return Ok(());
    }
    let partial = super::cache::partial_path(download.blob);
    let mut file = OpenOptions::new().create(true).append(true).open(&partial).map_err(|error| io_failure(error, &partial))?;
    let mut have = file.metadata().map_err(|error| io_failure(error, &partial))?.len();
    if have > download.size {
        with.ui.say(format!("  {}: the partial file is longer than the whole, starting again", download.name));
        file.set_len(0).map_err(|error| io_failure(error, &partial))?;
        have = 0;
    }
    ensure_space(download.blob, download.size - have)?;
    if have > 0 {
        with.ui.say(format!("  {}: going on at {} of {}", download.name, bytes(have), bytes(download.size)));
    }
    let bar = with.ui.byte_bar(download.name, download.size);
    bar.set_position(have);
    bar.reset_eta();
    let mut fruitless = 0;
    while have < download.size {
        let before = have;
        let result = receive(download, with, &mut file, &mut have, &partial, &bar);
        if have > before {
            fruitless = 0;
        }
        match result {
            Ok(()) => {}
            Err(error) if is_final(&error) => {
                bar.abandon();
                return Err(error);
            }
            Err(error) => {
                fruitless += 1;
                if fruitless > MAX_FRUITLESS {
                    bar.abandon();
                    let percent = 100 * have / download.size.max(1);
                    return Err(Failure::new(Kind::Network, format!("{}: {error:#}", download.name))
                        .why(format!("{} of {} are kept", bytes(have), bytes(download.size)))
                        .hint(format!("run it again to resume from {percent} %"))
                        .into());
                }
                tracing::debug!("{}: {error:#}; attempt {fruitless}", download.name);
                std::thread::sleep(Duration::from_millis(100 << fruitless));
            }
        }
    }
    bar.finish_and_clear();
    drop(file);
    commit_blob(&partial, download.blob, download.checksum, download.name, with.ui)
}

/// Errors that another attempt would only repeat.
fn is_final(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Failure>().is_some()
}

/// One request: appends to `file` what the server sends. An `Ok` may be partial.
fn receive(
    download: &Download<'_>,
    with: &Transport<'_>,
    file: &mut std::fs::File,
    have: &mut u64,
    partial: &Path,
    bar: &indicatif::ProgressBar,
) -> Result<()> {
    let mut request = with.agent.get(download.url);
    if let Some(token) = with.token {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    if *have > 0 {
        request = request.header("Range", format!("bytes={have}-"));
    }
    let response = request.call()?;
    let status = response.status().as_u16();
    match (status, *have) {
        (206, _) => check_range(&response, *have, download)?,
        (200, 0) => {}
        (200, _) => {
            with.ui.say(format!("  {}: the server cannot resume, starting again", download.name));
            file.set_len(0).map_err(|error| io_failure(error, partial))?;
            *have = 0;
        }
        (416, _) => {
            file.set_len(0).map_err(|error| io_failure(error, partial))?;
            *have = 0;
            anyhow::bail!("the server has nothing from there on (416)");
        }
        (401 | 403 | 404, _) => return Err(super::hub::refused(status, download.url).into()),
        _ => anyhow::bail!("the server answers {status}"),
    }
    if status == 200
        && let Some(length) = header(&response, "content-length").and_then(|length| length.parse::<u64>().ok())
        && length != download.size
    {
        let what = format!("{}: the server announces {length} bytes, its metadata says {}", download.name, download.size);
        return Err(Failure::new(Kind::Network, what).hint("run it again; if it stays, the mirror is broken").into());
    }
    let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
    let mut buffer = vec![0; 256 << 10];
    while *have < download.size {
        if with.interrupt.is_set() {
            let percent = 100 * *have / download.size.max(1);
            let what = format!("{}: stopped, {} of {} are kept", download.name, bytes(*have), bytes(download.size));
            return Err(Failure::new(Kind::Interrupted, what).hint(format!("run it again to resume from {percent} %")).into());
        }
        let room = (download.size - *have).min(buffer.len() as u64) as usize;
        let read = body.read(&mut buffer[..room]).context("the connection broke")?;
        anyhow::ensure!(read > 0, "the connection closed after {have} of {} bytes", download.size);
        file.write_all(&buffer[..read]).map_err(|error| io_failure(error, partial))?;
        *have += read as u64;
        bar.set_position(*have);
    }
    Ok(())
}

fn header<'a, B>(response: &'a Response<B>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// The server must send what was asked for, of a file of the size we know.
fn check_range<B>(response: &Response<B>, have: u64, download: &Download<'_>) -> Result<()> {
    let range = header(response, "content-range").unwrap_or_default();
    if range == format!("bytes {have}-{}/{}", download.size - 1, download.size) {
        return Ok(());
    }
    let what = format!("{}: the server sends {range:?} of a file of {} bytes, asked from byte {have}", download.name, download.size);
    Err(Failure::new(Kind::Network, what).hint("run it again; if it stays, the mirror is broken").into())
}
