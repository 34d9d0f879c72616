//! Where to compute: what `--device` names, and what is free there.

use crate::args::DeviceChoice;
use crate::failure::{Failure, Kind};
use crate::ui::Ui;
use anyhow::Result;
use candle_core::Device;

/// The device that the flag asks for. `auto` takes a GPU where there is one, and says so once where a build for GPUs finds none.
pub(crate) fn open(choice: DeviceChoice, ui: Ui) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => Ok(gpu::open(0).unwrap_or_else(|missing| {
            if let Missing::Failed(why) = missing {
                ui.warn(format!("no GPU can be used ({why}): this runs on the CPU; --device cpu says so yourself"));
            }
            Device::Cpu
        })),
        DeviceChoice::Cuda(ordinal) => gpu::open(ordinal).map_err(|missing| match missing {
            Missing::NotBuilt => absent("cuda"),
            Missing::Failed(why) => {
                Failure::new(Kind::Device, format!("cuda:{ordinal} cannot be used")).why(why).hint("--device cpu, or foveate doctor").into()
            }
        }),
        DeviceChoice::Metal => Err(absent("metal")),
    }
}

fn absent(name: &str) -> anyhow::Error {
    let backends = if cfg!(feature = "cuda") { "backends: cpu, cuda" } else { "backends: cpu" };
    Failure::new(Kind::Device, format!("this build has no {name} backend")).why(backends).hint("--device cpu, or foveate doctor").into()
}

/// Why there is no GPU.
#[derive(Debug)]
enum Missing {
    #[cfg_attr(feature = "cuda", expect(dead_code, reason = "of other builds"))]
    NotBuilt,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only builds for GPUs fail to find one"))]
    Failed(String),
}

/// A GPU, for people and plans.
#[derive(Debug, Clone)]
pub(crate) struct Gpu {
    pub(crate) name: String,
    /// Bytes of its memory.
    pub(crate) total: u64,
    /// Of those, free ones.
    pub(crate) free: u64,
}

/// The GPU behind a device; `None`: it is the CPU.
pub(crate) fn describe(device: &Device) -> Option<Gpu> {
    gpu::describe(device)
}

/// What computes, e.g. `cpu, 16 threads`.
pub(crate) fn label(device: &Device, backend: &str) -> String {
    match describe(device) {
        Some(gpu) => format!("{backend}, {}", gpu.name),
        None => format!("{backend}, {} threads", candle_core::utils::get_num_threads()),
    }
}

/// The processor that computes, and with how many threads: what measured times hold for.
pub(crate) fn machine(device: &Device) -> String {
    describe(device).map_or_else(|| format!("{} x{}", crate::plan::processor(), candle_core::utils::get_num_threads()), |gpu| gpu.name)
}

/// The same in a table, e.g. `cpu x16`.
pub(crate) fn short(device: &Device, backend: &str) -> String {
    match describe(device) {
        Some(gpu) => gpu.name,
        None => format!("{backend} x{}", candle_core::utils::get_num_threads()),
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::{Gpu, Missing};
    use candle_core::Device;
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, sys};

    pub(super) fn open(ordinal: usize) -> Result<Device, Missing> {
        let failed = |error: &dyn std::fmt::Display| Missing::Failed(error.to_string());
        match CudaContext::device_count() {
            Ok(count) if (count as usize) > ordinal => {}
            Ok(count) => return Err(Missing::Failed(format!("there are {count} GPUs"))),
            Err(error) => return Err(failed(&error)),
        }
        // A stream of its own: what runs in the stream of each thread cannot be shared, nor recorded.
        let device = Device::new_cuda_with_stream(ordinal).map_err(|error| failed(&model::message(&error)))?;
        if let Device::Cuda(cuda) = &device {
            // SAFETY: everything runs in one stream, so nothing needs events to wait for.
            unsafe { cuda.disable_event_tracking() };
            keep_freed_memory(ordinal);
        }
        Ok(device)
    }

    /// Lets the driver keep what tensors free for those that follow; otherwise it goes back to the system at each synchronisation.
    fn keep_freed_memory(ordinal: usize) {
        let mut pool = std::ptr::null_mut();
        let mut most = u64::MAX;
        // SAFETY: both calls get addresses of locals of the types they want; what they return is not needed, only faster.
        unsafe {
            if sys::cuDeviceGetDefaultMemPool(&raw mut pool, ordinal as i32) == sys::CUresult::CUDA_SUCCESS {
                sys::cuMemPoolSetAttribute(pool, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut most).cast());
            }
        }
    }

    pub(super) fn describe(device: &Device) -> Option<Gpu> {
        let Device::Cuda(cuda) = device else { return None };
        let stream = cuda.cuda_stream();
        let context = stream.context();
        let (free, total) = context.mem_get_info().ok()?;
        Some(Gpu { name: context.name().ok()?, total: total as u64, free: free as u64 })
    }
}

#[cfg(not(feature = "cuda"))]
mod gpu {
    use super::{Gpu, Missing};
    use candle_core::Device;

    pub(super) fn open(_ordinal: usize) -> Result<Device, Missing> {
        Err(Missing::NotBuilt)
    }

    pub(super) fn describe(_device: &Device) -> Option<Gpu> {
        None
    }
}
