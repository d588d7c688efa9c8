//! Request traces: in the Mooncake JSONL form, or generated.
//!
//! One request per line: `input_length`, `output_length` and `hash_ids`, one id per 512 prompt tokens
//! (github.com/kvcache-ai/Mooncake, FAST25 release). Equal ids stand for equal tokens: the token at
//! offset `p` of block `h` is `splitmix64(512 h + p) mod 100000`.

use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::ops::synthetic::splitmix64;

/// Prompt tokens that one hash id stands for.
const BLOCK: usize = 512;
/// Prompt tokens are below this, output tokens from it on: outputs are never mistaken for prompts.
const PROMPT_VOCABULARY: u64 = 100_000;
const OUTPUT_VOCABULARY: u64 = 50_000;

/// Output token `j` of request `request`.
pub fn output_token(request: usize, j: usize) -> u32 {
    let key = (1u64 << 40).wrapping_add(request as u64 * 65_536 + j as u64);
    (PROMPT_VOCABULARY + splitmix64(key) % OUTPUT_VOCABULARY) as u32
}

/// One line of a trace.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
struct Line {
    input_length: usize,
    output_length: usize,
    hash_ids: Vec<u64>,
}

/// A part of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// Tokens of a text that is named by the key of its first one.
    Text { first: u64, len: usize },
    /// What a request before was answered.
    Output { request: usize, len: usize },
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub prompt: Vec<Run>,
    pub output_len: usize,
}

/// The requests of a trace, expanded one at a time.
#[derive(Debug)]
pub struct Trace {
    requests: Vec<Request>,
    shrink: usize,
}

impl Trace {
    /// Reads the first `limit` requests of a trace. `shrink` divides every length (a power of two up to
    /// 512); hash blocks keep their first tokens.
    ///
    /// # Errors
    /// `Io`, or `Parse` with the number of the line that is wrong.
    pub fn read(path: &str, limit: usize, shrink: usize) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| {
            Error::new("trace", ErrorKind::Io { path: path.to_string(), source })
        })?;
        Self::parse(&text, limit, shrink)
    }

    /// [`Self::read`] of text.
    pub fn parse(text: &str, limit: usize, shrink: usize) -> Result<Self> {
        let lines = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
            .take(limit)
            .map(|(index, line)| {
                let error = |message: String| {
                    Error::new("trace", ErrorKind::Parse { line: index + 1, message })
                };
                let line: Line = serde_json::from_str(line).map_err(|e| error(e.to_string()))?;
                line.check().map_err(error)?;
                Ok(line.request())
            })
            .collect::<Result<Vec<_>>>()?;
        Self::new(lines, shrink)
    }

    /// A trace of these requests, of which `shrink` divides every length.
    ///
    /// # Errors
    /// `InvalidArgument` for none.
    pub fn new(requests: Vec<Request>, shrink: usize) -> Result<Self> {
        if requests.is_empty() {
            return Err(Error::invalid("trace", "the trace has no requests"));
        }
        Ok(Self { requests, shrink })
    }

    /// Requests.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Prompt of a request.
    pub fn prompt(&self, request: usize) -> Vec<u32> {
        let mut prompt = Vec::new();
        self.expand_prompt(request, &mut prompt);
        prompt
    }

    /// [`Self::prompt`] into memory that is used again.
    pub fn expand_prompt(&self, request: usize, prompt: &mut Vec<u32>) {
        prompt.clear();
        for &run in &self.requests[request].prompt {
            match run {
                Run::Text { first, len } => {
                    let keys = (0..len.div_ceil(self.shrink) as u64).map(|p| first.wrapping_add(p));
                    prompt.extend(keys.map(|key| (splitmix64(key) % PROMPT_VOCABULARY) as u32));
                }
                Run::Output { request, len } => {
                    let len = len.div_ceil(self.shrink);
                    prompt.extend((0..len).map(|j| output_token(request, j)));
                }
            }
        }
    }

    /// Output tokens of a request.
    pub fn output_len(&self, request: usize) -> usize {
        self.requests[request].output_len.div_ceil(self.shrink)
    }

    /// Tokens of the longest request, prompt and output.
    pub fn longest(&self) -> usize {
        (0..self.len())
            .map(|i| {
                let runs = self.requests[i].prompt.iter();
                let prompt: usize = runs.map(|run| run.len().div_ceil(self.shrink)).sum();
                prompt + self.output_len(i)
            })
            .max()
            .unwrap_or(0)
    }
}

impl Run {
    pub fn len(&self) -> usize {
        match *self {
            Self::Text { len, .. } | Self::Output { len, .. } => len,
        }
    }
}

impl Line {
    fn request(&self) -> Request {
        let run = |(block, &id): (usize, &u64)| Run::Text {
            first: id.wrapping_mul(BLOCK as u64),
            len: BLOCK.min(self.input_length - block * BLOCK),
        };
        Request {
            prompt: self.hash_ids.iter().enumerate().map(run).collect(),
            output_len: self.output_length,
        }
    }

    fn check(&self) -> Result<(), String> {
        let Self { input_length, output_length, hash_ids } = self;
        if *input_length == 0 {
            return Err("input_length is 0".into());
        }
        if *input_length > i32::MAX as usize / 2 || *output_length > 65_536 {
            return Err(format!(
                "input_length {input_length} or output_length {output_length} is out of range \
                 (at most {} and 65536)",
                i32::MAX / 2
            ));
        }
        if hash_ids.len() != input_length.div_ceil(BLOCK) {
            return Err(format!(
                "input_length {input_length} needs {} hash_ids of {BLOCK} tokens, {} are given",
                input_length.div_ceil(BLOCK),
                hash_ids.len()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = r#"{"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [0, 28]}

{"timestamp": 5, "input_length": 512, "output_length": 1, "hash_ids": [0]}
"#;

    #[test]
    fn expands_ids_and_outputs_by_the_published_rule() {
        let trace = Trace::parse(TRACE, usize::MAX, 1).unwrap();
        assert_eq!((trace.len(), trace.longest()), (2, 603));
        let prompt = trace.prompt(0);
        assert_eq!(prompt.len(), 600);
        assert_eq!(prompt[..4], [7535, 22465, 48110, 39053]);
        assert_eq!(prompt[512..516], [96517, 38524, 5285, 26755]);
        assert_eq!(trace.prompt(1), prompt[..512]);
        assert_eq!([0, 1, 2].map(|j| output_token(3, j)), [107651, 115823, 106716]);
    }

    #[test]
    fn shrinking_keeps_which_prefixes_are_shared() {
        let trace = Trace::parse(TRACE, usize::MAX, 32).unwrap();
        assert_eq!(trace.prompt(0).len(), 19);
        assert_eq!(trace.prompt(0)[..16], trace.prompt(1));
        assert_eq!((trace.output_len(0), trace.longest()), (1, 20));
    }

    #[test]
    fn bad_lines_are_named_by_number() {
        for (line, wrong) in [
            ("nonsense", "expected"),
            (r#"{"input_length": 0, "output_length": 3, "hash_ids": []}"#, "input_length is 0"),
            (r#"{"input_length": 513, "output_length": 3, "hash_ids": [1]}"#, "needs 2 hash_ids"),
            (r#"{"input_length": 5, "hash_ids": [1]}"#, "output_length"),
            (r#"{"input_length": -5, "output_length": 3, "hash_ids": [1]}"#, "integer"),
        ] {
            let error = Trace::parse(&format!("{TRACE}{line}\n"), usize::MAX, 1).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Parse { line: 4, .. }), "{error}");
            assert!(error.to_string().contains(wrong), "{error}");
            assert!(Trace::parse(&format!("{TRACE}{line}\n"), 2, 1).is_ok());
        }
        assert!(Trace::parse("\n", 5, 1).is_err());
    }
}
