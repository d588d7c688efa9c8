//! Capacity: how many tokens a model's KV cache holds in given memory, with its windowed layers kept to
//! what they can see and with every layer keeping everything.

use crate::error::{Error, ErrorKind, Result};
use crate::manager::GroupConfig;
use crate::spec::{GroupKind, GroupPlan, ModelSpec};

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
    /// What `max_model_len` can be: the model's own, or the longest request that fits.
    pub max_model_len: u32,
    /// Tokens that fit when every layer keeps all of them.
    pub uniform_tokens: u64,
    /// The groups' shares.
    pub groups: Vec<GroupCapacity>,
}

/// One layer group's share of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupCapacity {
    /// What it keeps of a sequence.
    pub kind: GroupKind,
    /// Its layers.
    pub num_layers: usize,
    /// Tokens per block; of a state group, tokens between the places where a state can be kept.
    pub block_size: u32,
    /// Most blocks one request holds at once.
    pub request_blocks: usize,
    /// Bytes of a block that no layer uses.
    pub padding_bytes: usize,
    /// Bytes that the layers of the group use of those blocks.
    pub request_bytes: u64,
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
    let share = |group: GroupConfig, num_layers: usize, used: usize| {
        let request_blocks = group.max_blocks(request_tokens, in_flight_tokens);
        GroupCapacity {
            kind: group.kind,
            num_layers,
            block_size: group.block_size,
            request_blocks,
            padding_bytes: plan.block_bytes - used,
            request_bytes: request_blocks as u64 * used as u64,
        }
    };
    let attention = plan.groups.iter().map(|g| share(g.into(), g.layers.len(), g.used_bytes()));
    let states = plan.states.iter().map(|g| share(g.into(), g.layers.len(), g.used_bytes()));
    let groups = attention.chain(states).collect();
    let longest_request = longest_request(&plan, usable, in_flight_tokens);
    Ok(Capacity {
        block_bytes: plan.block_bytes,
        num_blocks,
        request_tokens,
        request_blocks,
        concurrency,
        tokens: (concurrency * request_tokens as f64) as u64,
        longest_request,
        max_model_len: spec.max_model_len.min(u32::try_from(longest_request).unwrap_or(u32::MAX)),
        uniform_tokens: memory_bytes / spec.token_bytes().max(1) as u64,
        groups,
    })
}

/// Most blocks one request of `tokens` holds at once, over all groups: the manager's own bound.
pub fn max_blocks(plan: &GroupPlan, tokens: usize, in_flight_tokens: usize) -> usize {
    GroupConfig::of(plan).iter().map(|group| group.max_blocks(tokens, in_flight_tokens)).sum()
}

/// The longest `max_model_len` of a model that `memory_bytes` serve on one rank, its own at most (vLLM's
/// `--max-model-len auto`). With it, and as many blocks as the memory holds, a manager starts.
///
/// # Errors
/// `PoolTooSmall` when not even one token fits; the errors of [`ModelSpec::group`].
pub fn fit_max_model_len(
    spec: &ModelSpec,
    block_size: u32,
    memory_bytes: u64,
    in_flight_tokens: usize,
) -> Result<u32> {
    // One token is the shortest request there is: its figures exist when any do.
    Ok(capacity(spec, block_size, memory_bytes, 1, in_flight_tokens)?.max_model_len)
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
            let plan = spec.group(if spec.states.is_empty() { 16 } else { 128 }).unwrap();
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
    fn a_manager_starts_with_the_length_that_fits_and_with_no_longer_one() {
        use crate::manager::{Eviction, Manager, ManagerConfig, Retention};
        for (name, block_size, memory) in [
            ("llama-3.1-8b", 16, 1u64 << 30),
            ("gemma-4-31b", 16, 4 << 30),
            ("qwen3-next-80b-a3b", 128, 3 << 30),
            ("gpt-oss-20b", 16, 64 << 30),
        ] {
            let spec = ModelSpec::preset(name).unwrap();
            let plan = spec.group(block_size).unwrap();
            let fit = fit_max_model_len(&spec, block_size, memory, 512).unwrap();
            let start = |max_model_len: u32| {
                Manager::new(ManagerConfig {
                    groups: GroupConfig::of(&plan),
                    num_blocks: (memory / plan.block_bytes as u64) as u32,
                    prefix_caching: true,
                    retention: Retention::default(),
                    eviction: Eviction::default(),
                    max_model_len,
                    in_flight_tokens: 512,
                    host: None,
                    identity: [0; 32],
                })
            };
            assert!(start(fit).is_ok(), "{name}: {fit}");
            assert!(fit == spec.max_model_len || start(fit + 1).is_err(), "{name}: {fit}");
        }
        let spec = ModelSpec::preset("llama-3.1-8b").unwrap();
        let err = fit_max_model_len(&spec, 16, 1 << 20, 0).unwrap_err();
        assert!(matches!(err.kind(), ErrorKind::PoolTooSmall { .. }), "{err}");
    }

    #[test]
    fn groups_report_what_a_request_takes_of_them() {
        let spec = ModelSpec::preset("qwen3-next-80b-a3b").unwrap();
        let figures = capacity(&spec, 128, 8 << 30, 32_768, 8192).unwrap();
        assert_eq!(figures.groups.len(), 37);
        let state = &figures.groups[1];
        assert_eq!((state.kind, state.num_layers), (GroupKind::State, 1));
        // A slot, the checkpoint it began with, and two ends with one unit of slack each.
        assert_eq!(state.request_blocks, 6);
        assert_eq!(state.request_bytes, 6 * 2_146_304);
        let sum: usize = figures.groups.iter().map(|group| group.request_blocks).sum();
        assert_eq!(sum, figures.request_blocks);
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
