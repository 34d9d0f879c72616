//! The cache that the Hub's own tools use: `models--USER--REPO/{blobs,snapshots,refs}`.

use super::Checksum;
use crate::failure::{Failure, Kind};
use crate::interrupt::Interrupt;
use crate::ui::{Ui, bytes};
use anyhow::{Context, Result};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Where models are kept: the flag, or as the Hub's own tools decide.
pub(crate) fn root(flag: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = flag {
        return Ok(dir.to_path_buf());
    }
    if let Some(dir) = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")) {
        return Ok(dir);
    }
    Ok(hf_home()?.join("hub"))
}

/// A path in the environment; an empty one counts as none.
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// `HF_HOME`, or its default.
pub(crate) fn hf_home() -> Result<PathBuf> {
    if let Some(dir) = variable("HF_HOME") {
        return Ok(dir);
    }
    user_cache().map(|dir| dir.join("huggingface")).ok_or_else(|| {
        Failure::new(Kind::NotFound, "no place to keep models: neither HOME, HF_HOME nor HF_HUB_CACHE is set")
            .hint("--cache-dir DIR")
            .into()
    })
}

/// Where programs keep what can be made again.
pub(crate) fn user_cache() -> Option<PathBuf> {
    variable("XDG_CACHE_HOME").or_else(|| std::env::home_dir().filter(|home| !home.as_os_str().is_empty()).map(|home| home.join(".cache")))
}

/// A repository's part of the cache, at a revision.
pub(crate) fn repo(cache: &Cache, id: &str, revision: &str) -> CacheRepo {
    cache.repo(Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string()))
}

/// A repository's directory.
pub(crate) fn repo_dir(cache: &Cache, id: &str) -> PathBuf {
    cache.path().join(Repo::model(id.to_string()).folder_name())
}

/// Where a file lies while it is fetched.
pub(crate) fn partial_path(blob: &Path) -> PathBuf {
    let mut name = blob.as_os_str().to_os_string();
    name.push(".incomplete");
    PathBuf::from(name)
}

/// A lock that ends with the process, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Locks `blob` against other processes; waits, and says so, while one of them fetches it.
pub(crate) fn lock(blob: &Path, name: &str, ui: Ui, interrupt: &Interrupt) -> Result<Lock> {
    if let Some(dir) = blob.parent() {
        std::fs::create_dir_all(dir).map_err(|error| io_failure(error, dir))?;
    }
    let path = blob.with_extension("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(|error| io_failure(error, &path))?;
    let mut said = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Lock { _file: file }),
            Err(TryLockError::WouldBlock) => {
                if !std::mem::replace(&mut said, true) {
                    ui.say(format!("  {name}: another process is fetching it, waiting"));
                }
                if interrupt.is_set() {
                    return Err(Failure::new(Kind::Interrupted, "stopped while waiting for another process").into());
                }
                std::thread::sleep(Duration::from_millis(200));
            }
            Err(TryLockError::Error(error)) => return Err(io_failure(error, &path).into()),
        }
    }
}

/// An error of the disk, with what to do about it.
pub(crate) fn io_failure(error: io::Error, path: &Path) -> Failure {
    let failure = Failure::new(Kind::Disk, format!("{}: {error}", path.display()));
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            let free = path.parent().and_then(|dir| fs4::available_space(dir).ok()).unwrap_or(0);
            failure
                .why(format!("{} are free; what was fetched is kept", bytes(free)))
                .hint("free some space and run it again, or --cache-dir DIR")
        }
        _ => failure.hint("--cache-dir DIR"),
    }
}

/// Refuses to start what cannot fit: `needed` bytes and a twentieth more.
pub(crate) fn ensure_space(blob: &Path, needed: u64) -> Result<()> {
    let dir = blob.parent().unwrap_or(blob);
    let with_margin = needed + needed / 20;
    match fs4::available_space(dir) {
        Ok(free) if free < with_margin => {
            let what = format!("not enough space in {}: {} needed, {} free", dir.display(), bytes(with_margin), bytes(free));
            Err(Failure::new(Kind::Disk, what).hint("free some space, or --cache-dir DIR").into())
        }
        // A file system that cannot tell is tried.
        _ => Ok(()),
    }
}

/// Checks `partial` and gives it its name for good: synced, renamed, directory synced.
pub(crate) fn commit_blob(partial: &Path, blob: &Path, checksum: &Checksum, name: &str, ui: Ui) -> Result<()> {
    let size = partial.metadata().map_err(|error| io_failure(error, partial))?.len();
    let bar = ui.byte_bar(&format!("{name} (verifying)"), size);
    let got = checksum.of_file(partial, |read| bar.inc(read))?;
    bar.finish_and_clear();
    if got != checksum.hex() {
        let bad = blob.with_extension("bad");
        std::fs::rename(partial, &bad).map_err(|error| io_failure(error, partial))?;
        return Err(Failure::malformed(format!("{name}: the bytes that came are not the file"))
            .why(format!("checksum {got}, expected {}; kept as {}", checksum.hex(), bad.display()))
            .hint("run it again to fetch it anew")
            .into());
    }
    File::open(partial).and_then(|file| file.sync_all()).map_err(|error| io_failure(error, partial))?;
    std::fs::rename(partial, blob).map_err(|error| io_failure(error, blob))?;
    sync_directory(blob)?;
    ui.say(format!("  {name}: {}, verified", bytes(size)));
    Ok(())
}

fn sync_directory(file: &Path) -> Result<()> {
    #[cfg(unix)]
    if let Some(dir) = file.parent() {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| io_failure(error, dir))?;
    }
    #[cfg(not(unix))]
    let _ = file;
    Ok(())
}

/// Makes `snapshots/<revision>/<file>` point at `blob`.
pub(crate) fn link(snapshot: &Path, file: &str, blob: &Path) -> Result<PathBuf> {
    let pointer = snapshot.join(file);
    let dir = pointer.parent().unwrap_or(snapshot);
    std::fs::create_dir_all(dir).map_err(|error| io_failure(error, dir))?;
    if pointer.exists() {
        return Ok(pointer);
    }
    // A link whose blob was deleted.
    let _ = std::fs::remove_file(&pointer);
    #[cfg(unix)]
    {
        let up = "../".repeat(2 + Path::new(file).components().count() - 1);
        let target = Path::new(&up).join("blobs").join(blob.file_name().context("a blob has a name")?);
        std::os::unix::fs::symlink(target, &pointer).map_err(|error| io_failure(error, &pointer))?;
    }
    #[cfg(not(unix))]
    std::fs::hard_link(blob, &pointer).map_err(|error| io_failure(error, &pointer))?;
    sync_directory(&pointer)?;
    Ok(pointer)
}

/// One file of a snapshot.
#[derive(Debug, Clone)]
pub(crate) struct CachedFile {
    /// Its path in the repository.
    pub(crate) name: String,
    /// The link in the snapshot.
    pub(crate) pointer: PathBuf,
    /// What it points at.
    pub(crate) blob: PathBuf,
    pub(crate) size: u64,
    pub(crate) used: SystemTime,
}

/// One repository of the cache.
#[derive(Debug, Clone)]
pub(crate) struct CachedRepo {
    /// `user/repo`
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
    pub(crate) files: Vec<CachedFile>,
    /// Bytes of files that are not complete.
    pub(crate) partial: u64,
}

/// Every model repository of the cache, by name.
pub(crate) fn list(cache: &Cache) -> Vec<CachedRepo> {
    let mut repos: Vec<CachedRepo> = std::fs::read_dir(cache.path())
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let id = name.strip_prefix("models--")?.replacen("--", "/", 1);
            read_repo(id, entry.path())
        })
        .collect();
    repos.sort_by(|a, b| a.id.cmp(&b.id));
    repos
}

/// One repository of the cache, if it is there.
pub(crate) fn cached_repo(cache: &Cache, id: &str) -> Option<CachedRepo> {
    read_repo(id.to_string(), repo_dir(cache, id))
}

fn read_repo(id: String, dir: PathBuf) -> Option<CachedRepo> {
    if !dir.is_dir() {
        return None;
    }
    let mut files = Vec::new();
    for snapshot in std::fs::read_dir(dir.join("snapshots")).into_iter().flatten().flatten() {
        collect(&snapshot.path(), "", &mut files);
    }
    let blobs = std::fs::read_dir(dir.join("blobs")).into_iter().flatten().flatten();
    let partial = blobs
        .filter(|blob| blob.path().extension().is_some_and(|e| e == "incomplete"))
        .filter_map(|blob| Some(blob.metadata().ok()?.len()))
        .sum();
    Some(CachedRepo { id, dir, files, partial })
}

fn collect(dir: &Path, prefix: &str, files: &mut Vec<CachedFile>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), format!("{prefix}{}", entry.file_name().to_string_lossy()));
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        if metadata.is_dir() {
            collect(&path, &format!("{name}/"), files);
        } else if let Ok(blob) = path.canonicalize() {
            let used = metadata.accessed().or_else(|_| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            files.push(CachedFile { name, pointer: path, blob, size: metadata.len(), used });
        }
    }
}

/// Deletes links and the blobs that nothing else points at. Returns the bytes freed.
pub(crate) fn delete(repo_dir: &Path, doomed: &[CachedFile], kept: &[CachedFile]) -> Result<u64> {
    let mut freed = 0;
    for file in doomed {
        std::fs::remove_file(&file.pointer).map_err(|error| io_failure(error, &file.pointer))?;
        if !kept.iter().any(|other| other.blob == file.blob) && file.blob.exists() {
            std::fs::remove_file(&file.blob).map_err(|error| io_failure(error, &file.blob))?;
            freed += file.size;
        }
    }
    if kept.is_empty() {
        std::fs::remove_dir_all(repo_dir).map_err(|error| io_failure(error, repo_dir))?;
    }
    Ok(freed)
}
