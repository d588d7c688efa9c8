//! Capacity: how many tokens a model's KV cache holds in given memory, with its windowed layers kept to
//! what they can see and with every layer keeping everything.

use crate::error::{Error, ErrorKind, Result};
use crate::manager::GroupConfig;
use crate::spec::{AttentionKind, GroupPlan, ModelSpec};

/// Capacity of one rank's memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Capacity {
    /// Bytes of one block of the pool.
    pub block_bytes: usize,
    /// Blocks of the pool, the null block included.
    pub num_blocks: u32,
    /// Length of the requests that the figures are for.
    pub request_tokens: usize,
    /// Most blocks one such request holds at once.
    pub request_blocks: usize,
    /// Such requests that fit at once.
    pub concurrency: f64,
    /// Tokens of them.
    pub tokens: u64,
    /// Longest single request that fits, whatever the model allows.
    pub longest_request: usize,
    /// Tokens that fit when every layer keeps all of them.
    pub uniform_tokens: u64,
    /// The groups' shares.
    pub groups: Vec<GroupCapacity>,
}

/// One layer group's share of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupCapacity {
    /// What its layers' queries see.
    pub kind: AttentionKind,
    /// Its layers.
    pub num_layers: usize,
    /// Tokens per block.
    pub block_size: u32,
    /// Most blocks one request holds at once.
    pub request_blocks: usize,
    /// Bytes of a block that no layer uses.
    pub padding_bytes: usize,
}

impl Capacity {
    /// How many times the tokens of uniform allocation fit.
    pub fn gain(&self) -> f64 {
        self.tokens as f64 / self.uniform_tokens.max(1) as f64
    }
}

/// Capacity of `memory_bytes` for requests of `request_tokens` of a model (one rank's share of it), of which
/// at most `in_flight_tokens` are computed and not settled.
///
/// # Errors
/// `PoolTooSmall` when not one such request fits; the errors of [`ModelSpec::group`].
pub fn capacity(
    spec: &ModelSpec,
    block_size: u32,
    memory_bytes: u64,
    request_tokens: usize,
    in_flight_tokens: usize,
) -> Result<Capacity> {
    const OP: &str = "plan";
    if request_tokens == 0 {
        return Err(Error::invalid(OP, "a request has at least one token"));
    }
    let plan = spec.group(block_size)?;
    let num_blocks = u32::try_from(memory_bytes / plan.block_bytes as u64).unwrap_or(u32::MAX);
    let usable = num_blocks.saturating_sub(1) as usize;
    let request_blocks = max_blocks(&plan, request_tokens, in_flight_tokens);
    if request_blocks > usable {
        return Err(Error::new(
            OP,
            ErrorKind::PoolTooSmall {
                tokens: request_tokens,
                needed: request_blocks,
                capacity: usable,
            },
        ));
    }
    let concurrency = usable as f64 / request_blocks as f64;
    let groups = plan
        .groups
        .iter()
        .map(|group| GroupCapacity {
            kind: group.kind,
            num_layers: group.layers.len(),
            block_size: group.block_size,
            request_blocks: GroupConfig::from(group).max_blocks(request_tokens, in_flight_tokens),
            padding_bytes: plan.block_bytes - group.used_bytes(),
        })
        .collect();
    Ok(Capacity {
        block_bytes: plan.block_bytes,
        num_blocks,
        request_tokens,
        request_blocks,
        concurrency,
        tokens: (concurrency * request_tokens as f64) as u64,
        longest_request: longest_request(&plan, usable, in_flight_tokens),
        uniform_tokens: memory_bytes / spec.token_bytes().max(1) as u64,
        groups,
    })
}

/// Most blocks one request of `tokens` holds at once, over all groups: the manager's own bound.
pub fn max_blocks(plan: &GroupPlan, tokens: usize, in_flight_tokens: usize) -> usize {
    plan.groups
        .iter()
        .map(|group| GroupConfig::from(group).max_blocks(tokens, in_flight_tokens))
        .sum()
}

/// The longest request that a pool of `usable_blocks` (the null block left out) can hold: what
/// `max_model_len` may be. Models of windows only hold requests of any length: up to `u32::MAX`.
pub fn longest_request(plan: &GroupPlan, usable_blocks: usize, in_flight_tokens: usize) -> usize {
    let (mut fits, mut too_long) = (0, u32::MAX as usize + 1);
    while fits + 1 < too_long {
        let tokens = fits + (too_long - fits) / 2;
        match max_blocks(plan, tokens, in_flight_tokens) <= usable_blocks {
            true => fits = tokens,
            false => too_long = tokens,
        }
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_request_is_the_longest_that_fits() {
        for name in ModelSpec::preset_names() {
            let spec = ModelSpec::preset(name).unwrap();
            let plan = spec.group(16).unwrap();
            for usable in [0, 1, 100, 5_000, 80_000] {
                let longest = longest_request(&plan, usable, 512);
                assert!(longest == 0 || max_blocks(&plan, longest, 512) <= usable, "{name}");
                if longest < u32::MAX as usize {
                    assert!(max_blocks(&plan, longest + 1, 512) > usable, "{name}");
                }
            }
        }
    }

    #[test]
    fn uniform_models_gain_nothing_and_small_memory_is_refused() {
        let spec = ModelSpec::preset("llama-3.1-8b").unwrap();
        let memory = 1 << 30;
        let uniform = capacity(&spec, 16, memory, 4096, 512).unwrap();
        // The null block is all that is lost.
        assert_eq!(uniform.uniform_tokens - uniform.tokens, 16);
        assert_eq!(uniform.longest_request as u64, uniform.tokens);
        let err = capacity(&spec, 16, memory, 8192, 512).unwrap_err();
        assert!(matches!(err.kind(), ErrorKind::PoolTooSmall { needed: 512, capacity: 511, .. }));
        assert!(capacity(&spec, 16, 10, 1, 0).is_err());
        assert!(capacity(&spec, 16, memory, 0, 0).is_err());
    }
}
