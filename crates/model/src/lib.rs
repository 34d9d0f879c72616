//! The transformer: configurations, weights, layers, architectures, sampling and generation.
//!
//! ```text
//! file --> weights::Weights --> arch::load --> CausalLm
//! ids --> CausalLm::forward (attention goes through sparse_attn::RoutedAttention) --> logits --> Sampler --> id
//! ```
//!
//! Knows token ids, weights and tensors; nothing of text or URLs, nor which backend runs.

pub mod arch;
pub mod calibrate;
pub mod config;
mod error;
pub mod generate;
mod gpu;
pub mod layers;
mod published;
mod router_file;
pub mod sampler;
pub mod score;
pub mod trace;
pub mod train;
pub mod weights;

pub use arch::{CausalLm, load};
pub use config::Config;
pub use error::message;
pub use generate::{FinishReason, GenerateOptions, Session, Token};
pub use published::Published;
pub use router_file::RouterFile;
pub use sampler::{Sampler, SamplerOptions};
pub use weights::Weights;
