//! Joules, where the machine tells them.

use crate::device::GpuMeter;
use candle_core::Device;
use std::path::{Path, PathBuf};

/// Where Linux shows the counters of Intel's and AMD's packages.
const POWERCAP: &str = "/sys/class/powercap";

/// Counters of energy.
#[derive(Debug)]
pub(super) enum Meter {
    /// Of the processor's packages.
    Packages(Vec<Zone>),
    /// Of the GPU that computes.
    Gpu(Box<GpuMeter>),
}

/// A processor package.
#[derive(Debug)]
pub(super) struct Zone {
    energy: PathBuf,
    /// The counter starts again from 0 here, in microjoules.
    range: u64,
}

impl Meter {
    /// What counts the energy of `device`: the GPU, or the processor packages of this machine.
    ///
    /// # Errors
    /// Why there is nothing to read.
    pub(super) fn open(device: &Device) -> Result<Self, String> {
        match GpuMeter::of(device) {
            Some(meter) => meter.map(|meter| Self::Gpu(Box::new(meter))),
            None => Self::of(Path::new(POWERCAP)),
        }
    }

    fn of(directory: &Path) -> Result<Self, String> {
        if !cfg!(target_os = "linux") {
            return Err(format!("energy is read through RAPL, on Linux; {} shows it to administrators only", std::env::consts::OS));
        }
        let entries = std::fs::read_dir(directory).map_err(|_| format!("no RAPL counters: {} is not there", directory.display()))?;
        // A package is `intel-rapl:0`; its parts, `intel-rapl:0:1`, are counted in it.
        let is_package = |name: &str| name.starts_with("intel-rapl:") && name.matches(':').count() == 1;
        let packages = entries.flatten().filter(|entry| is_package(&entry.file_name().to_string_lossy())).map(|entry| entry.path());
        let mut zones = Vec::new();
        for package in packages {
            let energy = package.join("energy_uj");
            let (Some(range), Some(_)) = (number(&package.join("max_energy_range_uj")), number(&energy)) else {
                return Err(format!("{} cannot be read: it wants an administrator", energy.display()));
            };
            zones.push(Zone { energy, range });
        }
        if zones.is_empty() { Err(format!("no RAPL counters in {}", directory.display())) } else { Ok(Self::Packages(zones)) }
    }

    /// The counters now.
    pub(super) fn read(&self) -> Vec<u64> {
        match self {
            Self::Packages(zones) => zones.iter().map(|zone| number(&zone.energy).unwrap_or(0)).collect(),
            Self::Gpu(meter) => vec![1000 * meter.millijoules()],
        }
    }

    /// Joules since `before`.
    pub(super) fn since(&self, before: &[u64]) -> f64 {
        let range = |counter: usize| match self {
            Self::Packages(zones) => zones[counter].range,
            Self::Gpu(_) => u64::MAX,
        };
        let microjoules = |(counter, (before, after)): (usize, (&u64, u64))| {
            if after >= *before { after - before } else { range(counter).saturating_sub(*before) + after }
        };
        let total: u64 = before.iter().zip(self.read()).enumerate().map(microjoules).sum();
        total as f64 / 1e6
    }
}

fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_summed_and_a_counter_that_starts_again_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let set = |zone: &str, energy: u64| {
            let zone = dir.path().join(zone);
            std::fs::create_dir_all(&zone).unwrap();
            std::fs::write(zone.join("energy_uj"), format!("{energy}\n")).unwrap();
            std::fs::write(zone.join("max_energy_range_uj"), "10000000\n").unwrap();
        };
        if !cfg!(target_os = "linux") {
            return;
        }
        assert!(Meter::of(dir.path()).unwrap_err().contains("no RAPL"));
        set("intel-rapl:0", 1_000_000);
        set("intel-rapl:1", 9_000_000);
        set("intel-rapl:0:0", 5);
        let meter = Meter::of(dir.path()).unwrap();
        let before = meter.read();
        set("intel-rapl:0", 3_000_000);
        set("intel-rapl:1", 500_000);
        set("intel-rapl:0:0", 7_000_000);
        assert!((meter.since(&before) - 3.5).abs() < 1e-9);
        assert!(Meter::of(&dir.path().join("nowhere")).unwrap_err().contains("nowhere"));
    }
}
