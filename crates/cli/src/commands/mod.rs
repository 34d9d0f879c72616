//! One file per command.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod compare;
pub(crate) mod completions;
mod crossover;
pub(crate) mod doctor;
mod energy;
pub(crate) mod eval;
pub(crate) mod generate;
mod input;
pub(crate) mod models;
pub(crate) mod needle;
mod rates;
mod reply;
pub(crate) mod route;
mod route_log;
mod statistics;
pub(crate) mod train_router;
