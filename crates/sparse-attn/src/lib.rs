//! Routed sparse attention over a paged key/value cache.
//!
//! The data flow of one layer in one step, which is also the order of the modules:
//!
//! ```text
//! hidden, q, k, v --> TokenRouter::admit --> AttentionBackend::write --> LayerStore (pages, block summaries)
//!                                                                           |
//!                 q --> BlockRouter::score --> select --> AttentionBackend::attend --> out
//! ```
//!
//! A *token router* decides which tokens keep full attention, a *block router* which blocks a query
//! reads; what is read goes through one exact softmax. [`token_router::All`] with
//! [`block_router::All`] is dense attention, by the same code.
//!
//! Shapes are tokens first, heads next, head_dim last. This crate knows tensors, positions and pages;
//! it knows nothing of token ids, weights, files or models.

pub mod attention;
pub mod backend;
pub mod block_router;
pub mod cache;
pub mod parallel;
pub mod place;
pub mod select;
pub mod shape;
pub mod simd;
pub mod token_router;

pub use attention::{Attended, AttentionInput, Observer, Products, ProductsInput, RoutedAttention, Routing};
pub use cache::{KvCache, KvDtype, KvDtypes, LayerSpec, LayerStore, Step};
pub use place::{Destination, Place};
pub use shape::HeadShape;
