//! The one error type of the crate: which operation failed, what was given, what is supported.

use std::fmt;

/// Result of every fallible operation of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed operation: its name and what went wrong.
#[derive(Debug)]
pub struct Error {
    op: &'static str,
    kind: Box<ErrorKind>,
}

impl Error {
    /// An error of `kind` in the operation `op` (a verb a user would recognise: `"attention"`).
    pub fn new(op: &'static str, kind: ErrorKind) -> Self {
        Self { op, kind: Box::new(kind) }
    }

    /// An argument that can never be served, in the operation `op`.
    pub fn invalid(op: &'static str, what: impl Into<String>) -> Self {
        Self::new(op, ErrorKind::InvalidArgument(what.into()))
    }

    /// A value outside of what is supported: names what was given and what would be accepted.
    pub fn unsupported(
        op: &'static str,
        what: &'static str,
        given: impl fmt::Display,
        supported: impl Into<String>,
    ) -> Self {
        Self::new(
            op,
            ErrorKind::Unsupported { what, given: given.to_string(), supported: supported.into() },
        )
    }

    /// The operation that failed.
    pub fn op(&self) -> &'static str {
        self.op
    }

    /// What went wrong.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.op, self.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &*self.kind {
            ErrorKind::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// What went wrong. Variants carry what a program needs to react; the message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No CUDA driver library on this machine.
    #[error(
        "no CUDA driver found (libcuda.so could not be loaded); use the CPU device or install an NVIDIA driver"
    )]
    NoDriver,
    /// The driver lacks something the crate needs.
    #[error("the CUDA driver ({found}) is too old: {needed}")]
    DriverTooOld {
        /// Version reported by the driver, e.g. `12.4`.
        found: String,
        /// What is needed, e.g. `12.4 or newer (cuLibraryLoadData)`.
        needed: String,
    },
    /// There is no device of this ordinal.
    #[error("device {ordinal} does not exist: the driver lists {count} device(s)")]
    NoDevice {
        /// The ordinal that was asked for.
        ordinal: usize,
        /// How many devices there are.
        count: usize,
    },
    /// The crate was built without nvcc: no kernel is embedded.
    #[error(
        "this build carries no CUDA kernels (nvcc was not found at build time); rebuild with NVCC or CUDA_HOME set, or use the CPU device"
    )]
    NoKernels,
    /// No embedded kernel image runs on this GPU.
    #[error(
        "no kernel image for {device} (compute capability {capability}); embedded: {embedded}; rebuild with HYBRIDKV_CUDA_ARCHS including it"
    )]
    NoKernelImage {
        /// Name of the GPU.
        device: String,
        /// Its compute capability, e.g. `9.0`.
        capability: String,
        /// Architectures in this build, e.g. `sm_80, sm_90a`.
        embedded: String,
    },
    /// A CUDA driver call failed.
    #[error("{call} failed with {name} ({code}): {message}")]
    Cuda {
        /// The driver function.
        call: &'static str,
        /// Its numeric result.
        code: u32,
        /// The symbolic name of the result.
        name: String,
        /// The driver's own description.
        message: String,
    },
    /// Memory of some kind could not be had.
    #[error("{requested} bytes of {kind} memory could not be allocated: {reason}")]
    OutOfMemory {
        /// `device`, `pinned host`, ...
        kind: &'static str,
        /// Bytes asked for.
        requested: u64,
        /// Why, with the arithmetic where it is known.
        reason: String,
    },
    /// An argument that can never be served.
    #[error("{0}")]
    InvalidArgument(String),
    /// A value outside of what is supported.
    #[error("{what} {given} is not supported; supported: {supported}")]
    Unsupported {
        /// What kind of value, e.g. `head_dim`.
        what: &'static str,
        /// The value given.
        given: String,
        /// The values that would be accepted.
        supported: String,
    },
    /// The pool cannot serve the request now; nothing was changed.
    #[error("no free blocks: {needed} needed, {free} free; nothing was changed")]
    NoFreeBlocks {
        /// Blocks the request needs, hits without a user included.
        needed: usize,
        /// Blocks that could be taken.
        free: usize,
    },
    /// The host tier cannot take what is to be swapped out; nothing was changed.
    #[error("no host slots: {needed} needed, {free} free or evictable; nothing was changed")]
    NoHostSlots {
        /// Slots that are needed.
        needed: usize,
        /// Slots that could be taken.
        free: usize,
    },
    /// A sequence whose transfers have to end first.
    #[error("sequence {seq} waits for {transfers} transfer(s); try again once they have ended")]
    NotReady {
        /// The sequence.
        seq: u64,
        /// Transfers that have not ended.
        transfers: usize,
    },
    /// The request could never be served by this pool, however empty.
    #[error(
        "a request of {tokens} tokens can need {needed} blocks, the pool has {capacity}; give more memory or lower max_model_len"
    )]
    PoolTooSmall {
        /// Tokens of the request.
        tokens: usize,
        /// Blocks it can need at its peak.
        needed: usize,
        /// Usable blocks of the pool.
        capacity: usize,
    },
    /// Layers that cannot share a pool of equal blocks with the others.
    #[error("{layers} cannot share a pool with the other layers: {reason}")]
    CannotUnify {
        /// Which layers.
        layers: String,
        /// Why, and what would help.
        reason: String,
    },
    /// The sequence would become longer than `max_model_len`.
    #[error("{tokens} tokens exceed max_model_len {max_model_len}")]
    TooLong {
        /// Length asked for.
        tokens: usize,
        /// The configured bound.
        max_model_len: usize,
    },
    /// A quota that does not hold a block.
    #[error("a quota of {bytes} bytes holds no block of {block_bytes}; give it one block at least")]
    QuotaTooSmall {
        /// Bytes of the quota.
        bytes: u64,
        /// Bytes of a block.
        block_bytes: u64,
    },
    /// Pins would hold too much of a tier.
    #[error(
        "a pin of {needed} blocks on top of {pinned} would hold more than the {limit} of {capacity} that pins may have of the {tier} tier"
    )]
    PinTooLarge {
        /// Its name.
        tier: &'static str,
        /// Blocks to pin.
        needed: usize,
        /// Blocks that pins hold already.
        pinned: usize,
        /// Blocks that pins may hold.
        limit: usize,
        /// Blocks of the tier.
        capacity: usize,
    },
    /// A pin that was given back, or never given.
    #[error("pin {0} is not known")]
    UnknownPin(u64),
    /// A sequence id that is not live.
    #[error("sequence {0} is not known")]
    UnknownSequence(u64),
    /// A sequence id that is live already.
    #[error("sequence {0} exists already")]
    DuplicateSequence(u64),
    /// A windowed group has freed blocks that a shorter sequence would see.
    #[error(
        "sequence {seq} cannot be cut back to {tokens} tokens: layer group {group} has freed what they see; free it and allocate it anew"
    )]
    OutOfWindow {
        /// The sequence.
        seq: u64,
        /// Tokens it was to keep.
        tokens: usize,
        /// The first layer group that lacks blocks.
        group: usize,
    },
    /// A transfer completion that names no outstanding transfer.
    #[error("transfer {0} is not outstanding")]
    UnknownTransfer(u64),
    /// A rank that is none of the set's.
    #[error("rank {rank} does not exist: there are {ranks}")]
    UnknownRank {
        /// The rank.
        rank: u32,
        /// How many there are.
        ranks: u32,
    },
    /// Input text that does not parse.
    #[error("line {line}: {message}")]
    Parse {
        /// 1-based line number.
        line: usize,
        /// What is wrong with it.
        message: String,
    },
    /// Data that was verified and found wrong.
    #[error("verification failed: {0}")]
    Corrupt(String),
    /// An operating system error.
    #[error("{path}: {source}")]
    Io {
        /// The file or resource.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
}
