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
    let backends = concat!("backends: ", env!("FOVEATE_BACKENDS"));
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

pub(crate) use gpu::GpuMeter;

#[cfg(feature = "cuda")]
mod gpu {
    use super::{Gpu, Missing};
    use candle_core::Device;
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, sys};
    use nvml_wrapper::Nvml;

    pub(super) fn open(ordinal: usize) -> Result<Device, Missing> {
        match CudaContext::device_count() {
            Ok(count) if (count as usize) > ordinal => {}
            Ok(count) => return Err(Missing::Failed(format!("there are {count} GPUs"))),
            Err(error) => return Err(Missing::Failed(reason(error))),
        }
        // A stream of its own: what runs in the stream of each thread cannot be shared, nor recorded.
        let device = Device::new_cuda_with_stream(ordinal).map_err(|error| Missing::Failed(model::message(&error)))?;
        if let Device::Cuda(cuda) = &device {
            // SAFETY: everything runs in one stream, so nothing needs events to wait for.
            unsafe { cuda.disable_event_tracking() };
            keep_freed_memory(ordinal);
        }
        Ok(device)
    }

    fn reason(error: DriverError) -> String {
        match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => "there is no NVIDIA GPU, or no driver for it".to_string(),
            other => format!("{other:?}"),
        }
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

    /// The energy counter of a GPU.
    #[derive(Debug)]
    pub(crate) struct GpuMeter {
        nvml: Nvml,
        uuid: String,
    }

    impl GpuMeter {
        /// Of the GPU behind `device`, or why it cannot be read; `None`: it is the CPU.
        pub(crate) fn of(device: &Device) -> Option<Result<Self, String>> {
            let Device::Cuda(cuda) = device else { return None };
            let open = || -> Result<Self, String> {
                let bytes = cuda.cuda_stream().context().uuid().map_err(|error| error.to_string())?.bytes;
                let hex: String = bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
                let uuid = format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
                let meter = Self { nvml: Nvml::init().map_err(|error| error.to_string())?, uuid };
                meter.read().map(|_| meter).map_err(|error| error.to_string())
            };
            Some(open().map_err(|error| format!("the GPU's energy cannot be read: {error}")))
        }

        fn read(&self) -> Result<u64, nvml_wrapper::error::NvmlError> {
            self.nvml.device_by_uuid(self.uuid.as_str())?.total_energy_consumption()
        }

        /// Since the driver was loaded.
        pub(crate) fn millijoules(&self) -> u64 {
            self.read().unwrap_or(0)
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

    /// No GPU, no counter.
    #[derive(Debug)]
    pub(crate) enum GpuMeter {}

    impl GpuMeter {
        pub(crate) fn of(_device: &Device) -> Option<Result<Self, String>> {
            None
        }

        pub(crate) fn millijoules(&self) -> u64 {
            match *self {}
        }
    }
}
