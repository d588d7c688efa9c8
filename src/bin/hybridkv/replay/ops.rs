//! The operations of a replayed session as they are written: one JSON object per line.

use std::borrow::Cow;

use hybridkv::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::OP;

/// Tokens of one operation, at most; a run-length list can name more than memory holds.
const MAX_TOKENS: usize = 1 << 27;

/// One operation. `docs/replay.md` says what each does and answers.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    Lookup {
        /// A lookup pins nothing, so that the name is of no use.
        #[serde(default, rename = "id")]
        _id: Option<Id>,
        tokens: Tokens,
        #[serde(default)]
        salt: String,
        #[serde(default)]
        lora: String,
    },
    Allocate {
        id: Id,
        tokens: Tokens,
        #[serde(default)]
        salt: String,
        #[serde(default)]
        lora: String,
        #[serde(default)]
        num_tokens: usize,
        #[serde(default)]
        lookahead: usize,
    },
    Append {
        id: Id,
        tokens: Tokens,
    },
    Advance {
        id: Id,
        computed: usize,
        settled: Option<usize>,
    },
    Fork {
        id: Id,
        from: Id,
    },
    Trim {
        id: Id,
        tokens: usize,
    },
    Rollback {
        id: Id,
        tokens: usize,
    },
    Preempt {
        id: Id,
    },
    Resume {
        id: Id,
    },
    Free {
        id: Id,
    },
    Abort {
        id: Id,
    },
    Forget {
        id: Id,
        group: usize,
        block_index: usize,
    },
    ResetPrefixCache {},
    State {},
    Events {},
    Tick {
        n: Option<usize>,
    },
    Fault {
        #[serde(rename = "where")]
        place: Place,
        kind: Misbehaviour,
        count: u32,
    },
    Stats {},
}

/// A caller's name of a sequence: a number or a string.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Id {
    Number(u64),
    Name(String),
}

/// Tokens one by one, or as runs of equal ones.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Tokens {
    List(Vec<u32>),
    Runs(Runs),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runs {
    /// Token and count.
    runs: Vec<(u32, usize)>,
}

/// Which transfers misbehave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Device to host.
    Store,
    /// Host to device.
    Load,
    /// Storage to host.
    StorageRead,
    /// Host to storage.
    StorageWrite,
}

/// How they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Misbehaviour {
    /// Ends with an error.
    Fail,
    /// Moves fewer bytes than it should, and ends with an error.
    Short,
    /// Ends without an error, and some bytes are wrong.
    Corrupt,
    /// Ends with the tick after the one that would have ended it.
    Delay,
}

/// What a line asks for.
#[derive(Debug)]
pub enum Line {
    /// The fields of the `config` operation, its name left out.
    Config(Value),
    Op(Op),
}

impl Line {
    /// Reads one line.
    ///
    /// # Errors
    /// `InvalidArgument` saying where the line is no operation.
    pub fn parse(line: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Name<'a> {
            #[serde(borrow)]
            op: Cow<'a, str>,
        }
        let wrong = |error: serde_json::Error| Error::invalid(OP, error.to_string());
        let name: Name<'_> = serde_json::from_slice(line).map_err(wrong)?;
        if name.op != "config" {
            return serde_json::from_slice(line).map(Self::Op).map_err(wrong);
        }
        let mut fields: Map<String, Value> = serde_json::from_slice(line).map_err(wrong)?;
        fields.remove("op");
        Ok(Self::Config(Value::Object(fields)))
    }
}

impl Tokens {
    /// All of them.
    ///
    /// # Errors
    /// `Unsupported` for more than memory may hold.
    pub fn expand(self) -> Result<Vec<u32>> {
        let Runs { runs } = match self {
            Self::List(tokens) => return Ok(tokens),
            Self::Runs(runs) => runs,
        };
        let total = runs.iter().try_fold(0usize, |sum, &(_, count)| sum.checked_add(count));
        match total {
            Some(total) if total <= MAX_TOKENS => Ok(runs
                .into_iter()
                .flat_map(|(token, count)| std::iter::repeat_n(token, count))
                .collect()),
            _ => Err(Error::unsupported(
                OP,
                "a list of more tokens than",
                MAX_TOKENS,
                "shorter ones; append the rest",
            )),
        }
    }
}
