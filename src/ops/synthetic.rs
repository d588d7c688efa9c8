//! `synthetic`: keys, values and queries that are a function of the token history alone.
//!
//! Stand-in for a model: whatever block a key or value of a token ends up in, on whatever tier, its bits
//! can be recomputed from the tokens that precede it, so that a misplaced or damaged block shows up
//! bit-exactly. Elements follow the per-channel value distribution of real KV (tests/fixtures/kv).
//!
//! Definition, the same here and in kernels/synthetic.cu, integer arithmetic and table lookup only:
//! - the history hash of a position is `history(hash of the position before, its token)`;
//! - the elements `8 v .. 8 v + 8` of a head draw their bits from
//!   `splitmix64(hash + GOLDEN * counter)`, counter = `(tensor + 1) << 56 | layer << 32 | head * head_dim / 8 + v`;
//! - byte `e` of that word, modulo 128, picks a quantile of channel
//!   `(head * head_dim + 8 v + e) % 192` of the tensor.

use half::{bf16, f16};

use super::{Kernel, Kernels, Loader};
use crate::abi::hkv_synthetic_params;
use crate::device::cuda::LaunchConfig;
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};
use crate::layout::{Dtype, KvShape};

const OP: &str = "synthetic";
/// Threads per CTA, as in kernels/synthetic.cu.
const THREADS: u32 = 256;
/// CTAs per multiprocessor: 64 warps, what an SM holds.
const CTAS_PER_SM: u32 = 8;

/// Channels of the value distribution.
pub const CHANNELS: usize = 192;
/// Quantiles per channel.
pub const QUANTILES: usize = 128;
/// Elements that share one hash; `head_dim` is a multiple of it.
pub const VECTOR: usize = 8;

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// bf16, `[K|V|Q][CHANNELS][QUANTILES]`, little endian; provenance in tests/fixtures/kv/README.md.
static FIXTURE: &[u8; 3 * CHANNELS * QUANTILES * 2] =
    include_bytes!("../../tests/fixtures/kv/quantiles.bin");

/// What an element belongs to; the number is its place in the distribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tensor {
    /// Keys.
    K = 0,
    /// Values.
    V = 1,
    /// Queries.
    Q = 2,
}

/// The splitmix64 generator's output function (Steele, Lea, Flood 2014), state increment included.
pub const fn splitmix64(x: u64) -> u64 {
    let z = x.wrapping_add(GOLDEN);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Hash of a history extended by one token. An empty history is any seed of the caller's.
pub const fn history(previous: u64, token: u32) -> u64 {
    splitmix64(previous.wrapping_add(GOLDEN.wrapping_mul(token as u64)))
}

/// The value distribution in one element type.
#[derive(Debug, Clone)]
pub struct Distribution {
    /// Bit patterns, `[K|V|Q][CHANNELS][QUANTILES]`.
    elements: Vec<u16>,
}

impl Distribution {
    /// The embedded distribution as `dtype`.
    ///
    /// # Errors
    /// `Unsupported` for types other than bf16 and f16.
    pub fn embedded(dtype: Dtype) -> Result<Self> {
        let convert: fn(u16) -> u16 = match dtype {
            Dtype::Bf16 => |bits| bits,
            Dtype::F16 => |bits| f16::from_f32(bf16::from_bits(bits).to_f32()).to_bits(),
            Dtype::F32 | Dtype::E4m3 => {
                return Err(Error::unsupported(OP, "dtype", dtype.name(), "bf16, f16"));
            }
        };
        let elements = FIXTURE
            .chunks_exact(2)
            .map(|bytes| convert(u16::from_le_bytes([bytes[0], bytes[1]])))
            .collect();
        Ok(Self { elements })
    }

    /// Bit patterns, `[K|V|Q][CHANNELS][QUANTILES]`: what the kernel reads on the device.
    pub fn elements(&self) -> &[u16] {
        &self.elements
    }

    /// The bit patterns of one head of a token: `out` has `head_dim` elements, whole vectors of 8.
    pub fn fill(&self, hash: u64, layer: u32, tensor: Tensor, head: u32, out: &mut [u16]) {
        debug_assert!(out.len().is_multiple_of(VECTOR));
        fill_head(&self.elements, hash, layer, tensor, head, out);
    }
}

/// The definition of the module documentation, for one head of one token.
fn fill_head(elements: &[u16], hash: u64, layer: u32, tensor: Tensor, head: u32, out: &mut [u16]) {
    let first = head as usize * out.len();
    let domain = (tensor as u64 + 1) << 56 | (layer as u64) << 32;
    for (v, vector) in out.chunks_mut(VECTOR).enumerate() {
        let counter = domain | (first / VECTOR + v) as u64;
        let bits = splitmix64(hash.wrapping_add(GOLDEN.wrapping_mul(counter)));
        let channel = tensor as usize * CHANNELS + (first + v * VECTOR) % CHANNELS;
        let rows = &elements[channel * QUANTILES..];
        for (e, element) in vector.iter_mut().enumerate() {
            let quantile = (bits >> (8 * e)) as usize % QUANTILES;
            *element = rows[e * QUANTILES + quantile];
        }
    }
}

/// Arguments of [`Kernels::synthetic`].
#[derive(Debug, Clone, Copy)]
pub struct SyntheticArgs {
    /// `[num_tokens]` u64 history hashes, on the device.
    pub hashes: Span,
    /// [`Distribution::elements`] of the shape's type, on the device.
    pub distribution: Span,
    /// Queries to write, contiguous `[num_tokens, num_qo_heads, head_dim]`.
    pub q: Span,
    /// Keys to write, contiguous `[num_tokens, num_kv_heads, head_dim]`.
    pub k_new: Span,
    /// Values to write, likewise.
    pub v_new: Span,
    /// Shape of a token's keys and values.
    pub shape: KvShape,
    /// Query heads.
    pub num_qo_heads: u32,
    /// The layer.
    pub layer: u32,
    /// Tokens.
    pub num_tokens: u32,
}

pub(super) struct Loaded {
    synthetic: Kernel,
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        let kernel = loader.file("synthetic")?;
        Ok(Self { synthetic: kernel("hkv_synthetic", 0)? })
    }
}

impl Kernels {
    /// Writes the queries, keys and values of new tokens of one layer. No tokens are a no-op.
    ///
    /// # Errors
    /// `Unsupported` for element types other than bf16 and f16 and for a head_dim that is no multiple of 8;
    /// `InvalidArgument` for buffers that are misaligned or too short.
    ///
    /// # Safety
    /// Until the stream has passed the launch, every span in `args` is device memory of that length;
    /// nothing else accesses what is written, and nothing writes what is read.
    pub unsafe fn synthetic(&self, args: &SyntheticArgs, stream: StreamRef<'_>) -> Result<()> {
        if args.num_tokens == 0 {
            return Ok(());
        }
        args.check()?;
        let params = hkv_synthetic_params {
            hashes: args.hashes.address as *const _,
            distribution: args.distribution.address as *const _,
            q: args.q.address as *mut _,
            k_new: args.k_new.address as *mut _,
            v_new: args.v_new.address as *mut _,
            layer: args.layer as i32,
            num_tokens: args.num_tokens as i32,
            num_qo_heads: args.num_qo_heads as i32,
            num_kv_heads: args.shape.num_kv_heads as i32,
            head_dim: args.shape.head_dim as i32,
        };
        let rows = args.num_qo_heads as u64 + 2 * args.shape.num_kv_heads as u64;
        let vectors =
            args.num_tokens as u64 * rows * (args.shape.head_dim as usize / VECTOR) as u64;
        let most = self.device().info().multiprocessors.max(1) * CTAS_PER_SM;
        let ctas = vectors.div_ceil(THREADS as u64).clamp(1, most as u64) as u32;
        let config = LaunchConfig::linear(ctas, THREADS);
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu = |params: &_| unsafe { run_on_cpu(params) };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(&self.synthetic.synthetic, config, &params, stream, on_cpu) }
    }
}

/// The kernel on the CPU device.
///
/// # Safety
/// Every address in `p` is valid for what abi/params.h says that the kernel reads or writes there.
unsafe fn run_on_cpu(p: &hkv_synthetic_params) {
    let (tokens, dim) = (p.num_tokens as usize, p.head_dim as usize);
    // SAFETY: the caller vouches for the addresses; lengths follow abi/params.h.
    let (hashes, elements) = unsafe {
        (
            std::slice::from_raw_parts(p.hashes, tokens),
            std::slice::from_raw_parts(p.distribution, 3 * CHANNELS * QUANTILES),
        )
    };
    for (tensor, out, heads) in [
        (Tensor::Q, p.q, p.num_qo_heads),
        (Tensor::K, p.k_new, p.num_kv_heads),
        (Tensor::V, p.v_new, p.num_kv_heads),
    ] {
        let heads = heads as usize;
        // SAFETY: as above; the outputs overlap nothing else.
        let out = unsafe { std::slice::from_raw_parts_mut(out.cast(), tokens * heads * dim) };
        for (row, out) in out.chunks_exact_mut(dim).enumerate() {
            let (token, head) = (row / heads, row % heads);
            fill_head(elements, hashes[token], p.layer as u32, tensor, head as u32, out);
        }
    }
}

impl SyntheticArgs {
    fn check(&self) -> Result<()> {
        let KvShape { num_kv_heads, head_dim, dtype } = self.shape;
        if !matches!(dtype, Dtype::Bf16 | Dtype::F16) {
            return Err(Error::unsupported(OP, "dtype", dtype.name(), "bf16, f16"));
        }
        if head_dim == 0 || !(head_dim as usize).is_multiple_of(VECTOR) {
            return Err(Error::unsupported(OP, "head_dim", head_dim, "multiples of 8"));
        }
        if self.num_tokens > i32::MAX as u32 || self.layer > i32::MAX as u32 {
            return Err(Error::unsupported(
                OP,
                "num_tokens or layer",
                self.num_tokens.max(self.layer),
                "up to 2^31 - 1",
            ));
        }
        let bytes = |heads: u32, what: &str| {
            (self.num_tokens as u64)
                .checked_mul(heads as u64)
                .and_then(|n| n.checked_mul(head_dim as u64 * 2))
                .ok_or_else(|| Error::invalid(OP, format!("the bytes of {what} overflow u64")))
        };
        self.hashes.check(OP, "hashes", self.num_tokens as u64 * 8, 8)?;
        self.distribution.check(OP, "distribution", FIXTURE.len() as u64, 16)?;
        self.q.check(OP, "q", bytes(self.num_qo_heads, "q")?, 16)?;
        self.k_new.check(OP, "k_new", bytes(num_kv_heads, "k_new")?, 16)?;
        self.v_new.check(OP, "v_new", bytes(num_kv_heads, "v_new")?, 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix64_gives_the_published_sequence() {
        // First outputs of splitmix64 seeded with 1234567 (the vectors in Rosetta Code and numpy's tests).
        assert_eq!(splitmix64(1_234_567), 6_457_827_717_110_365_317);
        assert_eq!(splitmix64(1_234_567u64.wrapping_add(GOLDEN)), 3_203_168_211_198_807_973);
    }

    #[test]
    fn elements_depend_on_every_coordinate_and_on_the_whole_history() {
        let distribution = Distribution::embedded(Dtype::Bf16).unwrap();
        let draw = |hash, layer, tensor, head| {
            let mut out = [0; 64];
            distribution.fill(hash, layer, tensor, head, &mut out);
            out
        };
        let a = history(history(7, 1), 2);
        let base = draw(a, 3, Tensor::K, 1);
        assert_eq!(base, draw(a, 3, Tensor::K, 1));
        for other in [
            draw(history(history(7, 2), 1), 3, Tensor::K, 1),
            draw(history(history(8, 1), 2), 3, Tensor::K, 1),
            draw(history(history(history(7, 0), 1), 2), 3, Tensor::K, 1),
            draw(a, 4, Tensor::K, 1),
            draw(a, 3, Tensor::V, 1),
            draw(a, 3, Tensor::Q, 1),
            draw(a, 3, Tensor::K, 2),
        ] {
            let same = base.iter().zip(other).filter(|(x, y)| **x == *y).count();
            assert!(same < 12, "{same} of 64 elements are equal");
        }
    }

    #[test]
    fn channels_have_the_distribution_of_the_fixture() {
        let distribution = Distribution::embedded(Dtype::Bf16).unwrap();
        let n = 4096;
        let (mut sums, mut hash) = ([0f64; 64], 1);
        let mut out = [0; 64];
        for token in 0..n {
            hash = history(hash, token);
            distribution.fill(hash, 0, Tensor::K, 2, &mut out);
            for (sum, bits) in sums.iter_mut().zip(out) {
                *sum += bf16::from_bits(bits).to_f64();
            }
        }
        for (dim, sum) in sums.into_iter().enumerate() {
            let row: Vec<f64> = distribution.elements[(2 * 64 + dim) * QUANTILES..][..QUANTILES]
                .iter()
                .map(|bits| bf16::from_bits(*bits).to_f64())
                .collect();
            let mean = row.iter().sum::<f64>() / QUANTILES as f64;
            let variance =
                row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / QUANTILES as f64;
            let error = (sum / n as f64 - mean).abs();
            assert!(error < 5.0 * (variance / n as f64).sqrt(), "channel {dim}: off by {error}");
            assert!(row.is_sorted(), "channel {dim} is not sorted");
        }
    }
}
