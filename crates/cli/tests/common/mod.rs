//! The program under test, in an environment of its own, and a Hub on the loopback interface that misbehaves
//! when it is told to.

#![allow(dead_code, unreachable_pub, reason = "shared: each test binary uses its own part")]

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// `foveate` with nothing of the user's environment that changes what it does.
pub fn foveate(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foveate"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("HF_") || name.starts_with("HUGGING") || name.to_lowercase().ends_with("_proxy") {
            command.env_remove(name);
        }
    }
    command.env("HF_HOME", home).env("XDG_CACHE_HOME", home).env("RUST_BACKTRACE", "0");
    command
}

/// A checkpoint of the model crate's fixtures.
pub fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/tiny").join(name)
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs and checks the exit code; a panic is never right.
pub fn run(command: &mut Command, code: i32) -> Output {
    let output = command.output().expect("foveate starts");
    let text = format!("{command:?}\n--- stdout\n{}\n--- stderr\n{}", stdout(&output), stderr(&output));
    assert!(!text.contains("panicked"), "{text}");
    assert_eq!(output.status.code(), Some(code), "{text}");
    output
}

/// What the server does wrong.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// Each transfer of this many bytes is cut; then transfers are whole.
    pub cuts: Vec<usize>,
    /// Answers every request with this.
    pub status: Option<u16>,
    /// Announces this many bytes more than there are.
    pub lie: Option<usize>,
    /// Flips a bit of the byte at this place.
    pub flip: Option<usize>,
    /// Ignores ranges.
    pub no_ranges: bool,
    /// Sleeps so long before every 16 KiB.
    pub slow: Option<Duration>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    commit: String,
    faults: Faults,
    /// Bytes `from..` of a file, as they were asked for; metadata requests are not transfers.
    transfers: Vec<(String, usize)>,
}

/// A Hub with one repository, `user/tiny`.
#[derive(Debug, Clone)]
pub struct HubServer {
    pub url: String,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    pub fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let state = Arc::new(Mutex::new(State { files, commit: "c".repeat(40), ..State::default() }));
        let server = Self { url, state: state.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = state.clone();
                std::thread::spawn(move || {
                    let _ = answer(stream, &state);
                });
            }
        });
        server
    }

    pub fn set(&self, faults: Faults) {
        self.state.lock().unwrap().faults = faults;
    }

    /// Replaces a file, in a new commit.
    pub fn change(&self, name: &str, bytes: Vec<u8>) {
        let mut state = self.state.lock().unwrap();
        state.files.insert(name.to_string(), bytes);
        state.commit = "d".repeat(40);
    }

    /// Where each transfer of `name` began.
    pub fn transfers(&self, name: &str) -> Vec<usize> {
        self.state.lock().unwrap().transfers.iter().filter(|(file, _)| file == name).map(|(_, from)| *from).collect()
    }

    pub fn foveate(&self, home: &Path) -> Command {
        let mut command = foveate(home);
        command.env("HF_ENDPOINT", &self.url);
        command
    }
}

/// As the Hub names a file: SHA-256 of a large one, git's blob hash of a small one.
pub fn etag(name: &str, bytes: &[u8]) -> String {
    let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    if name.ends_with(".json") {
        hex(&Sha1::new().chain_update(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize())
    } else {
        hex(&Sha256::digest(bytes))
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut range = None;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        if let Some(value) = line.to_lowercase().strip_prefix("range: bytes=") {
            range = Some(value.trim().to_string());
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default().to_string();
    let faults = state.lock().unwrap().faults.clone();
    if let Some(status) = faults.status {
        return write!(stream, "HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    if path.starts_with("/api/models/user/tiny/revision/") {
        let state = state.lock().unwrap();
        let siblings: Vec<_> = state.files.keys().map(|name| json!({"rfilename": name})).collect();
        let body = json!({"sha": state.commit, "siblings": siblings}).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let name = path.strip_prefix("/user/tiny/resolve/").and_then(|rest| rest.split_once('/')).map(|(_, name)| name.to_string());
    let (Some(name), Some(bytes)) = (name.clone(), name.and_then(|name| state.lock().unwrap().files.get(&name).cloned())) else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let common = format!("ETag: \"{}\"\r\nX-Repo-Commit: {}\r\nConnection: close\r\n", etag(&name, &bytes), state.lock().unwrap().commit);
    if range.as_deref() == Some("0-0") {
        write!(stream, "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-0/{}\r\nContent-Length: 1\r\n{common}\r\n", bytes.len())?;
        return stream.write_all(&bytes[..1]);
    }
    let from: usize = range.and_then(|range| range.split('-').next()?.parse().ok()).filter(|_| !faults.no_ranges).unwrap_or(0);
    let cut = {
        let mut state = state.lock().unwrap();
        state.transfers.push((name.clone(), from));
        if state.faults.cuts.is_empty() { None } else { Some(state.faults.cuts.remove(0)) }
    };
    let mut body = bytes.clone();
    if let Some(at) = faults.flip {
        body[at] ^= 1;
    }
    let body = &body[from..];
    let length = body.len() + faults.lie.unwrap_or(0);
    if from > 0 {
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{}/{}\r\n",
            bytes.len() - 1,
            bytes.len() + faults.lie.unwrap_or(0)
        )?;
    } else {
        write!(stream, "HTTP/1.1 200 OK\r\n")?;
    }
    write!(stream, "Content-Length: {length}\r\n{common}\r\n")?;
    let body = &body[..cut.unwrap_or(body.len()).min(body.len())];
    for piece in body.chunks(16 << 10) {
        if let Some(pause) = faults.slow {
            std::thread::sleep(pause);
        }
        stream.write_all(piece)?;
        stream.flush()?;
    }
    Ok(())
}
