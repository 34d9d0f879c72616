//! Errors as a user meets them: what, why with numbers, what to type, and an exit code.

use model::message;
use serde_json::json;
use std::fmt;

/// What went wrong, by exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A bug of ours.
    Unexpected = 1,
    Usage = 2,
    NotFound = 3,
    Network = 4,
    Malformed = 5,
    OutOfMemory = 6,
    ContextOverflow = 7,
    Device = 8,
    Disk = 9,
    Gate = 10,
    Interrupted = 130,
}

impl Kind {
    fn code(self) -> &'static str {
        match self {
            Self::Unexpected => "unexpected",
            Self::Usage => "usage",
            Self::NotFound => "not_found",
            Self::Network => "network",
            Self::Malformed => "malformed",
            Self::OutOfMemory => "out_of_memory",
            Self::ContextOverflow => "context_overflow",
            Self::Device => "device",
            Self::Disk => "disk",
            Self::Gate => "gate",
            Self::Interrupted => "interrupted",
        }
    }
}

/// An error that was foreseen.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    what: String,
    why: Option<String>,
    hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), why: None, hint: None }
    }

    /// A file that does not hold what it should.
    pub(crate) fn malformed(what: impl Into<String>) -> Self {
        Self::new(Kind::Malformed, what)
    }

    /// Why it failed, in numbers, where that is known.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.why.as_deref()
    }

    pub(crate) fn why(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    /// What the user can type.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

/// A process of ours ended with this exit code, and has said why.
#[derive(Debug)]
pub(crate) struct Reported(pub(crate) u8);

impl fmt::Display for Reported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a process of ours ended with {}", self.0)
    }
}

impl std::error::Error for Reported {}

/// Makes a candle error, met while reading a model's files, a [`Kind::Malformed`] one.
pub(crate) fn damaged(error: candle_core::Error) -> Failure {
    computed(Kind::Malformed, &error)
}

/// Makes a candle error, met while computing, a [`Kind::Unexpected`] one.
pub(crate) fn unexpected(error: candle_core::Error) -> Failure {
    computed(Kind::Unexpected, &error)
}

/// `kind`, unless the GPU is full: what else runs there is not planned for.
fn computed(kind: Kind, error: &candle_core::Error) -> Failure {
    let what = message(error);
    match what.contains("CUDA_ERROR_OUT_OF_MEMORY") {
        true => Failure::new(Kind::OutOfMemory, "the GPU's memory is full").why(what).hint("a smaller -c or -b, or --device cpu"),
        false => Failure::new(kind, what),
    }
}

/// Runs `work` with panic messages off: for code of others whose panics are caught.
pub(crate) fn quietly<T>(work: impl FnOnce() -> T) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = work();
    std::panic::set_hook(hook);
    result
}

/// Reports `error` where the user looks for it, and returns the exit code.
pub(crate) fn report(error: &anyhow::Error, json: bool) -> u8 {
    let failure = error.chain().find_map(|cause| cause.downcast_ref::<Failure>());
    let kind = failure.map_or(Kind::Unexpected, |failure| failure.kind);
    let message = format!("{error:#}");
    let why = failure.and_then(|failure| failure.why.clone());
    let hint = failure.and_then(|failure| failure.hint.clone());
    if json {
        let report = json!({"error": {"code": kind.code(), "exit": kind as u8, "message": message, "why": why, "hint": hint}});
        let _ = crate::ui::stdout(&format!("{report}\n"));
    } else {
        eprintln!("error: {message}");
        if let Some(why) = why {
            eprintln!("  {}", why.replace('\n', "\n  "));
        }
        match (hint, kind) {
            (Some(hint), _) => eprintln!("  try: {}", hint.replace('\n', "\n       ")),
            (None, Kind::Unexpected) => eprintln!("  this is unexpected: please report it, with foveate {}", crate::args::VERSION),
            (None, _) => {}
        }
    }
    kind as u8
}
